"""How many replicas for so many viewers, and what a lost node or a burst costs: simulated over measured chunk times.

    python -m jobs.benchmarks.simulate --times docs/results/speed-cpu.json --out docs/results/capacity-cpu.json
    python -m jobs.benchmarks.simulate --check http://127.0.0.1:8000 --metrics http://127.0.0.1:8080/metrics
    python -m jobs.benchmarks.simulate --report      # writes docs/results/capacity.md and its plots from the JSON files

The same seed gives the same figures. `--check` puts load on a running service and simulates the same beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from diagonal.client import DiagonalError
from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.evaluate.environment import system_description, this_command
from diagonal.evaluate.simulation.arrivals import SPREADS, ArrivalProcess, Burst, Loss
from diagonal.evaluate.simulation.chunk_times import ChunkTimes
from diagonal.evaluate.simulation.page import PAGE, check_lines, plan_lines, write_page
from diagonal.evaluate.simulation.service import Fleet
from diagonal.evaluate.simulation.sizing import Scenario, brief, cost_of, fewest_replicas
from diagonal.jsonfile import read_json, write_json
from jobs.benchmarks.service_policies import Scaling, policies
from jobs.benchmarks.simulate_check import check

HEADROOM = 1.25  # of replicas, beside as many as are just enough
LARGE = (1000, 5000)
LARGE_LAST_S, LARGE_FROM_S = 75.0, 40.0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--times",
        type=Path,
        default=Path("docs/results/speed-cpu.json"),
        help="a bench's JSON, or one of ChunkTimes' fields (default: %(default)s)",
    )
    parser.add_argument("--preset", default="", help="configuration (default: the bench's own, else tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as serve.max_sessions=16")
    parser.add_argument("--viewers", default="8,32,128,512", help="at once on average, by commas (%(default)s)")
    parser.add_argument("--stall-rate", type=float, default=0.001, help="waiting over watching, below (%(default)s)")
    parser.add_argument("--rejected-share", type=float, default=0.01, help="refusals, below (%(default)s)")
    parser.add_argument("--stay", type=float, default=120.0, metavar="S", help="mean stay of a viewer (%(default)s)")
    parser.add_argument("--spread", choices=SPREADS, default="exponential", help="of the stays (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=math.inf, metavar="S", help="mean wait after which a viewer leaves (never)"
    )
    parser.add_argument("--retries", type=int, default=0, help="of who was refused (%(default)s)")
    parser.add_argument("--change-every", type=int, default=8, metavar="CHUNKS", help="prompt changes; 0 none (8)")
    parser.add_argument("--transition", type=int, default=0, metavar="CHUNKS", help="of each prompt change (0)")
    parser.add_argument("--network", type=float, default=0.02, metavar="S", help="to a viewer, one way (%(default)s)")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--start", type=float, default=60.0, metavar="S", help="until a new replica is up (60)")
    parser.add_argument("--lose", type=int, default=0, metavar="REPLICAS", help="at once (default: an eighth)")
    parser.add_argument("--burst", type=int, default=0, metavar="VIEWERS", help="more in ten seconds (default: half)")
    parser.add_argument("--headroom", type=float, default=0.2, help="of autoscaling, as in serve (%(default)s)")
    parser.add_argument("--up-delay", type=float, default=5.0, metavar="S")
    parser.add_argument("--down-delay", type=float, default=300.0, metavar="S")
    parser.add_argument("--last", type=float, default=600.0, metavar="S", help="simulated (%(default)s)")
    parser.add_argument("--from", type=float, default=120.0, metavar="S", dest="from_s", help="counted from then on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-large", action="store_true", help=f"leave {LARGE[0]} replicas, {LARGE[1]} viewers out")
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    parser.add_argument("--report", action="store_true", help=f"write {PAGE} from the JSON files beside it")
    parser.add_argument("--check", metavar="URL", help="a running service to compare with")
    parser.add_argument("--metrics", metavar="URL", help="where its Ray exports metrics, for --check")
    parser.add_argument("--replicas", type=int, default=1, help="of the service that --check looks at (%(default)s)")
    return parser.parse_args(argv)


def viewers_of(text: str) -> list[int]:
    """The numbers of `--viewers`."""
    parts = [part.strip() for part in text.split(",")]
    right = all(part.isdecimal() and 1 <= int(part) <= 100_000 for part in parts)
    require(right, "--viewers", text, "whole numbers from 1 to 100000, by commas")
    return sorted(int(part) for part in parts)


def configuration(options: argparse.Namespace) -> Config:
    """The preset that was named, else the one that the bench ran."""
    found = read_json(options.times)
    told = isinstance(found, dict) and "config" in found and not options.preset
    config = Config.from_dict(found["config"]) if told else Config.from_preset(options.preset or "tiny")
    return config.with_settings(options.set)


def scenario_of(options: argparse.Namespace) -> Scenario:
    """What the options say, of one replica for one viewer."""
    arrivals = ArrivalProcess(
        1,
        options.stay,
        options.spread,
        min(30.0, options.from_s or 30.0),
        options.patience,
        options.change_every,
        options.transition,
        options.retries,
        network_s=options.network,
    )
    fleet = Fleet(1, options.gateways, options.start)
    config, times = configuration(options), ChunkTimes.read(options.times)
    return Scenario(config, times, fleet, arrivals, policies, options.last, options.from_s, options.seed)


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes for each number of viewers, then losses and bursts at the largest."""
    scenario, viewers = scenario_of(options), viewers_of(options.viewers)
    sizing = [
        fewest_replicas(scenario.with_viewers(count), options.stall_rate, options.rejected_share) for count in viewers
    ]
    most, enough = viewers[-1], int(sizing[-1]["replicas"])
    sized = scenario.with_viewers(most)
    found: dict[str, Any] = {"sizing": sizing, "costs": costs(sized, enough, options)}
    if not options.no_large:
        large = replace(sized.with_viewers(LARGE[1]).with_replicas(LARGE[0]), last_s=LARGE_LAST_S, from_s=LARGE_FROM_S)
        found["large"] = brief(large.run())
    arrivals = asdict(sized.arrivals) | {"patience_s": None if math.isinf(options.patience) else options.patience}
    found["asked"] = arrivals | {
        "stall_rate": options.stall_rate,
        "rejected_share": options.rejected_share,
        "slots": scenario.config.serve.max_sessions,
        "fleet": asdict(sized.fleet),
    }
    return found | {"times": asdict(scenario.times)}


def costs(sized: Scenario, enough: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A node lost and a burst, with just enough replicas, with more, and with autoscaling."""
    at_s = options.from_s + 10.0
    lost = options.lose or max(1, enough // 8)
    burst = Burst(at_s, options.burst or max(1, sized.arrivals.viewers // 2))
    more = math.ceil(HEADROOM * enough)
    scaling = partial(Scaling, enough, 4 * more, options.up_delay, options.down_delay, options.headroom)
    scaled = replace(sized, policies=partial(policies, scaling))
    rows = []
    for fleet, about in (
        (sized.with_replicas(enough), "just enough"),
        (sized.with_replicas(more), "a quarter more"),
        (scaled.with_replicas(enough), "autoscaled"),
    ):
        rows.append({"what": f"{lost} replicas lost, {about}", **cost_of(fleet, losses=[Loss(at_s, lost)])})
        rows.append({"what": f"{burst.viewers} more viewers in 10 s, {about}", **cost_of(fleet, bursts=[burst])})
    return rows


def work(argv: Sequence[str]) -> bool:
    """Whether what was checked agreed, where something was."""
    options = arguments(argv)
    if options.report:
        print(write_page(Path(PAGE)))
        return True
    about = system_description(this_command("jobs.benchmarks.simulate"))
    if options.check:
        found = check(options.check, options.metrics, configuration(options), options.replicas, options.gateways)
        print("\n".join(check_lines(found)))
    else:
        found = {"kind": "plan", **plan(options)}
        print("\n".join(plan_lines(found)))
    if options.out:
        write_json(options.out, about | found)
    return bool(found.get("within", True))


def main() -> int:
    """0 when it ran, 1 when a check differed by more than it may, 2 when it could not run."""
    try:
        return 0 if work(sys.argv[1:]) else 1
    except (FieldError, DiagonalError, OSError) as error:
        print(f"jobs.benchmarks.simulate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
