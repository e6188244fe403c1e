"""What somebody has on AWS before a cluster is made there, as `clusters/aws.yaml` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

IMAGE = "ami-004d285ecf53fb335"
PARAMETER = "/raylm/image"
"""Under which the image's id is kept."""


def own_account(client: Callable[[str], Any]) -> tuple[str, str]:
    """The ids of a subnet and a security group, made with the instance profiles and a parameter for the image.

    :param client: gives boto3's client of a service.
    """
    ec2, iam = client("ec2"), client("iam")
    network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.1.0/24", AvailabilityZone="eu-central-1a")
    group = ec2.create_security_group(GroupName="raylm", Description="raylm", VpcId=network)["GroupId"]
    for name in ("raylm-head", "raylm-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    client("ssm").put_parameter(Name=PARAMETER, Value=IMAGE, Type="String")
    return subnet["Subnet"]["SubnetId"], group


def forget_earlier_tests() -> None:
    """Empty moto, whose memory is that of the process, of all but S3, where other tests have a bucket."""
    from moto.backends import get_backend

    for service in ("ec2", "iam", "ssm"):
        backends = get_backend(service)
        for account in backends.values():
            account.reset()
        backends.clear()
