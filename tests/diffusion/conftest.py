"""Fixtures of the diffusion tests."""

from __future__ import annotations

import pytest

from tests.networks import exact_float64


@pytest.fixture
def float64_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic asked for in float64 is done in it (see `exact_float64`)."""
    exact_float64(monkeypatch)
