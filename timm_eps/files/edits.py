"""The edits that remove branches from a timm network, as data.

A plan of removal is a list of edits. Each one replaces a module or a parameter, and JSON can hold it. The package
carries edits out while it prunes. A saved model can bring its edits along: then stock timm builds the dense network and
the same edits make the pruned one of it.

This file imports only modules that are copied into saved directories with it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from .standins import Chain, Passthrough, ZeroBranch
from .value_checks import is_whole, refuse, shortened

__all__ = [
    "KINDS", "SLOT_NAME", "Edit", "apply_edits", "check_edits", "edits_as_json", "edits_digest",
    "restore_constants", "without_overtaken",
]  # fmt: skip

# In JSON, each edit has a path and one of these keys.
KINDS = ("zero", "pass", "chain", "constant")
# What timm calls a stochastic-depth slot.
SLOT_NAME = re.compile(r"(\w+_)?drop_path\d*", re.ASCII)
# Attribute of a module: the names of its parameters that became ones.
_CONSTANTS = "_constant_parameters"
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_MOST_EDITS = 100_000
_MOST_CHILDREN = 1000
_MOST_SIZE = 2**20


class Edit(NamedTuple):
    """One replacement in a network.

    Attributes:
        path: Path of the module or parameter that is replaced.
        kind: ``'zero'`` for a slot that puts out zero, ``'pass'`` for a module that passes arguments on, ``'chain'``
            for a block of which some children stay in a row, ``'constant'`` for a parameter that becomes ones.
        value: For ``'zero'`` the shape, with None for a size of the input; for ``'pass'`` the position of the argument,
            or a tuple of them; for ``'chain'`` the names of the children; for ``'constant'`` True.
    """

    path: str
    kind: str
    value: Any

    def apply(self, body: nn.Module) -> Callable[[], None]:
        """Replace in place.

        Args:
            body: A timm network.

        Returns:
            A function that takes the edit back.

        Raises:
            ValueError: The network has nothing of this kind at the path.
        """
        parent_path, _, name = self.path.rpartition(".")
        try:
            parent = body.get_submodule(parent_path)
        except AttributeError:
            raise self._misfit(body) from None
        return self._make_constant(body, parent, name) if self.kind == "constant" else self._put(body, parent, name)

    def replacement(self, old: nn.Module | None) -> nn.Module:
        """The module that takes the place of ``old``, which is None for an empty slot."""
        if self.kind == "zero":
            return ZeroBranch(tuple(self.value))
        assert old is not None
        if self.kind == "pass":
            take = tuple(self.value) if isinstance(self.value, list | tuple) else self.value
            return _like(old, nn.Identity() if take == 0 and _takes_one(old) else Passthrough(_class_of(old), take))
        chain = nn.Sequential() if _takes_one(old) else Chain(_class_of(old))
        for name in self.value:
            chain.add_module(name, old.get_submodule(name))
        if self.value and getattr(chain[0], "inplace", False):
            # Before, it changed the block's sum. Now it gets the block's input, which others may need unchanged.
            chain[0] = copy.copy(chain[0])
            chain[0].inplace = False  # type: ignore[assignment]
        return _like(old, chain)

    def _put(self, body: nn.Module, parent: nn.Module, name: str) -> Callable[[], None]:
        old = parent._modules.get(name, parent.__dict__.get(name, parent))
        # timm leaves a slot without stochastic depth empty.
        is_empty_slot = self.kind == "zero" and old is None and SLOT_NAME.fullmatch(name)
        if not is_empty_slot:
            if not isinstance(old, nn.Module) or old is parent:
                raise self._misfit(body)
            children = dict(old.named_children())
            if self.kind == "chain" and any(child not in children for child in self.value):
                raise self._misfit(body)
        try:
            new = self.replacement(old)
        except IndexError:  # a position that the module's forward does not have
            raise self._misfit(body) from None
        setattr(parent, name, new.train(parent.training if old is None else old.training))

        def undo() -> None:
            setattr(parent, name, old)

        return undo

    def _make_constant(self, body: nn.Module, parent: nn.Module, name: str) -> Callable[[], None]:
        if parent._parameters.get(name) is None:
            raise self._misfit(body)
        order = list(parent._parameters)
        parameter: Any = parent._parameters.pop(name)
        # The value does not affect the output, but the block's code still multiplies by it.
        ones = parameter.detach().new_ones(()).expand(parameter.shape)
        parent.register_buffer(name, ones, persistent=False)
        before = getattr(parent, _CONSTANTS, ())
        setattr(parent, _CONSTANTS, (*before, name))

        def undo() -> None:
            setattr(parent, _CONSTANTS, before)
            delattr(parent, name)
            parent.register_parameter(name, parameter)
            for other in order:  # optimizers number parameters in their order
                parent._parameters[other] = parent._parameters.pop(other)

        return undo

    def _misfit(self, body: nn.Module) -> ValueError:
        return ValueError(
            f"edits: the {type(body).__name__} that config.json describes has nothing at {shortened(self.path, 100)} "
            f"for the edit {self.kind}={shortened(self.value)}. Keep config.json as it was saved."
        )


def apply_edits(body: nn.Module, edits: Iterable[Edit]) -> Callable[[], None]:
    """Carry out edits in place, in their order.

    Args:
        body: A timm network.
        edits: What :func:`check_edits` returned, or a plan of removal.

    Returns:
        A function that takes all of them back.

    Raises:
        ValueError: An edit does not fit the network.
    """
    undo = [edit.apply(body) for edit in edits]

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def without_overtaken(edits: Iterable[Edit]) -> list[Edit]:
    """Omit edits inside modules that a later edit replaces."""
    kept: list[Edit] = []
    for edit in edits:
        if edit.kind in ("pass", "chain"):
            names = edit.value if edit.kind == "chain" else ()
            stays = tuple(f"{edit.path}.{name}" for name in names)
            kept = [
                earlier
                for earlier in kept
                if not earlier.path.startswith(f"{edit.path}.")
                or any(earlier.path == path or earlier.path.startswith(f"{path}.") for path in stays)
            ]
        kept.append(edit)
    return kept


def edits_as_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Edits as lists and dicts that JSON can hold; :func:`check_edits` reads them.

    Example::

        edits_as_json([Edit("layer2.0", "chain", ("downsample",))])  # [{'path': 'layer2.0', 'chain': ['downsample']}]
    """
    return [
        {"path": edit.path, edit.kind: list(edit.value) if isinstance(edit.value, tuple) else edit.value}
        for edit in edits
    ]


def edits_digest(architecture: str, removed: Iterable[str], edits: list[dict[str, Any]]) -> str:
    """SHA-256 that binds edits to the network and the removed branches that they are for.

    If an edit of a module with parameters is missing, the weights do not fit. For other modules, only this digest does
    not fit.

    Args:
        architecture: Name of the network in timm.
        removed: Slots of the removed branches.
        edits: What :func:`edits_as_json` returned.
    """
    text = json.dumps([architecture, sorted(removed), edits], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_edits(value: object, removed: Iterable[str]) -> list[Edit]:
    """Read edits from a configuration file and check their form.

    Whether the network has the modules shows when they are applied.

    Args:
        value: The field ``edits`` of ``config.json``.
        removed: Slots of the removed branches, by the same file.

    Raises:
        ValueError: An edit is malformed or of unknown kind, or the edits remove other branches than ``removed`` lists.
    """
    if not isinstance(value, list | tuple):
        raise refuse("edits", "a list of edits", value)
    if len(value) > _MOST_EDITS:
        raise ValueError(f"edits must be a list of at most {_MOST_EDITS} edits, got {len(value)}.")
    edits = [_read(item) for item in value]
    slots = set(removed)
    if strangers := sorted({edit.path for edit in edits if edit.kind == "zero"} - slots):
        raise ValueError(f"edits: {shortened(strangers[0], 100)} is closed, but removed does not list it.")
    paths = {edit.path for edit in edits}
    for slot in sorted(slots):
        parts = slot.split(".")
        if not any(".".join(parts[:end]) in paths for end in range(1, len(parts) + 1)):
            raise ValueError(f"edits: none removes the branch of {shortened(slot, 100)}, which removed lists.")
    return edits


def _read(item: object) -> Edit:
    kind = next((kind for kind in KINDS if isinstance(item, Mapping) and kind in item), None)
    if not isinstance(item, Mapping) or kind is None or set(item) != {"path", kind}:
        raise refuse("edits", f"a list of objects with 'path' and one of {', '.join(KINDS)}", item)
    path, value = item["path"], item[kind]
    if not (isinstance(path, str) and len(path) <= 256 and _PATH.fullmatch(path)):
        raise refuse("edits: path", "the path of a module such as 'layer1.0.drop_path'", path)
    expected = {
        "zero": "a list of at most 8 sizes or nulls, for the path of a slot",
        "pass": "the position of an argument, or a list of them",
        "chain": "a list of names of children",
        "constant": "true",
    }[kind]
    if not _fits(kind, value) or (kind == "zero" and not SLOT_NAME.fullmatch(path.rpartition(".")[2])):
        raise refuse(f"edits: {kind} at {shortened(path, 100)}", expected, value)
    return Edit(path, kind, tuple(value) if isinstance(value, list | tuple) else value)


def _fits(kind: str, value: Any) -> bool:
    if kind == "constant":
        return value is True
    if kind == "pass" and is_whole(value, 0, 64):
        return True
    if not isinstance(value, list | tuple):
        return False
    if kind == "zero":
        return len(value) <= 8 and all(size is None or is_whole(size, 0, _MOST_SIZE) for size in value)
    if kind == "pass":
        return len(value) <= 64 and all(is_whole(position, 0, 64) for position in value)
    return len(value) <= _MOST_CHILDREN and all(isinstance(name, str) and _is_name(name) for name in value)


def _is_name(name: str) -> bool:
    return len(name) <= 128 and bool(re.fullmatch(r"\w+", name, re.ASCII))


def _takes_one(module: nn.Module) -> bool:
    """Whether a module is called with one argument."""
    return len(inspect.signature(module.forward).parameters) == 1


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module's callers know: for a stand-in, the class of the module that it replaced."""
    return module.like if isinstance(module, Passthrough | Chain) else type(module)


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a replacement the settings of what it replaces, such as ``dim_out``, which code outside may read."""
    for name, value in vars(old).items():
        if (
            not name.startswith("_")
            and isinstance(value, bool | int | float | str | tuple | None)
            and not hasattr(new, name)
        ):
            setattr(new, name, value)
    return new


def restore_constants(body: nn.Module) -> None:
    """Set the parameters of ``'constant'`` edits to ones again, after a loader built the network without memory."""
    for module in body.modules():
        for name in getattr(module, _CONSTANTS, ()):
            buffer: Any = module._buffers[name]
            module._buffers[name] = buffer.new_ones(()).expand(buffer.shape)
