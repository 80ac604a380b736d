"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes in one process group, started when first used."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    """Three processes in one process group, started when first used."""
    ranks = Ranks(3)
    yield ranks
    ranks.stop()
