"""Wan's text path: prompts cleaned, cut into tokens and embedded as diffusers' own pipeline does it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer
from transformers import UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.data.prompts import prompt_id
from diagonal.errors import FieldError
from diagonal.model.text import TextEncoder, clean_prompt, load_tokenizer
from tests.model.folders import write_tokenizer
from tests.networks import roughen

TOKENS = 24
SUBJECTS = (
    "a red circle",
    "two people",
    "ein Bär läuft",
    "一只红色的猫",
    "赤い丸が動く",
    "빨간 원",
    "красный круг",
    "un chat 🐈‍⬛ 👩🏽‍🚀",
)
WRAPPINGS = (
    "{}",
    "“{}” — she said ‘no’…",
    "{} &amp; a blue square",
    "&lt;{}&gt; &quot;moves&quot;",
    "{} &amp;amp; &amp;lt;left&amp;gt;",
    "{}&nbsp;moves&#8217;s",
    "itâ€™s {} in the cafÃ©",
    "ＦＵＬＬ ｗｉｄｔｈ {} １２３",
    "  {}\t\n moves \u3000 left\u2028right ",
    "cafe\u0301 {} ﬁne ﬂow",
    "{}, 日本語、中文。한국어 🚀🔥",
    "{} </s> <pad> left",
    "{} \x1b[31mred\x1b[0m \ufeff\u200b",
    "a < b > c & {}",
    "the end is cut: {} moves left, then right, then left, then right, then left again, and again",
    "{} Ã© Â£5 â€œquotedâ€\x9d",
    "\\n {} \\u2019",
    "{} &eacute;&Eacute;&hellip;",
    "{}\r\n{}",
    "&#128512; {} &unknown; &amp",
    "<b>{}</b> moves",
    "{} 1/2 ½ ² ℃",
    "نص عربي {} שלום",
    "",
    "{} ǅ ĳ ſ İ",
)
TEXTS = [wrapping.replace("{}", subject) for wrapping in WRAPPINGS for subject in SUBJECTS]


def encoder_for(size: int) -> UMT5EncoderModel:
    layout = UMT5Config(vocab_size=size, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UMT5EncoderModel(layout)
    roughen(model)
    return model.eval().requires_grad_(False)


def test_two_hundred_texts_are_cleaned_and_embedded_as_wans_own_pipeline_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    encoder = encoder_for(len(tokenizer))
    pipeline = WanPipeline(tokenizer, encoder, None, FlowMatchEulerDiscreteScheduler(), None)
    assert len(TEXTS) == 200
    assert [clean_prompt(text) for text in TEXTS] == [prompt_clean(text) for text in TEXTS]
    expected = pipeline._get_t5_prompt_embeds(TEXTS, max_sequence_length=TOKENS, device=torch.device("cpu"))
    assert torch.equal(TextEncoder(tokenizer, encoder, TOKENS).encode(TEXTS), expected)


def test_tokens_are_those_of_the_tokenizers_file_also_where_a_t5_class_is_named(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, extra_ids=0, additional_special_tokens=[f"<extra_id_{i}>" for i in range(300)])
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("a red circle 🚀", "ﬁne ＦＵＬＬ", "left </s> right"):
        assert load_tokenizer(folder)([text])["input_ids"] == [own.encode(text).ids]
    ids = load_tokenizer(folder)(["🚀"])["input_ids"][0]
    assert ids[-5:] == [*(4 + byte for byte in "🚀".encode()), 1]  # bytes, and no unknown token


def test_the_tokens_of_a_prompt_are_counted_before_it_is_cut(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = TextEncoder(tokenizer, encoder_for(len(tokenizer)), 4)
    assert text.token_counts(["a red circle", "a&nbsp;red circle moves left"]) == [4, 6]
    assert torch.equal(text.encode(["a red circle moves"]), text.encode(["a red circle"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not a Git LFS pointer"),
        ("tokenizer.json", None, "spiece.model alone is not read"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "special tokens = .*<none>"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_or_cannot_pad_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(FieldError, match=message):
        load_tokenizer(folder)


def test_one_prompt_has_one_id_however_it_was_written() -> None:
    assert prompt_id("a &amp; b") == prompt_id("a & b") == prompt_id("a&nbsp;&amp;amp; b")
    assert prompt_id("it’s") == prompt_id("it's") == prompt_id("itâ€™s")


@pytest.mark.parametrize("preset", ["tiny", "tiny-textured"])
def test_captions_of_the_embedded_worlds_are_clean_already(preset: str) -> None:
    world = embedded_world(Config.from_preset(preset, ()))
    captions = [*islice(world.captions(True), 1000), *islice(world.captions(False), 1000)]
    assert captions and all(clean_prompt(caption) == caption for caption in captions)
