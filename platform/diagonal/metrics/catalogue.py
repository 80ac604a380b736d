"""The catalogue of metrics: names, units, labels and buckets.

Inside Ray each name is exposed with `ray_` in front. What a dashboard divides is counted, not divided here: frames a
second are the rate of frames, and the real-time factor is generated media over busy time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from diagonal.errors import FieldError, require

Kind = Literal["counter", "gauge", "histogram"]

FIRST_FRAME_BUCKETS_S = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
CHUNK_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 3.0, 10.0)
ENCODE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)
PROMPT_BUCKETS_S = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
WINDOW_BUCKETS_S = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 30.0)
DRIFT_BUCKETS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
SLACK_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
STORE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
UPDATE_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CHECKPOINT_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0)
SHARD_BUCKETS_S = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 7200.0)
_UNIT_ENDINGS = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio"}


@dataclass(frozen=True)
class MetricSpec:
    """One metric. `unit` is that of its value; a name carries its unit, and a counter ends in `_total`.

    A label never holds a prompt, a session or anything else that a caller chooses: the number of series stays bounded.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(self.name.startswith("diagonal_"), "metric.name", self.name, "a name that starts with diagonal_")
        counts = self.name.endswith("_total")
        require((self.kind == "counter") == counts, "metric.name", self.name, "_total on counters, and on them alone")
        unit = _UNIT_ENDINGS.get(self.unit, "")
        ends = self.name.removesuffix("_total").endswith(unit)
        require(ends, "metric.name", self.name, f"a name that ends in {unit}")
        bounded = (self.kind == "histogram") == bool(self.buckets)
        require(bounded, "metric.buckets", self.buckets, "bounds on histograms, and on them alone")
        rising = all(low < high for low, high in zip((0.0, *self.buckets), self.buckets, strict=False))
        require(rising, "metric.buckets", self.buckets, "strictly rising numbers above 0")


def _counter(name: str, unit: str, description: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "counter", unit, description, labels)


def _gauge(name: str, unit: str, description: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "gauge", unit, description, labels)


def _histogram(
    name: str, description: str, buckets: tuple[float, ...], *labels: str, unit: str = "seconds"
) -> MetricSpec:
    return MetricSpec(name, "histogram", unit, description, labels, buckets)


# Frames are pixel frames, as everywhere in the API and in metrics.
SERVING = (
    _histogram("diagonal_time_to_first_frame_seconds", "Request to first media byte sent", FIRST_FRAME_BUCKETS_S),
    _histogram("diagonal_chunk_interval_seconds", "Between two chunks sent to one reader", CHUNK_BUCKETS_S),
    _histogram("diagonal_chunk_generation_seconds", "Denoising and decoding one chunk", CHUNK_BUCKETS_S),
    _histogram("diagonal_chunk_encode_seconds", "Encoding one chunk", ENCODE_BUCKETS_S),
    _counter("diagonal_generated_media_seconds_total", "seconds", "Media generated"),
    _counter("diagonal_generation_busy_seconds_total", "seconds", "Time spent generating"),
    _counter("diagonal_frames_generated_total", "frames", "Pixel frames generated"),
    _counter("diagonal_frames_sent_total", "frames", "Pixel frames sent to readers"),
    _gauge("diagonal_generation_frames_per_second", "frames/s", "Newest chunk: pixel frames over time"),
    _counter("diagonal_model_forward_calls_total", "calls", "Forwards of the transformer"),
    _gauge("diagonal_sessions_active", "sessions", "Sessions that hold a cache"),
    _gauge("diagonal_sessions_waiting", "sessions", "Sessions that asked for a chunk and wait for it"),
    _gauge("diagonal_sessions_free", "sessions", "Sessions that could still be admitted"),
    _histogram("diagonal_session_queue_seconds", "Chunk asked for to generation started", CHUNK_BUCKETS_S),
    _counter("diagonal_sessions_total", "sessions", "Sessions ended, by how", "outcome"),
    _counter("diagonal_errors_total", "errors", "Error answers, by code", "code"),
    _counter("diagonal_prompts_refused_total", "prompts", "Prompts refused by the policy or its failure", "reason"),
    _counter("diagonal_rejected_total", "requests", "Requests refused for lack of room", "reason"),
    _histogram("diagonal_prompt_update_latency_seconds", "Prompt change to first chunk with it", PROMPT_BUCKETS_S),
    _gauge("diagonal_kv_cache_bytes", "bytes", "Key and value cache held by sessions"),
    _gauge("diagonal_kv_cache_capacity_bytes", "bytes", "Key and value cache that the pool can hold"),
    _counter("diagonal_stream_media_seconds_total", "seconds", "Media sent to readers"),
    _counter("diagonal_stream_stalls_total", "stalls", "Times that playback caught up with generation"),
    _counter("diagonal_stream_stall_seconds_total", "seconds", "Time that playback waited for generation"),
    _histogram("diagonal_send_window_media_seconds", "Media ahead of playback at a request", WINDOW_BUCKETS_S),
    _gauge("diagonal_sessions_paused", "sessions", "Sessions that wait without a cache"),
    _gauge("diagonal_session_state_bytes", "bytes", "Decoder states and kept latents of sessions with a cache"),
    _gauge("diagonal_snapshot_bytes", "bytes", "What paused sessions left to go on from"),
    _gauge("diagonal_budget_used_ratio", "ratio", "Predicted busy time per second of media of playing sessions"),
    _counter("diagonal_recaches_total", "recaches", "Times that a session's cache was written anew", "reason"),
    _counter("diagonal_session_failures_total", "sessions", "Sessions that failed, by where", "code"),
    _counter("diagonal_schedules_shortened_total", "sessions", "Sessions admitted under the overload schedule"),
    _histogram(
        "diagonal_stream_drift_ratio",
        "A chunk's measure over that of the stream's first chunks",
        DRIFT_BUCKETS,
        "measure",
        unit="ratio",
    ),
    _histogram(
        "diagonal_playout_slack_seconds",
        "Media that a viewer has left when his next chunk is made; 0: it is late",
        SLACK_BUCKETS_S,
    ),
    _gauge("diagonal_budget_limit_ratio", "ratio", "What diagonal_budget_used_ratio may be for one more session"),
    _counter(
        "diagonal_session_migrations_total",
        "sessions",
        "Sessions taken from a replica, by why and what came of it",
        "cause",
        "outcome",
    ),
    _counter("diagonal_engine_late_seconds_total", "seconds", "Time that an engine's steps took beyond their bound"),
    _histogram("diagonal_store_write_seconds", "A chunk handed to the store until it is kept", STORE_BUCKETS_S),
)

TRAINING = (
    _counter("diagonal_updates_total", "updates", "Optimizer updates", "stage", "network"),
    _histogram("diagonal_update_seconds", "One update", UPDATE_BUCKETS_S, "stage"),
    _gauge("diagonal_updates_per_second", "updates/s", "Updates a second, since the workers started", "stage"),
    _gauge("diagonal_training_update", "updates", "Number of the newest update of the stage", "stage"),
    _gauge("diagonal_training_updates_planned", "updates", "Number of the stage's last update", "stage"),
    _gauge("diagonal_training_stage", "stage", "What is trained: 0 pairs, 1 uniform steps, 2 the diagonal", "stage"),
    _gauge("diagonal_training_workers", "workers", "Workers that train the stage now", "stage"),
    _gauge("diagonal_loss", "loss", "Newest value of a loss term", "stage", "loss"),
    _gauge("diagonal_gradient_norm", "norm", "Gradient norm before clipping", "stage", "network"),
    _counter("diagonal_nonfinite_updates_total", "updates", "Updates skipped for a NaN or an infinity", "stage"),
    _counter("diagonal_samples_total", "samples", "Samples trained on", "stage"),
    _counter("diagonal_tokens_total", "tokens", "Latent tokens of the clips trained on", "stage"),
    _counter("diagonal_model_flops_total", "operations", "Floating-point operations that updates need", "stage"),
    _gauge(
        "diagonal_model_flops_utilisation_ratio", "ratio", "Operations of an update over what its time allows", "stage"
    ),
    _gauge("diagonal_checkpoint_age_seconds", "seconds", "Age of the newest whole checkpoint", "stage"),
    _gauge("diagonal_checkpoint_interval_seconds", "seconds", "Between two checkpoints, at the present rate", "stage"),
    _histogram(
        "diagonal_checkpoint_save_seconds", "Writing one checkpoint, beside training", CHECKPOINT_BUCKETS_S, "stage"
    ),
    _histogram("diagonal_checkpoint_wait_seconds", "Training waited for one checkpoint", CHECKPOINT_BUCKETS_S, "stage"),
    _counter("diagonal_checkpoints_skipped_total", "checkpoints", "Left out: one was still being written", "stage"),
    _counter("diagonal_checkpoints_refused_total", "checkpoints", "Incomplete or altered ones, passed over", "stage"),
    _counter("diagonal_restarts_total", "restarts", "Times that workers were started again", "stage"),
    _counter("diagonal_data_wait_seconds_total", "seconds", "Time that training waited for data", "stage"),
    _counter("diagonal_pairs_total", "pairs", "Trajectories written"),
    _gauge("diagonal_pairs_per_second", "pairs/s", "Trajectories written a second, of this job"),
    _gauge("diagonal_pairs_missing", "pairs", "Trajectories of this job still to be written"),
    _histogram("diagonal_pairs_shard_seconds", "One shard in a step of the job", SHARD_BUCKETS_S, "step"),
    _counter("diagonal_data_quarantined_total", "samples", "Samples set aside, by reason", "stage", "reason"),
)

ALL: tuple[MetricSpec, ...] = SERVING + TRAINING
BY_NAME: Mapping[str, MetricSpec] = {spec.name: spec for spec in ALL}


def checked(name: str, kind: Kind, labels: Mapping[str, str]) -> MetricSpec:
    """The metric `name`; `FieldError` unless it is of that kind and `labels` are exactly its own."""
    spec = BY_NAME.get(name)
    if spec is None:
        raise FieldError("metric", name, f"one of {sorted(BY_NAME)}")
    require(spec.kind == kind, f"kind of {name}", kind, spec.kind)
    require(set(labels) == set(spec.labels), f"labels of {name}", sorted(labels), f"exactly {sorted(spec.labels)}")
    return spec
