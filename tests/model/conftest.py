"""Fixtures of the model's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from diagonal.model.weights import Release, save_base, write_release
from tests.networks import (
    exact_float64,
    small_codec,
    small_config,
    small_text_model,
    small_tokenizer,
    small_wan,
)


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
        tmp_path / "release", name="r1", student=base, base=base, lineage={"parent": "base"}, scores={"colour": 0.5}
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of an S3 service in this process, with a bucket named `models`; pyarrow finds it by its environment."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        "DIAGONAL_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    server.stop()
