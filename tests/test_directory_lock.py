"""Only one run uses a directory at a time, and a dead run holds no lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_eps.training.directory_lock import LOCK, locked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no such locks")
MODULE = Path(__file__).parent.parent / "timm_eps/training/directory_lock.py"
# Without the package, whose import takes seconds.
HOLD = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("directory_lock", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    with module.locked(sys.argv[1]):
        child = os.fork() if "fork" in sys.argv else 0
        print(os.getpid(), flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error)
"""


def start(directory: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(directory), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen) -> None:
    process.communicate(timeout=60)


def test_a_second_one_is_refused_and_told_who_writes(tmp_path):
    first = start(tmp_path)
    assert said(first) == str(first.pid)
    with pytest.raises(ValueError, match=rf"Another run \(pid {first.pid}\) writes to {tmp_path}"), locked(tmp_path):
        pass
    second = start(tmp_path)
    assert said(second).startswith(f"Another run (pid {first.pid}) writes to {tmp_path}. Wait until it ends")
    end(second)
    end(first)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fork", [[], ["fork"]])
def test_a_killed_one_leaves_no_lock(tmp_path, fork):
    """Also if processes that the run forked, such as data loaders, live on."""
    first = start(tmp_path, *fork)
    said(first)
    first.kill()
    first.wait()
    assert (tmp_path / LOCK).exists(), "the file stays, and does not matter"
    with locked(tmp_path):
        refused = start(tmp_path)
        assert said(refused).startswith(f"Another run (pid {os.getpid()})")
        end(refused)
    assert list(tmp_path.iterdir()) == []
    end(first)


def test_other_directories_are_free(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = start(tmp_path / "a")
    said(first)
    with locked(tmp_path / "b"):
        pass
    end(first)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"9" * 100])
def test_a_lock_file_of_any_content_locks_nothing(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


def test_an_error_in_the_block_gives_the_lock_back(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass
