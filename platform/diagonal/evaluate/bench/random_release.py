"""A release of random weights at a preset's real shapes, held in memory: speed needs no trained ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.evaluate.bench.training import WAN_LAYOUT
from diagonal.jsonfile import read_json
from diagonal.model.base_model import embedded
from diagonal.model.dit import CausalWan
from diagonal.model.fast_decoder import FastDecoder, StreamingFastDecoder
from diagonal.model.fp8 import use_fp8_linears
from diagonal.model.vae import Decoder, decoder_of, laid_out

UMT5_XXL = {  # text_encoder/config.json of Wan2.1
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "dropout_rate": 0.0,
}
PROMPT_TOKENS = 120  # of an extended prompt; the rest of the encoder's positions is padding


class RandomText:
    """A umT5 encoder of random weights; a prompt's tokens are drawn from its own bytes, as no tokenizer is at hand."""

    def __init__(self, encoder: UMT5EncoderModel, text_tokens: int) -> None:
        self._encoder, self._text_tokens = encoder, text_tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[len(prompts), text_tokens, text_dim]` in float32, zero past the prompt's end."""
        device, shape = next(self._encoder.parameters()).device, (1, self._text_tokens)
        drawn = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        ids = torch.cat([torch.randint(3, self._encoder.config.vocab_size, shape, generator=draw) for draw in drawn])
        mask = (torch.arange(self._text_tokens) < PROMPT_TOKENS).long().expand_as(ids).to(device)
        hidden = self._encoder(input_ids=ids.to(device), attention_mask=mask).last_hidden_state
        return hidden.float() * mask.unsqueeze(-1)


@dataclass(frozen=True)
class RandomRelease:
    """What an engine asks of a `Release`. Each part is built once, on `device`, when it is first asked for."""

    config: Config
    device: torch.device
    name: str = "random"
    manifest: Mapping[str, Any] = field(default_factory=lambda: {"files": {}})

    @property
    def embedded(self) -> bool:
        """Whether the shapes are the embedded model's own."""
        return self.config.preset == "tiny"

    @cached_property
    def layout(self) -> dict[str, Any]:
        """The transformer's `config.json`."""
        found = read_json(embedded("base") / "transformer" / "config.json") if self.embedded else dict(WAN_LAYOUT)
        return {name: value for name, value in found.items() if not name.startswith("_")}

    @cached_property
    def _network(self) -> CausalWan:
        network = self._drawn(lambda: CausalWan(**self.layout))
        kept = tuple(CausalWan._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            if not any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.to(self.dtype)
        network.fuse()
        if self.config.serve.linear_dtype == "fp8":
            use_fp8_linears(network, network.blocks)
        return network

    @cached_property
    def _text(self) -> RandomText:
        layout = dict(UMT5_XXL)
        if self.embedded:
            layout = {
                "vocab_size": 64,
                "d_model": self.layout["text_dim"],
                "d_kv": 16,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 4,
                "dropout_rate": 0.0,
            }
        encoder = self._drawn(lambda: UMT5EncoderModel(UMT5Config(**layout))).to(self.dtype)
        return RandomText(encoder, self.config.model.text_tokens)

    @cached_property
    def _decoder(self) -> Decoder:
        return self._drawn_decoder(self._drawn)

    def _drawn_decoder(self, drawn: Callable[[Callable[[], Any]], Any]) -> Decoder:
        geometry, serve, layout = self.config.geometry, self.config.serve, self.config.serve.decoder_layout
        if serve.decoder == "fast":
            chosen = self.config.decoder
            sizes = geometry.latent_channels, geometry.temporal_stride, geometry.spatial_stride
            fast = drawn(lambda: FastDecoder(*sizes, chosen.widths, chosen.blocks))
            return StreamingFastDecoder(laid_out(fast.to(self.dtype), layout))
        found = read_json(embedded("base") / "vae" / "config.json") if self.embedded else {}
        named = {name: value for name, value in found.items() if not name.startswith("_")}
        return decoder_of(laid_out(drawn(lambda: AutoencoderKLWan(**named)).to(self.dtype), layout))

    def under(self, settings: Sequence[str]) -> RandomRelease:
        """The same networks, built once, under other settings of the engine."""
        other = RandomRelease(self.config.with_settings(settings), self.device)
        vars(other).update(_network=self._network, _text=self._text, _decoder=self._decoder)
        return other

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.model.compute_dtype == "bfloat16" else torch.float32

    def _drawn(self, build: Callable[[], Any]) -> Any:
        """Random weights, drawn on the device by a seed; not trainable."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            module: nn.Module = build()
        return module.eval().requires_grad_(False)

    def generator(self, device: torch.device | str = "cpu") -> CausalWan:
        return self._network

    def text(self, device: torch.device | str = "cpu") -> RandomText:
        return self._text

    def decoder(self, device: torch.device | str = "cpu") -> Decoder:
        return self._decoder

    def text_flops(self) -> int:
        """Operations of encoding one prompt by umT5-XXL: four projections, a gated feed-forward, attention."""
        n, inner = UMT5_XXL["d_model"], UMT5_XXL["num_heads"] * UMT5_XXL["d_kv"]
        tokens, layers = self.config.model.text_tokens, UMT5_XXL["num_layers"]
        products = 2 * (4 * n * inner + 3 * n * UMT5_XXL["d_ff"]) * tokens
        return int(layers * (products + 4 * tokens * tokens * inner))

    def decode_flops(self) -> list[int]:
        """Operations of decoding a stream's first and second chunk, counted on tensors without memory."""

        def on_meta(build: Callable[[], Any]) -> Any:
            with torch.device("meta"):
                return build().eval().requires_grad_(False)

        counted = []
        with torch.device("meta"):
            decoder = self._drawn_decoder(on_meta)
            state = decoder.start()
            for _ in range(2):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    decoder.decode(torch.empty(self.config.geometry.chunk_shape()), state)
                counted.append(int(counter.get_total_flops()))
        return counted
