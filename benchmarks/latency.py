"""Latency of the networks of one seed and fold, measured in turn in one process, without parallel jobs.

Speed depends on the structure, which ``results.json`` holds, not on the weights. So the networks are built without
training. ``__main__.py`` starts this file. The output is JSON with median seconds.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from benchmarks import channels
from benchmarks.jobs import conditions
from timm_eps import report
from timm_eps.surgery.branches import gates

NATIVE = "native"
REPARAMETERIZED = "reparameterized"
WHOLE = "dense, reparameterized"
REST = "no blocks"  # stem, shortcuts and head, which block pruning does not make faster
COPIES = 7  # of the pruned network and its forms, at batch 1


def build(architecture: str, classes: int, found: dict[str, Any]) -> nn.Module:
    """An untrained network with the structure from a run.

    Raises:
        RuntimeError: The number of parameters differs from the run's, so the structure differs.
    """
    if "ratio" in found:  # Torch-Pruning: each layer loses this share of its channels, and the weights do not matter
        whole = channels.plain(timm.create_model(architecture, num_classes=classes))
        body = reparameterize_model(channels.without(whole, found["ratio"], torch.zeros(2, 3, 32, 32)))
    else:
        body = timm.create_model(architecture, num_classes=classes, removed=found["removed"])
    if (built := report.count_parameters(body)) != found["params"]:
        raise RuntimeError(f"What was built has {built} parameters, the network of the run {found['params']}.")
    return body


def native(body: nn.Module) -> nn.Module:
    """The same structure written by hand, without gates and placeholders.

    It does not call ``reparameterize_model``, which is measured against it.
    """
    body = copy.deepcopy(body)
    for stage in body.stages:
        stage.blocks = nn.Sequential(*(block for block in stage.blocks if not isinstance(block, nn.Identity)))
        for block in stage.blocks:
            if hasattr(block, "drop_path"):  # the shortcut of a removed block has none
                block.drop_path = nn.Identity()
    return body


def forms(pruned: nn.Module) -> dict[str, nn.Module]:
    """A pruned network as loaded, and other forms of the same structure."""
    return {"budget": pruned, NATIVE: native(pruned), REPARAMETERIZED: reparameterize_model(pruned)}


def latency_over_copies(
    nets: dict[str, nn.Module], copies: list[dict[str, nn.Module]], batch: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Latency of networks, measured in turn. For some networks it is the median over copies.

    The addresses of weights and modules change the latency of a small network at batch 1 by up to 3 %. Two copies of
    one network differ by this amount repeatedly.
    """
    single = {name: net for name, net in nets.items() if name not in copies[0]}
    several = {f"{name} {index}": net for index, copied in enumerate(copies) for name, net in copied.items()}
    seconds = report.paired_latency(single | several, batch, repeats)
    medians = {
        name: statistics.median(seconds[f"{name} {index}"] for index in range(len(copies))) for name in copies[0]
    }
    return {name: seconds[name] for name in single} | medians


class InOnnxRuntime(nn.Module):
    """A network in ONNX Runtime on the CPU, with batch norm folded into the convolutions.

    Args:
        body: The network.
        images: A batch. All batches must have its shape.
    """

    def __init__(self, body: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        import onnxruntime  # needed only for measurements

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise the threads of one session wait in a loop while another session is measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as directory:
            body, path = channels.plain(body), f"{directory}/model.onnx"  # as timm_eps writes ONNX files
            torch.onnx.export(body, (images,), path, input_names=["images"], dynamo=True, verbose=False)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


class InCudaGraph(nn.Module):
    """A network as a CUDA graph, which launches all kernels at once.

    Args:
        body: The network.
        images: A batch. All batches must have its shape.
    """

    def __init__(self, body: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            # A function, because make_graphed_callables would change a module.
            self.replay = torch.cuda.make_graphed_callables(lambda batch: body(batch), (images.clone(),))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.replay(images)


class InTensorRT(nn.Module):
    """A network in TensorRT, through ONNX Runtime. Inputs and outputs stay on the GPU.

    Args:
        body: The network.
        images: A batch of the only shape it will be given.
    """

    PROVIDER = "TensorrtExecutionProvider"

    def __init__(self, body: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        import onnxruntime

        self.images = images.contiguous().clone()
        with torch.no_grad():
            self.logits = torch.empty_like(body(images))
        with tempfile.TemporaryDirectory() as directory:
            body, path = channels.plain(body).cpu(), f"{directory}/model.onnx"
            names = {"input_names": ["images"], "output_names": ["logits"]}
            torch.onnx.export(body, (self.images.cpu(),), path, **names, dynamo=True, verbose=False)
            self.session = onnxruntime.InferenceSession(path, providers=[self.PROVIDER])
        self.binding = self.session.io_binding()
        for bind, name, tensor in (
            (self.binding.bind_input, "images", self.images), (self.binding.bind_output, "logits", self.logits),
        ):  # fmt: skip
            bind(name, "cuda", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

    @classmethod
    def is_available(cls) -> bool:
        try:
            import onnxruntime
        except ImportError:
            return False
        return cls.PROVIDER in onnxruntime.get_available_providers()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        self.session.run_with_iobinding(self.binding)
        return self.logits


def compiled(body: nn.Module, images: torch.Tensor) -> nn.Module:
    """A network compiled by torch.compile on its first pass. Needs a C++ compiler; on a GPU, Triton."""
    # fullgraph and no dynamic shapes: if torch stops compiling further structures, it raises instead of being slow.
    return torch.compile(body, fullgraph=True, dynamic=False)


class Way(NamedTuple):
    """A way to run a network: a memory format, and a function that prepares the network for a batch."""

    memory_format: torch.memory_format = torch.contiguous_format
    runtime: Callable[[nn.Module, torch.Tensor], nn.Module] | None = None


_EVERYWHERE = {
    "": Way(),
    ", channels_last": Way(torch.channels_last),
    ", compiled": Way(runtime=compiled),
    ", channels_last, compiled": Way(torch.channels_last, compiled),
}
WAYS: dict[str, dict[str, Way]] = {
    "cpu": {**_EVERYWHERE, ", in ONNX Runtime": Way(runtime=InOnnxRuntime)},
    "cuda": {**_EVERYWHERE, ", as a CUDA graph": Way(runtime=InCudaGraph), ", in TensorRT": Way(runtime=InTensorRT)},
}


def latency_by(way: Way, nets: dict[str, nn.Module], images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Latency of the networks, or only of those that are measured in this runtime."""
    batch = images.contiguous(memory_format=way.memory_format)
    names = nets if way.runtime is None else (WHOLE, REPARAMETERIZED, REST)
    laid_out = {name: copy.deepcopy(nets[name]).to(memory_format=way.memory_format) for name in names}
    if way.runtime is not None:
        torch.compiler.reset()  # torch stops compiling after a number of structures
        laid_out = {name: way.runtime(net, batch) for name, net in laid_out.items()}
    return report.paired_latency(laid_out, batch, repeats)


def without_blocks(architecture: str, classes: int) -> nn.Module:
    """The network without any block."""
    everything = list(gates(timm.create_model(architecture)))
    return reparameterize_model(timm.create_model(architecture, num_classes=classes, removed=everything).eval())


def task_for(
    runs: Mapping[str, Mapping[str, Any]], architecture: str, classes: int, sides: Sequence[int], threads: int,
    repeats: int = 24,
) -> str:  # fmt: skip
    """The argument of this program.

    Args:
        runs: Results of runs by method.
        architecture: timm name of the dense network.
        classes: Number of classes.
        sides: Sides of the images in pixels.
        threads: Threads on the CPU.
        repeats: Passes of each network.
    """
    wanted = ("params", "removed", "ratio")
    found = {method: {name: run[name] for name in wanted if name in run} for method, run in runs.items()}
    task = {"found": found, "architecture": architecture, "classes": classes, "sides": sides}
    return json.dumps({**task, "repeats": repeats, "threads": threads})


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(task["threads"])
    architecture = task["architecture"]
    nets = {
        method: build(architecture, task["classes"], found).to(device).eval() for method, found in task["found"].items()
    }
    nets |= forms(nets["budget"]) | {WHOLE: reparameterize_model(nets["dense"])}
    nets[REST] = without_blocks(architecture, task["classes"]).to(device)
    torch.manual_seed(0)
    found: dict[str, Any] = {"hardware": report.hardware(device), **conditions()}
    for side in task["sides"]:
        size = f"{side}x{side}"
        images = torch.randn(128, 3, side, side, device=device)
        expected = nets["budget"](images[:2])
        for same in (NATIVE, REPARAMETERIZED):
            if not torch.equal(nets[same](images[:2]), expected):
                raise RuntimeError(f"The {same} network computes something else.")
        for name, way in WAYS[device.type].items():
            if way.runtime is InTensorRT and not InTensorRT.is_available():
                continue
            found[f"seconds at 128, {size}{name}"] = latency_by(way, nets, images, task["repeats"])
        rest = report.count_macs(nets[REST], images[:1])
        found[f"block macs, {size}"] = {
            method: report.count_macs(nets[method], images[:1]) - rest for method in ("dense", "budget")
        }
    copies = [
        forms(build(architecture, task["classes"], task["found"]["budget"]).to(device).eval()) for _ in range(COPIES)
    ]
    image = images[:1, :, : task["sides"][0], : task["sides"][0]]
    found["seconds at 1"] = latency_over_copies(nets, copies, image, 5 * task["repeats"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
