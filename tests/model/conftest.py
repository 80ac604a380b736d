"""Fixtures of the model's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diagonal.model.base_model import save_base
from diagonal.model.release import Release, write_release
from tests.networks import exact_float64, small_codec, small_config, small_text_model, small_tokenizer, small_wan
from tests.s3 import FaultyProxy, S3Server, environment


@pytest.fixture
def float64_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic asked for in float64 is done in it (see `exact_float64`)."""
    exact_float64(monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of the small configuration, written by `save_base`."""
    config, folder = small_config(), tmp_path / "base"
    save_base(folder, config, small_wan(), small_codec(config), small_tokenizer(), small_text_model(), {"seed": 0})
    return folder


@pytest.fixture
def release(base: Path, tmp_path: Path) -> Release:
    return write_release(
        tmp_path / "release",
        name="r1",
        student=base,
        base=base,
        lineage={"stage2": {"parent": "base"}},
        scores={"colour": 0.5},
    )


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of an S3 service with a bucket named `models`; `fetch` finds it by its environment."""
    for name, value in {**environment(s3_server.url), "DIAGONAL_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    with s3_server.bucket("models"):
        yield s3_server.client()


@pytest.fixture
def faulty(s3: Any, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before `s3`, which `fetch` then goes through."""
    proxy = FaultyProxy(s3_server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()
