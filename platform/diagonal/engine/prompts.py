"""Prompts to embeddings beside the engine's step: on a thread of their own, the newest kept by prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Texts = Mapping[str, "Future[Tensor]"]


class Prompts:
    """Encodes each prompt once, in the order in which they were asked for; any thread may ask.

    `kept` embeddings (8 MB each at 512 tokens of 4096) stay for the next session with the same prompt; who still needs
    one that went holds its future. `news` is set whenever one is done: an engine with nothing else to do waits for it.
    """

    def __init__(self, encode: Callable[[str], Tensor], device: torch.device, kept: int = 16) -> None:
        self._encode, self._device, self._kept = encode, device, kept
        self._known: OrderedDict[str, Future[Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="text")
        self.news = threading.Event()

    def ask(self, prompt: str) -> Future[Tensor]:
        """The embeddings `[1, l, n]` to come; the future raises what the encoder did; whoever asks next tries anew."""
        with self._lock:
            found = self._known.get(prompt)
            if found is not None and not (found.done() and found.exception() is not None):
                self._known.move_to_end(prompt)
                return found
            begun = self._known[prompt] = self._worker.submit(self._on_device, prompt)
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        begun.add_done_callback(lambda _: self.news.set())
        return begun

    def _on_device(self, prompt: str) -> Tensor:
        """On CUDA in a stream of its own, waited for here: the engine's kernels go on meanwhile."""
        if self._device.type != "cuda":
            return self._encode(prompt)
        side = torch.cuda.Stream(self._device)
        with torch.cuda.stream(side):
            text = self._encode(prompt)
        side.synchronize()
        text.record_stream(torch.cuda.default_stream(self._device))  # where it is read, also after it is let go
        return text


def asked(prompts: Prompts, wanted: Iterable[str], held: Texts) -> dict[str, Future[Tensor]]:
    """The futures of all wanted prompts: those that are held, and new ones for the others."""
    return {prompt: held.get(prompt) or prompts.ask(prompt) for prompt in wanted}
