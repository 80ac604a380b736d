"""One configuration tree, saved beside every artefact: presets, `key=value` settings, JSON in and out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diagonal.config.parse import assign, build
from diagonal.config.sections import NetworkConfig, PretrainConfig, not_negative, positive, shares
from diagonal.errors import FieldError, require
from diagonal.geometry import ChunkGeometry
from diagonal.jsonfile import read_json, write_json
from diagonal.schedule import RAW_TIMESTEPS, StepSchedule

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class CacheConfig:
    """Which latent frames a chunk attends to: the first `sink_frames`, the newest others, itself; in training too."""

    window_frames: int = 12
    sink_frames: int = 3


@dataclass(frozen=True)
class ModelConfig:
    """Where the base model lies (diffusers' folder layout, local or s3://; '' is the embedded one) and its text."""

    path: str = ""
    text_tokens: int = 512
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        positive(self, "model", "text_tokens")


@dataclass(frozen=True)
class PromptsConfig:
    """How prompt files are prepared: the share held out by hash, and the extension by a language model.

    `extend_url` is the base of an OpenAI-compatible endpoint ('' is off); its key is read from the environment variable
    named by `extend_key_variable`.
    """

    held_out_share: float = 0.01
    extend_url: str = ""
    extend_model: str = ""
    extend_key_variable: str = "OPENAI_API_KEY"
    extend_instruction: str = (
        "Rewrite the user's text as one detailed description of a short video: subject, motion, setting, light and "
        "camera. Answer with the description alone, in the language of the text, in at most 120 words."
    )
    extend_timeout_s: float = 60.0
    extend_concurrency: int = 8

    def __post_init__(self) -> None:
        shares(self, "prompts", "held_out_share")
        positive(self, "prompts", "extend_timeout_s", "extend_concurrency")
        require(
            not self.extend_url or bool(self.extend_model),
            "prompts.extend_model",
            self.extend_model,
            "the name of a model, as prompts.extend_url is given",
        )


@dataclass(frozen=True)
class PairsConfig:
    """Stage 0 data: trajectories of the guided teacher's ODE (METHOD I.7).

    `solver_workers` and `text_workers` are the most actors of each pool; 0 solvers are as many as train.workers.
    """

    prompts: str = ""
    count: int = 1024
    solver_steps: int = 40
    guidance: float = 6.0
    batch_size: int = 16
    rows_per_shard: int = 4  # about 80 MB at 832x480; a shard that is cut off is solved again
    kept_raw: tuple[int, ...] = (1000, 750, 500, 250, 100, 0)
    max_bad_share: float = 0.01
    text_workers: int = 1
    solver_workers: int = 0

    def __post_init__(self) -> None:
        positive(self, "pairs", "count", "batch_size", "rows_per_shard", "text_workers")
        not_negative(self, "pairs", "solver_workers")
        require(
            self.solver_steps > 0 and self.solver_steps % 20 == 0,
            "pairs.solver_steps",
            self.solver_steps,
            "a multiple of 20, so that every kept raw timestep is a step",
        )
        require(0.0 <= self.max_bad_share <= 1.0, "pairs.max_bad_share", self.max_bad_share, "a number in [0, 1]")
        falls = all(high > low for high, low in zip(self.kept_raw, self.kept_raw[1:], strict=False))
        require(
            falls and self.kept_raw[:1] == (RAW_TIMESTEPS,) and self.kept_raw[-1:] == (0,),
            "pairs.kept_raw",
            self.kept_raw,
            f"raw timesteps that fall from {RAW_TIMESTEPS} to 0",
        )


@dataclass(frozen=True)
class OdeInitConfig:
    """Stage 0 training: regression of the trajectory's end under the block-causal mask.

    `positions`: where the sink lies for a chunk that the window parted from it: "window", right before the newest, as
    in every rollout and stream, or "absolute", at its place in the clip, as a one-pass mask has it.
    """

    updates: int = 3000
    batch_size: int = 64
    micro_batch_size: int = 1
    lr: float = 2e-6
    ema_decay: float = 0.99
    checkpoint_every: int = 250
    positions: str = "absolute"

    def __post_init__(self) -> None:
        positive(self, "ode_init", "updates", "batch_size", "micro_batch_size", "lr", "checkpoint_every")
        require(self.positions in ("absolute", "window"), "ode_init.positions", self.positions, "absolute or window")
        shares(self, "ode_init", "ema_decay")


@dataclass(frozen=True)
class LossConfig:
    """Weights of METHOD I.6: spatial*dmd + regression*reg + gamma*(motion*motion_dmd + flow_regression).

    `motion_weights` gives later frame differences more weight in the motion term, as the published code does.
    """

    spatial: float = 1.0
    regression: float = 0.0
    gamma: float = 1.0
    motion: float = 1.0
    flow_regression: float = 1.0
    motion_weights: bool = False

    def __post_init__(self) -> None:
        not_negative(self, "distill.loss", "spatial", "regression", "gamma", "motion", "flow_regression")


@dataclass(frozen=True)
class DistillConfig:
    """Stages 1 and 2: distribution matching, first with uniform steps, then with the diagonal schedule.

    `teacher` is the folder (local or s3://) of the network that gives the real score, of 1.3B or 14B ('' is the base
    model's own). `init` is a folder that holds `transformer/`, or a causal student's `.pt`, whose `init_weights` are
    taken ('' is its averaged weights when it has them).
    """

    stage1_steps: str = "4"
    stage1_updates: int = 1000
    stage2_updates: int = 1000
    batch_size: int = 64
    micro_batch_size: int = 1
    generator_every: int = 5
    lr: float = 2e-6
    critic_lr: float = 4e-7
    beta1: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    guidance: float = 4.0
    level_low: float = 0.02
    level_high: float = 0.98
    ema_decay: float = 0.99
    ema_start: int = 200
    checkpoint_every: int = 100
    keep_checkpoints: int = 5
    max_nonfinite: int = 10
    prompts: str = ""
    teacher: str = ""
    init: str = ""
    init_weights: Literal["", "generator", "generator_ema"] = ""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        positive(self, "distill", "batch_size", "micro_batch_size", "generator_every", "checkpoint_every")
        positive(self, "distill", "lr", "critic_lr", "clip_norm", "keep_checkpoints", "max_nonfinite")
        not_negative(self, "distill", "stage1_updates", "stage2_updates", "ema_start", "weight_decay")
        shares(self, "distill", "beta1", "beta2", "ema_decay")
        require(
            0.0 < self.level_low < self.level_high < 1.0,
            "distill.level_low",
            self.level_low,
            f"a level in (0, 1) below distill.level_high = {self.level_high}",
        )


@dataclass(frozen=True)
class DecoderConfig:
    """The fast decoder's layout, and how jobs/distill_decoder.py distils it from the full one.

    `widths` and `blocks` are by level, each of twice the height and width (see model/fast_decoder.py). It learns from
    `clips` clips of the release's student, cut to `crop` latents a side (0: whole), `frames` latent frames a sample.
    `difference` weighs the error of what changes from pixel to pixel in time and space.
    """

    widths: tuple[int, ...] = (256, 128, 64)
    blocks: tuple[int, ...] = (3, 3, 2)
    clips: int = 512
    crop: int = 32
    frames: int = 9
    updates: int = 20_000
    batch_size: int = 8
    lr: float = 1e-3
    difference: float = 1.0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        positive(self, "decoder", "clips", "frames", "updates", "batch_size", "lr", "checkpoint_every")
        not_negative(self, "decoder", "crop", "difference")


@dataclass(frozen=True)
class TrainConfig:
    """How training runs: workers, sharding, where runs are kept, and what is done when something breaks.

    `workers` run at most and `min_workers` at least (0: as many as `workers`), so a run goes on with fewer when nodes
    are lost and grows again. `pool`: only nodes whose Ray label `pool` is this one train, and solve pairs ('': any).
    `storage` is a folder that every node sees, or s3://. A worker that makes no progress for
    `stall_timeout_s` is replaced; a storage that fails is asked again for `storage_patience_s`. Every `sample_every`
    updates `sample_clips` videos are written (0: never).
    """

    workers: int = 1
    min_workers: int = 0
    gpus_per_worker: float = 1.0
    cpus_per_worker: float = 1.0
    pool: str = ""
    shard_group: int = 0
    checkpoint_activations: bool = True
    compile: bool = False
    storage: str = "runs"
    storage_patience_s: float = 300.0
    max_failures: int = 3
    stall_timeout_s: float = 1800.0
    sample_every: int = 100
    sample_clips: int = 2

    def __post_init__(self) -> None:
        require(self.workers >= 1, "train.workers", self.workers, "a whole number of at least 1")
        require(
            0 <= self.min_workers <= self.workers,
            "train.min_workers",
            self.min_workers,
            f"0, or a whole number up to train.workers = {self.workers}",
        )
        not_negative(self, "train", "gpus_per_worker", "shard_group", "max_failures", "sample_every", "sample_clips")
        positive(self, "train", "cpus_per_worker", "storage_patience_s", "stall_timeout_s")

    @property
    def fewest_workers(self) -> int:
        """The number of workers that the run needs to go on."""
        return self.min_workers or self.workers


@dataclass(frozen=True)
class ServeConfig:
    """What one engine replica holds, and the limits of the API.

    A playing session is admitted while the predicted busy time per second of media stays under `budget_share`. Where
    `overload_steps` names a schedule, a new session that would not fit may run that one instead ('' never). At most
    `max_paused_sessions` beside the `max_sessions` wait without a cache, each for `max_paused_s`. A stream is anchored
    anew on its sink and newest chunk when a measure of its pictures left that of its first chunks by `reanchor_drift`
    (0.3 is 30 %), or every `reanchor_every_chunks`; 0 is never.

    `decoder` fast is the release's small one, if it has one. `linear_dtype` fp8 computes the blocks' linear layers and
    `cache_dtype` fp8 keeps keys and values in 8 bits (see model/fp8.py). `decoder_layout` is how the decoder's
    convolutions hold their weights, `overlap_decode` lets a GPU decode one chunk while it makes another one.

    `compile` compiles the generator's blocks, and on a GPU captures its forwards as CUDA graphs; what was compiled is
    kept in the folder `compile_cache` for the next start. `attention` auto measures the GPU's kernels at start.
    """

    max_sessions: int = 4
    batch_sessions: int = 4
    max_prompt_characters: int = 1000
    max_seconds: float = 300.0
    lead_s: float = 1.0
    decoder_history_frames: int = 24
    pixel_scale: int = 1
    budget_share: float = 0.9
    overload_steps: str = ""
    max_paused_sessions: int = 64
    max_paused_s: float = 600.0
    reanchor_drift: float = 0.0
    reanchor_every_chunks: int = 0
    decoder: Literal["full", "fast"] = "full"
    decoder_layout: Literal["contiguous", "channels_last"] = "contiguous"
    overlap_decode: bool = False
    compile: bool = False
    compile_cache: str = ""
    attention: Literal["default", "auto", "flash", "cudnn", "efficient"] = "default"
    linear_dtype: Literal["model", "fp8"] = "model"
    cache_dtype: Literal["model", "fp8"] = "model"

    def __post_init__(self) -> None:
        positive(self, "serve", "max_sessions", "batch_sessions", "decoder_history_frames")
        positive(self, "serve", "max_prompt_characters", "max_seconds", "pixel_scale", "max_paused_s", "lead_s")
        not_negative(self, "serve", "max_paused_sessions", "reanchor_drift", "reanchor_every_chunks")
        require(0.0 < self.budget_share <= 1.0, "serve.budget_share", self.budget_share, "a number in (0, 1]")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; one object, saved beside every artefact."""

    preset: str = "wan-1.3b"
    seed: int = 0
    geometry: ChunkGeometry = field(default_factory=ChunkGeometry)
    schedule: StepSchedule = field(default_factory=StepSchedule)
    cache: CacheConfig = field(default_factory=CacheConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    ode_init: OdeInitConfig = field(default_factory=OdeInitConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        chunk, cache = self.geometry.chunk_frames, self.cache
        least = cache.sink_frames + chunk
        require(
            cache.sink_frames >= 0 and cache.sink_frames % chunk == 0,
            "cache.sink_frames",
            cache.sink_frames,
            f"0 or a multiple of geometry.chunk_frames = {chunk}",
        )
        require(
            cache.window_frames % chunk == 0 and cache.window_frames >= least,
            "cache.window_frames",
            cache.window_frames,
            f"a multiple of geometry.chunk_frames = {chunk}, at least sink and current chunk = {least}",
        )
        # as stage 1, or an overloaded engine, runs them: the listed steps under the one context
        others = {"distill.stage1_steps": self.distill.stage1_steps, "serve.overload_steps": self.serve.overload_steps}
        for name, steps in others.items():
            try:
                if name.startswith("distill") or steps:
                    StepSchedule(steps, self.schedule.shift, self.schedule.resolved_context)
            except FieldError as error:
                raise FieldError(name, steps, error.allowed) from error

    @classmethod
    def from_preset(cls, name: str, settings: Iterable[str] = ()) -> Config:
        """A preset with `key=value` settings applied, such as `distill.lr=1e-6`."""
        require(name in PRESETS, "preset", name, f"one of {sorted(PRESETS)}")
        return PRESETS[name].with_settings(settings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The tree in `data`; an unknown key or a value of the wrong type raises `FieldError`."""
        return build(cls, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read what `save` wrote; `FieldError` when it is missing, not JSON, or not such a tree."""
        return cls.from_dict(read_json(path))

    @property
    def is_embedded(self) -> bool:
        """Whether captions and clips come from an embedded world."""
        return self.preset in EMBEDDED

    @property
    def embedded_model(self) -> str:
        """The embedded model that an empty `model.path` means."""
        return EMBEDDED.get(self.preset, "tiny")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def with_settings(self, settings: Iterable[str]) -> Config:
        """A copy with each `dotted.key=value` applied; values are JSON, anything else is a string."""
        data = self.to_dict()
        for setting in settings:
            key, equals, text = setting.partition("=")
            require(bool(equals), "setting", setting, "of the form dotted.key=value")
            assign(data, key.strip(), text.strip())
        return self.from_dict(data)


def _tiny() -> Config:
    return Config(
        preset="tiny",
        geometry=ChunkGeometry(latent_height=4, latent_width=4),
        model=ModelConfig(text_tokens=12, negative_prompt="", compute_dtype="float32"),
        pairs=PairsConfig(count=1536, solver_steps=20, guidance=1.5, batch_size=32, rows_per_shard=64),
        ode_init=OdeInitConfig(updates=2000, batch_size=16, micro_batch_size=16, lr=7e-4),
        distill=DistillConfig(
            stage1_updates=150,
            stage2_updates=150,
            batch_size=16,
            micro_batch_size=16,
            guidance=1.5,
            ema_start=20,
            checkpoint_every=50,
            lr=2e-4,
            critic_lr=4e-4,
        ),
        decoder=DecoderConfig(
            widths=(64, 48, 24),
            blocks=(1, 1, 1),
            clips=192,
            crop=0,
            frames=6,
            updates=1500,
            batch_size=4,
            lr=2e-3,
            checkpoint_every=100,
        ),
        train=TrainConfig(workers=2, gpus_per_worker=0.0, checkpoint_activations=False),
        serve=ServeConfig(max_sessions=4, pixel_scale=8),
    )


def _tiny_textured() -> Config:
    """The textured world at 48x48: nine tokens a latent frame, and channels for what its textures need.

    Its codec is the linear one itself: a network in its place would only learn the same latents.
    """
    tiny = _tiny()
    return dataclasses.replace(
        tiny,
        preset="tiny-textured",
        geometry=ChunkGeometry(latent_channels=24, latent_height=6, latent_width=6),
        model=ModelConfig(text_tokens=16, negative_prompt="", compute_dtype="float32"),
        pretrain=PretrainConfig(
            world="textured",
            clips=8192,
            updates=14_000,
            codec_updates=0,
            motion_channels=8,
            text_updates=400,
            score_every=1000,
        ),
        # at guidance 1.5 the teacher draws fewer shapes, and paler
        pairs=dataclasses.replace(tiny.pairs, count=2048, guidance=3.0),
        # after 2000 updates .51 of a clip's last pieces show their speed, after 7000 .66 (docs/log.md)
        ode_init=dataclasses.replace(tiny.ode_init, updates=7000, positions="window"),
        # chunks whose last step begins at raw 250 show .77 of shapes right, at the paper's 100 .65 (docs/log.md)
        schedule=StepSchedule("4322222@250"),
        # so few updates need a faster average and a critic that keeps up; without the motion loss students move 1.13
        # times as much as their teacher, with the paper's gamma of 1 .90 times, with this one as much (docs/log.md)
        distill=dataclasses.replace(
            tiny.distill,
            stage1_steps="4@250",
            guidance=3.0,
            lr=4e-4,
            critic_lr=1e-3,
            ema_decay=0.85,
            stage1_updates=300,
            stage2_updates=300,
            loss=LossConfig(gamma=0.25),
        ),
        serve=dataclasses.replace(tiny.serve, pixel_scale=6),
    )


EMBEDDED = {"tiny": "tiny", "tiny-textured": "textured"}  # presets, and the folder of each one's model in assets/
PRESETS: dict[str, Config] = {
    "tiny": _tiny(),
    "tiny-textured": _tiny_textured(),
    "wan-1.3b": Config(ode_init=OdeInitConfig(positions="window"), train=TrainConfig(workers=8)),
}
