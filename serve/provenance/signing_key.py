"""The key that signs live chunks: the operator's own file, or one that is made beside the store at first start."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from diagonal.errors import FieldError, require
from diagonal.storage.disk import sync

_FILE = "signing_key.pem"


def signing_key(path: str, data: Path) -> Ed25519PrivateKey:
    """The key in the PEM file `path`; '' is the one in the folder `data`, made if there is none.

    `FieldError` when the file is missing or holds no unencrypted Ed25519 key: another key would break every chain.
    """
    own = Path(path).expanduser() if path else data / _FILE
    if not path and not own.exists():
        _make(own)
    require(own.is_file(), "signing_key", str(own), "an existing file, or '' for a new key in `data`")
    try:
        key = load_pem_private_key(own.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FieldError("signing_key", str(own), "a PEM file with an Ed25519 key that is not encrypted") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FieldError("signing_key", str(own), "a PEM file with an Ed25519 key")
    return key


def _make(path: Path) -> None:
    """A new key, readable by its owner alone from the first moment; of two processes that make one, one's counts."""
    text = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        sync(path.parent)
    except FileExistsError:
        return  # the other process's
    finally:
        temporary.unlink(missing_ok=True)
