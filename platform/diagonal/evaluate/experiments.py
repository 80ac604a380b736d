"""The experiments of docs/results/quality.md as a table: the paper's tables and figures, each as variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diagonal.config import Config
from diagonal.errors import require
from diagonal.schedule import raw_level

Kind = Literal["trained", "sampled", "teacher", "codec"]
Measure = Literal["clips", "chunks", "streams", "turns"]
FIXED = ("teacher", "codec")  # kinds that no seed trains
TEACHER_STEPS = 50
TABLE3 = ("5433333", "5432222", "5333333", "4333333", "4322222", "4222222")
CONTEXT_RAW = (0, 50, 100, 250, 500, 1000)
GAMMAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
NO_DIAGONAL = "4"


@dataclass(frozen=True)
class Variant:
    """One row. `settings` are in force where a student is trained and sampled; `sampled` students are all the one that
    is trained with the default settings, which these then change for sampling alone."""

    name: str
    kind: Kind = "trained"
    settings: tuple[str, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same whatever the training seed."""
        return self.kind in FIXED


@dataclass(frozen=True)
class Experiment:
    """One table or figure: `key` names it on the command line, `paper` is what the paper shows there, `measure` what is
    done with each variant, `seeds` how many it needs. A `thorough` one, which says that something is not worse, takes
    all clips of the plan, others fewer. `note` is printed under the table."""

    key: str
    paper: str
    question: str
    measure: Measure
    variants: tuple[Variant, ...]
    seeds: int = 1
    thorough: bool = False
    note: str = ""

    @property
    def kinds(self) -> str:
        """Whether students are trained or sampled, in words."""
        kinds = {variant.kind for variant in self.variants}
        said = []
        if "trained" in kinds:
            said.append("each student trained from one initialisation with equal updates")
        if "sampled" in kinds:
            said.append("all sampled from one student")
        return "; ".join(said)


OURS = Variant("ours: 4322222, reuse")
SELF_FORCING = Variant("self-forcing", settings=(
    "schedule.steps=self-forcing", "distill.stage1_steps=self-forcing", "distill.loss.gamma=0"))
# CausVid and Self Forcing have no motion term.
CAUSVID = Variant("CausVid-like: 3 steps, clean context", settings=(
    "schedule.steps=3", "distill.stage1_steps=3", "schedule.context=0.0", "distill.loss.gamma=0"))
NO_MOTION = Variant("without the motion loss", settings=("distill.loss.gamma=0.0",))


def experiments(shift: float) -> tuple[Experiment, ...]:
    """All of them; `shift` is the schedule's, by which raw timesteps are told as levels."""
    return (
        Experiment("table1", "Table 1", "Is the recipe as good as teacher and Self Forcing, at half the forwards?",
                   "clips", (Variant("codec alone (ceiling)", "codec"),
                             Variant(f"teacher, {TEACHER_STEPS} steps", "teacher"), SELF_FORCING, CAUSVID, OURS),
                   3, thorough=True),
        Experiment("table2", "Table 2", "What does each part bring?", "clips", (
            Variant("without diagonal forcing", settings=("schedule.context=0.0",)), NO_MOTION,
            Variant("without diagonal denoising", settings=(f"schedule.steps={NO_DIAGONAL}",)),
            Variant("full", settings=())), 3),
        Experiment("table3", "Table 3", "Which step schedule?", "clips", tuple(
            Variant(steps, "sampled", (f"schedule.steps={steps}",)) for steps in TABLE3)),
        Experiment("fig2", "Fig. 2", "Do one-step chunks clear up chunk by chunk when context is noisy?",
                   "chunks", tuple(Variant(f"one step, context {context_name(raw, shift)}", "sampled",
                                           ("schedule.steps=1", f"schedule.context={raw_level(raw, shift)}"))
                                   for raw in (0, 100, 250, 500)),
            note="Figures of each chunk of a clip, the first chunk first."),
        Experiment("fig5a", "Fig. 5a", "How noisy should context be?", "clips", tuple(
            Variant(f"context {context_name(raw, shift)}",
                    settings=(f"schedule.context={raw_level(raw, shift)}",)) for raw in CONTEXT_RAW),
            note="Trained and sampled with the same context. The public code's 100 is level 0.101 where it trains and "
                 "0.357 where it serves; raw 100 is level 0.357 here in both."),
        Experiment("fig5b", "Fig. 5b", "How heavy should the motion loss be?", "clips", tuple(
            Variant(f"gamma {gamma:g}", settings=(f"distill.loss.gamma={gamma}",)) for gamma in GAMMAS)),
        Experiment("fig6", "Fig. 6", "Does the motion loss restore motion?", "clips",
                   (Variant(f"teacher, {TEACHER_STEPS} steps", "teacher"), NO_MOTION,
                    Variant("with its matching term alone", settings=("distill.loss.flow_regression=0.0",)),
                    Variant("with the motion loss")),
                   note="Motion amplitude is the figure `picture motion`; contact sheets lie beside the rows. The loss "
                        "is a matching term and a regression of differences between frames to the student of stage 1."),
        Experiment("fig7", "Fig. 7 and 8", "Do long streams drift?", "streams", (OURS, SELF_FORCING),
                   note="Streams of 180 s, whose first 45 s are the shorter ones. The paper's user study is not "
                        "reproduced."),
        Experiment("fig9", "Fig. 9", "How soon is a changed prompt obeyed, and is the seam seen?", "turns", (OURS,)),
    )


def context_name(raw: int, shift: float) -> str:
    """A raw timestep beside its level."""
    return f"raw {raw} = level {raw_level(raw, shift):.3f}"


def experiment(key: str, shift: float) -> Experiment:
    """The one of that key."""
    found = {one.key: one for one in experiments(shift)}
    require(key in found, "experiment", key, f"one of {sorted(found)}")
    return found[key]


def variant_config(base: Config, variant: Variant, seed: int, updates: int) -> Config:
    """The configuration that a variant is sampled with, and trained with where it is trained."""
    require(2 <= updates <= 100_000, "updates", updates, "a whole number from 2 to 100000")
    shared = (f"seed={seed}", f"distill.stage1_updates={updates // 2}",
              f"distill.stage2_updates={updates - updates // 2}")
    return base.with_settings([*shared, *variant.settings])


def training_config(base: Config, variant: Variant, seed: int, updates: int) -> Config:
    """What the student of a variant is trained with: its own settings, or the defaults where it is only sampled."""
    own = variant if variant.kind == "trained" else Variant(variant.name)
    return variant_config(base, own, seed, updates)
