"""The embedded base model from nothing: codec, text encoder and teacher, trained from the seed in one process."""

from __future__ import annotations

from collections.abc import Sequence

from diagonal.errors import require
from diagonal.evaluate.quality import score_teacher
from diagonal.model.text import TextEncoder
from diagonal.model.weights import save_base
from diagonal.training.codec import train_vae
from diagonal.training.pretrain import (
    as_wan,
    build_corpus,
    build_teacher,
    build_text_encoder,
    build_tokenizer,
    fit_codec,
    train_teacher,
)
from diagonal.tree import write_json
from jobs.run import Run, main, opened, parser, say
from jobs.timing import Progress

SCORED_CLIPS = 216
SCORES = "scores.json"


def pretrain(run: Run) -> None:
    """Train the base model into the run's `base/` unless it is there."""
    folder, config = run.folder / "base", run.config
    if folder.has(SCORES):
        return
    require(config.preset == "tiny", "preset", config.preset, "'tiny': other base models are given, not trained here")
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(config, len(tokenizer))
    say("pretrain: fitting the linear codec, then the autoencoder to its latents")
    linear = fit_codec(config)
    codec = train_vae(config, linear, Progress("pretrain", config.pretrain.codec_updates))
    say(f"pretrain: drawing {config.pretrain.clips} clips")
    corpus = build_corpus(config, linear, TextEncoder(tokenizer, encoder, config.model.text_tokens))
    state = train_teacher(config, corpus, Progress("pretrain", config.pretrain.updates))
    lineage = {"stage": "pretrain", "seed": config.seed, "updates": config.pretrain.updates,
               "command": "python jobs/pretrain.py --preset tiny"}
    with folder.replaced(last=SCORES) as new:
        save_base(new, config, as_wan(state, build_teacher(config)), codec, tokenizer, encoder, lineage)
        scores = score_teacher(new, config, clips=SCORED_CLIPS, seed=config.seed)
        write_json(new / SCORES, {"clips": SCORED_CLIPS, "teacher": scores})
    say("pretrain: " + ", ".join(f"{name} {value['mean']:.3f}" for name, value in scores.items()))


def work(argv: Sequence[str]) -> None:
    with opened(parser(__doc__ or "").parse_args(argv)) as run:
        pretrain(run)


if __name__ == "__main__":
    main("jobs.pretrain")
