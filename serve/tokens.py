"""Keys, client secrets, resume tokens and tokens of viewers: what is handed out is random, what is kept is its SHA-256.

A secret reads `<kind>_<id>_<random>`. The id is public: logs and lists name it, and a row is found by it.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

KEY, CLIENT_SECRET, RESUME, VIEWER = "dk", "ek", "rt", "vt"
CLIENT_SECRET_S = 60.0
_ID_BYTES, _RANDOM_BYTES = 8, 32
_LONGEST = 128


@dataclass(frozen=True)
class Secret:
    """A secret's public id and hash; the text itself is told once and kept nowhere."""

    id: str
    hash: str


def new_secret(kind: str, public_id: str = "") -> tuple[str, Secret]:
    """The text to hand out, and what to keep of it; without `public_id` the id is random, too."""
    text = f"{kind}_{public_id or secrets.token_hex(_ID_BYTES)}_{secrets.token_urlsafe(_RANDOM_BYTES)}"
    return text, parse_secret(kind, text) or Secret("", "")


def parse_secret(kind: str, text: str) -> Secret | None:
    """Id and hash of a secret that somebody shows; None when it is none of that kind."""
    parts = text.split("_", 2)
    plain = text.isascii() and text.isprintable()  # no database is asked for what it cannot hold
    if len(parts) != 3 or parts[0] != kind or not plain or len(text) > _LONGEST:
        return None
    return Secret(parts[1], hashlib.sha256(text.encode()).hexdigest())
