"""What an ONNX file and its eight-bit form are worth: accuracy, size, and latency in ONNX Runtime."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report import paired_seconds
from .onnx_export import OnnxFile

__all__ = ["forms_table", "measure_forms"]

BATCH_SIZES = (1, 32)


def measure_forms(files: Mapping[str, Path], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """Accuracy, size and latency of ONNX files of one network.

    Args:
        files: The files by the name of their form. All are timed in turn.
        batches: Images (B, C, H, W) as the network reads them, and labels (B,).

    Returns:
        For each form ``accuracy`` (0 to 1), ``images``, ``bytes``, and ``latency_batch1_seconds`` and
        ``latency_batch32_seconds``, which are medians.
    """
    sessions = {name: OnnxFile(path) for name, path in files.items()}
    correct, seen = dict.fromkeys(files, 0), 0
    first: Tensor | None = None
    for images, labels in batches:
        first = images.cpu() if first is None else first
        seen += len(labels)
        for name, session in sessions.items():
            correct[name] += int((session(images.cpu()).argmax(1) == labels.cpu()).sum())
    assert first is not None, "there are images to measure on"
    found: dict[str, dict[str, Any]] = {
        name: {"accuracy": correct[name] / seen, "images": seen, "bytes": path.stat().st_size}
        for name, path in files.items()
    }
    for size in BATCH_SIZES:
        batch = torch.cat([first] * -(-size // len(first)))[:size]
        for name, seconds in paired_seconds(sessions, batch).items():
            found[name][f"latency_batch{size}_seconds"] = statistics.median(seconds)
    return found


def forms_table(forms: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of what :func:`measure_forms` returned; empty if there is nothing to show."""
    if not forms:
        return ""
    lines = [
        f"| ONNX Runtime | file | accuracy | {' | '.join(f'latency at batch {size}' for size in BATCH_SIZES)} |",
        f"|---|---:|---:|{'---:|' * len(BATCH_SIZES)}",
    ]
    for name, form in forms.items():
        latencies = (f"{1000 * form[f'latency_batch{size}_seconds']:.2f} ms" for size in BATCH_SIZES)
        size = f"{form['bytes'] / 1e6:.2f} MB"
        lines.append(f"| {name} | {size} | {100 * form['accuracy']:.2f} % | {' | '.join(latencies)} |")
    return "\n".join(lines)
