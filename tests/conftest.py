"""Small networks and the state they should be in, for all tests. Nothing here or in the tests needs a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: a request would be a mistake

import pytest
import timm
import torch

import timm_eps  # noqa: F401  registers the models
from timm_eps.branches import gates


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
