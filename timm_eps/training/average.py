"""Saving and loading of the average of the weights."""

from __future__ import annotations

from pathlib import Path

from timm.utils import ModelEmaV3

from .process_state import read_tensors, write_tensors

__all__ = ["AVERAGE", "load_average", "save_average"]

AVERAGE = "average.safetensors"


def save_average(average: ModelEmaV3, directory: Path) -> None:
    """Save an average in a checkpoint."""
    write_tensors(average.module.state_dict(), directory / AVERAGE)


def load_average(average: ModelEmaV3, directory: Path) -> None:
    """Load an average from a checkpoint. Its branches must be closed and removed first.

    Raises:
        ValueError: The file is for another structure.
        OSError: The file does not exist.
    """
    read_tensors(average.module.state_dict(), directory / AVERAGE)
