"""Counting and the comparison table."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import SLOTS, tiny_net
from PIL import Image
from test_hub import RESULTS
from torch import nn

from timm_eps import report
from timm_eps.report import (
    comparison_table,
    count_macs,
    count_parameters,
    draw_blocks,
    paired_latency,
    spread_of_ratios,
)  # fmt: skip
from timm_eps.surgery.branches import evaluating


def test_counts():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_parameters(model) == 3 * 8 * 9 + 8 * 16 * 5 + 5
    assert count_macs(model, torch.zeros(1, 3, 4, 4)) == 16 * 3 * 8 * 9 + 8 * 16 * 5


def test_removed_blocks_count_no_longer():
    image = torch.zeros(1, 3, 8, 8)
    dense, pruned = tiny_net(), tiny_net(removed=SLOTS[1:3])
    assert count_macs(dense, image) - count_macs(pruned, image) == 2 * 2 * 64 * 16 * 16 * 9
    assert count_parameters(dense) - count_parameters(pruned) == 2 * (2 * 16 * 16 * 9 + 2 * 2 * 16)


def number_printed_by(program: str) -> int:
    """Run in a new process, because this process may have held more memory before."""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
@pytest.mark.slow
def test_peak_memory_counts_what_is_gone_again():
    program = (
        "import torch; from timm_eps.report import peak_memory; before = peak_memory(); torch.ones(2**26); "
        "print(peak_memory() - before)"
    )
    assert number_printed_by(program) == pytest.approx(2**28, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can forget a peak")
@pytest.mark.slow
def test_a_peak_of_memory_is_forgotten():
    program = (
        "import torch; from timm_eps.report import peak_memory, reset_peak_memory; torch.ones(2**26); "
        "before = peak_memory(); reset_peak_memory(); print(before - peak_memory())"
    )
    assert number_printed_by(program) == pytest.approx(2**28, rel=0.2)


def test_paired_latency_keeps_modes():
    models = {"a": tiny_net().train(), "b": tiny_net(removed=SLOTS)}
    seconds = paired_latency(models, torch.zeros(1, 3, 8, 8), repeats=3)
    assert seconds.keys() == models.keys()
    assert all(value > 0 for value in seconds.values())
    assert models["a"].training
    assert not models["b"].training


def test_latency_is_that_of_the_forward_pass_alone(monkeypatch):
    """The time for preparing a model and restoring its modes grows with the number of modules."""

    @contextlib.contextmanager
    def slow(model):
        time.sleep(0.2)
        with evaluating(model):
            yield
        time.sleep(0.2)

    monkeypatch.setattr(report, "evaluating", slow)
    assert paired_latency({"a": nn.Identity()}, torch.zeros(1), repeats=3, warmup=0)["a"] < 0.1


def test_table():
    table = comparison_table({**RESULTS, "dense_eval_accuracy": 0.4, "dense_train_seconds": 10.0, "train_seconds": 5.0})
    assert table.splitlines() == [
        "| eps_resnet20 | dense | pruned | |",
        "|---|---:|---:|---:|",
        "| residual branches | 9 | 4 | −5 |",
        "| parameters | 100 | 40 | −60.0 % |",
        "| multiply-adds per image | 1,000 | 500 | −50.0 % |",
        "| latency at batch 1 | 2.0 ms | 1.0 ms | 2.00× faster |",
        "| latency at batch 128 | 200.0 ms | 100.0 ms | 2.00× faster |",
        "| training time | 10 s | 5 s | 0.50× |",
        "| accuracy | 40.00 % | 50.00 % | +10.00 points |",
    ]


def test_table_of_runtimes_with_the_spread_of_their_gain():
    onnx = {f"{prefix}onnx_latency_batch{size}_seconds": seconds
            for prefix, seconds in (("dense_", 0.004), ("", 0.001)) for size in (128, 1)}  # fmt: skip
    lines = comparison_table({**RESULTS, **onnx, "latency_batch1_speedup_quartiles": [1.9, 2.125]}).splitlines()
    assert [line for line in lines if "latency" in line] == [
        "| latency at batch 1 | 2.0 ms | 1.0 ms | 2.00 (1.90 to 2.12)× faster |",
        "| latency at batch 128 | 200.0 ms | 100.0 ms | 2.00× faster |",
        "| latency at batch 1, ONNX Runtime on CPUs | 4.0 ms | 1.0 ms | 4.00× faster |",
        "| latency at batch 128, ONNX Runtime on CPUs | 4.0 ms | 1.0 ms | 4.00× faster |",
    ]


def test_spread_is_that_of_ratios_turn_by_turn():
    drifting = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spread_of_ratios([2 * second for second in drifting], drifting) == [2.0, 2.0]
    assert spread_of_ratios([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == [2.0, 4.0]


@pytest.mark.parametrize("responses", [[0.0] * 9, [float("nan")] * 9, [float("inf"), *[1.0] * 8]])
def test_picture_of_odd_responses(tmp_path, responses):
    history = [
        {"epoch": 0, "epsilon": 0.0, "responses": dict(zip(SLOTS, responses, strict=True)), "closed": [], "removed": []}
    ]
    draw_blocks(SLOTS, [], history, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_picture_is_reproducible(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_blocks(SLOTS, SLOTS[:2], [], path, "title")
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("removed", [[], ["stages.0.blocks.1.drop_path"]])
def test_branches_that_were_not_measured_are_not_drawn_as_removed(tmp_path, removed):
    """Grey cells belong to removed branches. White cells belong to branches whose gate was the identity."""
    slots = [f"stages.0.blocks.{index}.drop_path" for index in range(3)]
    base = {"epsilon": 0.0, "closed": [], "removed": []}
    first = {**base, "epoch": 0, "responses": dict.fromkeys(slots, 1.0), "removed": removed}
    history = [first, *({**base, "epoch": epoch, "responses": {}} for epoch in range(1, 9))]
    draw_blocks(slots, removed, history, tmp_path / "blocks.png", "a title")
    pixels = np.asarray(Image.open(tmp_path / "blocks.png").convert("RGB"))
    grey = (pixels == (0xE5, 0xE7, 0xE9)).all(2).mean()
    assert (grey > 0.1) == bool(removed)
