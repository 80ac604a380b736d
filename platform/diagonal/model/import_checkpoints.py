"""Existing causal students: `.pt` checkpoints of Self Forcing, LongLive and Causal-Forcing as networks of ours.

They hold Wan's original names under the wrappers of their trainers; values are the same as under diffusers' names.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from diagonal.config import Config
from diagonal.errors import FieldError, require
from diagonal.jsonfile import read_json
from diagonal.model.architecture import constructor_settings
from diagonal.model.base_model import CONFIG, check_transformer, load_causal
from diagonal.model.dit import CausalWan

FIELD = "distill.init"
CONTAINERS = ("generator_ema", "generator", "model")  # in the order in which they are preferred
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("module.", "model.", "generator.", "diffusion_model.")
SHOWN = 3

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


def load_initial_student(path: str | os.PathLike[str], layout_folder: Path, config: Config) -> CausalWan:
    """The network that stage 1 starts from, in float32: a folder with `transformer/`, or a causal student's `.pt`.

    A `.pt` holds weights alone, so its layout is that of `layout_folder/transformer`. `config.distill.init_weights`
    says which of its weights are taken ('' prefers the averaged). `FieldError` names keys that are missing, unexpected
    or of another shape, a LoRA without its base, and a file that holds pickled code (it is never run).
    """
    file = Path(path)
    if file.is_dir():
        return load_causal(file, config)
    require(file.is_file(), FIELD, str(path), "an existing folder with transformer/, or a .pt file")
    check_transformer(layout_folder, config)
    layout = constructor_settings(CausalWan, read_json(layout_folder / "transformer" / CONFIG))
    with torch.device("meta"):  # neither memory nor random numbers for weights that are given
        network = CausalWan(**layout)
    weights = {diffusers_name(name): value for name, value in read_checkpoint(file, config).items()}
    _check_names(file, network, weights)
    copies = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
    network.load_state_dict(copies, assign=True)
    shape: Any = network.config
    network.rope = WanRotaryPosEmbed(shape.attention_head_dim, tuple(shape.patch_size), shape.rope_max_seq_len)
    return network.eval()


def read_checkpoint(file: Path, config: Config) -> dict[str, Tensor]:
    """The generator's tensors in a `.pt`, under their names without the trainer's wrappers; memory-mapped."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise FieldError(FIELD, str(file), f"a file of tensors alone; pickled code is not run ({reason})") from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise FieldError(FIELD, str(file), f"a file that torch.save wrote, whole ({reason})") from error
    require(isinstance(held, Mapping), FIELD, type(held).__name__, f"a mapping of names to tensors in {file}")
    found = _generator_of(held, config.distill.init_weights, file)
    named = {bare_name(str(name)): value for name, value in found.items() if isinstance(value, Tensor)}
    require(len(named) == len(found), FIELD, str(file), "tensors alone, each under one name")
    return named


def _generator_of(held: Mapping[str, Any], wanted: str, file: Path) -> Mapping[str, Any]:
    """The mapping of the generator's weights: the wanted container's, else the preferred one's, else all."""
    names = [name for name in CONTAINERS if isinstance(held.get(name), Mapping)]
    require(not wanted or wanted in names, "distill.init_weights", wanted, f"'' or one of {names}, as {file} has it")
    found = held[wanted or names[0]] if names else held
    others = [name for name, value in held.items() if isinstance(value, Mapping)] if not names else []
    lora = [str(name) for name in (*found, *others) if "lora" in str(name).lower()]
    require(not lora, FIELD, lora[:SHOWN], f"whole weights; {file} holds a LoRA: merge it into its base model first")
    return found


def bare_name(name: str) -> str:
    """A tensor's name without what trainers wrapped around its network: FSDP, checkpointing, compilation, wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


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


def _check_names(file: Path, network: CausalWan, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly the network's, by name."""
    own = network.state_dict()
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
