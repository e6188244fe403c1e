"""Stub being replaced."""
from raylm.storage import Manifest
def manifest_table(m: Manifest) -> str:
    return str({k: v for k, v in m.__dict__.items() if k not in ("settings", "outputs", "samples")})
