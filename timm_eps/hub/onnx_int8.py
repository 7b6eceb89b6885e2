"""ONNX files in eight bits, by ONNX Runtime's own quantization.

The settings were chosen by measurement: ``python -m benchmarks.int8 --settings`` repeats it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.evaluation import read_images

__all__ = ["CALIBRATION_IMAGES", "KINDS", "check_int8", "quantize_file", "read_calibration"]

_logger = logging.getLogger(__name__)
KINDS = ("static", "dynamic")
# More images change the ranges of the activations little.
CALIBRATION_IMAGES = 512
_BATCH = 32
_WEIGHTED = ("Conv", "Gemm", "MatMul")
# Batch norm that stands alone is left out: ONNX Runtime computes it in float32 either way.
_QUANTIZED = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
    "ReduceMean", "Relu", "Reshape",
)  # fmt: skip


def check_int8(kind: str | None, calibration: Any) -> None:
    """Raise if a file cannot be quantized in this way.

    Args:
        kind: ``static``, ``dynamic``, or None for a float file.
        calibration: The images to calibrate on, or None.

    Raises:
        ValueError: The kind is unknown, or it goes with calibration images and there are none, or the reverse.
        ImportError: onnxruntime is not installed.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"quantize must be 'static', 'dynamic' or None, got {kind!r:.80}.")
    if kind == "static" and calibration is None:
        raise ValueError("quantize='static' needs calibration, an iterable of batches of your training images.")
    if kind != "static" and calibration is not None:
        raise ValueError(f"calibration is for quantize='static', got quantize={kind!r}; leave it out.")
    if kind is not None and find_spec("onnxruntime") is None:
        raise ImportError("Files in eight bits need onnxruntime: pip install onnxruntime")


def read_calibration(calibration: Iterable[Any], shape: tuple[int, ...]) -> Tensor:
    """The first :data:`CALIBRATION_IMAGES` images (N, C, H, W), float32, on the CPU.

    Args:
        calibration: Image tensors (B, C, H, W), pairs (images, labels), or mappings with ``pixel_values``.
        shape: (C, H, W) of the images that the file takes.

    Raises:
        ValueError: There are no images, they have another shape, or a value is not finite.
    """
    batches = read_images("calibration", calibration, CALIBRATION_IMAGES)
    for batch in batches:
        if tuple(batch.shape[1:]) != shape:
            wanted, got = ("x".join(map(str, each)) for each in (shape, batch.shape[1:]))
            raise ValueError(f"The images of calibration must be {wanted}, as the network takes them, got {got}.")
    images = torch.cat([batch.cpu().float() for batch in batches])
    if not images.isfinite().all():
        raise ValueError("The images of calibration hold NaN or infinite values.")
    return images


def quantize_file(source: Path, path: Path, images: Tensor | None, **changes: Any) -> None:
    """Write an ONNX file in eight bits.

    Args:
        source: The float file.
        path: The file to write.
        images: Images to calibrate on, (N, C, H, W), for the static form; None for the dynamic form.
        **changes: Arguments of ``onnxruntime.quantization.quantize_static`` to try instead of the chosen ones.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name(f"prepared-{source.name}")
    # Folds batch norm into convolutions where torch's exporter did not. The shapes that quantization reads are static.
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    kinds = quantization.QuantType
    if images is None:
        _logger.warning(
            "Dynamic quantization is for networks of linear layers. In convolutional networks it can cost much "
            "accuracy and time: use quantize='static' there, and measure."
        )
        quantization.quantize_dynamic(prepared, path, per_channel=True, weight_type=kinds.QUInt8)
        return
    # One scale a channel: with one scale a tensor, depthwise convolutions lose a tenth of the accuracy. Unsigned
    # activations: signed ones take twice the time on x86-64.
    chosen: dict[str, Any] = {
        "quant_format": quantization.QuantFormat.QDQ,
        "op_types_to_quantize": list(_op_types(prepared)),
        "per_channel": True,
        "activation_type": kinds.QUInt8,
        "weight_type": kinds.QInt8,
        "calibrate_method": quantization.CalibrationMethod.MinMax,
    }
    quantization.quantize_static(prepared, path, _Reader(images), **(chosen | changes))


def _op_types(path: Path) -> tuple[str, ...]:
    """The operations to quantize: sums of a transformer's residual stream hold outliers, so they stay in float32."""
    import onnx

    found = {node.op_type for node in onnx.load(path).graph.node}
    return _WEIGHTED if found & {"LayerNormalization", "Softmax"} else _QUANTIZED


class _Reader:
    """Hands out calibration images as ONNX Runtime asks for them; it takes any object with this method."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch.numpy()}
