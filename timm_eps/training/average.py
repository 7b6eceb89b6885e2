"""The average of the weights that a training keeps beside them."""

from __future__ import annotations

from pathlib import Path

from timm.utils import ModelEmaV3

from .process_state import read_tensors, write_tensors

__all__ = ["AVERAGE", "load_average", "save_average"]

AVERAGE = "average.safetensors"


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
