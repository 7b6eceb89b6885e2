"""A checkpoint is intact or not used: after a killed process, a full disk or a broken copy."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest

from timm_eps.training.checkpoints import (
    MANIFEST,
    all_checkpoints,
    clear_unfinished,
    commit,
    discard_oldest,
    newest_whole,
    staging_of,
    why_torn,
)

FILES = {"model.safetensors": b"weights" * 99, "training.json": b"{}", "inner/state.bin": b"\0\1", "empty": b""}


def write(directory: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    staging = staging_of(directory, step)
    for name, content in (files or FILES).items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content)
    return commit(staging)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def used_instead(directory: Path, torn: Path, caplog) -> tuple[Path | None, str]:
    """The checkpoint used instead, and the warning about the torn one."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = newest_whole(directory)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(torn) in record.getMessage()
    return found, record.getMessage()


def test_what_is_committed_is_whole(tmp_path):
    checkpoint = write(tmp_path, 3)
    assert checkpoint == tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3"], "nothing of the staging is left"
    assert why_torn(checkpoint) is None
    assert why_torn(str(checkpoint)) is None
    assert newest_whole(tmp_path) == checkpoint
    assert {name: (checkpoint / name).read_bytes() for name in FILES} == FILES
    assert json.loads((checkpoint / MANIFEST).read_text()).keys() == FILES.keys()


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(
            (name, harm)
            for name in FILES
            for harm in (delete, truncate, lengthen, flip)
            if FILES[name] or harm in (delete, lengthen)
        ),
        (MANIFEST, delete),
    ],
)
def test_each_harm_to_each_file_is_found(tmp_path, caplog, name, harm):
    write(tmp_path, 3)
    torn = write(tmp_path, 6)
    harm(torn / name)
    reason = why_torn(torn)
    expected = f"{Path(name).name} is missing" if harm is delete else f"{name} was changed"
    assert reason == expected
    found, said = used_instead(tmp_path, torn, caplog)
    assert found == tmp_path / "checkpoint-3"
    assert expected in said


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"{}", b"null", b"1", b'"text"', b"[1, 2]", b'["model.safetensors"]', b"\xff\xfe\x00"),
        *(b'{"model.safetensors": null}', b'{"model.safetensors": 1}', b'{"model.safetensors": "0"}', b'{"": "0"}'),
        *(b'{"inner": "0"}', b'{"model.safetensors/x": "0"}', b'{"nowhere": "0"}', b'{"\\u0000": "0"}'),
        b'{"' + b"x" * 300 + b'": "0"}',
        *(b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        *(b'{"/dev/zero": "0"}', b'{"../checkpoint-3/training.json": "0"}', b'{"model.safetensors": NaN}'),
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_manifest_of_any_content_is_torn_not_an_error(tmp_path, caplog, content):
    write(tmp_path, 3)
    torn = write(tmp_path, 6)
    (torn / MANIFEST).write_bytes(content)
    assert why_torn(torn)
    found, _ = used_instead(tmp_path, torn, caplog)
    assert found == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(path.with_name("nowhere")), "it is a broken link"),
        (lambda path: path.symlink_to(path), "it is a broken link"),
        (lambda path: path.write_text("a file"), "it is not a directory"),
        (lambda path: path.mkdir(), f"{MANIFEST} is missing"),
        (lambda path: (path / MANIFEST).mkdir(parents=True), f"{MANIFEST} was changed"),
    ],
)
def test_what_has_the_name_of_a_checkpoint_is_passed_over_and_replaced(tmp_path, caplog, make, reason):
    write(tmp_path, 3)
    make(tmp_path / "checkpoint-6")
    found, said = used_instead(tmp_path, tmp_path / "checkpoint-6", caplog)
    assert found == tmp_path / "checkpoint-3"
    assert reason in said
    assert why_torn(write(tmp_path, 6)) is None
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_a_link_to_a_checkpoint_is_one_and_what_it_leads_to_is_not_touched(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    target = write(tmp_path / "elsewhere", 3)
    (tmp_path / "out/checkpoint-3").symlink_to(target)
    assert newest_whole(tmp_path / "out") == tmp_path / "out/checkpoint-3"
    write(tmp_path / "out", 6)
    discard_oldest(tmp_path / "out", 1)
    assert names(tmp_path / "out") == ["checkpoint-6"]
    assert why_torn(target) is None


def test_needed_files_must_be_listed(tmp_path):
    checkpoint = write(tmp_path, 3)
    assert why_torn(checkpoint, ["training.json", "empty"]) is None
    assert why_torn(checkpoint, ["optimizer.bin"]) == f"{MANIFEST} does not list optimizer.bin"
    assert newest_whole(tmp_path, ["optimizer.bin"]) is None


def test_a_shortened_manifest_is_torn(tmp_path):
    """Cut at any place, except before the final line break."""
    torn = write(tmp_path, 6)
    whole = (torn / MANIFEST).read_bytes()
    for end in range(len(whole) - 1):
        (torn / MANIFEST).write_bytes(whole[:end])
        assert why_torn(torn), whole[:end]


def test_all_torn_or_none_there(tmp_path, caplog):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "nowhere") is None
    assert not caplog.records
    for step in (3, 6):
        flip(write(tmp_path, step) / "training.json")
    assert newest_whole(tmp_path) is None
    assert [r.getMessage().split()[0] for r in caplog.records] == [f"{tmp_path}/checkpoint-{n}" for n in (6, 3)]


def test_the_last_is_by_number_not_by_name(tmp_path):
    for step in (10, 9, 100, 8):
        write(tmp_path, step)
    assert [path.name for path in all_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (8, 9, 10, 100)]
    assert newest_whole(tmp_path).name == "checkpoint-100"


def test_others_are_no_checkpoints(tmp_path):
    write(tmp_path, 3)
    for name in ("checkpoint-", "checkpoint-best", "checkpoint-9x", "checkpoint-9.old", "old-checkpoint-9", "9"):
        (tmp_path / name).mkdir()
    assert [path.name for path in all_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["checkpoint-9", "checkpoint-²"])
def test_a_file_of_such_a_name_stops_nothing(tmp_path, name):
    write(tmp_path, 3)
    (tmp_path / name).write_text("no directory")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"


def test_a_staging_directory_is_no_checkpoint(tmp_path):
    """A process that is killed right before the rename leaves a staging directory with all files."""
    write(tmp_path, 3)
    os.rename(write(tmp_path, 6), staging_of(tmp_path, 6))
    assert why_torn(staging_of(tmp_path, 6)) is None
    assert [path.name for path in all_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"


def test_unfinished_ones_are_cleared(tmp_path):
    write(tmp_path, 3)
    staging = staging_of(tmp_path, 6)
    (staging / "inner").mkdir(parents=True)
    (staging / "inner/half").write_bytes(b"1")
    (tmp_path / ".checkpoint-2.old").mkdir()
    (tmp_path / "README.md").write_text("stays")
    (tmp_path / ".hidden").write_text("stays")
    clear_unfinished(tmp_path)
    assert names(tmp_path) == [".hidden", "README.md", "checkpoint-3"]
    clear_unfinished(tmp_path / "nowhere")


@pytest.mark.parametrize("harm", [None, flip])
def test_commit_takes_the_place_of_one_before(tmp_path, harm):
    """The replaced checkpoint is torn. Nothing of it may stay."""
    before = write(tmp_path, 6, {**FILES, "of before": b"1"})
    if harm:
        harm(before / "model.safetensors")
    again = write(tmp_path, 6)
    assert again == before
    assert why_torn(again) is None
    assert not (again / "of before").exists()
    assert names(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize(("limit", "left"), [(None, [3, 9, 10, 12]), (1, [12]), (3, [9, 10, 12]), (9, [3, 9, 10, 12])])
def test_the_last_ones_stay(tmp_path, limit, left):
    for step in (10, 9, 3, 12):
        write(tmp_path, step)
    discard_oldest(tmp_path, limit)
    assert [path.name for path in all_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert len(names(tmp_path)) == len(left)
    assert all(why_torn(path) is None for path in all_checkpoints(tmp_path))


def test_a_torn_one_takes_no_place_among_the_last(tmp_path):
    """A torn checkpoint must not cause the deletion of an intact one."""
    for step in (3, 6, 9):
        write(tmp_path, step)
    flip(tmp_path / "checkpoint-9/model.safetensors")
    discard_oldest(tmp_path, 1)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("moment", range(12))
def test_stopped_while_it_deletes_there_is_never_half_a_checkpoint(tmp_path, monkeypatch, moment):
    """Stopped at every call to the file system in turn, as if killed there."""
    for step in (3, 6, 9):
        write(tmp_path, step)
    calls = 0

    class KilledError(BaseException):
        pass

    def stop(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KilledError
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(os, name, stop(getattr(os, name)))
        with suppress(KilledError):
            discard_oldest(tmp_path, 1)
    assert all(why_torn(path) is None for path in all_checkpoints(tmp_path))
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-9"
    clear_unfinished(tmp_path)
    discard_oldest(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-9"]
