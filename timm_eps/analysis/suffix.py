"""Run a network many times on the same images, each time without one branch.

All computation before a branch is the same with and without it. A run therefore begins at the block of the branch.
Modules that finished before return their stored outputs of the run with all branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.branches import block_path, gates
from ..surgery.tracing import tensors
from .evaluation import Batch, Loss, Score, score, to_network

__all__ = ["SuffixRuns", "scores_without_each"]


def scores_without_each(
    body: nn.Module,
    slots: Sequence[str],
    batches: Sequence[Batch],
    loss: Loss,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, Score]:
    """Score of a network without each of some branches, and with all the others.

    Args:
        body: A timm model with gates, as for :class:`SuffixRuns`.
        slots: Slots of the branches.
        batches: Images and labels.
        loss: Function of logits and labels that returns the mean loss.
        tick: Function that is called for each branch and batch.
    """
    runs = SuffixRuns(body, slots, to_network(body, batches[0].images))
    scores = dict.fromkeys(slots, Score())
    for images, labels in batches:
        for slot, logits in runs(to_network(body, images)):
            scores[slot] += score(logits, labels, loss)
            tick()
    return scores


class SuffixRuns:
    """Runs a network without each of some branches, one at a time.

    Two images of the first batch are used to check that the outputs equal those of complete runs bit for bit. If they
    differ, because a model keeps state outside of its modules' outputs, every run is complete. For one batch, the
    outputs of all modules before the last branch are kept in memory.

    Args:
        body: A timm model with gates in evaluation mode. It must be a separate copy, because the ``forward`` of its
            modules is replaced temporarily.
        slots: Slots of the branches.
        images: First batch (B, C, H, W), on the model's device.
    """

    def __init__(self, body: nn.Module, slots: Iterable[str], images: Tensor) -> None:
        self.body = body
        found = gates(body)
        self.gates = {slot: found[slot] for slot in slots}
        few = images[:2]
        self.before: dict[str, list[nn.Module]] = _through_before(body, list(self.gates), few)
        try:
            is_proven = all(torch.equal(output, self._whole(slot, few)) for slot, output in self(few))
        except _ChangedInPlaceError:
            is_proven = False
        if not is_proven:
            self.before = {slot: [] for slot in self.gates}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (slot, output) for a batch (B, C, H, W), with only this branch closed."""
        kept = _Kept(itertools.chain.from_iterable(self.before.values()))
        if kept.modules:
            with kept.recording():
                self.body(images)
        for slot, gate in self.gates.items():
            gate.closed = True
            try:
                with kept.replayed_by(self.before[slot]):
                    output = self.body(images)
            finally:
                gate.closed = False
            kept.check_unchanged()
            yield slot, output

    @torch.no_grad()
    def _whole(self, slot: str, images: Tensor) -> Tensor:
        gate = self.gates[slot]
        gate.closed = True
        try:
            return self.body(images)
        finally:
            gate.closed = False


class _ChangedInPlaceError(RuntimeError):
    """A module changed the output of another one in place."""


class _Kept:
    """Outputs of modules in one run."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(dict.fromkeys(modules))
        self.outputs: dict[nn.Module, Any] = {}
        self.versions: list[int] = []

    def recording(self) -> _Hooks:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            self.outputs[module] = output

        return _Hooks([module.register_forward_hook(note) for module in self.modules], self._note_versions)

    def replayed_by(self, modules: list[nn.Module]) -> _Forwards:
        return _Forwards({module: self.outputs[module] for module in modules})

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in tensors(list(self.outputs.values()))]

    def _note_versions(self) -> None:
        self.versions = self._versions()

    def check_unchanged(self) -> None:
        if self._versions() != self.versions:
            raise _ChangedInPlaceError


class _Hooks:
    """Hooks for the duration of a ``with`` block."""

    def __init__(self, handles: list[Any], then: Callable[[], None] = lambda: None) -> None:
        self.handles, self.then = handles, then

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.then()


class _Forwards:
    """Makes modules return their stored outputs, for the duration of a ``with`` block."""

    def __init__(self, outputs: dict[nn.Module, Any]) -> None:
        self.outputs = outputs

    def __enter__(self) -> None:
        for module, output in self.outputs.items():
            # Only forward is replaced, on the instance, so other attributes of the module stay readable.
            module.forward = lambda *_, output=output, **__: output

    def __exit__(self, *_: object) -> None:
        for module in self.outputs:
            del module.__dict__["forward"]


def _through_before(body: nn.Module, slots: list[str], images: Tensor) -> dict[str, list[nn.Module]]:
    """For each branch, the outermost modules that ran once and finished before the branch's block began."""
    began: dict[nn.Module, int] = {}
    ended: dict[nn.Module, int] = {}
    several: set[nn.Module] = set()
    clock = itertools.count()

    def begin(module: nn.Module, _: Any) -> None:
        if module in began:
            several.add(module)
        began.setdefault(module, next(clock))

    def end(module: nn.Module, *_: Any) -> None:
        ended[module] = next(clock)

    hooks = [module.register_forward_pre_hook(begin) for module in body.modules()]
    hooks += [module.register_forward_hook(end) for module in body.modules()]
    with _Hooks(hooks), torch.no_grad():
        body(images)

    def through(module: nn.Module, before: int) -> Iterator[nn.Module]:
        for child in module.children():
            is_plain = "forward" not in vars(child)  # a replaced forward is not touched
            if child in ended and child not in several and ended[child] < before and is_plain:
                yield child
            else:
                yield from through(child, before)

    return {slot: list(through(body, began.get(body.get_submodule(block_path(body, slot)), 0))) for slot in slots}
