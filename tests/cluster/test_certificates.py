"""TLS between the machines of a cluster."""

from __future__ import annotations

import socket
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raylm.cli import main
from raylm.cluster.certificates import make_authority, make_certificate
from raylm.errors import RaylmError
from raylm.settings import Settings
from tests.cluster.conftest import Cluster

_WORK = """
import os, ray
ray.init(logging_level="ERROR")

@ray.remote(num_cpus=1)
def machine():
    return ray.util.get_node_ip_address(), os.environ["RAY_TLS_SERVER_CERT"]

address, certificate = ray.get(machine.remote())
assert certificate.endswith(f"{address}.crt"), (address, certificate)
print("worked at", address)
"""


def test_a_machine_has_a_certificate_that_the_authority_signed(tmp_path: Path) -> None:
    place = tmp_path / "tls"
    make_authority(place)
    before = (place / "ca.crt").read_bytes()
    make_authority(place)
    assert (place / "ca.crt").read_bytes() == before, "it is made once"
    said = [make_certificate(place, [address, "192.168.1.5"]) for address in ("10.0.0.7", "10.0.0.8")]
    assert said[0] == {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(place / "10.0.0.7.crt"),
        "RAY_TLS_SERVER_KEY": str(place / "10.0.0.7.key"),
        "RAY_TLS_CA_CERT": str(place / "ca.crt"),
    }
    for machine in ("10.0.0.7", "10.0.0.8"):
        for address in (machine, "192.168.1.5"):
            checked = [
                "openssl",
                "verify",
                "-CAfile",
                place / "ca.crt",
                "-verify_ip",
                address,
                place / f"{machine}.crt",
            ]
            subprocess.run(checked, check=True, capture_output=True)
        told = subprocess.run(
            ["openssl", "x509", "-in", place / f"{machine}.crt", "-noout", "-subject", "-issuer"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert f"subject=CN = {machine}" in told.stdout and "issuer=CN = raylm authority" in told.stdout
    assert sorted(file.name for file in place.iterdir()) == [
        "10.0.0.7.crt", "10.0.0.7.key", "10.0.0.8.crt", "10.0.0.8.key", "ca.crt", "ca.key",
    ]  # fmt: skip
    assert {stat.S_IMODE(key.stat().st_mode) for key in place.glob("*.key")} == {0o600}


def test_what_cannot_be_signed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = CliRunner().invoke(main, ["cluster", "certificate", "--directory", str(tmp_path), "--node-ip", "10.0.0.7"])
    assert found.exit_code == 1
    assert f"{tmp_path}/ca.crt: is not there" in found.stderr and "--authority" in found.stderr
    make_authority(tmp_path)
    with pytest.raises(RaylmError, match="openssl x509"):
        make_certificate(tmp_path, ["no address"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RaylmError, match="openssl, which makes certificates, is not on the path"):
        make_certificate(tmp_path, ["10.0.0.7"])


def _with_tls(values: dict[str, Any]) -> None:
    """As the files say it, before each start of Ray; and work goes to a worker."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        values[key] = [
            f'eval "$(raylm cluster certificate --node-ip $RAYLM_NODE_IP)"; {text}' if "RAY_AUTH_MODE" in text else text
            for text in values[key]
        ]
    values["available_node_types"]["head"]["resources"] = {"CPU": 0}


@pytest.mark.slow
def test_a_cluster_speaks_with_its_own_machines_alone(tmp_path: Path, small_settings: Settings) -> None:
    cluster = Cluster(tmp_path, small_settings, network="127.77.9", change=_with_tls)
    place = tmp_path / ".ray" / "tls"
    made = subprocess.run(
        ["raylm", "cluster", "certificate", "--authority"], env=cluster.environment, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    with cluster.running():
        done = cluster.submit("--", "python", "-c", _WORK)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "worked at 127.77.9.3" in done.stdout
        gcs = int(cluster.file.read_text().partition("--port=")[2].split()[0])
        stranger = ssl.create_default_context(cafile=place / "ca.crt")
        own = ssl.create_default_context(cafile=place / "ca.crt")
        own.load_cert_chain(place / "127.77.9.3.crt", place / "127.77.9.3.key")
        assert _hears("127.77.9.2", gcs, own)
        assert not _hears("127.77.9.2", gcs, stranger)


def _hears(host: str, port: int, context: ssl.SSLContext) -> bool:
    """Whether a server of HTTP/2 says anything to who comes like this."""
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host, port), timeout=60)
    try:
        with plain, context.wrap_socket(plain, server_hostname=host) as line:
            return bool(line.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False
