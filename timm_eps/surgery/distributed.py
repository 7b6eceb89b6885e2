"""Distributed training of a model whose branches are removed: decisions that all processes share, and DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ..gate import EpsilonGate

__all__ = ["agreed", "on_first_forward", "rewrap", "share_measured", "wrap_again"]


def agreed(values: list[float], model: nn.Module) -> list[float]:
    """The numbers of the first process. Every process must call this.

    Measured values such as times differ between processes, but all processes must make the same decision.

    Args:
        values: Numbers, the same count in each process.
        model: Model on the device that is used for communication.
    """
    if not (values and dist.is_available() and dist.is_initialized()):
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
    dist.broadcast(shared, 0)
    return shared.tolist()


def share_measured(gates: Iterable[EpsilonGate], with_importance: bool = False) -> None:
    """Give every process the largest response of all processes, for each gate. Every process must call this.

    Args:
        gates: Gates of the model, in the same order in each process.
        with_importance: Whether to share the mean of their importances, too.
    """
    found = list(gates)
    if not (found and dist.is_available() and dist.is_initialized()):
        return
    # The response of a gate that has not run yet may be on another device.
    device = found[0].threshold.device

    def share(name: str, op: Any, divisor: int = 1) -> None:
        values = torch.stack([getattr(gate, name).float().to(device) for gate in found])
        # MAX does not propagate NaN on every backend. Infinity keeps a gate open, too.
        values = torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(values, op=op)
        for gate, value in zip(found, values / divisor, strict=True):
            getattr(gate, name).copy_(value)

    share("response", dist.ReduceOp.MAX)
    if with_importance:
        share("importance", dist.ReduceOp.SUM, dist.get_world_size())


def wrap_again(wrapper: DistributedDataParallel) -> None:
    """Update a wrapper after parameters were removed from its model. Every process must call this.

    In each backward pass a wrapper waits for the gradients of its initial parameters. It is initialised again in place,
    so existing references to it stay valid. A communication hook must be registered again.
    """
    options: dict[str, Any] = {
        name: getattr(wrapper, name)
        for name in ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
                     "gradient_as_bucket_view", "static_graph", "mixed_precision")
    }  # fmt: skip
    if not wrapper.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    # torch uses another name for this attribute.
    renamed = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if hasattr(wrapper, name))
    options[renamed] = getattr(wrapper, renamed)
    model, mode = wrapper.module, wrapper.training
    wrapper.__init__(model, **options)  # type: ignore[misc]
    wrapper.train(mode)


def rewrap(network: nn.Module) -> None:
    """Tell the wrappers of a network, at any depth, that its structure has changed.

    DistributedDataParallel is initialised again (:func:`wrap_again`). ``torch.compile`` forgets the old structures,
    because it stops compiling after a number of them.
    """
    if any(hasattr(module, "_orig_mod") for module in network.modules()):
        torch.compiler.reset()
    for module in network.modules():
        if isinstance(module, DistributedDataParallel):
            wrap_again(module)
            return


def on_first_forward(model: nn.Module, found: Callable[[DistributedDataParallel], None]) -> Callable[[], None]:
    """Call ``found`` with the wrapper of a model when it first runs. Returns a function that cancels this.

    For code that gets the model without its wrapper, such as callbacks.
    """

    def look(module: nn.Module, args: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.module is model:
            handle.remove()
            found(module)

    handle = register_module_forward_pre_hook(look)
    return handle.remove
