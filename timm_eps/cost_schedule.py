"""A ramp down to a number of parameters or multiply-adds, or to a latency, instead of a number of branches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .analysis.measure import branch_times, milliseconds, network_without, pruned_copy
from .analysis.selection import within_measured
from .budget import Budget, TargetLatency, budget_from, check_reachable
from .schedule import BudgetEpsilon, ConstantEpsilon, Schedule
from .surgery.branches import gates, input_size, probe_batch, timm_body
from .surgery.distributed import agreed
from .surgery.removal import removed_slots

__all__ = ["CostEpsilon", "schedule_from"]


class CostEpsilon(BudgetEpsilon):
    """ε that follows the ranks of the branches until the network costs no more than a budget allows.

    After warm-up what may stay falls along the cubic ramp of :class:`BudgetEpsilon`. In each epoch the branches of the
    lowest rank close, as many as it takes. At least one branch stays.

    Parameters and multiply-adds are counted on the structure that is left. Latency is measured for each branch when
    the training begins, and at the end of the ramp on the network that is left, whose number of branches is corrected.

    Args:
        budget: What may stay.
        warmup_epochs: Number of epochs with ε = 0 first.
        ramp_epochs: Number of epochs from the first closed branch to the full budget.

    Example::

        budget = timm_eps.budget.TargetLatency(0.5, batch_size=1)
        schedule = timm_eps.CostEpsilon(budget, warmup_epochs=1, ramp_epochs=2)
        pruner = timm_eps.EpsilonPruner(model, optimizer, schedule=schedule)
    """

    def __init__(self, budget: Budget, warmup_epochs: int = 0, ramp_epochs: int = 0) -> None:
        super().__init__(1, warmup_epochs, ramp_epochs)
        self.budget = budget
        self.costs: _Counts | _Times | None = None
        self._began_dense = True

    def attach(self, model: nn.Module) -> None:
        """Measure the model that is to be trained.

        Raises:
            ValueError: The network exceeds the budget even without any branch. It is not checked for a network that
                has lost branches already: a state that is loaded next says what the dense network had.
        """
        body = timm_body(model)
        self._began_dense = not removed_slots(body)
        if isinstance(self.budget, TargetLatency):
            self.costs = _Times(body, self.budget.batch_size)
        else:
            self.costs = _Counts(body, self.budget)
        if not removed_slots(body):
            check_reachable(self.budget, self.costs.dense, self.costs.least(), len(gates(body)))

    def kept(self, total: int) -> int:
        """How many of ``total`` branches stay at most: which ones go, and so how many, their ranks decide."""
        return max(total - 1, 1)

    def to_close(self, epoch: int, total: int) -> int:
        """How many of ``total`` branches are to be closed or removed: as many as are removed, or more."""
        assert self.costs is not None, "attached when the pruner was made"
        removed = self.costs.removed()
        return removed if self.costs.left([]) <= self._allowed(epoch) else min(removed + 1, total)

    def divide(self, epoch: int, ranks: Mapping[str, float], total: int) -> tuple[list[str], list[str]]:
        """The branches that are to be closed in ``epoch`` and the others, as :meth:`BudgetEpsilon.divide` has them."""
        costs = self.costs
        assert costs is not None, "attached when the pruner was made"
        ordered = sorted((slot for slot, value in ranks.items() if math.isfinite(value)), key=ranks.__getitem__)
        most = min(len(ordered), len(ranks) - 1)

        def first_within(cost: float) -> list[str]:
            # What is left falls with each further branch.
            return ordered[: bisect.bisect_left(range(most), -cost, key=lambda count: -costs.left(ordered[:count]))]

        allowed = self._allowed(epoch)
        due = first_within(allowed)
        if isinstance(costs, _Times) and self.progress(epoch) == 1 and due:
            due = within_measured(first_within, costs.measured, allowed)
        return due, ordered[len(due) :]

    def _allowed(self, epoch: int) -> float:
        assert self.costs is not None, "attached when the pruner was made"
        dense = self.costs.dense
        return dense - max(dense - self.budget.goal(dense), 0.0) * self.progress(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was measured of the dense network, as plain numbers and dicts."""
        assert self.costs is not None, "attached when the pruner was made"
        return self.costs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was measured when the training began.

        Raises:
            ValueError: The state is of another kind of budget.
        """
        assert self.costs is not None, "attached when the pruner was made"
        if missing := self.costs.state_dict().keys() ^ state.keys():
            raise ValueError(f"The pruner's state is of another budget than {self.budget!r}: it differs in {missing}.")
        if isinstance(self.costs, _Counts) and self._began_dense and state["dense"] != self.costs.dense:
            raise ValueError(
                f"The pruner's state is of another budget than {self.budget!r}, or of another network: its dense "
                f"network had {state['dense']:g}, this one has {self.costs.dense:g}."
            )
        for name, value in state.items():
            setattr(self.costs, name, value)


class _Counts:
    """What a budget counts.

    Args:
        body: The timm model.
        budget: Counts it.
    """

    def __init__(self, body: nn.Module, budget: Budget) -> None:
        self.body, self.budget = body, budget
        self._known: dict[frozenset[str], float] = {}
        self.dense = self.left([])

    def removed(self) -> int:
        return len(removed_slots(self.body))

    def left(self, slots: Iterable[str]) -> float:
        """What is left without these branches and those that are removed."""
        key = frozenset((*slots, *removed_slots(self.body)))
        if key not in self._known:
            here = [slot for slot in key if slot in gates(self.body)]
            self._known[key] = self.budget.count(network_without(self.body, here), input_size(self.body))
        return self._known[key]

    def least(self) -> float:
        """What is left without any branch."""
        return self.left(gates(self.body))

    def state_dict(self) -> dict[str, Any]:
        return {"dense": self.dense}


class _Times:
    """Milliseconds of a forward pass. All processes go by the times of the first one.

    Args:
        body: The timm model.
        batch_size: Number of images of a pass.
    """

    def __init__(self, body: nn.Module, batch_size: int) -> None:
        self.body, self.batch_size = body, batch_size
        found = branch_times(pruned_copy(body, []), probe_batch(body, batch_size))
        self.dense, self.none, *saved = agreed([found.dense, found.none, *found.saved.values()], body)
        self.saved = dict(zip(found.saved, saved, strict=True))
        self._known: dict[frozenset[str], float] = {}

    def removed(self) -> int:
        return len(removed_slots(self.body))

    def left(self, slots: Iterable[str]) -> float:
        """Predicted from what went with each branch when the training began."""
        without = {*slots, *removed_slots(self.body)}
        return max(self.dense - sum(self.saved.get(slot, 0.0) for slot in without), self.none)

    def least(self) -> float:
        """What is left without any branch."""
        return self.none

    def measured(self, slots: Iterable[str]) -> float:
        """Measured beside the network without any branch: the drift of the machine since then cancels out."""
        key = frozenset((*slots, *removed_slots(self.body)))
        if key not in self._known:
            here = [slot for slot in key if slot in gates(self.body)]
            nets = {"none": pruned_copy(self.body, gates(self.body)), "pruned": pruned_copy(self.body, here)}
            found = milliseconds(nets, probe_batch(self.body, self.batch_size))
            [self._known[key]] = agreed([found["pruned"] * self.none / found["none"]], self.body)
        return self._known[key]

    def state_dict(self) -> dict[str, Any]:
        return {"dense": self.dense, "none": self.none, "saved": self.saved}


def schedule_from(
    epsilon: float | None,
    keep: float | int | None,
    targets: Mapping[str, float | Budget | None],
    warmup_epochs: int,
    ramp_epochs: int,
    schedule: Schedule | None = None,
) -> Schedule:
    """The schedule that the arguments of a pruner stand for.

    Args:
        epsilon: A constant threshold.
        keep: Fraction or number of branches to keep.
        targets: Other budgets by the name of their argument, as :func:`timm_eps.budget.budget_from` takes them.
        warmup_epochs: Number of epochs in which every gate is open.
        ramp_epochs: Number of epochs from the first closed branch to the full budget.
        schedule: One that is ready.

    Raises:
        ValueError: Not exactly one of them is given, or a ramp without a budget.
    """
    given = {"epsilon": epsilon, "keep": keep, **targets, "schedule": schedule}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Give exactly one of epsilon and keep, or in place of keep one of {', '.join(targets)}, or a schedule; "
            f"got {' and '.join(f'{name}={value!r}' for name, value in given.items()) or 'none'}."
        )
    if schedule is not None:
        if warmup_epochs or ramp_epochs:
            raise ValueError("warmup_epochs and ramp_epochs go with epsilon or a budget: a schedule has its own.")
        return schedule
    if keep is not None:
        return BudgetEpsilon(keep, warmup_epochs, ramp_epochs)
    if epsilon is None:
        return CostEpsilon(budget_from(**targets), warmup_epochs, ramp_epochs)
    if ramp_epochs:
        raise ValueError(f"ramp_epochs={ramp_epochs} goes with keep; a constant epsilon has no ramp.")
    return ConstantEpsilon(epsilon, warmup_epochs)
