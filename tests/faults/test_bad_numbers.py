"""Updates whose losses are not finite: skipped, counted and without effect; the run ends when they do not stop."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoTokenizer

from diagonal.model.base_model import embedded
from jobs.workers.data_feed import sample_order
from tests.faults.job import UPDATES_IN_ALL, Launcher

WAYS = ("left", "right", "up")
GOOD = [
    f"a {colour} {shape} moving {way} slowly"
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
    for way in WAYS
]
BAD = [f"a {colour} triangle moving {way} slowly" for colour in ("red", "blue") for way in WAYS]
BATCH = 4


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """The embedded base model, but its text encoder knows `triangle` as NaN."""
    base = tmp_path / "base"
    shutil.copytree(embedded("base"), base)
    weights = load_file(base / "text_encoder" / "model.safetensors")
    token = AutoTokenizer.from_pretrained(base / "tokenizer").get_vocab()["triangle"]
    weights["shared.weight"][token] = float("nan")
    save_file(weights, base / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return base


def settings(base: Path, prompts: list[str]) -> dict[str, Any]:
    (base.parent / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return {
        "model.path": base,
        "distill.init": embedded("ode_init"),
        "distill.prompts": base.parent / "prompts.txt",
        "prompts.held_out_share": 0.0,
        "distill.batch_size": BATCH,
        "distill.checkpoint_every": 1,
        "distill.keep_checkpoints": 99,
    }


def test_updates_with_a_nan_are_skipped_and_counted_and_change_nothing(
    nodes: list[Any], start: Launcher, poisoned: Path
) -> None:
    """T6: a quarter of the prompts brings NaN, so the updates that hold one of them are skipped."""
    prompts = [*GOOD, *BAD]
    job = start(settings={**settings(poisoned, prompts), "distill.max_nonfinite": 99})
    job.line("student in ")
    order = sample_order(len(prompts), 0, UPDATES_IN_ALL, BATCH)
    expected = [
        update
        for update in range(1, UPDATES_IN_ALL + 1)
        if max(order[(update - 1) * BATCH : update * BATCH]) >= len(GOOD)
    ]
    record = job.record()
    assert [entry["update"] for entry in record.updates if entry["skipped"]] == expected and record.skipped == 9
    saved = job.checkpoints()[::-1]
    same = [learned(before.folder.path) == learned(after.folder.path) for before, after in pairwise(saved)]
    assert same == [
        set(range(before.update + 1, after.update + 1)) <= set(expected) for before, after in pairwise(saved)
    ]
    assert True in same and False in same


def learned(folder: Path) -> dict[str, bytes]:
    """The bits of weights, moments and averages in a checkpoint."""
    reader = dcp.FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in saved.items()
        if isinstance(about, TensorStorageMetadata) and not name.startswith(("progress", "rng/"))
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def test_nans_that_do_not_stop_end_the_run_with_their_count(nodes: list[Any], start: Launcher, poisoned: Path) -> None:
    """T6: all prompts bring NaN, and two in a row are allowed."""
    job = start(settings={**settings(poisoned, BAD), "distill.max_nonfinite": 2})
    assert job.ended() == 1
    assert job.error.startswith("error: update 2: losses or gradients were not finite 2 times in a row")
    assert len(job.record().starts) == 1, "the same would come again: no restart"
