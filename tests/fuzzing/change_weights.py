"""Mutations of the file of weights, as tensors and as bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

from .draft import Draft, Rng
from .files import SIZES, WEIGHTS, Sparse, Tensor, header_of, with_header, write_safetensors
from .values import evil_pickle, flip, splice


def change_tensors(draft: Draft, rng: Rng) -> str:
    """Other names, shapes, kinds and numbers."""
    tensors, metadata = draft.tensors()
    kind = rng.choice(list(_TENSORS))
    note = _TENSORS[kind](tensors, draft, rng)
    draft.weights = write_safetensors(tensors, metadata)
    return f"weights: {kind} {note or ''}".rstrip()


Tensors = dict[str, Tensor]


def _pick(tensors: Tensors, rng: Rng, dtype: str | None = None) -> str:
    names = [name for name, tensor in tensors.items() if tensor.data and dtype in (None, tensor.dtype)]
    return rng.choice(names or list(tensors) or [""])


def _drop(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    prefix = rng.choice([name, name.rpartition(".")[0], name.split(".")[0]])
    for key in [key for key in tensors if key.startswith(prefix)]:
        del tensors[key]
    return prefix


def _drop_classifier(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    for key in [key for key in tensors if key.startswith(("head.", "fc."))]:
        if rng.random() < 0.8:
            del tensors[key]
    return ""


def _rename(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    new = rng.choice(
        [name + "x", name.upper(), "timm_model." + name, "module." + name, "model." + name,
         name.replace("weight", "gamma"),
         name.replace(".0.", ".9."), "", "²", name + "\x00", "_orig_mod." + name, name.replace(".", "/"), "a" * 100_000]
    )  # fmt: skip
    tensors[new] = tensors.pop(name)
    return f"{name} is {new[:60]!r}"


def _prefix_all(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    prefix = rng.choice(
        ["timm_model.", "module.", "model.", "state_dict.", "_orig_mod.", "side_head.", "timm_model.timm_model."]
    )
    for key in list(tensors):
        tensors[prefix + key] = tensors.pop(key)
    return prefix


def _add(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = rng.choice(
        ["x", "head2.weight", "side_head.0.weight", "side_head.3.bias", "stages.2.blocks.9.conv1.weight", "fc.weight",
         "head.fc.weight", "head_dist.weight", "norm.x", "timm_model." + _pick(tensors, rng), "stem.pixel_mean.mean"]
    )  # fmt: skip
    tensors[name] = rng.choice(
        [
            tensors[_pick(tensors, rng)],
            Tensor("F32", [2], struct.pack("<2f", 1, 2)),
            Tensor("F32", [], bytes(4)),
            Tensor("F32", [0], b""),
        ]
    )
    return name


def _many(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    for number in range(50_000):
        tensors[f"extra.{number}"] = Tensor("F32", [0], b"")
    return ""


def _reshape(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    tensor = tensors[name]
    count = math.prod(tensor.shape)
    shape = rng.choice([tensor.shape[::-1], [count], [1, *tensor.shape], [*tensor.shape, 1], [1, count], [count, 1]])
    tensors[name] = Tensor(tensor.dtype, list(shape), tensor.data)
    return f"{name} {tensor.shape} as {list(shape)}"


def _resize(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    tensor = tensors[name]
    if not tensor.shape:
        tensors[name] = Tensor(tensor.dtype, [2], tensor.data * 2)
        return name
    first, rest = tensor.shape[0], tensor.shape[1:]
    row = len(tensor.data) // max(first, 1)
    rows = rng.choice([0, first - 1, first + 1, 2 * first])
    tensors[name] = Tensor(tensor.dtype, [rows, *rest], (tensor.data * 2 + bytes(row))[: rows * row])
    return f"{name} with {rows} rows"


def _grow_classifier(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    rows = rng.choice([1, 3, 6, 1000])
    for name in [name for name in tensors if name.startswith(("head.", "fc.")) and "norm" not in name]:
        tensor = tensors[name]
        if not tensor.shape or not tensor.shape[0]:
            continue
        row = len(tensor.data) // tensor.shape[0]
        tensors[name] = Tensor(tensor.dtype, [rows, *tensor.shape[1:]], (tensor.data * (rows // 5 + 1))[: rows * row])
    return f"{rows} classes"


def _as_kind(tensor: Tensor, dtype: str) -> Tensor:
    """The same numbers as another kind."""
    count = len(tensor.data) // 4
    numbers = struct.unpack(f"<{count}f", tensor.data)
    if dtype == "BF16":
        data = b"".join(tensor.data[4 * i + 2 : 4 * i + 4] for i in range(count))
    elif dtype in ("F16", "F64"):
        limit = 6e4 if dtype == "F16" else math.inf
        safe = [max(-limit, min(limit, x)) if math.isfinite(x) else 0.0 for x in numbers]
        data = struct.pack(f"<{count}{'e' if dtype == 'F16' else 'd'}", *safe)
    elif dtype == "I64":
        data = struct.pack(f"<{count}q", *(int(x) if math.isfinite(x) and abs(x) < 2**62 else 0 for x in numbers))
    else:
        data = bytes(1 if x > 0 else 0 for x in numbers)  # BOOL, U8, F8
    return Tensor(dtype, tensor.shape, data)


def _cast(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    dtype = rng.choice(["F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3"])
    floats = [name for name, tensor in tensors.items() if tensor.dtype == "F32" and len(tensor.data) % 4 == 0]
    for name in floats if rng.random() < 0.4 else rng.sample(floats, min(1, len(floats))):
        tensors[name] = _as_kind(tensors[name], dtype)
    return dtype


def _relabel(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    tensor = tensors[name]
    dtype = rng.choice([kind for kind in SIZES if SIZES[kind] <= SIZES.get(tensor.dtype, 8)] or ["F32"])
    shape = list(tensor.shape)
    if SIZES[dtype] < SIZES.get(tensor.dtype, 4):
        shape = (
            [*shape[:-1], shape[-1] * SIZES[tensor.dtype] // SIZES[dtype]]
            if shape
            else [SIZES[tensor.dtype] // SIZES[dtype]]
        )
    tensors[name] = Tensor(dtype, shape, tensor.data)
    return f"{name} as {dtype}"


def _put(tensor: Tensor, numbers: list[float], rng: Rng, everywhere: bool = False) -> Tensor:
    data = bytearray(tensor.data)
    count = len(data) // 4
    for index in range(count) if everywhere or not count else [rng.randrange(count)]:
        struct.pack_into("<f", data, 4 * index, rng.choice(numbers))
    return Tensor(tensor.dtype, tensor.shape, bytes(data))


def _not_finite(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng, "F32")
    number = rng.choice([math.nan, math.inf, -math.inf])
    tensors[name] = _put(tensors[name], [number], rng, rng.random() < 0.3)
    return f"{number} in {name}"


def _negative_variance(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    names = [name for name, tensor in tensors.items() if name.endswith("running_var") and tensor.dtype == "F32"]
    if not names:
        return _not_finite(tensors, draft, rng)
    name = rng.choice(names)
    tensors[name] = _put(tensors[name], [-1e-3, -1.0, -1e30], rng, rng.random() < 0.3)
    return name


def _other_numbers(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng, "F32")
    tensors[name] = _put(tensors[name], [rng.uniform(0, 1) for _ in range(16)], rng, rng.random() < 0.5)
    return name


def _swap(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    name = _pick(tensors, rng)
    same = [
        other
        for other, tensor in tensors.items()
        if (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
    ]
    other = rng.choice(same)
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{name} and {other}"


def _reverse(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    for name in list(tensors)[::-1]:
        tensors[name] = tensors.pop(name)
    return ""


def _counter(tensors: Tensors, draft: Draft, rng: Rng) -> str:
    names = [name for name in tensors if name.endswith("num_batches_tracked")]
    if not names:
        return _swap(tensors, draft, rng)
    name = rng.choice(names)
    if (action := rng.randrange(4)) == 0:
        del tensors[name]
    else:
        tensors[name] = [
            Tensor("F32", [], struct.pack("<f", 3)),
            Tensor("I64", [], struct.pack("<q", -(2**62))),
            Tensor("I64", [1], bytes(8)),
        ][action - 1]
    return name


_TENSORS: dict[str, Callable[[Tensors, Draft, Rng], str]] = {
    "without": _drop,
    "without classifier": _drop_classifier,
    "renamed": _rename,
    "prefixed": _prefix_all,
    "one more": _add,
    "50,000 more": _many,
    "reshaped": _reshape,
    "resized": _resize,
    "classifier resized": _grow_classifier,
    "cast": _cast,
    "relabelled": _relabel,
    "not finite": _not_finite,
    "negative variance": _negative_variance,
    "other numbers": _other_numbers,
    "swapped": _swap,
    "in another order": _reverse,
    "counter": _counter,
    "none": lambda t, d, r: str(t.clear() or ""),
}


# ---- weights as bytes


def spoil_header(draft: Draft, rng: Rng) -> str:
    """A header that does not tell the truth about the data."""
    tensors, metadata = draft.tensors()
    header, data = header_of(tensors, metadata)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return spoil_bytes(draft, rng)
    entry = header[rng.choice(names)]
    begin, end = entry["data_offsets"]
    kind = rng.choice(
        ["length", "offsets", "overlap", "shape", "dtype", "metadata", "extra", "no object", "deep", "twice", "huge"]
    )
    length = None
    if kind == "length":
        honest = len(with_header(json.dumps(header).encode(), b"")) - 8
        length = rng.choice([0, 1, honest - 8, honest + 8, honest + len(data), 2**63, 2**64 - 1, 10**8 + 1, 10**7])
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(
            [[end, begin], [begin, end + 4], [begin - 4, end], [-4, end], [begin, 2**63], [begin, 10**30], [begin],
             [begin, end, end], None, ["0", "4"], [float(begin), float(end)], [begin + 1, end + 1], [begin, begin]]
        )  # fmt: skip
    elif kind == "overlap":
        entry["data_offsets"] = list(header[rng.choice(names)]["data_offsets"])
    elif kind == "shape":
        entry["shape"] = rng.choice(
            [[2**62, 4], [2**32] * 3, [-1], [0], [], [1.5], "x", None, [1] * 1000, [10**30], [True]]
        )
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F32 ", "f32", "C64", "F4", "", None, 3, "I32", "F8_E8M0"])
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(
            [{"format": "tf"}, {"format": "flax"}, {"format": "mlx"}, {}, {"format": 3}, None, "x",
             {"format": "x" * 10**6}, {"format": "pt", "x": "\x00"}]
        )  # fmt: skip
        if rng.random() < 0.3:
            del header["__metadata__"]
    elif kind == "extra":
        header["x"] = rng.choice(
            [None, 3, {}, {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}]
        )
    text = json.dumps(header)
    if kind == "no object":
        text = rng.choice(["[]", "3", "null", "", "{", text + text, text[:-1], '"x"'])
    elif kind == "deep":
        text = text[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    elif kind == "twice":
        name = rng.choice(names)
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[rng.choice(names)])}" + "}"
    if kind == "huge":
        return _huge_tensor(draft, rng, header, data)
    draft.weights = with_header(text.encode(), data, length)
    return f"header: {kind}"


def _huge_tensor(draft: Draft, rng: Rng, header: dict[str, Any], data: bytes) -> str:
    """A tensor of 16 GB, whose file takes no room on disk."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    new = rng.choice([name, "x"])
    rows = 2**28
    header[new] = {"dtype": "F32", "shape": [rows, 16], "data_offsets": [len(data), len(data) + 64 * rows]}
    if new == name:
        # What stood there stays under another name, so that no byte is left over.
        position = 0
        for other in header:
            if other in ("__metadata__", new):
                continue
            begin, end = header[other]["data_offsets"]
            header[other]["data_offsets"] = [position, position + end - begin]
            position += end - begin
        header[new]["data_offsets"] = [position, position + 64 * rows]
        data = data[:position]
    begin = with_header(json.dumps(header).encode(), data)
    draft.weights = None
    draft.directory.entries[WEIGHTS] = Sparse(len(begin) - len(data) + header[new]["data_offsets"][1], begin)
    return f"header: 16 GB for {new}"


def spoil_bytes(draft: Draft, rng: Rng) -> str:
    """A file of weights with other bytes."""
    content = draft.weights or draft.base.directory.text(WEIGHTS) or b""
    header_end = 8 + (struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0)
    kind = rng.choice(
        ["empty", "cut", "cut in the header", "longer", "flip header", "flip data", "splice", "zeros", "text", "zip"]
    )
    if kind == "empty":
        content = rng.choice([b"", bytes(8), b"{}"])
    elif kind == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == "cut in the header":
        content = content[: rng.randrange(min(header_end, len(content)) + 1)]
    elif kind == "longer":
        content += rng.choice([b"\x00", bytes(4096), content])
    elif kind == "flip header":
        content = flip(content, rng, 0, header_end)
    elif kind == "flip data":
        content = flip(content, rng, header_end)
    elif kind == "splice":
        content = splice(content, rng)
    elif kind == "zeros":
        content = content[:header_end] + bytes(max(len(content) - header_end, 0))
    elif kind == "text":
        content = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"
    else:
        content = evil_pickle(draft, True)
    draft.weights = content
    return f"weights: {kind}"


def take_other_weights(draft: Draft, rng: Rng) -> str:
    """The weights of another network."""
    other = draft.others[rng.choice(sorted(draft.others))]
    draft.weights = other.directory.text(WEIGHTS)
    return f"weights of {other.name}"
