"""The network of a report, which measures the real cost of a choice of branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..budget import Budget
from ..surgery.branches import gates, timm_body
from ..surgery.removal import closed_slots, removed_slots
from ..surgery.tracing import shared_copy
from .evaluation import Batch, Loss, evaluate, to_network
from .measure import (
    REPEATS,
    Size,
    gated_copy,
    milliseconds,
    network_without,
    open_slots,
    pruned_copy,
    repeats_for,
    size_without,
)  # fmt: skip

__all__ = ["LiveNetwork", "batch_of"]


class LiveNetwork:
    """Measures the analyzed network without some of its branches. The network itself is not changed.

    Args:
        model: Model of the caller.
        batches: Images of the analysis.
        loss: Function of logits and labels that returns the mean loss.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], loss: Loss) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self._sizes: dict[frozenset[str], Size] = {}
        self._counts: dict[Budget, dict[frozenset[str], float]] = {}
        self._gated: tuple[list[int], nn.Module] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self.batches[0].images.shape[1:])

    def copy(self) -> nn.Module:
        """A copy of the current network, with gates and the same weights. The slots are searched only once."""
        body = timm_body(self.model)
        if gates(body) or removed_slots(body):
            return gated_copy(body)
        # New modules that share the memory.
        now = [*map(id, body.modules()), *(tensor.data_ptr() for tensor in (*body.parameters(), *body.buffers()))]
        if self._gated is None or self._gated[0] != now:
            self._gated = now, gated_copy(body)
        return shared_copy(self._gated[1])

    def check(self, slots: Iterable[str]) -> None:
        """Raise ValueError if the open branches are no longer these."""
        if different := set(open_slots(self.copy())) ^ set(slots):
            raise ValueError(
                f"The model has changed since the analysis: branch {min(different)!r} was closed, removed or added. "
                "Analyze the model again."
            )

    def loss_without(self, slots: Iterable[str]) -> float:
        """Mean loss per image without these branches."""
        net = self.copy()
        for slot in slots:
            gates(net)[slot].closed = True
        return evaluate(net, self.batches, self.loss).loss

    def size_without(self, slots: Iterable[str]) -> Size:
        """Parameters and multiply-adds without these branches."""
        key = frozenset(slots)
        if key not in self._sizes:
            net = self.copy()
            self._sizes[key] = size_without(net, {*key, *closed_slots(net)}, self.image_shape)
        return self._sizes[key]

    def count_without(self, budget: Budget, slots: Iterable[str]) -> float:
        """Size in the unit of a budget without these branches."""
        key = frozenset(slots)
        counts = self._counts.setdefault(budget, {})
        if key not in counts:
            net = self.copy()
            counts[key] = budget.count(network_without(net, {*key, *closed_slots(net)}), self.image_shape)
        return counts[key]

    def stopwatch(self, batch_size: int, dense: float | None = None) -> Callable[[Iterable[str]], float]:
        """A function that measures a forward pass without some branches, in milliseconds.

        Args:
            batch_size: Number of images.
            dense: Milliseconds of the dense network as a reference. The dense network is then measured in turn, and the
                result scaled accordingly, so that the drift of the machine cancels out.
        """
        net = self.copy()
        net = pruned_copy(net, closed_slots(net))
        batch = batch_of(net, self.batches, batch_size)
        repeats = repeats_for(net, batch, 2 * REPEATS)

        def measure(slots: Iterable[str]) -> float:
            found = milliseconds({"dense": net, "pruned": pruned_copy(net, slots)}, batch, repeats)
            return found["pruned"] * (1 if dense is None else dense / found["dense"])

        return measure


def batch_of(body: nn.Module, batches: list[Batch], size: int) -> Tensor:
    """The first ``size`` images of the data, repeated if there are too few, on the body's device."""
    images = torch.cat([batch.images[:size] for batch in batches[:size]])
    return to_network(body, images[torch.arange(size) % len(images)])
