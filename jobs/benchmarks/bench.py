"""Speed on a device of the cluster: `diagonal.evaluate.bench` as one Ray task, its files brought back.

    python -m jobs.benchmarks.bench --gpus 1 --folder docs/results -- --preset wan-1.3b --decoder fast

What stands behind `--` goes to the bench, but for `--out`. Without Ray, run `python -m diagonal.evaluate.bench`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray

from diagonal.errors import require
from diagonal.evaluate.bench import bench
from diagonal.evaluate.bench.page import write_page
from jobs.ray_cluster import connect
from jobs.runs.run import main, say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the JSON, its plot and speed.md are written")
    parser.add_argument("--name", default="speed-cluster", help="of the files (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--cpus", type=float, default=1.0)
    parser.add_argument("bench", nargs="*", help="options of diagonal.evaluate.bench, behind --")
    found = parser.parse_args(argv)
    require(found.name.startswith("speed-"), "--name", found.name, "a name that begins with speed-")
    require(found.gpus >= 0 and found.cpus >= 0, "--gpus", (found.gpus, found.cpus), "numbers of at least 0")
    return found


def measured(name: str, options: Sequence[str]) -> tuple[int, dict[str, bytes]]:
    """Run the bench in this process; its status, and the files that it wrote but for the page."""
    with tempfile.TemporaryDirectory() as folder:
        status = bench.main([*options, "--out", str(Path(folder) / f"{name}.json")])
        return status, {path.name: path.read_bytes() for path in Path(folder).glob(f"{name}.*")}


def work(argv: Sequence[str]) -> None:
    given = arguments(argv)
    connect()
    task = ray.remote(measured).options(num_gpus=given.gpus, num_cpus=given.cpus, max_retries=0)
    status, files = ray.get(task.remote(given.name, given.bench))
    require(status == 0, "bench", given.bench, "options that the bench takes on that device")
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        part = given.folder / f"{name}.part"
        part.write_bytes(data)
        part.replace(given.folder / name)
    write_page(given.folder)
    say(f"wrote {', '.join(sorted(files))} and speed.md in {given.folder}")


if __name__ == "__main__":
    main("jobs.benchmarks.bench")
