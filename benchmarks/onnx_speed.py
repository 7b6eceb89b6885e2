"""Speed-up of ONNX Runtime over torch's eager mode, on one thread: the figures in README.md and docs/ship.md.

python -m benchmarks.onnx_speed
"""

from __future__ import annotations

import statistics

import timm
import torch

import timm_eps  # noqa: F401  registers the models
from timm_eps.hub.onnx_export import OnnxNetwork
from timm_eps.report import hardware, paired_seconds

NETWORKS = {"eps_tf_efficientnet_lite0": 96, "eps_resnet110": 32}
BATCH_SIZES = (1, 32)
REPEATS = 31


def main() -> None:
    torch.set_num_threads(1)
    print(f"{hardware('cpu')}; medians of {REPEATS} passes in turn; brackets: quartiles of the ratios")
    for name, size in NETWORKS.items():
        torch.manual_seed(0)
        options = {"num_classes": 10, "pretrained_cfg_overlay": {"input_size": (3, size, size)}}
        model = timm.create_model(name, **options).eval()
        networks = {"eager": model, "onnx": OnnxNetwork(model)}
        for batch in BATCH_SIZES:
            seconds = paired_seconds(networks, torch.randn(batch, 3, size, size), repeats=REPEATS)
            ratios = [one / other for one, other in zip(seconds["eager"], seconds["onnx"], strict=True)]
            lower, middle, upper = statistics.quantiles(ratios, n=4)
            eager, onnx = (1000 * statistics.median(seconds[key]) for key in networks)
            print(
                f"{name}, {size}x{size}, batch {batch}: {eager:.2f} ms eager, {onnx:.2f} ms ONNX Runtime, "
                f"{middle:.2f}x ({lower:.2f} to {upper:.2f})"
            )


if __name__ == "__main__":
    main()
