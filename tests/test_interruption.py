"""A training that is stopped, diverges, or cannot write keeps the good state, reports it, and resumes bit for bit."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import test_resume
import torch
from conftest import mostly_slow
from safetensors.torch import load_file
from test_resume import (  # noqa: F401  the fixtures are for all tests here as well
    EVERY_3,
    LATEST,
    SHORT,
    _one_thread,
    _weights_only,
    folder_of_images,
    names,
    outcome,
    run,
    stopped_at,
)

import timm_eps
import train_hf
from timm_eps.hub.failures import one_line
from timm_eps.training import checkpoints, publishing, run_checkpoints
from timm_eps.training.directory_lock import LOCK
from timm_eps.training.interruption import Interruption, InterruptionError
from timm_eps.training.run import Run
from timm_eps.training.sharded import CHECKPOINT_FILES

ROOT = Path(__file__).parent.parent
whole = test_resume.whole  # an uninterrupted run
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def at_step(monkeypatch, number: int, action) -> None:
    """Do something at the end of an optimizer step, counted from 1 in this process."""
    take_step, calls = train_hf.take_step, iter(range(1, 10**6))

    def take_step_and_act(training):
        take_step(training)
        if next(calls) == number:
            action(training)

    monkeypatch.setattr(train_hf, "take_step", take_step_and_act)


def send(signum: int):
    assert threading.current_thread() is threading.main_thread(), "or nothing handles it"
    return lambda training: os.kill(os.getpid(), signum)


# 1. Signals.


@pytest.mark.parametrize(
    ("signum", "step"),
    mostly_slow([(signal.SIGTERM, 2), (signal.SIGINT, 5), (signal.SIGTERM, 8), (signal.SIGINT, 16)], 1, 2),
)
def test_told_to_stop_it_writes_a_checkpoint_and_goes_on_from_there(whole, tmp_path, monkeypatch, signum, step):
    """Within an epoch, at its end and at the very end."""
    before = [signal.getsignal(one) for one in SIGNALS]
    with monkeypatch.context() as patched:
        at_step(patched, step, send(signum))
        with pytest.raises(InterruptionError) as stopped:
            run(tmp_path / "out", *EVERY_3)
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert stopped.value.exit_code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    out = tmp_path / "out"
    assert names(out)[-1] == f"checkpoint-{step}"
    assert str(stopped.value) == (
        f"Stopped by {signum.name} after step {step}; use the same arguments and --resume_from_checkpoint to resume "
        f"from {out}/checkpoint-{step}."
    )
    assert not (out / LOCK).exists()
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)


def test_told_while_it_evaluates(whole, tmp_path, monkeypatch):
    evaluate, out, calls = train_hf.evaluate, tmp_path / "out", iter(range(1, 10**6))

    def evaluate_and_be_told(*args):
        if next(calls) == 2:  # after the second epoch
            send(signal.SIGTERM)(None)
        return evaluate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train_hf, "evaluate", evaluate_and_be_told)
        with pytest.raises(InterruptionError, match="after step 8; use the same arguments"):
            run(out, *EVERY_3)
    assert names(out) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(whole)


@pytest.mark.slow
def test_the_dense_half_is_taken_up_too(tmp_path, monkeypatch):
    both = ["--compare_dense", "--num_train_epochs", "2", "--ramp_epochs", "1", "--checkpointing_steps", "epoch"]
    run(tmp_path / "whole", *both)
    with monkeypatch.context() as patched:
        at_step(patched, 11, send(signal.SIGTERM))
        with pytest.raises(InterruptionError, match=r"from .*/dense/checkpoint-3"):
            run(tmp_path / "out", *both)
    run(tmp_path / "out", *both, *LATEST)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_without_checkpoints_none_is_written(tmp_path, monkeypatch):
    at_step(monkeypatch, 5, send(signal.SIGTERM))
    with pytest.raises(
        InterruptionError, match=r"after step 5; there is no checkpoint to resume from\. Use --checkpoint"
    ):
        run(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_signal_that_comes_too_late_is_not_swallowed():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), Interruption():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_there_are_no_handlers(tmp_path):
    before = [signal.getsignal(one) for one in SIGNALS]

    def use() -> None:
        with Interruption() as interruption:
            found.append(([signal.getsignal(one) for one in SIGNALS], interruption.signum))

    found: list = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(before, 0)]


# Each child starts the script. All share the import of torch: (name, signals at steps, arguments).
SIGNALLED = """
import json, os, runpy, signal, sys
import train_hf
from timm_eps.training.data import TrainingBatches
for name, signals, arguments in json.loads(sys.argv[1]):
    if child := os.fork():
        print(f"\\n= {name} {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
        continue
    os.dup2(1, 2)
    epoch = TrainingBatches.epoch
    def epoch_with_signals(self, *args):
        for number, batch in enumerate(epoch(self, *args), start=1):
            for step, signum in signals:
                if step == number:
                    os.kill(os.getpid(), signum)
            yield batch
    TrainingBatches.epoch = epoch_with_signals
    sys.argv = ["train_hf.py", *arguments]
    runpy.run_path(train_hf.__file__, run_name="__main__")
    sys.exit()
"""


@pytest.mark.slow
def test_exit_codes_and_one_line(tmp_path):
    """Exit codes of the script. A second signal ends it at once, and so does a signal before the training."""
    term, interrupt = int(signal.SIGTERM), int(signal.SIGINT)
    cases = {
        "term": ([(3, term)], 143),
        "interrupt": ([(3, interrupt)], 130),
        "term twice": ([(2, term), (2, term)], -term),
        "interrupt and term": ([(2, interrupt), (2, term)], -term),
    }
    runs = [
        (name, signals, [*SHORT, *EVERY_3, "--output_dir", str(tmp_path / name)])
        for name, (signals, _) in cases.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    rest = done.stdout
    for name, (signals, code) in cases.items():
        said, _, rest = rest.partition(f"= {name} ")
        status, _, rest = rest.partition("\n")
        assert int(status) == code, name
        lines = [line for line in said.splitlines() if line.startswith("train_hf.py:")]
        if code > 0:
            [line] = lines
            assert f"Stopped by {signal.Signals(signals[0][1]).name} after step 3; use the same arguments" in line
            assert names(tmp_path / name) == ["checkpoint-3"]
        else:
            assert lines == []
            assert names(tmp_path / name) == []


# 2. Divergence.


def diverge(training) -> None:
    training.loss += float("nan")


def spoil_weights(value: float):
    def spoil(training) -> None:
        with torch.no_grad():
            next(reversed(list(training.model.parameters()))).fill_(value)

    return spoil


def check_all_good(out: Path) -> None:
    for path in checkpoints.all_checkpoints(out):
        assert checkpoints.why_torn(path, CHECKPOINT_FILES) is None
        for name, value in load_file(path / "model.safetensors").items():
            assert value.isfinite().all(), (path, name)


@pytest.mark.parametrize("step", mostly_slow([5, 6, 7, 8, 16], 1, 4))
def test_a_loss_that_is_no_number_is_seen_at_its_step(tmp_path, monkeypatch, step):
    """Before a checkpoint is written or an old one deleted."""
    at_step(monkeypatch, step, diverge)
    with pytest.raises(ValueError, match=rf"The loss of epoch . is nan; lower --learning_rate 0\.1\. .* step {step},"):
        run(tmp_path, "--checkpointing_steps", "2", "--checkpoints_total_limit", "2")
    last = (step - 1) // 2 * 2
    assert names(tmp_path) == [f"checkpoint-{last - 2}", f"checkpoint-{last}"]
    check_all_good(tmp_path)


@pytest.mark.parametrize("value", mostly_slow([float("nan"), float("inf")], 1))
@pytest.mark.parametrize(("step", "every"), mostly_slow([(6, "2"), (4, "epoch"), (16, "epoch")], 0, 2))
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch, step, every, value):
    """The loss is from the step before, so it is finite."""
    at_step(monkeypatch, step, spoil_weights(value))
    with pytest.raises(ValueError, match=r"The weights of epoch . are not finite; lower --learning_rate 0\.1"):
        run(tmp_path, "--checkpointing_steps", every, "--checkpoints_total_limit", "1")
    assert not (tmp_path / "model.safetensors").exists()
    check_all_good(tmp_path)
    assert (
        names(tmp_path) == {(6, "2"): ["checkpoint-4"], (4, "epoch"): [], (16, "epoch"): ["checkpoint-12"]}[step, every]
    )


def test_the_last_good_one_goes_on(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 11, diverge)
        with pytest.raises(ValueError, match=r"checkpoint-9 is whole\."):
            run(tmp_path / "out", *EVERY_3, "--checkpoints_total_limit", "1")
    assert names(tmp_path / "out") == ["checkpoint-9"]
    run(tmp_path / "out", *EVERY_3, *LATEST)
    assert outcome(tmp_path / "out") == outcome(whole)


def test_a_rate_that_is_far_too_high(tmp_path):
    """The run ends by its loss or by its weights, before a value that is not finite is written."""
    with pytest.raises(ValueError, match=r"lower --learning_rate 1e\+30"):
        run(tmp_path, "--learning_rate", "1e30", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    check_all_good(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_infinite_responses_are_written_as_json_and_come_back(tmp_path, monkeypatch):
    """A diverged branch has an infinite response, even if the loss is finite."""

    def respond(training) -> None:
        first, second, *_ = timm_eps.gates(training.model).values()
        first.response.fill_(float("inf"))
        second.response.fill_(float("nan"))

    with monkeypatch.context() as patched:
        at_step(patched, 3, respond)
        run(tmp_path / "whole", *EVERY_3)
    text = (tmp_path / "whole/checkpoint-9/training.json").read_text()
    history = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))["pruner"]["history"]
    assert list(history[0]["responses"].values())[:2] == [{"not a JSON number": "inf"}, {"not a JSON number": "nan"}]
    out = stopped_at(tmp_path / "whole", "checkpoint-3")
    run(out, *EVERY_3, *LATEST)
    assert outcome(out) == outcome(tmp_path / "whole")


# 3. What cannot be written or read.

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("where", "name", "error"),
    mostly_slow(
        [
            (train_hf.Accelerator, "save_state", FULL),
            (
                train_hf.Accelerator,
                "save_state",
                RuntimeError("[enforce fail at inline_container.cc] . file write failed"),
            ),
            (train_hf.Accelerator, "save_state", safetensors.SafetensorError("I/O error: No space left on device")),
            (run_checkpoints, "dump_json", FULL),
            (checkpoints, "digest", FULL),
            (checkpoints, "settle", FULL),
            (Path, "rename", FULL),
        ],
        0,
        3,
        6,
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_full_disk(whole, tmp_path, monkeypatch, where, name, error):
    """The disk fills up while the third checkpoint is written."""
    function, out, full = getattr(where, name), tmp_path / "out", False

    def write(*args, **kwargs):
        if full:
            raise error
        return function(*args, **kwargs)

    def fill(training) -> None:
        nonlocal full
        full = True

    with monkeypatch.context() as patched:
        at_step(patched, 9, fill)
        patched.setattr(where, name, write)
        # The error message would check the checkpoints again.
        patched.setattr(Run, "remedy", lambda self: f"There are {names(out)}.")
        with pytest.raises(OSError, match="The checkpoint of step 9 could not be written to ") as failed:
            run(out, *EVERY_3, "--checkpoints_total_limit", "1")
    assert one_line(error)[:20] in str(failed.value)
    assert names(out) == ["checkpoint-6"]
    assert not list(out.glob(".checkpoint*")), "its space is free again"
    if name == "rename":
        run(out, *EVERY_3, *LATEST)
        assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("error", mostly_slow([FULL, safetensors.SafetensorError("I/O error: No space left")], 1))
def test_a_full_disk_at_the_end(whole, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "save", test_resume.REAL_SAVE)
        patched.setattr(publishing, "save_pretrained", fail)
        with pytest.raises(OSError, match=r"could not be saved in .*No space left.*Go on with .*checkpoint-16\."):
            run(tmp_path / "out", *EVERY_3)
    run(tmp_path / "out", *EVERY_3, *LATEST)
    assert outcome(tmp_path / "out") == outcome(whole)


LIMITED = """
import resource, runpy, signal, sys
import train_hf
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_path(train_hf.__file__, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 100_000, 1_000_000])
def test_a_limit_of_the_system(tmp_path, size):
    """The system limits the size of files. The error of each library is reported in one line."""
    arguments = [*SHORT, *EVERY_3, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("train_hf.py: error: ")]
    print(line)
    check_all_good(tmp_path / "out")


def of_files(directory: Path) -> list[str]:
    workers = ["--augmentation", "resized_crop", "--dataloader_num_workers", "1"]
    return [*folder_of_images(directory), *workers]


def test_a_process_that_reads_images_dies(tmp_path, monkeypatch):
    arguments, out = [*of_files(tmp_path / "data"), *EVERY_3], tmp_path / "out"

    def kill_readers(training) -> None:
        for child in train_hf.torch.multiprocessing.active_children():
            child.kill()
            child.join()

    with monkeypatch.context() as patched:
        at_step(patched, 5, kill_readers)
        with pytest.raises(ChildProcessError, match="A process that reads images died") as died:
            run(out, *arguments)
    assert f"Go on with --resume_from_checkpoint, from {out}/checkpoint-3." in str(died.value)
    assert "\n" not in str(died.value)
    run(out, *arguments, *LATEST)


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_goes_to_those_who_read_images_too(tmp_path, monkeypatch):
    arguments, out = [*of_files(tmp_path / "data"), *EVERY_3], tmp_path / "out"

    def interrupt_all(training) -> None:
        children = train_hf.torch.multiprocessing.active_children()
        assert children
        for child in children:
            os.kill(child.pid, signal.SIGINT)
        send(signal.SIGINT)(training)

    with monkeypatch.context() as patched:
        at_step(patched, 2, interrupt_all)
        with pytest.raises(InterruptionError, match="after step 2"):
            run(out, *arguments)
    run(out, *arguments, *LATEST)
    run(tmp_path / "whole", *arguments)
    assert outcome(out) == outcome(tmp_path / "whole")


# 4. A checkpoint whose list of files agrees, but whose content does not.


def change(checkpoint: Path, name: str, content: bytes | None) -> None:
    """Change the content of a file or delete it, and make the list of files agree."""
    manifest = checkpoint / checkpoints.MANIFEST
    hashes = json.loads(manifest.read_text())
    if content is None:
        (checkpoint / name).unlink()
        del hashes[name]
    else:
        (checkpoint / name).write_bytes(content)
        hashes[name] = checkpoints.digest(checkpoint / name)
    manifest.write_text(json.dumps(hashes))


@pytest.mark.parametrize("name", mostly_slow(CHECKPOINT_FILES, 1))
def test_a_shorter_list_of_files_is_no_whole_one(whole, name, caplog):
    out = stopped_at(whole, "checkpoint-9", name=f"shorter-{name}")
    change(out / "checkpoint-9", name, None)
    with caplog.at_level(logging.WARNING, "timm_eps"):
        run(out, *EVERY_3, *LATEST)
    assert f"checkpoint-9 is damaged (manifest.json does not list {name}); the checkpoint before it" in caplog.text
    assert outcome(out) == outcome(whole)


def edited(*path: str | int, value) -> object:
    """Change one field of training.json."""

    def edit(content: bytes) -> bytes:
        state = json.loads(content)
        inner = state
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
        return json.dumps(state).encode()

    return edit


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    mostly_slow(
        [
            (
                "training.json",
                edited("progress", "batch", value=10**9),
                r"progress\.batch must be 0 to 3, got 1000000000",
            ),
            ("training.json", edited("progress", "batch", value=-1), r"progress\.batch must be 0 to 3, got -1"),
            ("training.json", edited("progress", "batch", value="1"), r"progress\.batch must be int, got str"),
            ("training.json", edited("progress", "batch", value=True), r"progress\.batch must be int, got bool"),
            ("training.json", edited("progress", "batch", value=1.0), r"progress\.batch must be int, got float"),
            ("training.json", edited("progress", "epoch", value=5), r"progress\.epoch must be 0 to 4, got 5"),
            (
                "training.json",
                edited("progress", "step", value=7),
                r"progress\.step must be 9 after 2 epochs and 1 batches",
            ),
            (
                "training.json",
                edited("progress", "loss", value=float("nan")),
                "training.json contains NaN, which is not JSON",
            ),
            (
                "training.json",
                edited("progress", "loss", value={"not a JSON number": "nan"}),
                r"progress\.loss must be finite, got nan",
            ),
            ("training.json", edited("progress", "losses", value=[1.0]), r"progress\.losses .* must have 2 epochs"),
            (
                "training.json",
                edited("progress", "losses", value=["a", "b"]),
                r"progress\.losses must be a list of float",
            ),
            ("training.json", edited("progress", "more", value=1), "progress has an unknown more"),
            ("training.json", edited("progress", value=[]), "progress must be an object, got list"),
            ("training.json", edited("run", value=[]), r"training\.json\.run must be an object, got list"),
            ("training.json", edited("scheduler", value={}), "scheduler has no "),
            (
                "training.json",
                edited("scheduler", "last_epoch", value="9"),
                r"scheduler\.last_epoch must be int, got str",
            ),
            ("training.json", edited("scheduler", "last_epoch", value=10**9), r"scheduler\.last_epoch must be 0 to 9"),
            ("training.json", edited("pruner", value=None), "pruner must be an object, got NoneType"),
            (
                "training.json",
                edited("pruner", "epoch", value=3),
                r"pruner\.epoch and pruner\.history must have 2 epochs",
            ),
            ("training.json", edited("pruner", "removed", value="x"), r"pruner\.removed must be list, got str"),
            ("training.json", edited("pruner", "closed", value=[1]), r"pruner\.closed must be a list of str"),
            ("training.json", edited("pruner", "streaks", value={}), "pruner's state belongs to another model"),
            (
                "training.json",
                edited("pruner", "history", 0, "responses", value=3),
                r"history\.0\.responses must be an obj",
            ),
            ("training.json", edited("draws", value="zz"), "non-hexadecimal"),
            ("training.json", edited("draws", value=7), r"training\.json\.draws must be str, got int"),
            ("training.json", lambda content: b"[]", r"training\.json must be an object, got list"),
            ("training.json", lambda content: b"{", "Expecting property name"),
            ("training.json", lambda content: NESTED, r"training\.json is nested too deep"),
            ("training.json", lambda content: b"\xff", "codec can't decode"),
            ("model.safetensors", lambda content: b"", "header"),
            ("optimizer.bin", lambda content: content[:100], ""),
            ("optimizer.bin", lambda content: b"", ""),
            ("random_states_0.pkl", lambda content: b"", r"random_states_0\.pkl contains no random states"),
            ("random_states_0.pkl", lambda content: content[:99], r"random_states_0\.pkl contains no random states"),
        ],
        0,
        4,
        9,
        14,
        19,
        24,
        29,
        31,
        32,
    ),
)
def test_a_checkpoint_that_does_not_fit(whole, tmp_path, name, edit, message):
    """The error is one line that names the checkpoint, and no file is changed."""
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-9", out / "checkpoint-9")
    change(out / "checkpoint-9", name, edit((out / "checkpoint-9" / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"checkpoint-9 does not fit this run \(.*{message}") as refused:
        run(out, *EVERY_3, *LATEST)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    assert names(out) == ["checkpoint-9"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_files_of_another_checkpoint(whole, tmp_path, name):
    """Files of another structure. Random states belong to no structure."""
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-9", out / "checkpoint-9")
    change(out / "checkpoint-9", name, (whole / "checkpoint-16" / name).read_bytes())
    if name.startswith("random"):
        content = torch.load(out / "checkpoint-9" / name, weights_only=False)
        del content["torch_manual_seed"]
        torch.save(content, tmp_path / "other")
        change(out / "checkpoint-9", name, (tmp_path / "other").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint-9 does not fit this run"):
        run(out, *EVERY_3, *LATEST)


# 5. Whole runs, killed and stopped from outside.


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


OFTEN = ["--checkpointing_steps", "7", "--num_train_epochs", "12", "--ramp_epochs", "8"]
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
START = {
    "alone": [],
    "launched": LAUNCH,
    "two": TWO,
}


def command(kind: str, out: Path, *arguments: str) -> list[str]:
    short = [*SHORT, "--per_device_train_batch_size", "16"] if kind == "two" else SHORT
    return [sys.executable, *START[kind], train_hf.__file__, *short, *OFTEN, "--output_dir", str(out), *arguments]


def to_the_end(kind: str, out: Path, *arguments: str) -> str:
    done = subprocess.run(
        command(kind, out, *arguments), env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def begin(kind: str, out: Path, log: Path) -> subprocess.Popen:
    """Start a run, and wait for its first checkpoint."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command(kind, out), env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    while not names(out):
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)
    return process


def trainer_of(out: Path) -> int:
    return int((out / LOCK).read_text())


def last_words(log: Path) -> str:
    """The last output of the training. The launcher's output may come before it."""
    until = time.monotonic() + 120
    while True:
        said = [line for line in log.read_text().splitlines(keepends=True) if "train_hf.py: Stopped by SIG" in line]
        if said and said[0].endswith("\n"):
            break
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)
    [line] = said
    return line.strip()


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        kind = "two" if kind == "two" else "alone"
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp("whole-run") / kind
            to_the_end(kind, found[kind])
        return found[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    ("kind", "receiver"),
    [("alone", "trainer"), ("launched", "launcher"), ("launched", "trainer"), ("launched", "all"),
     ("two", "launcher"), ("two", "trainer"), ("two", "all")],
)  # fmt: skip
def test_stopped_from_outside(whole_runs, tmp_path, kind, receiver, signum):
    """A signal to the launcher, to one training process, or to all of them, as Ctrl-C in a terminal."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = begin(kind, out, log)
    if receiver == "all":
        os.killpg(process.pid, signum)
    else:
        os.kill(process.pid if receiver == "launcher" else trainer_of(out), signum)
    process.wait(timeout=120)
    line = last_words(log)
    print(process.returncode, line)
    if kind == "alone":
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
        assert "Traceback" not in log.read_text()
    last = checkpoints.newest_whole(out)
    assert last is not None
    assert f"and --resume_from_checkpoint to resume from {last}." in line
    of_launcher = kind == "launched" and receiver == "launcher"  # the launcher's death counts as SIGTERM
    assert f"Stopped by {'SIGTERM' if of_launcher else signum.name} after step" in line
    assert not (out / "model.safetensors").exists(), "it was stopped before its end"
    to_the_end(kind, out, *LATEST)
    assert outcome(out) == outcome(whole_runs(kind))


def is_writing(out: Path) -> bool:
    """Whether a checkpoint is half written. A checkpoint that is renamed during the listing is complete."""
    with suppress(FileNotFoundError):
        return bool(list(out.glob(".checkpoint-*/*")))
    return False


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_killed_at_a_random_moment(whole_runs, tmp_path, moment):
    """Four of the ten runs are killed while a checkpoint is written."""
    draw, out = random.Random(moment), tmp_path / "out"
    process = begin("alone", out, tmp_path / "log")
    if moment < 4:
        until = time.monotonic() + draw.uniform(0, 1)
        while not (is_writing(out) and time.monotonic() > until):
            assert process.poll() is None
    else:
        time.sleep(draw.uniform(0, 3))
    process.kill()
    process.wait()
    print("killed at", names(out)[-1], "unfinished:", sorted(path.name for path in out.glob(".checkpoint*")))
    assert not (out / "model.safetensors").exists(), "it was killed before its end"
    assert moment >= 4 or list(out.glob(".checkpoint*"))
    to_the_end("alone", out, *LATEST)
    assert outcome(out) == outcome(whole_runs("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_that_diverge(tmp_path, seed):
    """Only the learning rate causes the divergence. The last good checkpoint resumes, and the run diverges again."""
    rate = 10.0 ** random.Random(seed).uniform(4, 24)
    often = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--seed", str(seed)]
    diverging = [*often, "--learning_rate", str(rate), "--num_train_epochs", "12"]
    said = []
    for resume in ([], LATEST):
        with pytest.raises(ValueError, match="lower --learning_rate") as diverged:
            run(tmp_path, *diverging, *resume)
        said.append(str(diverged.value))
        check_all_good(tmp_path)
        assert names(tmp_path)
        assert len(names(tmp_path)) <= 2
    print(f"{rate:.1e}", names(tmp_path), said[0].partition(" It was")[2].partition(",")[0])
    assert said[0] == said[1], "bit by bit the same"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "launched"])
def test_a_second_run_is_refused(tmp_path, kind):
    """The second run is refused while a training process outlives its launcher."""
    out = tmp_path / "out"
    process = begin(kind, out, tmp_path / "log")
    trainer = trainer_of(out)
    os.kill(trainer, signal.SIGSTOP)  # the first run must not end before the second one has begun
    try:
        second = subprocess.run(
            command("alone", out, *LATEST), env=environment(), capture_output=True, text=True, check=False
        )
    finally:
        os.kill(trainer, signal.SIGCONT)
    assert second.returncode == 1
    assert f"train_hf.py: error: Another run (pid {trainer}) writes to {out}" in second.stderr
    assert "Traceback" not in second.stderr
    process.terminate()
    process.wait()
    last_words(tmp_path / "log")
    to_the_end(kind, out, *LATEST)
