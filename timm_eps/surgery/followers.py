"""Averages of the weights: copies of a model that are updated in place, and must have its structure.

A closed gate is an attribute of a module, and a removed block is no longer there. Neither reaches a copy that was made
before, and what updates the copy pairs its tensors with the model's by their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .branches import gates, timm_body
from .copies import note_copies
from .removal import add_gates, closed_slots, removed_slots, replay_removed

__all__ = ["follow", "left_behind"]


def follow(model: nn.Module, follower: Any) -> None:
    """Close and remove, in a copy of a model, what is closed and removed in the model, in place.

    The copy's gates close for batches in training as they do in evaluation, so that the statistics of BatchNorm may be
    taken anew (``torch.optim.swa_utils.update_bn``).

    Args:
        model: A model with gates.
        follower: The copy, or an object that holds it as ``module``.

    Raises:
        ValueError: It is no copy of the model, or has lost branches that the model still has.
    """
    copied = _inner_model(follower)
    if timm_body(copied) is timm_body(model):
        raise ValueError("A follower is the model itself; pass a copy of it, such as the average of its weights.")
    if not gates(copied) and not removed_slots(copied):
        add_gates(copied)  # it was begun before the model had any
    removed, already = set(removed_slots(model)), set(removed_slots(copied))
    if strangers := (gates(copied).keys() | already) ^ (gates(model).keys() | removed):
        raise ValueError(f"A follower is no copy of the model: they differ at {min(strangers)!r}.")
    if more := already - removed:
        raise ValueError(f"A follower has already lost {min(more)!r}, which the model still has.")
    replay_removed(copied, removed - already)
    found = gates(model)
    for slot, gate in gates(copied).items():
        gate.closed = found[slot].closed
        gate.epsilon = torch.finfo(gate.threshold.dtype).max if gate.closed else 0.0
        if gate.gain is not None:
            gate.measure_importance(False)


def left_behind(model: nn.Module, followers: Iterable[Any]) -> list[nn.Module]:
    """The copies of a model that are updated in place but have other closed or removed branches; each only once.

    An average is told from a snapshot by the counter of changes in place that each tensor has, and from a copy that is
    trained on its own by gradients.

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


def _is_updated(network: nn.Module) -> bool:
    parameters = [p for p in network.parameters() if not (p.is_meta or p.is_inference())]
    return any(p._version for p in parameters) and all(p.grad is None for p in parameters)


def _inner_model(follower: Any) -> nn.Module:
    """The copy of the model that an average holds as ``module``, as timm's and torch's classes do."""
    inner = follower
    while not (hasattr(inner, "forward_features") or hasattr(inner, "timm_model")) and hasattr(inner, "module"):
        inner = inner.module
    if not isinstance(inner, nn.Module):
        raise ValueError(
            "followers must be copies of the model, or hold one as .module, as timm's ModelEmaV3 and torch's "
            f"AveragedModel do; got {type(follower).__name__}."
        )
    timm_body(inner)  # refuses what is no timm model
    return inner
