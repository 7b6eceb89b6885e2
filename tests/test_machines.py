"""Several machines, emulated by one launcher for each on 127.0.0.1: the lines of docs/train.md."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_eps.training import checkpoints

ROOT = Path(__file__).parents[1]
SHORT = [
    *("--architecture", "eps_resnet20", "--num_threads", "1", "--max_eval_samples", "45", "--keep", "3"),
    *("--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1", "--max_train_samples", "124"),
    *("--per_device_train_batch_size", "8", "--checkpointing_steps", "5"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
              "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def launchers(kind: str) -> list[list[str]]:
    """The command of each machine."""
    port = free_port()
    if kind == "accelerate":
        place = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        return [[*ACCELERATE, *place, "--machine_rank", rank] for rank in "01"]
    if kind == "rendezvous":
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "digits"]
        return [[*TORCHRUN, *place] for _ in "01"]
    return [[*TORCHRUN, "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank", rank] for rank in "01"]


def begin(commands: list[list[str]], out: Path, *arguments: str) -> list[subprocess.Popen]:
    """One launcher a machine, whose output goes to a file beside ``out``."""
    script = [str(ROOT / "train_hf.py"), *SHORT, "--num_train_epochs", "4", *arguments, "--output_dir", str(out)]
    started = []
    for number, command in enumerate(commands):
        with said(out, number).open("wb") as file:
            started.append(
                subprocess.Popen([*command, *script], env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
            )
    return started


def said(out: Path, machine: int) -> Path:
    return out.with_name(f"{out.name}.{machine}.log")


def run(kind: str, out: Path, *arguments: str) -> list[int]:
    return [launcher.wait(timeout=300) for launcher in begin(launchers(kind), out, *arguments)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same run of two processes on one machine."""
    out = tmp_path_factory.mktemp("machines") / "alone"
    one = [*TORCHRUN[:3], "--standalone", "--nproc_per_node", "2"]
    [launcher] = begin([one], out)
    assert launcher.wait(timeout=300) == 0, said(out, 0).read_text()[-4000:]
    return out


def removed_in(out: Path) -> list[str]:
    return json.loads((out / "config.json").read_text())["model_args"]["removed"]


@pytest.mark.parametrize("kind", ["accelerate", "rendezvous", "static"])
def test_two_machines_train_as_one_with_as_many_processes(alone, tmp_path, kind):
    out = tmp_path / kind
    assert run(kind, out) == [0, 0], said(out, 0).read_text()[-4000:]
    assert removed_in(out) == removed_in(alone)
    assert len(removed_in(out)) == 6
    assert (out / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_two_machines_go_on_from_a_checkpoint_of_one_and_one_process_does_not(alone, tmp_path):
    resume = ["--resume_from_checkpoint", str(alone / "checkpoint-20")]
    assert run("static", tmp_path / "on", *resume) == [0, 0], said(tmp_path / "on", 0).read_text()[-4000:]
    assert (tmp_path / "on/model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    [launcher] = begin([[sys.executable]], tmp_path / "one", *resume)
    assert launcher.wait(timeout=300) == 1
    assert "has number of processes 2, but this one 1. " in said(tmp_path / "one", 0).read_text()


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if b"train_hf.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux lists them")
@pytest.mark.parametrize(
    ("signum", "machine", "line"),
    [
        (signal.SIGKILL, 0, "has ended, so this one ends, too."),
        (signal.SIGKILL, 1, "has ended, so this one ends, too."),
        (signal.SIGSTOP, 1, "has not answered within --ddp_timeout seconds, so this one ends, too."),
    ],
)
def test_a_lost_process_ends_those_of_both_machines_in_one_line(tmp_path, signum, machine, line):
    """Killed, or silent: as if its machine could not be reached any more."""
    out = tmp_path / "lost"
    started = begin(launchers("static"), out, "--num_train_epochs", "3000", "--ddp_timeout", "10")
    try:
        until = time.monotonic() + 120
        while not checkpoints.all_checkpoints(out) and time.monotonic() < until:
            time.sleep(0.2)
        [victim] = workers_of(started[machine])
        os.kill(victim, signum)
        codes = [started[1 - machine].wait(timeout=90)]
        if signum == signal.SIGSTOP:  # with a static rendezvous its launcher waits for it
            os.kill(victim, signal.SIGKILL)
        codes.append(started[machine].wait(timeout=90))
    finally:
        for launcher in started:
            launcher.kill()
    assert 0 not in codes
    lines = said(out, 1 - machine).read_text(errors="replace").replace("\r", "\n").splitlines()
    [error] = [text for text in lines if "train_hf.py: error: " in text]
    assert line in error
    assert checkpoints.newest_whole(out) is not None
