"""The signed chain of a live stream's chunks: what is signed, by whom, and what a link binds to the one before.

Each chunk has a link: an Ed25519 signature over (session, chunk, SHA-256 of its bytes, signature of the link before,
whether it is the last). So no chunk can be altered, left out, repeated or moved without the chain showing it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from diagonal.errors import require

ALGORITHM = "ed25519"
_DOMAIN = "diagonal-chunk-chain-1"  # a signature of something else can never pass for one of these
_HASH_DIGITS, _KEY_DIGITS, _SIGNATURE_DIGITS = 64, 64, 128


@dataclass(frozen=True)
class Link:
    """What proves one chunk; all bytes in hexadecimal. `previous` of chunk 0 is SHA-256 of the initialisation segment.

    `signature` and `public_key` are empty for a chunk that was made before there was a key.
    """

    chunk: int
    sha256: str
    previous: str
    last: bool
    signature: str = ""
    public_key: str = ""

    def as_answer(self) -> dict[str, Any]:
        return asdict(self)


def signed_link(key: Ed25519PrivateKey, session_id: str, chunk: int, sha256: str, previous: str, last: bool) -> Link:
    """The link of a chunk, signed."""
    signature = key.sign(_message(session_id, chunk, sha256, previous, last)).hex()
    return Link(chunk, sha256, previous, last, signature, public_key_of(key))


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The raw public key, in hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


def is_genuine(session_id: str, link: Link) -> bool:
    """Whether the holder of `link.public_key` signed just this; not whether that key is one to trust."""
    message = _message(session_id, link.chunk, link.sha256, link.previous, link.last)
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(link.public_key))
        key.verify(bytes.fromhex(link.signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_links(answers: Iterable[Mapping[str, Any]]) -> tuple[Link, ...]:
    """Links as a server tells them; `FieldError` names what is not one. Further fields are passed over."""
    return tuple(_read_link(answer, f"links.{position}") for position, answer in enumerate(answers))


def _read_link(answer: Mapping[str, Any], where: str) -> Link:
    require(isinstance(answer, Mapping), where, answer, "an object")
    chunk, last = answer.get("chunk"), answer.get("last")
    require(type(chunk) is int and chunk >= 0, f"{where}.chunk", chunk, "a whole number of at least 0")
    require(isinstance(last, bool), f"{where}.last", last, "true or false")
    digits = {
        "sha256": (_HASH_DIGITS,),
        "previous": (0, _HASH_DIGITS, _SIGNATURE_DIGITS),
        "signature": (0, _SIGNATURE_DIGITS),
        "public_key": (0, _KEY_DIGITS),
    }
    texts = {name: answer.get(name) for name in digits}
    for name, lengths in digits.items():
        text = texts[name]
        right = isinstance(text, str) and len(text) in lengths and set(text) <= set("0123456789abcdef")
        require(right, f"{where}.{name}", text, f"{' or '.join(map(str, lengths))} hexadecimal digits")
    return Link(chunk=int(chunk or 0), last=bool(last), **{name: str(text) for name, text in texts.items()})


def _message(session_id: str, chunk: int, sha256: str, previous: str, last: bool) -> bytes:
    return json.dumps([_DOMAIN, session_id, chunk, sha256, previous, last], separators=(",", ":")).encode()
