"""Wire types of what tells where a video comes from: `GET /v1/videos/{id}/chain`, and a part of `/v1/models`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from diagonal.chain import ALGORITHM, Link
from serve.records import Provenance, VideoRecord

MAX_LINKS = 10_000  # in one answer


class LinkAnswer(BaseModel):
    """One chunk's link; bytes in hexadecimal. It is signed over a JSON list, as `diagonal.chain` forms it."""

    chunk: int
    sha256: str
    previous: str = Field(description="Signature of the link before; of chunk 0, SHA-256 of the initialisation segment")
    last: bool
    signature: str
    public_key: str


class ChainAnswer(BaseModel):
    """A stream's chain, as far as it is made and kept. `prompt_salt` opens the hashes in the file's credentials."""

    object: Literal["video.chain"] = "video.chain"
    video_id: str
    algorithm: str = ALGORITHM
    prompt_salt: str
    has_more: bool
    links: list[LinkAnswer]

    @classmethod
    def of(cls, video: VideoRecord, links: Sequence[Link], has_more: bool) -> ChainAnswer:
        told = [LinkAnswer.model_validate(link.as_answer()) for link in links]
        return cls(video_id=video.id, prompt_salt=video.prompt_salt, has_more=has_more, links=told)


class ProvenanceAnswer(BaseModel):
    """What tells where videos of this service come from."""

    chain_algorithm: str = ALGORITHM
    chain_public_key: str = Field(description="Raw, in hexadecimal")
    content_credentials: bool = Field(description="Whether finished files are signed (C2PA)")
    watermark: str | None = Field(description="The invisible watermark in every frame; null: there is none")

    @classmethod
    def of(cls, told: Provenance) -> ProvenanceAnswer:
        return cls(
            chain_public_key=told.public_key,
            content_credentials=told.content_credentials,
            watermark=told.watermark or None,
        )
