"""Averages of the weights: copies of a model that are updated in place and need the same structure.

Closing a gate or removing a block does not affect an existing copy. But averaging matches the tensors of the copy and
the model by their order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .branches import gates, timm_body
from .copies import note_copies
from .removal import add_gates, closed_slots, removed_slots, replay_removed

__all__ = ["follow", "left_behind", "warn_of_left_behind"]

_logger = logging.getLogger(__name__)


def follow(model: nn.Module, follower: Any) -> None:
    """Close and remove the same branches in a copy as in the model, in place.

    In training mode the copy's closed gates close for every batch, as in evaluation, so that BatchNorm statistics can
    be recomputed (``torch.optim.swa_utils.update_bn``).

    Args:
        model: A model with gates.
        follower: Copy of the model, or an object that holds it as ``module``.

    Raises:
        ValueError: The follower is not a copy of the model, or branches are removed from it that the model still has.
    """
    copied = _inner_model(follower)
    if timm_body(copied) is timm_body(model):
        raise ValueError("A follower is the model itself; pass a copy, such as an average of its weights.")
    if not gates(copied) and not removed_slots(copied):
        add_gates(copied)  # the copy was made before the model had gates
    removed, already = set(removed_slots(model)), set(removed_slots(copied))
    if strangers := (gates(copied).keys() | already) ^ (gates(model).keys() | removed):
        raise ValueError(f"A follower is not a copy of the model: they differ at {min(strangers)!r}.")
    if more := already - removed:
        raise ValueError(f"Branch {min(more)!r} is removed from a follower, but the model still has it.")
    replay_removed(copied, removed - already)
    found = gates(model)
    for slot, gate in gates(copied).items():
        gate.closed = found[slot].closed
        gate.epsilon = torch.finfo(gate.threshold.dtype).max if gate.closed else 0.0
        if gate.gain is not None:
            gate.measure_importance(False)


def left_behind(model: nn.Module, followers: Iterable[Any]) -> list[nn.Module]:
    """The copies of a model that are updated in place but have other closed or removed branches; each only once.

    The version counters of its tensors distinguish an average from a snapshot. Gradients distinguish a copy that is
    trained separately.

    Args:
        model: A model with gates.
        followers: Copies that follow the model.
    """
    copies = note_copies(timm_body(model))
    known = {id(timm_body(_inner_model(follower))) for follower in followers}
    found = [
        copied
        for copied in copies.alive
        if copied not in copies.named
        and id(copied) not in known
        and _is_updated(copied)
        and (removed_slots(copied), closed_slots(copied)) != (removed_slots(model), closed_slots(model))
    ]
    copies.named.update(found)
    return found


def warn_of_left_behind(model: nn.Module, followers: Iterable[Any]) -> None:
    """Warn about each copy that :func:`left_behind` finds."""
    for copied in left_behind(model, followers):
        _logger.warning(
            "A copy of the model (%s) is updated in place, like an average of the weights, but it lacks the model's "
            "closed and removed branches. Its outputs and its updates are wrong. Pass it to the pruner: "
            "EpsilonPruner(..., followers=[ema]), or pruner.followers.append(ema).",
            type(copied).__name__,
        )


def _is_updated(network: nn.Module) -> bool:
    parameters = [p for p in network.parameters() if not (p.is_meta or p.is_inference())]
    return any(p._version for p in parameters) and all(p.grad is None for p in parameters)


def _inner_model(follower: Any) -> nn.Module:
    """The copy of the model in an average, which timm's and torch's classes hold as ``module``."""
    inner = follower
    while not (hasattr(inner, "forward_features") or hasattr(inner, "timm_model")) and hasattr(inner, "module"):
        inner = inner.module
    if not isinstance(inner, nn.Module):
        raise ValueError(
            "followers must be copies of the model, or hold one as .module, like timm's ModelEmaV3 and torch's "
            f"AveragedModel; got {type(follower).__name__}."
        )
    timm_body(inner)  # raises if it is not a timm model
    return inner
