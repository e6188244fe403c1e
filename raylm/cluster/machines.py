"""What the machine types of the clouds have: CPUs and GPUs, read from their names as the clouds form them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_GIB = 1 << 30


class Gpu(NamedTuple):
    """:param flops: a second, of dense products of 16-bit numbers, as its maker's data sheet says."""

    name: str
    bytes: int
    flops: float


class Machine(NamedTuple):
    """:param gpu: what each of its GPUs is; None where it has none."""

    cpus: int
    gpus: int = 0
    gpu: Gpu | None = None


def _gpu(name: str, gib: int, teraflops: float) -> Gpu:
    return Gpu(name, gib * _GIB, teraflops * 1e12)


T4, V100, A10, A10G = _gpu("T4", 16, 65), _gpu("V100", 16, 125), _gpu("A10", 24, 125), _gpu("A10G", 24, 70)
L4, L40S = _gpu("L4", 24, 121), _gpu("L40S", 48, 362)
A100, A100_80 = _gpu("A100", 40, 312), _gpu("A100 80 GB", 80, 312)
H100, H100_NVL, H200 = _gpu("H100", 80, 989), _gpu("H100 NVL", 94, 835), _gpu("H200", 141, 989)

# AWS names sizes by powers of two: `large` has 2 vCPUs, `xlarge` 4, `8xlarge` 32. Families whose names say cores, or
# machines of another make, do not follow that.
_AWS_SIZES = {"medium": 1, "large": 2, "xlarge": 4}
_AWS_BURSTING = {"nano": 2, "micro": 2, "small": 2, "medium": 2}
_AWS_OTHERWISE = re.compile(r"(t2|hpc|u-|u7|mac|m1|c1)")
_AWS_ONE_GPU = ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")
# Family → its GPU, and how many of it a size has.
_AWS_GPUS: dict[str, tuple[Gpu, dict[str, int]]] = {
    "p3": (V100, {"2xlarge": 1, "8xlarge": 4, "16xlarge": 8}),
    "p3dn": (V100._replace(bytes=32 * _GIB), {"24xlarge": 8}),
    "p4d": (A100, {"24xlarge": 8}),
    "p4de": (A100_80, {"24xlarge": 8}),
    "p5": (H100, {"4xlarge": 1, "48xlarge": 8}),
    "p5e": (H200, {"48xlarge": 8}),
    "p5en": (H200, {"48xlarge": 8}),
    "g4dn": (T4, dict.fromkeys(_AWS_ONE_GPU, 1) | {"12xlarge": 4}),
    "g5": (A10G, dict.fromkeys(_AWS_ONE_GPU, 1) | {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "g6": (L4, dict.fromkeys(_AWS_ONE_GPU, 1) | {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "gr6": (L4, {"4xlarge": 1, "8xlarge": 1}),
    "g6e": (L40S, dict.fromkeys(_AWS_ONE_GPU, 1) | {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
}

# GCP's machines with GPUs of their own: name → its GPU; number in the name → vCPUs, GPUs.
_GCP_WITH_GPUS: dict[str, tuple[Gpu, dict[int, tuple[int, int]]]] = {
    "a2-highgpu": (A100, {1: (12, 1), 2: (24, 2), 4: (48, 4), 8: (96, 8)}),
    "a2-megagpu": (A100, {16: (96, 16)}),
    "a2-ultragpu": (A100_80, {1: (12, 1), 2: (24, 2), 4: (48, 4), 8: (96, 8)}),
    "a3-highgpu": (H100, {1: (26, 1), 2: (52, 2), 4: (104, 4), 8: (208, 8)}),
    "a3-megagpu": (H100, {8: (208, 8)}),
    "g2-standard": (L4, {n: (n, {24: 2, 48: 4, 96: 8}.get(n, 1)) for n in (4, 8, 12, 16, 24, 32, 48, 96)}),
}
_GCP_GPUS = {"t4": T4, "v100": V100, "l4": L4, "a100-80gb": A100_80, "a100": A100, "h100": H100}

_AZURE = re.compile(r"Standard_(?P<family>[A-Z]+)(?P<cpus>\d+)(?:-(?P<limited>\d+))?(?P<more>[a-z]*)(?P<rest>_.*)?")
# How a name is formed → its GPU; vCPUs → GPUs.
_AZURE_GPUS = [
    (re.compile(r"NC\d+as_T4_v3"), T4, {4: 1, 8: 1, 16: 1, 64: 4}),
    (re.compile(r"NC\d+s_v3"), V100, {6: 1, 12: 2, 24: 4}),
    (re.compile(r"NC\d+ads_A100_v4"), A100_80, {24: 1, 48: 2, 96: 4}),
    (re.compile(r"NC\d+adi?s_H100_v5"), H100_NVL, {40: 1, 80: 2}),
    (re.compile(r"ND\d+asr_v4"), A100, {96: 8}),
    (re.compile(r"ND\d+amsr_A100_v4"), A100_80, {96: 8}),
    (re.compile(r"ND\d+isr_H100_v5"), H100, {96: 8}),
    (re.compile(r"NV\d+ads_A10_v5"), A10, {36: 1, 72: 2}),
]


def machine_of(provider: str, node_config: Mapping[str, Any]) -> Machine | None:
    """What a node's machine has; None for one that is not known."""
    if provider == "aws":
        return aws_machine(str(node_config.get("InstanceType", "")))
    if provider == "gcp":
        return gcp_machine(node_config)
    if provider == "azure":
        return azure_machine(str((node_config.get("azure_arm_parameters") or {}).get("vmSize", "")))
    return None


def aws_machine(name: str) -> Machine | None:
    """`g5.12xlarge`: 48 vCPUs, 4 GPUs of 24 GiB."""
    family, _, size = name.partition(".")
    if not size or _AWS_OTHERWISE.match(family):
        return None
    times = re.fullmatch(r"(\d+)xlarge", size)
    sizes = _AWS_SIZES | (_AWS_BURSTING if family.startswith("t") else {})
    cpus = 4 * int(times[1]) if times else sizes.get(size)
    if cpus is None:
        return None
    if family[0] in "pg" and family not in _AWS_GPUS:
        return None  # GPUs that are not known, and perhaps fractions of them
    if family not in _AWS_GPUS:
        return Machine(cpus)
    gpu, gpus = _AWS_GPUS[family]
    return Machine(cpus, gpus[size], gpu) if size in gpus else None


def gcp_machine(node_config: Mapping[str, Any]) -> Machine | None:
    """`n1-standard-8` with an accelerator beside it, or `a2-highgpu-1g`, which has its own."""
    name = str(node_config.get("machineType", "")).rsplit("/", 1)[-1]
    family, _, number = name.removesuffix("g").rpartition("-")
    if family in _GCP_WITH_GPUS and number.isdigit():
        gpu, sizes = _GCP_WITH_GPUS[family]
        found = sizes.get(int(number))
        return Machine(*found, gpu) if found else None
    plain = re.fullmatch(r"[a-z]\d[a-z]?(?:-custom-(\d+)-\d+(?:-ext)?|-[a-z]+-(\d+))", name)
    if not plain:
        return None
    gpus, beside = 0, None
    for accelerator in node_config.get("guestAccelerators") or []:
        kind = str(accelerator.get("acceleratorType", "")).rsplit("nvidia-", 1)[-1].removeprefix("tesla-")
        gpus += int(accelerator.get("acceleratorCount", 0))
        beside = next((found for start, found in _GCP_GPUS.items() if kind.startswith(start)), None)
    return Machine(int(plain[1] or plain[2]), gpus, beside)


def azure_machine(name: str) -> Machine | None:
    """`Standard_NC24ads_A100_v4`: 24 vCPUs, a GPU of 80 GiB."""
    found = _AZURE.fullmatch(name)
    if not found:
        return None
    cpus = int(found["limited"] or found["cpus"])
    for pattern, gpu, gpus in _AZURE_GPUS:
        if pattern.fullmatch(name.removeprefix("Standard_")):
            count = gpus.get(int(found["cpus"]))
            return Machine(cpus, count, gpu) if count else None
    return None if found["family"].startswith("N") else Machine(cpus)
