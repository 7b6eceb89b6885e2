"""Schedules of ε.

An ε schedule maps (epoch, responses of the previous epoch) to a threshold for each branch. The schedules here keep ε =
0 during warm-up. Otherwise a branch that starts near zero would be closed before it has learnt anything.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Protocol

from .gate import check_epsilon

__all__ = ["BudgetEpsilon", "ConstantEpsilon", "Schedule"]


class Schedule(Protocol):
    """Interface by which :class:`timm_eps.EpsilonPruner` gets the thresholds of an epoch.

    Your own schedule needs only this method and no base class. Its result must depend only on its arguments, because a
    checkpoint does not contain the schedule::

        class Rising:
            def __call__(self, epoch, responses, total):
                return dict.fromkeys(responses, 0.1 * epoch)

        pruner = timm_eps.EpsilonPruner(model, schedule=Rising())

    A schedule that does not use the responses may set the class attribute ``reads_responses = False``. A branch with ε
    = 0 is then not measured, and its gate costs nothing.
    """

    def __call__(self, epoch: int, responses: Mapping[str, float], total: int) -> dict[str, float]:
        """ε of each branch for ``epoch``, counted from 0.

        Args:
            epoch: The epoch that begins.
            responses: Response of each remaining branch in the previous epoch; infinity if it did not run or must not
                close.
            total: Number of branches of the unpruned network.
        """


class ConstantEpsilon:
    """The paper's schedule: 0 during warm-up, then one ε for all blocks and epochs.

    Args:
        epsilon: Threshold in activation units.
        warmup_epochs: Number of epochs with ε = 0 at the beginning.

    Raises:
        ValueError: ε is negative, NaN or infinite, or the warm-up is negative.

    Source: section 3.2 of the paper.

    Example::

        schedule = timm_eps.ConstantEpsilon(2.5, warmup_epochs=150)
        pruner = timm_eps.EpsilonPruner(model, optimizer, schedule=schedule)
    """

    reads_responses = False

    def __init__(self, epsilon: float, warmup_epochs: int = 0) -> None:
        self.epsilon = check_epsilon(epsilon)
        self.warmup_epochs = _check_epochs("warmup_epochs", warmup_epochs)

    def __call__(self, epoch: int, responses: Mapping[str, float], total: int) -> dict[str, float]:
        """ε of each branch for ``epoch`` (counted from 0)."""
        return dict.fromkeys(responses, self.epsilon if epoch >= self.warmup_epochs else 0.0)


class BudgetEpsilon:
    """A schedule that follows the responses and leaves a given share of the branches at the end of a ramp.

    After warm-up the number of branches to close rises along a cubic ramp (Zhu and Gupta, "To prune, or not to prune",
    arXiv 1710.01878, equation 1): fast at first, slowly towards the end. In each epoch ε is set so that this number of
    branches had a response below ε in the previous epoch, including the removed ones.

    Only these branches get ε; the others get zero. A response is the maximum over an epoch, and the maximum of a single
    batch can be far smaller. With one ε for all, the remaining branches would be closed on most batches.

    Args:
        keep: Fraction (float, 0 < keep < 1) or number (int, at least 1) of branches to keep.
        warmup_epochs: Number of epochs with ε = 0 at the beginning.
        ramp_epochs: Number of epochs from the first closed branch to the full budget.

    Raises:
        ValueError: ``keep`` is neither a fraction nor a positive number, or an epoch count is negative.

    Example::

        class Linear(timm_eps.BudgetEpsilon):
            def progress(self, epoch):
                return min(max((epoch - self.warmup_epochs + 1) / max(1, self.ramp_epochs), 0.0), 1.0)

        pruner = timm_eps.EpsilonPruner(model, optimizer, schedule=Linear(0.25, warmup_epochs=4, ramp_epochs=8))
    """

    def __init__(self, keep: float | int, warmup_epochs: int = 0, ramp_epochs: int = 0) -> None:
        whole = isinstance(keep, numbers.Integral) and not isinstance(keep, bool)
        if not (keep >= 1 if whole else isinstance(keep, numbers.Real) and 0.0 < keep < 1.0):
            raise ValueError(
                f"keep must be a fraction of the branches between 0 and 1 or a number of at least 1, got {keep!r}."
            )
        self.keep = int(keep) if whole else float(keep)  # converts numpy numbers, too
        self.warmup_epochs = _check_epochs("warmup_epochs", warmup_epochs)
        self.ramp_epochs = _check_epochs("ramp_epochs", ramp_epochs)

    def kept(self, total: int) -> int:
        """Number of branches, out of ``total``, that stay in the end."""
        return min(self.keep, total) if isinstance(self.keep, int) else max(1, round(self.keep * total))

    def to_close(self, epoch: int, total: int) -> int:
        """Number of branches, out of ``total``, that must be closed or removed in ``epoch``."""
        return round((total - self.kept(total)) * self.progress(epoch))

    def is_due(self, epoch: int, total: int, discarded: Collection[str]) -> bool:
        """Whether more branches, out of ``total``, must close in ``epoch`` than the discarded ones."""
        return self.to_close(epoch, total) > len(discarded)

    def progress(self, epoch: int) -> float:
        """Position on the ramp in ``epoch``, from 0 before it to 1 at its end."""
        done = (epoch - self.warmup_epochs + 1) / max(1, self.ramp_epochs)
        return 1.0 - (1.0 - min(max(done, 0.0), 1.0)) ** 3

    def __call__(self, epoch: int, responses: Mapping[str, float], total: int) -> dict[str, float]:
        """ε of each branch for ``epoch`` (counted from 0).

        Args:
            epoch: The epoch that begins.
            responses: Response of each remaining branch in the previous epoch; infinity if it did not run.
            total: Number of branches of the unpruned network.
        """
        due, others = self.divide(epoch, responses, total)
        if not due:
            return dict.fromkeys(responses, 0.0)
        largest = responses[due[-1]]
        # Halfway to the next response, so that rounding or a small change does not matter.
        epsilon = (largest + responses[others[0]]) / 2 if others else largest * 1.01
        return {slot: epsilon if slot in due else 0.0 for slot in responses}

    def divide(self, epoch: int, ranks: Mapping[str, float], total: int) -> tuple[list[str], list[str]]:
        """The branches to close in ``epoch``, which have the lowest ranks, and the others, in order of rank.

        A branch whose rank is infinite or NaN cannot be closed, and is in neither list.
        """
        close = max(self.to_close(epoch, total) - (total - len(ranks)), 0)
        ordered = sorted((slot for slot, value in ranks.items() if math.isfinite(value)), key=ranks.__getitem__)
        return ordered[:close], ordered[close:]


def _check_epochs(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of epochs, at least 0, got {value!r}.")
    return value
