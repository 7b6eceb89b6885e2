"""Loaders that do what the fuzzer must find, each under the name of the fault. They prove that it can fail."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import CONFIG, WEIGHTS, read_safetensors
from .loaders import Loaded, Loader


class _Net(nn.Module):
    """Holds the tensors of a file under their names and sums them up."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.tensors

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor.double().sum() for tensor in self.tensors.values()])[None]


def _read(directory: str) -> _Net:
    tensors, _ = read_safetensors((Path(directory) / WEIGHTS).read_bytes())
    kinds = {"F32": torch.float32, "I64": torch.int64}
    return _Net(
        {n: torch.frombuffer(bytearray(t.data), dtype=kinds[t.dtype]).reshape(t.shape) for n, t in tensors.items()}
    )


def _spoilt(change: Any) -> Loader:
    def load(directory: str) -> Loaded:
        net = _read(directory)
        name = "stages.0.blocks.0.conv1.weight"
        change(net.tensors, name)
        return Loaded(net, architecture="eps_resnet20")

    return load


def _run_file(directory: str) -> Loaded:
    path = Path(directory) / "modeling_eps_resnet.py"
    runpy.run_path(str(path))
    return Loaded(None)


def _write(directory: str) -> Loaded:
    (Path(directory) / "new").write_text("x")
    return Loaded(None)


def _write_unseen(directory: str) -> Loaded:
    # Not through an event of Python's: a library in another language writes so.
    import ctypes

    ctypes.CDLL(None).mkdir(os.fsencode(directory + "/unseen"), 0o700)
    return Loaded(None)


def _connect(directory: str) -> Loaded:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    return Loaded(None)


def _connect_and_hide(directory: str) -> Loaded:
    try:
        _connect(directory)
    except Exception:
        return Loaded(None)
    raise AssertionError("the port is closed")


def _process(directory: str) -> Loaded:
    subprocess.run([sys.executable, "-c", ""], check=True)
    return Loaded(None)


def _unpickle(directory: str) -> Loaded:
    pickle.loads(pickle.dumps(Path(directory)))
    return Loaded(None)


def _hang(directory: str) -> Loaded:
    while True:
        time.sleep(1)


def _die(directory: str) -> Loaded:
    os._exit(3)


def _take_memory(directory: str) -> Loaded:
    torch.ones(10**9)
    return Loaded(None)


def _take_memory_for_a_moment(directory: str) -> Loaded:
    torch.ones(4 * 10**8)
    return Loaded(None)


def _crash(directory: str) -> Loaded:
    config: Any = json.loads((Path(directory) / CONFIG).read_text())
    return config["no such field"]


def _assert(directory: str) -> Loaded:
    assert not directory, "a check of the package's own"
    return Loaded(None)


def _refuse_well(directory: str) -> Loaded:
    raise ValueError("config.json: model_args['layers'] must be three numbers, got 3.")


def _refuse_at_length(directory: str) -> Loaded:
    raise ValueError("config.json: " + "x" * 300)


def _refuse_in_lines(directory: str) -> Loaded:
    raise ValueError("config.json:\nmodel_args is wrong")


def _refuse_darkly(directory: str) -> Loaded:
    raise ValueError("something is wrong")


def _half(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].half().float()


def _random(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.randn_like(tensors[name])


def _not_in_file(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["stages.9.conv.weight"] = torch.randn(3)


def _left_out(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _meta(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to("meta")


# The fault that the fuzzer must report for a sound directory; None for a load that is right.
LOADERS: dict[str, tuple[Loader, str | None]] = {
    "right": (lambda d: Loaded(_read(d), architecture="eps_resnet20"), None),
    "runs a file": (_run_file, "executed"),
    "starts a process": (_process, "executed"),
    "unpickles": (_unpickle, "executed"),
    "connects": (_connect, "requested"),
    "connects and hides it": (_connect_and_hide, "requested"),
    "writes": (_write, "written"),
    "writes unseen": (_write_unseen, "written"),
    "random weights": (_spoilt(_random), "other numbers"),
    "rounded weights": (_spoilt(_half), "rounded"),
    "a tensor of its own": (_spoilt(_not_in_file), "random"),
    "leaves a tensor out": (_spoilt(_left_out), "left out"),
    "meta": (_spoilt(_meta), "meta"),
    "hangs": (_hang, "time"),
    "dies": (_die, "died"),
    "takes memory": (_take_memory, "memory"),
    "takes memory for a moment": (_take_memory_for_a_moment, "memory"),
    "crashes": (_crash, "traceback"),
    "asserts": (_assert, "traceback"),
    "refuses well": (_refuse_well, None),
    "refuses at length": (_refuse_at_length, "message"),
    "refuses in lines": (_refuse_in_lines, "message"),
    "refuses darkly": (_refuse_darkly, "message"),
}
