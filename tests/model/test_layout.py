"""Parameters counted from a configuration are those of diffusers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from diagonal.errors import FieldError
from diagonal.model.architecture import TransformerLayout
from tests.networks import WAN_1_3B, WAN_14B, small_wan

ODD = {
    **WAN_1_3B,
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "in_channels": 5,
    "out_channels": 7,
    "text_dim": 11,
    "freq_dim": 14,
    "ffn_dim": 13,
    "num_layers": 2,
    "patch_size": [1, 3, 2],
}


def on_meta(layout: dict[str, Any]) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**layout)


@pytest.mark.parametrize("layout", [WAN_1_3B, WAN_14B, ODD, {**ODD, "cross_attn_norm": False}])
def test_parameters_are_those_of_diffusers_modules_by_part_and_precision(layout: dict[str, Any]) -> None:
    network, counted = on_meta(layout), TransformerLayout.of(layout)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    kept = {name for name in sizes if not set(name.split(".")).isdisjoint(network._keep_in_fp32_modules)}
    block = {name for name in sizes if name.startswith("blocks.0.")}
    root = {name for name in sizes if not name.startswith("blocks.")}
    assert counted.parameters == sum(sizes.values())
    assert counted.block_parameters == sum(sizes[name] for name in block)
    assert counted.root_parameters == sum(sizes[name] for name in root)
    assert counted.block_float32_parameters == sum(sizes[name] for name in block & kept)
    assert counted.root_float32_parameters == sum(sizes[name] for name in root & kept)
    assert counted.stored_bytes(2) == sum(size * (4 if name in kept else 2) for name, size in sizes.items())


def test_wans_two_sizes_are_the_published_ones() -> None:
    assert TransformerLayout.of(WAN_1_3B).parameters == pytest.approx(1.419e9, rel=1e-3)
    assert TransformerLayout.of(WAN_1_3B).hidden == 1536
    assert TransformerLayout.of(WAN_14B).parameters == pytest.approx(14.29e9, rel=1e-3)


def test_a_networks_own_config_serves_and_one_that_lacks_a_number_is_refused_by_name() -> None:
    assert TransformerLayout.of(small_wan().config).layers == 2
    with pytest.raises(FieldError, match="transformer.ffn_dim"):
        TransformerLayout.of({name: value for name, value in WAN_1_3B.items() if name != "ffn_dim"})
