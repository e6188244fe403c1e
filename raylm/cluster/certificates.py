"""Certificates by which the machines of a cluster know each other: Ray's TLS, for networks that others share.

An authority of the cluster's own signs a certificate for each machine; Ray takes nobody's word without one, and
encrypts its messages and objects. The `openssl` program makes them, also an old one or LibreSSL's: all that counts is
said here, and nothing left to its own configuration.
"""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from raylm.errors import RaylmError, SettingsError

_DAYS = "825"
_CONFIGURATION = "[req]\ndistinguished_name=name\n[name]\n"
_OF_AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
_OF_MACHINE = (
    "basicConstraints=critical,CA:FALSE\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    "extendedKeyUsage=serverAuth,clientAuth\n"
)


def make_authority(place: Path) -> None:
    """Make what signs, `ca.crt` and `ca.key`, where it is not there; only its owner can read the key.

    :raises RaylmError: openssl is absent, or fails.
    """
    if not all((place / name).is_file() for name in ("ca.key", "ca.crt")):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        _issue(place, "ca", "raylm authority", _OF_AUTHORITY)


def make_certificate(place: Path, addresses: Sequence[str]) -> dict[str, str]:
    """Make a machine's certificate, signed by the authority there, and say what Ray has to find in its environment.

    :param addresses: of the machine, as the others call it.
    :raises SettingsError: there is no authority.
    :raises RaylmError: openssl is absent, or fails.
    """
    authority = place / "ca.crt"
    for file in (authority, place / "ca.key"):
        if not file.is_file():
            raise SettingsError(
                f"{file}: is not there; `raylm cluster certificate --authority` makes it where `ray up` is called, and"
                " file_mounts bring it to the machines"
            )
    names = [name for address in (*addresses, "127.0.0.1") for name in (f"IP:{address}", f"DNS:{address}")]
    extensions = f"{_OF_MACHINE}subjectAltName={','.join([*names, 'DNS:localhost'])}\n"
    _issue(place, addresses[0], addresses[0], extensions, authority)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(place / f"{addresses[0]}.crt"),
        "RAY_TLS_SERVER_KEY": str(place / f"{addresses[0]}.key"),
        "RAY_TLS_CA_CERT": str(authority),
    }


def _issue(place: Path, name: str, subject: str, extensions: str, authority: Path | None = None) -> None:
    """Make `name.key` and `name.crt`, signed by an authority or by the key itself; both or none of them."""
    with tempfile.TemporaryDirectory(dir=place) as directory:
        work = Path(directory)
        (work / "configuration").write_text(_CONFIGURATION)
        (work / "extensions").write_text(extensions)
        _openssl(
            "req", "-new", "-config", work / "configuration", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:prime256v1", "-pkeyopt", "ec_param_enc:named_curve", "-nodes",
            "-subj", f"/CN={subject}", "-keyout", work / "key", "-out", work / "request",
        )  # fmt: skip
        signing = (
            ("-signkey", work / "key")
            if authority is None
            else ("-CA", authority, "-CAkey", authority.with_suffix(".key"))
        )
        _openssl(
            "x509", "-req", "-sha256", "-in", work / "request", *signing, "-set_serial", f"0x{secrets.token_hex(16)}",
            "-extfile", work / "extensions", "-days", _DAYS, "-out", work / "certificate",
        )  # fmt: skip
        (work / "key").replace(place / f"{name}.key")
        (work / "certificate").replace(place / f"{name}.crt")


def _openssl(*words: str | Path) -> None:
    try:
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False, umask=0o077)
    except FileNotFoundError as error:
        raise RaylmError("the program openssl, which makes certificates, is not on the path") from error
    if done.returncode:
        raise RaylmError(f"openssl {words[0]}: {' '.join(done.stderr.split())[-300:]}")
