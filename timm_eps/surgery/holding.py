"""Branches that a sharded model holds closed, because it cannot remove them while it trains.

A held branch outputs zero on every batch, in training and in evaluation. It counts as removed: the criteria and the
budgets do not see it any more. The next save removes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from ..gate import EpsilonGate
from .branches import gates
from .removal import remove, removed_slots
from .sharding import gathered, is_sharded

__all__ = ["ALWAYS", "free_gates", "held_slots", "hold", "settled_slots", "whole_without_held"]

_logger = logging.getLogger(__name__)

# An ε that closes a branch on every batch. A pruner's state contains it, so a resumed run holds the same branches.
ALWAYS = torch.finfo(torch.float32).max


def hold(model: nn.Module, slots: Iterable[str]) -> None:
    """Close branches of a sharded model for good. The first call for a model logs what that means."""
    if not held_slots(model):
        _logger.warning(
            "The parameters are sharded, so closed branches are not removed while the model trains. They stay zero, "
            "and are removed when the model is saved. Every process must call timm_eps.save_pretrained(model, ...)."
        )
    found = gates(model)
    for slot in slots:
        found[slot].closed, found[slot].epsilon, found[slot].gain = True, ALWAYS, None


def held_slots(model: nn.Module) -> list[str]:
    """Slots of the held branches; none if the model is not sharded."""
    if not is_sharded(model):
        return []
    return [slot for slot, gate in gates(model).items() if gate.closed and gate.epsilon == ALWAYS]


def free_gates(model: nn.Module) -> dict[str, EpsilonGate]:
    """The gates of the branches that are neither removed nor held, by slot."""
    held = set(held_slots(model))
    return {slot: gate for slot, gate in gates(model).items() if slot not in held}


def whole_without_held(model: nn.Module) -> nn.Module:
    """The network that a criterion may evaluate: a whole copy without held branches, or the model if it is not sharded.

    Every process must call this.
    """
    whole = gathered(model)
    if held := held_slots(model):
        remove(whole, held)
    return whole


def settled_slots(model: nn.Module) -> list[str]:
    """Slots of the branches that are removed or held."""
    return [*removed_slots(model), *held_slots(model)]
