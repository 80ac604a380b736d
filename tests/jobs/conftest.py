"""What the tests of jobs share: a run of the embedded model that is small enough for seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.runs.arguments import run_options
from jobs.runs.run import Run, open_run

SMALL = (
    "train.workers=1",
    "pairs.count=5",
    "pairs.rows_per_shard=2",
    "pairs.solver_steps=20",
    "pairs.batch_size=2",
    "ode_init.updates=2",
    "ode_init.batch_size=2",
    "ode_init.micro_batch_size=1",
    "distill.stage1_updates=2",
    "distill.stage2_updates=2",
    "distill.batch_size=2",
    "distill.micro_batch_size=1",
    "train.sample_every=0",
    "distill.generator_every=1",
    "distill.checkpoint_every=1",
    "distill.ema_start=1",
)
OpenRun = Callable[..., Run]


@pytest.fixture
def small_run(tmp_path: Path) -> OpenRun:
    """Opens a run by name with the small settings and any others, in this test's folder."""

    def open_small(name: str, *settings: str, resume: bool = False) -> Run:
        chosen = [f"train.storage={tmp_path / 'runs'}", *SMALL, *settings]
        arguments = ["--preset=tiny", "--name", name, *(f"--set={setting}" for setting in chosen)]
        return open_run(run_options([*arguments, *(["--resume"] if resume else [])], ""))

    return open_small
