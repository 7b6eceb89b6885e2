"""What is right and wrong about a load that returned, and about one that raised."""

from __future__ import annotations

import hashlib
import json
import linecache
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .files import CONFIG, WEIGHTS, Tensor, at, digest_in, paths_of, read_safetensors
from .loaders import Loaded

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
# Numbers below it cannot make the logits of a sound network of this size overflow.
_MODEST = 1e4
_LONGEST_MESSAGE = 300
# Fields of a configuration that its file has under another name.
_KEYWORDS = ("num_labels", "id2label", "out_features", "out_indices")

Fault = tuple[str, str]


def classifiers_of(architecture: str | None) -> tuple[str, ...]:
    """Paths of the last layers by the architecture's own name for them, never by the file's."""
    if architecture == "eps_resnet20":
        return ("head.fc",)
    known = timm.get_pretrained_cfg(str(architecture), allow_unregistered=True)
    named = getattr(known, "classifier", None) or ()
    return (named,) if isinstance(named, str) else tuple(named)


def judge_model(loaded: Loaded, directory: Path, base: Path, images: torch.Tensor) -> tuple[list[Fault], Any]:
    """Faults of a network that was loaded, and its output for the images as nested lists of numbers."""
    model = loaded.model
    state = {key.removeprefix("timm_model."): value for key, value in model.state_dict().items()}
    faults = list(_unsound(model, state))
    if not loaded.weights or any(kind == "meta" for kind, _ in faults):
        return faults, None
    try:
        content = (directory / WEIGHTS).read_bytes() if (directory / WEIGHTS).is_file() else b""
        tensors, _ = read_safetensors(content)
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        return [*faults, ("without a file", f"loaded, but {WEIGHTS} cannot be read: {error}"[:200])], None
    faults += _numbers(loaded, state, tensors)
    faults += _structure(model, directory)
    faults += _unbound(directory, base, content)
    try:
        output = _output(model, loaded.output, images)
    except Exception as error:
        return [*faults, ("forward", f"the loaded network fails: {type(error).__name__}: {error}"[:300])], None
    modest = all(not v.is_floating_point() or v.double().abs().max() < _MODEST for v in state.values() if v.numel())
    if not output.isfinite().all() and modest and not faults:
        faults.append(("not finite", "the output for finite weights is not finite"))
    return faults, output.tolist()


def _unsound(model: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[Fault]:
    buffers = {key.removeprefix("timm_model."): buffer for key, buffer in model.named_buffers()}
    for key, tensor in {**buffers, **state}.items():
        if tensor.is_meta:
            yield "meta", f"{key} has no numbers"
            return
        # 8-bit floats have no operations of their own.
        numbers = tensor.float() if tensor.is_floating_point() else tensor
        if not numbers.isfinite().all():
            yield "not finite", f"{key} is not finite"
            return
        if key.endswith("running_var") and (numbers < 0).any():
            yield "negative variance", f"{key} has negative numbers"
            return


def _numbers(loaded: Loaded, state: dict[str, torch.Tensor], tensors: dict[str, Tensor]) -> list[Fault]:
    """Compare all tensors with the file's, bit for bit if they are of one kind."""
    classifier = tuple(f"{name}." for name in classifiers_of(loaded.architecture))
    # The side head of a training has as many classes as the classifier.
    exempt = ("side_head.", *classifier) if loaded.new_classifier else ("\x00",)
    files: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        files.setdefault(key.removeprefix("timm_model."), []).append(tensor)
    found: dict[str, list[str]] = {}
    unused = {key: candidates for key, candidates in files.items() if key not in state}
    for key, value in state.items():
        if key.startswith(exempt) or key.endswith(".closed"):  # a closed gate's own, see _structure
            continue
        if key not in files:
            renamed = next((other for other, them in unused.items() if _compare(value, them[0]) is None), None)
            if renamed is None:
                found.setdefault("random", []).append(key)
            else:
                del unused[renamed]
        elif problem := min((_compare(value, candidate) or "" for candidate in files[key]), key=len):
            found.setdefault(problem, []).append(key)
    may_be_left = ["side_head."]
    if loaded.part != "all" or loaded.new_classifier:
        may_be_left += classifier
    if loaded.part == "stages":
        may_be_left += ["norm.", "head."]
    if left := [key for key in unused if not key.startswith(tuple(may_be_left))]:
        found["left out"] = left
    return [(kind, f"{sorted(keys)[0][:100]!r} and {len(keys) - 1} more") for kind, keys in found.items()]


def _compare(value: torch.Tensor, stored: Tensor) -> str | None:
    """How a loaded tensor differs from the stored one; None if it does not."""
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None or list(value.shape) != stored.shape:
        return "other numbers"
    theirs = torch.frombuffer(bytearray(stored.data), dtype=dtype) if stored.data else torch.empty(0, dtype=dtype)
    if theirs.numel() != value.numel():
        return "other numbers"
    theirs = theirs.reshape(value.shape)
    if value.dtype == dtype:
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return None if torch.equal(flat, theirs.reshape(-1).view(torch.uint8)) else _rounded(value, theirs)
    if value.is_floating_point() != theirs.is_floating_point():
        return "other kind"
    return None if torch.equal(value.double(), theirs.double()) else _rounded(value, theirs)


def _rounded(value: torch.Tensor, theirs: torch.Tensor) -> str:
    mine, stored = value.double(), theirs.double()
    close = value.is_floating_point() and torch.allclose(mine, stored, rtol=0.07, atol=1e-3)
    return "rounded" if close else "other numbers"


def _structure(model: nn.Module, directory: Path) -> list[Fault]:
    """Compare closed and removed branches with what config.json says."""
    if (package := sys.modules.get("timm_eps")) is None:
        return []
    config = _tree(directory / CONFIG)
    gates = {
        name.removeprefix("timm_model."): module
        for name, module in model.named_modules()
        if isinstance(module, package.EpsilonGate)
    }
    closed = sorted(slot for slot, gate in gates.items() if gate.closed)
    said = (config.get("model_args") or {}).get("closed") or []
    removed = (config.get("model_args") or {}).get("removed") or []
    faults = []
    if isinstance(said, list) and closed != sorted(map(str, said)):
        faults.append(("structure", f"config.json closes {str(said)[:80]}, closed are {closed}"))
    if isinstance(removed, list) and (left := gates.keys() & {slot for slot in removed if isinstance(slot, str)}):
        faults.append(("structure", f"config.json removes {min(left)}, which is still there"))
    return faults


def _unbound(directory: Path, base: Path, content: bytes) -> list[Fault]:
    """A configuration that holds another digest than the weights have."""
    original = (base / WEIGHTS).read_bytes()
    if (place := digest_in(json.loads((base / CONFIG).read_text()), original)) is None:
        return []
    path, algorithm = place
    try:
        value = at(_tree(directory / CONFIG), path)
    except (KeyError, IndexError, TypeError):
        return []
    found = re.search("[0-9a-f]{32,}", value) if isinstance(value, str) else None
    if found and found[0] != hashlib.new(algorithm, content).hexdigest():
        return [("unbound", f"{'.'.join(map(str, path))} is the digest of other weights")]
    return []


@torch.no_grad()
def _output(model: Any, kind: str, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), images.dtype)
    output = model(images.to(dtype), **({"return_dict": True} if hasattr(model, "config") else {}))
    if kind == "pooled":
        # do_pooling, a field of transformers, leaves it out.
        return output.last_hidden_state if output.pooler_output is None else output.pooler_output
    if kind == "maps":
        return output.feature_maps[-1]
    return getattr(output, "logits", output)


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


# ---- errors

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))


def took_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or re.search(
            "(can't|[cC]annot) allocate memory|not enough memory", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def place_of(error: BaseException) -> tuple[Path, int]:
    """File and line of the last frame of an error's traceback."""
    trace = error.__traceback__
    assert trace is not None, "it was raised"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno


def library_of(path: Path) -> str:
    """The library that a file belongs to."""
    for root in _LIBRARIES:
        if path.is_relative_to(root):
            return path.relative_to(root).parts[0].removesuffix(".py")
    return "Python"


def is_refusal(error: BaseException, path: Path, line: int) -> bool:
    """Whether an error was raised on purpose, for users, by the line at hand, and did not merely happen there."""
    named = type(error).__module__.partition(".")[0] in ("transformers", "huggingface_hub", "safetensors")
    return linecache.getline(str(path), line).lstrip().startswith("raise ") and (
        isinstance(error, ValueError | OSError | ImportError) or named
    )


def judge_message(message: str, words: Iterable[str]) -> str | None:
    """What is wrong with a message of the package; None if it is one short line that names a field or a file."""
    if "\n" in message:
        return "more than one line"
    if len(message) >= _LONGEST_MESSAGE:
        return f"{len(message)} characters"
    if not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in words):
        return "names neither a field nor a file"
    return None


def words_of(directory: Path, base: Path) -> set[str]:
    """Names of fields, files and tensors of which a message must name one."""
    words = {CONFIG, WEIGHTS, str(directory), *_KEYWORDS}
    for root in (directory, base):
        words.update(path.name for path in root.iterdir())
        words.update(key for path in paths_of(_tree(root / CONFIG)) for key in path if isinstance(key, str))
        if (root / WEIGHTS).is_file() and (root / WEIGHTS).stat().st_size < 10**8:
            try:
                words.update(read_safetensors((root / WEIGHTS).read_bytes())[0])
            except (ValueError, OSError, RecursionError):
                continue
    return {word for word in words if 2 < len(word) < _LONGEST_MESSAGE}
