"""The network behind a report, which answers what a choice of branches really costs."""

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
    """Measures the network that was analyzed without some of its branches. The network itself stays as it is.

    Args:
        model: The model as the caller has it.
        batches: The images of the analysis.
        loss: Mean loss of a batch from logits and labels.
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
        """A copy of the network as it is now, with gates and the same weights; where gates belong is found out once."""
        body = timm_body(self.model)
        if gates(body) or removed_slots(body):
            return gated_copy(body)
        # The same modules over the same memory.
        now = [*map(id, body.modules()), *(tensor.data_ptr() for tensor in (*body.parameters(), *body.buffers()))]
        if self._gated is None or self._gated[0] != now:
            self._gated = now, gated_copy(body)
        return shared_copy(self._gated[1])

    def check(self, slots: Iterable[str]) -> None:
        """Raise ValueError if other branches are open by now than these."""
        if different := set(open_slots(self.copy())) ^ set(slots):
            raise ValueError(
                f"The model is not the one that was analyzed: they differ at {min(different)!r}, which was closed, "
                "removed or added since. Analyze the model as it is now."
            )

    def loss_without(self, slots: Iterable[str]) -> float:
        """Mean loss of an image without these branches."""
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
        """What a budget counts without these branches."""
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
            dense: Milliseconds of the dense network to go by: what is measured is then relative to the dense network
                as it is measured in turn, and the drift of the machine cancels out.
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
    """So many images, the first of the data, some of them several times if there are too few; on the body's device."""
    images = torch.cat([batch.images[:size] for batch in batches[:size]])
    return to_network(body, images[torch.arange(size) % len(images)])
