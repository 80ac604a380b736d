"""The generator for serving: a few static shapes, blocks compiled for them, forwards captured as CUDA graphs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagonal.config import Config
from diagonal.errors import require
from diagonal.model.cache import CacheBatch, StaticContext
from diagonal.model.dit import CausalWan, TextContext

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
GRAPHS_AT_MOST = 64  # of compiled blocks: batch sizes times lengths of context
_ROUNDS = 5


class StaticGenerator:
    """A `CausalWan` under one attention kernel, its blocks compiled, its forwards replayed from CUDA graphs.

    Called as the network itself; inference only. A graph is kept for each batch size, number of context chunks (four
    under window 12) and for whether it writes the cache; it is captured when such a call first comes.
    """

    def __init__(
        self,
        network: CausalWan,
        *,
        compiled: bool = False,
        kernel: str = "default",
        backend: str = "inductor",
        context_rows: int = 0,
    ) -> None:
        """`context_rows`: most tokens of context of all sessions of a batch, for which memory is taken once."""
        require(kernel == "default" or kernel in KERNELS, "serve.attention", kernel, f"default or of {sorted(KERNELS)}")
        self.network, self.config = network, network.config
        self._kernel = KERNELS.get(kernel)
        self._graphs = compiled and next(network.parameters()).is_cuda
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._context = StaticContext(context_rows, compiled, backend)
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None
        if compiled:
            compile_blocks(network, backend)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def project_text(self, text: Tensor) -> TextContext:
        return self.network.project_text(text)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        level: Tensor,
        text: Tensor | TextContext,
        *,
        cache: CacheBatch | None = None,
        write: bool = False,
    ) -> Tensor:
        """As `CausalWan.forward`; of one whole chunk with a cache, from a graph where there are graphs."""
        with self._under_kernel():
            if cache is None or cache.is_tail or not self._graphs:
                found: Tensor = self.network(latents, level, text, cache=cache, write=write)
                return found
            text = self.project_text(text) if isinstance(text, Tensor) else text
            key = (len(latents), cache.context_chunks)
            if key not in self._shapes:
                self._shapes[key] = _Shape(self.network, latents, level, text, cache, self._context, self._pool)
            return self._shapes[key].run(latents, level, text, cache, write)

    def _under_kernel(self) -> AbstractContextManager[object]:
        if self._kernel is None:
            return nullcontext()
        return sdpa_kernel([self._kernel, SDPBackend.MATH], set_priority=True)


class _Shape:
    """Static inputs of one batch size and length of context, and the graphs that read them."""

    def __init__(
        self,
        network: CausalWan,
        latents: Tensor,
        level: Tensor,
        text: TextContext,
        cache: CacheBatch,
        context: StaticContext,
        pool: Any,
    ) -> None:
        self._network, self._context, self._pool = network, context, pool
        self._latents, self._level, self._text = latents.clone(), level.clone(), text.clone()
        self._cache = cache.clone(context)
        self._captured: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, latents: Tensor, level: Tensor, text: TextContext, cache: CacheBatch, write: bool) -> Tensor:
        """Velocity `[b, c, f, h, w]`; text and context are copied in once a chunk, unless another shape ran since."""
        self._latents.copy_(latents)
        self._level.copy_(level)
        source = (self, text, cache)
        if len(self._context.source) != 3 or any(a is not b for a, b in zip(self._context.source, source, strict=True)):
            self._text.copy_(text)
            self._cache.copy_(cache)
            self._context.source = source
        if write not in self._captured:
            self._captured[write] = self._capture(write)
        graph, velocity = self._captured[write]
        graph.replay()
        return velocity.clone()

    def _forward(self, write: bool) -> Tensor:
        velocity: Tensor = self._network(self._latents, self._level, self._text, cache=self._cache, write=write)
        return velocity

    def _capture(self, write: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """After two runs on a side stream, which compile and leave nothing to be allocated or looked up."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(write)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            velocity = self._forward(write)
        return graph, velocity


def compile_blocks(network: CausalWan, backend: str = "inductor") -> None:
    """Each block's forward as one static graph, shared by all blocks, one a shape; breaks are errors."""
    from torch import _dynamo as dynamo  # seconds to import, and not every engine compiles

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, GRAPHS_AT_MOST)
    for block in (block for block in network.blocks if "forward" not in vars(block)):  # once
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


def for_serving(network: CausalWan, config: Config) -> CausalWan | StaticGenerator:
    """The network with its projections joined, and as `serve.compile` and `serve.attention` ask."""
    network.fuse()
    serve, geometry = config.serve, config.geometry
    compiled = serve.compile and next(network.parameters()).is_cuda
    if not compiled and serve.attention == "default":
        return network
    kernel: str = serve.attention
    if kernel == "auto":
        kernel = fastest_kernel(network, geometry.chunk_tokens, config.cache.window_frames * geometry.frame_tokens)
    rows = serve.batch_sessions * (config.cache.window_frames - geometry.chunk_frames) * geometry.frame_tokens
    return StaticGenerator(network, compiled=compiled, kernel=kernel, context_rows=rows)


def fastest_kernel(network: CausalWan, query_tokens: int, key_tokens: int) -> str:
    """The attention kernel that is fastest at those lengths on the network's device; default on a CPU, which has one.

    FlexAttention is not among them: serving's attention has no mask, where it has nothing to skip.
    """
    parameter = next(network.parameters())
    if not parameter.is_cuda:
        return "default"
    heads, width = network.config.num_attention_heads, network.config.attention_head_dim
    like = network.patch_embedding.weight
    query, key = like.new_zeros(1, heads, query_tokens, width), like.new_zeros(1, heads, key_tokens, width)
    seconds = {}
    for name in ("flash", "cudnn", "efficient"):
        try:
            with sdpa_kernel(KERNELS[name]):
                seconds[name] = _timed(lambda: F.scaled_dot_product_attention(query, key, key))
        except RuntimeError:  # a kernel that this device or build lacks
            continue
    return min(seconds, key=lambda name: seconds[name], default="default")


def _timed(way: Callable[[], Tensor]) -> float:
    """Seconds of a call, after one that is not counted."""
    way()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(_ROUNDS):
        way()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / _ROUNDS


def load_compiled(folder: Path, key: str) -> bool:
    """Take over what an earlier process compiled under that key with this torch; whether there was anything."""
    path = _artefacts(folder, key)
    return path.exists() and torch.compiler.load_cache_artifacts(path.read_bytes()) is not None


def save_compiled(folder: Path, key: str) -> bool:
    """Leave what this process compiled to the next one, whole or not at all; whether there was anything."""
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    part = _artefacts(folder, key).with_suffix(".part")
    part.write_bytes(found[0])
    part.replace(_artefacts(folder, key))
    return True


def _artefacts(folder: Path, key: str) -> Path:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    named = hashlib.sha256(f"{key} {torch.__version__} {device}".encode()).hexdigest()[:16]
    return folder / f"{named}.compiled"
