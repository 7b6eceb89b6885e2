"""Small networks and the state they should be in, for all tests, and a Hub of their own.

Nothing in the tests needs a network: who asks the Hub for something asks a server in this process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from loopback_hub import LoopbackHub

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many processes as cores are at work already

_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
_HUB = LoopbackHub().__enter__()
os.environ.update(_HUB.environment(Path(_HOME.name)))  # before huggingface_hub is imported, which reads it once

import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

import timm_eps  # noqa: E402, F401  registers the models
from timm_eps.branches import gates  # noqa: E402


@pytest.fixture
def hub():
    """The Hub that the real client talks to in all tests and in processes that they start; others' models are on it."""
    yield _HUB
    _HUB.fail_on = None


def pytest_unconfigure():
    _HUB.__exit__(None, None, None)
    _HOME.cleanup()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 8, 8), small enough for many forward passes."""
    return torch.randn(4, 3, 8, 8)


def tiny_net(**kwargs) -> torch.nn.Module:
    """eps_resnet20 for 8x8 images: 9 blocks, 3 a stage, with BatchNorm statistics that are not the initial ones."""
    model = timm.create_model("eps_resnet20", pretrained_cfg_overlay={"input_size": (3, 8, 8)}, **kwargs)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def close(model: torch.nn.Module, *slots: str) -> None:
    """Close the gates of these slots, or every second one."""
    found = gates(model)
    for slot in slots or list(found)[::2]:
        found[slot].closed = True


SLOTS = [f"stages.{i}.blocks.{k}.drop_path" for i in range(3) for k in range(3)]
