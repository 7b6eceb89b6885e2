"""The script for a GPU, without one: its parts, and what a second run does."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import fashion, on_gpu
from benchmarks.comparisons import COMPARISONS
from timm_eps.training.arguments import parse_arguments


def test_all_parts_together_take_twenty_minutes():
    parts = on_gpu.parts()
    assert sum(part.seconds for part in parts) <= 20 * 60
    assert len({part.name for part in parts}) == len(parts)
    assert set(json.loads(parts[2].command[-1])["found"]) == {"dense", "budget", "torch_pruning_to_size"}


def test_a_second_run_continues(tmp_path, monkeypatch, capsys):
    """A part that failed or took too long runs again, a finished one does not."""
    count = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x')"
    commands = {"good": count, "bad": f"{count}; sys.exit(3)", "slow": f"{count}; import time; time.sleep(60)"}
    parts = [on_gpu.Part(name, 1, ["-c", code, str(tmp_path / name)], []) for name, code in commands.items()]
    monkeypatch.setattr(on_gpu, "parts", lambda: parts)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu, "DIRECTORY", tmp_path)
    (tmp_path / on_gpu.IMAGES).touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["on_gpu"])
    assert [on_gpu.main(), on_gpu.main()] == [1, 1]
    assert [(tmp_path / name).read_text() for name in commands] == ["x", "xx", "xx"]
    said = capsys.readouterr().out
    assert all(outcome in said for outcome in ("good: done before", "bad: failed with 3", "slow: out of time"))


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_gpu"])
    with pytest.raises(SystemExit):
        on_gpu.main()
    assert "--dry_run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fashion", "fashion110"])
def test_recipes_of_fashion_mnist(name):
    args = parse_arguments(COMPARISONS[name].flags)
    assert (args.data.dataset_name, args.data.image_size, args.data.flip) == ("outputs/fashion", 32, True)


def test_fashion_needs_its_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.pretrained\.prepare"):
        fashion.write(tmp_path / "out", tmp_path / "missing.npz")
