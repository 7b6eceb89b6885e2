"""A saved network, and a directory of it that is being changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import WEIGHTS, Directory, Tensor, read_safetensors

# A port of this machine that nobody listens at.
CLOSED_PORT = "http://127.0.0.1:9"
# Code in a configuration carries this word, by which the guard knows it.
MARKER = "fuzz_marker"

Rng = random.Random


@dataclass
class Base:
    """A saved network, and the facts about it that mutations use."""

    name: str
    path: Path
    directory: Directory
    size: int
    slots: list[str]
    closed: list[str]

    @classmethod
    def read(cls, root: Path, name: str) -> Base:
        facts = json.loads((root / f"{name}.json").read_text())
        return cls(name, root / name, Directory.read(root / name), **facts)


@dataclass
class Draft:
    """A directory that is being changed.

    Args:
        base: The network that it began as.
        others: All networks, to take parts from.
        canary: A directory outside, with files that nobody but a hostile configuration names.
        config: The configuration as a tree.
        text: The configuration as bytes, if these cannot be the dump of a tree.
        weights: The file of weights; None if it is not a regular file.
    """

    base: Base
    others: dict[str, Base]
    canary: Path
    config: Any
    weights: bytes | None
    directory: Directory
    text: bytes | None = None
    notes: list[str] = field(default_factory=list)

    def config_bytes(self) -> bytes:
        return json.dumps(self.config, indent=2).encode() if self.text is None else self.text

    def tensors(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors and metadata of the weights as they are now, those of the base if they are spoilt."""
        try:
            tensors, metadata = read_safetensors(self.weights or b"")
            if tensors and all(tensor.is_sound() for tensor in tensors.values()):
                return tensors, metadata
        except ValueError:
            pass
        return read_safetensors(self.base.directory.text(WEIGHTS) or b"")


Mutation = Callable[[Draft, Rng], str]


def short(value: Any) -> str:
    """A value in a note."""
    text = repr(value)
    return text if len(text) < 80 else text[:60] + "…" + text[-10:]
