"""Optimizers of a model whose parameters are removed while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Optimizers", "decays", "forget", "innermost"]

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None

# Attributes of every optimizer, and attributes of wrappers that are handled here.
_KNOWN = {"param_groups", "state", "defaults"}


def innermost(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers that hold parameters and state: each one of a list, and the inner one of a wrapper.

    A wrapper is accepted if it shares the groups of the inner optimizer and has no state of its own, like timm's
    ``Lookahead`` and accelerate's ``AcceleratedOptimizer``.

    Raises:
        ValueError: An object is not a torch optimizer, or stores parameters where they cannot be removed.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, list | tuple):
        return list(dict.fromkeys(inner for one in optimizer for inner in innermost(one)))
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}. Parameters "
            "of removed blocks cannot be deleted from it."
        )
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and _is_wrapped_by(optimizer, value):
            return innermost(value)
        if name not in _KNOWN and _holds_parameters(value):
            raise ValueError(
                f"{type(optimizer).__name__} stores parameters, or an optimizer, in its attribute {name!r}, from which "
                "parameters of removed blocks cannot be deleted. Give the pruner an optimizer that stores them only "
                "in param_groups and state; or give it none, with live_removal=False."
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
    """Delete parameters and their state from optimizers, in place, because schedulers hold the same groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [index for index, parameter in enumerate(group["params"]) if parameter not in parameters]
            for key in group.keys() & {"params", "param_names"}:
                group[key] = [group[key][index] for index in kept]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def decays(optimizers: Iterable[Optimizer]) -> dict[Tensor, bool]:
    """For each trainable parameter, whether its optimizer decays it."""
    return {
        parameter: bool(group.get("weight_decay"))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
