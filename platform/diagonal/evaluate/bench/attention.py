"""Speed of attention alone, forward and backward, at a geometry's sizes: ways to see a clip block-causally."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import BlockCausal, attend

Row = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FORWARD_AND_BACKWARD = 3.5  # products of a fused kernel: two forward, five backward, of the forward's two


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_rows(layout: TransformerLayout, pattern: BlockCausal, device: torch.device, repeats: int) -> list[Row]:
    """One row a way: milliseconds and TFLOP/s (of `FORWARD_AND_BACKWARD` times the forward's products)."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = (1, pattern.tokens, layout.heads, layout.head_dim)
    draws = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(shape, generator=draws, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    seen = sum(end - first for chunk in range(pattern.chunks) for first, end in pattern.spans(chunk))
    rows: list[Row] = []
    for name, way, keys in _ways(pattern, cuda):
        try:
            seconds = _timed(way, tensors, device, repeats)
        except RuntimeError as error:  # a back end that this device or build lacks
            rows.append({"what": name, "not_measured": str(error).partition("\n")[0]})
            continue
        pairs = pattern.chunk_tokens * seen if keys == "seen" else pattern.tokens**2
        products = 4 * layout.hidden * pairs
        rows.append({"what": name, "ms": seconds * 1e3, "tflops": FORWARD_AND_BACKWARD * products / seconds / 1e12})
    return rows


def _ways(pattern: BlockCausal, cuda: bool) -> Iterator[tuple[str, Attention, str]]:
    def by_chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, pattern)

    yield "block-causal, a call a chunk, default kernel", by_chunk, "seen"
    yield "everything sees everything, default kernel", attend, "all"
    if not cuda:
        return
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield f"block-causal, a call a chunk, {backend.name}", _under(backend, by_chunk), "seen"
    yield "block-causal, FlexAttention compiled", _flex(pattern), "seen"


def _under(backend: SDPBackend, way: Attention) -> Attention:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return way(query, key, value)

    return run


def _flex(pattern: BlockCausal) -> Attention:
    """The same pattern as a FlexAttention block mask; built at its first call, as only a GPU runs it compiled."""
    built: list[Any] = []

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not built:
            sink = pattern.sink_chunks
            window = pattern.chunks if pattern.window_chunks is None else pattern.window_chunks
            size = pattern.chunk_tokens

            def seen(batch: Any, head: Any, query_at: Any, key_at: Any) -> Any:
                own, other = query_at // size, key_at // size
                return (other <= own) & ((other < sink) | (other > own - (window - sink)))

            mask = create_block_mask(seen, None, None, pattern.tokens, pattern.tokens, device=query.device.type)
            built.extend((torch.compile(flex_attention), mask))
        compiled, mask = built
        return compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)

    return run


def _timed(way: Attention, tensors: list[Tensor], device: torch.device, repeats: int) -> float:
    """Mean seconds of a forward and backward after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started_s = time.perf_counter()
        torch.autograd.grad(way(*tensors).sum(), tensors)
        synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return sum(seconds[1:]) / repeats
