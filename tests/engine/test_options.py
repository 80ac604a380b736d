"""Options of serving: with 8-bit caches and layers, and with the fast decoder, every law of sessions holds the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from diagonal.engine.engine import Engine
from diagonal.engine.replay import replay
from diagonal.engine.session import PromptChange
from diagonal.engine.snapshot import Identity, Snapshot, SnapshotError
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder
from diagonal.model.fp8 import FORMAT, use_fp8_linears
from tests.engine.driving import OTHER, engine_of, equal, pull, spec_of, stream
from tests.networks import CHANNELS, SmallRelease, roughen, small_release

OPTIONS = {
    "8-bit cache": ["serve.cache_dtype=fp8"],
    "8-bit layers": ["serve.linear_dtype=fp8"],
    "fast decoder": ["serve.decoder=fast"],
    "all": ["serve.cache_dtype=fp8", "serve.linear_dtype=fp8", "serve.decoder=fast"],
}


def release_of(*settings: str) -> SmallRelease:
    """A small release that does as its settings say, as `Release` does."""
    release = small_release(*settings)
    serve = release.config.serve
    if serve.linear_dtype == "fp8":
        release.network.fuse()  # type: ignore[operator]
        use_fp8_linears(release.network, release.network.blocks)  # type: ignore[arg-type]
    if serve.decoder == "fast":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = FastDecoder(CHANNELS, widths=(8, 6, 4), blocks=(2, 1, 1))
        roughen(network, 1)
        release = replace(release, codec=StreamingFastDecoder(network.eval()))
    return release


@pytest.fixture(params=OPTIONS)
def settings(request: pytest.FixtureRequest) -> list[str]:
    return OPTIONS[request.param]


def engine(settings: list[str]) -> Engine:
    return engine_of(release=release_of(*settings))


def test_a_snapshot_goes_on_elsewhere_and_a_pause_is_not_seen_before_the_first_eviction(settings: list[str]) -> None:
    plain, first = stream(engine(settings), spec_of(), 4), engine(settings)
    snapshot = stream(first, spec_of(), 2)[-1].snapshot
    assert snapshot is not None
    elsewhere = engine(settings)
    elsewhere.restore(Snapshot.from_bytes(snapshot.to_bytes()))
    assert equal([pull(elsewhere), pull(elsewhere)], plain[2:])
    first.pause("s")
    first.step()
    first.resume("s")
    assert equal([pull(first), pull(first)], plain[2:])


@pytest.mark.slow
def test_a_recorded_session_is_replayed_bit_for_bit(settings: list[str]) -> None:
    driven = engine(settings)
    shown = stream(driven, spec_of(frames=None, record=True), 5)
    driven.interact("s", PromptChange("e1", OTHER, 2))
    shown += [pull(driven) for _ in range(2)]
    again = list(replay(release_of(*settings), driven.recording("s")))
    assert [item.chunk for item in again] == list(range(7))
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(again, shown, strict=True))


def test_a_re_cache_writes_the_same_pages_before_the_first_eviction(settings: list[str]) -> None:
    driven = engine(settings)
    stream(driven, spec_of(frames=None), 3)
    before, session = copy.deepcopy(driven.maker.pool), driven.table.sessions["s"]
    pages = list(session.cache.pages)
    driven.pause("s")
    driven.step()
    driven.resume("s")
    pull(driven)
    for kept, now in ((before.keys, driven.maker.pool.keys), (before.values, driven.maker.pool.values)):
        found = [now[:, page].float() for page in session.cache.pages[:3]]
        assert all(torch.equal(kept[:, page].float(), new) for page, new in zip(pages, found, strict=True))
    if before.exponents is not None and driven.maker.pool.exponents is not None:
        new = driven.maker.pool.exponents[:, :, list(session.cache.pages[:3])]
        assert torch.equal(before.exponents[:, :, pages], new)


def test_sessions_that_share_a_forward_are_those_alone_within_a_step_of_rounding(settings: list[str]) -> None:
    alone = stream(engine(settings), spec_of("a", seed=5, frames=33))
    both = engine(settings)
    for name, seed in (("a", 5), ("b", 6)):
        both.open(spec_of(name, seed=seed, frames=33))
    for result in alone:
        both.request("a")
        both.request("b")
        found = {made.session_id: made for made in both.step()}
        difference = (found["a"].pixels.int() - result.pixels.int()).abs()
        assert float((difference > 2).float().mean()) < 0.02


def test_an_8_bit_cache_takes_its_formulas_bytes_and_snapshots_stay_as_they_were() -> None:
    driven, plain = engine(["serve.cache_dtype=fp8"]), engine([])
    taken = [stream(made, spec_of(frames=None), 9)[-1].snapshot for made in (driven, plain)]
    layers, heads, head_dim, tokens, chunks = 2, 2, 16, 18, 4
    assert driven.maker.pool.keys.dtype == FORMAT
    assert driven.info("s").cache_bytes == 2 * layers * tokens * heads * (head_dim + 1) * chunks
    assert all(snapshot is not None for snapshot in taken)
    sizes = {snapshot.tensor_bytes for snapshot in taken if snapshot is not None}
    assert len(sizes) == 1


@pytest.mark.slow
def test_a_snapshot_of_other_options_is_refused_and_unused_options_change_no_identity() -> None:
    identities = {name: Identity.of(release_of(*settings)).config for name, settings in OPTIONS.items()}
    usual = Identity.of(release_of()).config
    assert len({*identities.values(), usual}) == len(OPTIONS) + 1
    assert Identity.of(release_of("serve.decoder_layout=channels_last", "serve.overlap_decode=true")).config == usual
    snapshot = stream(engine([]), spec_of(), 1)[-1].snapshot
    assert snapshot is not None
    with pytest.raises(SnapshotError, match="snapshot.identity.config"):
        engine(["serve.cache_dtype=fp8"]).restore(snapshot)
