"""What a budget by importance ranks the branches by."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping

from .branches import stage_of

__all__ = ["importance_ranks"]


def importance_ranks(importances: Mapping[str, float], removed: Iterable[str], kept: int) -> dict[str, float]:
    """Rank of each branch: the lowest go first, and one whose rank is infinite stays.

    Each stage keeps its share of the budget, those of its branches that are the most important, and the stages shrink
    side by side. Importances of different stages do not compare: over nothing the large branches of late stages stay
    and hardly a parameter goes, over the size the small ones of the first stage do.

    Args:
        importances: Of each branch that is there, as :meth:`EpsilonGate.measure_importance` has it; infinity or no
            number if it was not measured.
        removed: Slots of the branches that are gone.
        kept: How many branches stay in the end. Where these are fewer than the stages, importance alone decides.
    """
    counts = collections.Counter(stage_of(slot) for slot in (*importances, *removed))
    if kept < len(counts):
        return dict(importances)
    ranks = dict.fromkeys(importances, math.inf)
    for stage, places in shares(counts, kept).items():
        there = [slot for slot in importances if stage_of(slot) == stage]
        measured = sorted((slot for slot in there if math.isfinite(importances[slot])), key=importances.__getitem__)
        excess = max(len(there) - places, 0)
        for position, slot in enumerate(measured[:excess]):
            ranks[slot] = (position - excess) / counts[stage]
    return ranks


def shares(counts: Mapping[str, int], kept: int) -> dict[str, int]:
    """How many of ``kept`` places each stage has: one, and the others in proportion to its branches (D'Hondt)."""
    places = dict.fromkeys(counts, 1)
    for _ in range(kept - len(counts)):
        places[max(counts, key=lambda stage: counts[stage] / (places[stage] + 1))] += 1
    return places
