"""Which branches go for a budget: those whose removal raises the loss least, for what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

__all__ = ["least_loss", "within_measured", "without_superfluous"]

_STEPS = 1000


def least_loss(rises: Mapping[str, float], savings: Mapping[str, float], need: float) -> list[str]:
    """The branches that save at least ``need`` together, at the smallest sum of rises: a knapsack, solved exactly.

    Args:
        rises: What the loss rises by without each branch. One below 0 counts as 0: it is not removed unless needed.
        savings: What goes with each branch, in any unit, at least 0.
        need: What is to go, in that unit. Rounding to a thousandth of it is to the safe side.

    Returns:
        Slot paths; all that save anything if they do not save enough.
    """
    useful = [slot for slot in rises if savings[slot] > 0]
    if need <= 0:
        return []
    # Of each number of thousandths that are saved the smallest rise, and the branches, as bits.
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * _STEPS
    finite = [value for value in rises.values() if math.isfinite(value)]
    far = 1 + sum(map(abs, finite))  # more than all others together
    tiny = far * 1e-9  # of two equal sums, the one of fewer branches
    for index, slot in enumerate(useful):
        steps = math.floor(_STEPS * savings[slot] / need)
        weight = (max(rises[slot], 0.0) if math.isfinite(rises[slot]) else far) + tiny
        for there in range(_STEPS, -1, -1):
            value, chosen = best[there]
            reached = min(there + steps, _STEPS)
            if value + weight < best[reached][0]:
                best[reached] = value + weight, chosen | 1 << index
    if math.isinf(best[_STEPS][0]):
        return useful
    return [slot for index, slot in enumerate(useful) if best[_STEPS][1] >> index & 1]


def without_superfluous(
    slots: Iterable[str],
    rises: Mapping[str, float],
    savings: Mapping[str, float],
    cost: Callable[[list[str]], float],
    goal: float,
) -> list[str]:
    """Those of the branches that are needed to get down to ``goal``; the one of the largest rise is spared first.

    Args:
        slots: Branches without which the network costs at most ``goal``.
        rises: What the loss rises by without each.
        savings: What goes with each alone: putting it back costs at least as much.
        cost: What the network costs without some branches.
        goal: What it may cost.
    """
    chosen = list(slots)
    now = cost(chosen)
    for slot in sorted(chosen, key=lambda slot: -rises[slot]):
        if now + savings[slot] > goal:
            continue
        fewer = [other for other in chosen if other != slot]
        if (then := cost(fewer)) <= goal:
            chosen, now = fewer, then
    return chosen


def within_measured(
    choose: Callable[[float], list[str]],
    measure: Callable[[list[str]], float],
    goal: float,
    tolerance: float = 0.05,
    rounds: int = 6,
) -> list[str]:
    """Choose by predicted costs so that the measured cost meets a goal.

    Args:
        choose: The branches to remove for a predicted cost.
        measure: What a network without them really costs.
        goal: What it may cost.
        tolerance: Fraction of the goal by which it may be missed.
        rounds: Attempts; after each one the predicted cost is corrected by what was measured.

    Returns:
        Of the choices that were measured the one nearest to the goal, and not above it by more than the tolerance;
        if there is none, the cheapest.
    """
    asked = goal
    tried: dict[tuple[str, ...], float] = {}
    for _ in range(rounds):
        slots = tuple(choose(asked))
        if slots in tried:
            break
        tried[slots] = measure(list(slots))
        if goal * (1 - tolerance) <= tried[slots] <= goal:
            break
        asked *= goal / tried[slots]
    if fitting := [slots for slots, cost in tried.items() if cost <= goal * (1 + tolerance)]:
        nearest = min(fitting, key=lambda slots: abs(tried[slots] - goal))
        return list(nearest)
    return list(min(tried.items(), key=lambda item: item[1])[0])
