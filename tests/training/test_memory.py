"""The memory estimate against live tensors of real updates, at real sizes with tensors that hold no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import UMT5Config, UMT5EncoderModel

from diagonal.config import Config
from diagonal.errors import FieldError
from diagonal.jsonfile import read_json
from diagonal.model import attention
from diagonal.model.architecture import TransformerLayout
from diagonal.model.attention import stage0_mask
from diagonal.model.base_model import embedded, load_causal, load_teacher
from diagonal.model.cache import new_pool
from diagonal.model.dit import CausalWan
from diagonal.training import distill
from diagonal.training.distill import Networks, PromptBatch, critic_loss, generator_loss
from diagonal.training.memory import (
    CONTEXT_BYTES,
    MemoryEstimate,
    _codec_bytes,
    _Place,
    _text_parameters,
    check,
    estimate,
)
from diagonal.training.ode_init import PairBatch, ode_loss
from diagonal.training.parallel import ParallelPlan, Precision, parallelize
from tests.networks import WAN_1_3B, WAN_14B, small_causal, small_config
from tests.training.live_bytes import LiveBytes

TOLERANCE = 0.13
TINY_TOLERANCE = 0.15
ALONE = ("distill.batch_size=1", "ode_init.batch_size=1", "train.workers=1")  # no gradients of earlier micro-batches
UMT5_XXL = {
    "d_model": 4096,
    "num_heads": 64,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "vocab_size": 256384,
    "relative_attention_num_buckets": 32,
}
WAN_VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_dim": 16,
    "temperal_downsample": [False, True, True],
}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel with gradients too, and exit steps that no tensor decides (fake tensors hold no numbers)."""
    monkeypatch.setattr(attention, "_attend", torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(distill, "draw_exit_steps", lambda schedule, chunks, *key: [0] * len(chunks))


def config_of(*settings: str) -> Config:
    return Config.from_preset("wan-1.3b", (*ALONE, *settings))


def networks_of(config: Config, layout: dict[str, Any], teacher: dict[str, Any]) -> Networks:
    plan = ParallelPlan(Precision(config.model.compute_dtype), config.train.checkpoint_activations)
    generator: Any = CausalWan(**layout)
    critic, frozen = WanTransformer3DModel(**layout), WanTransformer3DModel(**teacher)
    for part, trainable in ((generator, True), (critic, True), (frozen, False)):
        parallelize(part.eval(), part.blocks, None, plan, trainable=trainable)
    text = torch.zeros(config.distill.micro_batch_size, config.model.text_tokens, layout["text_dim"])
    return Networks(generator, critic, frozen, text[:1])


def scalar(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def measure(networks: Networks, config: Config, text: Tensor) -> dict[str, int]:
    """The most bytes, beyond weights, of a generator's update, a critic's and one of stage 0."""
    everything: list[nn.Module] = [networks.generator, networks.critic, networks.teacher]
    batch = PromptBatch(text, list(range(len(text))))
    peaks = {}
    with LiveBytes(p for network in everything for p in network.parameters()) as live:
        loss = scalar(generator_loss(networks, config, batch, 0, 1))
        peaks["kept for backward"] = live.now - live.start
        loss.backward()
        del loss
        networks.generator.zero_grad()
        peaks["generator"] = live.peak_since_start()
        scalar(critic_loss(networks, config, batch, 0, 1)).backward()
        networks.critic.zero_grad()
        peaks["critic"] = live.peak_since_start()
        levels = torch.linspace(1, 0, 6)
        pairs = PairBatch(torch.zeros(len(text), 6, *config.geometry.clip_shape()[1:]), levels, text, batch.samples)
        live.start = live.now
        scalar(ode_loss(networks.generator, config, pairs, stage0_mask(config))).backward()
        peaks["stage 0"] = live.peak_since_start()
    return peaks


def estimated(config: Config, layout: dict[str, Any], teacher: dict[str, Any]) -> dict[str, int]:
    """The same from the formulas: the phases of each update without what is resident, allowances and margin."""
    first, zero = (estimate(config, layout, teacher, 1, stage) for stage in (1, 0))
    phases = dict(working(first))
    scores = phase_lines(config, layout, "scores")
    return {
        "kept for backward": sum(size for name, size in scores if name.endswith("kept for backward")),
        "generator": max(phases[name] for name in ("rollout", "scores", "generator backward")),
        "critic": max(phases[name] for name in ("critic rollout", "critic backward")),
        "stage 0": dict(working(zero))["backward"],
    }


def working(found: MemoryEstimate) -> list[tuple[str, int]]:
    resident = sum(size for name, size in found.lines if name.endswith((", float32", "moments", "average")))
    resident += dict(found.lines).get("teacher weights", 0)
    return [
        (name, round((total - dict(found.lines)["CUDA context, cuBLAS, NCCL"]) / 1.06) - resident)
        for name, total in found.phases
    ]


TWO = ("distill.micro_batch_size=2", "distill.batch_size=2", "ode_init.micro_batch_size=2", "ode_init.batch_size=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "settings"),
    [
        pytest.param(WAN_14B, (), id="14B teacher", marks=pytest.mark.nightly),
        pytest.param(WAN_1_3B, TWO, id="two samples", marks=pytest.mark.nightly),
        pytest.param(WAN_1_3B, ("model.compute_dtype=float32", "cache.window_frames=21"), id="float32"),
        pytest.param(
            WAN_1_3B, ("train.checkpoint_activations=false",), id="everything saved", marks=pytest.mark.nightly
        ),
    ],
)
def test_the_formulas_are_the_live_tensors_of_updates_at_832x480(
    teacher: dict[str, Any], settings: tuple[str, ...], as_on_cuda: None
) -> None:
    config = config_of(*settings)
    layout, teacher = {**WAN_1_3B, "num_layers": 2}, {**teacher, "num_layers": 1}
    with FakeTensorMode():
        networks = networks_of(config, layout, teacher)
        text = torch.zeros(config.distill.micro_batch_size, config.model.text_tokens, layout["text_dim"])
        found = measure(networks, config, text)
    for name, size in estimated(config, layout, teacher).items():
        assert size == pytest.approx(found[name], rel=TOLERANCE), f"{name}: {size / found[name]:.3f}"


@pytest.mark.slow
def test_the_formulas_are_the_live_tensors_of_the_tiny_presets_real_updates(as_on_cuda: None) -> None:
    settings = (
        *ALONE,
        "distill.batch_size=4",
        "distill.micro_batch_size=4",
        "ode_init.batch_size=4",
        "ode_init.micro_batch_size=4",
        "train.checkpoint_activations=true",
    )
    config, folder = Config.from_preset("tiny", settings), embedded("base")
    layout = read_json(folder / "transformer" / "config.json")
    text = torch.zeros(4, config.model.text_tokens, layout["text_dim"])
    networks = Networks(
        load_causal(folder, config), load_teacher(folder, config), load_teacher(folder, config), text[:1]
    )
    plan = ParallelPlan(checkpoint_blocks=True)
    for network, trainable in ((networks.generator, True), (networks.critic, True), (networks.teacher, False)):
        parallelize(network, network.blocks, None, plan, trainable=trainable)
    found, expected = measure(networks, config, text), estimated(config, layout, layout)
    expected.pop("kept for backward")  # here a frame has 4 tokens, so that its modulation, not counted, is not small
    for name, size in expected.items():
        assert size == pytest.approx(found[name], rel=TINY_TOLERANCE), f"{name}: {size / found[name]:.3f}"


def test_text_encoder_and_decoder_features_are_the_modules_own() -> None:
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu"))
    assert _text_parameters(UMT5_XXL) == sum(p.numel() for p in encoder.parameters())
    config = Config.from_preset("wan-1.3b")
    working_bytes = 6 * 96 * 4 * 480 * 832 * 2
    assert _codec_bytes(WAN_VAE, config, 2) - working_bytes == pytest.approx(2 * 944.3e6, rel=1e-3)
    assert _codec_bytes({"_class_name": "LinearCodec"}, config, 2) == 0


def test_k_and_v_pages_are_the_pools_own_and_184320_bytes_a_token() -> None:
    config = config_of()
    lines = dict(phase_lines(config, WAN_1_3B, "critic rollout"))
    assert lines["K/V pages"] == 184_320 * config.geometry.chunk_tokens * config.geometry.clip_chunks
    assert lines["K/V pages"] == pytest.approx(6.038e9, rel=1e-3)
    small, network = small_config(*ALONE, "distill.micro_batch_size=1"), small_causal()
    lines = dict(phase_lines(small, dict(network.config), "critic rollout"))
    assert lines["K/V pages"] == new_pool(small, network, small.geometry.clip_chunks).capacity_bytes


def phase_lines(config: Config, layout: dict[str, Any], phase: str, world_size: int = 1) -> list[tuple[str, int]]:
    size = TransformerLayout.of(layout)
    return _Place.of(config, size, size, world_size, 1).phases()[phase]


def lines_of(world_size: int, *settings: str, stage: int = 2) -> dict[str, int]:
    config = Config.from_preset("wan-1.3b", settings)
    return dict(estimate(config, WAN_1_3B, WAN_14B, world_size, stage, text_layout=UMT5_XXL).lines)


def test_what_is_trained_is_shared_by_the_ranks_of_a_group_and_text_is_not() -> None:
    alone, eight, grouped = lines_of(1), lines_of(8), lines_of(8, "train.shard_group=4", "train.workers=8")
    parameters = TransformerLayout.of(WAN_1_3B).parameters
    for network in ("generator", "critic"):
        assert alone[f"{network} weights, float32"] == 4 * parameters
        assert eight[f"{network} weights, float32"] == 4 * parameters // 8
        assert grouped[f"{network} Adam moments"] == 2 * (4 * parameters // 4)
    assert eight["teacher weights"] == pytest.approx(2 * 14.29e9 / 8, rel=5e-3)
    assert eight["text encoder weights"] == alone["text encoder weights"] == pytest.approx(11.36e9, rel=1e-3)
    assert eight["generator weights, gathered"] == 4 * parameters and "generator weights, gathered" not in alone


def test_a_stage_holds_its_own_networks_and_stage_0_no_teacher() -> None:
    stages = [lines_of(8, stage=stage) for stage in (0, 1, 2)]
    assert ["critic weights, float32" in lines for lines in stages] == [False, True, True]
    assert ["teacher weights" in lines for lines in stages] == [False, True, True]
    assert ["reference weights" in lines for lines in stages] == [False, False, True]


def test_the_estimate_is_the_phase_that_needs_most_and_its_lines_add_up() -> None:
    found = estimate(Config.from_preset("wan-1.3b"), WAN_1_3B, WAN_14B, 8, 1, codec_layout=WAN_VAE)
    assert {name for name, _ in found.phases} >= {"rollout", "scores", "critic backward", "optimizer step", "samples"}
    assert dict(found.phases)[found.phase] == found.total_bytes == max(size for _, size in found.phases)
    assert dict(found.lines)["CUDA context, cuBLAS, NCCL"] == CONTEXT_BYTES
    assert "**total**" in found.table() and found.phase in found.table()


def test_a_run_that_cannot_fit_is_refused_with_its_largest_lines_and_what_to_change() -> None:
    found = estimate(Config.from_preset("wan-1.3b"), WAN_1_3B, WAN_14B, 1, 2, text_layout=UMT5_XXL)
    check(found, found.total_bytes)
    with pytest.raises(FieldError, match=r"memory of stage 2 .*teacher weights 28.*at most 80.0 GB") as refused:
        check(found, 80_000_000_000)
    assert "distill.teacher" in refused.value.allowed and "train.workers" in refused.value.allowed
    with pytest.raises(FieldError, match="stage = 3"):
        estimate(Config.from_preset("wan-1.3b"), WAN_1_3B, WAN_14B, 1, 3)
