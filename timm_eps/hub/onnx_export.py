"""Export of networks as ONNX graphs, with the input and output names that the Hub's tools expect."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.cifar_blocks import make_shortcuts_convolutions
from ..surgery.branches import input_size, probe_batch, timm_body
from ..surgery.removal import check_gated, collapsed_copy
from .onnx_int8 import check_int8, quantize_file, read_calibration

__all__ = ["OnnxFile", "OnnxNetwork", "check_installed", "export_onnx"]


def check_installed() -> None:
    """Raise ImportError if a package that torch needs for the export is missing."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"ONNX files need {' and '.join(missing)}: pip install onnx onnxscript")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    quantize: str | None = None,
    calibration: Iterable[Any] | None = None,
) -> None:
    """Write a model in evaluation mode as one ONNX file from ``pixel_values`` (B, C, H, W) to ``logits``, for any B.

    The output of a network without a classifier is called ``features``.

    ``quantize="static"`` writes a file in eight bits: a quarter of the size, and faster on CPUs with instructions for
    eight bits. Input and output stay float32. The first 512 images of ``calibration`` set the range of each activation,
    so shuffle them, and take them from the training images.

    ``quantize="dynamic"`` needs no images: each range is found anew in each pass. It is for networks of linear layers;
    a convolutional network loses accuracy and speed by it.

    Example::

        import onnxruntime

        timm_eps.export_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"pixel_values": images.numpy()})

        timm_eps.export_onnx(model, "model_int8.onnx", quantize="static", calibration=batches)

    Args:
        model: A model with gates, pruned or not; it is unchanged.
        path: Path of the file, such as ``model.onnx``. Its directory is created.
        quantize: ``"static"`` or ``"dynamic"`` for eight bits; None for float32.
        calibration: Batches of images, normalised for the network, for ``"static"``: tensors (B, C, H, W), pairs
            (images, labels), or mappings with ``pixel_values``. A few hundred images are enough.

    Raises:
        ValueError: The model has no gates, ``quantize`` is unknown, or ``calibration`` is missing, empty, or contains
            images of another size.
        ImportError: onnx or onnxscript, which torch needs for the export, or onnxruntime, which quantizes, is not
            installed.
    """
    check_installed()
    check_int8(quantize, calibration)
    check_gated(model)
    images = None if calibration is None else read_calibration(calibration, input_size(timm_body(model)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if quantize is None:
        _export_float(model, path)
    else:
        with tempfile.TemporaryDirectory() as directory:
            whole = Path(directory) / "model.onnx"
            _export_float(model, whole)
            quantize_file(whole, Path(path), images)


def _export_float(model: nn.Module, path: str | os.PathLike) -> None:
    body = timm_body(collapsed_copy(model)).cpu().float()
    # Padding of channels makes ONNX Runtime leave its fast channel-blocked layout, in the whole stage.
    make_shortcuts_convolutions(body)
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


class OnnxFile(nn.Module):
    """An ONNX file that runs in ONNX Runtime on CPUs, for timing: images (B, C, H, W) to logits.

    Args:
        path: Path of a file of :func:`export_onnx`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise the threads of one session wait in a loop while another one is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"pixel_values": x.numpy()})
        return torch.from_numpy(logits)


class OnnxNetwork(OnnxFile):
    """A network that runs in ONNX Runtime, like :class:`OnnxFile`.

    Args:
        model: A model with gates, pruned or not; it is unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.onnx"
            export_onnx(model, path)
            super().__init__(path)


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
