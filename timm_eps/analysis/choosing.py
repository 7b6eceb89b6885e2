"""Choose the branches to remove for a budget, from the results of an analysis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ..budget import BUDGETS, Budget, Keep, TargetLatency, TargetMacs, TargetParams, check_reachable
from .live_network import LiveNetwork
from .selection import least_loss, within_measured, without_superfluous
from .worth import Branch, Step

__all__ = ["choose"]

Cost = Callable[[list[str]], float]
# Field of a report's branches and steps, and of the size of a live network.
_FIELDS: dict[type[Budget], str] = {TargetParams: "parameters", TargetMacs: "macs"}


def choose(
    branches: Sequence[Branch], curve: Sequence[Step], budget: Budget, batch_size: int, live: LiveNetwork | None
) -> list[str]:
    """Choose branches for a budget; see :meth:`timm_eps.Analysis.choose`.

    Args:
        branches: Value and cost of each branch alone.
        curve: Remaining network after each closing.
        budget: Size that the network may keep.
        batch_size: Batch size of the latency.
        live: Network to measure; without it the choice follows the curve.

    Raises:
        ValueError: The network exceeds the budget even without any branch, or its branches have changed.
    """
    if type(budget) in BUDGETS.values():
        costs = {branch.slot: _of_branch(branch, budget, batch_size) for branch in branches}
        left = [_of_step(step, budget, batch_size) for step in curve]
    elif live is None:
        raise ValueError(f"{budget!r} is counted on the network, but a report from a file has no network.")
    else:  # a user-defined budget
        count: Cost = partial(live.count_without, budget)
        costs = {branch.slot: count([]) - count([branch.slot]) for branch in branches}
        left = [count([slot for step in curve[: place + 1] for slot in step.slots]) for place in range(len(curve))]
    goal = budget.goal(left[0])
    check_reachable(budget, left[0], min(left), len(branches))
    if live is None:
        return _in_order(costs, _along(curve, left, goal))
    live.check(costs)
    chooser = _Chooser(costs, branches, curve, left, live)

    def predicted(slots: Iterable[str]) -> float:
        return left[0] - sum(costs[slot] for slot in slots)

    if isinstance(budget, TargetLatency):
        measure = live.stopwatch(batch_size, left[0] if budget.is_fraction else None)
        return within_measured(partial(chooser.best, predicted), measure, goal)
    if isinstance(budget, Keep):
        return chooser.best(predicted, goal)
    if field := _FIELDS.get(type(budget)):  # the analysis has already counted some structures
        return chooser.best(lambda slots: getattr(live.size_without(slots), field), goal)
    return chooser.best(partial(live.count_without, budget), goal)


def _of_branch(branch: Branch, budget: Budget, batch_size: int) -> float:
    if isinstance(budget, TargetLatency):
        return branch.milliseconds[batch_size]
    if isinstance(budget, Keep):
        return 1
    return getattr(branch, _FIELDS[type(budget)])


def _of_step(step: Step, budget: Budget, batch_size: int) -> float:
    if isinstance(budget, TargetLatency):
        return step.milliseconds[batch_size]
    if isinstance(budget, Keep):
        return step.branches
    return getattr(step, _FIELDS[type(budget)])


def _along(curve: Sequence[Step], left: Sequence[float], goal: float) -> list[str]:
    """The closed branches at the first step of the curve with a cost within the goal."""
    last = next((index for index, cost in enumerate(left) if cost <= goal), len(curve) - 1)
    return [slot for step in curve[: last + 1] for slot in step.slots]


def _in_order(order: Iterable[str], slots: Iterable[str]) -> list[str]:
    chosen = set(slots)
    return [slot for slot in order if slot in chosen]


class _Chooser:
    """Compares several choices by their loss on the images.

    Args:
        costs: Savings by each branch, in the order of the network.
        branches: Value of each branch.
        curve: Remaining network after each closing.
        left: Cost of each step of the curve.
        live: Network to measure.
    """

    def __init__(
        self,
        costs: dict[str, float],
        branches: Sequence[Branch],
        curve: Sequence[Step],
        left: Sequence[float],
        live: LiveNetwork,
    ) -> None:
        self.costs, self.curve, self.left, self.live = costs, curve, left, live
        self.rises = {branch.slot: _or_infinity(branch.rise) for branch in branches}
        # Rise of the loss at each branch's step of the curve, with the branches of earlier steps closed.
        self.rises_in_turn = dict.fromkeys(costs, math.inf)
        for before, step in itertools.pairwise(curve):
            rise = _or_infinity(step.loss - before.loss) / max(len(step.slots), 1)
            self.rises_in_turn |= dict.fromkeys(step.slots, rise)
        self._losses: dict[tuple[str, ...], float] = {}

    def best(self, cost: Cost, goal: float) -> list[str]:
        """The choice with the smallest loss, out of some choices with a cost of at most ``goal``."""
        choices = [
            _along(self.curve, self.left, goal),
            self._knapsack(self.rises, cost, goal),
            self._knapsack(self.rises_in_turn, cost, goal),
        ]
        within: set[tuple[str, ...]] = {
            tuple(_in_order(self.costs, without_superfluous(slots, self.rises_in_turn, self.costs, cost, goal)))
            for slots in choices
            if cost(slots) <= goal
        }
        if len(within) > 1:
            best = min(sorted(within), key=self._loss)
            return list(best)
        return list(*within) if within else list(self.costs)

    def _knapsack(self, rises: dict[str, float], cost: Cost, goal: float) -> list[str]:
        """The choice with the smallest sum of rises, enlarged until the real cost of the network is within ``goal``."""
        need = cost([]) - goal
        while True:
            slots = least_loss(rises, self.costs, need)
            excess = cost(slots) - goal
            if excess <= 0 or sum(self.costs[slot] for slot in slots) < need:
                return slots
            need += excess

    def _loss(self, slots: tuple[str, ...]) -> float:
        if slots not in self._losses:
            self._losses[slots] = _or_infinity(self.live.loss_without(slots))
        return self._losses[slots]


def _or_infinity(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
