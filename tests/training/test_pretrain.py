"""Training of an embedded base model: a teacher that was cut off goes on exactly, the text learns what stands where."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import pytest
import torch

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.errors import FieldError
from diagonal.evaluate.quality.sources import score_teacher
from diagonal.evaluate.quality.teacher_scores import GUIDANCES, score_learning
from diagonal.model.base_model import embedded
from diagonal.model.text import TextEncoder
from diagonal.training.pretrain import (
    TeacherTraining,
    build_corpus,
    build_text_encoder,
    build_tokenizer,
    fit_codec,
    train_teacher,
)
from diagonal.training.text_encoder_training import fit_text

CONFIG = Config.from_preset(
    "tiny-textured",
    [
        "pretrain.clips=4",
        "pretrain.codec_clips=4",
        "pretrain.updates=4",
        "pretrain.batch_size=2",
        "network.layers=1",
        "pretrain.text_updates=40",
        "pairs.solver_steps=20",
    ],
)


def silent(update: int, figures: Mapping[str, float]) -> None:
    assert update > 0 and figures


@pytest.mark.slow
def test_a_teacher_that_was_cut_off_ends_as_one_that_was_not() -> None:
    tokenizer, codec = build_tokenizer(embedded_world(CONFIG)), fit_codec(CONFIG)
    text = TextEncoder(tokenizer, build_text_encoder(CONFIG, len(tokenizer)), CONFIG.model.text_tokens)
    corpus = build_corpus(CONFIG, codec, text)
    assert corpus.latents.shape == CONFIG.geometry.clip_shape(4)
    kept: dict[int, bytes] = {}

    def keep(training: TeacherTraining) -> None:
        data = BytesIO()
        torch.save(training.state_dict(), data)
        kept[training.update] = data.getvalue()

    whole = train_teacher(CONFIG, TeacherTraining(CONFIG, corpus), silent, keep)
    assert list(kept) == [1, 2, 3, 4]
    resumed = TeacherTraining(CONFIG, corpus)
    resumed.load_state_dict(torch.load(BytesIO(kept[2]), weights_only=True))
    again = train_teacher(CONFIG, resumed, silent)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    tables = score_learning(resumed, CONFIG, text, codec, clips=1, seed=0)
    assert set(tables) == {str(guidance) for guidance in GUIDANCES}
    assert "small_direction" in tables["3.0"]

    longer = CONFIG.with_settings(["pretrain.updates=6"])
    extended = TeacherTraining(longer, corpus)
    extended.load_state_dict(torch.load(BytesIO(kept[2]), weights_only=True))
    train_teacher(longer, extended, silent)
    assert extended.update == 6
    with pytest.raises(FieldError, match=r"pretrain.updates = 6: allowed is 4, as planned, or at least 6"):
        TeacherTraining(longer, corpus).load_state_dict(torch.load(BytesIO(kept[3]), weights_only=True))


@pytest.mark.slow
def test_the_textured_worlds_teacher_in_the_repository_draws_what_captions_say() -> None:
    scores = score_teacher(embedded("base", "textured"), Config.from_preset("tiny-textured"), clips=8, seed=0, steps=10)
    assert scores["colour"]["mean"] >= 0.85 and scores["direction"]["mean"] >= 0.75


@pytest.mark.slow
def test_the_text_encoder_learns_which_word_stands_where_and_is_frozen_then() -> None:
    world = embedded_world(CONFIG)
    tokenizer, losses = build_tokenizer(world), list[float]()
    encoder = fit_text(
        CONFIG,
        tokenizer,
        build_text_encoder(CONFIG, len(tokenizer)),
        world.sample(0, 4)[0],
        lambda update, figures: losses.append(figures["text_loss"]),
    )
    assert losses[-1] < 0.5 * losses[0]
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.training
