"""Two processes train together like one process; few starts of torchrun."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_resume import train_only
from test_train_hf import _one_thread, without_times  # noqa: F401
from timm.layers import BatchNormAct2d
from torch import nn
from transformers import AutoModelForImageClassification

import train_hf
from timm_eps.training import checkpoints, data
from timm_eps.training.sync_batchnorm import synchronize_batchnorm

ROOT = Path(__file__).parent.parent
SHORT = [
    *("--architecture", "eps_resnet20", "--num_threads", "1", "--max_eval_samples", "45"),
    *("--per_device_eval_batch_size", "7", "--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"),
]
# 4 epochs of 8 batches, the last one smaller. Blocks are removed in the third and the fourth epoch.
PRUNED = ["--num_train_epochs", "4", "--max_train_samples", "124", "--keep", "3", "--checkpointing_steps", "5"]
LEARNED = [
    *(
        "--num_train_epochs",
        "4",
        "--max_train_samples",
        "200",
        "--no_gates",
        "--padding",
        "0",
        "--weight_decay",
        "5e-4",
    ),
]
GENTLE = ["--num_train_epochs", "1", "--max_train_samples", "96", "--learning_rate", "1e-3"]
ONE_STEP = ["--num_train_epochs", "1", "--max_train_samples", "64"]


def batch(size: int) -> list[str]:
    return ["--per_device_train_batch_size", str(size)]


def launch(out: Path, todo: dict[str, list[str] | None]) -> subprocess.CompletedProcess:
    """Run train_two_processes.py. The name of a run is its directory."""
    (out / "todo.json").write_text(
        json.dumps({k: v and [*SHORT, *v, "--output_dir", str(out / k)] for k, v in todo.items()})
    )
    script = str(Path(__file__).with_name("train_two_processes.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, timeout=240,
    )  # fmt: skip
    # Text mode would split the progress bar into one line per step.
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(autouse=True)
def _only_training(monkeypatch):
    train_only(monkeypatch)


def alone(out: Path, *arguments: str) -> dict:
    return train_hf.main([*SHORT, *arguments, "--output_dir", str(out)])


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict:
    """Findings of both processes from one start, with its directory ``out`` and its output ``said``."""
    out = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patched:
        train_only(patched)
        alone(out / "alone", *ONE_STEP, *batch(32), "--checkpointing_steps", "1")
    resume = ["--resume_from_checkpoint", str(out / "pruned/checkpoint-20")]
    done = launch(
        out,
        {
            "decisions": None,
            "batch_norms": None,
            "wrapped": None,
            "pruned": [*PRUNED, *batch(8)],
            "resumed": [*PRUNED, *batch(8), *resume],
            "stopped": [*PRUNED, *batch(8)],
            "taken up": [*PRUNED, *batch(8), "--resume_from_checkpoint", str(out / "stopped/checkpoint-13")],
            "refused": [*ONE_STEP, *batch(32), "--resume_from_checkpoint", str(out / "alone/checkpoint-2")],
            "learned": [*LEARNED, *batch(8)],
            "one step": [*ONE_STEP, *batch(32)],
            "one step, synchronised": [*ONE_STEP, *batch(32), "--sync_batchnorm"],
            "accumulated": [*GENTLE, *batch(8), "--sync_batchnorm", "--gradient_accumulation_steps", "4"],
        },
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = {"out": out, "said": done.stdout, "errors": done.stderr}
    return found | {rank: json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)}


RUNS = ["pruned", "resumed", "taken up", "learned", "one step", "one step, synchronised", "accumulated"]


@pytest.mark.parametrize("name", RUNS)
def test_both_have_the_same_model_at_the_end(both, name):
    one, other = both[0][name], both[1][name]
    for what in ("removed", "parameters", "buffers", "state", "removed_in", "synchronised"):
        assert one[what] == other[what], what
    assert without_times(one["results"]) == without_times(other["results"])
    assert one["optimizer_fits"]
    assert other["optimizer_fits"]


def test_blocks_go_while_both_train(both):
    """Gradients are still synchronised after the removal: the parameters change, and are equal after each epoch."""
    found = both[0]["pruned"]
    assert len(found["removed"]) == 6
    assert found["removed_in"][0] < 3, "they trained on after it"
    assert len(set(found["synchronised"])) == 4


@pytest.mark.parametrize("name", ["pruned", "learned"])
def test_what_is_saved_is_what_was_measured(both, name):
    """Both processes together evaluate each image once, although the number of images is not divisible."""
    out, results = both["out"] / name, both[0][name]["results"]
    assert results["eval_images"] == 45
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    raw = data.sample(data.load_digits(0)["validation"], 45, 0)
    split = data.ImageTensors.decode(raw, model.config.pretrained_cfg)
    with torch.no_grad():
        logits = model(data.Normalize(model.config.pretrained_cfg)(split.images)).logits
    assert results["eval_accuracy"] == (logits.argmax(-1) == split.labels).sum().item() / 45
    assert name != "learned" or results["eval_accuracy"] > 0.4, "or it would show little"
    assert json.loads((out / "all_results.json").read_text())["num_processes"] == 2


def test_taken_up_within_an_epoch(both):
    """Checkpoint 20 is in the third epoch, after the first removal."""
    out = both["out"]
    state = json.loads((out / "pruned/checkpoint-20/training.json").read_text())
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (2, 4)
    assert 0 < len(state["pruner"]["removed"]) < 6
    assert (out / "resumed/model.safetensors").read_bytes() == (out / "pruned/model.safetensors").read_bytes()
    for what in ("parameters", "buffers", "removed"):
        assert both[1]["resumed"][what] == both[1]["pruned"][what]
    found = [without_times(json.loads((out / name / "all_results.json").read_text())) for name in ("resumed", "pruned")]
    assert found[0] == found[1]


def test_told_to_stop_both_do_at_the_same_step_and_go_on_bit_by_bit(both):
    """One process is told at step 12, both know one step later, and no process waits in between."""
    out = both["out"]
    for rank in (0, 1):
        assert both[rank]["stopped"].startswith("Stopped by SIGTERM after step 13; use the same arguments")
    steps = [path.name for path in checkpoints.all_checkpoints(out / "stopped")]
    assert steps == ["checkpoint-5", "checkpoint-10", "checkpoint-13"]
    assert (out / "taken up/model.safetensors").read_bytes() == (out / "pruned/model.safetensors").read_bytes()
    found = [
        without_times(json.loads((out / name / "all_results.json").read_text())) for name in ("taken up", "pruned")
    ]
    assert found[0] == found[1]


def test_another_number_of_processes_does_not_go_on(both, tmp_path):
    for rank in (0, 1):
        assert "has number of processes 1, but this one 2. " in both[rank]["refused"]
    with pytest.raises(ValueError, match=r"has number of processes 2, but this one 1. "):
        alone(tmp_path, *PRUNED, *batch(8), "--resume_from_checkpoint", str(both["out"] / "pruned/checkpoint-20"))


def test_one_synchronised_step_is_that_of_one_process(both, tmp_path):
    expected = alone(tmp_path, *ONE_STEP, *batch(64))["train_loss_by_epoch"]
    assert both[0]["one step, synchronised"]["results"]["train_loss_by_epoch"] == pytest.approx(expected, abs=1e-6)
    assert both[0]["one step"]["results"]["train_loss_by_epoch"] != pytest.approx(expected, abs=1e-5), "it matters"


def test_one_step_is_the_mean_over_the_halves(both, tmp_path, monkeypatch):
    """Without synchronised layers each process normalises by its own batch."""
    losses = []

    def halves(run, epoch, bar):
        [(images, labels, _)] = run.batches.epoch(epoch)
        model = run.network.train()
        for half, answers in zip(*(each.chunk(2) for each in run.read(images, labels)), strict=True):
            losses.append(copy.deepcopy(model)(half, labels=answers).loss.item())
        raise KeyboardInterrupt

    monkeypatch.setattr(train_hf, "train_epoch", halves)
    with pytest.raises(KeyboardInterrupt):
        alone(tmp_path, *ONE_STEP, *batch(64))
    assert both[0]["one step"]["results"]["train_loss_by_epoch"] == [pytest.approx(sum(losses) / 2, abs=1e-6)]


def check_near(found: Path, expected: Path) -> None:
    """The rounding differs, the course does not."""
    losses = [json.loads((path / "all_results.json").read_text())["train_loss_by_epoch"] for path in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    saved, others = (AutoModelForImageClassification.from_pretrained(path).state_dict() for path in (found, expected))
    assert saved.keys() == others.keys()
    for key, value in saved.items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-4, msg=key)


def test_some_synchronised_steps_stay_near_those_of_one_process(both, tmp_path):
    """Two steps, of four and two batches."""
    alone(tmp_path, *GENTLE, *batch(16), "--gradient_accumulation_steps", "4")
    check_near(both["out"] / "accumulated", tmp_path)


@pytest.mark.slow
def test_three_synchronised_steps_stay_near_those_of_one_process(tmp_path):
    done = launch(tmp_path, {"gentle": [*GENTLE, *batch(16), "--sync_batchnorm"]})
    assert done.returncode == 0, done.stderr[-4000:]
    alone(tmp_path / "alone", *GENTLE, *batch(32))
    check_near(tmp_path / "gentle", tmp_path / "alone")


def test_only_the_main_process_speaks_and_writes(both):
    said = both["said"]
    for name in RUNS:
        assert said.count(f"Saved in {both['out'] / name}.") == 1
        assert {path.name for path in (both["out"] / name).iterdir() if path.is_file()} == {
            "README.md", "all_results.json", "blocks.png", "config.json", "model.safetensors",
        }  # fmt: skip
    assert said.count("Training eps_resnet20 on") == len(RUNS) + 2, "and those that were refused and stopped"
    assert said.count("Resuming from") == 2
    # A progress bar overwrites itself until a line break.
    bars = [line for line in both["errors"].split("\n") if "epoch 4/4: 100%" in line.rpartition("\r")[2]]
    assert len(bars) == 4, "one for each run of four epochs"
    for checkpoint in checkpoints.all_checkpoints(both["out"] / "pruned"):
        assert checkpoints.why_torn(checkpoint) is None
        assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2, "what is random differs between them"


def test_a_block_goes_when_all_agree(both):
    for rank in (0, 1):
        found = both[rank]["decisions"]
        assert found["shared"] == pytest.approx([2.0, 0.7, *[3.0] * 7]), "the largest of both"
        assert found["importances"] == pytest.approx([*[2.5] * 3, 1.5, *[2.5] * 4]), "the mean of both"
        assert found["due"] == [found["slots"][4]]
        assert found["removed"] == found["slots"][1:2], "the first one is below ε in one process only"


@pytest.mark.parametrize("layer", ["BatchNorm2d", "cumulative", "without affine", "BatchNormAct2d", "without act"])
def test_batch_norm_is_that_of_one_process(both, layer):
    """On batches of 3 and 6 images, in three steps."""
    for rank in (0, 1):
        found = both[rank]["batch_norms"][layer]
        for what in ("output", "input", "mean"):
            assert found[what] < 1e-6, what
        for what in ("weight", "bias", "var"):  # sums of a hundred terms of about 1, and 9
            assert found[what] < 1e-5, what
        assert found["keys"]
        assert found["tracked"]
        assert found["evaluated"], "bit by bit the plain layer"


def test_batch_norm_under_data_parallel(both):
    assert both[0]["wrapped"]
    assert both[1]["wrapped"]


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm_of_one_process_is_the_plain_one(make):
    plain = make(4)
    shared = synchronize_batchnorm(nn.Sequential(copy.deepcopy(plain)))[0]
    for train in (True, True, False):
        x = torch.randn(5, 4, 3, 3)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = shared.train(train)(one), plain.train(train)(other)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(one.grad, other.grad)
        for key, value in plain.state_dict().items():
            assert torch.equal(shared.state_dict()[key], value)
    assert list(shared.state_dict()) == list(plain.state_dict())


def test_synchronising_exchanges_nothing_but_the_arithmetic():
    """Parameters and buffers stay the same objects, so existing optimizers and names in files still fit."""
    model = timm.create_model("eps_resnet20")
    before = [*model.named_parameters(), *model.named_buffers()]
    assert synchronize_batchnorm(model) is model
    after = [*model.named_parameters(), *model.named_buffers()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_one_process_killed_right_after_a_removal(both, tmp_path):
    """The other process ends too. Both resume from the last checkpoint and reach the same result."""
    done = launch(tmp_path, {"killed": [*PRUNED, *batch(8)]})
    assert done.returncode != 0
    assert f"exitcode  : -{signal.SIGKILL.value}" in done.stderr
    assert checkpoints.newest_whole(tmp_path / "killed").name == "checkpoint-15"
    (tmp_path / "on").mkdir()
    (tmp_path / "killed").rename(tmp_path / "on/again")
    done = launch(tmp_path / "on", {"again": [*PRUNED, *batch(8), "--resume_from_checkpoint"]})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Resuming from" in done.stdout
    assert (tmp_path / "on/again/model.safetensors").read_bytes() == (
        both["out"] / "pruned/model.safetensors"
    ).read_bytes()
