"""The table of experiments: what is trained and what is sampled, rows that tables share, and the page of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.evaluate.experiments import runs
from diagonal.evaluate.experiments.page import claim, collect, judged, page, save_pictures
from diagonal.evaluate.experiments.runs import ROWS, Plan, read_row, read_speed, row_name, run_row, run_speed
from diagonal.evaluate.experiments.table import (
    INITIAL,
    OURS,
    SELF_FORCING,
    STAGE1,
    TEACHER,
    Experiment,
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
RECIPE = ("schedule.steps=3222222@250", "schedule.sink_context=0.0", "schedule.clean_newest=true")
CONFIG = Config.from_preset("tiny", [*SMALL, *RECIPE])
SHIFT = CONFIG.schedule.shift


def plan_in(folder: Path) -> Plan:
    return Plan(CONFIG, embedded("base"), embedded("ode_init"), folder, updates=2, clips=2, streams=2, seconds=6.0)


def silent(line: str) -> None:
    """Say nothing."""


@pytest.mark.slow
def test_every_variant_is_a_configuration_and_every_table_is_there() -> None:
    keys = [one.key for one in experiments(SHIFT)]
    assert keys == "table1 pieces fig7 fig9 others table2 table3 fig2 fig5a fig5b fig6".split()
    for one in experiments(SHIFT):
        for variant in one.variants:
            sampled, trained = (make(CONFIG, variant, 3, (4, 5)) for make in (variant_config, training_config))
            updates = (9, 0) if variant.stage1_alone else (4, 5)
            assert (sampled.distill.stage1_updates, sampled.distill.stage2_updates) == updates
            assert sampled.seed == trained.seed == 3
            alike = sampled.schedule == trained.schedule
            assert alike if variant.kind != "sampled" else alike == (sampled.schedule == CONFIG.schedule)
    with pytest.raises(FieldError, match="experiment = 'table9'"):
        experiment("table9", SHIFT)


def test_the_baselines_are_what_they_are_called() -> None:
    variants = {variant.name: variant for variant in experiment("others", SHIFT).variants}
    configs = {name: variant_config(CONFIG, variant, 0, (1, 1)) for name, variant in variants.items()}
    forcing, causvid, ours = (
        configs[name] for name in ("self-forcing", "CausVid-like: 3 steps, clean context", "ours")
    )
    assert (forcing.schedule.resolved_context, forcing.schedule.total_cost(7, 3)) == (0.0, 35)
    assert forcing.schedule.sink_context is None and not forcing.schedule.clean_newest
    assert (causvid.schedule.resolved_context, len(causvid.schedule.levels(5))) == (0.0, 3)
    assert ours.schedule == CONFIG.schedule and ours.schedule.total_cost(7, 3) == 15 + 1 + 2
    assert forcing.distill.loss.gamma == causvid.distill.loss.gamma == 0.0
    assert configs["self-forcing, window 21"].cache.window_frames == 21


def test_equal_variants_of_several_tables_share_a_row_and_others_do_not(tmp_path: Path) -> None:
    plan = replace(plan_in(tmp_path), fewer_clips=2)
    names = {
        (key, variant.name): row_name(plan, one, variant, 0)
        for key in ("table1", "others", "table2", "fig5b", "fig7")
        for one in [experiment(key, SHIFT)]
        for variant in one.variants
    }
    ours = names["table1", OURS.name]
    assert ours == names["table2", OURS.name] == names["others", OURS.name]
    assert names["table2", "without the motion loss"] == names["fig5b", "gamma 0"] != ours
    assert names["fig7", OURS.name] != ours
    table1 = experiment("table1", SHIFT)
    assert len({names["table1", variant.name] for variant in table1.variants}) == len(table1.variants)
    assert all((row_name(plan, table1, v, 0) == row_name(plan, table1, v, 1)) == v.is_fixed for v in table1.variants)
    assert row_name(Plan(CONFIG, plan.base, plan.init, tmp_path, updates=3, clips=2), table1, OURS, 0) != ours
    assert row_name(replace(plan, stage1_updates=0), table1, OURS, 0) != ours
    assert row_name(replace(plan, stage1_updates=1), table1, OURS, 0) == ours  # half of two, as without it


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
def test_a_page_without_rows_says_of_every_end_point_that_it_was_not_measured(tmp_path: Path) -> None:
    found = collect(plan_in(tmp_path), plan_in(tmp_path), [0], "python jobs/benchmarks/experiments.py")
    text = page(found, "quality")
    assert "## What holds\n\nNothing." in text and text.count("- ") >= 8 and "Nothing was run yet." in text


def keep(plan: Plan, variant: Variant, seed: int, level: float, seam: float = 1.0) -> None:
    """A row of Table 1 whose clips all have one level in each score."""
    values = {name: [level] * 2 for name in (*plan.world.scores, "motion_inside")} | {"seam": [seam] * 2}
    row = {"seed": seed, "values": values, "fps": 1.0, "forwards": 18, "date": "d", "machine": "m", "torch": "t"}
    name = row_name(plan, experiment("table1", SHIFT), variant, seed)
    Folder(str(plan.folder / ROWS)).write_json(name, row)


@pytest.mark.slow
def test_differences_are_paired_by_clip_and_what_no_seed_trains_counts_for_every_seed(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    for seed in (0, 1, 2):
        for variant, more in ((TEACHER, 0.0), (INITIAL, -0.3), (OURS, 0.01 * (1 + seed)), (STAGE1, 0.0)):
            keep(plan, variant, seed, 0.5 + more, seam=1.2 if variant is OURS else 1.0)
    keep(plan, SELF_FORCING, 1, 0.5)
    whole = collect(plan, replace(plan, held_out=True), [0, 1, 2], "c")
    differences = whole["experiments"][0]["differences"]
    found = differences[f"{OURS.name} - {TEACHER.name}"]["smoothness"]
    assert found["mean"] == pytest.approx(0.02) and found["count"] == 2
    assert found["half_width"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    mean = differences[f"{OURS.name} - {TEACHER.name}"]["mean"]
    assert mean["half_width"] == pytest.approx(2.920 * 0.01 / 3**0.5, rel=1e-3), "each end is a one-sided bound"
    assert differences[f"{OURS.name} - {SELF_FORCING.name}"]["mean"]["mean"] == pytest.approx(0.02), "of seed 1 alone"
    assert f"{TEACHER.name} - {SELF_FORCING.name}" not in differences
    said = {one.text: one.holds for one in judged(whole)}
    assert any(text.startswith("mean of scores against teacher: +2.00 points") and said[text] for text in said)
    assert any(text.startswith("seam ratio = 1.200") and not said[text] for text in said)
    assert any(text.startswith("mean of scores over student of stage 0: +32.00") and said[text] for text in said)
    assert any(text.startswith("mean of scores over stage 1 alone: +2.00") and said[text] for text in said)
    sentence = "3 trainings of the recipe, at 18 forwards a clip, have a mean of"
    assert sentence in claim(whole) and "+2.0 points [" in claim(whole) and "against Self Forcing at 18" in claim(whole)
    text = page(whole, "quality")
    assert "| ours | 3 | 18 | 0.520" in text and "not yet run | +2.00 [" in text and "| 1.200 | 1.040 |" in text
    keep(plan, Variant("codec alone (ceiling)", "codec"), 0, 1.0)
    save_pictures(collect(plan, plan, [0, 1, 2], "c"), tmp_path, "quality")
    assert {path.name for path in tmp_path.glob("*.png")} == {"quality-scores.png", "quality-cost.png"}


@pytest.mark.slow
def test_a_row_is_trained_sampled_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, one = plan_in(tmp_path), experiment("table3", SHIFT)
    first, second = (next(v for v in one.variants if v.name == steps) for steps in ("4322222", "4222222"))
    about = {"date": "d", "machine": "m", "torch": "t"}
    row = run_row(plan, one, first, 0, about, silent)
    assert row["forwards"] == 17 + 1 + 2 and len(row["values"]["colour"]) == 2 and row["training_cpu_s"] > 0
    assert (tmp_path / "sheets" / row["sheet"]).is_file()
    monkeypatch.setattr(runs, "trained_student", _unasked)
    assert run_row(plan, one, first, 0, {**about, "date": "later"}, silent) == row == read_row(plan, one, first, 0)
    monkeypatch.undo()
    other = run_row(plan, one, second, 0, about, silent)
    assert (other["student"], other["forwards"]) == (row["student"], 19)  # sampled from the same one
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
    teacher = run_row(plan, pieces, pieces.variants[0], 0, about, silent)
    assert len(teacher["drift"]["curves"]["direction"]["mean"]) == 3
    initial = run_row(plan, experiment("table1", SHIFT), INITIAL, 0, about, silent)
    assert "training_cpu_s" not in initial and initial["forwards"] == 18


@pytest.mark.slow
def test_speeds_are_measured_side_by_side_and_stand_in_the_table(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    one: Experiment = replace(experiment("table1", SHIFT), variants=(INITIAL, OURS))
    assert read_speed(plan, one, 0) is None
    found = run_speed(plan, one, 0, {"date": "d", "load": "1", "command": "c", "machine": "m", "torch": "t"}, silent)
    assert found == read_speed(plan, one, 0) and set(found["fps"]) == {INITIAL.name, OURS.name}
    assert 0 < found["fps"][OURS.name] < 1e5


def _unasked(*arguments: object) -> None:
    raise AssertionError("a student was trained again")


@pytest.mark.parametrize(("name", "value"), [("updates", 1), ("clips", 0), ("streams", 1), ("seconds", 1.0)])
def test_a_budget_out_of_range_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(FieldError, match=f"{name} = {value}"):
        replace(plan_in(tmp_path), **{name: value})  # type: ignore[arg-type]
