"""Choose the branches to remove for a budget, in a given order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..analysis.measure import gated_copy, open_slots
from ..budget import Budget, Keep
from ..cost_schedule import CostEpsilon
from ..surgery.branches import gates
from ..surgery.removal import closed_slots, remove, removed_slots

__all__ = ["first_within"]


def first_within(model: nn.Module, ranks: Mapping[str, float], budget: Budget) -> list[str]:
    """The branches of the lowest ranks, as many as the budget requires. At least one branch stays.

    Args:
        model: A timm model with or without gates, or a transformers model of this package. It is not changed.
        ranks: Number for each branch that may be removed, by slot.
        budget: Size that the network may keep. Parameters and multiply-adds are counted on the remaining structure.
            Latency is measured on the model's device, and the choice is corrected until the pruned network meets it.

    Returns:
        Slot paths in the order of their ranks, for :func:`timm_eps.prune`.

    Raises:
        ValueError: A slot is unknown, or the network exceeds the budget even without any branch.
    """
    net = gated_copy(model)
    total = len(removed_slots(net)) + len(gates(net))
    remove(net, closed_slots(net))
    there = open_slots(net)
    if strangers := ranks.keys() - set(there):
        raise ValueError(f"ranks has {min(strangers)!r}, which is not an open branch of this {type(net).__name__}.")
    ordered = sorted(ranks, key=ranks.__getitem__)
    if isinstance(budget, Keep):
        return ordered[: max(len(there) - int(budget.goal(total)), 0)]
    schedule = CostEpsilon(budget)
    schedule.attach(net)
    due, _ = schedule.divide(0, ranks, total)
    return due
