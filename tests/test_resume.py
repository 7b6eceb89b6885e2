"""A stopped training resumes and ends with the same bytes as an uninterrupted one."""

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
from conftest import draw_nothing, mostly_slow
from PIL import Image
from safetensors.torch import save_file
from test_train_hf import _one_thread, without_times  # noqa: F401  the fixture is for all tests here as well

import train_hf
from timm_eps.training import checkpoints, run_checkpoints

# 4 epochs of 4 batches, the last one smaller. Blocks are removed after epochs 2 and 3.
SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "4", "--max_train_samples", "120"),
    *("--max_eval_samples", "40", "--per_device_train_batch_size", "32", "--keep", "3", "--num_threads", "1"),
    *("--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"),
]
EVERY_3 = ["--checkpointing_steps", "3"]
LATEST = ["--resume_from_checkpoint"]


def train_only(patched: pytest.MonkeyPatch) -> None:
    """Skip the steps after the training: other tests cover them, and they take longer than these trainings."""
    patched.setattr(train_hf.publishing, "check_reload", lambda *_: "not tried")
    patched.setattr(train_hf.publishing, "paired_seconds", lambda pair, *_: dict.fromkeys(pair, [1.0] * 3))
    draw_nothing(patched)


REAL_SAVE = train_hf.publishing.save


def save_weights(model, output_dir: str, remedy, *, results: dict, **others) -> None:
    """Replacement for :func:`.publishing.save`: a directory with only the weights and results."""
    save_file(dict(model.timm_model.state_dict()), Path(output_dir) / "model.safetensors")
    (Path(output_dir) / "all_results.json").write_text(json.dumps(results))


def weights_only(patched: pytest.MonkeyPatch) -> None:
    """:func:`train_only`, plus the files that :func:`outcome` reads."""
    train_only(patched)
    patched.setattr(train_hf.publishing, "save", save_weights)


@pytest.fixture(autouse=True)
def _weights_only(monkeypatch):
    weights_only(monkeypatch)


def run(out: Path, *arguments: str) -> dict:
    return train_hf.main([*SHORT, "--output_dir", str(out), *arguments])


def outcome(out: Path) -> tuple[bytes, dict]:
    return (out / "model.safetensors").read_bytes(), without_times(json.loads((out / "all_results.json").read_text()))


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoints.all_checkpoints(directory)]


def written(out: Path) -> dict[str, bytes]:
    """Contents of all checkpoints, without times and hashes of times."""
    found = {}
    for checkpoint in [*checkpoints.all_checkpoints(out), *checkpoints.all_checkpoints(out / "dense")]:
        for path in checkpoint.iterdir():
            if path.name == "training.json":
                state = state_of(checkpoint)
                del state["progress"]["seconds"]
                found[f"{checkpoint.relative_to(out)}/{path.name}"] = json.dumps(state).encode()
            elif path.name != checkpoints.MANIFEST:
                found[f"{checkpoint.relative_to(out)}/{path.name}"] = path.read_bytes()
    return found


def stopped_at(whole: Path, checkpoint: str, name: str = "stopped") -> Path:
    """The directory of a run as it was when a checkpoint was written, optionally of the dense run."""
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
    """An uninterrupted run with a checkpoint every three steps. Tests must not write to it."""
    with pytest.MonkeyPatch.context() as patched:
        weights_only(patched)
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


@pytest.mark.parametrize("step", mostly_slow([3, 6, 9, 12, 15, 16], 1, 3))
def test_from_any_checkpoint_to_the_same_end(whole, tmp_path, step, capsys):
    out = stopped_at(whole, f"checkpoint-{step}", name=f"stopped-{step}")
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert written(out) == written(whole), "and so whoever goes on from what is written now"
    assert f"Resuming from {out}/checkpoint-{step}: " in capsys.readouterr().out


def test_checkpoints_change_nothing(whole, tmp_path):
    run(tmp_path / "without")
    assert outcome(tmp_path / "without") == outcome(whole)


def test_epochs_of_so_many_steps_are_taken_up_too(tmp_path):
    """Epochs of three steps, while a pass has four, so they end within a pass. Importances are resumed too."""
    steps = ["--steps_per_epoch", "3", "--checkpointing_steps", "4", "--criterion", "importance"]
    results = run(tmp_path / "whole", *steps)
    assert results["blocks_kept"] == 3, "blocks go by these epochs"
    assert len(results["eval_accuracy_by_epoch"]) == 4
    assert names(tmp_path / "whole") == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    out = stopped_at(tmp_path / "whole", "checkpoint-4")
    run(out, *steps, *LATEST)
    assert outcome(out) == outcome(tmp_path / "whole")


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


RESTARTING = "--lr_scheduler restarting --lr_milestones 1 2 3 --lr_restart_milestones 1 2 3 --lr_factors 1 0.5 0.2 0.1"


@pytest.mark.parametrize(
    ("arguments", "stop"),
    mostly_slow(
        [
            ("--checkpointing_steps epoch", "checkpoint-8"),
            ("--optimizer adamw --learning_rate 1e-3 --num_warmup_steps 4 --side_loss_weight 0.3", "checkpoint-9"),
            (f"{RESTARTING} --weight_decay_drop 2 0.5 --nesterov", "checkpoint-6"),
            ("--lr_scheduler multistep --lr_milestones 1 2 3 --augmentation distort --channels_last", "checkpoint-9"),
            ("--gradient_accumulation_steps 3", "checkpoint-3"),
            ("--no_live_removal --padding 2", "checkpoint-9"),
            ('--sync_batchnorm --model_args {"drop_rate":0.3}', "checkpoint-9"),
            ("--compare_dense", "dense/checkpoint-6"),
            ("--augmentation resized_crop --color_jitter 0.2 0.2 0.2", "checkpoint-9"),
            ("--streaming --shuffle_buffer_size 16 --augmentation resized_crop", "checkpoint-12"),
        ],
        2,
        4,
        9,
    ),
)
def test_whatever_is_trained(tmp_path, arguments, stop):
    of_files = "resized_crop" in arguments
    arguments = [*(folder_of_images(tmp_path / "data") if of_files else []), *EVERY_3, *arguments.split()]
    run(tmp_path / "whole", *arguments)
    out = stopped_at(tmp_path / "whole", stop)
    run(out, *arguments, *LATEST)
    assert outcome(out) == outcome(tmp_path / "whole")
    assert written(out) == written(tmp_path / "whole")


def test_latest_begins_anew_where_there_is_none(whole, tmp_path):
    run(tmp_path / "out", *EVERY_3, *LATEST)
    assert outcome(tmp_path / "out") == outcome(whole)


def test_of_two_the_whole_one(whole, caplog):
    out = stopped_at(whole, "checkpoint-9", name="torn")
    torn = out / "checkpoint-9"
    weights = torn / "optimizer.bin"
    weights.write_bytes(weights.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "timm_eps"), pytest.raises(ValueError, match="not an intact checkpoint") as e:
        run(out, *EVERY_3, "--resume_from_checkpoint", str(torn))
    assert f"{torn} " in str(e.value)
    assert "optimizer.bin was changed" in str(e.value)
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert names(out) == names(whole)
    assert f"{torn} is damaged (optimizer.bin was changed)" in caplog.text
    assert checkpoints.why_torn(torn) is None, "written anew"


def test_a_torn_one_and_a_limit(whole, monkeypatch):
    """After another stop behind the next checkpoint, an intact checkpoint remains."""
    out = stopped_at(whole, "checkpoint-15", name="torn-and-limit")
    (out / "checkpoint-15/model.safetensors").unlink()
    steps = iter([1, 0])
    commit = checkpoints.commit

    def commit_once(staging):
        if not next(steps):
            raise KeyboardInterrupt
        return commit(staging)

    monkeypatch.setattr(checkpoints, "commit", commit_once)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1", *LATEST)
    assert checkpoints.newest_whole(out) == out / "checkpoint-13"


def test_an_explicit_one_may_be_of_another_directory(whole, tmp_path):
    """Also with another number of threads, which does not affect a training."""
    chosen = ["--resume_from_checkpoint", str(whole / "checkpoint-15"), "--num_threads", "2"]
    run(tmp_path / "out", *EVERY_3, *chosen, "--per_device_eval_batch_size", "7")
    found, expected = outcome(tmp_path / "out")[1], outcome(whole)[1]
    assert found["removed"] == expected["removed"]
    assert found["train_loss_by_epoch"] == pytest.approx(expected["train_loss_by_epoch"], rel=1e-3)
    assert names(tmp_path / "out") == ["checkpoint-16"]


def test_an_earlier_one_than_the_last(whole):
    out = stopped_at(whole, "checkpoint-12", name="earlier")
    run(out, *EVERY_3, "--resume_from_checkpoint", str(out / "checkpoint-6"))
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize(
    ("arguments", "name", "before", "now"),
    mostly_slow(
        [
            (["--keep", "4"], "keep", "3", "4"),
            (["--seed", "1"], "seed", "0", "1"),
            (["--learning_rate", "0.05"], "learning_rate", "0.1", "0.05"),
            (["--per_device_train_batch_size", "40"], "per_device_train_batch_size", "32", "40"),
            (["--num_train_epochs", "5"], "num_train_epochs", "4", "5"),
            (["--weight_decay_drop", "2", "0.5"], "weight_decay_drop", "None", "[2.0, 0.5]"),
            (["--max_train_samples", "121"], "max_train_samples", "120", "121"),
            (["--architecture", "eps_resnet32"], "architecture", "eps_resnet20", "eps_resnet32"),
            (["--no_live_removal"], "no_live_removal", "None", "True"),
            (["--lr_scheduler", "multistep"], "lr_(decay_start|factors|milestones|scheduler)", ".*", ".*"),
        ],
        0,
        7,
        9,
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_run_does_not_go_on_from_it(whole, tmp_path, arguments, name, before, now):
    message = rf"The run of .*checkpoint-6 has {name} {before}, but this one {now}. "
    message = message.replace("[2", r"\[2").replace("5]", r"5\]")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments, "--resume_from_checkpoint", str(whole / "checkpoint-6"))


def test_another_run_does_not_go_on_from_the_latest_either(whole):
    """The run neither resumes nor starts anew, because that would mix the checkpoints of two runs."""
    out = stopped_at(whole, "checkpoint-6", name="latest-of-another")
    with pytest.raises(ValueError, match=r"checkpoint-6 has seed 0, but this one 1. Use the same arguments"):
        run(out, "--seed", "1", *EVERY_3, *LATEST)
    assert names(out) == ["checkpoint-3", "checkpoint-6"]


def test_a_new_run_does_not_mix_its_checkpoints_with_others(whole):
    out = stopped_at(whole, "checkpoint-6", name="mixed")
    with pytest.raises(
        ValueError, match=r"contains checkpoints of an earlier run, the last one checkpoint-6. Resume it with"
    ):
        run(out, *EVERY_3)
    assert names(out) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "manifest.json is missing"), (".", "manifest.json is missing")]
)
def test_what_is_no_checkpoint_is_refused(tmp_path, path, reason):
    with pytest.raises(ValueError, match=rf"is not an intact checkpoint \({reason}\)"):
        run(tmp_path, "--resume_from_checkpoint", str(tmp_path / path))


def test_the_dense_half_and_the_other_are_not_mistaken_for_each_other(tmp_path):
    """The checkpoints of both runs have equal names and equal arguments."""
    both = ["--compare_dense", "--num_train_epochs", "1", "--checkpointing_steps", "epoch"]
    run(tmp_path / "out", *both)
    dense = tmp_path / "out/dense/checkpoint-4"
    with pytest.raises(ValueError, match="dense"):
        run(tmp_path / "other", *both, "--resume_from_checkpoint", str(dense))
    shutil.copytree(dense.parent, tmp_path / "other", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="dense"):
        run(tmp_path / "other", *both, *LATEST)


def test_dense_checkpoints_of_a_run_before_are_found_before_the_training(tmp_path):
    both = ["--compare_dense", "--num_train_epochs", "1", "--checkpointing_steps", "epoch"]
    run(tmp_path / "out", *both)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(ValueError, match="contains checkpoints of an earlier run"):
        run(tmp_path / "out", *both)
    assert not (tmp_path / "out/checkpoint-4").exists(), "said before one half was trained for nothing"


@pytest.mark.parametrize("limit", mostly_slow([1, 3], 0))
def test_only_the_last_ones_are_kept(whole, tmp_path, limit, monkeypatch):
    most = 0
    save = run_checkpoints.save

    def save_and_count(training):
        nonlocal most
        save(training)
        most = max(most, len(names(training.directory)))

    monkeypatch.setattr(run_checkpoints, "save", save_and_count)
    run(tmp_path, *EVERY_3, "--checkpoints_total_limit", str(limit))
    assert names(tmp_path) == names(whole)[-limit:]
    assert most == limit
    assert outcome(tmp_path) == outcome(whole)


KILLED = """
import gc, json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import train_hf
from timm_eps import EpsilonPruner
from timm_eps.training import checkpoints

def at_call(number, function, when=lambda found: True):
    # Killed when it returns what it is to return for the number-th time.
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        found = function(*args, **kwargs)
        calls += when(found)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call

def before_call(number, function):
    stop = at_call(number, lambda: None)
    def call(*args, **kwargs):
        stop()
        return function(*args, **kwargs)
    return call

train_hf.publishing.check_reload = lambda *_: "not tried"
train_hf.publishing.paired_seconds = lambda pair, *_: dict.fromkeys(pair, [1.0] * 3)

def save_weights(model, output_dir, remedy, *, results, **others):
    save_file(dict(model.timm_model.state_dict()), Path(output_dir) / "model.safetensors")
    (Path(output_dir) / "all_results.json").write_text(json.dumps(results))

train_hf.publishing.save = save_weights
gc.freeze()
for moment, arguments in json.loads(sys.argv[1]):
    if child := os.fork():  # one start of torch for all
        print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    if moment == "before the manifest":
        checkpoints.commit = before_call(3, checkpoints.commit)
    elif moment == "before the rename":
        Path.rename = before_call(3, Path.rename)
    elif moment == "after a removal":
        EpsilonPruner.step = at_call(1, EpsilonPruner.step, when=bool)
    elif moment == "in an epoch":
        train_hf.take_step = at_call(11, train_hf.take_step)
    train_hf.main(arguments)
    sys.exit()
"""


def in_a_process(*runs: tuple[str, Path, list[str]]) -> subprocess.Popen:
    """Start runs one after the other, given as (moment of the kill or another word, directory, arguments)."""
    told = json.dumps([(moment, [*SHORT, "--output_dir", str(out), *arguments]) for moment, out, arguments in runs])
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, told],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train_hf.__file__).parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


MOMENTS = {
    "before the manifest": ([3, 6], True),
    "before the rename": ([3, 6], True),
    "after a removal": ([3, 6], False),
    "in an epoch": ([3, 6, 9], False),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A directory per moment, in the state after the kill."""
    root = tmp_path_factory.mktemp("killed")
    said, errors = in_a_process(*((moment, root / moment, EVERY_3) for moment in MOMENTS)).communicate(timeout=180)
    outcomes = [line for line in said.splitlines() if line.endswith(f" {-signal.SIGKILL}")]
    assert outcomes == [f"{moment} {-signal.SIGKILL}" for moment in MOMENTS], errors
    return root


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS, 1, 2))
def test_killed(whole, killed, moment):
    out = killed / moment
    steps, staging = MOMENTS[moment]
    assert names(out) == [f"checkpoint-{step}" for step in steps]
    assert checkpoints.staging_of(out, 9).exists() == staging
    assert (checkpoints.staging_of(out, 9) / checkpoints.MANIFEST).exists() == (moment == "before the rename")
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)
    assert written(out) == written(whole)
    assert not list(out.glob(".checkpoint*")), "nothing half is left"


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    """Ten runs, each killed at a random moment and then resumed. The moments are printed."""
    often = ["--checkpointing_steps", "2", "--num_train_epochs", "12", "--ramp_epochs", "8"]

    def to_the_end(out: Path, *arguments: str) -> None:
        process = in_a_process(("never", out, [*often, *arguments]))
        said, errors = process.communicate(timeout=300)
        assert "never 0" in said, errors

    to_the_end(tmp_path / "whole")
    times = [path.stat().st_mtime for path in checkpoints.all_checkpoints(tmp_path / "whole")]
    duration = times[-1] - times[0]
    draw = random.Random(0)
    for number, moment in enumerate(sorted(draw.uniform(0, duration) for _ in range(10))):
        out = tmp_path / str(number)
        command = [sys.executable, train_hf.__file__, *SHORT, *often, "--output_dir", str(out)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        while not names(out):  # the start varies more in time than the training
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(moment)
        process.kill()
        process.wait()
        [last] = names(out)[-1:]
        halves = sorted(path.name for path in out.glob(".checkpoint*"))
        print(f"killed {moment:.2f} of {duration:.2f} s after the first checkpoint: {last}, unfinished {halves}")
        to_the_end(out, *LATEST)
        assert outcome(out) == outcome(tmp_path / "whole"), moment
