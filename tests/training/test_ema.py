"""Laws of the weight average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagonal.training.ema import Ema


def network(value: float) -> nn.Linear:
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(value)
    return linear


def set_weights(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def values(ema: Ema) -> set[float]:
    return {entry for tensor in ema.shadow.values() for entry in tensor.flatten().tolist()}


def test_the_average_is_created_from_the_weights_at_its_start_and_decays_from_there() -> None:
    linear = network(1.0)
    ema = Ema(linear.named_parameters(), decay=0.75, start_update=10)
    for update, weights, expected in ((5, 2.0, 2.0), (9, 3.0, 3.0), (15, 8.0, 8.0), (20, 0.0, 6.0), (25, 2.0, 5.0)):
        set_weights(linear, weights)
        ema.update(update)
        assert values(ema) == {expected}


def test_the_average_equals_the_closed_form() -> None:
    linear = network(1.0)
    ema = Ema(linear.named_parameters(), decay=0.9, start_update=0)
    ema.update(0)
    set_weights(linear, 2.0)
    for update in range(1, 6):
        ema.update(update)
    assert next(iter(values(ema))) == pytest.approx(2.0 - 0.9**5, abs=1e-6)


def test_the_average_of_narrow_weights_is_float32_and_its_own_memory() -> None:
    linear = network(1.0).bfloat16()
    ema = Ema(linear.named_parameters(), decay=0.999, start_update=0)
    ema.update(0)
    set_weights(linear, 2.0)
    ema.update(1)
    assert {tensor.dtype for tensor in ema.shadow.values()} == {torch.float32}
    assert values(ema) == {torch.lerp(torch.tensor(1.0), torch.tensor(2.0), 1.0 - 0.999).item()}


def test_an_average_taken_over_from_a_state_continues_as_if_never_interrupted() -> None:
    linear = network(1.0)
    ema = Ema(linear.named_parameters(), decay=0.5, start_update=10)
    ema.update(10)
    fresh = Ema(network(7.0).named_parameters(), decay=0.5, start_update=10)
    fresh.load_state_dict(ema.state_dict())
    assert fresh.started and values(fresh) == {1.0}


def test_a_state_of_other_names_is_refused_by_name() -> None:
    ema = Ema(network(1.0).named_parameters(), decay=0.5, start_update=0)
    state = ema.state_dict()
    state["shadow"]["extra"] = state["shadow"].pop("bias")
    with pytest.raises(ValueError, match=r"ema.names.*'bias', 'extra'"):
        ema.load_state_dict(state)


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema_decay = 1.0"):
        Ema([], decay=1.0, start_update=0)
