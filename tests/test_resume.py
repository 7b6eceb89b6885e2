"""A training that is stopped, by whatever, and taken up again ends with the bytes it would have ended with."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train_hf import _one_thread, without_times  # noqa: F401  the fixture is for all tests here as well

import train_hf
from timm_eps import checkpoints

# 4 epochs of 4 batches, the last one smaller; blocks go after epochs 2 and 3.
SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "4", "--max_train_samples", "120"),
    *("--max_eval_samples", "40", "--per_device_train_batch_size", "32", "--keep", "3", "--num_threads", "1"),
    *("--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"),
]
EVERY_3 = ["--checkpointing_steps", "3"]
EPOCHS = ["--checkpointing_steps", "epoch"]
LATEST = ["--resume_from_checkpoint"]


def train_only(patched: pytest.MonkeyPatch) -> None:
    """What comes after the training has tests of its own, and takes longer than these trainings."""
    patched.setattr(train_hf, "check_reload", lambda *_: "not tried")
    patched.setattr(train_hf.report, "paired_latency", lambda pair, *_: dict.fromkeys(pair, 1.0))


@pytest.fixture(autouse=True)
def _only_training(monkeypatch):
    train_only(monkeypatch)


def run(out: Path, *arguments: str) -> dict:
    return train_hf.main([*SHORT, "--output_dir", str(out), *arguments])


def outcome(out: Path) -> tuple[bytes, dict]:
    return (out / "model.safetensors").read_bytes(), without_times(json.loads((out / "all_results.json").read_text()))


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoints.all_checkpoints(directory)]


def stopped_at(whole: Path, checkpoint: str, name: str = "stopped") -> Path:
    """The directory of a run as it was when a checkpoint was written, of the dense half if it says so."""
    out = whole.with_name(name)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    for path in (path for path in out.iterdir() if path.is_file()):
        path.unlink()
    half = (out / checkpoint).parent
    if half == out:
        shutil.rmtree(out / "dense", ignore_errors=True)
    for path in checkpoints.all_checkpoints(half):
        if int(path.name.partition("-")[2]) > int(checkpoint.partition("-")[2]):
            shutil.rmtree(path)
    return out


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "training.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run with a checkpoint every three steps, not to be written to."""
    with pytest.MonkeyPatch.context() as patched:
        train_only(patched)
        out = tmp_path_factory.mktemp("whole") / "out"
        results = run(out, *EVERY_3)
    assert results["blocks_kept"] == 3
    return out


def test_checkpoints_are_where_they_are_asked_for(whole):
    assert names(whole) == [f"checkpoint-{step}" for step in (3, 6, 9, 12, 15, 16)], "the last step as well"
    states = [state_of(path) for path in checkpoints.all_checkpoints(whole)]
    assert [(state["progress"]["epoch"], state["progress"]["batch"]) for state in states] == [
        (0, 3), (1, 2), (2, 1), (3, 0), (3, 3), (4, 0),
    ]  # fmt: skip
    removed = [len(state["pruner"]["removed"]) for state in states]
    assert removed[0] == 0 < removed[2] < removed[-1] == 6, "on both sides of removals"
    assert all(checkpoints.why_torn(path) is None for path in checkpoints.all_checkpoints(whole))


@pytest.mark.parametrize("step", [3, 6, 9, 12, 15, 16])
def test_from_any_checkpoint_to_the_same_end(whole, tmp_path, step, capsys):
    out = stopped_at(whole, f"checkpoint-{step}", name=f"stopped-{step}")
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert names(out) == names(whole)
    assert f"Going on from {out}/checkpoint-{step}: " in capsys.readouterr().out


def test_checkpoints_change_nothing(whole, tmp_path):
    run(tmp_path / "without")
    assert outcome(tmp_path / "without") == outcome(whole)


def folder_of_images(directory: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for index in range(count):
            folder = directory / split / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return [
        *("--train_dir", str(directory / "train"), "--validation_dir", str(directory / "val"), "--flip"),
        *("--max_train_samples", "38", "--per_device_train_batch_size", "10", "--image_size", "8"),
    ]


RESTARTING = [
    *("--lr_scheduler", "restarting", "--lr_milestones", "1", "2", "3"),
    *("--lr_restart_milestones", "1", "2", "3", "--lr_factors", "1", "0.5", "0.2", "0.1"),
]
JITTER = ["--color_jitter", "0.2", "0.2", "0.2"]


@pytest.mark.parametrize(
    ("arguments", "files", "stops"),
    [
        (EPOCHS, False, ["checkpoint-4", "checkpoint-8"]),
        ([*EVERY_3, "--optimizer", "adamw", "--learning_rate", "1e-3"], False, ["checkpoint-9"]),
        ([*EVERY_3, *RESTARTING], False, ["checkpoint-6", "checkpoint-12"]),
        ([*EVERY_3, "--lr_scheduler", "multistep", "--lr_milestones", "1", "2", "3"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--num_warmup_steps", "4"], False, ["checkpoint-3"]),
        (["--checkpointing_steps", "1", "--gradient_accumulation_steps", "3"], False, ["checkpoint-3", "checkpoint-5"]),
        ([*EVERY_3, "--weight_decay_drop", "2", "0.5"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--no_live_removal"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--channels_last"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--sync_batchnorm"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--side_loss_weight", "0.3", "--nesterov"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--model_args", '{"drop_rate": 0.3}'], False, ["checkpoint-9"]),
        ([*EVERY_3, "--augmentation", "distort"], False, ["checkpoint-9"]),
        ([*EVERY_3, "--compare_dense"], False, ["checkpoint-9", "dense/checkpoint-6", "dense/checkpoint-16"]),
        ([*EVERY_3, "--augmentation", "resized_crop", *JITTER], True, ["checkpoint-9"]),
        ([*EVERY_3, "--streaming", "--shuffle_buffer_size", "16"], True, ["checkpoint-9", "checkpoint-12"]),
        ([*EVERY_3, "--streaming", "--augmentation", "resized_crop"], True, ["checkpoint-6"]),
    ],
    ids=lambda value: "-".join(value).replace("--", "")[:60] if isinstance(value, list) else "",
)
def test_whatever_is_trained(tmp_path, arguments, files, stops):
    arguments = [*(folder_of_images(tmp_path / "data") if files else []), *arguments]
    run(tmp_path / "whole", *arguments)
    for stop in stops:
        out = stopped_at(tmp_path / "whole", stop)
        run(out, *arguments, *LATEST)
        assert outcome(out) == outcome(tmp_path / "whole"), stop
        assert names(out) == names(tmp_path / "whole"), stop


def test_again_and_again(whole):
    """Stopped after each checkpoint in turn, which is written by a run that was itself taken up."""
    out = stopped_at(whole, "checkpoint-3", name="in-turn")
    for step in (3, 6, 9, 12, 15):
        stopped_at(out, f"checkpoint-{step}", name="taken-up")
        shutil.rmtree(out)
        out.with_name("taken-up").rename(out)
        run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)


def test_latest_begins_anew_where_there_is_none(whole, tmp_path):
    run(tmp_path / "out", *EVERY_3, *LATEST)
    assert outcome(tmp_path / "out") == outcome(whole)


def test_of_two_the_whole_one(whole, caplog):
    out = stopped_at(whole, "checkpoint-9", name="torn")
    torn = out / "checkpoint-9"
    weights = torn / "optimizer.bin"
    weights.write_bytes(weights.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "timm_eps"), pytest.raises(ValueError, match="not a whole checkpoint") as e:
        run(out, *EVERY_3, "--resume_from_checkpoint", str(torn))
    assert f"{torn} " in str(e.value)
    assert "optimizer.bin is not as it was written" in str(e.value)
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert names(out) == names(whole)
    assert f"{torn} is not whole (optimizer.bin is not as it was written)" in caplog.text
    assert checkpoints.why_torn(torn) is None, "written anew"


@pytest.mark.parametrize("limit", ["1", "2"])
def test_a_torn_one_and_a_limit(whole, limit, monkeypatch):
    """Stopped once more after the next checkpoint, there still is one to go on from."""
    out = stopped_at(whole, "checkpoint-15", name=f"torn-{limit}")
    (out / "checkpoint-15/model.safetensors").unlink()
    steps = iter([1, 0])
    commit = checkpoints.commit

    def commit_once(staging):
        if not next(steps):
            raise KeyboardInterrupt
        return commit(staging)

    monkeypatch.setattr(checkpoints, "commit", commit_once)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--checkpointing_steps", "1", "--checkpoints_total_limit", limit, *LATEST)
    assert checkpoints.newest_whole(out) == out / "checkpoint-13"


def test_an_explicit_one_may_be_of_another_directory(whole, tmp_path):
    """On other threads as well: the course of a training does not depend on them."""
    chosen = ["--resume_from_checkpoint", str(whole / "checkpoint-6"), "--num_threads", "2"]
    run(tmp_path / "out", *EVERY_3, *chosen, "--per_device_eval_batch_size", "7")
    found, expected = outcome(tmp_path / "out")[1], outcome(whole)[1]
    assert found["removed"] == expected["removed"]
    assert found["train_loss_by_epoch"] == pytest.approx(expected["train_loss_by_epoch"], rel=1e-3)
    assert names(tmp_path / "out") == [name for name in names(whole) if name not in ("checkpoint-3", "checkpoint-6")]


def test_an_earlier_one_than_the_last(whole):
    out = stopped_at(whole, "checkpoint-12", name="earlier")
    run(out, *EVERY_3, "--resume_from_checkpoint", str(out / "checkpoint-6"))
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize(
    ("arguments", "name", "before", "now"),
    [
        (["--keep", "4"], "keep", "3", "4"),
        (["--seed", "1"], "seed", "0", "1"),
        (["--learning_rate", "0.05"], "learning_rate", "0.1", "0.05"),
        (["--per_device_train_batch_size", "40"], "per_device_train_batch_size", "32", "40"),
        (["--num_train_epochs", "5"], "num_train_epochs", "4", "5"),
        (["--optimizer", "adamw"], "optimizer", "sgd", "adamw"),
        (["--momentum", "0.8"], "momentum", "0.9", "0.8"),
        (["--weight_decay", "0"], "weight_decay", "0.005", "0.0"),
        (["--weight_decay_drop", "2", "0.5"], "weight_decay_drop", "None", "[2.0, 0.5]"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps", "1", "2"),
        (["--max_train_samples", "121"], "max_train_samples", "120", "121"),
        (["--max_eval_samples", "30"], "max_eval_samples", "40", "30"),
        (["--architecture", "eps_resnet32"], "architecture", "eps_resnet20", "eps_resnet32"),
        (["--patience", "2"], "patience", "1", "2"),
        (["--ramp_epochs", "1"], "ramp_epochs", "2", "1"),
        (["--no_live_removal"], "no_live_removal", "None", "True"),
        (["--fold", "1"], "fold", "0", "1"),
        (["--padding", "2"], "padding", "None", "2"),
        (["--augmentation", "distort"], "augmentation", "None", "distort"),
        (["--channels_last"], "channels_last", "None", "True"),
        (["--sync_batchnorm"], "sync_batchnorm", "None", "True"),
        (["--lr_scheduler", "multistep"], "lr_(decay_start|factors|milestones|scheduler)", ".*", ".*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_run_does_not_go_on_from_it(whole, tmp_path, arguments, name, before, now):
    message = rf"The run of .*checkpoint-6 has {name} {before}, this one {now}: "
    message = message.replace("[2", r"\[2").replace("5]", r"5\]")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments, "--resume_from_checkpoint", str(whole / "checkpoint-6"))


def test_another_run_does_not_go_on_from_the_latest_either(whole):
    """It neither goes on nor begins anew, which would mix the checkpoints of two runs."""
    out = stopped_at(whole, "checkpoint-6", name="latest-of-another")
    with pytest.raises(ValueError, match=r"checkpoint-6 has seed 0, this one 1: it would not go on as it began"):
        run(out, "--seed", "1", *EVERY_3, *LATEST)
    assert names(out) == ["checkpoint-3", "checkpoint-6"]


def test_a_new_run_does_not_mix_its_checkpoints_with_others(whole):
    out = stopped_at(whole, "checkpoint-6", name="mixed")
    with pytest.raises(ValueError, match=r"holds checkpoints of a run before, the last one checkpoint-6: go on with"):
        run(out, *EVERY_3)
    assert names(out) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "manifest.json is missing"), (".", "manifest.json is missing")]
)
def test_what_is_no_checkpoint_is_refused(tmp_path, path, reason):
    with pytest.raises(ValueError, match=rf"is not a whole checkpoint \({reason}\)"):
        run(tmp_path, "--resume_from_checkpoint", str(tmp_path / path))


def test_the_dense_half_and_the_other_are_not_mistaken_for_each_other(tmp_path):
    """Their checkpoints have the same names and were written with the same arguments."""
    both = ["--compare_dense", "--num_train_epochs", "1", *EPOCHS]
    run(tmp_path / "out", *both)
    dense = tmp_path / "out/dense/checkpoint-4"
    with pytest.raises(ValueError, match="dense"):
        run(tmp_path / "other", *both, "--resume_from_checkpoint", str(dense))
    with pytest.raises(ValueError, match="dense"):
        shutil.copytree(dense.parent, tmp_path / "other", dirs_exist_ok=True)
        run(tmp_path / "other", *both, *LATEST)


def test_dense_checkpoints_of_a_run_before_are_found_before_the_training(tmp_path):
    both = ["--compare_dense", "--num_train_epochs", "1", *EPOCHS]
    run(tmp_path / "out", *both)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of a run before"):
        run(tmp_path / "out", *both)
    assert not (tmp_path / "out/checkpoint-4").exists(), "said before one half was trained for nothing"


@pytest.mark.parametrize("limit", [1, 2])
def test_only_the_last_ones_are_kept(whole, tmp_path, limit, monkeypatch):
    most = 0
    save = train_hf.Training.save

    def save_and_count(self):
        nonlocal most
        save(self)
        most = max(most, len(names(self.directory)))

    monkeypatch.setattr(train_hf.Training, "save", save_and_count)
    run(tmp_path, *EVERY_3, "--checkpoints_total_limit", str(limit))
    assert names(tmp_path) == names(whole)[-limit:]
    assert most == limit
    assert outcome(tmp_path) == outcome(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
import train_hf
from timm_eps import EpsilonPruner, checkpoints

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(number, function, when=lambda found: True, after=False):
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        if not after:
            calls += 1
            if calls == number:
                kill()
        found = function(*args, **kwargs)
        if after and when(found):
            calls += 1
            if calls == number:
                kill()
        return found
    return call

moment, *arguments = sys.argv[1:]
if moment == "before the manifest":
    checkpoints.commit = at_call(3, checkpoints.commit)
elif moment == "before the rename":
    Path.rename = at_call(3, Path.rename)
elif moment == "after a removal":
    EpsilonPruner.step = at_call(1, EpsilonPruner.step, when=bool, after=True)
elif moment == "in an epoch":
    train_hf.Training.take_step = at_call(11, train_hf.Training.take_step)
train_hf.check_reload = lambda *_: "not tried"
train_hf.report.paired_latency = lambda pair, *_: dict.fromkeys(pair, 1.0)
train_hf.main(arguments)
"""


def in_a_process(out: Path, moment: str, *arguments: str) -> subprocess.Popen:
    """The run with checkpoints, in a process of its own that ends itself at a moment, or does not."""
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, moment, *SHORT, "--output_dir", str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_hf.__file__).parent)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "left", "staging"),
    [
        ("before the manifest", [3, 6], True),
        ("before the rename", [3, 6], True),
        ("after a removal", [3, 6], False),
        ("in an epoch", [3, 6, 9], False),
    ],
)
def test_killed(whole, tmp_path, moment, left, staging):
    out = tmp_path / "out"
    process = in_a_process(out, moment, *EVERY_3)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    assert names(out) == [f"checkpoint-{step}" for step in left]
    assert checkpoints.staging_of(out, 9).exists() == staging
    assert (checkpoints.staging_of(out, 9) / checkpoints.MANIFEST).exists() == (moment == "before the rename")
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert names(out) == names(whole)
    assert not list(out.glob(".checkpoint*")), "nothing half is left"


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    """Ten runs, each killed at a random moment of its duration and then taken up; the moments are printed."""
    often = ["--checkpointing_steps", "2", "--num_train_epochs", "12", "--ramp_epochs", "8"]
    whole = in_a_process(tmp_path / "whole", "never", *often)
    begin = time.monotonic()
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    duration = time.monotonic() - begin
    expected = outcome(tmp_path / "whole")
    moments = sorted(random.Random(0).uniform(0, duration) for _ in range(10))
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        process = in_a_process(out, "never", *often)
        time.sleep(moment)
        process.kill()
        process.communicate()
        found = names(out) if out.exists() else []
        halves = sorted(path.name for path in out.glob(".checkpoint*"))
        print(f"killed after {moment:.2f} of {duration:.2f} s: {found[-1:] or 'no checkpoint'}, unfinished {halves}")
        again = in_a_process(out, "never", *often, *LATEST)
        said, _ = again.communicate(timeout=300)
        assert again.returncode == 0, said
        assert outcome(out) == expected, moment
