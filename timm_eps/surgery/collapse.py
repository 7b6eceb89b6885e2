"""What is left of a network when some of its residual branches are zero.

The plan depends on the architecture and the slots alone, not on weights: a pruned network can be built again from the
list of its removed slots, on any device, and one that loses its branches one by one ends like one that loses them all
at once.

A block all of whose branches are gone becomes the chain of its children that still count: nothing, a ``downsample``, a
trailing activation. In a block that keeps a branch, or that is no such chain, the slot puts out zero, and the modules
that nothing depends on any longer give way to ones that pass their input on. Modules keep their paths, so the weights
of a pruned network are some of those of the dense one, under the same names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from timm.layers import is_exportable, is_scriptable, use_fused_attn
from torch import Tensor, nn

from ..files.edits import Edit, apply_edits
from ..files.standins import ZeroBranch
from ..gate import EpsilonGate
from .branches import gates, input_size, probe_batch, slots_by_block, traces_open_and_shut
from .tracing import Call, Trace, meta_copy, random_copy, random_like, shapes, tensors, trace

__all__ = ["Plan", "plan_by_key", "plan_collapse"]


class Plan(NamedTuple):
    """How the branches in ``slots``, all of one block, are taken out."""

    slots: list[str]
    edits: list[Edit]


# The last plans of networks whose structure is known by a key: who loads a pruned network builds it more than once.
_PLANS: OrderedDict[Hashable, list[Plan]] = OrderedDict()
_MOST_PLANS = 8


def plan_by_key(body: nn.Module, slots: set[str], key: Hashable) -> list[Plan]:
    """:func:`plan_collapse`, remembered.

    Args:
        body: As for :func:`plan_collapse`.
        slots: Slot paths.
        key: Equal for networks of one structure alone: what their constructor was called with. None is never equal.
    """
    if key is None:
        return plan_collapse(body, slots)
    # timm builds some modules by these.
    settings = use_fused_attn(), use_fused_attn(experimental=True), is_exportable(), is_scriptable()
    whole = (type(body), key, settings, input_size(body), frozenset(slots), frozenset(gates(body)))
    if whole not in _PLANS:
        _PLANS[whole] = plan_collapse(body, slots)
        if len(_PLANS) > _MOST_PLANS:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(whole)
    return _PLANS[whole]


@torch.inference_mode(mode=False)  # a graph is needed, whatever the caller does without
@torch.enable_grad()
def plan_collapse(body: nn.Module, slots: set[str]) -> list[Plan]:
    """Plan how to take branches out of a model.

    Args:
        body: A timm model with a gate in each of the slots. It is not touched.
        slots: Slot paths.

    Returns:
        One plan a block, to be carried out in this order. The last one is for modules that several of them shared.
    """
    net = meta_copy(body)
    originals = [*net.modules(), *net.parameters()]  # kept alive: what follows tells them by their ids
    batch = probe_batch(net)
    found = gates(net)
    blocks = slots_by_block(net, [slot for slot in found if slot in slots])
    dense, shut = traces_open_and_shut(net, batch, slots)
    planner = _Planner(net, dense, dense.live - shut.live, shut.live)
    plans = []
    for path, own in blocks.items():
        here = [slot for slot in own if _find(net, slot) is found[slot]]  # a block around it may have taken it along
        if here:
            plans.append(Plan(here, planner.plan_block(path, here)))
    whole = [Call(net, (batch,), {}, dense.output)]
    shared = [edit for stub in planner.stubs("") for edit in planner.accepted([stub], whole)]
    del originals
    return [*plans, Plan([], shared)]


class _Planner:
    """Tries edits on a meta copy and keeps those that it survives.

    Args:
        net: The meta copy; it is changed.
        dense: Its trace with all gates open.
        lost: Ids of the modules and parameters that counted then and do not count now.
        live: Ids of those that still count.
    """

    def __init__(self, net: nn.Module, dense: Trace, lost: set[int], live: set[int]) -> None:
        self.net, self.dense, self.lost, self.live = net, dense, lost, live

    def plan_block(self, path: str, slots: list[str]) -> list[Edit]:
        """The edits that take all branches of ``slots`` out of the block at ``path``."""
        block = self.net.get_submodule(path)
        calls = self.dense.calls_of(block)
        stubs = self.stubs(path)
        zeros = [self.zero(slot, tensors(calls[0].args)) for slot in slots]
        edits = self.accepted([*zeros, *stubs], calls)
        if not edits:
            # Code between the modules needs some of them for their shapes: keep those.
            edits = self.accepted([self.zero(slot, []) for slot in slots], calls)
            for stub in stubs:
                edits += self.accepted([stub], calls)
        if any(isinstance(module, EpsilonGate) for module in block.modules()):
            return edits
        chain = _chain(path, block, calls[0])
        return edits if chain is None else [*edits, *self.accepted([chain], [])]

    def zero(self, slot: str, inputs: list[Tensor]) -> Edit:
        """Zero for a slot; of the shape that arrives there now, wherever the inputs of the block differ in a size."""
        gate: Any = self.net.get_submodule(slot)
        if gate.single_zero:
            return Edit(slot, "zero", ())
        arriving = self.dense.calls_of(gate)[0].args[0].shape
        entering = inputs[0].shape if inputs else arriving
        differ = [dim for dim in range(len(arriving)) if entering[dim : dim + 1] != arriving[dim : dim + 1]]
        # Of what a branch changes only the number of channels is the same for images of every size.
        channels = arriving[differ[0]] if differ in ([1], [len(arriving) - 1]) and arriving[0] == entering[0] else None
        return Edit(slot, "zero", tuple(channels if dim in differ else None for dim in range(len(arriving))))

    def stubs(self, path: str) -> list[Edit]:
        """Edits that remove, inside of ``path``, the largest modules and the single parameters that do not count."""
        module = self.net.get_submodule(path)
        prefix = f"{path}." if path else ""
        edits = [
            Edit(prefix + name, "constant", True) for name, own in module._parameters.items() if id(own) in self.lost
        ]
        for name, child in module._modules.items():
            if child is None or isinstance(child, EpsilonGate):
                continue
            parts = {id(part) for part in (*child.modules(), *child.parameters())}
            # One that is called and does not count may share a part with one that does.
            if not (id(child) in self.lost or (parts & self.lost and not parts & self.live)):
                edits += self.stubs(prefix + name)
            elif (passing := _passing(prefix + name, self.dense.calls_of(child))) is not None:
                edits.append(passing)
        return edits

    def accepted(self, edits: list[Edit], calls: list[Call]) -> list[Edit]:
        """Make the edits if these calls still return the same shapes and leave their input alone; those made."""
        take_back = apply_edits(self.net, edits)
        try:
            with torch.no_grad():
                if all(_same_shapes(call) for call in calls):
                    return edits
        except Exception:  # whatever a model's own code raises when it misses something
            pass
        take_back()
        return []


def _same_shapes(call: Call) -> bool:
    inputs = tensors((call.args, call.kwargs))
    versions = [x._version for x in inputs]  # an activation may work in place on what now is the block's input
    output = call.module(*call.args, **call.kwargs)
    return shapes(output) == shapes(call.output) and versions == [x._version for x in inputs]


def _passing(path: str, calls: list[Call]) -> Edit | None:
    """The edit that lets the module at ``path`` pass its input on; None if it returned more in these calls."""
    take: Any = _taken(calls[0].args, calls[0].output) if calls else 0
    if take is None:
        if not isinstance(calls[0].output, Tensor):
            return None
        take = 0  # of another shape: the block must do with it, or keeps the module
    return Edit(path, "pass", take)


def _taken(args: tuple, output: Any) -> int | tuple[int, ...] | None:
    """Which arguments an output has the shapes, or the values, of; None if it has other ones."""
    if not isinstance(output, tuple | list):
        return next((i for i, arg in enumerate(args) if shapes(arg) == shapes(output)), None)
    take = [_taken(args, part) for part in output]
    return tuple(take) if all(isinstance(position, int) for position in take) else None  # type: ignore[arg-type]


def _chain(path: str, block: nn.Module, call: Call) -> Edit | None:
    """The edit that turns a block without branches into the chain of its children that count; None if it is none."""
    if any(name.startswith("forward_") for name in dir(type(block))):
        return None  # others call it in other ways than by its forward
    name_of = {child: name for name, child in block.named_children()}
    rest = trace(block, *call.args, **call.kwargs)
    names = tuple(
        name_of[step.module]
        for step in rest.calls
        if step.module in name_of and step.counts and not isinstance(step.module, ZeroBranch | nn.Identity)
    )
    nothing = _passing(path, [call]) or Edit(path, "chain", ())
    edit = Edit(path, "chain", names) if names else nothing
    # Any numbers in the weights will do, but for those that make a module an identity by accident.
    actual = random_copy(block)
    (args, kwargs), (same_args, same_kwargs) = (random_like((call.args, call.kwargs)) for _ in range(2))
    untouched, _ = random_like((call.args, call.kwargs))
    try:
        with torch.no_grad(), torch.device("cpu"):  # whatever device the model is being built on
            expected = actual(*args, **kwargs)
            left = edit.replacement(actual)(*same_args, **same_kwargs)
    except (TypeError, RuntimeError):
        return None
    pairs = [
        *zip(tensors(left), tensors(expected), strict=False),
        *zip(tensors(same_args), tensors(untouched), strict=True),
    ]
    if shapes(left) != shapes(expected) or not all(torch.equal(a, b) for a, b in pairs):
        return None
    if all(isinstance(block.get_submodule(name), nn.ReLU) for name in names) and _is_rectified(call.args[0]):
        return nothing
    return edit


def _is_rectified(x: Any) -> bool:
    """Whether a tensor comes straight from a ReLU, or from one through max pooling: another changes nothing."""
    node = x.grad_fn if isinstance(x, Tensor) else None
    while node is not None and node.name().startswith(("CloneBackward", "MaxPool")):  # the copy is the trace's
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("ReluBackward")


def _find(net: nn.Module, path: str) -> nn.Module | None:
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None
