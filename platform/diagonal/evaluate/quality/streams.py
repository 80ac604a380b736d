"""Long streams and streams whose prompt changes, chunk by chunk through the serving path's functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagonal.diffusion.noise import Salt, mixed_seed
from diagonal.diffusion.rollout import roll
from diagonal.errors import require
from diagonal.evaluate.quality.comparison import EQUAL_DB, FORMAT, digest, figures
from diagonal.evaluate.quality.serving_options import psnr_db
from diagonal.evaluate.quality.sources import Make, Student
from diagonal.evaluate.quality.worlds import World
from diagonal.geometry import ChunkGeometry
from diagonal.storage import Folder

PIECES = 2  # how pieces are judged; another one makes all parts of streams anew
WINDOW_CHUNKS = 3
STREAMS_PER_BATCH = 8
CLIP_PIECES = 3
TURN_AT, TURN_CHUNKS = 10, 4  # behind the first evictions, and a decoder's whole history
SETTLED_AT = 1  # the second chunk behind a change, from which on its prompt must be obeyed
Table = dict[str, list[list[float]]]


def stream_seeds(count: int, seed: int) -> list[int]:
    """The seed of each stream."""
    return [mixed_seed(seed, Salt.STREAMS, index) for index in range(count)]


def kept_batches(
    make: Callable[[Sequence[str], Sequence[int]], dict[str, Any]],
    captions: Sequence[str],
    seeds: Sequence[int],
    parts: Folder,
    key: Sequence[object],
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """What `make` finds of each batch of streams; a batch that a former run finished is read from `parts`. `key` holds
    everything else that decides it."""
    layout, found = [FORMAT, PIECES, WINDOW_CHUNKS, TURN_AT, TURN_CHUNKS, SETTLED_AT], []
    for first in range(0, len(seeds), STREAMS_PER_BATCH):
        some, own = captions[first : first + STREAMS_PER_BATCH], seeds[first : first + STREAMS_PER_BATCH]
        name = f"{digest([layout, *key, list(some), list(own)])}.json"
        if not parts.has(name):
            parts.write_json(name, make(some, own))
        found.append(parts.read_json(name))
        say(f"{min(first + STREAMS_PER_BATCH, len(seeds))} of {len(seeds)} streams")
    return found


def chunks_for(student: Student, seconds: float) -> int:
    """Chunks of a stream of at least so many seconds."""
    geometry = student.config.geometry
    require(0 < seconds <= 3600, "seconds", seconds, "a number of seconds above 0, at most 3600")
    later = geometry.chunk_frames * geometry.temporal_stride
    first = later - geometry.temporal_stride + 1
    return 1 + max(0, -(-(int(seconds * geometry.pixel_fps) - first) // later))


def stream(
    student: Student,
    captions: Sequence[str],
    seeds: Sequence[int],
    chunks: int,
    turns: Mapping[int, Sequence[str]] | None = None,
    recovered_at: int | None = None,
) -> Iterator[Tensor]:
    """Pixels `[b, f, h, w, 3]` uint8 of chunk after chunk. `turns` gives the captions from a chunk on; the same ones
    again are a re-cache alone. Before chunk `recovered_at` the decoder's state is built anew from the newest latents,
    as after a move to another replica."""
    text = {chunk: student.text.encode(list(new)) for chunk, new in (turns or {}).items()}
    state, past = student.decoder.start(), deque[Tensor](maxlen=_history_chunks(student))
    rolled = roll(
        student.network,
        student.config,
        student.text.encode(list(captions)),
        seeds,
        schedule=student.schedule,
        chunks=chunks,
        prompt_changes=text,
    )
    for chunk, done in enumerate(rolled):
        if chunk == recovered_at:
            state = student.decoder.start()
            student.decoder.decode(torch.cat(list(past), dim=2), state)
        past.append(done.clean)
        yield student.decoder.decode(done.clean, state).cpu()


def _history_chunks(student: Student) -> int:
    return max(1, student.config.serve.decoder_history_frames // student.config.geometry.chunk_frames)


def drift_part(
    student: Student,
    world: World | None,
    captions: Sequence[str],
    seeds: Sequence[int],
    seconds: float,
    window_chunks: int = WINDOW_CHUNKS,
    seen: Callable[[int, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Figures of a batch of streams over time, in windows of `window_chunks` chunks: `times_s` of their middles, and
    `values` by figure, stream, window. In memory: one window of the batch."""
    fps = student.config.geometry.pixel_fps
    times: list[float] = []
    values: Table = {}
    window: list[Tensor] = []
    done_frames = 0
    for chunk, pixels in enumerate(stream(student, captions, seeds, chunks_for(student, seconds)), 1):
        window.append(pixels)
        if chunk % window_chunks:
            continue
        piece, window = torch.cat(window, dim=1), []
        times.append(round((done_frames + piece.shape[1] / 2) / fps, 4))
        _add_figures(values, piece, captions, world, done_frames)
        if seen is not None:
            seen(len(times) - 1, piece)
        done_frames += piece.shape[1]
    require(bool(times), "seconds", seconds, f"long enough for a window of {window_chunks} chunks")
    return {"times_s": times, "values": values}


def clip_part(
    make: Make, geometry: ChunkGeometry, world: World | None, captions: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Figures of a batch of clips over time, as `drift_part` gives them, in `CLIP_PIECES` pieces of whole chunks, the
    first ones the longer: where in a clip it goes wrong."""
    pixels = make(captions, seeds)
    values: Table = {}
    pieces = np.array_split(np.arange(geometry.clip_chunks), CLIP_PIECES)
    frames = [(geometry.pixel_start(int(some[0])), geometry.pixel_start(int(some[-1]) + 1)) for some in pieces]
    for start, end in frames:
        _add_figures(values, pixels[:, start:end], captions, world, start)
    times = [round((start + end) / 2 / geometry.pixel_fps, 4) for start, end in frames]
    return {"times_s": times, "values": values}


def _add_figures(values: Table, piece: Tensor, captions: Sequence[str], world: World | None, start: int) -> None:
    """One more piece `[b, f, h, w, 3]` of every stream, which begins at pixel frame `start`."""
    for number, (clip, caption) in enumerate(zip(piece, captions, strict=True)):
        for name, value in figures(clip.numpy(), caption, world, start).items():
            values.setdefault(name, [[] for _ in captions])[number].append(round(value, 6))


def turn_part(student: Student, world: World, captions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """A batch of streams whose prompt changes at chunk `TURN_AT` to one that differs in everything.

    `obeyed` and `forgotten` by stream and chunk from the change on: the share of the new (the old) caption's attributes
    that the chunk shows, of those that it can tell; `unturned`: what the stream without a change shows of its own.
    `settled` and `settled_unturned`: obeyed and unturned of all chunks from the second on, read as one piece.
    `step_ratio`: the change of the picture across the seam, over the usual one between frames.
    `recache_db`, `recovery_db`: PSNR of the chunks behind a re-cache alone (and a decoder built anew) to the stream
    without, from equal noise.
    """
    chunks, new = TURN_AT + TURN_CHUNKS, [world.changed(c, seed) for c, seed in zip(captions, seeds, strict=True)]
    plain = list(stream(student, captions, seeds, chunks))
    turned = list(stream(student, captions, seeds, chunks, {TURN_AT: new}))
    start = sum(part.shape[1] for part in turned[:TURN_AT])
    again = {TURN_AT: captions}
    seams = {
        "recache_db": list(stream(student, captions, seeds, chunks, again)),
        "recovery_db": list(stream(student, captions, seeds, chunks, again, TURN_AT)),
    }
    return {
        "obeyed": _shares(turned[TURN_AT:], new, world, start),
        "forgotten": _shares(turned[TURN_AT:], captions, world, start),
        "unturned": _shares(plain[TURN_AT:], captions, world, start),
        "settled": _settled(turned[TURN_AT:], new, world, start),
        "settled_unturned": _settled(plain[TURN_AT:], captions, world, start),
        "step_ratio": _step_ratios(turned[TURN_AT - 1], turned[TURN_AT]),
        **{
            name: [_psnr(plain[TURN_AT:], found[TURN_AT:], i) for i in range(len(seeds))]
            for name, found in seams.items()
        },
    }


def _shares(parts: Sequence[Tensor], captions: Sequence[str], world: World, start: int) -> list[list[float]]:
    """By stream and chunk: the share of the caption's attributes that the chunk shows, of those that it can tell."""
    found: list[list[float]] = [[] for _ in captions]
    for part in parts:
        for number, (clip, caption) in enumerate(zip(part, captions, strict=True)):
            scores = world.score(clip.numpy(), caption, start)
            told = [scores[name] for name in world.rates if name in scores]
            found[number].append(sum(told) / len(told))
        start += part.shape[1]
    return found


def _settled(parts: Sequence[Tensor], captions: Sequence[str], world: World, start: int) -> list[float]:
    """By stream: the same share of the chunks from `SETTLED_AT` on, read together."""
    first = start + sum(part.shape[1] for part in parts[:SETTLED_AT])
    return [share for [share] in _shares([torch.cat(list(parts[SETTLED_AT:]), dim=1)], captions, world, first)]


def _step_ratios(before: Tensor, after: Tensor) -> list[float]:
    frames = torch.cat((before, after[:, :1]), dim=1).float()
    steps = (frames[:, 1:] - frames[:, :-1]).abs().mean((2, 3, 4))
    return [round(float(ratio), 4) for ratio in steps[:, -1] / steps[:, :-1].mean(1).clamp_min(1e-3)]


def _psnr(plain: Sequence[Tensor], found: Sequence[Tensor], stream_index: int) -> list[float]:
    return [
        round(min(psnr_db(b[stream_index], a[stream_index]), EQUAL_DB), 4) for a, b in zip(plain, found, strict=True)
    ]
