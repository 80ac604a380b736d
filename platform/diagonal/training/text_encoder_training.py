"""Training of the embedded text encoder: it learns to tell which word stands where.

A random encoder mixes a caption's words at random. Where a caption speaks of one thing, that is enough; where it
speaks of two, a network has to find out which colour is whose, and a place that can be read off makes that easy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from diagonal.config import Config
from diagonal.diffusion.noise import Salt, generator
from diagonal.training.pretrain import Report

LR, BATCH = 3e-3, 96


class PlaceReader(nn.Module):
    """One learned query a place reads the embeddings `[b, l, n]` by attention and names the word, `[b, l, words]`."""

    def __init__(self, places: int, width: int, words: int, draw: torch.Generator) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(places, width, generator=draw))
        self.keys, self.values = (
            nn.Parameter(torch.randn(width, width, generator=draw) / width**0.5) for _ in range(2)
        )
        self.words = nn.Parameter(torch.randn(width, words, generator=draw) / width**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        scores = torch.einsum("pn,bln->bpl", self.queries, embeddings @ self.keys)
        return scores.softmax(-1) @ (embeddings @ self.values) @ self.words


def fit_text(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    encoder: UMT5EncoderModel,
    captions: Sequence[str],
    report: Report,
) -> UMT5EncoderModel:
    """Train the encoder on captions for `pretrain.text_updates` (0: it stays random); returns it, frozen."""
    places, updates = config.model.text_tokens, config.pretrain.text_updates
    if not updates:
        return encoder
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=places, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    draw = generator(config.seed, Salt.TEXT_PLACES)
    reader = PlaceReader(places, config.network.text_dim, len(tokenizer), draw)
    encoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW([*reader.parameters(), *encoder.parameters()], LR, weight_decay=0.0)
    for update in range(1, updates + 1):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, update / 20, 2.0 * (updates - update + 1) / updates)
        chosen = torch.randint(len(ids), (BATCH,), generator=draw)
        hidden = encoder(input_ids=ids[chosen], attention_mask=mask[chosen]).last_hidden_state
        named = reader(hidden * mask[chosen].unsqueeze(-1))
        loss = nn.functional.cross_entropy(named.flatten(0, 1), ids[chosen].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(update, {"text_loss": float(loss.detach())})
    return encoder.eval().requires_grad_(False)
