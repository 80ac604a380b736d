"""Checks a received stream against its signed chain: which chunks are altered, missing or moved, named by index.

The chain is that of the stream (`/stream`, the socket's frames). A finished file is written anew; what proves that one
are its content credentials.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diagonal.chain import Link, is_genuine, read_links
from diagonal.client.client import DiagonalClient
from diagonal.client.errors import BrokenStreamError
from diagonal.errors import FieldError, require
from diagonal.mp4 import PartReader, box_at, read_fragment

Fault = Literal["altered", "missing", "moved", "repeated", "cut off", "not signed", "signed by another key", "unlinked"]
_VIDEO = re.compile(r"([A-Za-z0-9_-]+)(?:/chain)?")
_PIECE_BYTES = 1 << 20
INIT = -1  # the initialisation segment, where a finding names a chunk


@dataclass(frozen=True)
class Chain:
    """What a server told of a stream (`GET /v1/videos/{id}/chain`)."""

    session_id: str
    links: tuple[Link, ...]

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Chain:
        """`FieldError` names what is not as it should be."""
        session_id, links = answer.get("video_id"), answer.get("links")
        require(isinstance(session_id, str), "video_id", session_id, "text")
        require(isinstance(links, list), "links", links, "a list")
        return cls(str(session_id), read_links(links or []))

    @property
    def public_keys(self) -> frozenset[str]:
        """The keys that the chain names itself; that they are its server's has to be known from elsewhere."""
        return frozenset(link.public_key for link in self.links if link.public_key)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; `chunk` is the index that the server gave it, -1 the initialisation segment."""

    chunk: int
    fault: Fault

    def __str__(self) -> str:
        what = "the initialisation segment" if self.chunk == INIT else f"chunk {self.chunk}"
        return f"{what} is {self.fault}"


@dataclass(frozen=True)
class Report:
    """`chunks` are proved; `complete` says that the last one of them is the stream's own last."""

    findings: tuple[Finding, ...]
    chunks: int
    complete: bool

    @property
    def ok(self) -> bool:
        return not self.findings


def run(client: DiagonalClient, options: argparse.Namespace) -> None:
    """Check a recorded stream against its signed chain, and name every chunk that is not as it was."""
    answer = _chain_answer(client, options.chain)
    chain = Chain.from_answer(answer)
    key = options.public_key or client.models()["provenance"]["chain_public_key"]
    with Path(options.file).open("rb") as file:
        report = verify(iter(lambda: file.read(_PIECE_BYTES), b""), chain, {key.lower()}, part=options.part)
    for finding in report.findings:
        print(finding, file=sys.stderr)
    if not report.ok:
        raise BrokenStreamError(f"{options.file} is not the stream {chain.session_id} as it was signed")
    end = "to its end" if report.complete else "which do not reach the stream's end"
    print(f"{options.file}: {report.chunks} chunks of {chain.session_id} as they were signed, {end}", file=sys.stderr)


def _chain_answer(client: DiagonalClient, where: str) -> Mapping[str, Any]:
    """From a file, or from the server by the video's id or the chain's address there; no other server is asked."""
    if not Path(where).is_file():
        video = _VIDEO.fullmatch(where.removeprefix(f"{client.url}v1/videos/"))
        if video is None:
            raise FieldError("--chain", where, f"a file, a video's id, or {client.url}v1/videos/ID/chain")
        return client.chain(video[1])
    try:
        answer = json.loads(Path(where).read_bytes())
    except ValueError as error:
        raise FieldError("--chain", where, "a JSON file") from error
    require(isinstance(answer, dict), "--chain", where, "a JSON file with one object")
    found: Mapping[str, Any] = answer
    return found


def verify(data: bytes | Iterable[bytes], chain: Chain, public_keys: Collection[str], *, part: bool = False) -> Report:
    """Compare a fragmented MP4 with its chain, whose links must be signed by one of `public_keys` (hexadecimal).

    With `part`, chunks may be missing at the beginning and at the end, but not in between.
    """
    findings = list(_faults_of_chain(chain, public_keys))
    places, faults = _places(data, chain)
    known = [chunk for chunk in places if chunk is not None]
    findings += [*faults, *_faults_of_order(known)]
    expected = {link.chunk for link in chain.links}
    if part and known:
        expected &= set(range(min(known), max(known) + 1))
    named = {finding.chunk for finding in faults}
    findings += [Finding(chunk, "missing") for chunk in sorted(expected - set(known) - named)]
    wrong = {finding.chunk for finding in findings}
    proved = [link for link in chain.links if link.chunk in set(known) - wrong]
    complete = bool(proved) and proved[-1].last and not findings
    return Report(tuple(sorted(set(findings), key=lambda found: (found.chunk, found.fault))), len(proved), complete)


def _faults_of_chain(chain: Chain, public_keys: Collection[str]) -> Iterator[Finding]:
    """Each link is signed by a key to trust, and binds to the one before it."""
    before: Link | None = None
    for link in chain.links:
        if not is_genuine(chain.session_id, link):
            yield Finding(link.chunk, "not signed")
        elif link.public_key not in public_keys:
            yield Finding(link.chunk, "signed by another key")
        if before is not None:
            yield from (Finding(chunk, "missing") for chunk in range(before.chunk + 1, link.chunk))
            if link.chunk <= before.chunk or (link.chunk == before.chunk + 1 and link.previous != before.signature):
                yield Finding(link.chunk, "unlinked")
        before = link


def _places(data: bytes | Iterable[bytes], chain: Chain) -> tuple[list[int | None], list[Finding]]:
    """Which chunk each part of the stream is (None: of no link), and what is wrong with those that are none."""
    chunk_of = {link.sha256: link.chunk for link in chain.links}
    places: list[int | None] = []
    faults: list[Finding] = []
    began, reader = False, PartReader()
    try:
        for part in (part for piece in ([data] if isinstance(data, bytes) else data) for part in reader.feed(piece)):
            digest = hashlib.sha256(part).hexdigest()
            if not began and _is_init(part):
                began, faults = True, [*_faults_of_init(digest, chain)]
                continue
            places.append(chunk_of.get(digest))
            if places[-1] is None:
                faults.append(Finding(_claimed(part, places), "altered"))
    except FieldError:  # no boxes from there on
        faults.append(Finding(_next(places), "altered"))
    else:
        if reader.rest_bytes:
            faults.append(Finding(_next(places), "cut off"))
    return places, faults if began else [*faults, Finding(INIT, "missing")]


def _is_init(part: bytes) -> bool:
    try:
        box_at(part, ("moov",))
    except FieldError:
        return False
    return True


def _faults_of_init(digest: str, chain: Chain) -> Iterator[Finding]:
    if chain.links and chain.links[0].chunk == 0 and chain.links[0].previous != digest:
        yield Finding(INIT, "altered")


def _claimed(part: bytes, places: list[int | None]) -> int:
    """The index that an altered part says it has; where it stands when it says nothing sensible."""
    try:
        sequence = read_fragment(part).sequence
    except (FieldError, IndexError):
        sequence = 0
    return sequence - 1 if 0 < sequence <= len(places) + 1 else _next(places[:-1])


def _next(places: list[int | None]) -> int:
    """The index that follows on what was received."""
    known = [(position, chunk) for position, chunk in enumerate(places) if chunk is not None]
    return known[-1][1] + len(places) - known[-1][0] if known else len(places)


def _faults_of_order(known: list[int]) -> Iterator[Finding]:
    counts = Counter(known)
    yield from (Finding(chunk, "repeated") for chunk, count in counts.items() if count > 1)
    once = list(counts)  # in the order in which they came first
    yield from (Finding(chunk, "moved") for chunk, right in zip(once, sorted(once), strict=True) if chunk != right)
