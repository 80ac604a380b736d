"""From a session's state to pixels on a device: text, re-cache, denoising, decode, emit. Owns the networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.noise import chunk_noise
from diagonal.diffusion.rollout import DenoisedChunk, StepNoise, chunk_noise_of, denoise_chunk, recache
from diagonal.engine.chunk_maker import Emitted, SessionError, stage
from diagonal.engine.prompts import Prompts, asked
from diagonal.engine.session import Session
from diagonal.engine.snapshot import Identity, ReleaseLike
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.model.cache import CacheBatch, latents_dtype, new_cache, new_pool, on_device
from diagonal.model.compiled import for_serving
from diagonal.model.dit import TextContext
from diagonal.model.vae import Decoder, DecoderState
from diagonal.schedule import StepSchedule

DRAWN_AT_MOST = 64


class Servable(ReleaseLike, Protocol):
    """What an engine asks of `diagonal.model.release.Release`."""

    def generator(self, device: torch.device | str = "cpu") -> Any: ...

    def text(self, device: torch.device | str = "cpu") -> Any: ...

    def decoder(self, device: torch.device | str = "cpu") -> Decoder: ...


class ModelRunner:
    """A `ChunkMaker` over a release's networks on one device."""

    def __init__(self, release: Servable, device: torch.device | str, slots: int) -> None:
        self.config: Config = release.config
        self.geometry = release.config.geometry
        self.identity = Identity.of(release)
        self.window_chunks = self.config.cache.window_frames // self.geometry.chunk_frames
        self._network = for_serving(release.generator(device), self.config)
        text = release.text(device)
        self.prompts = Prompts(lambda prompt: text.encode([prompt]), torch.device(device))
        self.encoded = self.prompts.news
        self._decoder = release.decoder(device)
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self.pool = new_pool(self.config, self._network, slots * self.window_chunks)

    def new_session(self, spec: SessionSpec, schedule: StepSchedule, shortened: bool = False) -> Session:
        cache, history_frames = new_cache(self.config, self.pool), self.config.serve.decoder_history_frames
        return Session(spec, schedule, cache, self._decoder.start(), history_frames, self.identity, shortened)

    def request_prompts(self, session: Session) -> None:
        session.prompt.embeddings = asked(self.prompts, session.prompt.needed, session.prompt.embeddings)

    def prepare(self, session: Session, changes: Sequence[PromptChange] = ()) -> int:
        reasons = [session.rebuild.reason] if session.rebuild.reason else []
        with stage("prompt_failed"):
            if session.begin_chunk(changes):
                reasons.append("prompt")
                session.drift.restart()
            if "prompt" in reasons or session.prompt.text is None:
                session.prompt.text = self._project(session)
        with stage("recache_failed"):
            if session.cut_window():
                reasons.append("reanchor")
            forwards = self._recache(session, reasons) if reasons and session.latents.window else 0
        with stage("decode_failed"):
            self._rebuild_decoder(session)
        with stage("recache_failed"):
            session.cache.begin(session.progress.making)
        return forwards

    def _project(self, session: Session) -> TextContext:
        """What the network reads of the session's prompts; raises what the encoder did."""
        timeline, embeddings = session.prompt.timeline, session.prompt.embeddings
        texts = asked(self.prompts, timeline.prompts, embeddings)
        return self._network.project_text(timeline.text(lambda prompt: texts[prompt].result()))

    def _recache(self, session: Session, reasons: Sequence[str]) -> int:
        assert session.prompt.text is not None
        forwards = recache(self._network, session.cache, session.latents.window, session.prompt.text)
        session.log("recache", reasons=list(reasons), forwards=forwards)
        return forwards

    def _rebuild_decoder(self, session: Session) -> None:
        """After a pause or a move: the decoder's state, from the newest clean latents."""
        if session.rebuild.reason and session.latents.history is not None:
            session.decoder_state = self._decoder.start()
            history = session.latents.history.unsqueeze(0).to(self.pool.keys.device).float()
            self._decoder.decode(history, session.decoder_state)
        session.rebuild.reason = ""

    def denoise(self, batch: Sequence[Session]) -> DenoisedChunk:
        with stage("forward_failed"):
            chunks = [session.progress.making for session in batch]
            noise = self._noise([session.spec.seed for session in batch], chunks)
            text = TextContext.joined([session.prompt.text for session in batch if session.prompt.text is not None])
            caches = CacheBatch([session.cache for session in batch])
            return denoise_chunk(self._network, batch[0].schedule, chunks[0], text, caches, noise)

    def draw_ahead(self, batch: Sequence[Session]) -> None:
        """The first noise of the chunk after each session's own: drawn while a GPU works, so nothing waits for it."""
        keys = [(session.spec.seed, session.progress.making + 1) for session in batch]
        if len(self._drawn) > DRAWN_AT_MOST:  # those of sessions that ended
            self._drawn.clear()
        self._drawn.update({key: chunk_noise(*key, 0, self.geometry.chunk_shape()[1:]) for key in keys})

    def _noise(self, seeds: Sequence[int], chunks: Sequence[int]) -> StepNoise:
        """Noise by step of a batch's chunks, the first from what was drawn ahead where it was."""
        later = chunk_noise_of(self.geometry, seeds, chunks, self.pool.keys.device)
        first = [self._drawn.pop(key, None) for key in zip(seeds, chunks, strict=True)]
        known = [noise for noise in first if noise is not None]
        if len(known) < len(first):
            return later
        return lambda step: later(step) if step else on_device(torch.stack(known), self.pool.keys.device)

    def decode(self, batch: Sequence[Session], clean: Sequence[Tensor]) -> list[Tensor | SessionError]:
        """Pixels `[f, h, w, 3]` uint8 on the device, of each session's next latents `[c, f, h, w]`, or what it failed
        with: where all together fail, each is decoded alone."""
        states = [session.decoder_state for session in batch]
        if self._decoder.can_join(states):
            try:
                with stage("decode_failed"):
                    return list(self._decoder.decode_together(torch.stack(list(clean)), states))
            except SessionError:
                pass  # one by one shows whose latents it was
        return [self._decode_alone(state, part) for state, part in zip(states, clean, strict=True)]

    def _decode_alone(self, state: DecoderState, clean: Tensor) -> Tensor | SessionError:
        try:
            with stage("decode_failed"):
                return self._decoder.decode(clean.unsqueeze(0), state)[0]
        except SessionError as error:
            return error

    def evict(self, session: Session) -> None:
        session.cache.close()
        session.decoder_state = self._decoder.start()
        session.prompt.text, session.prompt.embeddings = None, {}

    def to_host(
        self, pixels: Sequence[Tensor], clean: Sequence[Tensor], written: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> list[Emitted | SessionError]:
        return emit(pixels, clean, written, latents_dtype(self.config), finite)

    def synchronize(self) -> None:
        if self.pool.keys.device.type == "cuda":
            torch.cuda.synchronize(self.pool.keys.device)


def emit(
    pixels: Sequence[Tensor],
    clean: Sequence[Tensor],
    written: Sequence[Tensor],
    dtype: torch.dtype,
    finite: Sequence[Tensor],
) -> list[Emitted | SessionError]:
    """The step's one host sync: what its sessions show and keep, in one transfer, with whether it is finite.

    Pixels are of one shape; latents are kept as `dtype`; `finite` says of each session's cache and pixels whether they
    are finite, and the latents are looked at here. So a snapshot is made without the device, and never waits for the
    next chunk's kernels.
    `SessionError` stands for what is not finite, or could not be brought over.
    """
    try:
        with stage("decode_failed"):
            whole = [
                torch.isfinite(end).all() & torch.isfinite(start).all() & known
                for end, start, known in zip(clean, written, finite, strict=True)
            ]
            sound = torch.stack(whole).unsqueeze(1).to(torch.uint8)
            latents = [torch.stack(list(parts)).to(dtype).flatten(1).view(torch.uint8) for parts in (clean, written)]
            shown = torch.stack(list(pixels)).flatten(1).to(sound.device)
            packed = _on_host(torch.cat((shown, *latents, sound), dim=1))  # host sync: the emit point
    except SessionError as error:
        if len(pixels) == 1:
            return [error]
        parts = zip(pixels, clean, written, finite, strict=True)
        return [emit([shown], [end], [start], dtype, [known])[0] for shown, end, start, known in parts]
    refused = SessionError("not_finite", "the generated latents, their cache or their pixels are not finite")
    shapes = pixels[0].shape, clean[0].shape, written[0].shape
    return [_unpacked(row, *shapes, dtype) if row[-1] else refused for row in packed]


def _on_host(packed: Tensor) -> Tensor:
    """Through pinned memory from a GPU, which is several times as fast for a chunk's 14 MB of pixels."""
    if not packed.is_cuda:
        return packed.cpu()
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host


def _unpacked(row: Tensor, shown: torch.Size, clean: torch.Size, written: torch.Size, dtype: torch.dtype) -> Emitted:
    """The parts of one session's row, latents in memory of their own: a snapshot holds no neighbour's."""
    pixels, *latents = row[:-1].split([shown.numel(), *(shape.numel() * dtype.itemsize for shape in (clean, written))])
    parts = zip(latents, (clean, written), strict=True)
    return Emitted(pixels.view(shown), *(part.clone().view(dtype).view(shape) for part, shape in parts))
