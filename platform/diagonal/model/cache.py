"""K/V memory: a pool that owns pages, and a session's cache of a sink and a ring of chunk-sized pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diagonal.errors import require


class PoolExhaustedError(RuntimeError):
    """No free page is left: the caller must refuse or end a session."""


class KVPool:
    """All K/V memory of one device, allocated once: `[layers, pages, page_tokens, heads, head_dim]`, twice.

    A page holds the keys (after their norm, before rotary) and values of one chunk in every layer.
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
        self._free = list(range(pages))[::-1]

    @property
    def pages(self) -> int:
        return self.keys.shape[1]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: 2 * layers * page_tokens * heads * head_dim * element size."""
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    @property
    def bytes_in_use(self) -> int:
        return (self.pages - self.free_pages) * self.page_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.pages * self.page_bytes

    def take(self) -> int:
        """Hand out a free page; `PoolExhaustedError` when there is none."""
        if not self._free:
            raise PoolExhaustedError(f"all {self.pages} pages of the K/V pool are in use")
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Take a page back; giving one back twice raises `ValueError`."""
        require(0 <= page < self.pages and page not in self._free, "page", page, "a page that is in use")
        self._free.append(page)


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


class CacheBatch:
    """The caches of several sessions, one chunk each in progress, seen as one batch by the network's forward.

    All must hold the same number of context chunks; their chunk indices may differ, as positions are relative to
    the window.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        lengths = {len(cache.pages) for cache in caches}
        require(len(lengths) == 1 and 0 not in lengths, "caches", sorted(lengths), "caches of one equal, begun length")
        self._pool = caches[0].pool
        device = self._pool.keys.device
        table = torch.tensor([cache.pages for cache in caches], dtype=torch.long)
        self.context_chunks = table.shape[1] - 1
        self._context = table[:, :-1].to(device)
        self._current = table[:, -1].to(device)

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (before rotary) and values `[b, context_tokens, heads, head_dim]` of that layer, copied out."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        return keys[self._context].flatten(1, 2), values[self._context].flatten(1, 2)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the current chunk's keys (before rotary) and values `[b, chunk_tokens, heads, head_dim]`, detached."""
        self._pool.keys[layer, self._current] = key.detach().to(self._pool.keys.dtype)
        self._pool.values[layer, self._current] = value.detach().to(self._pool.values.dtype)
