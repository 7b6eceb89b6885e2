"""Remove branches at once, without training."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..surgery.branches import gates
from ..surgery.removal import add_gates, check_known, remove, removed_slots

__all__ = ["prune"]


def prune(model: nn.Module, slots: Iterable[str]) -> list[str]:
    """Close branches and remove them at once, in place; fine-tune afterwards.

    A probe checks that the network without the branches computes the same as with closed gates. Create the optimizer
    afterwards; otherwise it keeps the removed parameters.

    Args:
        model: A timm model with or without gates, or a transformers model of this package.
        slots: Slot paths, as returned by :meth:`timm_eps.Analysis.choose`.

    Returns:
        The slot paths removed now, including branches inside a removed one. A slot is not returned if its removal would
        change the output. Its branch then stays closed in the model, and a warning is logged.

    Raises:
        ValueError: A slot is unknown, the model has no residual branch, or is wrapped or compiled. The gates are
            unchanged then.

    Example::

        removed = timm_eps.prune(model, ["stages.2.blocks.1.drop_path"])
    """
    if not gates(model) and not removed_slots(model):
        add_gates(model)
    if isinstance(slots, str) or not isinstance(slots, Iterable):
        raise ValueError(f"slots must be a list of slot paths, got {str(slots)[:80]!r}.")
    chosen = list(slots)
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
