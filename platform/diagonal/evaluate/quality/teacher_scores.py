"""How far a base model in training has come: oracle scores of its averaged weights, by guidance."""

from __future__ import annotations

from dataclasses import replace

from diagonal.config import Config
from diagonal.evaluate.quality.sources import (
    ScoreTable,
    clip_seeds,
    draw_captions,
    in_batches,
    judge,
    own_world,
    teacher_maker,
)
from diagonal.model.text import TextEncoder
from diagonal.model.vae import LinearCodec, decoder_of
from diagonal.training.pretrain import TeacherTraining, as_wan

GUIDANCES = (1.5, 3.0)


def score_learning(
    training: TeacherTraining, config: Config, text: TextEncoder, codec: LinearCodec, *, clips: int, seed: int
) -> dict[str, ScoreTable]:
    """Scores of that many clips by guidance (`"1.5"`, `"3.0"`), decoded by the linear codec."""
    world, network = own_world(config), as_wan(training.average, training.teacher).eval()
    captions = draw_captions(clips, seed, world.captions())
    tables = {}
    for guidance in GUIDANCES:
        guided = replace(config, pairs=replace(config.pairs, guidance=guidance))
        make = teacher_maker(network, text, decoder_of(codec), guided, config.pairs.solver_steps)
        tables[str(guidance)] = judge(in_batches(make, captions, clip_seeds(clips, seed)), captions, world)
    return tables
