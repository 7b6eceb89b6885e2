"""The script on few images and epochs; the default run in full with -m slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
from conftest import draw_nothing, make_dataset, mostly_slow
from timm.data import IMAGENET_DEFAULT_MEAN
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
)

import timm_eps
import train_hf
from timm_eps.surgery.branches import gates
from timm_eps.training import build

ROOT = Path(__file__).parent.parent

SHORT = [
    *("--architecture", "eps_resnet20", "--num_train_epochs", "4", "--max_train_samples", "200"),
    *("--epsilon_warmup_epochs", "1", "--ramp_epochs", "2", "--patience", "1"),
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Other processes test on the other cores."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("timm_eps.training.launching.available_cores", lambda: 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _not_loaded_again(request, monkeypatch):
    """Only the first test, and tests that start a new process, load the saved model again, time it, and draw it."""
    if request.node.name != "test_everything_is_written":
        monkeypatch.setattr(train_hf.publishing, "check_reload", lambda *_: "not tried")
        monkeypatch.setattr(train_hf.publishing, "paired_seconds", lambda pair, *_: dict.fromkeys(pair, [1.0] * 3))
        draw_nothing(monkeypatch)


def run(tmp_path, *arguments: str, name: str = "out") -> dict:
    keep = [] if {"--keep", "--no_gates"} & set(arguments) else ["--keep", "3"]
    return train_hf.main([*SHORT, *keep, "--output_dir", str(tmp_path / name), *arguments])


def without_times(results: dict) -> dict:
    return {key: value for key, value in results.items() if not key.endswith(("_seconds", "_quartiles"))}


def test_everything_is_written(tmp_path, capsys):
    results = run(tmp_path)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "README.md", "all_results.json", "blocks.png", "config.json", "model.safetensors",
    }  # fmt: skip
    stored = json.loads((out / "all_results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    fixed = {
        "eval_accuracy", "dense_params", "params", "blocks_total", "blocks_kept", "removed", "epsilon", "train_seconds",
    }  # fmt: skip
    assert fixed <= stored.keys()
    assert stored["blocks_total"] == 9
    assert stored["blocks_kept"] == 9 - len(stored["removed"]) == 3
    assert len(stored["eval_accuracy_by_epoch"]) == 4
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.removed == stored["removed"]
    assert sum(p.numel() for p in model.parameters()) == stored["params"]
    assert str(tmp_path) not in (out / "README.md").read_text()
    said = capsys.readouterr().out
    assert "Training eps_resnet20 on 200 images of scikit-learn digits (3x8x8, 10 classes), testing on 360" in said
    assert "3 of 9 residual branches remain" in said
    assert "timm equal, AutoModelForImageClassification equal, pipeline equal." in said


def test_same_seed_same_result(tmp_path):
    first, again, other = run(tmp_path, name="a"), run(tmp_path, name="b"), run(tmp_path, "--seed", "1", name="c")
    assert without_times(first) == without_times(again)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert without_times(first)["eval_accuracy_by_epoch"] != without_times(other)["eval_accuracy_by_epoch"]


def test_compare_dense_is_the_same_recipe_without_gates(tmp_path):
    both = run(tmp_path, "--compare_dense", name="both")
    dense = run(tmp_path, "--no_gates", name="dense")
    assert both["dense_eval_accuracy_by_epoch"] == dense["eval_accuracy_by_epoch"]
    assert dense["blocks_kept"] == 9
    assert dense["params"] == dense["dense_params"] == both["dense_params"]
    assert "training time" in (tmp_path / "both/README.md").read_text()


def test_gates_that_are_off_look_at_nothing(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_hf, "end_epoch", lambda training: seen.append(training.model))
    with pytest.raises(IndexError):  # no epoch has ended
        run(tmp_path, "--no_gates", "--num_train_epochs", "1")
    (model,) = seen
    assert {gate.response.item() for gate in gates(model).values()} == {-1.0}


def test_the_final_network_alone_is_tested_on_request(tmp_path):
    often, once = run(tmp_path, name="often"), run(tmp_path, "--eval_strategy", "no", name="once")
    assert once["eval_accuracy_by_epoch"] == []
    assert once["eval_accuracy"] == often["eval_accuracy"] == often["eval_accuracy_by_epoch"][-1]


def parse(argv: list[str]) -> SimpleNamespace:
    """All arguments by name."""
    return SimpleNamespace(**train_hf.parse_arguments(argv).flat())


def test_config_file_and_flags(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"keep": 5, "criterion": "importance", "num_train_epochs": 7, "seed": 3}))
    args = parse(["--config", str(config), "--num_train_epochs", "2"])
    assert (args.keep, args.num_train_epochs, args.seed) == (5, 2, 3)
    args = parse(["--config", str(config), "--epsilon", "2.5"])
    given = args.keep, args.epsilon, args.criterion
    assert given == (None, 2.5, "response"), "a flag wins over the file, also over its opposite there"
    args = parse(["--config", str(config), "--no_gates"])
    assert (args.keep, args.epsilon, args.no_gates) == (None, None, True)
    args = parse([])
    assert (args.keep, args.epsilon) == (0.25, None)
    assert args.output_dir == str(Path("outputs/eps_resnet110-digits"))
    assert parse(["--dataset_name", "uoft-cs/cifar10"]).output_dir == str(Path("outputs/eps_resnet110-cifar10"))
    assert parse(["--keep", "14"]).keep == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0.5", "--epsilon", "1"], "--epsilon and --keep exclude each other"),
        (["--cuda_graphs", "--gradient_accumulation_steps", "2"], "--cuda_graphs needs --gradient_accumulation"),
        (["--no_gates", "--compare_dense"], "--no_gates and --compare_dense exclude each other"),
        (["--dataset_name", "a", "--train_dir", "b"], "--dataset_name and --train_dir exclude each other"),
        (["--model_name_or_path", "a", "--architecture", "b"], "--model_name_or_path and --architecture exclude"),
        (["--validation_dir", "a"], "--validation_dir needs --train_dir"),
        (["--dataset_config_name", "a"], "--dataset_config_name needs --dataset_name"),
        (["--num_train_epochs", "-1"], "--num_train_epochs: must be at least 0, got -1"),
        (["--padding", "-1"], "--padding: must be at least 0, got -1"),
        (["--lr_decay_start", "30"], "--lr_decay_start: must be between 0 and 1, got 30"),
        (["--image_size", "0"], "--image_size: must be at least 4, got 0"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--hub_model_id", "me/x"], "--hub_model_id needs --push_to_hub"),
        (["--flip", "--augmentation", "distort"], "--flip needs --augmentation crop or resized_crop"),
        (["--color_jitter", "0.1", "0.1", "0.1"], "--color_jitter needs --augmentation resized_crop"),
        (["--nesterov", "--optimizer", "adamw"], "--nesterov needs --optimizer sgd"),
        (["--steps_per_epoch", "9", "--streaming"], "--steps_per_epoch and --streaming exclude each other"),
        (["--epsilon", "inf"], "--epsilon: must be finite, got inf"),
        (["--epsilon", "nan"], "--epsilon: must be finite, got nan"),
        (["--weight_decay", "inf"], "--weight_decay: must be finite, got inf"),
        (["--lr_factors", "1", "nan"], "--lr_factors: must be finite, got nan"),
        (["--weight_decay_drop", "9", "inf"], "--weight_decay_drop: must be finite, got inf"),
        (["--epsilon", "1", "--criterion", "importance"], "--criterion importance needs --keep"),
        (["--report_to", "tensorboard"], "--report_to needs --with_tracking"),
        (["--logging_steps", "5"], "--logging_steps needs --with_tracking"),
        (["--logging_steps", "0", "--with_tracking"], "--logging_steps: must be at least 1, got 0"),
        (["--checkpoints_total_limit", "2"], "--checkpoints_total_limit needs --checkpointing_steps"),
        (["--checkpoints_total_limit", "0", "--checkpointing_steps", "1"], "limit: must be at least 1, got 0"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps: must be at least 1, got 0"),
        (["--checkpointing_steps", "-3"], "--checkpointing_steps: must be at least 1, got -3"),
        (["--checkpointing_steps", "epochs"], "--checkpointing_steps: invalid steps_or_epoch value: 'epochs'"),
        (["--checkpointing_steps", "2.5"], "--checkpointing_steps: invalid steps_or_epoch value: '2.5'"),
        (["--num_threads", "0"], "--num_threads: must be at least 1, got 0"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers: must be at least 0, got -1"),
        (["--shuffle_buffer_size", "0"], "--shuffle_buffer_size: must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: must be at least 1, got 0"),
        (["--weight_decay_drop", "0", "0.5"], "--weight_decay_drop"),
    ],
)
def test_flags_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_hf.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_how_often_and_where_from(tmp_path):
    args = parse([])
    assert (args.checkpointing_steps, args.resume_from_checkpoint, args.with_tracking) == (None, None, False)
    assert parse(["--checkpointing_steps", "7"]).checkpointing_steps == 7
    assert parse(["--checkpointing_steps", "epoch"]).checkpointing_steps == "epoch"
    assert parse(["--resume_from_checkpoint"]).resume_from_checkpoint == "latest"
    assert parse(["--resume_from_checkpoint", "a/checkpoint-3"]).resume_from_checkpoint == "a/checkpoint-3"
    assert parse(["--with_tracking", "--report_to", "tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"checkpointing_steps": 7, "resume_from_checkpoint": "latest", "sync_batchnorm": True}))
    args = parse(["--config", str(path)])
    assert (args.checkpointing_steps, args.resume_from_checkpoint, args.sync_batchnorm) == (7, "latest", True)


@pytest.mark.parametrize(
    "stored", [{"lr_scheduler": "linear"}, {"flip": "false"}, {"num_train_epochs": 2.5}, {"epsilon": True}]
)
def test_values_in_a_config_are_checked_like_flags(stored, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(SystemExit):
        train_hf.parse_arguments(["--config", str(path)])
    assert "error:" in capsys.readouterr().err


def test_lists_and_switches_in_a_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"lr_milestones": [1, 2, 3], "flip": True, "no_gates": False, "fold": None}))
    args = parse(["--config", str(path)])
    assert (args.lr_milestones, args.flip, args.no_gates, args.fold) == ([1, 2, 3], True, False, 0)


def test_the_stored_config_is_the_default():
    stored = train_hf.parse_arguments(["--config", str(ROOT / "hub_configs/eps_resnet110.digits.json")])
    assert {**stored.flat(), "config": None} == train_hf.parse_arguments([]).flat()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must contain an object of arguments by name, not a list"),
        ('{"epsilom": 2.5}', "contains 'epsilom', which is not an argument"),
    ],
)
def test_bad_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        train_hf.parse_arguments(["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architecture", "resnet5"], "--architecture 'eps_resnet5' is unknown"),
        (["--keep", "1.5"], "keep must be a fraction"),
        (["--epsilon", "-1"], "epsilon must be a number of at least 0"),
        (["--learning_rate", "nan", "--num_train_epochs", "1"], "The loss of epoch 1 is nan; lower --learning_rate"),
        (["--cuda_graphs"], "--cuda_graphs needs one process on an NVIDIA GPU, but this run has 1 on cpu"),
        (["--fold", "9"], "fold must be 0 to 4"),
        (["--image_column_name", "picture"], "'picture' is not a column of type Image"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    base = ["--output_dir", str(tmp_path), "--max_train_samples", "200", "--max_eval_samples", "20"]
    base += [] if "--architecture" in arguments else ["--architecture", "eps_resnet20"]
    with pytest.raises(ValueError, match=message):
        train_hf.main([*base, *arguments])


def test_output_directory_is_tried_before_training(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError):
        run(tmp_path)


def test_a_class_never_trained(tmp_path):
    for split, classes in (("train", "abc"), ("val", "abd")):
        data = make_dataset(9, classes=tuple(classes))
        for index, row in enumerate(data):
            folder = tmp_path / split / classes[row["fine_label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["img"].save(folder / f"{index}.png")
    with pytest.raises(ValueError, match="Class 'd' is in the validation split but has no training image"):
        train_hf.main(
            ["--architecture", "eps_resnet20", "--train_dir", str(tmp_path / "train"), "--validation_dir",
             str(tmp_path / "val"), "--output_dir", str(tmp_path / "out")]
        )  # fmt: skip


def test_pruned_model_is_fine_tuned_further(tmp_path):
    """From a saved model to fewer blocks, on a local data set with the schema of cifar100 (two label columns)."""
    first = run(tmp_path, "--keep", "6", name="first")
    directory = tmp_path / "data"
    for split, count in (("train", 60), ("test", 30)):
        fine = make_dataset(count)
        coarse = ["ab".find(fine.features["fine_label"].int2str(i)[0]) > 0 for i in fine["fine_label"]]
        both = fine.add_column("coarse_label", [int(c) for c in coarse])
        both.cast_column("coarse_label", datasets.ClassLabel(names=["x", "y"])).to_parquet(
            directory / f"{split}.parquet"
        )
    arguments = [
        *SHORT[2:],
        "--model_name_or_path",
        str(tmp_path / "first"),
        "--dataset_name",
        str(directory),
        "--flip",
    ]
    arguments += ["--label_column_name", "fine_label", "--keep", "4", "--output_dir", str(tmp_path / "second")]
    arguments += ["--lr_scheduler", "restarting", "--lr_milestones", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"has 10 classes, but the data set has 3. Use --ignore_mismatched_sizes"):
        train_hf.main(arguments)
    second = train_hf.main([*arguments, "--ignore_mismatched_sizes"])
    card = (tmp_path / "second" / "README.md").read_text()
    assert "keeps 4 of 9 residual branches" in card
    assert "(test)" in card
    assert str(tmp_path) not in card + json.dumps(second), "paths of this machine mean nothing elsewhere"
    assert (first["blocks_kept"], second["blocks_kept"]) == (6, 4)
    assert set(first["removed"]) < set(second["removed"])
    assert second["train_images"] == 60
    assert second["eval_images"] == 30
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.pretrained_cfg["mean"] == pytest.approx(
        AutoModelForImageClassification.from_pretrained(tmp_path / "first").config.pretrained_cfg["mean"]
    )


@pytest.mark.parametrize("saved_by", ["timm", "transformers"])
def test_a_network_that_was_saved_without_gates_is_pruned(tmp_path, saved_by):
    dense = timm.create_model("test_resnet", num_classes=10)
    if saved_by == "timm":
        timm.models.save_for_hf(dense, tmp_path / "dense", model_config={"num_classes": 10}, safe_serialization=True)
    else:
        cfg = {name: dense.pretrained_cfg[name] for name in ("input_size", "mean", "std", "crop_pct", "interpolation")}
        config = TimmWrapperConfig(architecture="test_resnet", num_labels=10, pretrained_cfg=cfg)
        wrapper = TimmWrapperForImageClassification(config)
        wrapper.timm_model.load_state_dict(dense.state_dict())
        wrapper.save_pretrained(tmp_path / "dense")
    results = train_hf.main(
        ["--model_name_or_path", str(tmp_path / "dense"), "--num_train_epochs", "0", "--keep", "0.5", "--image_size",
         "32", "--max_train_samples", "40", "--max_eval_samples", "20", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert (results["architecture"], results["blocks_kept"]) == ("eps_test_resnet", 2)
    pruned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    kept = {name for name in pruned if not name.startswith("fc.") and "num_batches" not in name}
    assert all(torch.equal(pruned[name], dense.state_dict()[name]) for name in kept if "running" not in name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: ViTConfig(num_hidden_layers=1).save_pretrained(path), "is a vit model of transformers. Only"),
        (lambda path: path.write_bytes(b"weights"), "is a file. Load it into a model of timm.create_model"),
        (lambda path: None, "is not a directory with config.json, and cannot be read from the Hub"),
    ],
)
def test_other_models_are_refused_with_a_remedy(tmp_path, make, message):
    make(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        train_hf.main(["--model_name_or_path", str(tmp_path / "other"), "--output_dir", str(tmp_path / "out")])


def test_a_mistyped_directory_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_hf.main(["--train_dir", str(tmp_path / "trian"), "--output_dir", str(tmp_path / "out")])
    assert f"--train_dir {tmp_path / 'trian'} does not exist" in capsys.readouterr().err


def test_the_name_of_a_twin_may_lack_its_prefix():
    assert parse(["--architecture", "resnet50"]).architecture == "eps_resnet50"


def test_fixed_epsilon_without_live_removal(tmp_path):
    results = train_hf.main(
        ["--architecture", "eps_resnet20", "--num_train_epochs", "3", "--max_train_samples", "200",
         "--epsilon_warmup_epochs", "1", "--epsilon", "1000", "--no_live_removal", "--gradient_accumulation_steps", "2",
         "--side_loss_weight", "0", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert results["epsilon"] == 1000
    assert results["blocks_kept"] == 1, "removed at the end, with the save, but for the last one"


@pytest.mark.parametrize(("given", "threads"), mostly_slow([([], 2), (["--num_threads", "1"], 1)], 0))
def test_threads(tmp_path, monkeypatch, given, threads):
    """accelerate launch alone would set one thread. The results state the number of threads."""
    monkeypatch.setattr("timm_eps.training.launching.available_cores", lambda: 2)
    few = ["--num_train_epochs", "1", "--max_train_samples", "32", "--max_eval_samples", "20"]  # two threads may wait
    assert run(tmp_path, *few, *given)["hardware"].startswith(f"{threads} threads of")


def test_launched(tmp_path):
    """Under ``accelerate launch``. Autocast during training must not affect the check of the reloaded model."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--mixed_precision",
        "bf16",
        str(ROOT / "train_hf.py"),
    ]
    done = subprocess.run(
        [*command, *SHORT, "--num_train_epochs", "1", "--num_threads", "1", "--output_dir", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Saved in" in done.stdout
    assert "timm equal, AutoModelForImageClassification equal, pipeline equal." in done.stdout


# Each child is a separate launch. All share the import of torch: (name, environment, further arguments).
LAUNCHES = """
import json, os, runpy, sys
import train_hf
for name, environment, arguments in json.loads(sys.argv[1]):
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"\\n= {name} {status}", flush=True)
        continue
    os.environ.update(environment)
    sys.argv = ["train_hf.py", *arguments]
    os.dup2(1, 2)
    runpy.run_path(train_hf.__file__, run_name="__main__")
    sys.exit()
"""


@pytest.mark.slow
def test_foreign_launchers_end_in_one_line_or_a_whole_run(tmp_path):
    """No training runs twice or in part without an error, and there is no traceback."""
    environments = {
        "fsdp": {"ACCELERATE_USE_FSDP": "true"},
        "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
        "fp16": {"ACCELERATE_MIXED_PRECISION": "fp16"},
        "not connected": {"WORLD_SIZE": "2"},
        "not connected, of a rank": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    }
    arguments = [*SHORT, "--num_train_epochs", "1", "--num_threads", "1"]
    runs = [(name, env, [*arguments, "--output_dir", str(tmp_path / name)]) for name, env in environments.items()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, json.dumps(runs)],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    rest, said = done.stdout, {}
    for name in environments:
        said[name], _, rest = rest.partition(f"= {name} ")
        status, _, rest = rest.partition("\n")
        assert "Traceback" not in said[name], name
        if status == "0":
            assert f"Saved in {tmp_path / name}." in said[name]
            assert "timm equal, AutoModelForImageClassification equal, pipeline equal." in said[name]
        else:
            assert sum(line.startswith("train_hf.py: error: ") for line in said[name].splitlines()) == 1
            assert not (tmp_path / name / "model.safetensors").exists()
    assert "DeepSpeed is not installed" in said["deepspeed"]
    assert "Launch without --use_fsdp" in said["fsdp"]
    assert "--mixed_precision fp16 needs an accelerator" in said["fp16"]
    for name in ("not connected", "not connected, of a rank"):
        assert "error: " in said[name]
        assert "epoch 1" not in said[name]


@pytest.mark.slow
def test_compiled(tmp_path):
    """Two structures are compiled, one before and one after the removal."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_hf.py"), *SHORT, "--num_train_epochs", "3", "--ramp_epochs", "1",
         "--compile", "--max_train_samples", "64", "--keep", "3", "--num_threads", "1", "--output_dir", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "timm equal, AutoModelForImageClassification equal, pipeline equal." in done.stdout
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["blocks_kept"] == 3
    assert results["arguments"]["compile"] is True


@pytest.mark.slow
def test_default_run(tmp_path):
    results = train_hf.main(["--output_dir", str(tmp_path)])
    assert results["params"] <= 0.15 * results["dense_params"]
    assert results["eval_accuracy"] > 0.98
    assert max(results["eval_accuracy_by_epoch"][-10:]) - min(results["eval_accuracy_by_epoch"][-10:]) < 0.02


@pytest.mark.parametrize("name", mostly_slow(["eps_test_resnet", "eps_test_vit"]))
def test_twins_of_timm_models_train_too(tmp_path, name):
    """A post-activation ResNet and a ViT with shortened recipes."""
    config = ["--config", str(ROOT / "hub_configs" / f"{name}.digits.json"), "--num_warmup_steps", "0"]
    small = ["--max_eval_samples", "50", *(["--image_size", "32"] if name == "eps_test_resnet" else [])]
    short = [*SHORT[2:], "--output_dir", str(tmp_path), "--keep", "5", *small]
    results = train_hf.main([*config, *short])
    assert results["architecture"] == name
    assert 5 <= results["blocks_kept"] < results["blocks_total"], "responses still move after so few steps"
    assert results["params"] < results["dense_params"]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.removed == results["removed"]
    assert (
        f"keeps {results['blocks_kept']} of {results['blocks_total']} residual branches"
        in (tmp_path / "README.md").read_text()
    )
    fewer = train_hf.main(
        ["--model_name_or_path", str(tmp_path), "--keep", "3", *SHORT[2:], "--output_dir", str(tmp_path / "on")]
    )
    assert fewer["blocks_kept"] < results["blocks_kept"]


def test_bad_arguments_for_timm(capsys):
    for text, message in {"{": "must be JSON, got {", "[1]": "must be a JSON object, got"}.items():
        with pytest.raises(SystemExit):
            train_hf.parse_arguments(["--model_args", text])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--num_warmup_steps 50 must be below the 8 steps"):
        train_hf.main([*SHORT, "--keep", "3", "--num_warmup_steps", "50"])


def test_large_images_are_read_when_needed(tmp_path):
    make_dataset(12, size=(20, 24)).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    make_dataset(6, size=(20, 24)).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    results = run(
        tmp_path, *("--dataset_name", str(tmp_path / "data"), "--augmentation", "resized_crop", "--flip"),
        *("--image_size", "16", "--crop_pct", "0.8", "--lr_scheduler", "multistep", "--lr_milestones", "1", "2"),
        *("--lr_factors", "1", "0.1", "0.01", "--weight_decay_drop", "2", "0.5", "--nesterov"),
    )  # fmt: skip
    assert results["blocks_kept"] == 3
    stored = json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]
    assert stored["crop_pct"] == 0.8
    assert stored["mean"] == list(IMAGENET_DEFAULT_MEAN)
    assert results["arguments"]["augmentation"] == "resized_crop"
    assert "padding" not in results["arguments"]


def test_rate_and_decay_fall_as_told(tmp_path, monkeypatch):
    """Three epochs of two steps: the rate falls after each epoch, the decay after every second step."""
    seen = []

    class Recording(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "SGD", Recording)
    run(
        tmp_path, *("--num_train_epochs", "3", "--lr_scheduler", "multistep", "--lr_milestones", "1", "2"),
        *("--lr_factors", "1", "0.5", "0.25", "--learning_rate", "0.1", "--weight_decay", "0.01"),
        *("--weight_decay_drop", "2", "0.5"),
    )  # fmt: skip
    expected = [(0.1, 0.01)] * 2 + [(0.05, 0.005)] * 2 + [(0.025, 0.0025)] * 2
    assert seen == [pytest.approx(pair) for pair in expected]


def test_code_for_a_class_of_the_user_is_refused_before_training(tmp_path):
    class Gated(timm_eps.EpsilonMixin, timm.models.ResNet):
        pass

    Gated.register("eps_test_mine", block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="remote_code: eps_test_mine is no architecture of timm"):
        train_hf.main(["--architecture", "eps_test_mine", "--with_remote_code", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("epochs", [2, 3, 5, 10, 14, 15, 60])
def test_warm_up_and_ramp_fit_into_a_short_run(epochs):
    args = parse(["--keep", "0.5", "--num_train_epochs", str(epochs)])
    assert 1 <= args.epsilon_warmup_epochs < args.epsilon_warmup_epochs + args.ramp_epochs <= max(epochs, 2)
    if epochs >= 15:
        assert (args.epsilon_warmup_epochs, args.ramp_epochs) == (4, 8)
    given = parse(["--num_train_epochs", str(epochs), "--epsilon_warmup_epochs", "7", "--ramp_epochs", "9"])
    assert (given.epsilon_warmup_epochs, given.ramp_epochs) == (7, 9)


TINY = [
    "--architecture",
    "eps_resnet20",
    "--max_train_samples",
    "200",
    "--max_eval_samples",
    "50",
    "--num_threads",
    "1",
]


def test_a_short_run_reaches_its_budget(tmp_path):
    results = train_hf.main([*TINY, "--keep", "5", "--num_train_epochs", "3", "--output_dir", str(tmp_path)])
    assert results["blocks_kept"] == results["blocks_wanted"] == 5


def test_a_budget_that_was_not_reached_is_said_to_be(tmp_path, capsys):
    results = train_hf.main([*TINY, "--keep", "5", "--num_train_epochs", "1", "--output_dir", str(tmp_path)])
    assert results["blocks_kept"] == 9
    card = (tmp_path / "README.md").read_text()
    for text in (capsys.readouterr().out, card):
        assert "5 branches were requested, 9 remain" in text
        assert "faster" not in text
        assert "| pruned |" not in text
    assert "- pruned" not in card


def test_a_dense_run_reports_a_dense_network(tmp_path, capsys):
    train_hf.main([*TINY, "--no_gates", "--num_train_epochs", "1", "--output_dir", str(tmp_path)])
    card = (tmp_path / "README.md").read_text()
    for text in (capsys.readouterr().out, card):
        assert "has all its 9 residual branches" in text
        for absent in ("faster", "not trained", "| dense |", "budget"):
            assert absent not in text, absent


def test_a_saved_network_is_fine_tuned_on_images_of_another_size(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    train_hf.main([*TINY, "--no_gates", "--num_train_epochs", "1", "--output_dir", str(first)])
    size = ["--model_name_or_path", str(first), "--image_size", "12"]
    train_hf.main([*TINY[2:], *size, "--no_gates", "--num_train_epochs", "1", "--output_dir", str(second)])
    assert json.loads((second / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 12, 12]


def test_a_network_of_one_size_refuses_another_one(tmp_path):
    timm_eps.save_pretrained(timm.create_model("eps_test_vit", num_classes=10), tmp_path / "a")
    size = ["--model_name_or_path", str(tmp_path / "a"), "--image_size", "64"]
    with pytest.raises(ValueError, match=r"--image_size 64.*accepts only images of size 160"):
        train_hf.main([*TINY[2:], *size, "--output_dir", str(tmp_path / "b")])


@pytest.mark.parametrize(("start", "warmup", "falls_from"), [(0.0, 3, 3), (0.0, 0, 0), (0.5, 3, 5), (0.2, 4, 4)])
def test_the_rate_falls_after_the_warm_up(start, warmup, falls_from):
    args = train_hf.parse_arguments([]).changed(
        lr_decay_start=start, num_warmup_steps=warmup, learning_rate=1.0, num_train_epochs=1
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build.scheduler(args.training, args.paper, optimizer, batches=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[: warmup + 1] == [pytest.approx(step / max(warmup, 1)) for step in range(warmup)] + [1]
    assert all(rate == 1 for rate in rates[warmup : falls_from + 1])
    assert rates[falls_from + 1] < 1
