"""Remove branches at once, without training."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..analysis.measure import gated_copy, open_slots
from ..budget import Budget, budget_from
from ..criteria import ORDERS
from ..surgery.branches import gates
from ..surgery.removal import add_gates, check_known, remove, removed_slots
from .in_order import first_within

__all__ = ["order_of", "prune"]


def prune(
    model: nn.Module,
    slots: Iterable[str] | None = None,
    *,
    keep: float | None = None,
    target_params: float | Budget | None = None,
    target_macs: float | Budget | None = None,
    target_latency: float | Budget | None = None,
    criterion: str = "stage_ends",
) -> list[str]:
    """Close branches and remove them at once, in place; fine-tune afterwards.

    Give the slots, or a budget. A budget needs no images: branches are removed in the order of their places. A float of
    at most 1 is a fraction of the network, any other number is absolute.

    A probe checks that the network without the branches computes the same as with closed gates. Create the optimizer
    afterwards; otherwise it keeps the removed parameters.

    Args:
        model: A timm model with or without gates, or a transformers model of this package.
        slots: Slot paths, as returned by :meth:`timm_eps.Analysis.choose`.
        keep: Number or fraction of the branches to keep.
        target_params: Number or fraction of the parameters to keep.
        target_macs: Number or fraction of the multiply-adds for one image.
        target_latency: Milliseconds, or fraction of the time, of a forward pass of 32 images on the model's device. For
            another batch size pass a ``timm_eps.budget.TargetLatency``.
        criterion: Order for a budget: ``'stage_ends'``, the last branches of each stage first; or ``'last'``, the last
            branches of the network first.

    Returns:
        The slot paths removed now, including branches inside a removed one. A slot is not returned if its removal would
        change the output. Its branch then stays closed in the model, and a warning is logged.

    Raises:
        ValueError: A slot is unknown, the model has no residual branch, or is wrapped or compiled; there are not either
            slots or exactly one budget; no choice of branches reaches the budget. The gates are unchanged then.

    Example::

        removed = timm_eps.prune(model, ["stages.2.blocks.1.drop_path"])
        removed = timm_eps.prune(model, target_macs=0.5)
    """
    budgets = {
        "keep": keep, "target_params": target_params, "target_macs": target_macs, "target_latency": target_latency
    }  # fmt: skip
    if slots is None:
        chosen = first_within(model, order_of(model, criterion), budget_from(**budgets))
    elif any(value is not None for value in budgets.values()):
        raise ValueError("Give slots or a budget, not both.")
    elif isinstance(slots, str) or not isinstance(slots, Iterable):
        raise ValueError(f"slots must be a list of slot paths, got {str(slots)[:80]!r}.")
    else:
        chosen = list(slots)
    if not gates(model) and not removed_slots(model):
        add_gates(model)
    check_known(model, chosen)
    found = gates(model)
    before = {slot: found[slot].closed for slot in chosen}
    for slot in chosen:
        found[slot].closed = True
    try:
        return remove(model, chosen)
    except BaseException:
        for slot, closed in before.items():
            found[slot].closed = closed
        raise


def order_of(model: nn.Module, criterion: str) -> dict[str, float]:
    """Ranks of the open branches of a model, by their places in the network.

    Args:
        model: A timm model with or without gates, or a transformers model of this package.
        criterion: Name in ``ORDERS``.

    Raises:
        ValueError: The name is unknown.
    """
    if criterion not in ORDERS:
        raise ValueError(f"criterion must be one of {', '.join(ORDERS)}, got {str(criterion)[:80]!r}.")
    return ORDERS[criterion](open_slots(gated_copy(model)), removed_slots(model))
