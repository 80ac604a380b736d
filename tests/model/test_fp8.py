"""8-bit floating point: rounding is to the nearest, scales are exact, and the cache's bytes are the formula's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagonal.errors import FieldError
from diagonal.model.cache import CacheBatch, KVCache, KVPool
from diagonal.model.dit import CausalWan
from diagonal.model.fp8 import (
    FORMAT,
    Fp8Linear,
    check_device,
    dequantise,
    native_product,
    power_of_two,
    quantise,
    use_fp8_linears,
)
from tests.networks import CHANNELS, TEXT_DIM, TEXT_TOKENS, begun, caches_for, draw, small_causal, small_config

LARGEST = 448.0


def numbers() -> Tensor:
    """Every finite number of e4m3, in rising order."""
    values = torch.arange(256, dtype=torch.uint8).view(FORMAT).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("exponent", [-100, -9, -1, 0, 3, 100])
def test_a_number_of_the_format_times_any_power_of_two_comes_back_exactly(exponent: int) -> None:
    row = numbers() * 2.0**exponent
    codes, exponents = quantise(row)
    assert int(exponents) == exponent
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantise(codes, exponents, dtype).float(), row)


def test_every_value_becomes_the_nearest_number_at_its_rows_least_power_of_two() -> None:
    x = draw(64, 32, seed=1) * torch.logspace(-6, 6, 64)[:, None]
    codes, exponents = quantise(x)
    scaled = x / 2.0 ** exponents[:, None].double()
    assert bool((scaled.abs().amax(1) <= LARGEST).all() and (scaled.abs().amax(1) > LARGEST / 2).all())
    distance = (scaled[..., None] - numbers().double()).abs()
    assert torch.equal((codes.double() - scaled).abs(), distance.min(-1).values)


def test_a_row_is_rounded_the_same_whatever_stands_beside_it() -> None:
    x = draw(4, 7, 16, seed=2)
    codes, exponents = quantise(x)
    alone = quantise(x[2, 3])
    assert torch.equal(codes[2, 3].float(), alone[0].float()) and torch.equal(exponents[2, 3], alone[1])
    assert exponents.shape == (4, 7)


def test_zeros_stay_zeros_and_the_smallest_and_largest_rows_stay_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [3e38, -1e38], [LARGEST, -LARGEST]])
    codes, exponents = quantise(x)
    back = dequantise(codes, exponents, torch.float32)
    assert bool(back.isfinite().all()) and torch.equal(back[0], x[0]) and torch.equal(back[3], x[3])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_never_made_finite(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    back = dequantise(*quantise(x))
    assert bool(back[0].isnan().all() and back[1].isfinite().all())
    layer = Fp8Linear(nn.Linear(4, 3))
    assert not bool(layer(x)[0].isfinite().any()) and bool(layer(x)[1].isfinite().all())


# Linear layers


def layer_of(rows: int = 40, inputs: int = 64, outputs: int = 48) -> tuple[nn.Linear, Fp8Linear, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(inputs, outputs).requires_grad_(False)
    return linear, Fp8Linear(linear), draw(2, rows // 2, inputs, seed=3)


def test_a_layer_is_the_exact_product_of_its_rounded_input_and_weight() -> None:
    linear, layer, x = layer_of()
    rounded, weight = (dequantise(*quantise(part), torch.float32).double() for part in (x, linear.weight))
    expected = rounded @ weight.T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert 0.01 < float(error) < 0.06


def test_torchs_own_8_bit_product_is_the_simulated_one_to_bfloat16() -> None:
    """The call that a GPU runs, on the CPU's kernel of it: arguments, scales by row, bias."""
    _, layer, x = layer_of()
    codes, exponents = quantise(x.flatten(0, 1))
    scales = power_of_two(exponents)[:, None], power_of_two(layer.exponents)[None, :]
    found = native_product(codes, scales[0], layer.numbers, scales[1], layer.bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x).flatten(0, 1), rtol=2**-7, atol=2**-7)


def fp8_network(fuse: bool) -> CausalWan:
    network = small_causal()
    if fuse:
        network.fuse()
    use_fp8_linears(network, network.blocks)
    return network


@pytest.mark.parametrize("fuse", [False, True])
def test_only_the_linear_layers_of_blocks_become_8_bit(fuse: bool) -> None:
    network = fp8_network(fuse)
    kinds = {name: type(part) for name, part in network.named_modules() if isinstance(part, nn.Linear | Fp8Linear)}
    assert {kind for name, kind in kinds.items() if name.startswith("blocks.")} == {Fp8Linear}
    assert {kind for name, kind in kinds.items() if not name.startswith("blocks.")} == {nn.Linear}
    assert len([name for name in kinds if name.startswith("blocks.0.")]) == (7 if fuse else 10)
    weights = [part for name, part in network.state_dict().items() if name.endswith("numbers")]
    assert weights and all(part.dtype == FORMAT for part in weights)


def test_a_network_of_8_bit_layers_is_near_its_own_and_joined_or_not_the_same() -> None:
    config, level = small_config(), torch.full((1, 3), 0.5)
    x, text = draw(*config.geometry.chunk_shape(), seed=4), draw(1, TEXT_TOKENS, TEXT_DIM, seed=5)
    assert x.shape[1] == CHANNELS
    with torch.no_grad():
        plain = small_causal()(x, level, text)
        found = [fp8_network(fuse)(x, level, text) for fuse in (False, True)]
    error = (found[0] - plain).norm() / plain.norm()
    assert 0.001 < float(error) < 0.15
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_widths_that_the_product_does_not_take_are_refused() -> None:
    network = nn.ModuleList([nn.Linear(24, 32)])
    with pytest.raises(FieldError, match=r"serve.linear_dtype = 'fp8': allowed is model: linear layers of widths \(24"):
        use_fp8_linears(network, network)


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_8_bit_products_is_refused(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_device(torch.device("cpu"))
    if works:
        check_device(torch.device("cuda"))
        return
    with pytest.raises(FieldError, match="serve.linear_dtype = 'fp8': allowed is model on a GPU of compute capability"):
        check_device(torch.device("cuda"))


# The cache


def test_the_caches_bytes_are_a_byte_a_number_and_one_a_head_and_token() -> None:
    pool = KVPool(layers=2, heads=3, head_dim=4, page_tokens=5, pages=7, dtype=FORMAT)
    assert pool.exponents is not None
    assert pool.page_bytes == 2 * 2 * 5 * 3 * (4 + 1) and pool.capacity_bytes == 7 * pool.page_bytes
    assert pool.keys.nbytes + pool.values.nbytes + pool.exponents.nbytes == pool.capacity_bytes
    wan: dict[str, Any] = {"layers": 30, "heads": 12, "head_dim": 128, "page_tokens": 4680, "pages": 4}
    full, half = (KVPool(**wan, dtype=dtype, device="meta").capacity_bytes for dtype in (torch.bfloat16, FORMAT))
    assert (full, half) == (3_450_470_400, 1_738_713_600) and half == full // 2 + full // 2 // 128


def test_what_is_read_is_what_was_written_rounded_once() -> None:
    pool = KVPool(layers=2, heads=3, head_dim=4, page_tokens=5, pages=5, dtype=FORMAT)
    cache = KVCache(pool, window_chunks=4, sink_chunks=1)
    written = {}
    for chunk in range(6):
        cache.begin(chunk)
        for layer in range(2):
            key, value = draw(1, 5, 3, 4, seed=10 * chunk + layer), draw(1, 5, 3, 4, seed=100 + 10 * chunk + layer)
            CacheBatch([cache]).write(layer, key, value)
            written[chunk, layer] = key, value
    assert cache.chunks == (0, 3, 4, 5)
    for layer in range(2):
        for side, found in enumerate(CacheBatch([cache]).context(layer)):
            expected = torch.cat([dequantise(*quantise(written[chunk, layer][side])) for chunk in (0, 3, 4)], dim=1)
            assert torch.equal(found, expected) and found.dtype == torch.bfloat16


def test_a_chunk_with_8_bit_context_is_near_its_own_and_the_first_is_equal() -> None:
    config, network = small_config(), small_causal()
    text, level = draw(1, TEXT_TOKENS, TEXT_DIM, seed=5), torch.full((1, 3), 0.5)
    (plain,), found = caches_for(config, network), []
    layout: Any = network.config
    pool = KVPool(
        layers=layout.num_layers,
        heads=layout.num_attention_heads,
        head_dim=layout.attention_head_dim,
        page_tokens=config.geometry.chunk_tokens,
        pages=12,
        dtype=FORMAT,
    )
    for cache in (plain, KVCache(pool, window_chunks=4, sink_chunks=1)):
        with torch.no_grad():
            found.append(
                [
                    network(
                        draw(*config.geometry.chunk_shape(), seed=chunk),
                        level,
                        text,
                        cache=begun(chunk, cache),
                        write=True,
                    )
                    for chunk in range(6)
                ]
            )
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert 0 < float((one - other).norm() / one.norm()) < 0.05
