"""8-bit floating point: e4m3 numbers under scales that are powers of two, for linear layers and for the K/V cache.

A power of two costs a floating-point number nothing but range, of which e4m3 has 18 binades below its largest number;
and scaling, its inverse and what is read back (in bfloat16 too) are exact. So a CPU, a GPU and a compiled kernel round
alike, once, in `quantise`: what is measured on the CPU holds for the GPU, up to the order of its sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagonal.errors import FieldError, require

FORMAT = torch.float8_e4m3fn
LEAST_CAPABILITY = (8, 9)  # Ada and Hopper: the first with matrix products of e4m3
ALIGNMENT = 16  # of both widths of a matrix, for those products
_BIAS, _MANTISSA_BITS = 127, 23  # of float32
_LARGEST_BINADE = 8  # the largest number of e4m3 is 1.75 * 2**8 = 448
_ABOVE_LARGEST = 0x7FFFFF - 0x600000  # what takes every mantissa above 1.75 into the next binade
_INFINITY = 0x7F800000  # the bits of it, and the least of what is not finite
_MOST = 120  # exponents of scales, so that a scale and its inverse are normal numbers of float32 and bfloat16


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers of x's shape `[..., n]` and exponents int8 `[...]`: `x` is about `numbers * 2**exponent`.

    Each row's exponent is the least under which all of it fits. What is not finite makes its row NaN.
    """
    x = x.float()
    largest = x.detach().abs().amax(-1).view(torch.int32)
    exponents = ((largest + _ABOVE_LARGEST) >> _MANTISSA_BITS) - (_BIAS + _LARGEST_BINADE)
    exponents = exponents.clamp(-_MOST, _MOST)
    scales = torch.where(largest < _INFINITY, power_of_two(-exponents), torch.nan)  # else some devices would saturate
    return (x * scales.unsqueeze(-1)).to(FORMAT), exponents.to(torch.int8)


def dequantise(numbers: Tensor, exponents: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`numbers * 2**exponents`, exact in bfloat16 and float32."""
    return numbers.to(dtype) * power_of_two(exponents).to(dtype).unsqueeze(-1)


def power_of_two(exponents: Tensor) -> Tensor:
    """`2**exponents` in float32, by its bits: exact on every device."""
    return ((exponents.to(torch.int32) + _BIAS) << _MANTISSA_BITS).view(torch.float32)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is e4m3 with one scale an output, and whose input becomes so, one scale a row."""

    numbers: Tensor
    exponents: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numbers, exponents = quantise(linear.weight.detach())
        self.register_buffer("numbers", numbers)
        self.register_buffer("exponents", exponents)
        self.register_buffer("scales", power_of_two(exponents)[None, :], persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's type."""
        numbers, exponents = quantise(x.flatten(0, -2))
        y = _product(numbers, power_of_two(exponents)[:, None], self.numbers, self.scales, self.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])


def _product(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` of quantised matrices: on the GPU's 8-bit units, simulated in float32 elsewhere."""
    if x.is_cuda:
        return native_product(x, scale, weight, weight_scale, bias).to(dtype)
    y = F.linear(x.float(), weight.float()) * (scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def native_product(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch's own kernel, in bfloat16, the one type in which it gives products scaled by rows.

    With fast accumulation, as others publish that kernels of row-wise scales are slow without it; not measured here.
    """
    given = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(
        x, weight.t(), scale, weight_scale, bias=given, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def use_fp8_linears(network: nn.Module, blocks: nn.ModuleList) -> None:
    """Put an `Fp8Linear` in the place of every linear layer of the blocks; embeddings, norms and output stay.

    `FieldError` on a GPU that has no such products, and for widths that they do not take.
    """
    check_device(next(network.parameters()).device)
    for module in list(blocks.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                widths = (linear.in_features, linear.out_features)
                require(
                    all(width % ALIGNMENT == 0 for width in widths),
                    "serve.linear_dtype",
                    "fp8",
                    f"model: linear layers of widths {widths}, which are no multiples of {ALIGNMENT}",
                )
                setattr(module, name, Fp8Linear(linear))


def check_device(device: torch.device) -> None:
    """`FieldError` for a GPU without 8-bit matrix products; a CPU simulates them."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise FieldError(
            "serve.linear_dtype",
            "fp8",
            f"model on a GPU of compute capability {found}; fp8 needs at least {LEAST_CAPABILITY}",
        )
