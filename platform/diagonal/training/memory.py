"""Bytes that a training stage needs on each GPU, from configurations alone: the estimate that a run is planned by.

Every line is a formula of layout, geometry and number of ranks (in the docstring of its function). The whole is held
to a trace of live tensors of real updates; that of compiled blocks is lower, as their elementwise chains are fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.model.architecture import TransformerLayout

Lines = list[tuple[str, int]]
FLOAT32 = 4
CONTEXT_BYTES = 1_500_000_000  # CUDA context, cuBLAS work spaces and NCCL buffers: an allowance, not measured here
MARGIN = 0.06  # what the allocator holds in pieces that fit nothing

ADVICE = {
    "teacher": "a smaller distill.teacher, or more train.workers",
    "weights": "more train.workers or train.shard_group = 0 (each GPU then holds a smaller share)",
    "Adam": "more train.workers or train.shard_group = 0",
    "average": "more train.workers or train.shard_group = 0",
    "kept": "a smaller micro_batch_size, train.checkpoint_activations = true, or a smaller cache.window_frames",
    "K/V": "a smaller micro_batch_size",
    "block": "a smaller micro_batch_size",
    "gradients": "GPUs with more memory: gradients of a whole network are held until they are reduced",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU at the peak of a stage: `lines` of the `phase` that needs most, and all `phases`' totals."""

    stage: int
    phase: str
    lines: Lines
    phases: Lines

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.lines)

    def largest(self, count: int) -> Lines:
        return sorted(self.lines, key=lambda line: -line[1])[:count]

    def table(self) -> str:
        """Markdown, in GB of 1e9 bytes."""
        rows = [f"| {name} | {size / 1e9:.2f} |" for name, size in self.lines if size]
        head = [f"| stage {self.stage}, at its peak: {self.phase} | GB on each GPU |", "|---|---|"]
        return "\n".join([*head, *rows, f"| **total** | **{self.total_bytes / 1e9:.2f}** |"])


def estimate(
    config: Config,
    layout: Mapping[str, Any],
    teacher_layout: Mapping[str, Any],
    world_size: int,
    stage: int,
    *,
    text_layout: Mapping[str, Any] | None = None,
    codec_layout: Mapping[str, Any] | None = None,
    mesh_of_one: bool = False,
) -> MemoryEstimate:
    """The peak of stage 0, 1 or 2 on each of `world_size` GPUs.

    Layouts are the mappings of `config.json` in `transformer/` (generator and critic are of the first, the teacher of
    the second), `text_encoder/` and `vae/`; None leaves that part out. With `mesh_of_one` a single rank is
    sharded all the same, so that gathered parameters stand beside its masters (evaluate/training_speed.py).
    """
    require(stage in (0, 1, 2), "stage", stage, "0, 1 or 2")
    place = _Place.of(config, TransformerLayout.of(layout), TransformerLayout.of(teacher_layout), world_size, stage)
    place = replace(place, gathers=place.shards > 1 or mesh_of_one)
    resident = [*place.trained("generator", average=True), *(place.trained("critic") if stage else [])]
    resident += place.frozen()
    resident += [("text encoder weights", _text_parameters(text_layout) * place.narrow if text_layout else 0)]
    phases = {"optimizer step": place.optimizer_step(), **place.phases()}
    if codec_layout and config.train.sample_every and stage:
        phases["samples"] = place.samples(codec_layout)
    cuda = CONTEXT_BYTES if config.train.gpus_per_worker > 0 else 0
    whole = {name: _with_margin([*resident, *lines], cuda) for name, lines in phases.items()}
    totals = [(name, sum(size for _, size in lines)) for name, lines in whole.items()]
    peak = max(totals, key=lambda total: total[1])[0]
    return MemoryEstimate(stage, peak, whole[peak], totals)


def check(needed: MemoryEstimate, available_bytes: int) -> None:
    """Refuse a run that cannot fit: `FieldError` names the largest lines and the settings that lower them."""
    if needed.total_bytes <= available_bytes:
        return
    largest = [line for line in needed.largest(8) if _advice(line[0])][:4]
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    changes = "; ".join(dict.fromkeys(_advice(name) for name, _ in largest))
    raise FieldError(
        f"memory of stage {needed.stage} on each GPU ({needed.phase})",
        f"{needed.total_bytes / 1e9:.1f} GB, of which {named}",
        f"at most {available_bytes / 1e9:.1f} GB. Change: {changes}",
    )


def _advice(name: str) -> str:
    return next((advice for part, advice in ADVICE.items() if part in name), "")


def _with_margin(lines: Lines, cuda_bytes: int) -> Lines:
    margin = int(MARGIN * sum(size for _, size in lines))
    return [*lines, ("CUDA context, cuBLAS, NCCL", cuda_bytes), (f"allocator margin, {MARGIN:.0%}", margin)]


@dataclass(frozen=True)
class _Place:
    """One GPU's part in a stage, and the formulas. P parameters, s ranks that share them, c bytes of the compute type,
    n width, f feed-forward width, L layers, b micro-batch, T tokens of a clip, t of a chunk."""

    config: Config
    layout: TransformerLayout
    teacher: TransformerLayout
    shards: int
    stage: int
    batch: int
    several: bool
    gathers: bool = False

    @classmethod
    def of(
        cls, config: Config, layout: TransformerLayout, teacher: TransformerLayout, world_size: int, stage: int
    ) -> _Place:
        options = config.distill if stage else config.ode_init
        each = max(1, options.batch_size // world_size)
        batch = min(options.micro_batch_size, each)
        return cls(config, layout, teacher, config.train.shard_group or world_size, stage, batch, batch < each)

    @property
    def narrow(self) -> int:
        """c: 2 in bfloat16, 4 in float32."""
        return 2 if self.config.model.compute_dtype == "bfloat16" else FLOAT32

    @property
    def clip_tokens(self) -> int:
        return self.config.geometry.clip_chunks * self.config.geometry.chunk_tokens

    def trained(self, name: str, *, average: bool = False) -> Lines:
        """Masters 4P/s, Adam's two moments 8P/s, the average 4P/s; all float32."""
        share = FLOAT32 * self.layout.parameters // self.shards
        lines = [(f"{name} weights, float32", share), (f"{name} Adam moments", 2 * share)]
        return [*lines, (f"{name} average", share)] if average else lines

    def frozen(self) -> Lines:
        """cP/s of the teacher (stages 1 and 2), and of stage 2's reference generator."""
        lines = []
        if self.stage:
            lines.append(("teacher weights", self.teacher.stored_bytes(self.narrow) // self.shards))
        if self.stage == 2:
            lines.append(("reference weights", self.layout.stored_bytes(self.narrow) // self.shards))
        return lines

    def optimizer_step(self) -> Lines:
        """Reduced gradients 4P/s, and the root of the second moments 4P/s that Adam takes of all at once."""
        share = FLOAT32 * self.layout.parameters // self.shards
        return [("gradients, reduced", share), ("Adam step", share)]

    def phases(self) -> dict[str, Lines]:
        return self._regression_phases() if self.stage == 0 else self._distillation_phases()

    def _regression_phases(self) -> dict[str, Lines]:
        return {"backward": [*self._gathered("generator"), *self._clip_backward()]}

    def _distillation_phases(self) -> dict[str, Lines]:
        geometry, chunk = self.config.geometry, self.batch * self.config.geometry.chunk_tokens
        chunks = max(geometry.clip_chunks, self.config.distill.rollout_chunks)
        context = [self._context_chunks(index) for index in range(chunks - geometry.clip_chunks, chunks)]
        pool = ("K/V pages", chunks * self.page_bytes)
        accumulated = [self._gradients()] if self.several else []
        kept = [
            ("block inputs kept for backward", sum(self._kept(chunk, c * chunk) + self._head(chunk) for c in context)),
            ("context K/V kept for backward", sum(context) * self.page_bytes),
        ]
        generator, critic = self._gathered("generator"), self._gathered("critic")
        walked = ("one block", self._block_forward(chunk, max(context) * chunk))
        again = ("one block recomputed", self._block_backward(chunk, max(context) * chunk))
        return {
            "rollout": [*generator, *accumulated, *kept, pool, walked],
            "scores": [*generator, *accumulated, *kept, *self._scores(self.batch * self.clip_tokens)],
            "generator backward": [*generator, self._gradients(), *kept, again],
            "critic rollout": [*generator, *critic, *accumulated, pool, walked],
            "critic backward": [*generator, *critic, *self._clip_backward()],
        }

    def _clip_backward(self) -> Lines:
        """Forward and backward of a whole clip: stage 0's student, or the critic."""
        tokens = self.batch * self.clip_tokens
        return [
            self._gradients(),
            ("block inputs kept for backward", self._kept(tokens, 0)),
            ("one block recomputed", self._block_backward(tokens, 0)),
        ]

    @property
    def page_bytes(self) -> int:
        """K/V of one chunk: 2*c*L*n*b*t (a token of Wan 1.3B in bfloat16: 184,320 bytes)."""
        return self.token_bytes * self.batch * self.config.geometry.chunk_tokens

    @property
    def token_bytes(self) -> int:
        return 2 * self.narrow * self.layout.layers * self.layout.hidden

    def _context_chunks(self, chunk: int) -> int:
        return min(chunk, self.config.cache.window_frames // self.config.geometry.chunk_frames - 1)

    def _gathered(self, name: str) -> Lines:
        """4P while parameters stay gathered (nothing on one rank, whose masters are whole), 4 bytes of it float32."""
        return [] if not self.gathers else [(f"{name} weights, gathered", FLOAT32 * self.layout.parameters)]

    def _gradients(self) -> tuple[str, int]:
        """4P: whole and float32 on each rank until they are reduced, once an update."""
        return ("gradients, whole", FLOAT32 * self.layout.parameters)

    def _kept(self, tokens: int, context: int) -> int:
        """What one forward leaves in its blocks for its backward: with checkpointing their inputs, L*c*n a token,
        without it all that `_saved` counts; and the root's weights cast, c times its parameters."""
        root = self.layout.root_parameters * self.narrow if self.narrow < FLOAT32 else 0
        if not self.config.train.checkpoint_activations:
            return self.layout.layers * self._saved(tokens, context) + root
        return self.layout.layers * self.narrow * self.layout.hidden * tokens + root

    def _head(self, tokens: int) -> int:
        """What the output's norm and modulation keep: (3c+5)n a token."""
        return (3 * self.narrow + 5) * self.layout.hidden * tokens

    def _block_forward(self, tokens: int, context: int) -> int:
        """Largest of a block's parts without gradient: attention 5c*n a token and (2c+8)n a key, or the feed-forward
        (c+12)n + 2c*f a token; and the block's weights cast, c each."""
        n, f, c = self.layout.hidden, self.layout.ffn_dim, self.narrow
        attention = 5 * c * n * tokens + (2 * c + 8) * n * (tokens + context)
        return max(attention, ((c + 12) * n + 2 * c * f) * tokens) + self._cast(self.layout)

    def _saved(self, tokens: int, context: int) -> int:
        """What a block saves for its backward: (8c+56)n + 2c*f a token (elementwise steps run in float32), 2c*n a token
        of context, and its weights cast."""
        n, f, c = self.layout.hidden, self.layout.ffn_dim, self.narrow
        return ((8 * c + 56) * n + 2 * c * f) * tokens + 2 * c * n * context + self._cast(self.layout)

    def _block_backward(self, tokens: int, context: int) -> int:
        """The backward of a block: 14n, or 5n + c*f, a token; with checkpointing what it saves, made again, besides."""
        working = max(14 * self.layout.hidden, 5 * self.layout.hidden + self.narrow * self.layout.ffn_dim) * tokens
        again = self._saved(tokens, context) if self.config.train.checkpoint_activations else 0
        return working + again

    def _cast(self, layout: TransformerLayout) -> int:
        return layout.block_parameters * self.narrow if self.narrow < FLOAT32 else 0

    def _scores(self, tokens: int) -> Lines:
        """A block of the guided teacher, which sees both prompts at once: 20n, or 6n + 4f, a token in bfloat16; and
        gathered, two blocks (the next comes while one works) and the root."""
        n, f, c = self.teacher.hidden, self.teacher.ffn_dim, self.narrow
        both = 2 if self.config.distill.guidance != 1.0 else 1
        working = both * tokens * max((3 * c + 14) * n, 3 * c * n + 2 * c * f)
        gathered = (2 * self.teacher.block_parameters + self.teacher.root_parameters) * c if self.gathers else 0
        return [("teacher block", working), ("teacher blocks, gathered", gathered)]

    def samples(self, codec: Mapping[str, Any]) -> Lines:
        """A clip generated and decoded: gathered generator, K/V of a window, codec weights, features, pixels."""
        window = self.config.cache.window_frames // self.config.geometry.chunk_frames
        pages = ("K/V pages", window * self.page_bytes // self.batch)
        return [*self._gathered("generator"), pages, ("codec", _codec_bytes(codec, self.config, self.narrow))]


def _text_parameters(layout: Mapping[str, Any]) -> int:
    """umT5's encoder: embedding; a layer's four attention products, its own relative positions, the gated feed-forward
    of three products, two norms; a last norm."""
    width, inner, f = layout["d_model"], layout["num_heads"] * layout["d_kv"], layout["d_ff"]
    positions = layout.get("relative_attention_num_buckets", 32) * layout["num_heads"]
    layer = 4 * width * inner + positions + 3 * width * f + 2 * width
    return int(layout["vocab_size"] * width + layout["num_layers"] * layer + width)


def _codec_bytes(layout: Mapping[str, Any], config: Config, narrow: int) -> int:
    """Wan's decoder: features of two frames that each causal convolution keeps, and six tensors of the widest level
    for the `temporal_stride` frames in work. Embedded codecs are linear: nothing.

    With base width w, multipliers m (deepest last) and r blocks a level, level i (0 at 1/64 of the pixels) holds
    2(r+1) convolutions; its first reads half the deeper level's width where the model doubles.
    """
    if layout.get("_class_name") != "AutoencoderKLWan":
        return 0
    widths = [layout["base_dim"] * m for m in reversed(layout["dim_mult"])]
    depth, grow = layout["num_res_blocks"], list(reversed(layout["temperal_downsample"]))
    pixels = config.geometry.pixel_height * config.geometry.pixel_width
    elements = 0.0
    for level, width in enumerate(widths):
        first = widths[0] if level == 0 else widths[level - 1] // 2
        middle = layout["z_dim"] + 4 * width if level == 0 else 0
        time = width if level < len(grow) and grow[level] else 0
        last = width if level == len(widths) - 1 else 0
        channels = middle + first + (2 * depth + 1) * width + time + last
        elements += 2 * channels * pixels / 4 ** (len(widths) - 1 - level)
    working = 6 * widths[-1] * config.geometry.temporal_stride * pixels
    return int((elements + working) * narrow)
