"""Text: prompts to the embeddings that cross-attention reads, by a umT5 encoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from diagonal.errors import require


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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[len(prompts), text_tokens, text_dim]` in float32; longer prompts are cut."""
        require(len(prompts) > 0, "prompts", prompts, "at least one prompt")
        tokens = self._tokenizer(
            [" ".join(prompt.split()) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self._text_tokens,
            return_tensors="pt",
        )
        device = next(self._encoder.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.float() * mask.unsqueeze(-1)
