"""`docs/results/capacity.md` and its plots from the JSON files beside it: what was simulated, and over what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diagonal.files import write_text
from diagonal.jsonfile import read_json

PAGE = "docs/results/capacity.md"
Found = Mapping[str, Any]
_NOTE = (
    "Chunk times of an H200 at 832x480 are not measured yet; with a bench's JSON from there the same command "
    "answers for it. Figures of the embedded model on a CPU say how the service behaves, not how many GPUs Wan "
    "needs."
)


def write_page(path: Path) -> str:
    """Write the page and a plot beside each plan's JSON, each whole or not at all; returns the page."""
    found = {file: read_json(file) for file in sorted(path.parent.glob(f"{path.stem}-*.json"))}
    for file, one in found.items():
        if one["kind"] == "plan":
            _plot(file.with_suffix(".png"), one)
    text = page(found)
    write_text(path, text)
    return text


def page(found: Mapping[Path, Found]) -> str:
    """The page of these simulations."""
    lines = [
        "# Capacity, simulated",
        "",
        "Written by `python -m jobs.benchmarks.simulate --report` from the JSON files beside this page. The scheduler, "
        "admission, the router's order, pacing and autoscaling are the service's own; time is a number, and a "
        "chunk takes as long as one was measured to take.",
        "",
        _NOTE,
    ]
    for file, one in found.items():
        lines += ["", f"## {file.name}", "", _how(one), ""]
        lines += plan_lines(one) if one["kind"] == "plan" else check_lines(one)
        if one["kind"] == "plan":
            lines += ["", f"![{file.stem}]({file.stem}.png)"]
    return "\n".join(lines) + "\n"


def _how(found: Found) -> str:
    times = found["times"]
    return (
        f"{found['date']}, {found['machine']} (load {found['load']}), commit {str(found['commit'])[:12]}; chunk "
        f"times of {times['device']} ({times['source']}):\n\n    {found['command']}"
    )


def plan_lines(found: Found) -> list[str]:
    """How many replicas, what a loss and a burst cost, and how large a service was simulated in how long."""
    asked = found["asked"]
    lines = [
        f"Fewest replicas with waiting over watching below {asked['stall_rate']:g} and refusals below "
        f"{asked['rejected_share']:g}; {asked['slots']} slots a replica, stays of {asked['stay_s']:g} s "
        f"({asked['spread']}), a prompt change every {asked['change_every']} chunks (0: none):",
        "",
        "| viewers | replicas | viewers a replica | waiting | refused | time to first frame p95, ms | busy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["sizing"]:
        figures = row["figures"]
        lines.append(
            f"| {row['viewers']} | {row['replicas']} | {row['viewers'] / row['replicas']:.1f} | "
            f"{figures['stall_rate']:.5f} | {figures['rejected_share']:.2%} | "
            f"{_ms(figures['first_frame_s']['p95'])} | {figures['busy_share']:.0%} |"
        )
    lines += [
        "",
        "What the same viewers lose by it, against the same run without it:",
        "",
        "| what | replicas | viewers | more waiting, s | sessions that wait | moved | lost | more refused | "
        "noticed for, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["costs"]:
        recovered = row["recovered_after_s"]
        lines.append(
            f"| {row['what']} | {row['replicas']} | {row['viewers']} | {row['stall_s']:.1f} | "
            f"{row['stalled_sessions']} | {row['moved']} | {row['lost']} | {row['rejected']} | "
            f"{'to the end' if recovered is None else format(recovered, '.0f')} |"
        )
    if large := found.get("large"):
        lines += [
            "",
            f"{large['replicas']} replicas, {large['peak_viewers']} viewers at once, "
            f"{large['simulated_s']:g} s of service: {large['cpu_s']:.1f} s of one core.",
        ]
    return lines


def check_lines(found: Found) -> list[str]:
    """A real run beside its simulation."""
    took = {step["batch"]: step["seconds"] for step in found["times"]["steps"]}
    steps = ", ".join(f"{_ms(seconds)} of {batch}" for batch, seconds in sorted(took.items()))
    lines = [
        f"Measured on the running service: a step takes, in ms by sessions, {steps}.",
        "",
        "| | real | simulated | difference |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        difference = "-" if row["difference"] is None else f"{row['difference']:+.1%}"
        lines.append(f"| {row['what']} | {_value(row['real'])} | {_value(row['simulated'])} | {difference} |")
    return [*lines, "", f"{'All' if found['within'] else 'Not all'} within {found['allowed']:.0%}."]


def _value(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def _plot(path: Path, found: Found) -> None:
    """Replicas by viewers, and each loss and burst second by second; where matplotlib is at hand."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    costs: Sequence[Found] = found["costs"]
    figure = Figure(figsize=(9, 3 + 2 * len(costs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(costs), 1)
    first = axes[0] if costs else axes
    first.plot([row["viewers"] for row in found["sizing"]], [row["replicas"] for row in found["sizing"]], marker="o")
    first.set_xlabel("viewers at once")
    first.set_ylabel("replicas")
    for number, row in enumerate(costs):
        _plot_cost(axes[1 + number], row)
    part = path.with_suffix(".png.part")
    figure.savefig(part, format="png", metadata={"Software": None})
    part.replace(path)


def _plot_cost(axes: Any, row: Found) -> None:
    seconds = row["seconds"]
    for name, label in (("stall_s", "waiting, s a second"), ("refused", "refused a second"), ("replicas", "replicas")):
        axes.plot([second[name] for second in seconds], label=label)
    axes.axvline(row["at_s"], linestyle=":", color="grey")
    axes.set_title(row["what"], fontsize="small")
    axes.set_xlabel("s")
    axes.legend(fontsize="small")
