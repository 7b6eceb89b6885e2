"""Select branches for a budget so that their removal raises the loss least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

__all__ = ["least_loss", "within_measured", "without_superfluous"]

_STEPS = 1000


def least_loss(rises: Mapping[str, float], savings: Mapping[str, float], need: float) -> list[str]:
    """Branches that save at least ``need`` together, with the smallest sum of rises: an exact knapsack solution.

    Args:
        rises: Rise of the loss without each branch. Negative rises count as 0, so no branch is removed unnecessarily.
        savings: Savings by the removal of each branch, in any unit, at least 0.
        need: Required saving in the same unit. Savings are rounded down to a thousandth of it.

    Returns:
        Slot paths; all branches with savings if they do not save enough.
    """
    useful = [slot for slot in rises if savings[slot] > 0]
    if need <= 0:
        return []
    # For each number of saved thousandths: the smallest rise, and the branches as bits.
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * _STEPS
    finite = [value for value in rises.values() if math.isfinite(value)]
    far = 1 + sum(map(abs, finite))  # more than the sum of all others
    tiny = far * 1e-9  # for equal sums, prefer fewer branches
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
    """The branches that are necessary for ``goal``. Unnecessary ones are kept, beginning with the largest rise.

    Args:
        slots: Branches whose removal brings the cost to ``goal`` or below.
        rises: Rise of the loss without each branch.
        savings: Saving by each branch alone, a lower bound for the cost of keeping it.
        cost: Function that returns the cost of the network without some branches.
        goal: Maximum cost.
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
        choose: Function that returns the branches to remove for a predicted cost.
        measure: Function that returns the real cost without some branches.
        goal: Maximum cost.
        tolerance: Allowed error as a fraction of the goal.
        rounds: Maximum number of attempts. After each one the predicted cost is corrected.

    Returns:
        The measured choice closest to the goal and not above it by more than the tolerance. If there is none, the
        cheapest choice.
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
