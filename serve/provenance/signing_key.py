"""The key that signs live chunks: the operator's own file, or one that is made beside the store at first start."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from diagonal.chain import Link, public_key_of, signed_link
from diagonal.errors import FieldError, require
from diagonal.storage.disk import sync
from serve.records import EncodedChunk
from serve.store.database import Database
from serve.store.media_files import INIT, MediaFiles

_FILE = "signing_key.pem"


class ChunkSigner:
    """Makes the link of each chunk, on the one before it that the database holds: so the chain outlives the process."""

    def __init__(self, key: Ed25519PrivateKey, database: Database, files: MediaFiles) -> None:
        self._key, self._database, self._files = key, database, files
        self.public_key = public_key_of(key)

    def links(self, video_id: str, chunks: Sequence[EncodedChunk]) -> list[Link]:
        """The links of a video's next chunks, in order."""
        previous, made = self._previous(video_id, chunks[0].chunk), list[Link]()
        for chunk in chunks:
            sha256 = hashlib.sha256(chunk.data).hexdigest()
            made.append(signed_link(self._key, video_id, chunk.chunk, sha256, previous, chunk.last))
            previous = made[-1].signature
        return made

    def _previous(self, video_id: str, chunk: int) -> str:
        if chunk == 0:
            return hashlib.sha256(self._files.read(video_id, INIT)).hexdigest()
        before = self._database.links(video_id, chunk - 1, 1)
        return before[0].signature if before and before[0].chunk == chunk - 1 else ""


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
