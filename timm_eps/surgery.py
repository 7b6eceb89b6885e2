"""Gates into a model, collapsed branches out of it.

A collapsed block is replaced by its shortcut: an identity, or the parameter-free or learned ``downsample`` beside the
branch. Nothing is taken on trust: the block is run with its gates shut and must equal the replacement bit for bit, and
the whole model must compute the same before and after. The modules around a removed block keep their names, so the
sorted list of removed slots is all that is needed to build the same structure again.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .branches import block_path, branch_ends, evaluating, find_slots, gates, probe_batch, timm_body
from .gate import EpsilonGate, check_epsilon

__all__ = [
    "add_gates",
    "closed_slots",
    "collapsed_copy",
    "natural_order",
    "param_groups",
    "remove",
    "remove_closed",
    "removed_slots",
    "replay_removed",
]

_logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def add_gates(model: nn.Module, epsilon: float = 0.0) -> list[str]:
    """Put an :class:`~timm_eps.EpsilonGate` at the end of every residual branch of a timm model, in place.

    What stands in a stochastic-depth slot stays and runs after the gate. Gates that are there already keep their
    place and get the new ε.

    Args:
        model: A timm model, or a transformers model around one.
        epsilon: Threshold ε in activation units; 0 keeps every gate open.

    Returns:
        The slot paths of all gates, such as ``stages.1.blocks.4.drop_path``.

    Raises:
        ValueError: No residual branch was found, ε is negative or NaN, or the model is wrapped or compiled.
    """
    check_epsilon(epsilon)
    body = timm_body(model)
    slots, refused = find_slots(body)
    for slot in slots:
        block, name = body.get_submodule(block_path(slot)), slot.rpartition(".")[2]
        setattr(block, name, EpsilonGate(drop_path=getattr(block, name)).to(next(body.parameters()).device))
    for slot, reason in refused.items():
        _logger.warning("No gate at %s of %s: %s.", slot, type(body).__name__, reason)
    found = gates(body)
    if not found:
        why = "; ".join(f"{slot}: {reason}" for slot, reason in refused.items()) or "it has no stochastic-depth slot"
        raise ValueError(f"{type(body).__name__} has no residual branch that a gate can close ({why}).")
    for gate in found.values():
        gate.epsilon = epsilon
        gate.train(body.training)
    return list(found)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups under which weight decay can empty a closed branch.

    Decayed are the weights of convolutions and linear layers and, where a branch ends in a norm or a layer scale,
    that norm's or scale's own parameters: they alone bound its output, whatever the weights before them. No other
    bias, norm or scale is decayed.

    Args:
        model: A model with gates.
        weight_decay: L2 coefficient of the decayed group.

    Returns:
        Two groups, decayed and not, for any ``torch.optim`` optimizer. Parameters that need no gradient are left out.

    Raises:
        ValueError: ``weight_decay`` is negative or NaN, or the model has no gates.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}.")
    _check_gated(model)
    body = timm_body(model)
    # A layer scale is a module at the end of the branch, or a parameter that the block itself holds.
    ends = [*branch_ends(body), *(body.get_submodule(block_path(slot)) for slot in gates(body))]
    bounding = {id(parameter) for end in ends for parameter in end.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or id(parameter) in bounding else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def closed_slots(model: nn.Module) -> list[str]:
    """Slot paths of the gates that are closed in evaluation."""
    return [slot for slot, gate in gates(model).items() if gate.closed]


def removed_slots(model: nn.Module) -> list[str]:
    """Slot paths of the branches that are gone from a model, sorted by position."""
    return list(getattr(timm_body(model), "removed", []))


def remove_closed(model: nn.Module) -> list[str]:
    """Remove every branch whose gate is ``closed``, in place, without changing any evaluation output.

    A block goes when all its branches are closed and a probe proves that what replaces it computes the same.

    Returns:
        The slot paths removed now.

    Raises:
        ValueError: The model has no gates, or is wrapped or compiled.
    """
    _check_gated(model)
    return remove(model, closed_slots(model))


def remove(model: nn.Module, slots: Iterable[str]) -> list[str]:
    """Remove the branches of closed gates, proven, in place; see :func:`remove_closed`.

    Returns:
        The slots that went. A slot of a block with an open branch, or of one that no shortcut can replace, stays.

    Raises:
        ValueError: A slot is unknown or its gate is open.
        RuntimeError: The model computes something else without these blocks; it is left as it was.
    """
    body = timm_body(model)
    slots = set(slots)
    found = gates(body)
    _check_known(slots, found, body)
    if still_open := sorted(slot for slot in slots if not found[slot].closed):
        raise ValueError(f"Cannot remove {still_open[0]}: its gate is open, so its block is no identity.")
    doomed = {path: own for path, own in _by_block(found).items() if slots.issuperset(own)}
    if not doomed:
        return []

    with evaluating(body):
        batch = probe_batch(body)
        calls, before = _run_recording(body, doomed, batch)
        originals = {}
        for path in doomed:
            block = body.get_submodule(path)
            if (shortcut := _proven_shortcut(block, calls[path])) is not None:
                originals[path] = block
                _set_module(body, path, shortcut)
        if not _equal(before, body(batch)):
            for path, block in originals.items():
                _set_module(body, path, block)
            raise RuntimeError(
                f"{type(body).__name__} computes something else without {', '.join(originals)}; nothing was removed."
            )
    for path in doomed.keys() - originals.keys():
        _logger.warning("%s is closed but stays: its output is not its shortcut.", path)
    gone = [slot for path in originals for slot in doomed[path]]
    _record(model, removed_slots(body) + gone)
    return gone


def replay_removed(model: nn.Module, removed: Iterable[str]) -> None:
    """Give a newly built model the structure of a pruned one, in place. Needs no weights and no forward pass.

    Args:
        model: The model with all its blocks, or with those that are not in ``removed``.
        removed: Slot paths as :func:`remove_closed` returned them.

    Raises:
        ValueError: A path is not a slot of this model, or names only some of a block's branches.
    """
    body = timm_body(model)
    slots = _check_slot_list(removed)
    found = gates(body)
    _check_known(slots, found, body)
    blocks = _by_block(found)
    for path in {block_path(slot) for slot in slots}:
        own = set(blocks[path])
        if not own <= slots:
            raise ValueError(
                f"removed names {sorted(own & slots)} but not {sorted(own - slots)}: a block goes as a whole."
            )
        _set_module(body, path, _shortcut(body.get_submodule(path)))
    _record(model, {*removed_slots(body), *slots})


def collapsed_copy(model: _Model) -> _Model:
    """A copy that computes what the model evaluates to, in evaluation mode, without its closed branches."""
    duplicate = copy.deepcopy(model).eval()
    remove(duplicate, closed_slots(duplicate))
    return duplicate


def _by_block(slots: Iterable[str]) -> dict[str, list[str]]:
    """The slots of each block, by the block's path."""
    blocks: dict[str, list[str]] = {}
    for slot in slots:
        blocks.setdefault(block_path(slot), []).append(slot)
    return blocks


def _shortcut(block: nn.Module) -> nn.Module:
    downsample = getattr(block, "downsample", None)
    return downsample if isinstance(downsample, nn.Module) else nn.Identity()


def _proven_shortcut(block: nn.Module, call: tuple[Tensor, Tensor]) -> nn.Module | None:
    """The shortcut of a shut block if it computes the block's output from its input bit for bit, else None."""
    x, output = call
    shortcut = _shortcut(block)
    result = shortcut(x)
    return shortcut if result.shape == output.shape and _equal(result, output) else None


def _run_recording(
    body: nn.Module, paths: Iterable[str], batch: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Run the model once; return (input, output) of the modules at ``paths``, and the model's output."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for path in paths:

        def record(module: nn.Module, args: tuple, output: Tensor, path: str = path) -> None:
            calls[path] = (args[0].clone(), output.clone())

        hooks.append(body.get_submodule(path).register_forward_hook(record))
    try:
        output = body(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, output


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equality of every element, NaN counted equal to NaN: a diverged run may still lose its closed blocks."""
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _set_module(body: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(body.get_submodule(path).training)
    setattr(body.get_submodule(parent), name, module)


def _record(model: nn.Module, removed: Iterable[str]) -> None:
    """Note the structure where timm's own ``save_for_hf``, and where transformers, read it when they save."""
    body: Any = timm_body(model)
    body.removed = sorted(removed, key=natural_order)
    body._model_args = {**getattr(body, "_model_args", {}), "removed": body.removed}
    if config := getattr(model, "config", None):
        config.model_args = {**(config.model_args or {}), "removed": body.removed}


def natural_order(path: str) -> list[tuple[int, str]]:
    """Sorting key under which block 10 follows block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _check_gated(model: nn.Module) -> None:
    if not gates(model) and not removed_slots(model):
        raise ValueError(f"{type(timm_body(model)).__name__} has no gates; call timm_eps.add_gates(model) first.")


def _check_slot_list(removed: object) -> set[str]:
    if isinstance(removed, str) or not isinstance(removed, Iterable):
        raise ValueError(f"removed must be a list of slot paths, got {removed!r}.")
    slots = list(removed)
    if strangers := [slot for slot in slots if not isinstance(slot, str)]:
        raise ValueError(f"removed must hold slot paths, got {strangers[0]!r}.")
    return set(slots)


def _check_known(slots: Iterable[str], found: dict[str, EpsilonGate], body: nn.Module) -> None:
    unknown = sorted(set(slots) - found.keys(), key=natural_order)
    if unknown:
        near = difflib.get_close_matches(unknown[0], found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its slots look like {next(iter(found), 'none')!r}."
        raise ValueError(
            f"{unknown[0]!r} is not a gated slot of this {type(body).__name__} with {len(found)} gates; {hint}"
        )
