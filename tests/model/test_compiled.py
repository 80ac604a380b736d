"""The generator for serving against the plain network: joined, compiled, replayed from static inputs; each kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.errors import FieldError
from diagonal.model import compiled
from diagonal.model.attention import rotary_table
from diagonal.model.compiled import StaticGenerator, fastest_kernel, for_serving, load_compiled, save_compiled
from diagonal.model.dit import CausalWan, TextContext
from tests.networks import TEXT_DIM, TEXT_TOKENS, begun, caches_for, draw, small_causal, small_config

CONFIG = small_config()
CHUNKS = 6  # the window is full at four, and evicts from the fifth on


def run(network: Any, batch: int = 1, text: Any = None) -> list[Tensor]:
    """Two forwards a chunk, the second of which writes; as a stream runs, with the text read once where it can be."""
    caches = caches_for(CONFIG, getattr(network, "network", network), batch)
    text = draw(batch, TEXT_TOKENS, TEXT_DIM, seed=3) if text is None else text
    found = []
    with torch.no_grad():
        for chunk in range(CHUNKS):
            seen, x = begun(chunk, *caches), draw(*CONFIG.geometry.chunk_shape(batch), seed=chunk)
            for step, level in enumerate((0.9375, 0.357)):
                levels = torch.full((batch, 3), level)
                found.append(network(x, levels, text, cache=seen, write=step == 1))
                x = x - level * found[-1]
    return found


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, msg=f"forward {index}")
    assert max(float(part.std()) for part in expected) > 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_joined_projections_and_a_text_read_once_give_what_the_plain_network_gives(batch: int) -> None:
    plain, network = small_causal(layers=3), small_causal(layers=3)
    network.fuse()
    network.fuse()
    assert not any("to_q." in name or "to_v." in name for name, _ in network.blocks[0].attn1.named_parameters())
    text = draw(batch, TEXT_TOKENS, TEXT_DIM, seed=3)
    parts = [network.project_text(one[None]) for one in text]
    assert_near(run(network, batch, TextContext.joined(parts)), run(plain, batch), 1e-5)
    layer = 2 * TEXT_TOKENS * 32 * 4
    assert parts[0].bytes == 3 * layer, "keys and values of every layer, counted to the byte"


def test_rotary_tables_in_float32_are_the_float64_ones_within_a_rounding_and_made_once() -> None:
    """1e-6: half a unit in the last place of 1 is 6e-8, an angle of 11 frames has 1e-6 of rounding."""
    network = small_causal()
    rope = copy.deepcopy(network.rope)
    positions, pairs = torch.arange(12, dtype=torch.float64), rope.t_dim // 2
    angles = torch.outer(positions, 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs))
    cosine, sine = rotary_table(rope, 12, 1, 1)
    torch.testing.assert_close(cosine[0, :, 0, :pairs].double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sine[0, :, 0, :pairs].double(), angles.sin(), rtol=0, atol=1e-6)
    assert network._rotary(12, 2, 3)[0] is network._rotary(12, 2, 3)[0]
    run(network)
    assert {key[0] for key in network._tables} == {3, 6, 9, 12}, "one for each length of context"


@pytest.mark.slow
def test_compiled_blocks_are_one_graph_without_a_break_and_equal_the_plain_ones() -> None:
    network = small_causal()
    found = run(for_compiled(network), 2)
    assert_near(found, run(small_causal(), 2), 1e-5)


def for_compiled(network: CausalWan) -> StaticGenerator:
    network.fuse()
    return StaticGenerator(network, compiled=True, backend="eager")


class Replayed:
    """Stands for a CUDA graph: replaying runs the same forward over the same static inputs into the same output."""

    def __init__(self, shape: Any, write: bool) -> None:
        self.shape, self.write, self.velocity, self.replays = shape, write, shape._forward(write).clone(), 0

    def replay(self) -> None:
        self.replays += 1
        self.velocity.copy_(self.shape._forward(self.write))


@pytest.mark.parametrize("batch", [1, 2])
def test_forwards_replayed_over_static_inputs_are_the_plain_ones(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the capture itself, which needs a GPU: context, text and pages of each chunk reach the static memory."""
    generator = replaying(monkeypatch)
    for seed in (3, 4):
        text = draw(batch, TEXT_TOKENS, TEXT_DIM, seed=seed)
        assert_near(run(generator, batch, generator.project_text(text)), run(small_causal(layers=3), batch, text), 1e-5)
    graphs: list[Any] = [one for shape in generator._shapes.values() for one, _ in shape._captured.values()]
    assert len(graphs) == 8 and sum(graph.replays for graph in graphs) == 2 * 2 * CHUNKS, "four lengths, written or not"


def replaying(monkeypatch: pytest.MonkeyPatch, **how: Any) -> StaticGenerator:
    """A generator whose graphs run anew, with three layers."""

    def capture(shape: Any, write: bool) -> tuple[Replayed, Tensor]:
        graph = Replayed(shape, write)
        return graph, graph.velocity

    monkeypatch.setattr(compiled._Shape, "_capture", capture)
    network = small_causal(layers=3)
    network.fuse()
    generator = StaticGenerator(network, **how)
    generator._graphs = True
    return generator


def test_all_shapes_share_one_memory_of_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of one and of two sessions by turns: each finds its own context, in the bytes of two sessions."""
    rows = 2 * (CONFIG.cache.window_frames - CONFIG.geometry.chunk_frames) * CONFIG.geometry.frame_tokens
    generator = replaying(monkeypatch, context_rows=rows)
    texts = {batch: draw(batch, TEXT_TOKENS, TEXT_DIM, seed=batch) for batch in (1, 2)}
    expected = {batch: run(small_causal(layers=3), batch, texts[batch]) for batch in texts}
    states = {
        batch: (caches_for(CONFIG, generator.network, batch), generator.project_text(texts[batch])) for batch in texts
    }
    found: dict[int, list[Tensor]] = {1: [], 2: []}
    for chunk in range(CHUNKS):
        begun_caches = {batch: begun(chunk, *states[batch][0]) for batch in texts}
        x = {batch: draw(*CONFIG.geometry.chunk_shape(batch), seed=chunk) for batch in texts}
        for step, level in enumerate((0.9375, 0.357)):
            for batch in texts:  # by turns within a chunk too, as no engine does
                seen, levels = begun_caches[batch], torch.full((batch, 3), level)
                found[batch].append(generator(x[batch], levels, states[batch][1], cache=seen, write=step == 1))
                x[batch] = x[batch] - level * found[batch][-1]
    for batch in texts:
        assert_near(found[batch], expected[batch], 1e-5)
    memory = generator._context._memory
    assert len(memory) == 3 and {len(part) for pair in memory.values() for part in pair} == {rows}


def test_the_context_is_turned_by_one_graph_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    generator = replaying(monkeypatch)
    generator._context.turn = compiled.StaticContext(0, compiled=True, backend="eager").turn
    text = draw(1, TEXT_TOKENS, TEXT_DIM, seed=3)
    assert_near(run(generator, 1, generator.project_text(text)), run(small_causal(layers=3), 1, text), 1e-5)
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] <= 4 and not stats["graph_break"], "shared by the layers"


@pytest.mark.parametrize("kernel", ["flash", "math", "default"])
def test_every_attention_kernel_gives_the_same_within_rounding(kernel: str) -> None:
    assert_near(run(StaticGenerator(small_causal(), kernel=kernel)), run(small_causal()), 1e-5)


def test_an_unknown_kernel_is_refused_by_name_and_a_cpu_has_nothing_to_choose() -> None:
    with pytest.raises(FieldError, match="serve.attention"):
        StaticGenerator(small_causal(), kernel="quick")
    assert fastest_kernel(small_causal(), 18, 72) == "default"


def test_the_plain_network_serves_where_nothing_else_is_asked_for() -> None:
    assert isinstance(for_serving(small_causal(), CONFIG), CausalWan)
    chosen = for_serving(small_causal(), small_config("serve.attention=auto"))
    assert isinstance(chosen, StaticGenerator) and chosen._kernel is None


def test_what_was_compiled_is_kept_by_key_and_torch_and_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels", None))

    def load(data: bytes) -> str:
        read.append(data)
        return "what was in it"

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    assert not load_compiled(tmp_path / "new", "a")
    assert save_compiled(tmp_path / "new", "a") and not list((tmp_path / "new").glob("*.part"))
    assert load_compiled(tmp_path / "new", "a") and read == [b"kernels"] and not load_compiled(tmp_path / "new", "b")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    assert not save_compiled(tmp_path / "none", "a") and not (tmp_path / "none").exists()
