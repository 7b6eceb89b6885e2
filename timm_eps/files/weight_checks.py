"""Checks of a weights file against its network, before it is used.

The header of a safetensors file contains the names, shapes and kinds of the tensors. They are compared with a network
on the meta device, so a small file cannot make a loader allocate gigabytes for a large network. Then the values are
checked, because libraries load a file of NaN without an error.

This file imports nothing from the package: a copy of it is saved with the stand-alone code on the Hub.

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
# Limits of a clamp, such as timm's Gemma encoders have: infinite where nothing is clamped.
_BOUNDS = ("_min", "_max")
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors


class Layout(NamedTuple):
    """Shape and kind of a tensor: ``'float'``, ``'whole number'`` or another name in safetensors."""

    shape: tuple[int, ...]
    kind: str


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Names, shapes and kinds of the tensors in a state dict, on any device."""
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
    """The safetensors files of a directory: a single file, or the parts in an index.

    Raises:
        ValueError: There is no such file, or the index names a file outside the directory.
    """
    root = Path(directory)
    if (root / WEIGHTS).is_file():
        return [root / WEIGHTS]
    if not (root / INDEX).is_file():
        raise ValueError(
            f"The directory has no {WEIGHTS}. Files in other formats can contain code and are not read; save the "
            "model again."
        )
    try:
        names = set(json.loads((root / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{INDEX} is not an index of safetensors files.") from None
    if not plain or not names or not all((root / name).is_file() for name in names):
        raise ValueError(f"{INDEX} must name safetensors files in the same directory.")
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
        may_lack: Names that may be missing in the weights.
        may_differ: Names that may be missing in the weights or have another shape: tensors of a classifier that the
            caller replaces.
        source: Name of the weights, for messages.

    Raises:
        ValueError: A tensor is missing, unexpected, or has another shape or kind. The message names it.
    """
    may_differ = set(may_differ)
    missing = sorted(expected.keys() - found.keys() - {*may_lack} - may_differ)
    strangers = sorted(found.keys() - expected.keys() - may_differ)
    for verb, names in (("lacks", missing), ("also holds", strangers)):
        if names:
            raise ValueError(
                f"{source} does not fit the network that config.json describes: it {verb} {_short(names[0])!r}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. Use both files from the same save."
            )
    for name, layout in found.items():
        wanted = expected.get(name, layout)
        if layout.kind != wanted.kind:
            raise ValueError(f"{source}: {_short(name)!r} must have the type {wanted.kind}, not {layout.kind}.")
        if layout.shape != wanted.shape and name not in may_differ:
            raise ValueError(
                f"{source}: {_short(name)!r} has the shape {_short(str(list(layout.shape)))}, but the network that "
                f"config.json describes has {list(wanted.shape)}."
            )


def check_numbers(tensors: Mapping[str, Tensor], *, source: str = WEIGHTS) -> None:
    """Check that all weights are valid numbers.

    Raises:
        ValueError: A tensor contains NaN or infinity, or a running variance is negative. The message names it.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            continue
        is_bound = name.endswith(_BOUNDS) and not torch.isnan(tensor).any()
        if not is_bound and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source}: {_short(name)!r} contains NaN or infinity. The training diverged, or the file is damaged; "
                "use an earlier checkpoint."
            )
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{source}: {_short(name)!r} contains a negative variance; the file is damaged.")


def check_file(
    paths: Collection[str | os.PathLike],
    expected: Mapping[str, Layout],
    *,
    may_lack: Collection[str] = (),
    may_differ: Collection[str] = (),
    adapt: Callable[[dict[str, Layout]], dict[str, Layout]] = dict,
    sha256: str | None = None,
) -> None:
    """Check stored weights, beginning with the layout, before a loader allocates memory for them.

    Args:
        paths: Paths of one or several safetensors files.
        expected: Layout of the network.
        may_lack: Names, as for :func:`check_layout`.
        may_differ: Names, as for :func:`check_layout`.
        adapt: Function that converts the stored layout, if its names differ intentionally.
        sha256: Digest in ``config.json``. It exists only for a single file.

    Raises:
        ValueError: A file is not a safetensors file, or it does not fit. The message names the tensor.
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
            f"{files[0].name} was not saved with this config.json: its SHA-256 is not weights_sha256. Use both files "
            "from the same save. If you changed the weights on purpose, delete weights_sha256 from config.json."
        )


def _check_size(files: list[Path], expected: Mapping[str, Layout]) -> None:
    """Reject files that are too large for the network, before they are mapped into memory."""
    most = 8 * sum(math.prod(layout.shape) for layout in expected.values()) + _MAX_HEADER
    size = sum(path.stat().st_size for path in files)
    if size > most:
        raise ValueError(f"{files[0].name} has {size} bytes, more than the network that config.json describes can use.")


def check_precision(stated: object, paths: Iterable[str | os.PathLike]) -> None:
    """Compare the precision in ``config.json`` with the weights, because transformers would convert them.

    Args:
        stated: ``dtype`` of the configuration, or None.
        paths: Paths of the safetensors files.

    Raises:
        ValueError: The precisions differ.
    """
    held = precision_in(paths)
    if stated is not None and held is not None and str(stated).removeprefix("torch.") != held:
        raise ValueError(f"dtype in config.json must be {held!r}, like the weights, got {_short(repr(stated))}.")


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
