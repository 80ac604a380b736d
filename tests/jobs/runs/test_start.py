"""The start of a job: the command line is read without what takes seconds to import, in a plain environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = "pairs ode_init distill pretrain distill_decoder export evaluate search promote replay import_student".split()
HEAVY = "{'torch', 'ray', 'diffusers', 'transformers', 'numpy'}"
HELP = f"""
import runpy, sys
job = sys.argv.pop(1)
sys.argv[:] = [job, "--help"]
sys.path[0] = "jobs"
try:
    runpy.run_path(job, run_name="__main__")
finally:
    print("loaded", sorted({HEAVY} & set(sys.modules)))
"""


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=250)


def test_every_job_is_tried(repository: Path) -> None:
    assert {path.stem for path in (repository / "jobs").glob("*.py")} - {"ray_cluster", "ray_metrics"} == set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_help_comes_without_torch_and_ray(repository: Path, job: str) -> None:
    done = run(repository, "-c", HELP, f"jobs/{job}.py")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and done.stdout.endswith("loaded []\n")


@pytest.mark.slow
def test_a_job_needs_no_pythonpath(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "jobs/distill.py", "--dry-run", "--set", f"train.storage={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    assert "dry run: everything checked" in done.stdout


def test_an_unknown_option_says_what_is_near_and_a_wrong_value_what_is_allowed(repository: Path) -> None:
    unknown = run(repository, "jobs/distill.py", "--nmae=a")
    assert unknown.returncode == 2 and "did you mean --name?" in unknown.stderr
    wrong = run(repository, "jobs/evaluate.py", "--clips=1")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --clips = 1: allowed is a whole number")
