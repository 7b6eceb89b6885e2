"""A ramp down to a number of parameters or multiply-adds, or to a latency, instead of a number of branches."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .analysis.measure import branch_times, milliseconds, network_without, pruned_copy
from .analysis.selection import within_measured
from .budget import Budget, TargetLatency, budget_from, check_reachable
from .schedule import BudgetEpsilon, ConstantEpsilon, Schedule
from .surgery.branches import gates, input_size, probe_batch, timm_body
from .surgery.distributed import agreed
from .surgery.holding import settled_slots
from .surgery.removal import removed_slots
from .surgery.sharding import gathered

__all__ = ["CostEpsilon", "schedule_from"]


class CostEpsilon(BudgetEpsilon):
    """A schedule that closes the branches of lowest rank until the network is within a budget.

    After warm-up the allowed size falls along the cubic ramp of :class:`BudgetEpsilon`. In each epoch, as many branches
    close as this size requires, starting with the lowest rank. At least one branch stays.

    Parameters and multiply-adds are counted on the remaining structure. The latency of each branch is measured when the
    training begins. At the end of the ramp the remaining network is measured, and its number of branches corrected.

    Args:
        budget: Size that the network may keep.
        warmup_epochs: Number of epochs with ε = 0 at the beginning.
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
        """Measure the model before it is trained.

        Raises:
            ValueError: The network exceeds the budget even without any branch. A network with removed branches is not
                checked, because the size of the dense network comes from a state that is loaded later.
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
        """Maximum number of branches, out of ``total``, that stay. The final number depends on the ranks."""
        return max(total - 1, 1)

    def is_due(self, epoch: int, total: int, discarded: Collection[str]) -> bool:
        """Whether the network exceeds in ``epoch`` its allowed size without the discarded branches."""
        assert self.costs is not None, "attached when the pruner was made"
        return self.costs.left(discarded) > self._allowed(epoch)

    def divide(self, epoch: int, ranks: Mapping[str, float], total: int) -> tuple[list[str], list[str]]:
        """The branches to close in ``epoch``, and the others, as in :meth:`BudgetEpsilon.divide`."""
        costs = self.costs
        assert costs is not None, "attached when the pruner was made"
        ordered = sorted((slot for slot, value in ranks.items() if math.isfinite(value)), key=ranks.__getitem__)
        most = min(len(ordered), len(ranks) - 1)

        def first_within(cost: float) -> list[str]:
            # The cost decreases with each further branch, so a binary search finds the first number within the budget.
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
        """The measurements of the dense network, as plain numbers and dicts."""
        assert self.costs is not None, "attached when the pruner was made"
        return self.costs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the measurements from the beginning of the training.

        Raises:
            ValueError: The state belongs to another kind of budget.
        """
        assert self.costs is not None, "attached when the pruner was made"
        if missing := self.costs.state_dict().keys() ^ state.keys():
            raise ValueError(f"The pruner's state is for another budget than {self.budget!r}: it differs in {missing}.")
        if isinstance(self.costs, _Counts) and self._began_dense and state["dense"] != self.costs.dense:
            raise ValueError(
                f"The pruner's state is for another budget than {self.budget!r}, or another network: its dense "
                f"network had {state['dense']:g}, this one has {self.costs.dense:g}."
            )
        for name, value in state.items():
            setattr(self.costs, name, value)


class _Counts:
    """Sizes that a budget counts.

    Args:
        body: The timm model.
        budget: Budget that counts the sizes.
    """

    def __init__(self, body: nn.Module, budget: Budget) -> None:
        self.body, self.budget = body, budget
        self._known: dict[frozenset[str], float] = {}
        self.dense = self.left([])

    def left(self, slots: Iterable[str]) -> float:
        """Size without these branches and the removed ones."""
        key = frozenset((*slots, *settled_slots(self.body)))
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
    """Milliseconds of a forward pass. All processes use the times of the first one.

    Args:
        body: The timm model.
        batch_size: Number of images of a pass.
    """

    def __init__(self, body: nn.Module, batch_size: int) -> None:
        self.body, self.batch_size = body, batch_size
        found = branch_times(pruned_copy(gathered(body), []), probe_batch(body, batch_size))
        self.dense, self.none, *saved = agreed([found.dense, found.none, *found.saved.values()], body)
        self.saved = dict(zip(found.saved, saved, strict=True))
        self._known: dict[frozenset[str], float] = {}

    def left(self, slots: Iterable[str]) -> float:
        """Time predicted from the time of each branch at the beginning of the training."""
        without = {*slots, *settled_slots(self.body)}
        return max(self.dense - sum(self.saved.get(slot, 0.0) for slot in without), self.none)

    def least(self) -> float:
        """What is left without any branch."""
        return self.none

    def measured(self, slots: Iterable[str]) -> float:
        """Time measured in turn with the network without branches, so that the drift of the machine cancels out."""
        key = frozenset((*slots, *settled_slots(self.body)))
        if key not in self._known:
            here = [slot for slot in key if slot in gates(self.body)]
            body = gathered(self.body)
            nets = {"none": pruned_copy(body, gates(body)), "pruned": pruned_copy(body, here)}
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
    """Make the schedule from the arguments of a pruner.

    Args:
        epsilon: A constant threshold.
        keep: Fraction or number of branches to keep.
        targets: Other budgets by argument name, as in :func:`timm_eps.budget.budget_from`.
        warmup_epochs: Number of epochs in which every gate is open.
        ramp_epochs: Number of epochs from the first closed branch to the full budget.
        schedule: Schedule that is used as it is.

    Raises:
        ValueError: Not exactly one of them is given, or a ramp is given without a budget.
    """
    given = {"epsilon": epsilon, "keep": keep, **targets, "schedule": schedule}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Give exactly one of epsilon, keep, {', '.join(targets)} and schedule; "
            f"got {' and '.join(f'{name}={value!r}' for name, value in given.items()) or 'none'}."
        )
    if schedule is not None:
        if warmup_epochs or ramp_epochs:
            raise ValueError("warmup_epochs and ramp_epochs need epsilon or a budget; a schedule has its own.")
        return schedule
    if keep is not None:
        return BudgetEpsilon(keep, warmup_epochs, ramp_epochs)
    if epsilon is None:
        return CostEpsilon(budget_from(**targets), warmup_epochs, ramp_epochs)
    if ramp_epochs:
        raise ValueError(f"ramp_epochs={ramp_epochs} needs a budget such as keep; a constant epsilon has no ramp.")
    return ConstantEpsilon(epsilon, warmup_epochs)
