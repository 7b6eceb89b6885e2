"""The optimizers of a model that loses parameters while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Optimizers", "decays", "forget", "innermost"]

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None

# What every optimizer has, and what is followed here.
_KNOWN = {"param_groups", "state", "defaults"}


def innermost(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers that hold parameters and state: each of a list, and what is inside of a wrapper.

    A wrapper is accepted if it has the very groups of the optimizer inside and no state of its own, as timm's
    ``Lookahead`` and accelerate's ``AcceleratedOptimizer``.

    Raises:
        ValueError: Something is no torch optimizer, or keeps parameters where they cannot be taken out.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, list | tuple):
        return list(dict.fromkeys(inner for one in optimizer for inner in innermost(one)))
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}: parameters "
            "of removed blocks cannot be taken out of it."
        )
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and _is_wrapped_by(optimizer, value):
            return innermost(value)
        if name not in _KNOWN and _holds_parameters(value):
            raise ValueError(
                f"{type(optimizer).__name__} keeps parameters, or an optimizer, in its attribute {name!r}, where those "
                "of removed blocks cannot be taken out. Give the pruner an optimizer that has them in param_groups "
                "and state alone; or train to the end without one and live_removal=False."
            )
    return [optimizer]


def _is_wrapped_by(wrapper: Optimizer, optimizer: Optimizer) -> bool:
    shares_state = wrapper.state is optimizer.state or not wrapper.state
    return wrapper.param_groups is optimizer.param_groups and shares_state


def _holds_parameters(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_parameters, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_parameters, value))
    return isinstance(value, Optimizer | nn.Parameter)


def forget(optimizers: Iterable[Optimizer], parameters: set[nn.Parameter]) -> None:
    """Take parameters and their state out of optimizers, in place: schedulers hold the same groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [index for index, parameter in enumerate(group["params"]) if parameter not in parameters]
            for key in group.keys() & {"params", "param_names"}:
                group[key] = [group[key][index] for index in kept]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def decays(optimizers: Iterable[Optimizer]) -> dict[Tensor, bool]:
    """For each parameter that is trained whether its optimizer decays it."""
    return {
        parameter: bool(group.get("weight_decay"))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
