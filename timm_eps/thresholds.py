"""Which ε each branch gets in an epoch: by a schedule, and by the criterion that ranks branches for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from .cost_schedule import CostEpsilon
from .criteria import Criterion, Response, Seen, criterion_from, ranked_by
from .importance import measured_importances
from .schedule import BudgetEpsilon, Schedule
from .surgery.branches import gates, timm_body
from .surgery.distributed import agreed
from .surgery.removal import removed_slots

__all__ = ["Thresholds", "keep_one_open", "ranking_for"]

_logger = logging.getLogger(__name__)


def ranking_for(schedule: Schedule, criterion: str | Criterion) -> Criterion:
    """The criterion that a name stands for, or that is given.

    Raises:
        ValueError: It is unknown, or the schedule has no use for it.
    """
    ranking = criterion_from(criterion)
    if not isinstance(schedule, BudgetEpsilon) and not isinstance(ranking, Response):
        raise ValueError(f"criterion={criterion!r} goes with keep; any other epsilon is one for the responses.")
    return ranking


class Thresholds:
    """Decides for a pruner.

    Args:
        model: The model with gates.
        schedule: Says ε, or how many branches are due.
        ranking: Ranks the branches of a schedule by budget, as :func:`ranking_for` returned it.
        total: Number of branches of the unpruned network.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, ranking: Criterion, total: int) -> None:
        self.model, self.schedule, self.ranking, self.total = model, schedule, ranking, total

    @property
    def wanted(self) -> int:
        """Number of branches that the budget keeps; without a budget, all of them."""
        return self.schedule.kept(self.total) if isinstance(self.schedule, BudgetEpsilon) else self.total

    def is_ranking(self, epoch: int, left: int) -> bool:
        """Whether branches are to be ranked after an epoch, if so many are left."""
        if not isinstance(self.schedule, BudgetEpsilon):
            return False
        return self.schedule.to_close(epoch + 1, self.total) > self.total - left

    def is_measuring(self, epoch: int, left: int) -> bool:
        """Whether importances are needed to rank the branches after an epoch, if so many are left."""
        return getattr(self.ranking, "measures_importance", False) and self.is_ranking(epoch, left)

    def first(self) -> dict[str, float]:
        """ε of each branch in the first epoch. A budget needs responses, so under one this epoch is open."""
        return self.schedule(0, dict.fromkeys(gates(self.model), math.inf), self.total)

    def following(
        self, record: Mapping[str, Any], streaks: Mapping[str, int], staying: Collection[str], is_ranked: bool
    ) -> dict[str, float]:
        """ε of each branch in the epoch that begins, by what the last one showed.

        Args:
            record: Of the last epoch, as in :attr:`EpsilonPruner.history`.
            streaks: For how many epochs each branch that is there has been closed.
            staying: Slots of branches that are not to go.
            is_ranked: Whether branches were to be ranked after that epoch, asked before any was removed.
        """
        epoch, responses = record["epoch"] + 1, record["responses"]
        remaining = {slot: math.inf if slot in staying else responses.get(slot, math.inf) for slot in streaks}
        found = gates(self.model)
        if isinstance(self.ranking, Response):
            thresholds = self.schedule(epoch, remaining, self.total)
            is_open = [slot for slot, gate in found.items() if not gate.closed]
            # The last open branch is not closed on single batches either: its response may be under a constant ε.
            return {**thresholds, is_open[0]: 0.0} if len(is_open) == 1 else thresholds
        if not is_ranked:
            return dict.fromkeys(streaks, 0.0)
        assert isinstance(self.schedule, BudgetEpsilon), "another epsilon has no other criterion"
        kept = None if isinstance(self.schedule, CostEpsilon) else self.schedule.kept(self.total)
        body = timm_body(self.model)
        importances = self._importances(record, streaks)
        ranks = ranked_by(
            self.ranking, Seen(body, remaining, importances, removed_slots(self.model), set(staying), kept)
        )
        # A criterion may say something else in each process: what it says in the first one counts.
        ranks = dict(zip(ranks, agreed(list(ranks.values()), body), strict=True))
        due, _ = self.schedule.divide(epoch, ranks, self.total)
        # Of an empty branch at least the smallest number there is: 0 is not below 0.
        least = {slot: torch.finfo(found[slot].threshold.dtype).tiny for slot in due}
        return {slot: max(2 * remaining[slot], least[slot]) if slot in due else 0.0 for slot in streaks}

    def _importances(self, record: Mapping[str, Any], streaks: Mapping[str, int]) -> dict[str, float]:
        """The importance of each branch in an epoch; infinite where it was not measured."""
        recorded = record.get("importances", {})
        measured = measured_importances(recorded, record["responses"], streaks)
        if recorded and not measured:
            _logger.warning(
                "Nothing closes: no branch has an importance after epoch %d. It is measured by loss.backward(), not by "
                "torch.autograd.grad, from finite gradients.",
                record["epoch"],
            )
        return dict.fromkeys(streaks, math.inf) | measured


def keep_one_open(model: nn.Module, responses: Mapping[str, float], epsilon: float) -> str | None:
    """Open the branch of the largest response, if all branches are closed: a network of none learns nothing.

    Args:
        model: The model with gates.
        responses: Of the epoch that ended, by slot.
        epsilon: The threshold that closed them, for the warning.

    Returns:
        The slot of the branch that was opened; None if there was no need.
    """
    found = gates(model)
    if not responses or not all(gate.closed for gate in found.values()):
        return None
    strongest = max(responses, key=responses.__getitem__)
    found[strongest].closed = False
    _logger.warning(
        "epsilon=%g would close all %d branches that are left: %s, whose response (%g) is the largest, stays open. "
        "Lower epsilon to keep more.",
        epsilon,
        len(found),
        strongest,
        responses[strongest],
    )
    return strongest
