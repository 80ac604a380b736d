"""Every format in which students are handed on, written by the libraries that write it, is read or refused in words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint

from diagonal.errors import FieldError
from diagonal.jsonfile import write_json
from diagonal.model.import_checkpoints import load_initial_student
from tests.model.test_import_checkpoints import CONFIG, expected, output, saved, wan_name, written
from tests.networks import roughen, small_config, small_wan

RANK, ALPHA = 2, 6


def safetensors(folder: Path) -> Path:
    save_file(written(5), folder / "student.safetensors")
    return folder / "student.safetensors"


def sharded(folder: Path) -> Path:
    (folder / "shards").mkdir()
    save_torch_state_dict(written(5), folder / "shards", max_shard_size="40KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return folder / "shards"


def sharded_torch(folder: Path) -> Path:
    weights, places = written(5), dict[str, str]()
    for number, names in enumerate((list(weights)[:7], list(weights)[7:])):
        torch.save({name: weights[name] for name in names}, folder / f"s-{number}.bin")
        places |= dict.fromkeys(names, f"s-{number}.bin")
    write_json(folder / "s.bin.index.json", {"weight_map": places})
    return folder / "s.bin.index.json"


def legacy(folder: Path) -> Path:
    torch.save({"generator": written(5)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def renamed(folder: Path) -> Path:
    return saved(folder, {"generator": written(5)}).rename(folder / "student.ckpt")


def nested(folder: Path) -> Path:
    return saved(folder, {"generator": {"module": written(5)}, "step": 3})


def lightning(folder: Path) -> Path:
    return saved(folder, {"state_dict": {"generator": written(5)}, "epoch": 1})


FORMATS = [safetensors, sharded, sharded_torch, legacy, renamed, nested, lightning]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_student_of_each_format_computes_what_diffusers_network_does(
    write: Callable[[Path], Path], base: Path, tmp_path: Path
) -> None:
    assert torch.equal(output(load_initial_student(write(tmp_path), base, CONFIG)), expected(5))


@pytest.mark.parametrize("average", [None, {}, dict(list(written(6).items())[:9])], ids=["none", "empty", "half"])
def test_an_average_that_is_not_whole_is_named_and_the_generator_taken(
    average: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path, {"generator": written(5), "generator_ema": average})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(output(load_initial_student(file, base, CONFIG)), expected(5))
    assert f"generator_ema of {file} holds {len(average or ())} of" in caplog.text
    with pytest.raises(FieldError, match="distill.init_weights = 'generator_ema'"):
        load_initial_student(file, base, small_config("distill.init_weights=generator_ema"))


def adapted() -> tuple[Any, dict[str, Tensor]]:
    """A network with peft's LoRA on it, and what peft saves of that."""
    layout = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v", "ffn.net.0.proj", "proj_out"])
    model = get_peft_model(small_wan(5), layout)
    roughen(model, 9)
    return model, get_peft_model_state_dict(model)


def theirs(pairs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pairs under the names that a network with Wan's own modules has."""
    return {f"base_model.model.{wan_name(name.removeprefix('base_model.model.'))}": v for name, v in pairs.items()}


def merged(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kind", ["container", "whole file", "beside its base", "own file"])
def test_lora_pairs_are_merged_as_peft_merges_them(kind: str, base: Path, tmp_path: Path) -> None:
    model, pairs = adapted()
    alpha = {f"{name.rpartition('.lora_A')[0]}.alpha": torch.tensor(float(ALPHA)) for name in pairs if "lora_A" in name}
    frozen = {n: v for n, v in model.state_dict().items() if "lora" not in n}
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v.clone() for n, v in frozen.items()}
    adapters: list[Path] = []
    if kind == "beside its base":
        file = saved(tmp_path, {"generator": {**frozen, **pairs, **alpha}})
    elif kind == "own file":
        file = saved(tmp_path, {"generator": {f"model.{wan_name(n)}": v for n, v in plain.items()}})
        adapters = [tmp_path / "lora.pt"]
        torch.save({"generator_lora": theirs(pairs), "critic_lora": {}}, adapters[0])
        write_json(tmp_path / "adapter_config.json", {"lora_alpha": ALPHA})
    else:
        save_file(plain, base / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        named = {**theirs(pairs), **theirs(alpha)}
        file = saved(tmp_path, {"generator_lora": named} if kind == "container" else named)
    found, wanted = load_initial_student(file, base, CONFIG, adapters).state_dict(), merged(model)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())
    assert not torch.allclose(found["blocks.0.attn1.to_q.weight"], plain["blocks.0.attn1.to_q.weight"], atol=1e-2)


def test_a_lora_without_a_scale_has_that_of_its_rank(base: Path, tmp_path: Path) -> None:
    name, up, down = "blocks.0.self_attn.q", torch.ones(32, 2), torch.ones(2, 32)
    file = saved(tmp_path, {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down})
    before = load_initial_student(base, base, CONFIG).state_dict()["blocks.0.attn1.to_q.weight"]
    after = load_initial_student(file, base, CONFIG).state_dict()["blocks.0.attn1.to_q.weight"]
    assert torch.allclose(after - before, torch.full((32, 32), 2.0), atol=1e-5)


def distributed(folder: Path) -> Path:
    checkpoint.save({"generator": written(5)}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def dtensor(folder: Path) -> Path:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        shards = {n: torch.distributed.tensor.distribute_tensor(v, mesh) for n, v in written(5).items()}
        return saved(folder, {"generator": shards})
    finally:
        torch.distributed.destroy_process_group()


def pointer(folder: Path) -> Path:
    (folder / "p.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return folder / "p.pt"


def page(folder: Path) -> Path:
    (folder / "p.safetensors").write_text("<!DOCTYPE html><html></html>")
    return folder / "p.safetensors"


def half(folder: Path) -> Path:
    file = safetensors(folder)
    file.write_bytes(file.read_bytes()[:2000])
    return file


def lacking(folder: Path) -> Path:
    next(sharded(folder).glob("*00002*.safetensors")).unlink()
    return folder / "shards"


REFUSED: dict[Callable[[Path], Path], str] = {
    distributed: "dcp_to_torch",
    dtensor: "DTensor or ShardedTensor shards of one process",
    pointer: "Git LFS pointer",
    page: "a web page",
    half: "a whole .safetensors file",
    lacking: "missing shards",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_holds_no_whole_tensors_is_refused_in_words(
    write: Callable[[Path], Path], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(FieldError, match=REFUSED[write]) as refusal:
        load_initial_student(write(tmp_path), base, CONFIG)
    assert "\n" not in str(refusal.value)
