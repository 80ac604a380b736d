"""Settings of training: the teacher from nothing, stages 0 to 2, and how a run is carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diagonal.errors import require
from diagonal.setting import FULL_SHARE, NOT_NEGATIVE, POSITIVE, SHARE, Allowed, check, setting

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # and the package of each


@dataclass(frozen=True)
class PretrainConfig:
    """Teacher training from nothing on an embedded world."""

    world: Literal["shapes", "textured"] = setting("shapes", "The embedded world that clips come from.")
    clips: int = setting(4096, "Clips of the training set.", POSITIVE, "clips")
    updates: int = setting(5500, "Optimizer updates of the teacher.", POSITIVE)
    batch_size: int = setting(24, "Clips of an update.", POSITIVE)
    lr: float = setting(2.5e-3, "Learning rate of the teacher.", POSITIVE)
    level_shift: float = setting(3.0, "Warp of the noise levels trained at.", "a number of at least 1")
    caption_drop: float = setting(0.1, "Share of captions replaced by the empty one, for guidance.", SHARE)
    ema_decay: float = setting(0.995, "Decay of the averaged weights.", SHARE)
    codec_clips: int = setting(384, "Clips that the codec learns from.", POSITIVE, "clips")
    codec_width: int = setting(12, "Channels of the codec's network.")
    codec_updates: int = setting(1000, "Updates of the codec; 0 keeps the linear one.", NOT_NEGATIVE)
    codec_lr: float = setting(2e-3, "Learning rate of the codec.")
    motion_channels: int = setting(6, "Latent channels for what changes within a latent frame.", POSITIVE)
    text_updates: int = setting(0, "Updates of the text encoder; 0 leaves it random.", NOT_NEGATIVE)
    checkpoint_every: int = setting(500, "Updates between two checkpoints.", POSITIVE, "updates")
    score_every: int = setting(
        0, "Updates between two scores of the oracle; 0: one, at the end.", NOT_NEGATIVE, "updates"
    )

    def __post_init__(self) -> None:
        check(self, "pretrain")


@dataclass(frozen=True)
class OdeInitConfig:
    """Stage 0 training: regression of the trajectory's end under the block-causal mask."""

    updates: int = setting(3000, "Optimizer updates.", POSITIVE)
    batch_size: int = setting(64, "Trajectories of an update.", POSITIVE)
    micro_batch_size: int = setting(1, "Trajectories of one forward and backward pass.", POSITIVE)
    lr: float = setting(2e-6, "Learning rate.", POSITIVE)
    lr_fall: float = setting(0.5, "Share of the updates, the last, over which the rate falls to 0.", FULL_SHARE)
    states: Literal["schedule", "even"] = setting(
        "schedule",
        "Which states of a trajectory a chunk learns at: those that the schedules of stages 1 and 2 visit, as often as "
        "they do (schedule), or all alike (even).",
    )
    ema_decay: float = setting(0.99, "Decay of the averaged weights.", SHARE)
    checkpoint_every: int = setting(250, "Updates between two checkpoints.", POSITIVE, "updates")
    sink_positions: Literal["absolute", "window"] = setting(
        "absolute",
        "Where the sink lies for a chunk that the window parted from it: right before the newest frames, as in every "
        "rollout and stream (window), or at its place in the clip, as in a one-pass mask (absolute).",
    )

    def __post_init__(self) -> None:
        check(self, "ode_init")


@dataclass(frozen=True)
class LossConfig:
    """Weights, as in docs/method.md, distribution matching:
    spatial*dmd + regression*reg + gamma*(motion*motion_dmd + flow_regression)."""

    spatial: float = setting(1.0, "Weight of distribution matching.", NOT_NEGATIVE)
    regression: float = setting(0.0, "Weight of the regression to trajectories.", NOT_NEGATIVE)
    gamma: float = setting(1.0, "Weight of both motion terms.", NOT_NEGATIVE)
    motion: float = setting(1.0, "Weight of distribution matching of frame differences.", NOT_NEGATIVE)
    flow_regression: float = setting(
        0.0, "Weight of the regression of frame differences to stage 1's; the published code's is 1.", NOT_NEGATIVE
    )
    motion_weights: bool = setting(
        False, "More weight for later frame differences in the motion term, as in the published code."
    )

    def __post_init__(self) -> None:
        check(self, "distill.loss")

    @property
    def follows_reference(self) -> bool:
        """Whether a term regresses to the reference's rollouts, which cost forwards of their own."""
        return self.gamma * self.flow_regression > 0 or self.regression > 0


@dataclass(frozen=True)
class DistillConfig:
    """Stages 1 and 2: distribution matching, first with uniform steps, then with the diagonal schedule."""

    stage1_steps: str = setting("4", "Step schedule of stage 1.", "as schedule.steps")
    stage1_updates: int = setting(1000, "Updates of stage 1.", NOT_NEGATIVE)
    stage2_updates: int = setting(1000, "Updates of stage 2.", NOT_NEGATIVE)
    batch_size: int = setting(64, "Rollouts of an update.", POSITIVE)
    micro_batch_size: int = setting(1, "Rollouts of one forward and backward pass.", POSITIVE)
    generator_every: int = setting(5, "Updates between two of the generator; the critic has all.", POSITIVE, "updates")
    critic_warmup_updates: int = setting(
        0, "First updates, in which the critic learns alone: for a critic that never saw the student.", NOT_NEGATIVE
    )
    lr: float = setting(2e-6, "Learning rate of the generator.", POSITIVE)
    critic_lr: float = setting(4e-7, "Learning rate of the critic.", POSITIVE)
    lr_fall: float = setting(
        0.5, "Share of each stage's updates, the last, over which both rates fall to 0; 0 keeps them.", FULL_SHARE
    )
    beta1: float = setting(0.0, "AdamW's decay of the first moment.", SHARE)
    beta2: float = setting(0.999, "AdamW's decay of the second moment.", SHARE)
    weight_decay: float = setting(0.01, "AdamW's weight decay.", NOT_NEGATIVE)
    clip_norm: float = setting(10.0, "Gradient norm that gradients are clipped to.", POSITIVE)
    guidance: float = setting(4.0, "Guidance scale of the teacher's score.")
    score_shift: float = setting(
        0.0,
        "Warp of the scores' noise levels; 0 is schedule.shift.",
        Allowed("0, or a number of at least 1", lambda shift: shift == 0 or shift >= 1.0),
    )
    rollout_chunks: int = setting(
        0,
        "Most chunks of a rollout; how many is drawn for each update, and a clip of the last is scored. 0: a clip's.",
        NOT_NEGATIVE,
        "chunks",
    )
    level_low: float = setting(0.02, "Lowest noise level of the scores.", "in (0, 1), below distill.level_high")
    level_high: float = setting(0.98, "Highest noise level of the scores.", "in (0, 1)")
    ema_decay: float = setting(0.99, "Decay of the averaged weights.", SHARE)
    ema_start: int = setting(200, "Update from which weights are averaged.", NOT_NEGATIVE, "updates")
    checkpoint_every: int = setting(100, "Updates between two checkpoints.", POSITIVE, "updates")
    keep_checkpoints: int = setting(5, "Newest checkpoints that are kept.", POSITIVE, "checkpoints")
    max_nonfinite: int = setting(
        10, "Updates in a row with a NaN or an infinity, at which the run stops.", POSITIVE, "updates"
    )
    prompts: str = setting("", "Prompt file; empty is the one of stage 0.")
    teacher: str = setting("", "Folder of the real score's network (1.3B or 14B); empty is the base model's own.")
    init: str = setting(
        "", "What to start from instead of stage 0: a folder that holds transformer/, or a causal student's .pt file."
    )
    init_weights: Literal["", "generator", "generator_ema"] = setting(
        "", "Weights to take from that .pt file; empty is the averaged ones where it has them."
    )
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        check(self, "distill")
        require(
            0.0 < self.level_low < self.level_high < 1.0,
            "distill.level_low",
            self.level_low,
            f"a level in (0, 1) below distill.level_high = {self.level_high}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How training runs: workers, sharding, where runs are kept, and what is done when something breaks."""

    workers: int = setting(1, "Most workers.", POSITIVE, "workers")
    min_workers: int = setting(
        0,
        "Fewest workers that a run continues with when nodes are lost; 0 is train.workers.",
        "0 to train.workers",
        "workers",
    )
    gpus_per_worker: float = setting(1.0, "GPUs of a worker.", NOT_NEGATIVE, "GPUs")
    cpus_per_worker: float = setting(1.0, "CPU cores of a worker.", POSITIVE, "cores")
    nodes_wait_s: float = setting(
        20.0, "How long a stage waits for nodes that are not there; on KubeRay without end.", NOT_NEGATIVE
    )
    pool: str = setting("", "Nodes whose Ray label `pool` is this one train and solve pairs; empty is any.")
    shard_group: int = setting(0, "Workers that share one copy of the weights; 0 is all.", NOT_NEGATIVE, "workers")
    checkpoint_activations: bool = setting(True, "Recompute activations in the backward pass: less memory, more time.")
    compile: bool = setting(False, "Compile the networks' blocks.")
    storage: str = setting("runs", "Folder of all runs, which every node sees, or s3://.")
    storage_patience_s: float = setting(300.0, "How long a failing storage is retried.", POSITIVE)
    lease: Literal["exclusive", "none"] = setting(
        "exclusive",
        "Keeps two jobs from one run: by a lock, on S3 by conditional writes; none for stores without them.",
    )
    max_failures: int = setting(
        3, "Times that lost or stalled workers are replaced before a run stops.", NOT_NEGATIVE, "failures"
    )
    stall_timeout_s: float = setting(1800.0, "Time without progress after which a worker is replaced.", POSITIVE)
    sample_every: int = setting(100, "Updates between two sets of sample videos; 0 is never.", NOT_NEGATIVE, "updates")
    sample_clips: int = setting(2, "Videos of a set.", NOT_NEGATIVE, "clips")
    trackers: tuple[str, ...] = setting(
        ("tensorboard",),
        "Where figures and pictures go beside the run's folder.",
        Allowed(f"a list of {', '.join(TRACKERS)}", lambda names: set(names) <= set(TRACKERS)),
    )

    def __post_init__(self) -> None:
        require(self.workers >= 1, "train.workers", self.workers, "a whole number of at least 1")
        most, allowed = self.workers, f"0, or a whole number up to train.workers = {self.workers}"
        require(0 <= self.min_workers <= most, "train.min_workers", self.min_workers, allowed)
        check(self, "train")

    @property
    def fewest_workers(self) -> int:
        """The number of workers that the run needs to continue."""
        return self.min_workers or self.workers
