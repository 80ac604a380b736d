"""The key that signs live chunks: the operator's own file, or one that is made beside the store at first start."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from diagonal.errors import FieldError, require
from diagonal.files import create_private

_FILE = "signing_key.pem"


def signing_key(path: str, data: Path) -> Ed25519PrivateKey:
    """The key in the PEM file `path`; '' is the one in the folder `data`, made if there is none.

    `FieldError` when the file is missing or holds no unencrypted Ed25519 key: another key would break every chain.
    """
    own = Path(path).expanduser() if path else data / _FILE
    if not path and not own.exists():
        key = Ed25519PrivateKey.generate()
        create_private(own, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    require(own.is_file(), "signing_key", str(own), "an existing file, or '' for a new key in `data`")
    try:
        loaded = load_pem_private_key(own.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FieldError("signing_key", str(own), "a PEM file with an Ed25519 key that is not encrypted") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise FieldError("signing_key", str(own), "a PEM file with an Ed25519 key")
    return loaded
