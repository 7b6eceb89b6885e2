"""State of each process in a checkpoint: running statistics, responses, random numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..surgery.branches import gates
from ..surgery.sharding import is_sharded_tensor

__all__ = ["all_finite", "check_random_states", "load_own", "read_tensors", "save_own", "write_tensors"]


def _own(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = {f"buffer/{name}": value for name, value in model.state_dict().items() if name not in parameters}
    for slot, gate in gates(model).items():
        found |= {f"response/{slot}": gate.response, f"importance/{slot}": gate.importance}
    return {**found, "loss": loss}


def save_own(model: nn.Module, loss: Tensor, path: Path) -> None:
    """Save the state that differs between processes, because they see different images.

    Averaging the state instead would change the rounding, so the run would differ from one without this checkpoint.

    Args:
        model: Model, not wrapped.
        loss: Loss of this process, 0-dimensional.
        path: File of this process, ``*.safetensors``.
    """
    write_tensors(_own(model, loss), path)


def load_own(model: nn.Module, loss: Tensor, path: Path) -> None:
    """Load a model and a loss from a file of :func:`save_own`.

    Raises:
        ValueError: The file is for another structure.
        OSError: The file does not exist.
    """
    read_tensors(_own(model, loss), path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Save tensors from any device."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


@torch.no_grad()
def read_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors in place from a file of :func:`write_tensors`.

    Raises:
        ValueError: The file contains other tensors.
        OSError: The file does not exist.
    """
    stored = load_file(path)
    if strange := stored.keys() ^ tensors.keys():
        raise ValueError(f"{path.name} does not fit at {min(strange)}")
    for name, value in tensors.items():
        value.copy_(stored[name])


def check_random_states(path: Path) -> None:
    """Compare the random generators with a file of Accelerate, which ignores states that it cannot load.

    Raises:
        ValueError: The states differ, or the file contains none.
    """
    try:
        stored = load(path)
        numpy_stored, numpy_now = stored["numpy_random_seed"], np.random.get_state()
        pairs = [(stored["torch_manual_seed"], torch.get_rng_state())]
        if torch.cuda.is_available():
            pairs += zip(stored["torch_cuda_manual_seed"], torch.cuda.get_rng_state_all(), strict=True)
        fits = stored["random_state"] == random.getstate() and all(torch.equal(*pair) for pair in pairs)
        fits = fits and all(np.array_equal(a, b) for a, b in zip(numpy_stored, numpy_now, strict=True))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except Exception as error:  # reading unknown content may raise any error
        raise ValueError(f"{path.name} contains no random states: {error}") from error
    if not fits:
        raise ValueError(f"{path.name} contains random states that this process cannot load")


def all_finite(model: nn.Module) -> Tensor:
    """Whether all values for a checkpoint of a model are finite: 0-dimensional bool, on the model's device.

    Of sharded parameters these are the values of this process.
    """
    values = [value.to_local() if is_sharded_tensor(value) else value for value in model.state_dict().values()]
    return torch.stack([value.isfinite().all() for value in values if value.is_floating_point()]).all()
