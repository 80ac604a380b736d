"""Noise is a function of (seed, chunk, step) and of nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from diagonal.diffusion.noise import batch_noise, chunk_noise, clip_noise, generator, mixed_seed

SHAPE = (4, 3, 2, 3)


def test_the_same_triple_gives_the_same_noise_whatever_was_drawn_between() -> None:
    first = chunk_noise(7, 3, 1, SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.randn(100)
        chunk_noise(8, 3, 1, SHAPE)
        assert torch.equal(chunk_noise(7, 3, 1, SHAPE), first)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    batch_noise([1, 2], [0, 5], 2, SHAPE)
    clip_noise(1, 3, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_part_of_the_triple_matters() -> None:
    triples = list(itertools.product((0, 1, 2**62), (0, 1, 7), (0, 1)))
    drawn = {chunk_noise(*triple, SHAPE).numpy().tobytes() for triple in triples}
    assert len(drawn) == len(triples)


def test_a_samples_noise_does_not_depend_on_its_neighbours() -> None:
    together = batch_noise([5, 6, 7], [0, 4, 2], 1, SHAPE)
    for row, (seed, chunk) in enumerate([(5, 0), (6, 4), (7, 2)]):
        assert torch.equal(together[row], chunk_noise(seed, chunk, 1, SHAPE))
        assert torch.equal(batch_noise([seed], [chunk], 1, SHAPE)[0], chunk_noise(seed, chunk, 1, SHAPE))


def test_a_batch_with_a_chunk_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        batch_noise([1, 2], [0], 0, SHAPE)


def test_a_clips_noise_is_the_initial_noise_of_its_chunks() -> None:
    clip = clip_noise(9, 3, SHAPE)
    assert clip.shape == (4, 9, 2, 3)
    for chunk, part in enumerate(clip.split(3, dim=1)):
        assert torch.equal(part, chunk_noise(9, chunk, 0, SHAPE))


def test_noise_is_standard_normal_and_uncorrelated_across_steps() -> None:
    shape = (16, 3, 32, 32)
    first, second = chunk_noise(3, 1, 0, shape).flatten(), chunk_noise(3, 1, 1, shape).flatten()
    bound = 4 / first.numel() ** 0.5
    assert abs(float(first.mean())) < bound and abs(float(first.var()) - 1.0) < 2 * bound
    assert abs(float((first * second).mean())) < bound
    assert abs(float(first.pow(4).mean()) - 3.0) < 12 * bound
    assert first.dtype == torch.float32


def test_the_bits_of_a_seed_never_change() -> None:
    """They are in every recorded run; another Python or another library must draw the same."""
    assert mixed_seed(0, 0, 0) == 3150921512212191848
    assert mixed_seed(0, "exit", 1) == 93975484921516250
    assert 0 <= mixed_seed("order", 5) < 2**63


def test_numpys_numbers_seed_as_pythons_do() -> None:
    three, four = np.array([3, 4])
    assert mixed_seed(three, "a", four) == mixed_seed(3, "a", 4) and repr(three) != "3"
    assert mixed_seed(1, 23) != mixed_seed(12, 3) and mixed_seed("1") != mixed_seed(1)


def test_a_generator_is_its_own_and_on_the_cpu() -> None:
    one, two = generator(1, "x"), generator(1, "x")
    assert one is not two and one.device.type == "cpu"
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
