"""A maker of empty chunks for the real engine: each step takes the time that one was measured to take."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

import torch
from torch import Tensor

from diagonal.config import Config
from diagonal.diffusion.rollout import DenoisedChunk, new_cache
from diagonal.engine.chunk_maker import Emitted
from diagonal.engine.session import Session
from diagonal.engine.snapshot import Identity
from diagonal.engine.specs import PromptChange, SessionSpec
from diagonal.evaluate.simulation.chunk_times import Draws
from diagonal.model.cache import KVPool
from diagonal.model.vae import DecoderState
from diagonal.schedule import StepSchedule

# Latents of a single patch: their size decides nothing of when a chunk is made. Decoding is within a step's time.
_ONE_PATCH = [
    "geometry.latent_channels=1",
    "geometry.latent_height=2",
    "geometry.latent_width=2",
    "serve.overlap_decode=false",
]


def simulated_config(config: Config) -> Config:
    """The configuration that a simulated engine of this one runs."""
    history_frames = config.geometry.chunk_frames
    return config.with_settings([*_ONE_PATCH, f"serve.decoder_history_frames={history_frames}"])


class SimulatedMaker:
    """A `ChunkMaker` that adds up in `spent_s` what its steps take: their medians, until they are to scatter."""

    def __init__(self, config: Config, draws: Draws) -> None:
        self.config, self._draws, self.step_s = config, draws, draws.median_s
        self.window_chunks = config.cache.window_frames // config.geometry.chunk_frames
        self.identity, self.encoded = Identity("simulated", "", ""), Event()
        pages = config.serve.max_sessions * self.window_chunks
        self.pool = KVPool(layers=1, heads=1, head_dim=1, page_tokens=1, pages=pages)
        geometry = config.geometry
        self._latents = torch.zeros(geometry.chunk_shape()[1:])
        self._shown = Emitted(
            torch.empty((0, geometry.pixel_height, geometry.pixel_width, 3), dtype=torch.uint8),
            self._latents,
            self._latents,
        )
        self.spent_s = 0.0

    def take_spent_s(self) -> float:
        """What was spent since this was asked last."""
        spent_s, self.spent_s = self.spent_s, 0.0
        return spent_s

    def scatter(self) -> None:
        """From now on steps take as long as they are drawn."""
        self.step_s = self._draws.step_s
        self.take_spent_s()

    def new_session(self, spec: SessionSpec, schedule: StepSchedule, shortened: bool = False) -> Session:
        cache, history_frames = new_cache(self.config, self.pool), self.config.serve.decoder_history_frames
        return Session(spec, schedule, cache, DecoderState(), history_frames, self.identity, shortened)

    def request_prompts(self, session: Session) -> None:
        """Prompts take no time."""

    def prepare(self, session: Session, changes: Sequence[PromptChange] = ()) -> int:
        rebuilt, session.rebuild.reason = bool(session.rebuild.reason), ""
        changed, cut = session.begin_chunk(changes), session.cut_window()
        recached = len(session.latents.window) if rebuilt or changed or cut else 0
        self.spent_s += recached * self._draws.times.recache_chunk_s + rebuilt * self._draws.times.rebuild_s
        session.cache.begin(session.progress.making)
        return recached

    def denoise(self, batch: Sequence[Session]) -> DenoisedChunk:
        kind = batch[0].chunk_kind
        self.spent_s += self.step_s(kind, len(batch))
        latents = self._latents.expand(len(batch), *self._latents.shape)
        return DenoisedChunk(latents, latents, 0.0, kind.forwards, torch.ones(len(batch), dtype=torch.bool))

    def decode(self, batch: Sequence[Session], clean: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._shown.pixels] * len(batch)

    def draw_ahead(self, batch: Sequence[Session]) -> None:
        """There is no noise."""

    def to_host(
        self, pixels: Sequence[Tensor], clean: Sequence[Tensor], written: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> Sequence[Emitted]:
        return [self._shown] * len(pixels)

    def evict(self, session: Session) -> None:
        session.cache.close()

    def synchronize(self) -> None:
        """There is no device."""
