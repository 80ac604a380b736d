"""All parallelism and precision of training, applied to a network from outside: the network knows none of it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from diagonal.config import Config
from diagonal.errors import require
from diagonal.training.distributed import is_grouped

Network = TypeVar("Network", bound=nn.Module)
FloatName = Literal["bfloat16", "float32"]
GRAPHS_AT_MOST = 64
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """`param`: what weights are computed in; `reduce`: what gradients are reduced in. Masters are float32.

    Parameters with a name part in `float32_parts`, or in the network's own `_keep_in_fp32_modules` (diffusers' list:
    time embedding, norms, modulation tables), are computed in float32 always, as they are in serving.
    Of a network's inputs those named in `narrow_inputs` (diffusers' names) are cast to `param`, never its timesteps.
    """

    param: FloatName = "float32"
    reduce: FloatName = "float32"
    float32_parts: tuple[str, ...] = ()
    narrow_inputs: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")

    def __post_init__(self) -> None:
        require(self.param in DTYPES, "precision.param", self.param, f"one of {sorted(DTYPES)}")
        require(self.reduce in DTYPES, "precision.reduce", self.reduce, f"one of {sorted(DTYPES)}")


@dataclass(frozen=True)
class ParallelPlan:
    """What `parallelize` does besides sharding: the precision, whether blocks are computed again in backward, and
    whether they are compiled (by the named back end of torch.compile; tests take one that needs no C++ compiler)."""

    precision: Precision = field(default_factory=Precision)
    checkpoint_blocks: bool = False
    compile: bool = False
    compile_backend: str = "inductor"

    @classmethod
    def of(cls, config: Config) -> ParallelPlan:
        """As a run's configuration says."""
        train = config.train
        return cls(Precision(config.model.compute_dtype), train.checkpoint_activations, train.compile)


def device_mesh(world_size: int, device_type: str, shard_group: int = 0) -> DeviceMesh | None:
    """The mesh that parameters are sharded over; None for one rank, which needs none.

    `shard_group` ranks hold one copy together (a node's, usually) and copies are replicated beyond it; 0 is all ranks.
    The process group must exist.
    """
    group = shard_group or world_size
    require(world_size >= 1, "world_size", world_size, "a whole number of at least 1")
    require(
        0 < group <= world_size and world_size % group == 0,
        "train.shard_group",
        shard_group,
        f"0 or a divisor of the number of ranks = {world_size}",
    )
    if world_size == 1:
        return None
    require(is_grouped(), "process group", None, "an initialised one, as there is more than one rank")
    if group == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // group, group), mesh_dim_names=("replicate", "shard"))


def parallelize(
    module: Network, blocks: Iterable[nn.Module], mesh: DeviceMesh | None, plan: ParallelPlan, *, trainable: bool
) -> Network:
    """Prepare `module` in place, in this order: precision, activation checkpointing of blocks, compilation of blocks,
    sharding by block, sharding of the root (in groups that are replicated, where the mesh has such a dimension).

    `blocks` are the repeated parts of `module`, each called once a forward. Names of modules and parameters stay.
    A trainable network keeps float32 masters and casts them where they are used, so that gradients of many forwards
    add up in float32; a frozen one is stored as it is computed. With `mesh` None nothing is sharded.
    Gradients stay on their rank until `finish_gradients`. Forward must be called through `__call__`.
    """
    units: list[nn.Module] = list(blocks)
    root: nn.Module = module
    root.requires_grad_(trainable)
    _store(module, plan.precision, trainable)
    if plan.precision.param != "float32":
        _compute_narrow(root, units, plan.precision, trainable)
    if trainable and plan.checkpoint_blocks:
        for unit in units:
            _replace_forward(unit, functools.partial(_recomputed, unit.forward))
    if plan.compile:
        _compile(units, plan.compile_backend)
    if mesh is not None:
        _shard(module, units, mesh, plan.precision)
    return module


@contextmanager
def rollout_scope(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters stay gathered through every forward and backward; leaving shards them again.

    For a rollout of many forwards, and for accumulation over micro-batches. Optimizer, EMA and checkpoint see the
    sharded parameters, so they come after the scope. On one rank it does nothing.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    _keep_gathered(module, True)
    try:
        yield
    finally:
        _keep_gathered(module, False)
        for part in _sharded_parts(module):
            part.reshard()


def finish_gradients(module: nn.Module) -> None:
    """Average over ranks the gradients of all backwards since the last call: one reduction a parameter group.

    Collective: every rank calls it once an update, before clipping, inside or after `rollout_scope`.
    FSDP reduces in a backward through its root, so an identity is run through the root, whose backward does it all.
    """
    if not isinstance(module, FSDPModule):
        return
    module.set_requires_gradient_sync(True)
    probe = torch.zeros((), device=_device(module), requires_grad=True)
    module.identity(probe).backward()  # type: ignore[operator]
    module.set_requires_gradient_sync(False)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their total norm over all ranks is at most `max_norm`.

    Returns the norm before clipping as a float32 scalar on the device, without a host sync. A norm that is not finite
    makes the gradients so too: ask `any_rank` before the optimizer steps.
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([owner.grad for owner in owners if owner.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(owners, max_norm, norm)
    return norm.float()


def any_rank(flag: bool | Tensor, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> bool:
    """Whether any rank says so: the one answer that every rank branches on.

    `flag` is a bool, sent from `device` (the process group's kind), or a scalar tensor, sent from where it lies.
    """
    value = torch.as_tensor(flag, device=flag.device if isinstance(flag, Tensor) else device).to(torch.int32)
    if is_grouped():
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole network's parameters and buffers on the CPU, on rank 0; empty on other ranks. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of tensors that may be sharded (an EMA's shadow), on every rank. Collective."""
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole}


def _store(module: nn.Module, precision: Precision, trainable: bool) -> None:
    """Float32 masters of a trainable network; a frozen one in its compute precision."""
    for name, parameter in module.named_parameters():
        compute = torch.float32 if _is_kept(name, module, precision) else DTYPES[precision.param]
        parameter.data = parameter.data.to(torch.float32 if trainable else compute)


def _is_kept(name: str, module: nn.Module, precision: Precision) -> bool:
    kept: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
    return not set(name.split(".")).isdisjoint((*kept, *precision.float32_parts))


def _cast_names(unit: nn.Module, units: list[nn.Module], root: nn.Module, precision: Precision) -> list[str]:
    """Names inside `unit` of its own parameters (the root's are those in no block) that are computed narrow."""
    narrow = {id(p) for name, p in root.named_parameters() if not _is_kept(name, root, precision)}
    elsewhere = {id(p) for block in units if block is not unit for p in block.parameters()}
    return [name for name, p in unit.named_parameters() if id(p) in narrow and id(p) not in elsewhere]


def _compute_narrow(root: nn.Module, units: list[nn.Module], precision: Precision, trainable: bool) -> None:
    """Weights of a trainable network are cast where they are used; those of a frozen one are narrow already."""
    dtype, signature = DTYPES[precision.param], inspect.signature(root.forward)
    for unit in [*units, root] if trainable else []:
        body, names = _Body(unit, unit.forward), tuple(_cast_names(unit, units, root, precision))
        _replace_forward(unit, functools.partial(_with_cast_weights, body, names, dtype))
    cast_inputs = functools.partial(_with_cast_inputs, root.forward, signature, precision.narrow_inputs, dtype)
    _replace_forward(root, cast_inputs)


class _Body(nn.Module):
    """A module's own forward, callable under other parameters without running that module's hooks again."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _with_cast_weights(body: _Body, names: tuple[str, ...], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    cast = {f"module.{name}": body.module.get_parameter(name).to(dtype) for name in names}
    return torch.func.functional_call(body, cast, args, kwargs, tie_weights=False)


def _with_cast_inputs(
    forward: Callable[..., Any],
    signature: inspect.Signature,
    names: tuple[str, ...],
    dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> Any:
    bound = signature.bind(*args, **kwargs)
    for name in names:
        value = bound.arguments.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            bound.arguments[name] = value.to(dtype)
    return forward(*bound.args, **bound.kwargs)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing draws from the global generator, so its state need not be kept for the second run.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _compile(units: list[nn.Module], backend: str) -> None:
    """Each block's forward as one graph, casts and recomputation in it, FSDP's hooks outside.

    Shapes are static: a graph for each context length and for each of with and without gradient, shared by all blocks
    of a network. Torch counts those of all networks together, as they run the same code, hence the higher limit; with
    `fullgraph` a graph break, or a graph beyond the limit, is an error and never a slow run.
    """
    from torch import _dynamo as dynamo  # seconds to import, and few runs compile

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, GRAPHS_AT_MOST)
    for unit in units:
        _replace_forward(unit, torch.compile(unit.forward, fullgraph=True, dynamic=False, backend=backend))


def _replace_forward(unit: nn.Module, forward: Callable[..., Any]) -> None:
    """On the instance and inside the module's hooks: FSDP gathers before it, and no name changes."""
    unit.forward = forward


def _shard(module: nn.Module, units: list[nn.Module], mesh: DeviceMesh, precision: Precision) -> None:
    # Inputs are never cast: level 0.9375 would reach the blocks as timestep 936.
    policy = MixedPrecisionPolicy(reduce_dtype=DTYPES[precision.reduce], cast_forward_inputs=False)
    for part in [*units, module]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    module.identity = types.MethodType(_identity, module)  # type: ignore[assignment]
    register_fsdp_forward_method(module, "identity")
    module.set_requires_gradient_sync(False)  # type: ignore[operator]


def _identity(module: nn.Module, x: Tensor) -> Tensor:
    """A copy of `x`: for FSDP a forward of `module` that uses none of its parameters."""
    return x.clone()


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _keep_gathered(module: FSDPModule, keep: bool) -> None:
    module.set_reshard_after_forward(not keep)
    module.set_reshard_after_backward(not keep)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
