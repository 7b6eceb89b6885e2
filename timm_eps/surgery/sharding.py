"""Models whose parameters are sharded over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Each process holds a part of each parameter, as a ``DTensor``. A sharded model trains and evaluates as usual, but it
cannot be copied, and its modules cannot be replaced. Copies are therefore made of plain modules and plain tensors.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

__all__ = [
    "NO_DEEPSPEED", "NO_FSDP1", "check_optimizers", "check_sharding", "check_wrapper", "filled", "gathered",
    "is_sharded", "is_sharded_tensor", "plain_copy", "refuse_sharded", "reshard",
]  # fmt: skip

NO_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) flattens the parameters of a network, so its branches have none. Use FSDP2: "
    "torch.distributed.fsdp.fully_shard, accelerate launch --use_fsdp --fsdp_version 2, or "
    'fsdp_config={"version": 2} in the TrainingArguments.'
)
NO_DEEPSPEED = (
    "DeepSpeed is not supported: this package was never tested with it. FSDP2 shards the same: accelerate launch "
    "--use_fsdp --fsdp_version 2."
)

# Beginnings of the names of attributes that fully_shard sets.
_FSDP_NAMES = ("__composable_api", "_is_fsdp", "_fsdp")
_Module = TypeVar("_Module", bound=nn.Module)


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class of torch that nobody has an object of unless its module was imported. Importing it takes long."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_sharded_tensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process has a part."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def _sharded_modules(model: nn.Module) -> list[Any]:
    kinds = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [part for part in model.modules() if isinstance(part, kinds)]


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model is sharded by ``fully_shard``, or a parameter is a ``DTensor``."""
    # A forward pass may leave whole parameters. torch marks the modules, also if only an outer module was sharded.
    is_marked = any(getattr(part, "_is_fsdp_managed_module", False) for part in model.modules())
    return is_marked or bool(_sharded_modules(model)) or any(map(is_sharded_tensor, model.parameters()))


def check_wrapper(model: nn.Module) -> None:
    """Raise ValueError if a module is the wrapper of FSDP1 or DeepSpeed."""
    if isinstance(model, _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        raise ValueError(NO_FSDP1)
    if type(model).__module__.partition(".")[0] == "deepspeed":
        raise ValueError(NO_DEEPSPEED)


def check_sharding(model: nn.Module) -> None:
    """Raise ValueError if FSDP1 or DeepSpeed has flattened or moved the parameters of a model."""
    for part in model.modules():
        check_wrapper(part)
    parameters = list(model.parameters())
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise ValueError(NO_FSDP1)
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(NO_DEEPSPEED)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model is sharded.

    Args:
        model: The model.
        what: What cannot be done, the subject of the message, such as "Branches cannot be removed".
    """
    if is_sharded(model):
        raise ValueError(
            f"{what} while the parameters are sharded. timm_eps.save_pretrained(model, directory) saves the model "
            "without closed branches; timm_eps.gathered(model) returns a whole copy for everything else. Every process "
            "must call them."
        )


def check_optimizers(optimizers: Iterable[Optimizer], stale: set[nn.Parameter]) -> None:
    """Raise ValueError if an optimizer has parameters from before the model was sharded.

    Args:
        optimizers: Optimizers of the model.
        stale: Parameters that the model does not have any more.
    """
    held = (parameter for one in optimizers for group in one.param_groups for parameter in group["params"])
    if any(parameter in stale and not is_sharded_tensor(parameter) for parameter in held):
        raise ValueError(
            "The optimizer was created before fully_shard, so it has parameters that the model no longer has. Create "
            "it after fully_shard, and set pruner.optimizer = optimizer."
        )


def reshard(model: nn.Module) -> None:
    """Free whole parameters that a forward pass has left, so that ``model.parameters()`` are the sharded ones.

    Raises:
        ValueError: The parameters are sharded by FSDP1 or DeepSpeed.
    """
    check_sharding(model)
    for part in _sharded_modules(model):
        part.reshard()


def gathered(model: _Module, *, on_main: bool = False) -> Any:
    """A whole copy of a model whose parameters are sharded by FSDP2. Every process must call this.

    The copy has plain parameters, buffers of this process, the same gates, modes and hooks. All functions of this
    package accept it. A model that is not sharded is returned as it is.

    Args:
        model: A sharded model, or any other.
        on_main: Whether only the first process gets the copy, on the CPU. The others get None.

    Returns:
        The copy, on the device of the model.

    Raises:
        ValueError: The parameters are sharded by FSDP1 or DeepSpeed.

    Example::

        whole = timm_eps.gathered(model)
        timm_eps.remove_closed(whole)
        report = timm_eps.analyze(whole, batches)
    """
    reshard(model)
    if not is_sharded(model):
        return model
    is_main = dist.get_rank() == 0

    def whole(tensor: Any) -> Tensor:
        value = tensor
        if is_sharded_tensor(tensor):  # offloaded to the CPU, it is exchanged on the device of the processes
            value = tensor.to(tensor.device_mesh.device_type).full_tensor()
        if not on_main:
            return value.clone()
        return value.to("cpu", copy=True) if is_main else torch.empty_like(value, device="meta")

    duplicate = plain_copy(model, whole)
    return duplicate if is_main or not on_main else None


def filled(model: _Module, state_dict: Mapping[str, Tensor]) -> _Module | None:
    """A whole copy of a sharded model with the weights of a whole state dict. One process alone may call this.

    Args:
        model: The sharded model.
        state_dict: Whole weights by name, as Accelerate's ``get_state_dict`` returns them to the first process. The
            others get an empty one.

    Returns:
        The copy, on the CPU; None for an empty state dict.

    Raises:
        ValueError: A weight is missing.
    """
    if not state_dict:
        return None
    reshard(model)
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(set(names.values()) - state_dict.keys()):
        raise ValueError(f"state_dict lacks {missing[0]!r} and {len(missing) - 1} more keys of the model.")
    return plain_copy(model, lambda tensor: state_dict[names[id(tensor)]] if id(tensor) in names else tensor).cpu()


def plain_copy(module: _Module, convert: Callable[[Tensor], Tensor], *, trains_all: bool = False) -> _Module:
    """A deep copy whose tensors are converted, and whose modules have the classes from before ``fully_shard``.

    Args:
        module: A module, sharded or not.
        convert: Function that returns the new tensor for each tensor. It gets sharded ones, too.
        trains_all: Whether every floating-point parameter of the copy needs a gradient.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for part in module.modules():
            for tensor in tree_leaves([vars(part), part._parameters, part._buffers]):
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    new = convert(tensor).detach()
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, new.is_floating_point() if trains_all else tensor.requires_grad)
                    memo[id(tensor)] = new
    sharded = _sharded_modules(module)
    for part in sharded:
        memo[id(part)] = object.__new__(_plain_class(part))
        # torch's state holds process groups, which cannot be copied. Its hooks are deleted from the copy.
        memo |= {id(hook.__self__): _Nothing() for _, _, hook in _fsdp_hooks(part) if hasattr(hook, "__self__")}
    for part in reversed(sharded):
        state = {name: value for name, value in vars(part).items() if not name.startswith(_FSDP_NAMES)}
        memo[id(part)].__setstate__(copy.deepcopy(state, memo))
    duplicate = copy.deepcopy(module, memo)
    for part in duplicate.modules() if sharded else ():
        for hooks, key, _ in list(_fsdp_hooks(part)):
            del hooks[key]
        for name in [name for name in vars(part) if name.startswith(_FSDP_NAMES)]:
            delattr(part, name)
    return duplicate


class _Nothing:
    """Stands for torch's state of a sharded module in a copy."""


def _plain_class(part: nn.Module) -> type:
    """The class that a module had before ``fully_shard`` replaced it by a subclass."""
    kinds = _loaded("torch.distributed.fsdp", "FSDPModule")
    return next(kind for kind in type(part).__mro__ if not issubclass(kind, kinds))


def _fsdp_hooks(part: nn.Module) -> Iterator[tuple[dict[int, Any], int, Any]]:
    """The hooks of ``fully_shard`` on a module: the dict of hooks, the key and the hook."""
    for name, hooks in vars(part).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            for key, hook in hooks.items():
                if getattr(hook, "__module__", "").startswith("torch.distributed."):
                    yield hooks, key, hook
