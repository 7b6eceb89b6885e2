"""Networks as ONNX graphs, under the names that the Hub's tools look for."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import nn

from .branches import probe_batch, timm_body
from .eps_resnet import make_shortcuts_convolutions
from .surgery import collapsed_copy

__all__ = ["check_installed", "write_onnx"]


def check_installed() -> None:
    """Raise ImportError if what torch exports with is missing."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"ONNX files need {' and '.join(missing)}: pip install onnx onnxscript")


def write_onnx(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what a model evaluates to as one ONNX file: ``pixel_values`` (B, C, H, W) to ``logits``, for any B.

    The output of a network without a classifier is called ``features``.

    Args:
        model: A model with gates, pruned or not; it is unchanged.
        path: Of the file, such as ``onnx/model.onnx``; its directory is made.

    Raises:
        ImportError: onnx or onnxscript, which torch exports with, are not installed.
    """
    check_installed()
    body = timm_body(collapsed_copy(model)).cpu().float()
    # ONNX Runtime leaves its layout of blocked channels where channels are padded, and in each sum of that stage.
    make_shortcuts_convolutions(body)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.onnx.export(
        body,
        (probe_batch(body),),
        os.fspath(path),
        input_names=["pixel_values"],
        output_names=["logits" if body.num_classes else "features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
