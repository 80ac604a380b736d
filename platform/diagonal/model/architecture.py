"""Sizes of a Wan transformer read from its config.json: widths, and parameters of its parts, without weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from diagonal.errors import FieldError, require

NAMES = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "ffn_dim": "ffn_dim",
    "text_dim": "text_dim",
    "frequency_dim": "freq_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch": "patch_size",
}


def constructor_settings(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a network's config that the constructor of its class takes; a library ignores others as well."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in config.items() if name in names}


def warn_of_unknown_settings(kind: type, config: Mapping[str, Any], source: str) -> None:
    """One line that names the entries of a network's config that nobody reads; Python shows it once a process."""
    unknown = sorted({name for name in config if not name.startswith("_")} - constructor_settings(kind, config).keys())
    if unknown:
        warnings.warn(f"{source}: {kind.__name__} takes no {', '.join(unknown)}: ignored", stacklevel=2)


@dataclass(frozen=True)
class TransformerLayout:
    """The numbers of diffusers' `WanTransformer3DModel` config that decide its parameters, memory and FLOPs."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    frequency_dim: int
    in_channels: int
    out_channels: int
    patch: tuple[int, ...]
    cross_norm: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TransformerLayout:
        """From the mapping in `transformer/config.json` (a network's `.config` too); `FieldError` names what lacks."""
        for name in NAMES.values():
            if name not in config:
                raise FieldError(f"transformer.{name}", None, "given in transformer/config.json")
        require(config.get("image_dim") is None, "transformer.image_dim", config.get("image_dim"), "null")
        numbers: dict[str, Any] = {field: config[name] for field, name in NAMES.items()}
        numbers["patch"] = tuple(numbers["patch"])
        return cls(**numbers, cross_norm=bool(config.get("cross_attn_norm", True)))

    @property
    def hidden(self) -> int:
        """Width of a token (1536 of Wan 1.3B, 5120 of 14B)."""
        return self.heads * self.head_dim

    @property
    def patch_values(self) -> int:
        """Values of a channel that one token stands for (4)."""
        return prod(self.patch)

    @property
    def block_parameters(self) -> int:
        """Two attentions of four products and two norms, the affine norm, the feed-forward, the modulation table."""
        n, f = self.hidden, self.ffn_dim
        attention = 4 * (n * n + n) + 2 * n
        return 2 * attention + self._cross_norm_parameters + (n * f + f) + (f * n + n) + 6 * n

    @property
    def block_float32_parameters(self) -> int:
        """Of those, what Wan keeps in float32: modulation table and affine norm."""
        return 6 * self.hidden + self._cross_norm_parameters

    @property
    def root_parameters(self) -> int:
        """Patch and text embedding, time embedding and projection, output."""
        n = self.hidden
        patch = self.in_channels * self.patch_values * n + n
        text = self.text_dim * n + n + n * n + n
        output = n * self.out_channels * self.patch_values + self.out_channels * self.patch_values + 2 * n
        return patch + text + self._time_parameters + (n * 6 * n + 6 * n) + output

    @property
    def root_float32_parameters(self) -> int:
        """Of those, what Wan keeps in float32: the time embedding and the output's modulation table."""
        return self._time_parameters + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All (1.419e9 of Wan 1.3B)."""
        return self.layers * self.block_parameters + self.root_parameters

    def stored_bytes(self, compute_bytes: int) -> int:
        """Weights of a frozen network: `compute_bytes` each, 4 where Wan keeps float32."""
        kept = self.layers * self.block_float32_parameters + self.root_float32_parameters
        return compute_bytes * (self.parameters - kept) + 4 * kept

    @property
    def _time_parameters(self) -> int:
        n = self.hidden
        return self.frequency_dim * n + n + n * n + n

    @property
    def _cross_norm_parameters(self) -> int:
        return 2 * self.hidden if self.cross_norm else 0
