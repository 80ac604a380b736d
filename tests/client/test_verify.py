"""The chain over a stream's chunks: whatever was done to a chunk on its way is found and named by its index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from diagonal.chain import Link, public_key_of, signed_link
from diagonal.client.verify import INIT, Chain, Finding, verify
from diagonal.errors import FieldError
from diagonal.media.encode import ChunkEncoder

KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
TRUSTED = {public_key_of(KEY)}
CHUNKS = 5
Parts = list[bytes]


def chain_of(init: bytes, parts: Parts, key: Ed25519PrivateKey = KEY, session: str = "video_1") -> Chain:
    previous, links = hashlib.sha256(init).hexdigest(), []
    for chunk, part in enumerate(parts):
        digest = hashlib.sha256(part).hexdigest()
        links.append(signed_link(key, session, chunk, digest, previous, chunk == len(parts) - 1))
        previous = links[-1].signature
    return Chain(session, tuple(links))


@pytest.fixture(scope="module")
def stream() -> tuple[bytes, Parts, Chain]:
    encoder = ChunkEncoder(32, 32, 16)
    parts = [encoder.encode_chunk(np.full((4, 32, 32, 3), 20 * chunk, np.uint8)) for chunk in range(CHUNKS)]
    return encoder.init_segment(), parts, chain_of(encoder.init_segment(), parts)


def flipped(part: bytes, offset: int = -1) -> bytes:
    changed = bytearray(part)
    changed[offset] ^= 1
    return bytes(changed)


def found(init: bytes, parts: Parts, chain: Chain, part: bool = False) -> list[tuple[int, str]]:
    return [(one.chunk, one.fault) for one in verify(b"".join([init, *parts]), chain, TRUSTED, part=part).findings]


def test_a_whole_stream_is_proved_in_pieces_of_any_size(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    data = b"".join([init, *parts])
    for size in (1, 97, len(data)):
        report = verify((data[at : at + size] for at in range(0, len(data), size)), chain, TRUSTED)
        assert report.ok and report.complete and report.chunks == CHUNKS


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda parts, chunk: [*parts[:chunk], flipped(parts[chunk]), *parts[chunk + 1 :]], "altered"),
        (lambda parts, chunk: [*parts[:chunk], *parts[chunk + 1 :]], "missing"),
        (lambda parts, chunk: [*parts[: chunk + 1], *parts[chunk:]], "repeated"),
    ],
)
def test_an_altered_a_missing_and_a_repeated_chunk_is_named(
    stream: tuple[bytes, Parts, Chain], change: Callable[[Parts, int], Parts], fault: str, chunk: int
) -> None:
    init, parts, chain = stream
    assert found(init, change(parts, chunk), chain) == [(chunk, fault)]


def test_swapped_chunks_are_named_both(stream: tuple[bytes, Parts, Chain]) -> None:
    init, (first, second, third, *rest), chain = stream
    assert found(init, [first, third, second, *rest], chain) == [(1, "moved"), (2, "moved")]


def test_a_flip_of_any_byte_of_a_chunk_is_found(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    for offset in range(0, len(parts[2]), 7):
        findings = found(init, [*parts[:2], flipped(parts[2], offset), *parts[3:]], chain)
        assert findings and findings[0][0] == 2, offset


def test_the_beginning_is_bound_too(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    assert found(flipped(init), parts, chain) == [(INIT, "altered")]
    assert found(b"", parts, chain) == [(INIT, "missing")]


def test_a_stream_that_is_cut_off_is_not_complete(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    assert found(init, [*parts[:-1], parts[-1][:-5]], chain) == [(CHUNKS - 1, "cut off")]
    report = verify(b"".join([init, *parts[1:3]]), chain, TRUSTED, part=True)
    assert report.ok and report.chunks == 2 and not report.complete
    assert found(init, [parts[1], parts[3]], chain, part=True) == [(2, "missing")]


def test_a_chunk_of_another_stream_does_not_pass_for_one_of_this(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    encoder = ChunkEncoder(32, 32, 16, first_pixel_frame=8, sequence=3)
    foreign = encoder.encode_chunk(np.full((4, 32, 32, 3), 99, np.uint8))
    assert found(init, [*parts[:2], foreign, *parts[3:]], chain) == [(2, "altered")]


def test_a_chain_that_was_touched_is_named_where_it_was(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream

    def with_link(index: int, link: Link) -> Chain:
        return replace(chain, links=(*chain.links[:index], link, *chain.links[index + 1 :]))

    forged = replace(chain.links[1], sha256=hashlib.sha256(flipped(parts[1])).hexdigest())
    assert found(init, [parts[0], flipped(parts[1]), *parts[2:]], with_link(1, forged)) == [(1, "not signed")]
    digest, previous = chain.links[1].sha256, chain.links[0].signature
    foreign = signed_link(OTHER_KEY, "video_1", 1, digest, previous, False)
    findings = found(init, parts, with_link(1, foreign))
    assert findings == [(1, "signed by another key"), (2, "unlinked")]
    unlinked = signed_link(KEY, "video_1", 3, chain.links[3].sha256, chain.links[1].signature, False)
    assert (3, "unlinked") in found(init, parts, with_link(3, unlinked))
    assert found(init, parts, replace(chain, session_id="video_2")) == [(n, "not signed") for n in range(CHUNKS)]
    without = replace(chain, links=chain.links[:2] + chain.links[3:])
    assert (2, "missing") in found(init, [*parts[:2], *parts[3:]], without)


def test_the_end_cannot_be_hidden_by_leaving_the_last_links_out(stream: tuple[bytes, Parts, Chain]) -> None:
    init, parts, chain = stream
    shorter = replace(chain, links=chain.links[:3])
    report = verify(b"".join([init, *parts[:3]]), shorter, TRUSTED)
    assert report.ok and not report.complete


def test_a_chain_is_read_as_it_was_told_and_what_is_none_is_named(stream: tuple[bytes, Parts, Chain]) -> None:
    chain = stream[2]
    answer = {"video_id": "video_1", "links": [link.as_answer() for link in chain.links]}
    assert Chain.from_answer(answer) == chain and chain.public_keys == TRUSTED
    wrongs: tuple[tuple[str, object], ...] = (
        ("chunk", True),
        ("sha256", "x" * 64),
        ("signature", "00"),
        ("last", 1),
        ("public_key", None),
    )
    for name, value in wrongs:
        with pytest.raises(FieldError, match=rf"links\.0\.{name}"):
            Chain.from_answer({"video_id": "video_1", "links": [chain.links[0].as_answer() | {name: value}]})
    with pytest.raises(FieldError, match="video_id"):
        Chain.from_answer({"links": []})


def test_a_finding_says_what_is_wrong_in_words() -> None:
    assert [str(Finding(3, "missing")), str(Finding(INIT, "altered"))] == [
        "chunk 3 is missing",
        "the initialisation segment is altered",
    ]
