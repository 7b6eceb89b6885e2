"""A network run many times on the same images, each time without another branch.

Whatever is computed before a branch is the same with and without it. A run therefore begins at the block that the
branch belongs to: the modules that were through by then return what they returned in the run with all branches.
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
        body: A timm model with gates, as :class:`SuffixRuns` takes it.
        slots: The branches.
        batches: Images and labels.
        loss: Mean loss of a batch from logits and labels.
        tick: Called for each branch and batch.
    """
    runs = SuffixRuns(body, slots, to_network(body, batches[0].images))
    scores = dict.fromkeys(slots, Score())
    for images, labels in batches:
        for slot, logits in runs(to_network(body, images)):
            scores[slot] += score(logits, labels, loss)
            tick()
    return scores


class SuffixRuns:
    """Runs a network without one branch after the other.

    It is proven on two images of the first batch that the outputs are those of whole runs, bit for bit; where they
    differ, because a model keeps a state outside of its modules' outputs, every run is a whole one. For one batch the
    outputs of all modules before the last of the branches are held in memory.

    Args:
        body: A timm model with gates in evaluation mode, a copy that nobody else uses: its modules' ``forward`` is
            replaced for a time.
        slots: The branches.
        images: The first batch (B, C, H, W), on the model's device.
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
        """The output for a batch (B, C, H, W) without each branch, which is closed for this alone: (slot, output)."""
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
    """A module changed what another one had returned."""


class _Kept:
    """What modules returned in one run."""

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
    """Hooks for the time of a ``with`` block."""

    def __init__(self, handles: list[Any], then: Callable[[], None] = lambda: None) -> None:
        self.handles, self.then = handles, then

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.then()


class _Forwards:
    """Lets modules return what they have returned before, for the time of a ``with`` block."""

    def __init__(self, outputs: dict[nn.Module, Any]) -> None:
        self.outputs = outputs

    def __enter__(self) -> None:
        for module, output in self.outputs.items():
            # On the instance: what others read of a module beside its output stays as it is.
            module.forward = lambda *_, output=output, **__: output

    def __exit__(self, *_: object) -> None:
        for module in self.outputs:
            del module.__dict__["forward"]


def _through_before(body: nn.Module, slots: list[str], images: Tensor) -> dict[str, list[nn.Module]]:
    """For each branch the largest modules that ran once, and were through when the branch's block began."""
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
            is_plain = "forward" not in vars(child)  # one that somebody has replaced is left alone
            if child in ended and child not in several and ended[child] < before and is_plain:
                yield child
            else:
                yield from through(child, before)

    return {slot: list(through(body, began.get(body.get_submodule(block_path(body, slot)), 0))) for slot in slots}
