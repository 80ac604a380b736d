"""Checkpoints of existing causal students, small and under their own names, become our network or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from diagonal.errors import FieldError
from diagonal.model.base_model import load_causal
from diagonal.model.dit import CausalWan
from diagonal.model.import_checkpoints import bare_name, diffusers_name, load_initial_student
from tests.networks import draw, small_config, small_wan

CONFIG = small_config()
# A name by which each public repository's trainer writes a tensor of Wan's own name.
LAYOUTS: dict[str, Callable[[str], str]] = {
    "self-forcing": lambda name: f"model.{name}",
    "self-forcing under FSDP": lambda name: f"model._fsdp_wrapped_module.{wrapped(name, '_fsdp_wrapped_module')}",
    "longlive": lambda name: f"model.{wrapped(name, '_checkpoint_wrapped_module')}",
    "causal-forcing": lambda name: f"module.model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "plain": lambda name: name,
}


def wrapped(name: str, wrapper: str) -> str:
    """The name where every block stands in a wrapper of that name."""
    head, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    return f"blocks.{index}.{wrapper}.{tail}" if head == "blocks" else name


def wan_name(name: str) -> str:
    """Wan's own name of a tensor that diffusers names so: written out apart from the code under test."""
    for ours, theirs in (
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (".to_q", ".q"),
        (".to_k", ".k"),
        (".to_v", ".v"),
        (".to_out.0", ".o"),
        ("norm2", "norm3"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    ):
        name = name.replace(ours, theirs)
    table = "modulation" if name.startswith("blocks") else "head.modulation"
    return name.replace("scale_shift_table", table)


def written(seed: int, layout: Callable[[str], str] = LAYOUTS["self-forcing"]) -> dict[str, Tensor]:
    """The tensors of a small network under the names of one of those trainers."""
    return {layout(wan_name(name)): value for name, value in small_wan(seed).state_dict().items()}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "student.pt")
    return folder / "student.pt"


def output(network: CausalWan) -> Tensor:
    x, text = draw(*CONFIG.geometry.frames_shape(6)), draw(1, 6, 16)
    with torch.no_grad():
        return network(x, torch.full((1, 6), 0.625), text)


def expected(seed: int) -> Tensor:
    network = CausalWan(**{k: v for k, v in small_wan(seed).config.items() if not k.startswith("_")})
    network.load_state_dict(small_wan(seed).state_dict())
    return output(network.eval())


def test_the_names_are_those_that_diffusers_converts() -> None:
    theirs = convert_wan_transformer_to_diffusers(written(0, LAYOUTS["plain"]))
    own = small_wan().state_dict()
    assert theirs.keys() == own.keys() == {diffusers_name(wan_name(name)) for name in own}
    assert all(theirs[diffusers_name(wan_name(name))] is not None for name in own)
    for name, value in written(0, LAYOUTS["plain"]).items():
        assert torch.equal(theirs[diffusers_name(name)], value), name


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("container", ["generator", "generator_ema", "model", None])
def test_a_student_of_each_layout_computes_what_diffusers_network_does(
    layout: str, container: str | None, base: Path, tmp_path: Path
) -> None:
    weights = written(5, LAYOUTS[layout])
    file = saved(tmp_path, weights if container is None else {container: weights, "step": 3})
    network = load_initial_student(file, base, CONFIG)
    assert isinstance(network, CausalWan) and not network.training
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in network.state_dict().values())
    assert torch.equal(output(network), expected(5))
    assert not torch.equal(output(network), expected(0))


@pytest.mark.parametrize(("chosen", "seed"), [("", 2), ("generator_ema", 2), ("generator", 1)])
def test_the_configuration_says_which_weights_are_taken(chosen: str, seed: int, base: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, {"generator": written(1), "generator_ema": written(2)})
    config = small_config(f'distill.init_weights="{chosen}"')
    assert torch.equal(output(load_initial_student(file, base, config)), expected(seed))


def test_weights_in_bfloat16_are_widened_and_a_folder_is_loaded_as_it_is(base: Path, tmp_path: Path) -> None:
    narrow = {name: value.bfloat16() for name, value in written(5).items()}
    network = load_initial_student(saved(tmp_path, {"generator": narrow}), base, CONFIG)
    state = {name: value.bfloat16().float() for name, value in small_wan(5).state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(output(load_initial_student(base, base, CONFIG)), output(load_causal(base, CONFIG)))


def test_training_the_student_leaves_its_file_as_it_was(base: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, {"generator": written(5)})
    before = file.read_bytes()
    with torch.no_grad():
        for parameter in load_initial_student(file, base, CONFIG).parameters():
            parameter.zero_()
    assert file.read_bytes() == before and torch.equal(output(load_initial_student(file, base, CONFIG)), expected(5))


KEY = "model.blocks.1.self_attn.q.weight"


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": without(written(0), KEY)}, r"missing keys = \['blocks.1.attn1.to_q.weight'\]"),
        ({"generator": {**written(0), "model.extra.weight": torch.zeros(1)}}, r"unexpected keys = \['extra.weight'\]"),
        ({"generator": {**written(0), KEY: torch.zeros(3, 2)}}, r"shape of blocks.1.attn1.to_q.weight = \[3, 2\]"),
        ({"generator_lora": {"model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}}, "allowed is a pair"),
        (
            {"generator": {**written(0), "model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(2)}},
            "allowed is a pair",
        ),
        ({"optimizer": 3}, "tensors alone"),
        ([1, 2], "mapping of names"),
        ({"generator": {**written(0), "module." + KEY: torch.zeros(1)}}, "each under one name"),
    ],
    ids=["missing", "unexpected", "shape", "lora alone", "lora beside", "no tensors", "no map", "twice"],
)
def test_what_is_not_the_networks_weights_is_refused_by_name(
    content: Any, message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(FieldError, match=message):
        load_initial_student(saved(tmp_path, content), base, CONFIG)


class Harm:
    """What a hostile file would run when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.place,))  # type: ignore[return-value]


def test_pickled_code_is_refused_and_never_run(base: Path, tmp_path: Path) -> None:
    place = tmp_path / "ran"
    with pytest.raises(FieldError, match="pickled code is not run"):
        load_initial_student(saved(tmp_path, {"generator": written(0), "hook": Harm(place)}), base, CONFIG)
    assert not place.exists()


def test_a_file_that_is_missing_cut_off_or_without_the_asked_weights_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="existing folder with transformer/, or a .pt"):
        load_initial_student(tmp_path / "none.pt", base, CONFIG)
    file = saved(tmp_path, {"generator": written(0)})
    with pytest.raises(FieldError, match=r"distill.init_weights = 'generator_ema': .*\['generator'\]"):
        load_initial_student(file, base, small_config("distill.init_weights=generator_ema"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FieldError, match="whole"):
        load_initial_student(file, base, CONFIG)


def test_wrappers_are_taken_off_wherever_they_stand() -> None:
    inner = "blocks.3._checkpoint_wrapped_module.norm3.bias"
    for name in (f"generator.model._fsdp_wrapped_module.{inner}", f"_orig_mod.{inner}", "blocks.3.norm3.bias"):
        assert bare_name(name) == "blocks.3.norm3.bias"
    assert diffusers_name("blocks.3.norm3.bias") == "blocks.3.norm2.bias"
    assert diffusers_name("head.modulation") == "scale_shift_table"
    assert diffusers_name("blocks.0.modulation") == "blocks.0.scale_shift_table"
