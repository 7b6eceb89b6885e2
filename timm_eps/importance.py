"""What a budget by importance ranks the branches by."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .branches import stage_of

__all__ = ["importance_ranks"]


def importance_ranks(importances: Mapping[str, float], sizes: Mapping[str, float], kept: int) -> dict[str, float]:
    """Rank of each branch: the lowest go first, and one whose rank is infinite or not a number stays.

    The rank is the importance over the square root of the size: over the size itself only small branches would stay,
    over nothing hardly a parameter would go. The foremost branch of each stage has an infinite one: to first order the
    last branch of a stage may look dispensable, when nothing else does its work.

    Args:
        importances: Of each branch, as :meth:`EpsilonGate.measure_importance` has it; infinity if it was not measured.
        sizes: Parameters of each branch.
        kept: How many branches stay in the end. Where these are fewer than the stages, no stage is favoured.
    """
    ranks = {slot: importance / math.sqrt(sizes[slot]) for slot, importance in importances.items()}
    foremost: dict[str, str] = {}
    for slot, rank in ranks.items():
        stage = stage_of(slot)
        if math.isfinite(rank) and (stage not in foremost or rank >= ranks[foremost[stage]]):
            foremost[stage] = slot
    if len(foremost) <= kept:
        ranks |= dict.fromkeys(foremost.values(), math.inf)
    return ranks
