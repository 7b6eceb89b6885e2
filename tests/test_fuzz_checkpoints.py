"""The fuzzer of saved models: some of its cases, and proof that it finds planted faults."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import fuzz_checkpoints
import pytest
from fuzzing.draft import Base
from fuzzing.files import CONFIG, WEIGHTS, digest_in
from fuzzing.mutations import mutate
from fuzzing.planted import LOADERS as PLANTED
from fuzzing.runner import Fuzzer, Worker
from fuzzing.summary import Summary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")

# The fuzzer needs the first three. Then follow a training checkpoint of each kind, and a convolutional twin.
NETWORKS = ("cifar", "cifar_sibling", "vit_pruned", "cifar_training", "vit_training", "convnext_pruned")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    with Fuzzer(tmp_path_factory.mktemp("fuzz") / "work", seed=24, share_of_twins=0.05, names=NETWORKS) as fuzzer:
        yield fuzzer


def test_sound_directories(fuzzer):
    loaders = ("timm", "auto", "model", "backbone", "standalone", "standalone_model")
    cases = [fuzzer.run_sound(name, loaders) for name in NETWORKS]
    assert [(case.base, case.faults) for case in cases if case.faults] == []
    for case in cases:
        outcomes = {result.loader: result.outcome for result in case.results}
        if not case.base.endswith("_training"):
            assert set(outcomes.values()) == {"loaded"}, (case.base, outcomes)
        # Only some loaded values are compared with the file; these must be among them.
        assert {"auto", "model", "backbone"} <= {result.loader for result in case.results if result.compared}


def test_hostile_directories(fuzzer):
    """Sixty cases. The slow test runs ten thousand cases for each of two seeds."""
    summary = Summary()
    for case in fuzzer.run(range(60)):
        summary.add(case)
    assert summary.outcomes["auto"].keys() >= {"loaded", "refused"}
    assert summary.is_clean(), summary.text()


@pytest.mark.slow
def test_every_planted_fault_is_found(fuzzer):
    base, found, expected = fuzzer.bases["cifar"], {}, {}
    worker = Worker("planted", fuzzer.workdir, seconds=6)
    for number, (name, (_, kind)) in enumerate(PLANTED.items()):
        place = fuzzer.workdir / "cases" / f"planted-{number}"
        shutil.copytree(base.path, place)
        result = worker.load(place, base.path, name)
        found[name] = sorted({kind for kind, _ in result.faults})
        expected[name] = [] if kind is None else [kind]
        if result.outcome == "refused":
            assert result.good_message == (kind is None)
    worker.close()
    assert found == expected


@pytest.mark.slow
def test_a_case_can_be_repeated(fuzzer):
    numbers = range(1000, 1012)
    first = {number: fuzzer.draw(number)[1:3] for number in numbers}
    assert {number: fuzzer.draw(number)[1:3] for number in reversed(numbers)} == first
    assert len({str(notes) for _, notes in first.values()}) > 9


def test_fields_of_later_versions_are_changed_too(fuzzer, tmp_path):
    """The digest of weights and configuration must not hide other faults of changed weights."""
    sound = fuzzer.bases["cifar"]
    weights = sound.directory.text(WEIGHTS)
    config = json.loads(sound.directory.text(CONFIG))
    assert digest_in(config, weights) == (("weights_sha256",), "sha256")
    del config["weights_sha256"]
    config["weights"] = {"digest": "sha256:" + hashlib.sha256(weights).hexdigest(), "later": [1, {"field": "x"}]}
    assert digest_in(config, weights) == (("weights", "digest"), "sha256")
    base = Base("later", sound.path, sound.directory, sound.size, sound.slots, sound.closed)
    base.directory.entries[CONFIG] = json.dumps(config).encode()
    notes, bound = [], {True: 0, False: 0}
    for number in range(150):
        directory, changes = mutate(base, {"later": base}, Path(tmp_path), random.Random(number))
        notes += changes
        changed = directory.text(WEIGHTS)
        of_weights = {change.startswith(("weights: ", "digest of")) for change in changes} == {True}
        if of_weights and changed is not None and changed != weights:
            content = json.loads(directory.text(CONFIG))
            bound[digest_in(content, changed) is not None] += 1
    assert min(bound.values()) > 5, "new weights come with their own digest and with the old one"
    for field in ("weights = ", "weights.digest = ", "weights.later"):
        assert any(note.startswith(field) for note in notes), field


def test_report(fuzzer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fuzz_checkpoints, "Fuzzer", lambda *_, **__: _Open(fuzzer))
    report = tmp_path / "report.json"
    status = fuzz_checkpoints.main(["--cases", "3", "--seed", "24", "--jobs", "1", "--report", str(report)])
    tree, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert (tree["cases"], tree["seed"]) == (3, 24)
    assert sum(sum(counts.values()) for counts in tree["outcomes"].values()) == tree["loads"]
    assert status == int(not tree["clean"])
    for text in ("3 cases", "Good messages among", "Longest load", "Largest peak", "Faults:"):
        assert text in printed
    assert fuzz_checkpoints.main(["--seed", "24", "--only", "3"]) in (0, 1)
    assert capsys.readouterr().out.startswith("case 3: ")


class _Open:
    """A fuzzer that stays open for later tests."""

    def __init__(self, fuzzer: Fuzzer) -> None:
        self._fuzzer = fuzzer

    def __enter__(self) -> Fuzzer:
        return self._fuzzer

    def __exit__(self, *error: object) -> None:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_thousand_hostile_directories(seed):
    assert fuzz_checkpoints.main(["--cases", "10000", "--seed", str(seed), "--jobs", "2"]) == 0
