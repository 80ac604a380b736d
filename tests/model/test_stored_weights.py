"""Weights held to their config, by their headers and as they are loaded: nothing is drawn at random in silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diagonal.errors import FieldError
from diagonal.model.base_model import load_causal, load_teacher, load_text, save_transformer
from diagonal.model.import_checkpoints import load_initial_student
from diagonal.model.stored_weights import check_weights
from diagonal.storage import Folder
from tests.model.folders import TRANSFORMER, edit_json
from tests.networks import small_config, small_vae

State = dict[str, Tensor]
TEXT = "text_encoder/model.safetensors"
BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


def edit_weights(path: Path, change: Callable[[State], State]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {new if key == old else key: value for key, value in state.items()}


def holding(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("layers", "change", "said"),
    [
        (3, None, r"missing_keys = \['encoder.block.2"),
        (1, None, r"unexpected_keys = \['encoder.block.1"),
        (2, without(BIAS), rf"missing_keys = \['{BIAS}'\]"),
        (2, holding("encoder.extra.weight", 3), r"unexpected_keys = \['encoder.extra.weight'\]"),
        (2, holding("encoder.final_layer_norm.weight", 3), r"mismatched_keys = .*encoder.final_layer_norm.weight"),
        (2, without("shared.weight"), r"missing_keys = .*(shared|embed_tokens)"),
    ],
    ids="one-layer-more one-layer-fewer no-bias an-extra-tensor another-size no-embedding".split(),
)
def test_a_text_encoder_that_its_weights_do_not_fill_is_refused_by_name(
    layers: int, change: Callable[[State], State] | None, said: str, base: Path
) -> None:
    edit_json(base / "text_encoder/config.json", num_layers=layers)
    if change:
        edit_weights(base / TEXT, change)
    with pytest.raises(FieldError, match=f"text_encoder {said}"):
        load_text(base, small_config())
    with pytest.raises(FieldError, match=f"text_encoder {said}"):
        check_weights(Folder(str(base)), "text_encoder")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [None, renamed("shared.weight", "encoder.embed_tokens.weight")])
@pytest.mark.parametrize("model_type", ["umt5", "t5"])
def test_a_text_encoder_is_read_the_same_under_each_name_it_is_handed_on_with(
    tied: bool, change: Callable[[State], State] | None, model_type: str, base: Path
) -> None:
    expected = load_text(base, small_config()).encode(["a red circle"])
    edit_json(base / "text_encoder/config.json", tie_word_embeddings=tied, model_type=model_type)
    if change:
        edit_weights(base / TEXT, change)
    check_weights(Folder(str(base)), "text_encoder")
    assert torch.equal(load_text(base, small_config()).encode(["a red circle"]), expected)


@pytest.mark.parametrize(
    ("part", "file", "change", "said"),
    [
        ("transformer", TRANSFORMER, without("proj_out.bias"), r"transformer missing_keys = \['proj_out.bias'\]"),
        ("transformer", TRANSFORMER, holding("proj_out.bias", 3), "transformer mismatched_keys = .*proj_out.bias"),
        ("vae", "vae/diffusion_pytorch_model.safetensors", without("basis"), r"vae missing_keys = \['basis'\]"),
    ],
)
def test_other_parts_are_held_to_their_config_alike(
    part: str, file: str, change: Callable[[State], State], said: str, base: Path
) -> None:
    edit_weights(base / file, change)
    with pytest.raises(FieldError, match=said):
        check_weights(Folder(str(base)), part)


def test_a_convolutional_codec_is_held_to_its_config_too(base: Path) -> None:
    small_vae().save_pretrained(base / "vae")
    check_weights(Folder(str(base)), "vae")
    edit_json(base / "vae/config.json", num_res_blocks=2)
    with pytest.raises(FieldError, match="vae missing_keys"):
        check_weights(Folder(str(base)), "vae")


@pytest.mark.parametrize("damage", ["pointer", "half", "empty"])
@pytest.mark.parametrize("file", [TRANSFORMER, TEXT])
def test_a_file_that_is_not_whole_is_named_before_anything_is_read(damage: str, file: str, base: Path) -> None:
    path = base / file
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5678\n"
    path.write_bytes({"pointer": pointer, "half": path.read_bytes()[:3000], "empty": b""}[damage])
    said = rf"{path.parent.name} weights = '.*{path.parent.name}.*': allowed is .*safetensors"
    with pytest.raises(FieldError, match=said):
        check_weights(Folder(str(base)), path.parent.name)
    with pytest.raises(FieldError, match=said):
        (load_text if file == TEXT else load_teacher)(base, small_config())


def test_entries_that_no_constructor_takes_are_named_once_and_left_out(base: Path, tmp_path: Path) -> None:
    config = small_config()
    expected = load_causal(base, config).state_dict()
    edit_json(base / "transformer/config.json", model_type="t2v", text_len=512)
    with pytest.warns(UserWarning, match="transformer/config.json: .* takes no model_type, text_len: ignored"):
        check_weights(Folder(str(base)), "transformer")
    network = load_causal(base, config)
    save_transformer(tmp_path / "saved", network.config, network.state_dict(), torch.float32)
    assert "text_len" not in (tmp_path / "saved/transformer/config.json").read_text()
    torch.save({"generator": expected}, tmp_path / "student.pt")
    student = load_initial_student(tmp_path / "student.pt", base, config)
    for state in (load_teacher(tmp_path / "saved", config).state_dict(), student.state_dict()):
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(base: Path) -> None:
    network = load_teacher(base, small_config())
    shutil.rmtree(base / "transformer")
    network.save_pretrained(base / "transformer", max_shard_size="20KB")
    check_weights(Folder(str(base)), "transformer")
    shards = sorted((base / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    for check in (lambda: check_weights(Folder(str(base)), "transformer"), lambda: load_causal(base, small_config())):
        with pytest.raises(FieldError, match=shards[0].name):
            check()
