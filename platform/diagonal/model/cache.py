"""K/V memory: a pool that owns pages, and a session's cache of a sink and a ring of chunk-sized pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import require
from diagonal.model.attention import Rotary, rotate
from diagonal.model.fp8 import FORMAT, dequantise, quantise


class PoolExhaustedError(RuntimeError):
    """No free page is left: the caller must refuse or end a session."""


def on_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A copy of numbers drawn or written on the host that never waits for what the device still has to do."""
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class KVPool:
    """All K/V memory of one device, allocated once: `[layers, pages, page_tokens, heads, head_dim]`, twice.

    A page holds the keys (after their norm, before rotary) and values of one chunk in every layer. In `fp8.FORMAT` they
    have an exponent (a byte) for each token and head besides, and are read in bfloat16, which holds them exactly.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        page_tokens: int,
        pages: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        require(pages >= 1, "pages", pages, "a whole number of at least 1")
        shape = (layers, pages, page_tokens, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        eight_bit = dtype == FORMAT
        self.exponents = torch.zeros((2, *shape[:-1]), dtype=torch.int8, device=device) if eight_bit else None
        self._free = list(range(pages))[::-1]

    @property
    def pages(self) -> int:
        return self.keys.shape[1]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: 2 * layers * page_tokens * heads * head_dim * element size; in fp8
        2 * layers * page_tokens * heads * (head_dim + 1)."""
        exponents = 0 if self.exponents is None else self.exponents[:, :, 0].numel()
        return 2 * self.keys[:, 0].numel() * self.keys.element_size() + exponents

    @property
    def bytes_in_use(self) -> int:
        return (self.pages - self.free_pages) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.pages * self.page_bytes

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[*pages.shape, page_tokens, heads, head_dim]` of those pages, copied out."""
        exponents = None if self.exponents is None else self.exponents[:, layer]
        return _read(self.keys[layer], self.values[layer], exponents, pages)

    def write(self, layer: int, pages: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values `[pages, tokens, heads, head_dim]`, detached, as the last tokens of those pages."""
        first = self.keys.shape[2] - key.shape[1]
        for side, (memory, new) in enumerate(((self.keys, key.detach()), (self.values, value.detach()))):
            if self.exponents is None:
                memory[layer, pages, first:] = new.to(memory.dtype)
            else:
                memory[layer, pages, first:], self.exponents[side, layer, pages, first:] = quantise(new)

    def take(self) -> int:
        """Hand out a free page; `PoolExhaustedError` when there is none."""
        if not self._free:
            raise PoolExhaustedError(f"all {self.pages} pages of the K/V pool are in use")
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Take a page back; giving one back twice raises `ValueError`."""
        require(0 <= page < self.pages and page not in self._free, "page", page, "a page that is in use")
        self._free.append(page)


def _read(keys: Tensor, values: Tensor, exponents: Tensor | None, pages: Tensor) -> tuple[Tensor, Tensor]:
    if exponents is None:
        return keys[pages], values[pages]
    return dequantise(keys[pages], exponents[0, pages]), dequantise(values[pages], exponents[1, pages])


def turned_context(
    keys: Tensor, values: Tensor, exponents: Tensor | None, pages: Tensor, rotary: Rotary, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The context of one layer `[b, context_tokens, heads, head_dim]`, keys after rotary."""
    keys, values = _read(keys, values, exponents, pages)
    return rotate(keys.flatten(1, 2).to(dtype), rotary), values.flatten(1, 2).to(dtype)


def turn_context_into(
    memory: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, exponents: Tensor | None, pages: Tensor, rotary: Rotary
) -> None:
    """Put it into given memory of that type and shape."""
    turned = turned_context(keys, values, exponents, pages, rotary, memory[0].dtype)
    for target, part in zip(memory, turned, strict=True):
        target.copy_(part)


class KVCache:
    """One session's cache: the first `sink_chunks` chunks for ever, then the newest, `window_chunks` in all.

    The window counts the chunk in progress. With `recycle=False` (training) no page is reused before `close`:
    chunks out of the window are no longer read, but their memory stays as the backward pass may need it.
    """

    def __init__(self, pool: KVPool, *, window_chunks: int, sink_chunks: int, recycle: bool = True) -> None:
        require(0 <= sink_chunks < window_chunks, "sink_chunks", sink_chunks, f"0 to {window_chunks - 1}")
        self.pool = pool
        self.window_chunks = window_chunks
        self.sink_chunks = sink_chunks
        self._recycle = recycle
        self._kept: list[tuple[int, int]] = []
        self._retired: list[int] = []

    @property
    def chunks(self) -> tuple[int, ...]:
        """Indices of the chunks whose pages are kept, oldest first; the last is the one in progress or just done."""
        return tuple(chunk for chunk, _ in self._kept)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of `chunks`, in the same order."""
        return tuple(page for _, page in self._kept)

    @property
    def bytes_in_use(self) -> int:
        return (len(self._kept) + len(self._retired)) * self.pool.page_bytes

    def begin(self, chunk: int) -> None:
        """Make room for that chunk: its own page again if it is the newest, else a new one, evicting the oldest
        chunk behind the sink when the window is full. Chunks must rise."""
        newest = self._kept[-1][0] if self._kept else -1
        if self._kept and chunk == newest:
            return
        require(chunk > newest, "chunk", chunk, f"a chunk after {newest}")
        if len(self._kept) < self.window_chunks:
            self._kept.append((chunk, self.pool.take()))
            return
        page = self._kept[self.sink_chunks][1]
        fresh = page if self._recycle else self.pool.take()
        if not self._recycle:
            self._retired.append(page)
        del self._kept[self.sink_chunks]
        self._kept.append((chunk, fresh))

    def close(self) -> None:
        """Give every page back to the pool."""
        for page in (*self.pages, *self._retired):
            self.pool.give_back(page)
        self._kept, self._retired = [], []


class StaticContext:
    """Memory for the turned context of whichever batch runs: every batch size and length sees a part of the same bytes.

    Each chunk fills it, so that it need not be kept for each shape: `rows` tokens of all sessions in each layer, twice.
    A shape that needs more gets more. `source` is what it holds now, for those who captured graphs over it.
    """

    def __init__(self, rows: int, compiled: bool = False, backend: str = "inductor") -> None:
        self._rows, self._memory = rows, dict[int, tuple[Tensor, Tensor]]()
        self.source: tuple[object, ...] = ()
        self.turn: Callable[..., None] = turn_context_into
        if compiled:
            self.turn = torch.compile(turn_context_into, fullgraph=True, dynamic=False, backend=backend)

    def views(self, layer: int, like: Tensor, sessions: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[sessions, tokens, heads, head_dim]` in that layer's memory, of the type of `like`."""
        rows, rest = sessions * tokens, like.shape[1:]
        if layer not in self._memory or len(self._memory[layer][0]) < rows:
            most = max(rows, self._rows)
            self._memory[layer] = like.new_empty((most, *rest)), like.new_empty((most, *rest))
        keys, values = self._memory[layer]
        return keys[:rows].view(sessions, tokens, *rest), values[:rows].view(sessions, tokens, *rest)


class CacheBatch:
    """The caches of several sessions, one chunk each in progress, seen as one batch by the network's forward.

    All must hold the same number of context chunks; their chunk indices may differ, as positions are relative to
    the window.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches
        lengths = {len(cache.pages) for cache in caches}
        require(len(lengths) == 1 and 0 not in lengths, "caches", sorted(lengths), "caches of one equal, begun length")
        self._pool = caches[0].pool
        device = self._pool.keys.device
        table = torch.tensor([cache.pages for cache in caches], dtype=torch.long)
        self.context_chunks = table.shape[1] - 1
        table = on_device(table, device)
        self._context, self._current = table[:, :-1], table[:, -1]
        self._rotated: dict[int, tuple[Tensor, Tensor]] = {}
        self._how: tuple[Rotary, torch.dtype]
        self._static: StaticContext | None = None
        self._whole: tuple[CacheBatch, Sequence[int]] | None = None
        self._tail_of: CacheBatch | None = None
        self._lead = 0

    @property
    def context_tokens(self) -> int:
        """Tokens that the ones in progress attend to, beside themselves."""
        return self.context_chunks * self._pool.keys.shape[2] + self._lead

    @property
    def is_tail(self) -> bool:
        """Whether it is the end of chunks whose first frames are cached already."""
        return self._tail_of is not None

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (before rotary) and values `[b, context_tokens, heads, head_dim]` of that layer, copied out."""
        keys, values = self._pool.read(layer, self._context)
        return keys.flatten(1, 2), values.flatten(1, 2)

    def rotated(self, layer: int, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in that type, keys after rotary by the window's table: copied out once for all forwards of a chunk,
        during which nothing in the context changes."""
        if self._tail_of is not None:
            return self._behind_lead(layer, rotary, dtype)
        if self._whole is not None:
            whole, numbers = self._whole
            keys, values = whole.rotated(layer, rotary, dtype)
            return keys[numbers], values[numbers]
        if layer not in self._rotated:
            self._how = rotary, dtype
            if self._static is None:
                self._rotated[layer] = turned_context(*self._where(layer), dtype)
            else:
                sessions, tokens = len(self._context), self.context_chunks * self._pool.keys.shape[2]
                like = self._pool.keys.new_empty((0, *self._pool.keys.shape[-2:]), dtype=dtype)
                self._rotated[layer] = self._static.views(layer, like, sessions, tokens)
                self._static.turn(self._rotated[layer], *self._where(layer))
        return self._rotated[layer]

    def _where(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Rotary]:
        """What the turned context of a layer is made of."""
        pool, (cosine, sine) = self._pool, self._how[0]
        tokens = self.context_chunks * pool.keys.shape[2]
        exponents = None if pool.exponents is None else pool.exponents[:, layer]
        return pool.keys[layer], pool.values[layer], exponents, self._context, (cosine[:, :tokens], sine[:, :tokens])

    def tail(self, frames: int, of: int) -> CacheBatch:
        """The same pages with the current chunk's first frames as context: what is then written are its last `frames`
        of `of`."""
        tail, page_tokens = copy(self), self._pool.keys.shape[2]  # its tables too: nothing is sent to the device
        tail._tail_of, tail._lead = self, page_tokens - page_tokens * frames // of
        return tail

    def _behind_lead(self, layer: int, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A tail's context: its chunks', and the first frames of the current one, which was written just now."""
        assert self._tail_of is not None
        keys, values = (part[:, : self._lead] for part in self._pool.read(layer, self._current))
        before = self.context_tokens - self._lead
        here = (rotary[0][:, before : self.context_tokens], rotary[1][:, before : self.context_tokens])
        keys, values = rotate(keys.to(dtype), here), values.to(dtype)
        if not before:
            return keys, values
        context = self._tail_of.rotated(layer, rotary, dtype)
        return torch.cat((context[0], keys), dim=1), torch.cat((context[1], values), dim=1)

    def part(self, numbers: Sequence[int]) -> CacheBatch:
        """Some of its sessions, which share what is turned already."""
        part = CacheBatch([self._caches[number] for number in numbers])
        part._whole = self, numbers
        return part

    def clone(self, static: StaticContext) -> CacheBatch:
        """The same pages, in tables of its own, which `copy_` changes; its turned context lies in `static`."""
        other = copy(self)
        other._static, other._rotated = static, {}
        other._context, other._current = self._context.clone(), self._current.clone()
        return other

    def copy_(self, other: CacheBatch) -> None:
        """See the other's pages from now on, in the same memory: for graphs that were captured over it."""
        self._context.copy_(other._context)
        self._current.copy_(other._current)
        for layer, memory in self._rotated.items():
            assert self._static is not None
            self._static.turn(memory, *self._where(layer))

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the current chunk's keys (before rotary) and values `[b, chunk_tokens, heads, head_dim]`, detached."""
        self._pool.write(layer, self._current, key, value)


def new_pool(config: Config, network: Any, pages: int) -> KVPool:
    """A pool of pages that fit the network's layers and the geometry's chunks, on the network's device."""
    layout: Any = network.config
    return KVPool(
        layers=layout.num_layers,
        heads=layout.num_attention_heads,
        head_dim=layout.attention_head_dim,
        page_tokens=config.geometry.chunk_tokens,
        pages=pages,
        dtype=cache_dtype(config),
        device=next(network.parameters()).device,
    )


def cache_dtype(config: Config) -> torch.dtype:
    """Element type of the K/V cache: the compute type, or 8 bits where `serve.cache_dtype` says so."""
    return FORMAT if config.serve.cache_dtype == "fp8" else latents_dtype(config)


def latents_dtype(config: Config) -> torch.dtype:
    """Element type of the latents that a session keeps: the compute type."""
    return torch.bfloat16 if config.model.compute_dtype == "bfloat16" else torch.float32


def new_cache(config: Config, pool: KVPool, *, recycle: bool = True) -> KVCache:
    """A cache with the configured window and sink, counted in chunks."""
    chunk = config.geometry.chunk_frames
    return KVCache(
        pool,
        window_chunks=config.cache.window_frames // chunk,
        sink_chunks=config.cache.sink_frames // chunk,
        recycle=recycle,
    )
