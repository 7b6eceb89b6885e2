"""Where values are logged, and that logging does not make a step wait."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import mostly_slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import _weights_only, weights_only  # noqa: F401  the fixture is for all tests here as well
from test_train_hf import _one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import train_hf
from timm_eps import EpsilonPruner
from timm_eps.training.step_watch import StepWatch

# 3 epochs of 4 steps.
SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "3", "--max_train_samples", "120"),
    *("--max_eval_samples", "40", "--per_device_train_batch_size", "32", "--num_threads", "1"),
]
GATED = ["--keep", "3", "--epsilon_warmup_epochs", "1", "--ramp_epochs", "1", "--patience", "1"]
TENSORBOARD = ["--with_tracking", "--report_to", "tensorboard"]


def run(out: Path, *arguments: str) -> dict:
    return train_hf.main([*SHORT, "--output_dir", str(out), *arguments])


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as tensorboard reads them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(out.rglob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in accumulator.Scalars(tag))
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    """Log directory of a run with a dense phase, its results, and the history of its gates."""
    out, pruners = tmp_path_factory.mktemp("tracked"), []
    init = EpsilonPruner.__init__
    with pytest.MonkeyPatch.context() as patched:
        weights_only(patched)
        patched.setattr(EpsilonPruner, "__init__", lambda self, *a, **k: (pruners.append(self), init(self, *a, **k))[1])
        results = run(out, *GATED, *TENSORBOARD, "--logging_steps", "3", "--compare_dense")
    [pruner] = pruners
    return out, results, pruner.history


def test_every_epoch_is_logged(tracked):
    out, results, history = tracked
    found = events(out)
    for tag, values in {
        "train_loss": results["train_loss_by_epoch"],
        "eval_accuracy": results["eval_accuracy_by_epoch"],
        "epsilon": [record["epsilon"] for record in history],
        "epoch": [1, 2, 3],
        "dense/train_loss": results["dense_train_loss_by_epoch"],
        "dense/eval_accuracy": results["dense_eval_accuracy_by_epoch"],
        "dense/epoch": [1, 2, 3],
    }.items():
        assert [step for step, _ in found[tag]] == [4, 8, 12], tag
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6), tag
    assert [value for _, value in found["blocks"]][-1] == results["blocks_kept"]


def test_responses_are_logged_while_there_is_a_gate(tracked):
    out, _, history = tracked
    found = events(out)
    assert any(record["removed"] for record in history[:-1])
    expected: dict[str, list[tuple[int, float]]] = {}
    for number, record in enumerate(history, start=1):
        for slot, response in record["responses"].items():
            expected.setdefault(f"response/{slot}", []).append((4 * number, pytest.approx(response, rel=1e-6)))
    assert {tag: values for tag, values in found.items() if tag.startswith("response/")} == expected


def test_the_loss_is_logged_between_epochs(tracked):
    """The mean loss of the epoch so far. At the last step of an epoch it is the epoch's loss."""
    out, results, _ = tracked
    found = events(out)
    for prefix in ("", "dense/"):
        assert [step for step, _ in found[f"{prefix}loss"]] == [3, 6, 9, 12]
        mean = results[f"{prefix.replace('/', '_')}train_loss_by_epoch"][-1]
        assert found[f"{prefix}loss"][-1][1] == pytest.approx(mean, rel=1e-6)
    # The logged rate of an epoch is one of its steps' rates.
    assert [step for step, _ in found["learning_rate"]] == [3, 4, 6, 8, 9, 12, 12]


def test_the_dense_run_has_no_gates_to_log(tracked):
    dense = {tag for tag in events(tracked[0]) if tag.startswith("dense/")}
    assert dense == {f"dense/{name}" for name in ("train_loss", "eval_accuracy", "learning_rate", "epoch", "loss")}


def test_without_gates_there_is_no_prefix(tmp_path):
    run(tmp_path, "--no_gates", "--num_train_epochs", "1", *TENSORBOARD)
    assert events(tmp_path).keys() == {"train_loss", "eval_accuracy", "learning_rate", "epoch"}


def test_logging_changes_nothing(tracked, tmp_path):
    run(tmp_path, *GATED, "--num_train_epochs", "3", "--compare_dense")
    assert (tmp_path / "model.safetensors").read_bytes() == (tracked[0] / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("names", [["wandb"], ["nonsense"], ["tensorboard", "wandb"], ["tensorboard", "nonsense"]])
@pytest.mark.filterwarnings("ignore:.*no supported trackers:UserWarning")
def test_an_unknown_tracker_is_named_before_the_training(tmp_path, monkeypatch, names):
    assert importlib.util.find_spec("wandb") is None
    monkeypatch.setattr("timm_eps.training.inputs.load_splits", lambda args: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=rf"--report_to.*{names[-1]}|capability: {names[-1]}") as error:
        run(tmp_path, "--with_tracking", "--report_to", *names)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("events*")), "nor is a log begun"


def counted(out: Path, monkeypatch, epochs: int, batches: int, *arguments: str) -> dict[str, int]:
    """How often the epochs of a training read a tensor's value, by operator."""
    found: dict[str, int] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "masked_select", "unique"):
                found[name] = found.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    train_epoch = train_hf.train_epoch

    def watched(*args):
        with Counting():
            train_epoch(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train_hf, "train_epoch", watched)
        # On a CPU values are available at once. On a GPU the loss is copied without waiting, and gates read no value.
        patched.setattr("timm_eps.gate._may_read", lambda x: False)
        patched.setattr(StepWatch, "_is_finite", lambda self, loss: True)
        run(out, "--num_train_epochs", str(epochs), "--max_train_samples", str(32 * batches), *arguments)
    return found


@pytest.mark.parametrize(
    "arguments",
    mostly_slow(
        [[*GATED, "--flip"], ["--no_gates", "--augmentation", "distort", "--gradient_accumulation_steps", "2"]], 0
    ),
)
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, arguments):
    """An epoch of eight steps reads as many tensor values as an epoch of four steps."""
    few, many = (counted(tmp_path, monkeypatch, 1, batches, *arguments) for batches in (4, 8))
    assert few == many


def test_what_waits_would_be_counted(tmp_path, monkeypatch):
    """Logging at each step does read the loss."""
    few, many = (counted(tmp_path, monkeypatch, 1, batches, *TENSORBOARD, "--logging_steps", "1") for batches in (4, 8))
    assert many["_local_scalar_dense"] - few.get("_local_scalar_dense", 0) >= 4
