"""Export of networks as ONNX graphs, with the input and output names that the Hub's tools expect."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.cifar_blocks import make_shortcuts_convolutions
from ..surgery.branches import probe_batch, timm_body
from ..surgery.removal import check_gated, collapsed_copy

__all__ = ["OnnxNetwork", "check_installed", "export_onnx"]


def check_installed() -> None:
    """Raise ImportError if a package that torch needs for the export is missing."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"ONNX files need {' and '.join(missing)}: pip install onnx onnxscript")


def export_onnx(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model in evaluation mode as one ONNX file from ``pixel_values`` (B, C, H, W) to ``logits``, for any B.

    The output of a network without a classifier is called ``features``.

    Example::

        import onnxruntime

        timm_eps.export_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"pixel_values": images.numpy()})

    Args:
        model: A model with gates, pruned or not; it is unchanged.
        path: Path of the file, such as ``model.onnx``. Its directory is created.

    Raises:
        ValueError: The model has no gates.
        ImportError: onnx or onnxscript, which torch needs for the export, is not installed.
    """
    check_installed()
    check_gated(model)
    body = timm_body(collapsed_copy(model)).cpu().float()
    # Padding of channels makes ONNX Runtime leave its fast channel-blocked layout, in the whole stage.
    make_shortcuts_convolutions(body)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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
    _forget_paths(path)


class OnnxNetwork(nn.Module):
    """A network that runs in ONNX Runtime on CPUs, for timing: images (B, C, H, W) to logits.

    Args:
        model: A model with gates, pruned or not; it is unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.onnx"
            export_onnx(model, path)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"pixel_values": x.numpy()})
        return torch.from_numpy(logits)


def _forget_paths(path: str | os.PathLike) -> None:
    """Delete torch's debugging information: for each operation, the lines of code and their local paths."""
    import onnx

    model = onnx.load(path)
    named = [model.graph.input, model.graph.output, model.graph.value_info, model.graph.initializer, model.graph.node]
    for each in (*named, *(function.node for function in model.functions)):
        for entry in each:
            del entry.metadata_props[:]
            entry.doc_string = ""
    onnx.save(model, path)
