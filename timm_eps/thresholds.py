"""The ε of each branch in an epoch, from a schedule and a criterion that ranks the branches."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from .cost_schedule import CostEpsilon
from .criteria import CRITERIA, Criterion, Response, Seen, criterion_from, ranked_by
from .importance import measured_importances
from .schedule import BudgetEpsilon, Schedule
from .surgery.branches import gates, timm_body
from .surgery.distributed import agreed
from .surgery.holding import settled_slots, whole_without_held

__all__ = ["Thresholds", "keep_one_open", "ranking_for"]

_logger = logging.getLogger(__name__)


def ranking_for(schedule: Schedule, criterion: str | Criterion) -> Criterion:
    """The criterion with a given name, or the criterion that is given.

    Raises:
        ValueError: The criterion is unknown, or the schedule cannot use it.
    """
    ranking = criterion_from(criterion)
    if not isinstance(schedule, BudgetEpsilon) and not isinstance(ranking, Response):
        raise ValueError(f"criterion={criterion!r} needs a budget such as keep; other schedules use the responses.")
    return ranking


class Thresholds:
    """Computes the thresholds for a pruner.

    Args:
        model: The model with gates.
        schedule: Schedule of ε, or of the number of branches to close.
        ranking: Criterion returned by :func:`ranking_for`, which ranks the branches if there is a budget.
        total: Number of branches of the unpruned network.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, ranking: Criterion, total: int) -> None:
        self.model, self.schedule, self.ranking, self.total = model, schedule, ranking, total

    @property
    def wanted(self) -> int:
        """Number of branches that the budget keeps; without a budget, all of them."""
        return self.schedule.kept(self.total) if isinstance(self.schedule, BudgetEpsilon) else self.total

    def is_ranking(self, epoch: int, done: Collection[str] = ()) -> bool:
        """Whether branches must be ranked after an epoch, because more of them must close in the next one.

        Args:
            epoch: The epoch, counted from 0.
            done: Slots of closed branches that are removed later, and count as removed.
        """
        if not isinstance(self.schedule, BudgetEpsilon):
            return False
        return self.schedule.is_due(epoch + 1, self.total, {*settled_slots(self.model), *done})

    def is_measuring(self, epoch: int, done: Collection[str] = ()) -> bool:
        """Whether ranking the branches after an epoch needs importances; see :meth:`is_ranking`."""
        return getattr(self.ranking, "measures_importance", False) and self.is_ranking(epoch, done)

    def reads_responses(self, epoch: int, done: Collection[str] = ()) -> bool:
        """Whether the thresholds after an epoch depend on the responses of all branches; see :meth:`is_ranking`."""
        if self._is_plain_budget:
            return self.is_ranking(epoch, done)
        return getattr(self.schedule, "reads_responses", True)

    @property
    def _is_plain_budget(self) -> bool:
        """Whether the schedule sets ε only while branches must close. A subclass with its own call may do more."""
        kind = type(self.schedule)
        return issubclass(kind, BudgetEpsilon) and kind.__call__ is BudgetEpsilon.__call__

    def first(self) -> dict[str, float]:
        """ε of each branch in the first epoch. With a budget all branches stay open, since it needs responses first."""
        return self.schedule(0, dict.fromkeys(gates(self.model), math.inf), self.total)

    def following(
        self,
        record: Mapping[str, Any],
        streaks: Mapping[str, int],
        staying: Collection[str],
        is_ranked: bool,
        done: Collection[str] = (),
    ) -> dict[str, float]:
        """ε of each branch in the epoch that begins, from the results of the last epoch.

        Args:
            record: Record of the last epoch, as in :attr:`EpsilonPruner.history`.
            streaks: Number of epochs that each remaining branch has been closed.
            staying: Slots of branches that must not close.
            is_ranked: Result of :meth:`is_ranking` for the last epoch, before branches were removed.
            done: Slots of closed branches that are removed later. They keep their ε when no more need to close.
        """
        epoch, responses = record["epoch"] + 1, record["responses"]
        remaining = {slot: math.inf if slot in staying else responses.get(slot, math.inf) for slot in streaks}
        found = gates(self.model)
        if not is_ranked and (self._is_plain_budget or not isinstance(self.ranking, Response)):
            return {slot: found[slot].epsilon if slot in done else 0.0 for slot in streaks}
        if isinstance(self.ranking, Response):
            thresholds = self.schedule(epoch, remaining, self.total)
            is_open = [slot for slot, gate in found.items() if not gate.closed]
            # The last open branch must stay open on every batch, although its response may be below a constant ε.
            return {**thresholds, is_open[0]: 0.0} if len(is_open) == 1 else thresholds
        assert isinstance(self.schedule, BudgetEpsilon), "only a budget has another criterion"
        kept = None if isinstance(self.schedule, CostEpsilon) else self.schedule.kept(self.total)
        body = timm_body(self.model)
        importances = self._importances(record, streaks)
        model = body if isinstance(self.ranking, tuple(CRITERIA.values())) else whole_without_held(body)
        ranks = ranked_by(
            self.ranking, Seen(model, remaining, importances, settled_slots(self.model), set(staying), kept)
        )
        # The ranks may differ between processes: all processes use the ranks of the first one.
        ranks = dict(zip(ranks, agreed(list(ranks.values()), body), strict=True))
        due, _ = self.schedule.divide(epoch, ranks, self.total)
        # The ε of an empty branch must be above 0, because 0 is not below 0.
        least = {slot: torch.finfo(found[slot].threshold.dtype).tiny for slot in due}
        return {slot: max(2 * remaining[slot], least[slot]) if slot in due else 0.0 for slot in streaks}

    def _importances(self, record: Mapping[str, Any], streaks: Mapping[str, int]) -> dict[str, float]:
        """The importance of each branch in an epoch; infinite where it was not measured."""
        recorded = record.get("importances", {})
        measured = measured_importances(recorded, record["responses"], streaks)
        if recorded and not measured:
            _logger.warning(
                "No branch closes: none has an importance after epoch %d. Importance is measured in loss.backward(), "
                "not in torch.autograd.grad, and only from finite gradients.",
                record["epoch"],
            )
        return dict.fromkeys(streaks, math.inf) | measured


def keep_one_open(model: nn.Module, responses: Mapping[str, float], epsilon: float) -> str | None:
    """Open the branch with the largest response if all branches are closed, since they could not learn any more.

    Args:
        model: The model with gates.
        responses: Responses of the finished epoch, by slot.
        epsilon: Threshold that closed the branches, for the warning.

    Returns:
        The slot of the opened branch; None if none was opened.
    """
    found = gates(model)
    if not responses or not all(gate.closed for gate in found.values()):
        return None
    strongest = max(responses, key=responses.__getitem__)
    found[strongest].closed = False
    _logger.warning(
        "epsilon=%g would close all %d remaining branches: %s, which has the largest response (%g), stays open. "
        "Lower epsilon to keep more.",
        epsilon,
        len(found),
        strongest,
        responses[strongest],
    )
    return strongest
