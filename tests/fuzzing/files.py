"""Files of a saved model as plain data: what mutations change before anything is written to disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Bytes per number of safetensors' kinds.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_DIGESTS = ("sha256", "sha1", "md5", "sha512", "blake2b", "sha384", "sha224")


@dataclass
class Tensor:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: list[int]
    data: bytes

    def is_sound(self) -> bool:
        """Whether there is as much data as the shape needs."""
        sizes = [size for size in self.shape if type(size) is int and size >= 0]
        whole = self.dtype in SIZES and len(sizes) == len(self.shape)
        return whole and math.prod(sizes) * SIZES[self.dtype] == len(self.data)


def read_safetensors(content: bytes) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, and the metadata.

    Raises:
        ValueError: The content is not a safetensors file.
    """
    if len(content) < 8:
        raise ValueError("a safetensors file has at least 8 bytes")
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        raise ValueError("the header is longer than the file")
    try:
        header = json.loads(content[8 : 8 + length])
    except RecursionError as error:
        raise ValueError("the header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", None)
    data = content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            tensor = Tensor(str(entry["dtype"]), list(entry["shape"]), data[begin:end])
        except (TypeError, KeyError) as error:
            raise ValueError(f"the header's entry {name!r} cannot be read") from error
        tensors[name] = tensor
    return tensors, metadata


def header_of(tensors: dict[str, Tensor], metadata: Any) -> tuple[dict[str, Any], bytes]:
    """The header that fits these tensors, and the data behind it."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    chunks, position = [], 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        chunks.append(tensor.data)
        position = end
    return header, b"".join(chunks)


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header and data; ``length`` is what the file claims the header's length to be."""
    header += b" " * (-len(header) % 8)
    claimed = len(header) if length is None else length
    return struct.pack("<Q", claimed % 2**64) + header + data


def write_safetensors(tensors: dict[str, Tensor], metadata: Any) -> bytes:
    """The bytes of a safetensors file."""
    header, data = header_of(tensors, metadata)
    return with_header(json.dumps(header).encode(), data)


@dataclass
class Link:
    """A symbolic link."""

    target: str


@dataclass
class Sparse:
    """A file that begins with some bytes and is of this size, with no disk behind the rest."""

    size: int
    begin: bytes = b""


@dataclass
class Folder:
    """An empty directory where a file should be."""


Entry = bytes | Link | Sparse | Folder


@dataclass
class Directory:
    """A directory of a saved model in memory.

    Args:
        entries: Content by path, with ``/`` between its parts.
        modes: Permissions by path; by default those of the process.
    """

    entries: dict[str, Entry]
    modes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Directory:
        """The regular files below a directory."""
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return cls({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})

    def write(self, root: Path) -> None:
        """Write everything below a directory that is made for it."""
        root.mkdir(parents=True)
        for name, entry in self.entries.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry, Link):
                path.symlink_to(entry.target)
            elif isinstance(entry, Folder):
                path.mkdir(exist_ok=True)
            else:
                begin = entry.begin if isinstance(entry, Sparse) else entry
                path.write_bytes(begin)
                if isinstance(entry, Sparse):
                    os.truncate(path, entry.size)
        for name, mode in self.modes.items():
            if (root / name).exists():
                (root / name).chmod(mode)

    def text(self, name: str) -> bytes | None:
        """The bytes of a regular file, None for everything else."""
        entry = self.entries.get(name)
        return entry if isinstance(entry, bytes) else None


def paths_of(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of a JSON tree, parents first."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*before, key)
        yield from paths_of(value, (*before, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value that a path leads to."""
    for key in path:
        tree = tree[key]
    return tree


def digest_in(config: Any, weights: bytes) -> tuple[tuple[Any, ...], str] | None:
    """Where a configuration holds a digest of the file of weights, and the name of the hash; None if it holds none."""
    digests = {hashlib.new(name, weights).hexdigest(): name for name in _DIGESTS}
    for path in paths_of(config):
        value = at(config, path)
        if isinstance(value, str) and (found := re.search("[0-9a-f]{32,}", value)) and found[0] in digests:
            return path, digests[found[0]]
    return None


def bind(config: Any, path: tuple[Any, ...], algorithm: str, weights: bytes) -> bool:
    """Let a configuration hold the digest of other weights; False if it has nothing at that path."""
    try:
        value, parent = at(config, path), at(config, path[:-1])
    except (KeyError, IndexError, TypeError):
        return False
    if not isinstance(value, str):
        return False
    parent[path[-1]] = re.sub("[0-9a-f]{32,}", hashlib.new(algorithm, weights).hexdigest(), value, count=1)
    return True
