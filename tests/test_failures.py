"""Errors of other libraries in one line, and the exit codes of a script."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from timm_eps.hub.failures import HTTP_ERRORS, one_line
from timm_eps.training.ending import as_script, reading_images
from timm_eps.training.interruption import InterruptionError
from timm_eps.training.progress import dump_json, load_json

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("one\n\n  two\r\nthree.", "one two three"),
        ("", "ValueError"),
        ("token hf_abcDEF123 is wrong", "token hf_... is wrong"),
        (
            "403 for https://s3.host/a/b?X-Amz-Signature=abc&X=1 now",
            "403 for https://s3.host/a/b now",
        ),
        ("Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nOSError: x", "OSError: x"),
        ("x" * 400, "x" * 296 + " ..."),
    ],
)  # fmt: skip
def test_one_line(said, expected):
    assert one_line(ValueError(said)) == expected


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nb."), "script: error: a b.", ""),
        (OSError(28, "No space left on device"), "script: error: [Errno 28] No space left on device.", ""),
        (HTTP_ERRORS[-1]("cannot connect"), "script: error: cannot connect.", ""),
        (
            RuntimeError("[pair.cc] Connection closed by peer [::1]"),
            "script: error: Another process of this training has ended, so this one ends, too. If",
            "",
        ),
        (
            RuntimeError("[gloo] Timed out waiting 10000ms for recv operation to complete"),
            "script: error: Another process of this training has not answered within --ddp_timeout seconds, so",
            "",
        ),
        (RuntimeError("Application timeout caused pair closure"), "script: error: Another process of this", ""),
        (KeyboardInterrupt(), 130, "script: Stopped by SIGINT.\n"),
        (
            InterruptionError(signal.SIGTERM, 3, Path("c")),
            143,
            "script: Stopped by SIGTERM after step 3; use the same arguments",
        ),
        (InterruptionError(signal.SIGINT, 3, None), 130, "script: Stopped by SIGINT after step 3; there is no"),
    ],
)
def test_a_script_ends_in_one_line(error, code, line, capsys):
    with pytest.raises(SystemExit) as ended, as_script("script"):
        raise error
    assert str(ended.value.code).startswith(str(code))
    assert isinstance(ended.value.code, type(code))
    assert capsys.readouterr().err.startswith(line)


def test_sigterm_clears_up_what_is_half_done(capsys):
    before, cleared = signal.getsignal(signal.SIGTERM), []
    with ExitStack() as half_done:
        half_done.callback(cleared.append, True)
        with pytest.raises(SystemExit) as ended, as_script("script"), half_done:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert cleared
    assert capsys.readouterr().err == "script: Stopped by SIGTERM.\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), TypeError("a mistake"), AssertionError()])
def test_mistakes_in_the_code_keep_their_traceback(error):
    with pytest.raises(type(error)), as_script("script"):
        raise error


def test_only_the_first_process_says_that_all_were_stopped(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), as_script("script"):
        raise InterruptionError(signal.SIGTERM, 3, None)
    assert capsys.readouterr().err == ""


def test_errors_of_the_http_library_are_known():
    assert issubclass(HfHubHTTPError, HTTP_ERRORS)
    assert all(issubclass(one, Exception) and one is not Exception for one in HTTP_ERRORS)


def test_of_runtime_errors_only_those_of_dead_readers_change_their_type():
    with pytest.raises(ChildProcessError, match=r"DataLoader worker .* killed by signal: Killed"), reading_images():
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="shapes"), reading_images():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    "value", [1.5, [NAN, -INF, 1], {"a": {"b": [INF]}}, {"not a JSON number": 1, "b": 2}, None, "NaN"]
)
def test_json_has_no_nan_and_gives_it_back(tmp_path, value):
    dump_json(value, tmp_path / "file")
    json.loads((tmp_path / "file").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert repr(load_json(tmp_path / "file")) == repr(value)
