"""Which branches close first: what a budget ranks the branches by.

A criterion is a callable that gets what an epoch has shown (:class:`Seen`) and returns a rank for each branch. The
branches of the lowest rank close first. One with an infinite rank, or without a rank, stays open. A criterion of one's
own is a function or a small class::

    class LargestFirst:
        \"\"\"Closes the branches with the most parameters first.\"\"\"

        def __call__(self, seen):
            return {slot: -len(list(seen.model.get_submodule(slot.rpartition(".")[0]).parameters()))
                    for slot in seen.responses}

    pruner = EpsilonPruner(model, optimizer, keep=0.5, criterion=LargestFirst())
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import nn

from .analysis.evaluation import Batch, Loss, evaluate, read_batches
from .analysis.measure import gated_copy
from .analysis.suffix import scores_without_each
from .importance import importance_ranks
from .surgery.branches import gates, stage_of
from .surgery.removal import closed_slots, natural_order

__all__ = [
    "CRITERIA", "Criterion", "Importance", "Last", "LeaveOneOut", "Response", "Seen", "criterion_from", "last_first",
    "ranked_by",
]  # fmt: skip


class Seen(NamedTuple):
    """What a criterion ranks by.

    Attributes:
        model: The timm model, with gates.
        responses: The response of each branch that may close, in the epoch that ended; infinite if it did not run.
        importances: The importance of each of them; infinite if it was not measured.
        removed: Slots of the branches that are removed.
        staying: Slots of branches that must not close.
        kept: Number of branches that stay in the end; None under a budget of parameters, multiply-adds or latency.
    """

    model: nn.Module
    responses: Mapping[str, float]
    importances: Mapping[str, float]
    removed: list[str]
    staying: set[str]
    kept: int | None


class Criterion(Protocol):
    """Ranks branches. ``measures_importance = True`` as a class attribute lets the gates measure importances."""

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        """The rank of each branch by slot; the lowest closes first."""
        ...


class Response:
    """The paper's criterion: the branches with the smallest response close first, under one ε for all that are due."""

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        return seen.responses


class Importance:
    """The branches without which the loss would change least close first, stage by stage.

    The change is measured to first order (:meth:`timm_eps.EpsilonGate.measure_importance`). Importances of different
    stages do not compare, so the stages shrink side by side. Under ``keep`` each stage keeps its share of the budget.
    """

    measures_importance = True

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        if seen.kept is not None:
            return importance_ranks(seen.importances, seen.removed, seen.kept, seen.staying)
        counts = Counter(map(stage_of, (*seen.importances, *seen.removed)))
        taken = Counter(map(stage_of, seen.removed))
        ranks = dict.fromkeys(seen.importances, math.inf)
        for slot in sorted(seen.importances, key=seen.importances.__getitem__):
            if math.isfinite(seen.importances[slot]) and slot not in seen.staying:
                stage = stage_of(slot)
                taken[stage] += 1
                ranks[slot] = taken[stage] / counts[stage]
        return ranks


def last_first(slots: Iterable[str]) -> dict[str, float]:
    """Ranks by which the last branches of a network go first."""
    return {slot: -index for index, slot in enumerate(sorted(slots, key=natural_order))}


class Last:
    """The last branches of the network close first.

    A simple cut to compare with. On a pretrained network it is hard to beat: late blocks are large, and know most about
    the classes that the network was trained on before.
    """

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        return last_first(seen.responses)


class LeaveOneOut:
    """The branches without which the loss rises least close first: measured exactly, on images of one's own.

    After each epoch after which branches are to close, the network is evaluated on the images once for each branch.

    Args:
        batches: Images and labels, as :func:`timm_eps.analyze` takes them; a few hundred training images will do.
        loss: Function of logits (B, classes) and labels that returns the mean loss of a batch.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss = F.cross_entropy) -> None:
        self.batches, self.loss = batches, loss
        self._read: list[Batch] = []

    def __call__(self, seen: Seen) -> Mapping[str, float]:
        net = gated_copy(seen.model)
        self._read = self._read or read_batches(self.batches, getattr(net, "num_classes", 0))
        dense = evaluate(net, self._read, self.loss).loss
        closed = closed_slots(net)
        there = [slot for slot in seen.responses if slot not in closed]
        scores = scores_without_each(net, there, self._read, self.loss) if there else {}
        rises = {slot: found.loss - dense for slot, found in scores.items()}
        # What is closed is not opened again: the others have adapted to it.
        least = min((rise for rise in rises.values() if math.isfinite(rise)), default=0.0) - 1
        return rises | {slot: least for slot in closed if slot in gates(net)}


CRITERIA: dict[str, type[Response | Importance | Last]] = {
    "response": Response,
    "importance": Importance,
    "last": Last,
}


def criterion_from(criterion: str | Criterion) -> Criterion:
    """A criterion, or the one that a name stands for.

    Raises:
        ValueError: The name is unknown, or what is given cannot be called.
    """
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if isinstance(criterion, type) or not callable(criterion):
        hint = f"; make one: {criterion.__name__}()" if isinstance(criterion, type) else ""
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {str(criterion)[:80]!r}, or an object that ranks "
            f"branches (timm_eps.criteria){hint}."
        )
    return criterion


def ranked_by(criterion: Criterion, seen: Seen) -> dict[str, float]:
    """The ranks of all branches that may close; infinite where the criterion or the responses say nothing.

    Raises:
        ValueError: The criterion returns something else than numbers by slot.
    """
    ranks = criterion(seen)
    name = type(criterion).__name__
    if not isinstance(ranks, Mapping):
        raise ValueError(f"{name} must return a rank for each slot, as a dict, got {type(ranks).__name__}.")
    if strangers := [slot for slot in ranks if slot not in seen.responses]:
        raise ValueError(f"{name} ranks {str(strangers[0])[:80]!r}, which is no branch that may close.")
    found = dict.fromkeys(seen.responses, math.inf)
    for slot, rank in ranks.items():
        value = float(rank)
        # What diverged or did not run stays as it is, whatever its rank.
        if math.isfinite(seen.responses[slot]) and slot not in seen.staying and not math.isnan(value):
            found[slot] = value
    return found
