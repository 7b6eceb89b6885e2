"""The script for an existing network: its choices, removal before training, the teacher, and its output."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import make_dataset, mostly_slow, write_splits
from safetensors.torch import load_file
from test_resume import stopped_at, train_only
from test_train_hf import _one_thread, without_times  # noqa: F401  the fixture is for all tests here as well

import timm_eps
import train_hf
from timm_eps.surgery.branches import gates
from timm_eps.training import choices
from timm_eps.training.evaluation import Evaluation
from timm_eps.training.losses import label_mixer, smooth_labels

FEW = [
    *("--max_train_samples", "120", "--max_eval_samples", "40", "--per_device_train_batch_size", "32"),
    *("--num_threads", "1"),
]
SLOTS = [f"stages.{stage}.blocks.{block}.drop_path" for stage in range(3) for block in range(3)]


@pytest.fixture(autouse=True)
def _only_training(monkeypatch, times_measured_once):
    train_only(monkeypatch)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A saved dense network, trained briefly on the digits."""
    out = tmp_path_factory.mktemp("fine-tuning") / "dense"
    with pytest.MonkeyPatch.context() as patched:
        train_only(patched)
        patched.setattr("timm_eps.training.launching.available_cores", lambda: 1)
        arguments = [
            "--architecture",
            "eps_resnet20",
            "--num_train_epochs",
            "3",
            "--no_gates",
            "--output_dir",
            str(out),
        ]
        train_hf.main([*FEW, "--max_train_samples", "400", *arguments])
    return out


def run(dense, out, *arguments: str) -> dict:
    return train_hf.main([*FEW, "--model_name_or_path", str(dense), "--output_dir", str(out), *arguments])


def parse(*arguments: str):
    return SimpleNamespace(**train_hf.parse_arguments(list(arguments)).flat())


def test_defaults_of_a_network_that_begins_with_weights(dense):
    scratch, tuned, stock = parse(), parse("--model_name_or_path", str(dense)), parse("--pretrained")
    names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "prune_at", "criterion", "keep")
    assert [getattr(scratch, name) for name in names] == [60, 128, 0.1, "ramp", "response", 0.25]
    assert [getattr(tuned, name) for name in names] == [20, 32, pytest.approx(0.01), "start", "stage_ends", 0.25]
    assert vars(stock) | {"output_dir": None} == vars(tuned) | {
        "output_dir": None, "pretrained": True, "model_name_or_path": None, "architecture": "eps_resnet110",
    }  # fmt: skip
    assert (tuned.epsilon_warmup_epochs, tuned.ramp_epochs) == (1, 5)
    assert parse("--pretrained", "--num_train_epochs", "50").epsilon_warmup_epochs == 3
    assert parse("--pretrained", "--optimizer", "adamw").learning_rate == pytest.approx(1e-4)
    assert parse("--pretrained", "--learning_rate", "0.3").learning_rate == 0.3, "what is given stays"
    assert parse("--pretrained", "--prune_at", "ramp").criterion == "response"
    assert parse("--pretrained", "--epsilon", "2").prune_at == "ramp", "a fixed threshold is for training"
    assert parse("--pretrained", "--no_gates").prune_at == "ramp"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "3", "--target_macs", "0.5"], "--keep and --target_macs exclude each other"),
        (["--target_latency", "0.5", "--epsilon", "2"], "exclude each other"),
        (["--no_gates", "--target_params", "1000"], "exclude each other"),
        (["--prune_at", "start", "--epsilon", "2"], "--prune_at start needs --keep or a target"),
        (["--pretrained", "--criterion", "importance"], "needs --prune_at ramp"),
        (["--num_train_epochs", "0"], "needs --model_name_or_path"),
        (["--pretrained", "--num_train_epochs", "0", "--prune_at", "ramp"], "needs --prune_at start"),
        (["--dense_epochs", "3"], "--dense_epochs needs --teacher self"),
        (["--teacher", "self", "--teacher_weight", "0"], "--teacher_weight must be above 0"),
        (["--early_stopping_patience", "3", "--eval_strategy", "no"], "needs --eval_strategy epoch"),
        (["--test_dir", "x"], "--test_dir needs --train_dir"),
        (["--mixup_alpha", "-1"], "at least 0"),
        (["--criterion", "last", "--epsilon", "2"], "--criterion last needs --keep or a target"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert said in capsys.readouterr().err


def test_a_budget_on_the_command_line_replaces_that_of_a_file(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"keep": 5, "criterion": "importance"}))
    args = parse("--config", str(config), "--target_macs", "0.5")
    assert (args.keep, args.target_macs, args.criterion) == (None, 0.5, "importance")


def test_help_shows_defaults_and_ends_with_the_papers_settings(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert "default: 0.9998" in " ".join(said.split())
    assert said.index("--target_latency") < said.index("--push_to_hub") < said.rindex("--epsilon ")
    assert "None" not in said


@pytest.mark.parametrize(
    ("criterion", "budget", "holds"),
    mostly_slow(
        [
            ("response", ["--keep", "4"], lambda found: found["blocks_kept"] == 4),
            ("last", ["--target_params", "0.5"], lambda found: found["params"] <= 0.5 * found["dense_params"]),
            ("stage_ends", ["--keep", "6"], lambda found: found["removed"] == SLOTS[2::3]),
            ("leave_one_out", ["--target_macs", "0.5"], lambda found: found["macs"] <= 0.5 * found["dense_macs"]),
        ],
        1,
    ),
)
def test_a_saved_network_is_cut_and_fine_tuned(dense, tmp_path, criterion, budget, holds):
    results = run(dense, tmp_path / "out", *budget, "--criterion", criterion, "--num_train_epochs", "1")
    assert holds(results)
    gone = results["removed"]
    assert criterion != "last" or gone == SLOTS[-len(gone) :]
    assert results["start_eval_accuracy"] == results["dense_eval_accuracy"] > 0.3
    assert set(results["eval_accuracy_by_class"]) == set(results["dense_eval_accuracy_by_class"])
    assert results["arguments"]["prune_at"] == "start"
    assert "patience" not in results["arguments"], "nothing closes while it trains"
    assert (tmp_path / "out/branches.json").exists() == (criterion == "leave_one_out")


def test_a_trained_network_is_cut_without_training(dense, tmp_path, capsys):
    out = tmp_path / "out"
    results = run(dense, out, "--keep", "8", "--criterion", "leave_one_out", "--num_train_epochs", "0")
    assert results["blocks_kept"] == 8
    assert results["train_loss_by_epoch"] == []
    before, after = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    statistics = {name for name in after if "running" in name or "num_batches" in name}
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - statistics)
    assert not all(torch.equal(before[name], after[name]) for name in statistics)
    assert results["eval_accuracy"] > 0.8 * results["start_eval_accuracy"]
    said = capsys.readouterr().out
    assert "Removing 1 of 9 branches before the training." in said
    assert "changes of accuracy by class" in said or "The accuracy fell for no class" in said
    again = run(out, tmp_path / "again", "--keep", "6", "--num_train_epochs", "0")
    assert again["blocks_kept"] == 6, "counted from all branches that the architecture has"
    assert "dense_eval_accuracy" not in again
    assert again["start_eval_accuracy"] == results["eval_accuracy"]


def test_latency_is_measured_and_reported_at_the_batch_size_asked_for(dense, tmp_path):
    results = run(
        dense, tmp_path / "out", "--target_latency", "0.6", "--latency_batch_size", "4", "--num_train_epochs", "0"
    )
    assert 1 <= results["blocks_kept"] < 9
    assert "latency_batch4_seconds" in results
    assert results["arguments"]["latency_batch_size"] == 4


def test_the_dry_run_trains_and_writes_nothing(dense, tmp_path, capsys, times_measured_once):
    out = tmp_path / "out"
    assert run(dense, out, "--target_macs", "0.5", "--criterion", "leave_one_out", "--dry_run") == {}
    said = capsys.readouterr().out
    assert not (out / "model.safetensors").exists()
    assert all(slot in said for slot in SLOTS)
    assert "Without all 9 branches the network has 0.00 of its parameters, 0.01 of its multiply-adds" in said
    assert "TargetMacs(0.5) removes" in said
    assert "mean nothing" not in said
    train_hf.main(
        [*FEW, "--architecture", "eps_resnet20", "--model_args", '{"layers":[1,1,1]}', "--target_macs", "0.5",
         "--dry_run", "--output_dir", str(out)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "The classifier is new, so losses and accuracies above mean nothing" in said
    assert "The target can be reached. The branches to remove are chosen during training." in said


@pytest.mark.parametrize("prune_at", ["start", "ramp"])
def test_the_network_teaches_itself(dense, tmp_path, monkeypatch, prune_at):
    taught = []
    loss = timm_eps.Distillation.loss
    monkeypatch.setattr(timm_eps.Distillation, "loss", lambda self, *args: (taught.append(self), loss(self, *args))[1])
    arguments = ["--keep", "4", "--num_train_epochs", "2", "--prune_at", prune_at, "--teacher_temperature", "3"]
    results = run(dense, tmp_path / "out", *arguments, "--teacher", "self")
    assert len(taught) == 2 * 4
    (teacher,) = {id(each.teacher): each.teacher for each in taught}.values()
    assert len(gates(teacher)) == 9, "the dense network"
    assert teacher.head.fc.weight.equal(load_file(dense / "model.safetensors")["head.fc.weight"])
    assert taught[0].temperature == 3
    assert not any("teacher" in name for name in load_file(tmp_path / "out/model.safetensors"))
    assert results["arguments"]["teacher"] == "self"


def test_a_new_classifier_is_trained_first(tmp_path, capsys):
    arguments = ["--architecture", "eps_resnet20", "--keep", "4", "--num_train_epochs", "1", "--teacher", "self"]
    results = train_hf.main(
        [*FEW, *arguments, "--prune_at", "start", "--dense_epochs", "2", "--output_dir", str(tmp_path)]
    )
    assert len(results["dense_train_loss_by_epoch"]) == 2
    assert len(results["train_loss_by_epoch"]) == 1
    assert {"dense_eval_accuracy", "dense_train_seconds"} <= results.keys()
    assert "The dense network is fine-tuned first, for 2 epochs." in capsys.readouterr().out
    assert "training time" in (tmp_path / "README.md").read_text()


def test_a_saved_teacher_must_fit(dense, tmp_path):
    names = [str(digit) for digit in range(10)]
    cfg = timm.create_model(f"local-dir:{dense}").pretrained_cfg
    teacher = choices.load_teacher(str(dense), names, cfg)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(ValueError, match="has 10 classes, but the data set has 3"):
        choices.load_teacher(str(dense), names[:3], cfg)
    with pytest.raises(ValueError, match="has the classes"):
        choices.load_teacher(str(dense), names[::-1], cfg)
    with pytest.raises(ValueError, match="needs images with mean"):
        choices.load_teacher(str(dense), names, {**cfg, "mean": (0.1, 0.2, 0.3)})
    results = run(dense, tmp_path / "out", "--keep", "4", "--num_train_epochs", "1", "--teacher", str(dense))
    assert "teacher" not in results["arguments"], "a path of this machine"


EXTRAS = {
    "cut": ["--criterion", "leave_one_out", "--keep", "4"],
    "taught": ["--keep", "4", "--teacher", "self", "--dense_epochs", "1"],
    "mixed": ["--keep", "4", "--prune_at", "ramp", "--mixup_alpha", "0.2", "--cutmix_alpha", "1"],
    "averaged": ["--keep", "4", "--prune_at", "ramp", "--model_ema", "--label_smoothing_factor", "0.1"],
    "slowly": ["--target_macs", "0.5", "--prune_at", "ramp", "--criterion", "last"],
}


@pytest.mark.parametrize("kind", mostly_slow(EXTRAS, 3))
def test_a_run_that_is_stopped_goes_on_as_it_would_have(dense, tmp_path, kind):
    arguments = [*EXTRAS[kind], "--num_train_epochs", "3", "--checkpointing_steps", "5", "--patience", "1"]
    whole = run(dense, tmp_path / "whole", *arguments)
    stopped = stopped_at(tmp_path / "whole", "checkpoint-5")
    again = run(dense, stopped, *arguments, "--resume_from_checkpoint")
    assert (stopped / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert without_times(again) == without_times(whole)


def test_a_checkpoint_without_its_average_is_refused(dense, tmp_path):
    arguments = [*EXTRAS["averaged"], "--num_train_epochs", "2", "--checkpointing_steps", "3"]
    run(dense, tmp_path / "out", *arguments)
    checkpoint = tmp_path / "out/checkpoint-3"
    (checkpoint / "average.safetensors").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["average.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "out/checkpoint-6", ignore_errors=True)
    with pytest.raises(ValueError, match="checkpoint-3 does not fit this run"):
        run(dense, tmp_path / "out", *arguments, "--resume_from_checkpoint", str(checkpoint))


def test_the_average_is_what_is_tested_and_saved(dense, tmp_path, monkeypatch):
    trainings = []
    prepare = train_hf.prepare

    def note(*args, **begun):
        trainings.append(prepare(*args, **begun))
        return trainings[-1]

    monkeypatch.setattr(train_hf, "prepare", note)
    results = run(dense, tmp_path / "out", *EXTRAS["averaged"], "--num_train_epochs", "5", "--patience", "1")
    (training,) = trainings
    average = training.average.module.timm_model.state_dict()
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(average[name].equal(value) for name, value in stored.items())
    assert not training.model.timm_model.head.fc.weight.equal(stored["head.fc.weight"])
    assert results["blocks_kept"] == 4


def test_training_stops_when_the_accuracy_has_stopped_rising(dense, tmp_path, monkeypatch):
    accuracies = iter([0.6, 0.6, 0.55, 0.4, 0.9])
    known = Evaluation([1] * 10, [1] * 10)
    monkeypatch.setattr(train_hf, "evaluate", lambda *_: known)
    monkeypatch.setattr(Evaluation, "accuracy", property(lambda self: next(accuracies)))
    monkeypatch.setattr(train_hf, "begin", lambda *_: (None, {}))
    results = run(dense, tmp_path / "out", "--keep", "4", "--num_train_epochs", "9", "--early_stopping_patience", "2")
    assert results["eval_accuracy_by_epoch"] == [0.6, 0.6, 0.55]


def test_labels_are_smoothed_and_images_mixed():
    model = timm_eps.EpsResNetForImageClassification(
        timm_eps.EpsResNetConfig(architecture="eps_resnet20", num_labels=3, side_loss_weight=0.0)
    ).eval()
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    smooth_labels(model, 0.2)
    output = model(images, labels=labels)
    logs = output.logits.log_softmax(-1)
    expected = -(0.8 * logs[torch.arange(8), labels] + 0.2 * logs.mean(-1)).mean()
    assert torch.allclose(output.loss, expected)
    assert label_mixer(3) is None
    for alphas in ((0.2, 0.0), (0.0, 1.0), (0.2, 1.0)):
        mixed, shares = label_mixer(3, *alphas)(images, labels)
        assert shares.shape == (8, 3)
        assert torch.allclose(shares.sum(-1), torch.ones(8))
        assert not mixed.equal(images)
        model(mixed, labels=shares).loss.backward()


def test_final_tests_use_a_split_of_their_own(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    rows = {name: make_dataset(count) for name, count in {"train": 24, "validation": 8, "test": 12}.items()}
    directory = write_splits(tmp_path / "set", **rows)
    arguments = ["--architecture", "eps_resnet20", "--image_size", "8", "--num_train_epochs", "1", "--no_gates"]
    common = ["--dataset_name", directory, "--per_device_train_batch_size", "8", "--num_threads", "1"]
    results = train_hf.main([*arguments, *common, "--test_split_name", "test", "--output_dir", str(tmp_path / "out")])
    assert (results["eval_images"], results["test_images"]) == (8, 12)
    assert results["eval_split"] == "validation"
    assert "accuracy, test split" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="is among the splits that are trained on"):
        train_hf.main([*arguments, *common, "--test_split_name", "train", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="has no split 'more'"):
        train_hf.main([*arguments, *common, "--test_split_name", "more", "--output_dir", str(tmp_path / "out")])
