"""The SLURM script gives every node the same Ray command and the job its arguments; SLURM itself is stood in for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "infra" / "slurm" / "distill.sbatch"
ECHO = '#!/bin/sh\necho "$(basename "$0")" "$@"\n'


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A folder of programs that say what they were given; `srun` runs the rest as SLURM would."""
    (tmp_path / "ray").write_text(ECHO)
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\necho srun; exec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    return tmp_path


def output(ran: Path, **settings: str) -> list[str]:
    environment = {**os.environ, "PATH": f"{ran}:{os.environ['PATH']}", "SLURM_CPUS_ON_NODE": "16", **settings}
    command = ["bash", str(SCRIPT), "--preset", "tiny", "--set", "a=b c"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_one_node_runs_ray_by_itself_on_loopback(ran: Path) -> None:
    expected = (
        "ray symmetric-run --address 127.0.0.1:6379 --min-nodes 1 --num-cpus 16 --num-gpus 0 -- "
        "env RAY_ADDRESS=127.0.0.1:6379 python jobs/distill.py --preset tiny --set a=b c"
    )
    assert output(ran) == [expected]


def test_several_nodes_meet_at_the_first_and_wait_for_all(ran: Path) -> None:
    settings = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "RAY_PORT": "7000",
    }
    launched, told = output(ran, **settings)
    assert launched == "srun"
    assert told.startswith("ray symmetric-run --address n1:7000 --min-nodes 2 --num-cpus 16 --num-gpus 8 -- ")
    assert "env RAY_ADDRESS=n1:7000 python jobs/distill.py" in told
