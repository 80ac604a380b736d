"""The embedded base model from nothing: codec, text encoder and teacher, trained from the seed in one process."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import islice

import torch
from diffusers import AutoencoderKLWan

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.evaluate.quality.sources import ScoreTable, score_teacher
from diagonal.evaluate.quality.teacher_scores import score_learning
from diagonal.jsonfile import write_json
from diagonal.model.base_model import save_base
from diagonal.model.text import TextEncoder
from diagonal.model.vae import LinearCodec
from diagonal.training.codec import train_vae
from diagonal.training.pretrain import (
    TeacherTraining,
    as_wan,
    build_corpus,
    build_text_encoder,
    build_tokenizer,
    fit_codec,
    train_teacher,
)
from diagonal.training.text_encoder_training import fit_text
from jobs.runs import arguments
from jobs.runs.console import Progress
from jobs.runs.run import Run, opened, say

SCORED_CLIPS, LEARNING_CLIPS = 216, 48
CAPTION_STRIDE = 7  # of the captions, the text encoder learns from every seventh
SCORES, STATE = "scores.json", "pretrain/state.pt"


def pretrain(run: Run) -> None:
    """Train the base model into the run's `base/` unless it is there; a teacher that was cut off goes on."""
    folder, config = run.folder / "base", run.config
    if folder.has(SCORES):
        return
    world, settings = embedded_world(config), config.pretrain
    say("pretrain: fitting the linear codec and the text encoder")
    tokenizer, linear = build_tokenizer(world), fit_codec(config)
    captions = list(islice(world.captions(False), 0, None, CAPTION_STRIDE))
    encoder = fit_text(
        config,
        tokenizer,
        build_text_encoder(config, len(tokenizer)),
        captions,
        Progress("pretrain text", settings.text_updates),
    )
    text = TextEncoder(tokenizer, encoder, config.model.text_tokens)
    say(f"pretrain: drawing {settings.clips} clips")
    training = TeacherTraining(config, build_corpus(config, linear, text))
    _restore(run, training)
    state = train_teacher(config, training, Progress("pretrain", settings.updates), partial(_after, run, text, linear))
    codec = _codec(config, linear)
    lineage = {
        "stage": "pretrain",
        "seed": config.seed,
        "updates": training.update,
        "command": f"python jobs/pretrain.py --preset {config.preset}",
    }
    with folder.replaced(last=SCORES) as new:
        save_base(new, config, as_wan(state, training.teacher), codec, tokenizer, encoder, lineage)
        scores = score_teacher(new, config, clips=SCORED_CLIPS, seed=config.seed)
        write_json(new / SCORES, {"clips": SCORED_CLIPS, "teacher": scores})
    say(f"pretrain: {_means(scores)}")


def _codec(config: Config, linear: LinearCodec) -> AutoencoderKLWan | LinearCodec:
    updates = config.pretrain.codec_updates
    if not updates:
        return linear
    say("pretrain: training the autoencoder to the linear codec's latents")
    return train_vae(config, linear, Progress("pretrain codec", updates))


def _restore(run: Run, training: TeacherTraining) -> None:
    if run.folder.has(STATE):
        training.load_state_dict(torch.load(BytesIO(run.folder.read(STATE)), weights_only=True))
        say(f"pretrain: resumes after update {training.update}")


def _after(run: Run, text: TextEncoder, linear: LinearCodec, training: TeacherTraining) -> None:
    """Keep the state now and then, and judge what it has learnt."""
    settings, update = run.config.pretrain, training.update
    if update % settings.checkpoint_every == 0:
        data = BytesIO()
        torch.save(training.state_dict(), data)
        run.folder.write(STATE, data.getvalue())
    if settings.score_every and update % settings.score_every == 0:
        tables = score_learning(training, run.config, text, linear, clips=LEARNING_CLIPS, seed=run.config.seed)
        run.folder.write_json(f"pretrain/scores-{update:06d}.json", tables)
        for guidance, table in tables.items():
            say(f"pretrain: update {update}, guidance {guidance}: {_means(table)}")


def _means(table: ScoreTable) -> str:
    return ", ".join(f"{name} {value['mean']:.3f}" for name, value in table.items())


def work(argv: Sequence[str]) -> None:
    with opened(arguments.run_options(argv, __doc__ or "")) as run:
        pretrain(run)
