"""Several processes around a model that loses parameters while it trains: what they must agree on, and DDP."""

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
    """The numbers that the first process has; every process must call this.

    What is measured, such as a time, differs from process to process, but all of them must take the same decision.

    Args:
        values: As many numbers in each process.
        model: Its device is the one that processes exchange numbers by.
    """
    if not (values and dist.is_available() and dist.is_initialized()):
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
    dist.broadcast(shared, 0)
    return shared.tolist()


def share_measured(gates: Iterable[EpsilonGate], with_importance: bool = False) -> None:
    """Give every process the largest response of all processes, for each gate; every process must call this.

    Args:
        gates: Of the model, in one order.
        with_importance: Whether to share the mean of their importances, too.
    """
    found = list(gates)
    if not (found and dist.is_available() and dist.is_initialized()):
        return
    # A gate that has not run yet may have its response elsewhere.
    device = found[0].threshold.device

    def share(name: str, op: Any, divisor: int = 1) -> None:
        values = torch.stack([getattr(gate, name).float().to(device) for gate in found])
        # MAX does not carry NaN on every backend; infinity keeps a gate open just as well.
        values = torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(values, op=op)
        for gate, value in zip(found, values / divisor, strict=True):
            getattr(gate, name).copy_(value)

    share("response", dist.ReduceOp.MAX)
    if with_importance:
        share("importance", dist.ReduceOp.SUM, dist.get_world_size())


def wrap_again(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper forget the parameters that its model has lost; every process must call this.

    A wrapper waits in each backward pass for the gradients of the parameters that it began with. Whoever holds it, an
    optimizer's owner or a trainer, goes on holding it: it is initialised anew in place. A communication hook has to be
    registered again.
    """
    options: dict[str, Any] = {
        name: getattr(wrapper, name)
        for name in ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
                     "gradient_as_bucket_view", "static_graph", "mixed_precision")
    }  # fmt: skip
    if not wrapper.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    # torch has given the option another name.
    renamed = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if hasattr(wrapper, name))
    options[renamed] = getattr(wrapper, renamed)
    model, mode = wrapper.module, wrapper.training
    wrapper.__init__(model, **options)  # type: ignore[misc]
    wrapper.train(mode)


def rewrap(network: nn.Module) -> None:
    """:func:`wrap_again` for the wrapper in a network, however deep in others it is; nothing if there is none."""
    for module in network.modules():
        if isinstance(module, DistributedDataParallel):
            wrap_again(module)
            return


def on_first_forward(model: nn.Module, found: Callable[[DistributedDataParallel], None]) -> Callable[[], None]:
    """Call ``found`` with the wrapper of a model when it first runs; returns what gives up waiting.

    For those who are handed the model but not its wrapper, such as callbacks.
    """

    def look(module: nn.Module, args: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.module is model:
            handle.remove()
            found(module)

    handle = register_module_forward_pre_hook(look)
    return handle.remove
