"""The experiments of docs/results/quality.md as a table: the paper's tables and figures, each as variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diagonal.config import Config
from diagonal.errors import require
from diagonal.schedule import raw_level

Kind = Literal["trained", "sampled", "teacher", "codec"]
Measure = Literal["clips", "chunks", "pieces", "streams", "turns"]
FIXED = ("teacher", "codec")  # kinds that no seed trains
TEACHER_STEPS = 50
TABLE3 = ("5433333", "5432222", "5333333", "4333333", "4322222", "4222222")
TABLE3_OURS = ("4333333@250", "4322222@250", "4222222@250", "4322222@400")
CONTEXT_RAW = (0, 50, 100, 250, 500, 1000)
GAMMAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


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


NO_MOTION, MOTION = "distill.loss.gamma=0.0", "distill.loss.gamma=1.0"  # as CausVid; as the paper
LAST_250 = ("schedule.steps=4322222@250", "distill.stage1_steps=4@250")
CODEC = Variant("codec alone (ceiling)", "codec")
TEACHER = Variant(f"teacher, {TEACHER_STEPS} steps", "teacher")
OURS = Variant("ours: 4322222@250, reuse", settings=(*LAST_250, NO_MOTION))
PAPERS = Variant(
    "the paper's own list: 4322222, reuse", settings=("schedule.steps=4322222", "distill.stage1_steps=4", NO_MOTION)
)
SELF_FORCING = Variant(
    "self-forcing", settings=("schedule.steps=self-forcing", "distill.stage1_steps=self-forcing", NO_MOTION)
)
CAUSVID = Variant(
    "CausVid-like: 3 steps, clean context",
    settings=(  # its own raw list is 1000, 757, 522
        "schedule.steps=3@500",
        "distill.stage1_steps=3@500",
        "schedule.context=0.0",
        NO_MOTION,
    ),
)
FULL = Variant("full: with the motion loss, gamma 1", settings=(*LAST_250, MOTION))
WITHOUT_MOTION = Variant("without the motion loss", settings=OURS.settings)


def experiments(shift: float) -> tuple[Experiment, ...]:
    """All of them; `shift` is the schedule's, by which raw timesteps are told as levels."""
    return (
        Experiment(
            "table1",
            "Table 1",
            "Is the recipe as good as teacher and Self Forcing, at half the forwards?",
            "clips",
            (CODEC, TEACHER, SELF_FORCING, OURS),
            3,
            thorough=True,
            note="Trained without the motion loss, both: Fig. 5b shows what it changes.",
        ),
        Experiment(
            "causvid",
            "Table 1",
            "And how good are CausVid's three steps with clean context?",
            "clips",
            (TEACHER, SELF_FORCING, CAUSVID, OURS),
            3,
        ),
        Experiment(
            "last",
            "Section 3.2",
            "At which noise should a chunk's last step begin?",
            "clips",
            (PAPERS, OURS),
            note="The paper's rows end at raw 100, ours at raw 250, where Self Forcing's list ends.",
        ),
        Experiment(
            "table2",
            "Table 2",
            "What does each part bring?",
            "clips",
            (
                Variant("without diagonal forcing", settings=(*FULL.settings, "schedule.context=0.0")),
                WITHOUT_MOTION,
                Variant("without diagonal denoising", settings=(*FULL.settings, "schedule.steps=4@250")),
                FULL,
            ),
            3,
        ),
        Experiment(
            "table3",
            "Table 3",
            "Which step schedule?",
            "clips",
            tuple(Variant(steps, "sampled", (f"schedule.steps={steps}",)) for steps in (*TABLE3, *TABLE3_OURS)),
            note="The student was trained with the preset's own list and motion weight.",
        ),
        Experiment(
            "fig2",
            "Fig. 2",
            "Do one-step chunks clear up chunk by chunk when context is noisy?",
            "chunks",
            tuple(
                Variant(
                    f"one step, context {context_name(raw, shift)}",
                    "sampled",
                    ("schedule.steps=1", f"schedule.context={raw_level(raw, shift)}"),
                )
                for raw in (0, 100, 250, 500)
            ),
            note="Figures of each chunk of a clip, the first chunk first.",
        ),
        Experiment(
            "fig5a",
            "Fig. 5a",
            "How noisy should context be?",
            "clips",
            tuple(
                Variant(
                    f"context {context_name(raw, shift)}",
                    settings=(*FULL.settings, f"schedule.context={raw_level(raw, shift)}"),
                )
                for raw in CONTEXT_RAW
            ),
            note="Trained and sampled with the same context. The public code's 100 is level 0.101 where it trains and "
            "0.357 where it serves; raw 100 is level 0.357 here in both.",
        ),
        Experiment(
            "fig5b",
            "Fig. 5b",
            "How heavy should the motion loss be?",
            "clips",
            tuple(Variant(f"gamma {gamma:g}", settings=(*LAST_250, f"distill.loss.gamma={gamma}")) for gamma in GAMMAS),
        ),
        Experiment(
            "fig6",
            "Fig. 6",
            "Does the motion loss restore motion?",
            "clips",
            (
                TEACHER,
                WITHOUT_MOTION,
                Variant("with its matching term alone", settings=(*FULL.settings, "distill.loss.flow_regression=0.0")),
                FULL,
            ),
            note="Motion amplitude is the figure `picture motion`; contact sheets lie beside the rows. The loss "
            "is a matching term and a regression of differences between frames to the student of stage 1.",
        ),
        Experiment(
            "pieces",
            "Section 3.3",
            "Where in a clip does motion go wrong?",
            "pieces",
            (CODEC, TEACHER, SELF_FORCING, OURS),
            note="Clips in pieces of 3, 2 and 2 chunks, one figure a piece; in the last one the window leaves "
            "chunks out. A later piece may show any leg of a track: there its axis counts as direction.",
        ),
        Experiment(
            "fig7",
            "Fig. 7 and 8",
            "Do long streams drift?",
            "streams",
            (OURS, SELF_FORCING),
            note="Streams of 180 s, whose first 45 s are the shorter ones. The paper's user study is not reproduced.",
        ),
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


def variant_config(base: Config, variant: Variant, seed: int, stages: tuple[int, int]) -> Config:
    """The configuration that a variant is sampled with, and trained with where it is trained; `stages` are the updates
    of stage 1 and of stage 2."""
    shared = (f"seed={seed}", f"distill.stage1_updates={stages[0]}", f"distill.stage2_updates={stages[1]}")
    return base.with_settings([*shared, *variant.settings])


def training_config(base: Config, variant: Variant, seed: int, stages: tuple[int, int]) -> Config:
    """What the student of a variant is trained with: its own settings, or the defaults where it is only sampled."""
    own = variant if variant.kind == "trained" else Variant(variant.name)
    return variant_config(base, own, seed, stages)
