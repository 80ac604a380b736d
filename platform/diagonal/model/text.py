"""Text: prompts to the embeddings that cross-attention reads, by a umT5 encoder and its tokenizer."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5EncoderModel

from diagonal.errors import FieldError, require
from diagonal.jsonfile import read_json

TOKENIZER = "tokenizer.json"
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # T5's own names


def clean_prompt(prompt: str) -> str:
    """The one form of a prompt that everything reads, as Wan's pipeline makes it.

    ftfy repairs characters (mojibake, curly quotes, full width, NFC), HTML entities are undone twice, and white space
    is folded.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `tokenizer.json` describes, with its very ids; `FieldError` when it is none, or cannot pad.

    transformers' own T5 class builds another one from its vocabulary, which has no byte fallback and another <unk>.
    """
    file, allowed = folder / TOKENIZER, f"a {TOKENIZER} (the fast tokenizer's file; spiece.model alone is not read)"
    require(file.is_file(), "tokenizer", str(folder), f"a folder with {allowed}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # edge: the library raises bare Exceptions
        raise FieldError("tokenizer", str(file), f"{allowed}, not a Git LFS pointer or a part of one") from error
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = {name: _content(settings.get(name), default) for name, default in _SPECIAL.items()}
    lacking = sorted(token for token in special.values() if tokenizer.token_to_id(token) is None)
    require(not lacking, "tokenizer special tokens", lacking, f"tokens of {file}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", truncation_side="right", **special)


def _content(token: object, default: str) -> str:
    """A special token's text: tokenizer_config.json has it plain or with its flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return str(found or default)


class TextEncoder:
    """Encodes prompts as Wan does: `text_tokens` positions, those past the prompt's end set to zero afterwards."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, text_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder.eval()
        self._text_tokens = text_tokens

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder; returns itself."""
        self._encoder.to(device)
        return self

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as a whole, its end mark counted: `encode` reads the first `text_tokens` of them."""
        return token_counts(self._tokenizer, prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[len(prompts), text_tokens, text_dim]` in float32; longer prompts are cut."""
        require(len(prompts) > 0, "prompts", prompts, "at least one prompt")
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self._text_tokens,
            return_tensors="pt",
        )
        device = next(self._encoder.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.float() * mask.unsqueeze(-1)


def token_counts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt, its end mark counted."""
    ids = tokenizer([clean_prompt(prompt) for prompt in prompts], truncation=False)["input_ids"]
    return [len(row) for row in ids]
