"""The average of the weights that a training keeps beside them."""

from __future__ import annotations

from pathlib import Path

from timm.utils import ModelEmaV3
from torch import nn

from .process_state import read_tensors, write_tensors

__all__ = ["AVERAGE", "load_average", "new_average", "save_average"]

AVERAGE = "average.safetensors"


def new_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's exponential moving average of a model. Its decay rises with the steps, so that short runs gain, too."""
    return ModelEmaV3(model, decay=decay, use_warmup=True)


def save_average(average: ModelEmaV3, directory: Path) -> None:
    """Write an average into a checkpoint."""
    write_tensors(average.module.state_dict(), directory / AVERAGE)


def load_average(average: ModelEmaV3, directory: Path) -> None:
    """Take up an average from a checkpoint. Its branches must have been closed and removed before.

    Raises:
        ValueError: It was written of another structure.
        OSError: There is no such file.
    """
    read_tensors(average.module.state_dict(), directory / AVERAGE)
