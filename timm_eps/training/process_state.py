"""What each process of a training has of its own in a checkpoint: running statistics, responses, random numbers."""

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

__all__ = ["all_finite", "check_random_states", "load_own", "read_tensors", "save_own", "write_tensors"]


def _own(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = {f"buffer/{name}": value for name, value in model.state_dict().items() if name not in parameters}
    for slot, gate in gates(model).items():
        found |= {f"response/{slot}": gate.response, f"importance/{slot}": gate.importance}
    return {**found, "loss": loss}


def save_own(model: nn.Module, loss: Tensor, path: Path) -> None:
    """Write what the other processes have otherwise: they each see other images.

    Sharing it instead would do for the checkpoint, but sums in another order are other numbers, and the run would end
    with others than one without this checkpoint.

    Args:
        model: The model, not wrapped.
        loss: 0-dimensional, of this process.
        path: Of this process, ``*.safetensors``.
    """
    write_tensors(_own(model, loss), path)


def load_own(model: nn.Module, loss: Tensor, path: Path) -> None:
    """Give a model and a loss what :func:`save_own` wrote.

    Raises:
        ValueError: It was written of another structure.
        OSError: There is no such file.
    """
    read_tensors(_own(model, loss), path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


@torch.no_grad()
def read_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give tensors the numbers that :func:`write_tensors` wrote, in place.

    Raises:
        ValueError: The file has others.
        OSError: There is no such file.
    """
    stored = load_file(path)
    if strange := stored.keys() ^ tensors.keys():
        raise ValueError(f"{path.name} does not fit at {min(strange)}")
    for name, value in tensors.items():
        value.copy_(stored[name])


def check_random_states(path: Path) -> None:
    """Compare the state of the random generators with a file of Accelerate's, which passes over one it cannot use.

    Raises:
        ValueError: They have not the state that the file holds, or it holds none.
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
    except Exception as error:  # whatever reading a file of unknown content raises
        raise ValueError(f"{path.name} holds no random states: {error}") from error
    if not fits:
        raise ValueError(f"{path.name} holds random states that this process cannot take")


def all_finite(model: nn.Module) -> Tensor:
    """Whether all that a checkpoint of a model would hold is finite: 0-dimensional bool, on the model's device."""
    checks = [value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()]
    return torch.stack(checks).all()
