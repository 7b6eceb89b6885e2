"""Effects of the settings of ONNX Runtime's static quantization: the default, and one change at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from onnxruntime import quantization
from torch import nn

from benchmarks.int8.networks import Images
from timm_eps import export_onnx, report
from timm_eps.hub.onnx_export import OnnxFile
from timm_eps.hub.onnx_int8 import quantize_file

TESTED, REPEATS = 2_000, 15
CHANGES: dict[str, dict[str, Any]] = {
    "the default": {},
    "one scale a tensor": {"per_channel": False},
    "weights of seven bits": {"reduce_range": True},
    "signed activations": {"activation_type": quantization.QuantType.QInt8},
    "entropy": {"calibrate_method": quantization.CalibrationMethod.Entropy},
    "percentile": {"calibrate_method": quantization.CalibrationMethod.Percentile},
    "sums and poolings in float32": {"op_types_to_quantize": ["Conv", "Gemm", "MatMul"]},
    "ReLU and ReLU6 kept": {"extra_options": {"QDQKeepRemovableActivations": True}},
}


def compare_settings(net: nn.Module, images: Images) -> dict[str, dict[str, float]]:
    """For each setting: accuracy, agreement with float32, error of the logits, and latency over float32 at batch 32.

    The error is the norm of the difference to the float32 logits, divided by their norm. It uses 2,000 test images.
    """
    tested, labels = images.tested[:TESTED], images.labels[:TESTED]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "model.onnx"
        export_onnx(net, source)
        sessions = {"float32": OnnxFile(source)}
        whole = torch.cat([sessions["float32"](batch) for batch in tested.split(250)])
        for name, changes in CHANGES.items():
            path = Path(directory) / f"{len(found)}.onnx"
            quantize_file(source, path, images.calibration, **changes)
            sessions[name] = OnnxFile(path)
            logits = torch.cat([sessions[name](batch) for batch in tested.split(250)])
            found[name] = {
                "accuracy": float((logits.argmax(1) == labels).float().mean()),
                "agreement": float((logits.argmax(1) == whole.argmax(1)).float().mean()),
                "error": float((logits - whole).norm() / whole.norm()),
            }
        seconds = report.paired_latency(sessions, tested[:32], REPEATS)
    for name, row in found.items():
        row["ratio"] = seconds[name] / seconds["float32"]
    return found
