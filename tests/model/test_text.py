"""Text: Wan's way of padding, cutting and zeroing, on a real tokenizer and umT5 encoder in small."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from diagonal.errors import FieldError
from diagonal.model.text import TextEncoder
from tests.networks import TEXT_DIM, TEXT_TOKENS, small_text, small_text_model, small_tokenizer


def test_positions_past_the_prompts_end_are_exactly_zero() -> None:
    found = small_text().encode(["a red circle", "moves", ""])
    assert found.shape == (3, TEXT_TOKENS, TEXT_DIM) and found.dtype == torch.float32
    for row, tokens in enumerate((4, 2, 1)):  # the end mark counts
        assert bool((found[row, :tokens].abs().sum(-1) > 0.1).all())
        assert not found[row, tokens:].any()


def test_an_embedding_is_the_encoders_own_on_the_unpadded_prompt() -> None:
    ids = small_tokenizer()(["a red circle"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = small_text_model()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(small_text().encode(["a red circle"])[:, : ids.shape[1]], alone, rtol=0, atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_keeps_its_end_mark() -> None:
    text = small_text()
    long = text.encode(["a red circle moves left a blue square moves right"])
    assert torch.equal(long, text.encode(["a red circle moves left"]))
    assert bool((long.abs().sum(-1) > 0.1).all())


def test_unknown_words_do_not_fail_and_known_ones_matter() -> None:
    text = small_text()
    unknown, other, known = (text.encode([prompt]) for prompt in ("a zebra", "a ぞう", "a circle"))
    assert torch.isfinite(unknown).all() and torch.equal(unknown, other)
    assert not torch.equal(unknown, known)


def test_white_space_does_not_matter_whatever_the_tokenizer_makes_of_it() -> None:
    seen: list[str] = []

    def tokenizer(prompts: list[str], **settings: Any) -> Any:
        seen.extend(prompts)
        return small_tokenizer()(prompts, **settings)

    text = TextEncoder(cast(PreTrainedTokenizerBase, tokenizer), small_text_model(), TEXT_TOKENS)
    assert torch.equal(text.encode(["  a\tred \n circle "]), text.encode(["a red circle"]))
    assert seen == ["a red circle"] * 2


def test_an_embedding_does_not_depend_on_the_prompts_beside_it() -> None:
    text = small_text()
    together = text.encode(["a red circle", "a blue square moves left"])
    torch.testing.assert_close(together[:1], text.encode(["a red circle"]), rtol=0, atol=1e-5)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(FieldError, match="prompts = .*at least one"):
        small_text().encode([])
