"""The experiments behind docs/results/quality.md as data: the end points, then the paper's tables, as variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diagonal.config import Config
from diagonal.errors import require
from diagonal.schedule import raw_level

Kind = Literal["trained", "sampled", "initial", "teacher", "codec"]
Measure = Literal["clips", "chunks", "pieces", "streams", "turns"]
FIXED = ("initial", "teacher", "codec")  # kinds that no seed trains
TEACHER_STEPS = 50
TABLE3 = ("5433333", "5432222", "5333333", "4333333", "4322222", "4222222")
CONTEXT_RAW = (0, 50, 100, 250, 500, 1000)
GAMMAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Variant:
    """One row. `settings` are in force where a student is trained and sampled; `sampled` students are all the one that
    is trained with the preset's own settings, which these then change for sampling alone; the `initial` one is that of
    stage 0. With `stage1_alone` all updates of a training are stage 1's."""

    name: str
    kind: Kind = "trained"
    settings: tuple[str, ...] = ()
    stage1_alone: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same whatever the training seed."""
        return self.kind in FIXED


@dataclass(frozen=True)
class Experiment:
    """One question: `key` names it on the command line, `paper` is where the paper asks it, `measure` what is done with
    each variant, `seeds` how many trainings it needs. A `thorough` one, which says that something is not worse, takes
    all clips of the plan, others fewer."""

    key: str
    paper: str
    question: str
    measure: Measure
    variants: tuple[Variant, ...]
    seeds: int = 1
    thorough: bool = False


NO_MOTION, MOTION = "distill.loss.gamma=0.0", "distill.loss.gamma=1.0"  # as CausVid; as the paper
OWN_CONTEXT = ("schedule.sink_context=null", "schedule.clean_newest=false")
CODEC = Variant("codec alone (ceiling)", "codec")
TEACHER = Variant(f"teacher, {TEACHER_STEPS} steps", "teacher")
INITIAL = Variant("student of stage 0", "initial")
STAGE1 = Variant("stage 1 alone", stage1_alone=True)
GUIDANCE = Variant("guidance alone: the critic never learns", settings=("distill.critic_lr=1e-30",))
OURS = Variant("ours")  # the preset, exactly
SELF_FORCING = Variant(
    "self-forcing",
    settings=("schedule.steps=self-forcing", "distill.stage1_steps=self-forcing", *OWN_CONTEXT, NO_MOTION),
)
SELF_FORCING_21 = Variant("self-forcing, window 21", settings=(*SELF_FORCING.settings, "cache.window_frames=21"))
CAUSVID = Variant(
    "CausVid-like: 3 steps, clean context",
    settings=(  # its own raw list is 1000, 757, 522
        "schedule.steps=3@500",
        "distill.stage1_steps=3@500",
        "schedule.context=0.0",
        *OWN_CONTEXT,
        NO_MOTION,
    ),
)
PAPERS = Variant(
    "the paper's own list: 4322222, reuse", settings=("schedule.steps=4322222", "distill.stage1_steps=4", *OWN_CONTEXT)
)


# What is claimed of the recipe.
END_POINTS = (
    Experiment(
        "table1",
        "Table 1",
        "Is the recipe as good as teacher and Self Forcing at half the forwards, and what does each stage bring?",
        "clips",
        (CODEC, TEACHER, INITIAL, STAGE1, GUIDANCE, SELF_FORCING, OURS),
        5,
        thorough=True,
    ),
    Experiment("pieces", "Section 3.3", "Where in a clip does motion go wrong?", "pieces", (TEACHER, OURS)),
    Experiment("fig7", "Fig. 7 and 8", "Do long streams drift?", "streams", (OURS, SELF_FORCING), 5),
    Experiment("fig9", "Fig. 9", "How soon is a changed prompt obeyed, and is the seam seen?", "turns", (OURS,)),
)
# The recipe beside others, and without its parts.
RECIPES = (
    Experiment(
        "others",
        "Table 1",
        "And Self Forcing's published window, CausVid's three steps, and the paper's own list?",
        "clips",
        (TEACHER, SELF_FORCING, SELF_FORCING_21, CAUSVID, PAPERS, OURS),
        3,
    ),
    Experiment(
        "table2",
        "Table 2",
        "What does each part bring?",
        "clips",
        (
            Variant("without diagonal forcing: a clean context", settings=("schedule.context=0.0", *OWN_CONTEXT)),
            Variant("without the clean sink", settings=("schedule.sink_context=null",)),
            Variant("without the clean newest frame", settings=("schedule.clean_newest=false",)),
            Variant("without the motion loss", settings=(NO_MOTION,)),
            Variant("without diagonal denoising", settings=("schedule.steps=4@250",)),
            OURS,
        ),
        3,
    ),
    Experiment(
        "table3",
        "Table 3",
        "Which step schedule?",
        "clips",
        tuple(
            Variant(f"{steps}{end}", "sampled", (f"schedule.steps={steps}{end}",))
            for end in ("", "@250")
            for steps in TABLE3
            if "5" not in steps or not end  # five steps end behind raw 250 by themselves
        ),
    ),
)
MOTION_LOSSES = (
    Experiment(
        "fig5b",
        "Fig. 5b",
        "How heavy should the motion loss be?",
        "clips",
        tuple(Variant(f"gamma {gamma:g}", settings=(f"distill.loss.gamma={gamma}",)) for gamma in GAMMAS),
    ),
    Experiment(
        "fig6",
        "Fig. 6",
        "Does the motion loss restore motion, and does its regression help?",
        "clips",
        (
            TEACHER,
            Variant("without the motion loss", settings=(NO_MOTION,)),
            Variant("with its matching term alone", settings=(MOTION, "distill.loss.flow_regression=0.0")),
            Variant("with its regression too", settings=(MOTION, "distill.loss.flow_regression=1.0")),
        ),
    ),
)


def experiments(shift: float) -> tuple[Experiment, ...]:
    """All of them; `shift` is the schedule's, by which raw timesteps are told as levels."""
    return (*END_POINTS, *RECIPES, *_contexts(shift), *MOTION_LOSSES)


def _contexts(shift: float) -> tuple[Experiment, ...]:
    return (
        Experiment(
            "fig2",
            "Fig. 2",
            "Do one-step chunks clear up chunk by chunk when context is noisy?",
            "chunks",
            tuple(
                Variant(
                    f"one step, context {context_name(raw, shift)}",
                    "sampled",
                    ("schedule.steps=1", f"schedule.context={raw_level(raw, shift)}", *OWN_CONTEXT),
                )
                for raw in (0, 100, 250, 500)
            ),
        ),
        Experiment(
            "fig5a",
            "Fig. 5a",
            "How noisy should context be, in training and sampling alike?",
            "clips",
            tuple(
                Variant(
                    f"context {context_name(raw, shift)}",
                    settings=(f"schedule.context={raw_level(raw, shift)}", *OWN_CONTEXT),
                )
                for raw in CONTEXT_RAW
            ),
        ),
    )


def context_name(raw: int, shift: float) -> str:
    """A raw timestep beside its level."""
    return f"raw {raw} = level {raw_level(raw, shift):.3f}"


def experiment(key: str, shift: float) -> Experiment:
    """The one of that key."""
    found = {one.key: one for one in experiments(shift)}
    require(key in found, "experiment", key, f"one of {sorted(found)}")
    return found[key]


def variant_config(base: Config, variant: Variant, seed: int, stages: tuple[int, int]) -> Config:
    """The configuration that a variant is sampled with, and trained with where it is trained; `stages` are the updates
    of stage 1 and of stage 2."""
    first, second = (sum(stages), 0) if variant.stage1_alone else stages
    shared = (f"seed={seed}", f"distill.stage1_updates={first}", f"distill.stage2_updates={second}")
    return base.with_settings([*shared, *variant.settings])


def training_config(base: Config, variant: Variant, seed: int, stages: tuple[int, int]) -> Config:
    """What the student of a variant is trained with: its own settings, or the defaults where it is only sampled."""
    own = variant if variant.kind == "trained" else Variant(variant.name)
    return variant_config(base, own, seed, stages)
