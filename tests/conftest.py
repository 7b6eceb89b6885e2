"""Fixtures for all tests: small networks, and a local Hub.

The tests need no internet access: all requests to the Hub go to a server in this process.
"""

from __future__ import annotations

import gc
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

if TYPE_CHECKING:  # pytest-xdist's main process reads this file too, and runs no test
    import datasets
    import torch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes with two threads each wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # xdist already uses one process per core

_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
_HUB = LoopbackHub().__enter__()
os.environ.update(_HUB.environment(Path(_HOME.name)))  # before importing huggingface_hub, which reads it once

# The files that take longest, longest first. Begun late, one would keep one process busy while the others wait.
LONGEST = [
    "test_processes", "test_docs", "test_fine_tuning", "test_push", "test_train_hf", "test_fuzz_checkpoints",
    "test_interruption", "test_resume", "test_trainer", "test_collapse", "test_timm_contract", "test_remote_code",
    "test_standalone", "test_stored", "test_analysis", "test_pruner", "test_modeling", "test_cli", "test_benchmarks",
    "test_sharding", "test_followers", "test_train_data",
]  # fmt: skip


@pytest.fixture
def hub():
    """A local Hub for the real client, in all tests and their child processes. It also has models of other users."""
    yield _HUB
    _HUB.fail_on = _HUB.fault = None


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist keeps the order of pytest_collection_modifyitems
    wanted = config.option.markexpr
    if "cuda" not in wanted or "not cuda" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal results on every machine


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """All that was imported stays. Otherwise each collection of garbage visits it, half a second for each training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    _HUB.__exit__(None, None, None)
    _HOME.cleanup()


def mostly_slow(values: Iterable[Any], *default: int) -> list[Any]:
    """Parameters of a test. All are marked ``slow`` except those at the positions ``default``.

    All parameters belong to the tested kind. A few of them find almost every mistake.
    """
    slow = pytest.mark.slow
    return [
        value if position in default else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for position, value in enumerate(values)
    ]


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    import timm_eps  # noqa: F401  registers the models

    torch.manual_seed(0)


def draw_nothing(patched: pytest.MonkeyPatch) -> None:
    """For tests that save often: a saved model has an empty picture, as the real one takes longer than the rest."""
    patched.setattr("timm_eps.hub.saving.draw_blocks", lambda *arguments: Image.new("L", (1, 1)).save(arguments[3]))


@pytest.fixture(scope="module")
def nothing_drawn():
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        yield


@pytest.fixture
def times_measured_once(monkeypatch):
    """For tests that do not depend on time measurements."""
    from timm_eps.analysis import measure

    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_LEAST_REPEATS", 1)


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 8, 8), small enough for many forward passes."""
    import torch

    return torch.randn(4, 3, 8, 8)


def tiny_net(**kwargs) -> torch.nn.Module:
    """eps_resnet20 for 8x8 images: 9 blocks, 3 per stage, with changed BatchNorm statistics."""
    import timm
    import torch

    model = timm.create_model("eps_resnet20", pretrained_cfg_overlay={"input_size": (3, 8, 8)}, **kwargs)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def close(model: torch.nn.Module, *slots: str) -> None:
    """Close the gates of these slots. By default, close every second gate."""
    from timm_eps.surgery.branches import gates

    found = gates(model)
    for slot in slots or list(found)[::2]:
        found[slot].closed = True


def make_dataset(count=12, size=(8, 8), image="img", label="fine_label", mode="RGB", classes=("a", "b", "c")):
    """A table of noise pictures, with the classes in turn as labels."""
    import datasets

    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, *channels), dtype=np.uint8), mode) for _ in range(count)]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict({image: pictures, label: [i % len(classes) for i in range(count)]}, features)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A table cell for a picture without a file name: the content of its file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def write_splits(directory: Path, **splits: datasets.Dataset) -> str:
    """One parquet file per split, with the directory layout of the Hub."""
    for name, rows in splits.items():
        rows.to_parquet(directory / "data" / f"{name}-00000-of-00001.parquet")
    return str(directory)


SLOTS = [f"stages.{i}.blocks.{k}.drop_path" for i in range(3) for k in range(3)]
