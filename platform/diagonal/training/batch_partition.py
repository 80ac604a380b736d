"""Which samples of a global batch are whose, and how gradients add up to those of the whole, for any world size."""

from __future__ import annotations

from collections.abc import Sequence

from diagonal.errors import require


def own_samples(update: int, batch_size: int, rank: int, ranks: int) -> range:
    """Global numbers of the samples that `rank` of `ranks` learns from in `update` (1 is the first).

    An update takes `batch_size` consecutive samples, a rank every `ranks`-th of them: slices differ by one where the
    batch does not divide. A resume with another number of ranks sees no sample twice and misses none.
    """
    require(batch_size >= ranks, "batch_size", batch_size, f"at least the number of ranks = {ranks}")
    return range((update - 1) * batch_size + rank, update * batch_size, ranks)


def require_own(samples: Sequence[int], update: int, batch_size: int, rank: int, ranks: int) -> None:
    """Raise `FieldError` unless `samples` are those of `own_samples`, in that order."""
    own = own_samples(update, batch_size, rank, ranks)
    require(list(samples) == list(own), f"samples of update {update} on rank {rank}", list(samples), str(list(own)))


def micro_batches(count: int, size: int, batch_size: int, ranks: int) -> list[tuple[slice, float]]:
    """Slices of at most `size` of a rank's `count` samples, and the weight of each slice's mean loss.

    `weight = samples in the slice * ranks / batch_size`: FSDP averages gradients over ranks, so their sum is the
    gradient of the global batch's mean. Every rank has as many slices as the longest rank needs, because a sharded
    network's forward is collective; a short rank repeats its first sample with weight 0.
    """
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    weighted = [(part, (part.stop - part.start) * ranks / batch_size) for part in slices]
    longest = -(-batch_size // ranks)
    return weighted + [(slice(0, 1), 0.0)] * (-(-longest // size) - len(weighted))
