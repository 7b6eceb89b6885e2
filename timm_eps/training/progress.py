"""Progress of a training: the content of ``training.json`` in a checkpoint, and its checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Progress", "check_like", "check_pruner", "dump_json", "load_json", "load_state"]

_NUMBER = "not a JSON number"


def dump_json(value: Any, path: Path) -> None:
    """Write standard JSON. NaN and infinity become ``{"not a JSON number": "nan"}``."""
    path.write_text(json.dumps(_encoded(value), allow_nan=False), encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read a file of :func:`dump_json`, with NaN and infinity.

    Raises:
        ValueError: The file is not standard JSON, or nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{path.name} contains {constant}, which is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=_decoded, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def load_state(path: Path) -> dict[str, Any]:
    """The content of a ``training.json``, with a check of the names of its parts.

    Raises:
        ValueError: The file is not JSON, or not such an object.
        OSError: The file cannot be read.
    """
    state = load_json(path)
    check_like(
        state, {"run": None, "progress": None, "scheduler": None, "pruner": None, "removed": [], "draws": ""}, path.name
    )
    if not isinstance(state["run"], dict):
        raise ValueError(f"{path.name}.run must be an object, got {type(state['run']).__name__}")
    return state


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(value)}
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def _decoded(found: dict[str, Any]) -> Any:
    return float(found[_NUMBER]) if found.keys() == {_NUMBER} else found


@dataclass
class Progress:
    """Position and results of a training so far."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    step: int = 0  # optimizer steps since the beginning
    loss: float = 0.0  # sum over the batches of the current epoch, in the first process
    seconds: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, stored: Any, *, epochs: int, batches: int, accumulated: int) -> Progress:
        """The progress in a checkpoint, checked for consistency.

        Args:
            stored: Fields by name.
            epochs: Number of epochs of the training.
            batches: Number of batches per epoch.
            accumulated: Number of batches per step. The last step of an epoch may have fewer.

        Raises:
            ValueError: A field is not possible. The message names it.
        """
        check_like(stored, asdict(cls()), "progress")
        found = cls(**stored)
        for one in ("loss", "seconds"):
            if not math.isfinite(getattr(found, one)):
                raise ValueError(f"progress.{one} must be finite, got {getattr(found, one)}")
        for name, most in {"epoch": epochs, "batch": batches - 1 if found.epoch < epochs else 0}.items():
            if not 0 <= getattr(found, name) <= most:
                raise ValueError(f"progress.{name} must be 0 to {most}, got {getattr(found, name)}")
        steps = found.epoch * math.ceil(batches / accumulated) + found.batch // accumulated
        if found.step != steps:
            raise ValueError(f"progress.step must be {steps} after {found.epoch} epochs and {found.batch} batches, got "
                             f"{found.step}")  # fmt: skip
        for each in fields(cls)[-3:]:
            kind = str if each.name == "corrupt" else float
            if not all(isinstance(item, kind) and item == item for item in getattr(found, each.name)):
                raise ValueError(f"progress.{each.name} must be a list of {kind.__name__}")
        if len(found.losses) != found.epoch or len(found.accuracies) not in (0, found.epoch):
            raise ValueError(f"progress.losses and progress.accuracies must have {found.epoch} epochs")
        return found


def check_like(stored: Any, own: Any, name: str) -> None:
    """Check that a stored state has the same keys, and values of the same types, as an object's own state.

    If one value is None, the other may have any type. A whole number may replace a float. Lists are not searched.

    Raises:
        ValueError: The states differ. The message names the place.
    """
    if isinstance(own, dict):
        if not isinstance(stored, dict):
            raise ValueError(f"{name} must be an object, got {type(stored).__name__}")
        if strange := sorted(stored.keys() ^ own.keys()):
            raise ValueError(f"{name} {'has no' if strange[0] in own else 'has an unknown'} {strange[0]}")
        for key, value in own.items():
            check_like(stored[key], value, f"{name}.{key}")
    elif stored is not None and own is not None:
        fitting = (int, float) if isinstance(own, float) else type(own)
        if not isinstance(stored, fitting) or isinstance(stored, bool) != isinstance(own, bool):
            raise ValueError(f"{name} must be {type(own).__name__}, got {type(stored).__name__}")


def check_pruner(stored: Any, epoch: int) -> None:
    """Check the types in a stored state of :class:`EpsilonPruner`, whose slots depend on what is removed.

    Args:
        stored: State of :meth:`EpsilonPruner.state_dict`, read from a file.
        epoch: Number of finished epochs.

    Raises:
        ValueError: The state is not valid. The message names the field.
    """
    by_slot: dict[str, Any] = dict.fromkeys(("epsilon", "importances", "responses", "streaks"))
    has_budget = isinstance(stored, dict) and "budget" in stored  # measurements of the dense network
    budget: dict[str, Any] = {"budget": None} if has_budget else {}
    check_like(stored, {"epoch": 0, "closed": [], "removed": [], "history": [], **by_slot, **budget}, "pruner")
    for name, value in (stored["budget"] or {}).items() if has_budget else ():
        _check_numbers(value if isinstance(value, dict) else {name: value}, f"pruner.budget.{name}", float)
    if stored["epoch"] != epoch or len(stored["history"]) != epoch:
        raise ValueError(f"pruner.epoch and pruner.history must have {epoch} epochs, got {stored['epoch']}")
    for name in by_slot:
        _check_numbers(stored[name], f"pruner.{name}", int if name == "streaks" else float)
    for name in ("closed", "removed"):
        _check_slots(stored[name], f"pruner.{name}")
    record: dict[str, Any] = {"epoch": 0, "epsilon": 0.0, "closed": [], "removed": [], "responses": None}
    optional: dict[str, Any] = {"importances": None, "held": []}
    for number, one in enumerate(stored["history"]):
        name = f"pruner.history.{number}"
        expected = record | {key: like for key, like in optional.items() if isinstance(one, dict) and key in one}
        check_like(one, expected, name)
        for each in expected.keys() & {"responses", "importances"}:
            _check_numbers(one[each], f"{name}.{each}", float)
        for each in expected.keys() & {"closed", "removed", "held"}:
            _check_slots(one[each], f"{name}.{each}")


def _check_numbers(stored: Any, name: str, kind: type) -> None:
    if not isinstance(stored, dict):
        raise ValueError(f"{name} must be an object, got {type(stored).__name__}")
    for slot, value in stored.items():
        check_like(value, kind(), f"{name}.{slot}")
        if value is None:
            raise ValueError(f"{name}.{slot} must be {kind.__name__}, got None")


def _check_slots(stored: Any, name: str) -> None:
    if not isinstance(stored, list) or not all(isinstance(slot, str) for slot in stored):
        raise ValueError(f"{name} must be a list of str")
