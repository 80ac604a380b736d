"""Existing causal students: checkpoints of Self Forcing, CausVid, LongLive and Causal-Forcing as networks of ours.

They hold Wan's original names under the wrappers of their trainers; values are the same as under diffusers' names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import require
from diagonal.jsonfile import read_json
from diagonal.model.architecture import constructor_settings
from diagonal.model.base_model import CONFIG, check_transformer, load_causal
from diagonal.model.dit import CausalWan
from diagonal.model.student_files import FIELD, SHARDED, read_student_file

CONTAINERS = ("generator_ema", "generator", "model")  # in the order in which they are preferred
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("module.", "model.", "generator.", "diffusion_model.", "base_model.", "transformer.")
LORA_CONTAINER = "generator_lora"
SHOWN = 3
_log = logging.getLogger(__name__)

ROOT_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK_NAMES = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in ATTENTION_NAMES.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in ATTENTION_NAMES.items()},
    "norm3": "norm2",  # the one before cross-attention, the only one with weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


def load_initial_student(
    path: str | os.PathLike[str], layout_folder: Path, config: Config, adapters: Sequence[Path] = ()
) -> CausalWan:
    """The network that stage 1 starts from, in float32: a folder with `transformer/`, or a causal student's file.

    A file holds weights alone, so its layout is that of `layout_folder/transformer`. LoRA pairs without a base are
    merged into that one's weights, those of the files `adapters` into the student's. `config.distill.init_weights` says
    which of its weights are taken ('' prefers the averaged, where they are whole). `FieldError` names keys that are
    missing, unexpected or of another shape, and what `read_student_file` refuses.
    """
    file = Path(path)
    if (file / "transformer").is_dir():
        return load_causal(file, config)
    check_transformer(layout_folder, config)
    network, weights, pairs = _opened(file, layout_folder, config)
    if pairs and not weights:
        weights = dict(load_causal(layout_folder, config).state_dict())
    copies = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    merge_lora(copies, pairs, file)
    for adapter in adapters:
        merge_lora(copies, lora_of(adapter), adapter)
    network.load_state_dict(copies, assign=True)
    shape: Any = network.config
    network.rope = WanRotaryPosEmbed(shape.attention_head_dim, tuple(shape.patch_size), shape.rope_max_seq_len)
    return network.eval()


def check_student_file(path: Path, layout_folder: Path, config: Config) -> None:
    """`FieldError` where `load_initial_student` would refuse a file for its names or shapes; no weights are copied."""
    check_transformer(layout_folder, config)
    _opened(path, layout_folder, config)


def _opened(file: Path, layout_folder: Path, config: Config) -> tuple[CausalWan, dict[str, Tensor], dict[str, Tensor]]:
    """A network without memory, the file's tensors for it, checked, and its LoRA pairs; of pairs alone no tensors."""
    held = read_student_file(file)
    layout = constructor_settings(CausalWan, read_json(layout_folder / "transformer" / CONFIG))
    with torch.device("meta"):  # neither memory nor random numbers for weights that are given
        network = CausalWan(**layout)
    own = network.state_dict()
    weights = _weights_of(held, config.distill.init_weights, set(own), file)
    pairs = {name: weights.pop(name) for name in list(weights) if is_lora(name)} or _lora_container(held)
    if weights or not pairs:
        _check_names(file, own, weights)
    return network, weights, pairs


def _weights_of(held: Mapping[str, Any], chosen: str, own: set[str], file: Path) -> dict[str, Tensor]:
    """The generator's tensors under diffusers' names: the chosen container's, else the first whole one's, else all."""
    held = held["state_dict"] if isinstance(held.get("state_dict"), Mapping) else held
    containers = [name for name in CONTAINERS if isinstance(held.get(name), Mapping) and held[name]]
    if not containers:
        require(not chosen, "distill.init_weights", chosen, f"'': {file} holds no weights under such a name")
        return {} if _lora_container(held) else _named(held, file)
    fits = f"one of {containers}, whole in {file}, or ''"
    require(not chosen or chosen in containers, "distill.init_weights", chosen, fits)
    tried = {name: _named(held[name], file) for name in ([chosen] if chosen else containers)}
    whole = next((name for name, weights in tried.items() if own <= weights.keys()), None)
    taken = whole or max(tried, key=lambda name: len(own & tried[name].keys()))
    for name in CONTAINERS[: CONTAINERS.index(taken)]:
        if name in held and not chosen:
            filled = len(own & tried[name].keys()) if name in tried else 0
            _log.warning("%s of %s holds %d of %d tensors: %s is taken", name, file, filled, len(own), taken)
    complete = whole is not None or not chosen
    require(complete, "distill.init_weights", chosen, f"'' or weights that are whole; these lack tensors, in {file}")
    return tried[taken]


def _named(found: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Tensors under diffusers' names; containers inside are opened."""
    flat = dict(_flat(found))
    sharded = any(type(value).__name__ in ("DTensor", "ShardedTensor") for value in flat.values())
    require(not sharded, FIELD, str(file), SHARDED)
    named = {diffusers_name(bare_name(name)): value for name, value in flat.items() if isinstance(value, Tensor)}
    require(len(named) == len(flat) > 0, FIELD, str(file), "tensors alone, each under one name")
    return named


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", part) for inner, part in _flat(value))
        else:
            yield str(name), value


def _lora_container(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """LongLive's own container of LoRA pairs, under diffusers' names."""
    pairs = held.get(LORA_CONTAINER)
    if not isinstance(pairs, Mapping):
        return {}
    return {diffusers_name(bare_name(name)): value for name, value in _flat(pairs) if is_lora(name)}


def lora_of(file: Path) -> dict[str, Tensor]:
    """The LoRA pairs of a file, under diffusers' names; `FieldError` when it holds other tensors, or none."""
    held = read_student_file(file)
    pairs = _lora_container(held) or _named(held, file)
    others = [name for name in pairs if not is_lora(name)]
    require(not others, f"{FIELD}: LoRA", others[:SHOWN], f"LoRA pairs alone, in {file}")
    return pairs


def is_lora(name: str) -> bool:
    return "lora" in name.lower() or name.endswith(".alpha")


def merge_lora(weights: Mapping[str, Tensor], pairs: Mapping[str, Tensor], file: Path) -> None:
    """Add LoRA pairs to the weights that they adapt: weight + alpha/rank * up @ down.

    alpha is the file's own, that of adapter_config.json beside it, or the rank. `FieldError` names a half of a pair.
    """
    beside = file.parent / "adapter_config.json"
    alpha = read_json(beside).get("lora_alpha") if pairs and beside.is_file() else None
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in pairs.items():
        module, kind = _split_lora(name)
        halves.setdefault(module, {})[kind] = value
    for module, parts in halves.items():
        target = f"{module}.weight"
        require({"up", "down"} <= parts.keys(), f"{FIELD}: LoRA of {module}", sorted(parts), f"a pair, in {file}")
        up, down = parts["up"].float(), parts["down"].float()
        fits = target in weights and weights[target].shape == (up.shape[0], down.shape[1])
        require(fits, f"{FIELD}: LoRA of {module}", [*up.shape, *down.shape], f"one of the network's layers, in {file}")
        rank = down.shape[0]
        scale = float(parts["alpha"]) if "alpha" in parts else float(alpha or rank)
        weights[target].add_(scale / rank * (up @ down))


def _split_lora(name: str) -> tuple[str, str]:
    """The layer that a LoRA's tensor adapts, and which half of the pair it is: up, down or alpha."""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    module, _, half = name.partition(".lora_")
    kind = half.partition(".")[0].lower()
    layer = diffusers_name(f"{module}.weight").removesuffix(".weight")
    return layer, {"a": "down", "b": "up"}.get(kind, kind)


def bare_name(name: str) -> str:
    """A tensor's name without what trainers wrapped around its network: FSDP, checkpointing, compilation, wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name.replace(".base_layer.", ".")


def diffusers_name(name: str) -> str:
    """diffusers' name of a tensor that Wan's own code names so; another name stays as it is."""
    table, prefix, rest = ROOT_NAMES, "", name
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, index, rest = name.split(".", 2)
        table, prefix = BLOCK_NAMES, f"blocks.{index}."
    if rest in table:
        return prefix + table[rest]
    module, _, kind = rest.rpartition(".")
    return f"{prefix}{table[module]}.{kind}" if module in table else name


def _check_names(file: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly the network's, by name."""
    fits = f"the tensors of the layout's network, in {file}"
    for problem, names in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        require(not names, f"{FIELD}: {problem} keys", sorted(names)[:SHOWN], f"none: exactly {fits}")
    for name, value in own.items():
        require(
            weights[name].shape == value.shape,
            f"{FIELD}: shape of {name}",
            list(weights[name].shape),
            f"{list(value.shape)}, as {fits}",
        )
