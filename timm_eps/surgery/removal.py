"""Add gates to a model and remove closed branches from it.

A block without branches is replaced by its shortcut: an identity, or the ``downsample``, with or without parameters.
Each removal is checked: the block with closed gates must equal the replacement bit for bit, and
the whole model must compute the same before and after. The modules around a removed block keep their names, so the
sorted list of removed slots is enough to rebuild the structure.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files.config_checks import check_slots
from ..files.edits import apply_edits
from ..files.value_checks import shortened
from ..gate import EpsilonGate, check_epsilon
from ..names import twin_name
from .branches import (
    UNUSED,
    block_path,
    branch_ends,
    check_input,
    evaluating,
    find_slots,
    gates,
    probe_batch,
    timm_body,
)
from .collapse import Plan, plan_by_key, plan_collapse
from .copies import note_copies
from .feature_nets import is_stock_features, spelled_as
from .module_hooks import carrying_hooks
from .sharding import refuse_sharded
from .tracing import tensors
from .wrapping import guard_features, guard_saving

__all__ = [
    "add_gates",
    "check_gated",
    "check_known",
    "closed_slots",
    "collapsed_copy",
    "natural_order",
    "remove",
    "remove_closed",
    "removed_slots",
    "replay_removed",
    "same_outputs",
    "slots_without_weights",
    "structure_of",
]

_logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


@torch.inference_mode(mode=False)  # the new tensors will be trained
def add_gates(model: nn.Module, epsilon: float = 0.0) -> list[str]:
    """Put an :class:`~timm_eps.EpsilonGate` at the end of every residual branch of a timm model, in place.

    The module in a stochastic-depth slot stays and runs after the gate. Existing gates keep their place and get the new
    ε.

    Args:
        model: A timm model, or a transformers model around one.
        epsilon: Threshold ε in activation units; 0 keeps every gate open.

    Returns:
        The slot paths of all gates, such as ``stages.1.blocks.4.drop_path``.

    Raises:
        ValueError: No residual branch was found, ε is negative or NaN, the model is wrapped or compiled, or it does not
            accept images of its configured size.

    Example::

        model = timm.create_model("test_resnet", num_classes=10)
        slots = timm_eps.add_gates(model)  # ['layer1.0.drop_path', ...]
    """
    check_epsilon(epsilon)
    body = timm_body(model)
    try:
        slots, refused = find_slots(body)
    except Exception:
        check_input(body)  # raises with a clear message
        raise
    device = next(body.parameters()).device
    for slot, single_zero in slots.items():
        path, _, name = slot.rpartition(".")
        owner = body.get_submodule(path)
        setattr(owner, name, EpsilonGate(drop_path=getattr(owner, name), single_zero=single_zero).to(device))
    for slot, reason in refused.items():
        level = logging.INFO if reason == UNUSED else logging.WARNING
        _logger.log(level, "No gate at %s of %s: %s.", slot, type(body).__name__, reason)
    guard_saving(body)
    if is_stock_features(model):
        guard_features(model)
    found = gates(body)
    if not found:
        why = "; ".join(f"{slot}: {reason}" for slot, reason in refused.items()) or "it has no stochastic-depth slot"
        raise ValueError(f"{type(body).__name__} has no residual branch that a gate can close ({why}).")
    for gate in found.values():
        gate.epsilon = epsilon
        gate.train(body.training)
    note_copies(body)
    return list(found)


def slots_without_weights(body: nn.Module, keys: Collection[str]) -> list[str]:
    """The slots whose last layer is missing in the keys of a state dict: the removed ones of its network."""
    names = {parameter: name for name, parameter in body.named_parameters()}
    missing = []
    for slot, modules in branch_ends(body).items():
        last = [names[parameter] for module in modules for parameter in module.parameters(recurse=False)]
        if last and not any(name in keys for name in last):
            missing.append(slot)
    return missing


def closed_slots(model: nn.Module) -> list[str]:
    """Slot paths of the gates that are closed in evaluation."""
    return [slot for slot, gate in gates(model).items() if gate.closed]


def removed_slots(model: nn.Module) -> list[str]:
    """Slot paths of the removed branches of a model, sorted by position.

    Example::

        again = timm.create_model("eps_resnet20", num_classes=10, removed=timm_eps.removed_slots(model))

    Args:
        model: A timm model, or a transformers model around one.
    """
    return list(getattr(timm_body(model), "removed", []))


def remove_closed(model: nn.Module) -> list[str]:
    """Remove every branch whose gate is ``closed``, in place, without changing any evaluation output.

    A branch is removed if a probe proves that the model computes the same without it. A block is removed with the last
    of its branches.

    Returns:
        The slot paths removed now.

    Raises:
        ValueError: The model has no gates, or is wrapped or compiled.

    Example::

        model.stages[2].blocks[1].drop_path.closed = True
        timm_eps.remove_closed(model)  # ['stages.2.blocks.1.drop_path']
    """
    check_gated(model)
    return remove(model, closed_slots(model))


@torch.inference_mode(mode=False)  # the new tensors will be trained
def remove(model: nn.Module, slots: Iterable[str]) -> list[str]:
    """Remove the branches of closed gates in place, with a check of the outputs; see :func:`remove_closed`.

    Returns:
        The removed slots, including the slots inside a removed branch. If removing a branch would change the output,
        it stays, and a warning is logged.

    Raises:
        ValueError: A slot is unknown or its gate is open, or the model is on the meta device.
    """
    body = timm_body(model)
    refuse_sharded(model, "Branches cannot be removed")
    if any(parameter.is_meta for parameter in body.parameters()):
        raise ValueError(
            f"This {type(body).__name__} is on the meta device, where a removal cannot be checked. Load its weights "
            "first, or pass the slots as removed= when the model is created, which needs no weights."
        )
    slots = set(slots)
    found = gates(body)
    _check_known(slots, found, body)
    if still_open := sorted(slot for slot in slots if not found[slot].closed):
        raise ValueError(f"Cannot remove {still_open[0]}: its gate is open, so its branch is still in use.")
    if not slots:
        return []
    with evaluating(body), carrying_hooks(body, _replaced(body, slots)):
        batch = probe_batch(body)
        before = body(batch)
        while slots:
            plans = plan_collapse(body, slots)
            take_back = _carry_out(body, plans)
            if same_outputs(before, body(batch)):
                break
            take_back()
            # A plan depends on all of its slots, so failing slots are dropped and the others planned again.
            for plan in _to_blame(body, plans, batch, before):
                _logger.warning("%s stays closed: the output would change without it.", ", ".join(plan.slots))
                slots = slots.difference(plan.slots)
    left = gates(body)
    gone = [slot for slot in found if slot not in left]
    _record(model, removed_slots(body) + gone)
    return gone


@torch.inference_mode(mode=False)  # the new tensors will be trained
def replay_removed(model: nn.Module, removed: Iterable[str], key: Hashable = None) -> None:
    """Give a new model the structure of a pruned one, in place. Works without weights, on any device.

    Args:
        model: Model with all its branches, or at least those that are not in ``removed``.
        removed: Slot paths, as returned by :func:`remove_closed`.
        key: Arguments of the model's constructor, if known; see :func:`.collapse.plan_by_key`.

    Raises:
        ValueError: A path is not a slot of this model, or a branch inside a removed branch is not listed.
    """
    body = timm_body(model)
    note_copies(body)
    found = gates(body)
    slots = set(spelled_as(check_slots("removed", removed), found, found))
    _check_known(slots, found, body, "removed: ")
    if not slots:
        return
    refuse_sharded(model, "Branches cannot be removed")
    with carrying_hooks(body, _replaced(body, slots)):
        _carry_out(body, plan_by_key(body, slots, key))
    if more := found.keys() - gates(body).keys() - slots:
        raise ValueError(f"removed lacks {min(more)!r}, which is inside a branch that it lists.")
    _record(model, {*removed_slots(body), *slots})


def _replaced(body: nn.Module, slots: Iterable[str]) -> set[str]:
    """Paths of gates and whole blocks whose replacements compute the same."""
    return {path for slot in slots for path in (slot, block_path(body, slot))}


def _to_blame(body: nn.Module, plans: list[Plan], batch: Tensor, before: Any) -> list[Plan]:
    """The plans that change the output individually; if there are none, all plans."""
    blamed = []
    for plan in plans:
        take_back = _carry_out(body, [plan])
        if not same_outputs(before, body(batch)):
            blamed.append(plan)
        take_back()
    return blamed or plans


def _carry_out(body: nn.Module, plans: Iterable[Plan]) -> Callable[[], None]:
    """Apply the edits of plans. Returns a function that undoes all of them."""
    return apply_edits(body, [edit for plan in plans for edit in plan.edits])


def collapsed_copy(model: _Model) -> _Model:
    """A copy in evaluation mode with the same outputs and without the closed branches."""
    refuse_sharded(model, "Closed branches cannot be removed from a copy")
    duplicate = copy.deepcopy(model).eval()
    remove(duplicate, closed_slots(duplicate))
    return duplicate


def same_outputs(some: Any, others: Any) -> bool:
    """Equality of every element. NaN equals NaN, so closed branches of a diverged run can still be removed."""
    pairs = zip(tensors(some), tensors(others), strict=True)
    return all(
        torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in pairs
    )


def _record(model: nn.Module, removed: Iterable[str]) -> None:
    """Record the removed branches where timm's ``save_for_hf`` reads them.

    This is the only record. If the model has a method ``on_structure_change``, it is called to update other
    objects, such as a configuration.
    """
    body: Any = timm_body(model)
    body.removed = sorted(removed, key=natural_order)
    cfg = getattr(body, "pretrained_cfg", None) or {}
    if "architecture" in cfg:  # only the twin can be built without these branches
        body.pretrained_cfg = {**cfg, "architecture": twin_name(cfg["architecture"])}
    body._model_args = {**getattr(body, "_model_args", {}), "removed": body.removed}
    if (hook := getattr(model, "on_structure_change", None)) is not None:
        hook()


def structure_of(model: nn.Module) -> dict[str, list[str]]:
    """The model arguments for removed branches and closed gates, without empty lists."""
    slots = {"removed": removed_slots(model), "closed": closed_slots(model)}
    return {name: sorted(found, key=natural_order) for name, found in slots.items() if found}


def natural_order(path: str) -> list[tuple[int, str]]:
    """Sorting key that puts block 10 after block 9."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() and len(part) < 10 else (-1, part)
        for part in path.split(".")
    ]


def check_gated(model: nn.Module) -> None:
    """Raise ValueError if a model has neither gates nor removed branches."""
    if not gates(model) and not removed_slots(model):
        raise ValueError(f"{type(timm_body(model)).__name__} has no gates; call timm_eps.add_gates(model) first.")


def _check_known(slots: Iterable[str], found: dict[str, EpsilonGate], body: nn.Module, source: str = "") -> None:
    unknown = sorted(set(slots) - found.keys(), key=natural_order)
    if unknown:
        near = difflib.get_close_matches(unknown[0], found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its slots look like {next(iter(found), 'none')!r}."
        raise ValueError(
            f"{source}{shortened(unknown[0], 100)} is not a gated slot of this {type(body).__name__} with {len(found)} "
            f"gates; {hint}"
        )


def check_known(model: nn.Module, slots: Iterable[str]) -> None:
    """Raise ValueError if one of these is not a gated slot of the model. The message names the most similar slot."""
    body = timm_body(model)
    _check_known(slots, gates(body), body)
