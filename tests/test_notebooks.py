"""The notebooks are clean, and their cells run: as plain code, and in a kernel where nbclient is installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

import timm_eps
from timm_eps.report import count_macs

ROOT = Path(__file__).parent.parent
SHRINK, SCRATCH = "shrink_your_classifier.ipynb", "eps_resnet_from_scratch.ipynb"
# Parameters that make a notebook run in seconds.
QUICK: dict[str, dict[str, Any]] = {
    SHRINK: {
        "ARCHITECTURE": "test_resnet",
        "TARGET": {"target_macs": 0.7},
        "SIZE": 32,
        "DENSE_EPOCHS": {"pretrained": 1, "from scratch": 1},
        "EPOCHS": 1,
        "MOST_IMAGES": 200,
    },
    SCRATCH: {
        "ARCHITECTURE": "eps_resnet20",
        "KEEP": 4,
        "EPOCHS": 5,
        "WARMUP_EPOCHS": 1,
        "RAMP_EPOCHS": 1,
        "PATIENCE": 2,
        "TRAINER_EPOCHS": 2,
    },
}
PLACES = re.compile(r"/(?:home|root|tmp|work|Users|content|mnt|opt)/|[A-Z]:\\")


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))


def code_cells(name: str) -> list[tuple[str, list[str]]]:
    """Source and tags of each code cell."""
    cells = [cell for cell in load(name)["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def run(name: str, **changed: Any) -> dict[str, Any]:
    """Run all cells in the current directory with other parameters. Returns the variables that they define."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, (source, tags) in enumerate(code_cells(name)):
        exec(compile(source, f"{name}, code cell {number}", "exec"), namespace)
        if "parameters" in tags:
            namespace |= changed
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder: pictures need no window, one thread computes, and latency is measured briefly."""
    threads, backend = torch.get_num_threads(), matplotlib.get_backend()
    torch.set_num_threads(1)
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)
    torch.set_num_threads(threads)


def test_every_notebook_is_tested():
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == set(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_is_committed_clean(name):
    notebook = load(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}  # no data about the machine that edited it
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(identifiers) == len(set(identifiers))
    for cell in notebook["cells"]:
        assert not PLACES.search("".join(cell["source"]))
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", QUICK)
def test_cells_are_explained_and_compile(name):
    cells = load(name)["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    assert all("".join(cell["source"]).strip() for cell in cells)
    for source, _ in code_cells(name):
        compile(source, name, "exec")  # plain Python, without IPython's syntax


@pytest.mark.parametrize("name", QUICK)
def test_parameters_stand_in_one_cell(name):
    [(source, _)] = [cell for cell in code_cells(name) if "parameters" in cell[1]]
    assigned = {target.id for node in ast.parse(source).body for target in node.targets}
    assert set(QUICK[name]) | {"OUT"} <= assigned


@pytest.mark.parametrize("name", QUICK)
def test_first_cell_installs_only_what_is_missing(name, monkeypatch):
    """With all packages installed the cell does nothing. Otherwise it calls pip once, for this package with extra."""
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "check_call", called.append)
    source, _ = code_cells(name)[0]
    exec(source, {})
    assert called == []
    exec(source.replace('"timm_eps"', '"not_a_package_of_anyone"'), {})
    [command] = called
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "..[train]" in command


@pytest.mark.slow
def test_from_scratch(folder):
    seen = run(SCRATCH, **QUICK[SCRATCH])
    assert 4 <= len(timm_eps.gates(seen["model"])) < 9
    assert seen["proofs"] > 0  # branches were closed, and their removal changed no bit
    assert {"epsilon", "blocks"} <= seen["trainer"].state.log_history[0].keys()
    assert (folder / "eps_resnet/model/blocks.png").exists()
    assert (folder / "eps_resnet/branches_by_epoch.png").exists()
    loaded = AutoModelForImageClassification.from_pretrained(folder / "eps_resnet/by_trainer")
    assert len(timm_eps.removed_slots(loaded)) == 5


@pytest.fixture
def pretrained(hub, tmp_path):
    """timm's repository of test_resnet on the test Hub, with known random weights."""
    weights = {name: value.contiguous() for name, value in timm.create_model("test_resnet").state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    api, repo = HfApi(), timm.get_pretrained_cfg("test_resnet").hf_hub_id
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=tmp_path / "model.safetensors", path_in_repo="model.safetensors", repo_id=repo)
    (tmp_path / "model.safetensors").unlink()
    yield weights
    api.delete_repo(repo)


def check_shrunk(seen: dict[str, Any], folder: Path) -> None:
    """The notebook's claims: fewer branches, a dense network for comparison, and files for every loader."""
    model, dense = seen["model"], seen["dense"]
    assert seen["removed"] == timm_eps.removed_slots(model)
    assert len(seen["removed"]) > 0
    assert not timm_eps.removed_slots(dense)
    macs = count_macs(model, seen["images"][:1])
    assert macs <= seen["TARGET"]["target_macs"] * seen["report"].dense.macs
    assert seen["served"]["label"] == seen["answer"]["label"]
    assert {path.name for path in (folder / "shrunk/elsewhere").iterdir()} == {"classes.json", "model.onnx", "serve.py"}


def test_shrink_of_the_digits(folder, times_measured_once, capsys):
    seen = run(SHRINK, **QUICK[SHRINK])
    assert "no pretrained weights here" in capsys.readouterr().out
    assert seen["start"] == "from scratch"
    assert len(list((folder / "shrunk/digits").glob("*/*.png"))) == 1797
    check_shrunk(seen, folder)


@pytest.mark.slow
def test_shrink_of_own_photos(folder, pretrained, times_measured_once):
    """Photos of several sizes, formats and modes in nested folders, and a network with weights from the Hub."""
    rng = np.random.default_rng(0)
    modes = {"RGB": (3, "jpg"), "L": (1, "png"), "RGBA": (4, "PNG"), "P": (1, "bmp")}
    for number in range(80):
        mode = list(modes)[number % 4]
        channels, suffix = modes[mode]
        pixels = rng.integers(0, 256, (20 + number, 70, channels), dtype=np.uint8).squeeze()
        path = folder / "photos" / ("a cat", "dög")[number // 4 % 2] / f"{number % 3}" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path)
    (folder / "photos/notes.txt").write_text("no image")
    seen = run(SHRINK, **QUICK[SHRINK], FOLDER="photos")
    assert seen["start"] == "pretrained"
    assert seen["classes"] == ["a cat", "dög"]
    assert len(seen["files"]) == 80
    check_shrunk(seen, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_runs_with_its_own_parameters(name, folder):
    """The accuracy is far above chance. docs/notebooks.md has the figures of a run."""
    seen = run(name)
    if name == SHRINK:
        check_shrunk(seen, folder)
        assert seen["accuracy"](seen["model"].to(seen["device"]), seen["tested"]) > 0.9
    else:
        assert seen["accuracies"][-1] > 0.9


@pytest.mark.parametrize("name", QUICK)
def test_runs_in_a_kernel(name, tmp_path):
    """As in Jupyter, from an empty folder. A cell after the parameters replaces them, as in papermill."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    [place] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    changed = "\n".join(f"{key} = {value!r}" for key, value in QUICK[name].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(changed))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(pictures) == 1
