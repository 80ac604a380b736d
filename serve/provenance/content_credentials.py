"""Content credentials: a finished file carries a C2PA manifest that says what made it, signed by the operator's key.

The manifest names release, seed and generator. Of the prompts it holds salted hashes alone: the salt is in the store,
for the video's owner, so that he can prove what he asked for and nobody can guess it. A signature counts while its
certificate does: there is no time stamp of a third party.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import diagonal
from diagonal.errors import FieldError, require
from diagonal.media.encode import write_mp4
from diagonal.mp4 import boxes
from serve.records import Interaction, InteractionKind, Pacing, VideoRecord

FORMAT = "video/mp4"
GENERATION = "org.diagonal.generation"  # the label of our own assertion
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")  # C2PA's uuid box (C2PA 2.1, A.5.1)
_HALF_BYTES = 32  # of an ES256 signature
_TRIAL = VideoRecord("trial", "trial", "", 0, 1, 1, 1, "16x16", Pacing.NONE, 0.0)


@dataclass(frozen=True)
class Seal:
    """`write(plain, target)` makes of a finished file the one that counts; `is_on(path)` tells whether one is."""

    write: Callable[[Path, Path], None]
    is_on: Callable[[Path], bool]


class SigningError(RuntimeError):
    """A file could not be signed."""


@dataclass(frozen=True)
class ContentCredentials:
    """Signs finished files. `chain` is PEM, the signer's own certificate first."""

    chain: str
    key: EllipticCurvePrivateKey

    @classmethod
    def from_files(cls, certificate: str, key: str) -> ContentCredentials:
        """Read and try them; `FieldError` when they do not belong together or nothing can be signed with them."""
        chain = _read("c2pa_certificate", certificate)
        try:
            certificates = x509.load_pem_x509_certificates(chain)
        except ValueError as error:
            raise FieldError("c2pa_certificate", certificate, "a PEM file with a certificate chain") from error
        own = _private_key(key)
        require(
            certificates[0].public_key() == own.public_key(),
            "c2pa_key",
            key,
            "the key of the first certificate in c2pa_certificate",
        )
        credentials = cls(chain.decode(), own)
        try:
            credentials.try_out()
        except SigningError as error:
            raise FieldError("c2pa_certificate", certificate, f"one that signs C2PA manifests: {error}") from error
        return credentials

    def sign(self, source: Path, target: Path, manifest: dict[str, Any]) -> None:
        """Write `source` with the signed manifest to `target`; `SigningError` leaves that unusable."""
        c2pa = _library()
        try:
            algorithm = c2pa.C2paSigningAlg.ES256
            with (
                c2pa.Signer.from_callback(self._signature, algorithm, self.chain, None) as signer,
                c2pa.Builder(json.dumps(manifest)) as builder,
                source.open("rb") as plain,
                target.open("w+b") as signed,
            ):
                builder.sign(signer, FORMAT, plain, signed)
        except c2pa.C2paError as error:
            raise SigningError(str(error) or type(error).__name__) from error
        if not has_credentials(target):
            raise SigningError("the library wrote no manifest")

    def seal(self, video: VideoRecord) -> Seal:
        """What makes a video's plain file the one that is given out."""
        manifest = manifest_of(video)
        return Seal(lambda plain, target: self.sign(plain, target, manifest), has_credentials)

    def try_out(self) -> None:
        """Sign a file of one frame; `SigningError` when that does not work or does not check."""
        with TemporaryDirectory() as folder:
            plain, signed = Path(folder) / "plain.mp4", Path(folder) / "signed.mp4"
            write_mp4(plain, np.zeros((1, 16, 16, 3), np.uint8), 1)
            self.sign(plain, signed, manifest_of(_TRIAL))
            if (state := validation_state(signed)) not in ("Valid", "Trusted"):
                raise SigningError(f"a file signed with it is {state}")

    def _signature(self, data: bytes) -> bytes:
        """ES256: the two halves side by side, not DER (RFC 7518 3.4)."""
        halves = decode_dss_signature(self.key.sign(data, ECDSA(SHA256())))
        return b"".join(half.to_bytes(_HALF_BYTES, "big") for half in halves)


def manifest_of(video: VideoRecord) -> dict[str, Any]:
    """What a video's file says of itself."""
    generator = {"name": "diagonal", "version": diagonal.__version__}
    created = {"action": "c2pa.created", "digitalSourceType": _SOURCE, "softwareAgent": generator}
    generation = {
        "release": video.model,
        "release_manifest_sha256": video.release_sha256,
        "seed": video.seed,
        "prompts": list(_prompts(video)),
    }
    return {
        "claim_generator_info": [generator],
        "title": video.id,
        "format": FORMAT,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": GENERATION, "data": generation},
        ],
    }


def prompt_hash(salt: str, prompt: str) -> str:
    """What stands for a prompt: SHA-256 of the video's salt (as text), a line's end, and the prompt, in UTF-8."""
    return hashlib.sha256(f"{salt}\n{prompt}".encode()).hexdigest()


def has_credentials(path: Path) -> bool:
    """Whether a file carries a manifest; not whether that is right."""
    data = path.read_bytes()
    return any(name == "uuid" and data[start + 8 : start + 24] == _BOX for name, start, _ in boxes(data))


def validation_state(path: Path) -> str:
    """Valid, Trusted (its root is known here), Invalid, or 'unsigned'."""
    if not has_credentials(path):
        return "unsigned"
    c2pa = _library()
    with path.open("rb") as file, c2pa.Reader(FORMAT, file) as reader:
        return str(reader.get_validation_state())


def _prompts(video: VideoRecord) -> Iterator[dict[str, Any]]:
    """Where each prompt began to show, as its hash. Without a salt (a video of an older store) there is none."""
    first = Interaction("", video.prompt, pixel_frame=0)
    for change in (first, *video.interactions) if video.prompt_salt else ():
        if change.kind is InteractionKind.PROMPT and change.pixel_frame is not None:
            yield {"pixel_frame": change.pixel_frame, "salted_sha256": prompt_hash(video.prompt_salt, change.prompt)}


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise FieldError(field, path, "a file that can be read") from error


def _private_key(path: str) -> EllipticCurvePrivateKey:
    allowed = "a PEM file with a P-256 key that is not encrypted"
    try:
        key = load_pem_private_key(_read("c2pa_key", path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FieldError("c2pa_key", path, allowed) from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise FieldError("c2pa_key", path, allowed)
    return key


def _library() -> ModuleType:
    """Loaded where it is used: most services do without, and it is large."""
    try:
        import c2pa
    except ImportError as error:
        raise FieldError("c2pa_certificate", "given", "'', unless the extra `provenance` is installed") from error
    library: ModuleType = c2pa
    return library
