"""A load on a running service: sessions that arrive at random, each a verifying viewer; prints and writes what came.

    python -m jobs.benchmarks.load --url http://127.0.0.1:8000 --sessions 8 --rate 2 --seconds 30
    python -m jobs.benchmarks.load --overload --seconds 5 --last 60 --out docs/results/serving-overload.json
    python -m jobs.benchmarks.load --report      # writes docs/results/serving.md from the files beside it

The API key, where the service wants one, is taken from $DIAGONAL_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from diagonal.client import AsyncRealtime, DiagonalError, ServerFullError
from diagonal.client.protocol import start_fields
from diagonal.errors import FieldError, require
from diagonal.evaluate.environment import system_description, this_command
from diagonal.evaluate.load.figures import Trace, percentiles, summarise, table
from diagonal.evaluate.load.page import PAGE, overload_text, write_page
from diagonal.jsonfile import write_json
from jobs.benchmarks.load_sessions import PROMPTS, Plan, run_session

OVERLOAD = 10  # times what the service admits
_MOST_SESSIONS = 256
_RECOVERY_LIMIT_S, _PROBE_EVERY_S = 30.0, 0.25
_SETTLE_S = 2.0  # until the places of sessions that were closed are free


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--sessions", type=int, default=8, help="how many arrive in all (default: 8)")
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals a second, at random (default: 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="media of each session (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default: 0)")
    parser.add_argument("--carrier", choices=("ws", "http", "both"), default="ws", help="default: ws")
    parser.add_argument("--credits", type=float, metavar="S", help="viewers tell their position, and want S s ahead")
    parser.add_argument("--unpaced", action="store_true", help="as fast as it can, instead of as it is watched")
    parser.add_argument("--change-every", type=int, default=4, metavar="CHUNKS", help="prompt changes; 0 none")
    parser.add_argument("--overload", action="store_true", help=f"{OVERLOAD} times as many as the service admits")
    parser.add_argument("--last", type=float, default=60.0, metavar="S", help="how long the overload lasts (60)")
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    parser.add_argument("--report", action="store_true", help=f"write {PAGE} from the JSON files beside it, no load")
    found = parser.parse_args(argv)
    for name in ("sessions", "rate", "seconds", "last"):
        require(getattr(found, name) > 0, f"--{name}", getattr(found, name), "a number above 0")
    require(found.sessions <= 100_000, "--sessions", found.sessions, "at most 100000")
    return found


def arrivals(rate: float, seed: int, count: int | None = None, last_s: float | None = None) -> list[float]:
    """Times of a Poisson process: so many, or those before `last_s`."""
    draw, at_s = random.Random(seed), 0.0
    found: list[float] = []
    while (count is None or len(found) < count) and (last_s is None or at_s < last_s):
        found.append(at_s)
        at_s += draw.expovariate(rate)
    return found


async def offer(plan: Plan, times: Sequence[float], carrier: str) -> list[Trace]:
    """A session at each of the times; each is bounded, so all are."""
    zero_s, carriers = time.monotonic(), carriers_of(carrier)

    async def session(number: int, at_s: float) -> Trace:
        await asyncio.sleep(max(0.0, zero_s + at_s - time.monotonic()))
        return await run_session(plan, number, zero_s, http, carriers[number % len(carriers)])

    async with _client(plan) as http:
        return list(await asyncio.gather(*(session(number, at_s) for number, at_s in enumerate(times))))


def carriers_of(carrier: str) -> tuple[str, ...]:
    """What sessions use in turns."""
    return ("ws", "http") if carrier == "both" else (carrier,)


async def one_by_one(plan: Plan, carrier: str) -> list[Trace]:
    """A short session by each carrier while nobody else is there, when one before it has made all ways ready."""
    traces: list[Trace] = []
    async with _client(plan) as http:
        for name in carriers_of(carrier):
            for _ in range(2):
                trace = await run_session(replace(plan, seconds=1.0), 0, time.monotonic(), http, name)
            traces.append(trace)
    return traces


async def find_capacity(plan: Plan) -> tuple[int, list[Trace]]:
    """How many watched streams the service admits at once, and how they were before it was full."""
    tasks: list[asyncio.Task[None]] = []
    traces: list[Trace] = []
    try:
        while len(tasks) < _MOST_SESSIONS:
            fields = start_fields(PROMPTS[0], endless=True)
            live, trace = AsyncRealtime(plan.url, plan.headers, fields), Trace()
            try:
                await live.open()
            except ServerFullError:
                break
            first = asyncio.Event()
            tasks.append(asyncio.create_task(_drain(live, trace, first)))
            traces.append(trace)
            async with asyncio.timeout(plan.limit_s):
                await first.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(_SETTLE_S)
    return len(tasks), traces


async def _drain(live: AsyncRealtime, trace: Trace, first: asyncio.Event) -> None:
    try:
        async for chunk in live:
            trace.asked_s = live.asked_s
            trace.arrivals.append((time.monotonic(), chunk.frames))
            first.set()
    finally:
        first.set()
        await live.close()


async def recover(plan: Plan, usual_s: float) -> float | None:
    """Seconds until a new session is admitted and its first frame comes as quickly as it used to; None: never."""
    began_s = time.monotonic()
    async with _client(plan) as http:
        while time.monotonic() - began_s < _RECOVERY_LIMIT_S:
            trace = await run_session(replace(plan, seconds=1.0), 0, began_s, http)
            if trace.outcome == "completed" and (trace.first_frame_s or 0.0) <= usual_s:
                return trace.arrivals[0][0]
            await asyncio.sleep(_PROBE_EVERY_S)
    return None


async def overload(plan: Plan, last_s: float, seed: int, carrier: str) -> dict[str, Any]:
    """Ten times as many sessions as are admitted, for so long; what it did to those that were, and how it ended."""
    capacity, calm = await find_capacity(plan)
    require(capacity > 0, "--url", plan.url, "a service that admits at least one session")
    calm += await one_by_one(plan, carrier)  # each carrier's own: a video over HTTP takes two requests
    calm_s = percentiles(trace.first_frame_s for trace in calm)
    rate = OVERLOAD * capacity / plan.seconds
    times = arrivals(rate, seed, last_s=last_s)
    offered = asyncio.create_task(offer(plan, times, carrier))
    await asyncio.sleep(times[-1])
    recovered_s = await recover(plan, 2 * float(calm_s["greatest"] or 0.0) + 0.1)
    return {
        "capacity": capacity,
        "rate": rate,
        "last_s": last_s,
        "calm_first_frame_s": calm_s,
        "recovered_s": recovered_s,
        "figures": summarise(await offered),
    }


def work(argv: Sequence[str]) -> None:
    options = arguments(argv)
    if options.report:
        print(write_page(Path(PAGE)))
        return
    plan = Plan(
        options.url,
        options.seconds,
        "none" if options.unpaced else "realtime",
        credits_s=options.credits,
        change_every=options.change_every,
    )
    kind = "overload" if options.overload else "load"
    about = system_description(this_command("jobs.benchmarks.load")) | {"kind": kind}
    if options.overload:
        found: dict[str, Any] = asyncio.run(overload(plan, options.last, options.seed, options.carrier))
        print(overload_text(found))
    else:
        times = arrivals(options.rate, options.seed, count=options.sessions)
        found = {"figures": summarise(asyncio.run(offer(plan, times, options.carrier)))}
    print(table(found["figures"]))
    if options.out:
        write_json(options.out, about | {"plan": dataclasses.asdict(plan)} | found)


@asynccontextmanager
async def _client(plan: Plan) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=plan.url, headers=plan.headers, timeout=plan.limit_s, limits=limits) as http:
        yield http


def main() -> int:
    """0 when the load ran, whatever came of its sessions; 2 when it could not."""
    try:
        work(sys.argv[1:])
    except (FieldError, DiagonalError, OSError) as error:
        print(f"jobs.benchmarks.load: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
