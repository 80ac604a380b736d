"""The table of experiments: what is trained and what is sampled, rows that tables share, and the page of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.experiments import page as pages
from diagonal.evaluate.experiments import runs
from diagonal.evaluate.experiments.page import collect, judged, page
from diagonal.evaluate.experiments.runs import ROWS, Plan, read_row, read_speed, row_name, run_row, run_speed
from diagonal.evaluate.experiments.table import (
    FULL,
    OURS,
    Variant,
    experiment,
    experiments,
    training_config,
    variant_config,
)
from diagonal.evaluate.quality.sources import draw_captions
from diagonal.model.base_model import embedded
from diagonal.storage import Folder

SMALL = ("distill.batch_size=2", "distill.micro_batch_size=2", "distill.generator_every=1", "distill.ema_start=1")
CONFIG = Config.from_preset("tiny", [*SMALL, *OURS.settings])
SHIFT = CONFIG.schedule.shift


def plan_in(folder: Path) -> Plan:
    return Plan(CONFIG, embedded("base"), embedded("ode_init"), folder, updates=2, clips=2, streams=2, seconds=6.0)


def silent(line: str) -> None:
    """Say nothing."""


@pytest.mark.slow
def test_every_variant_is_a_configuration_and_every_table_of_the_issue_is_there() -> None:
    keys = [one.key for one in experiments(SHIFT)]
    assert keys == [
        "table1",
        "causvid",
        "last",
        "table2",
        "table3",
        "fig2",
        "fig5a",
        "fig5b",
        "fig6",
        "pieces",
        "fig7",
        "fig9",
    ]
    for one in experiments(SHIFT):
        for variant in one.variants:
            sampled, trained = (make(CONFIG, variant, 3, (4, 5)) for make in (variant_config, training_config))
            assert (sampled.distill.stage1_updates, sampled.distill.stage2_updates) == (4, 5)
            assert sampled.seed == trained.seed == 3
            alike = sampled.schedule == trained.schedule
            assert alike if variant.kind != "sampled" else alike == (sampled.schedule == CONFIG.schedule)
    with pytest.raises(FieldError, match="experiment = 'table9'"):
        experiment("table9", SHIFT)


def test_the_baselines_are_what_they_are_called() -> None:
    forcing, causvid, ours = (variant_config(CONFIG, v, 0, (1, 1)) for v in experiment("causvid", SHIFT).variants[1:])
    assert (forcing.schedule.resolved_context, forcing.schedule.total_forwards(7)) == (0.0, 35)
    assert (causvid.schedule.resolved_context, len(causvid.schedule.levels(5))) == (0.0, 3)
    assert (ours.schedule.resolved_context, ours.schedule.total_forwards(7)) == ("reuse", 17)
    assert forcing.distill.loss.gamma == causvid.distill.loss.gamma == ours.distill.loss.gamma == 0.0


def test_equal_variants_of_several_tables_share_a_row_and_others_do_not(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    names = {
        (key, variant.name): row_name(plan, one, variant, 0)
        for key in ("table1", "table2", "fig5b", "fig6", "fig7")
        for one in [experiment(key, SHIFT)]
        for variant in one.variants
    }
    full = names["table2", FULL.name]
    assert full == names["fig6", FULL.name] == names["fig5b", "gamma 1"]
    ours = names["table1", OURS.name]
    assert ours == names["table2", "without the motion loss"] == names["fig5b", "gamma 0"] != full
    assert names["fig7", OURS.name] != ours
    one, variant = experiment("table2", SHIFT), experiment("table2", SHIFT).variants[3]
    assert row_name(plan, one, variant, 1) != full
    table1 = experiment("table1", SHIFT)
    assert all((row_name(plan, table1, v, 0) == row_name(plan, table1, v, 1)) == v.is_fixed for v in table1.variants)
    assert row_name(Plan(CONFIG, plan.base, plan.init, tmp_path, updates=3, clips=2), one, variant, 0) != full
    assert row_name(replace(plan, stage1_updates=0), one, variant, 0) != full
    assert row_name(replace(plan, stage1_updates=1), one, variant, 0) == full  # half of two, as without it


def test_a_training_may_begin_from_what_stage_1_came_to(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    assert (replace(plan, updates=9).stages, replace(plan, stage1_updates=0).stages) == ((4, 5), (0, 2))
    for given in (-1, 3):
        with pytest.raises(FieldError, match=f"stage1_updates = {given}: allowed is a whole number from 0 to 2"):
            replace(plan, stage1_updates=given)


def test_a_table_that_needs_fewer_clips_has_the_first_ones_of_those_that_table_1_has(tmp_path: Path) -> None:
    plan = replace(plan_in(tmp_path), clips=9, fewer_clips=4)
    table1, table2 = (experiment(key, SHIFT) for key in ("table1", "table2"))
    assert (plan.clips_of(table1), plan.clips_of(table2)) == (9, 4)
    assert row_name(plan, table1, table1.variants[-1], 0) != row_name(plan, table2, table2.variants[-1], 0)
    assert draw_captions(4, 0, plan.captions) == draw_captions(9, 0, plan.captions)[:4]


@pytest.mark.slow
def test_a_page_without_rows_says_so_in_each_table(tmp_path: Path) -> None:
    found = collect(plan_in(tmp_path), [0], "python jobs/benchmarks/experiments.py")
    text = page(found, SHIFT)
    rows = sum(len(one.variants) for one in experiments(SHIFT))
    assert text.count("not yet run") == rows and text.count("`python jobs/benchmarks/experiments.py run ") == len(
        experiments(SHIFT)
    )


@pytest.mark.slow
def test_differences_are_paired_by_clip_and_the_teacher_counts_for_every_seed(tmp_path: Path) -> None:
    plan, one = plan_in(tmp_path), experiment("table1", SHIFT)
    names = (*plan.world.scores, "picture_motion")
    for seed in (0, 1, 2):
        for variant, more in ((one.variants[1], 0.0), (one.variants[3], 0.01 * (1 + seed))):
            values = {name: [0.5 + more, 0.5 + more] for name in names}
            row = {"seed": seed, "values": values, "fps": 1.0, "forwards": 1, "date": "d", "machine": "m", "torch": "t"}
            Folder(str(tmp_path / ROWS)).write_json(row_name(plan, one, variant, seed), row)
    entry = collect(plan, [0, 1, 2], "c")["experiments"][0]
    found = entry["differences"][f"{OURS.name} - teacher, 50 steps"]["smoothness"]
    assert found["mean"] == pytest.approx(0.02) and found["count"] == 2
    assert found["half_width"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    whole = collect(plan, [0, 1, 2], "c")
    text = page(whole, SHIFT)
    assert "+2.00 [" in text and "- motion = 1.040 of the teacher's" not in text
    reasons = judged(whole).reasons
    against_teacher = {reason.split(" against")[0] for reason in reasons if "against teacher" in reason}
    # of two clips that agree a rate is not known to two points; measures, which agree in all three seeds, are
    assert "not compared with self-forcing" in reasons and against_teacher == set(plan.world.rates)
    ours = next(one for one in whole["experiments"][0]["variants"] if one["name"] == OURS.name)
    ours["figures"]["picture_motion"]["mean"] = 0.6
    assert any(reason.startswith("motion = 1.200 of the teacher's") for reason in judged(whole).reasons)


@pytest.mark.slow
def test_a_row_is_trained_sampled_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, one = plan_in(tmp_path), experiment("table3", SHIFT)
    first, second = one.variants[4], one.variants[5]
    about = {"date": "d", "machine": "m", "torch": "t"}
    row = run_row(plan, one, first, 0, about, silent)
    assert row["forwards"] == 17 and len(row["values"]["colour"]) == 2 and row["training_cpu_s"] > 0
    assert (tmp_path / "sheets" / row["sheet"]).is_file()
    monkeypatch.setattr(runs, "trained_student", _unasked)
    assert run_row(plan, one, first, 0, {**about, "date": "later"}, silent) == row == read_row(plan, one, first, 0)
    monkeypatch.undo()
    other = run_row(plan, one, second, 0, about, silent)
    assert (other["student"], other["forwards"]) == (row["student"], 16)  # sampled from the same one
    turned = run_row(
        plan,
        experiment("fig2", SHIFT),
        Variant("one", "sampled", ("schedule.steps=1", "schedule.context=0.5")),
        0,
        about,
        silent,
    )
    assert len(turned["drift"]["times_s"]) == 7 and turned["student"] == row["student"]
    pieces = experiment("pieces", SHIFT)
    codec = run_row(plan, pieces, pieces.variants[0], 0, about, silent)
    assert codec["drift"]["curves"]["direction"]["mean"] == [1.0] * 3
    text = page(collect(plan, [0], "c"), SHIFT)
    assert "| in pieces of a clip | seed | colour |" in text and "| codec alone (ceiling) |  | 1.00 1.00 1.00 |" in text


@pytest.mark.slow
def test_speeds_are_measured_side_by_side_and_stand_in_the_table(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    one = replace(experiment("table3", SHIFT), variants=experiment("table3", SHIFT).variants[4:6])
    assert read_speed(plan, one, 0) is None
    found = run_speed(plan, one, 0, {"date": "d", "load": "1", "command": "c", "machine": "m", "torch": "t"}, silent)
    assert found == read_speed(plan, one, 0) and set(found["fps"]) == {"4322222", "4222222"}
    assert 0 < found["fps"]["4322222"] < 1e5
    entry = {
        "name": "4322222",
        "kind": "sampled",
        "seeds": [0],
        "rows": [{"forwards": 17, "fps": 1.0}],
        "figures": {"colour": {"mean": 0.5, "low": 0.4, "high": 0.6}},
    }
    text = "\n".join(pages._clip_table([entry], {**found, "fps": {"4322222": 4321.0}}))
    assert "| 4322222 | 0 | 17 | 4321 | 0.500 [0.400, 0.600] |" in text and "in turns in one process: d, load 1" in text
    assert "| 17 | 1 |" in "\n".join(pages._clip_table([entry], None))


def _unasked(*arguments: object) -> None:
    raise AssertionError("a student was trained again")


@pytest.mark.parametrize(("name", "value"), [("updates", 1), ("clips", 0), ("streams", 1), ("seconds", 1.0)])
def test_a_budget_out_of_range_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(FieldError, match=f"{name} = {value}"):
        replace(plan_in(tmp_path), **{name: value})  # type: ignore[arg-type]
