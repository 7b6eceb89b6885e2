"""Checks of a weights file against the network that it is for, before any of it is used.

The names, shapes and kinds of the tensors stand in the header of a safetensors file. They are compared with a network
that was built without memory, so a small file cannot make a loader take gigabytes for a large network. Then the numbers
are looked at: a file of NaN loads in every library without a word.

This file imports nothing of the package: a copy of it stands beside the stand-alone code on the Hub.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "WEIGHTS",
    "Layout",
    "check_file",
    "check_layout",
    "check_numbers",
    "check_precision",
    "digest",
    "layout_of",
    "precision_in",
    "weight_files",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS = dict.fromkeys(_PRECISIONS, "float")
_MAX_HEADER = 100_000_000  # bytes, as safetensors has it


class Layout(NamedTuple):
    """Shape and kind of a tensor: ``'float'``, ``'whole number'`` or another one's name in safetensors."""

    shape: tuple[int, ...]
    kind: str


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Names, shapes and kinds of a state dict, on any device."""
    return {name: Layout(tuple(t.shape), _kind(t)) for name, t in tensors.items() if isinstance(t, Tensor)}


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "bool" if tensor.dtype == torch.bool else "whole number"


def _layout_in(path: Path) -> dict[str, Layout]:
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return {
            name: Layout(
                tuple(part.get_shape()),
                _KINDS.get(part.get_dtype(), "bool" if part.get_dtype() == "BOOL" else _whole(part.get_dtype())),
            )
            for name, part in parts.items()
        }


def _whole(dtype: str) -> str:
    return "whole number" if dtype[:1] in "IU" else dtype


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """The safetensors files of a directory: one, or the parts that an index names.

    Raises:
        ValueError: There is none, or the index names a file outside the directory.
    """
    root = Path(directory)
    if (root / WEIGHTS).is_file():
        return [root / WEIGHTS]
    if not (root / INDEX).is_file():
        raise ValueError(
            f"The directory has no {WEIGHTS}. Files in other formats can hold code and are not read; save the model "
            "again."
        )
    try:
        names = set(json.loads((root / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{INDEX} is no index of safetensors files.") from None
    if not plain or not names or not all((root / name).is_file() for name in names):
        raise ValueError(f"{INDEX} must name safetensors files beside it.")
    return [root / name for name in sorted(names)]


def check_layout(
    found: Mapping[str, Layout],
    expected: Mapping[str, Layout],
    *,
    may_lack: Collection[str] = (),
    may_differ: Iterable[str] = (),
    source: str = WEIGHTS,
) -> None:
    """Compare the layout of stored weights with that of a network.

    Args:
        found: Layout of the stored weights.
        expected: Layout of the network.
        may_lack: Names that the weights need not have.
        may_differ: Names that the weights need not have, and that may have another shape: those of a classifier that
            the caller replaces.
        source: Where the weights are, for messages.

    Raises:
        ValueError: A tensor is missing, is one too many, or has another shape or kind. The message names it.
    """
    may_differ = set(may_differ)
    missing = sorted(expected.keys() - found.keys() - {*may_lack} - may_differ)
    strangers = sorted(found.keys() - expected.keys() - may_differ)
    for verb, names in (("lacks", missing), ("also holds", strangers)):
        if names:
            raise ValueError(
                f"{source} does not fit the network that config.json describes: it {verb} {_short(names[0])!r}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. Keep both files as one save wrote them."
            )
    for name, layout in found.items():
        wanted = expected.get(name, layout)
        if layout.kind != wanted.kind:
            raise ValueError(f"{source}: {_short(name)!r} must be of {wanted.kind} numbers, not of {layout.kind} ones.")
        if layout.shape != wanted.shape and name not in may_differ:
            raise ValueError(
                f"{source}: {_short(name)!r} has the shape {_short(str(list(layout.shape)))}, but the network that "
                f"config.json describes has {list(wanted.shape)}."
            )


def check_numbers(tensors: Mapping[str, Tensor], *, source: str = WEIGHTS) -> None:
    """Check that all weights are numbers a network can compute with.

    Raises:
        ValueError: A tensor holds NaN or infinity, or a running variance is negative. The message names it.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source}: {_short(name)!r} holds NaN or infinity. The training diverged, or the file is damaged; "
                "take an earlier checkpoint."
            )
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{source}: {_short(name)!r} holds a negative variance; the file is damaged.")


def check_file(
    paths: Collection[str | os.PathLike],
    expected: Mapping[str, Layout],
    *,
    may_lack: Collection[str] = (),
    may_differ: Collection[str] = (),
    adapt: Callable[[dict[str, Layout]], dict[str, Layout]] = dict,
    sha256: str | None = None,
) -> None:
    """Check stored weights, layout first, before a loader takes memory for them.

    Args:
        paths: Of the safetensors files that hold them, one or several.
        expected: Layout of the network.
        may_lack: As for :func:`check_layout`.
        may_differ: As for :func:`check_layout`.
        adapt: Function from the stored layout to the one to compare, where names differ by intention.
        sha256: Digest of the file, as ``config.json`` has it. Only a single file has one.

    Raises:
        ValueError: A file is no safetensors file, or it does not fit; the message names the tensor.
    """
    files = [Path(path) for path in paths]
    _check_size(files, expected)
    layout: dict[str, Layout] = {}
    for path in files:
        try:
            layout |= _layout_in(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: {str(error).splitlines()[0][:120]}.") from None
    check_layout(adapt(layout), expected, may_lack=may_lack, may_differ=may_differ, source=files[0].name)
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                check_numbers({name: file.get_tensor(name)}, source=path.name)
    if sha256 is not None and len(files) == 1 and digest(files[0]) != sha256:
        raise ValueError(
            f"{files[0].name} is not the file that config.json was saved with: its SHA-256 is not weights_sha256. Take "
            "both from one save; delete weights_sha256 from config.json if you changed the weights on purpose."
        )


def _check_size(files: list[Path], expected: Mapping[str, Layout]) -> None:
    """Refuse files that are too large for the network, before they are mapped into memory."""
    most = 8 * sum(math.prod(layout.shape) for layout in expected.values()) + _MAX_HEADER
    size = sum(path.stat().st_size for path in files)
    if size > most:
        raise ValueError(f"{files[0].name} has {size} bytes, more than the network that config.json describes can use.")


def check_precision(stated: object, paths: Iterable[str | os.PathLike]) -> None:
    """Compare the precision that ``config.json`` states with that of the weights, by which one loader would round.

    Args:
        stated: ``dtype`` of the configuration; None states nothing.
        paths: Of the safetensors files.

    Raises:
        ValueError: They differ.
    """
    held = precision_in(paths)
    if stated is not None and held is not None and str(stated).removeprefix("torch.") != held:
        raise ValueError(f"dtype in config.json must be {held!r}, that of the weights, got {_short(repr(stated))}.")


def precision_in(paths: Iterable[str | os.PathLike]) -> str | None:
    """The precision of the floating-point numbers in safetensors files, such as ``'float32'``; None if they differ."""
    kinds = set()
    for path in paths:
        with safe_open(path, "pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no mapping
    found = {_PRECISIONS[kind] for kind in kinds if kind in _PRECISIONS}
    return found.pop() if len(found) == 1 else None


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}..."
