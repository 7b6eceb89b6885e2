"""Measure the cost of each branch: the parameters, the multiply-adds and the time that its removal saves.

Parameters and multiply-adds are counted on a copy on the meta device without the branch, not estimated from its layers,
because branches of one block may share layers. Time is measured inside the network, block by block, in the dense
network and in a few copies without some branches. The savings of the blocks are then scaled to the saving of the whole
network without all branches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files.edits import apply_edits
from ..report import count_macs, count_parameters, paired_latency
from ..surgery.branches import evaluating, gates, slots_by_block, timm_body
from ..surgery.collapse import plan_collapse
from ..surgery.removal import add_gates, natural_order, remove, removed_slots
from ..surgery.tracing import meta_copy, shared_copy

__all__ = [
    "REPEATS",
    "BranchTimes",
    "Size",
    "branch_times",
    "gated_copy",
    "milliseconds",
    "open_slots",
    "pruned_copy",
    "repeats_for",
    "size_of",
    "size_without",
]

# Number of time measurements of a network: as many as fit into the seconds, within the limits.
REPEATS = 15
_LEAST_REPEATS, _SECONDS = 5, 2.0


class Size(NamedTuple):
    """Size of a network.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-adds of convolutions and matrix products for one image.
    """

    parameters: int
    macs: int


def size_of(body: nn.Module, image_shape: Sequence[int]) -> Size:
    """Parameters and multiply-adds of a network, without computing its output.

    Args:
        body: A timm model.
        image_shape: (C, H, W) of an image.
    """
    dtype = next(body.parameters()).dtype
    return Size(count_parameters(body), count_macs(body, torch.empty((1, *image_shape), device="meta", dtype=dtype)))


def size_without(body: nn.Module, slots: Iterable[str], image_shape: Sequence[int]) -> Size:
    """Parameters and multiply-adds without these branches, which may be open or closed."""
    return size_of(network_without(body, slots), image_shape)


def network_without(body: nn.Module, slots: Iterable[str]) -> nn.Module:
    """A copy on the meta device without these branches, which may be open or closed."""
    net = meta_copy(body)
    _collapse(net, set(slots))
    return net


def gated_copy(model: nn.Module) -> nn.Module:
    """A copy of the timm model, in evaluation mode and with gates, that shares its weights."""
    net = shared_copy(timm_body(model))
    if not gates(net) and not removed_slots(net):
        add_gates(net)
    return net


def open_slots(body: nn.Module) -> list[str]:
    """The slots of open branches, in the order of the network."""
    return sorted((slot for slot, gate in gates(body).items() if not gate.closed), key=natural_order)


def pruned_copy(body: nn.Module, slots: Iterable[str]) -> nn.Module:
    """A copy without exactly these branches, with all others open. Its output is checked, and it shares the weights."""
    net = shared_copy(body)
    chosen = set(slots)
    for slot, gate in gates(net).items():
        gate.closed = slot in chosen
    remove(net, chosen)
    return net


def repeats_for(net: nn.Module, batch: Tensor, most: int = REPEATS) -> int:
    """Number of time measurements of a forward pass: fewer for a slow one, more for a fast one."""
    with evaluating(net):
        net(batch)  # the first pass includes preparations
    [seconds] = paired_latency({"once": net}, batch, 1, 0).values()
    return max(_LEAST_REPEATS, min(most, int(_SECONDS / seconds)))


def milliseconds(nets: Mapping[str, nn.Module], batch: Tensor, repeats: int = REPEATS) -> dict[str, float]:
    """Median time of a forward pass of each network, measured in turn (:func:`timm_eps.report.paired_latency`)."""
    return {name: 1000 * seconds for name, seconds in paired_latency(nets, batch, repeats).items()}


class BranchTimes(NamedTuple):
    """Times of a forward pass, in milliseconds.

    Attributes:
        dense: Time of the current network.
        none: Time of the network without any branch.
        saved: Time saved by each branch. The sum is ``dense - none``.
    """

    dense: float
    none: float
    saved: dict[str, float]


def branch_times(body: nn.Module, batch: Tensor) -> BranchTimes:
    """The time that the removal of each branch saves.

    Only a few networks are timed, for any number of branches: the dense one, and the one without any branch. If blocks
    have several branches, also the ones without the first branch of every block, without the second, and so on. The
    saving of a whole block is divided among its branches.

    Args:
        body: A timm model with gates, none of them closed; it is not changed.
        batch: Images (B, C, H, W) on the device of the model.
    """
    repeats = repeats_for(body, batch)
    blocks = slots_by_block(body, gates(body))
    nets = {"dense": body, "none": _without(body, gates(body))}
    whole = milliseconds(nets, batch, repeats)
    if any(len(own) > 1 for own in blocks.values()):
        for place in range(max(map(len, blocks.values()))):
            nets[str(place)] = _without(body, [own[place] for own in blocks.values() if place < len(own)])
    inside = _block_milliseconds(nets, list(blocks), batch, repeats)
    saved: dict[str, float] = {}
    for path, own in blocks.items():

        def goes_in(name: str, path: str = path) -> float:
            return max(inside["dense"][path] - inside[name][path], 0.0)

        single = [goes_in(str(place) if len(own) > 1 else "none") for place in range(len(own))]
        shares = [value / sum(single) if sum(single) else 1 / len(own) for value in single]
        saved |= {slot: share * goes_in("none") for slot, share in zip(own, shares, strict=True)}
    total = sum(saved.values())
    scale = max(whole["dense"] - whole["none"], 0.0) / total if total else 0.0
    return BranchTimes(whole["dense"], whole["none"], {slot: scale * value for slot, value in saved.items()})


def _without(body: nn.Module, slots: Iterable[str]) -> nn.Module:
    net = shared_copy(body)
    _collapse(net, set(slots))
    return net


def _collapse(net: nn.Module, slots: set[str]) -> None:
    for plan in plan_collapse(net, slots) if slots else ():
        apply_edits(net, plan.edits)


def _block_milliseconds(
    nets: Mapping[str, nn.Module], paths: Sequence[str], batch: Tensor, repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time within each block of each network, measured in turn; 0 for a block that is not called or does not exist.

    The minimum is used, because a block takes so little time that other processes would affect the median.
    """
    synchronise: Callable[[], None] = torch.cuda.synchronize if batch.is_cuda else lambda: None
    times: dict[str, dict[str, list[float]]] = {name: {path: [] for path in paths} for name in nets}
    order, draw = list(nets), random.Random(0)
    for turn in range(warmup + repeats):
        draw.shuffle(order)
        for name in order:
            passed = _time_blocks(nets[name], paths, batch, synchronise)
            if turn >= warmup:
                for path in paths:
                    times[name][path].append(passed[path])
    return {name: {path: 1000 * min(values) for path, values in own.items()} for name, own in times.items()}


def _time_blocks(
    net: nn.Module, paths: Sequence[str], batch: Tensor, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Seconds within each block in one forward pass, summed over all its calls."""
    passed, begun, hooks = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0), []
    modules = dict(net.named_modules())

    def begin(path: str) -> None:
        synchronise()
        begun[path] = time.perf_counter()

    def end(path: str) -> None:
        synchronise()
        passed[path] += time.perf_counter() - begun[path]

    for path in paths:
        if path in modules:  # an outer block may have been replaced
            hooks.append(modules[path].register_forward_pre_hook(lambda *_, path=path: begin(path)))
            hooks.append(modules[path].register_forward_hook(lambda *_, path=path: end(path)))
    try:
        with evaluating(net):
            net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return passed
