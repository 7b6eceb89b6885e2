"""Blocks are removed while ``transformers.Trainer`` trains: resuming, checkpoints, weight decay, and two processes."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from conftest import mostly_slow
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

import timm_eps
from timm_eps import EpsilonCallback, EpsResNetBackbone, EpsResNetConfig, EpsResNetForImageClassification
from timm_eps.criteria import CRITERIA
from timm_eps.surgery.branches import gates
from timm_eps.surgery.removal import closed_slots, removed_slots

BUDGET = dict(keep=4, warmup_epochs=1, ramp_epochs=2, patience=2)
SOON = dict(keep=4, patience=1)
SGD = dict(optim="sgd", learning_rate=1e-2)
OPTIMIZERS = {"sgd": SGD, "adamw": dict(learning_rate=1e-3)}
EPOCHS, STEPS = 6, 3  # with 24 images in batches of 8
LAST = EPOCHS * STEPS
STATES = ["all open", "some closed", "some removed"]


class Images(torch.utils.data.Dataset):
    def __init__(self, number: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(number, 3, 8, 8, generator=generator)
        self.labels = torch.randint(3, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Spy(TrainerCallback):
    """State of the model at each save, by step."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.seen: dict[int, SimpleNamespace] = {}
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_save(self, args, state, control, model, **kwargs):
        self.seen[state.global_step] = SimpleNamespace(
            logits=logits(model, self.images),
            features=features(model, self.images),
            closed=closed_slots(model),
            removed=removed_slots(model),
            side_head={key: value.clone() for key, value in model.side_head.state_dict().items()},
        )


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    mode = model.training
    result = model.eval()(pixel_values=images).logits
    model.train(mode)
    return result


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    mode = model.training
    result = model.eval().timm_model.forward_features(images)
    model.train(mode)
    return result


def fresh_model(seed: int = 0, **fields) -> EpsResNetForImageClassification:
    torch.manual_seed(seed)
    config = {"architecture": "eps_resnet20", "num_labels": 3, **fields}
    return EpsResNetForImageClassification(EpsResNetConfig(**config))


def make_trainer(out, model=None, callbacks=(), budget=BUDGET, number=24, optimizers=(None, None), **options):
    """A trainer whose first callback prunes if there is a budget."""
    defaults = dict(
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        weight_decay=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    pruning = [EpsilonCallback(**budget)] if budget else []
    trainer = Trainer(
        fresh_model() if model is None else model,
        TrainingArguments(str(out), **{**defaults, **options}),
        train_dataset=Images(number),
        eval_dataset=Images(8),
        callbacks=[*pruning, *callbacks],
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def pruning_callback(trainer: Trainer) -> EpsilonCallback:
    (found,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, EpsilonCallback)]
    return found


def logged(trainer: Trainer) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    some, others = model.state_dict(), other.state_dict()
    assert some.keys() == others.keys()
    assert [key for key in some if not torch.equal(some[key], others[key])] == []


def assert_optimizer_fits(trainer: Trainer) -> None:
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(trainer.model.parameters())
    assert trainer.optimizer.state.keys() <= set(held)


@contextmanager
def warnings_logged(caplog) -> Iterator[list[str]]:
    """Collect the texts of all warnings of transformers and this package."""
    texts: list[str] = []
    caplog.clear()
    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            yield texts
    finally:
        hf_logging.disable_propagation()
        texts += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars():
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    yield
    if shown:
        hf_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Uninterrupted runs, started on first use: (trainer, spy, directory)."""
    runs: dict[tuple[str, str], tuple[Trainer, Spy, Path]] = {}

    def run(optimizer: str = "sgd", save_strategy: str = "epoch") -> tuple[Trainer, Spy, Path]:
        key = (optimizer, save_strategy)
        if key not in runs:
            out = tmp_path_factory.mktemp("-".join(key))
            spy = Spy(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)))
            options = dict(save_strategy=save_strategy, save_steps=2, **OPTIMIZERS[optimizer])
            trainer = make_trainer(out, callbacks=[spy], **options)
            trainer.train()
            runs[key] = trainer, spy, out
        return runs[key]

    return run


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_blocks_go_while_trainer_trains(trained, optimizer):
    trainer, spy, _ = trained(optimizer)
    pruner = pruning_callback(trainer).pruner
    removals = [step for step in range(STEPS, LAST + 1, STEPS) if pruner.history[step // STEPS - 1]["removed"]]
    assert removals
    assert removals[0] < LAST, "it trained on after a removal"
    removed = removed_slots(trainer.model)
    assert len(removed) == sum(len(record["removed"]) for record in pruner.history)
    assert trainer.model.config.model_args["removed"] == trainer.model.timm_model.removed == removed
    assert gates(trainer.model).keys().isdisjoint(removed)
    for step, seen in spy.seen.items():
        assert sorted(seen.removed) == sorted(
            slot for one in pruner.history[: step // STEPS] for slot in one["removed"]
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_holds_the_models_parameters_alone(trained, optimizer):
    assert_optimizer_fits(trained(optimizer)[0])
    assert optimizer == "sgd" or trained(optimizer)[0].optimizer.state


def assert_epsilon_and_blocks(logs: list[dict], pruner: timm_eps.EpsilonPruner) -> None:
    history = pruner.history
    assert len(logs) == STEPS * len(history)
    blocks = 9
    for entry, record in zip(logs, [record for record in history for _ in range(STEPS)], strict=True):
        assert entry["epsilon"] == record["epsilon"]
        assert entry["blocks"] == blocks
        if entry["epoch"] == record["epoch"] + 1:
            removed = {slot for one in history[: record["epoch"] + 1] for slot in one["removed"]}
            asked_for = pruner.schedule.to_close(record["epoch"], 9)
            blocks = 9 - min(len(removed.union(record["closed"])), asked_for)


def test_logs_carry_epsilon_and_blocks(trained):
    trainer, spy, _ = trained()
    assert_epsilon_and_blocks(spy.logs, pruning_callback(trainer).pruner)


def test_log_history_carries_epsilon_and_blocks(trained):
    trainer, _, out = trained()
    assert_epsilon_and_blocks(trainer.state.log_history[:-1], pruning_callback(trainer).pruner)
    stored = json.loads((out / f"checkpoint-{LAST}" / "trainer_state.json").read_text())
    assert_epsilon_and_blocks(stored["log_history"], pruning_callback(trainer).pruner)


@pytest.mark.parametrize("live_removal", [True, False])
def test_saved_after_the_training_every_loader_gives_the_live_logits(trained, tmp_path, live_removal, caplog):
    if live_removal:
        trainer = trained()[0]
        assert removed_slots(trainer.model)
    else:
        trainer = make_trainer(tmp_path, budget={**SOON, "live_removal": False}, num_train_epochs=2, number=16, **SGD)
        trainer.train()
        assert closed_slots(trainer.model)
    images = Images().images[:4]
    live = logits(trainer.model, images)
    gone = {*removed_slots(trainer.model), *closed_slots(trainer.model)}
    trainer.save_model(tmp_path)
    with warnings_logged(caplog) as warned:
        by_auto = AutoModelForImageClassification.from_pretrained(tmp_path)
        by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert warned == []
    assert torch.equal(logits(by_auto, images), live)
    with torch.no_grad():
        assert torch.equal(by_timm(images), live)
    assert "closed" not in json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert set(removed_slots(by_auto)) == gone


def checkpoint_step(spy: Spy, state: str, mid_epoch: bool = False) -> int:
    """The first step with a checkpoint in this state of the pruning."""
    reached = {
        "all open": lambda seen: not seen.closed and not seen.removed,
        "some closed": lambda seen: seen.closed and not seen.removed,
        "some removed": lambda seen: seen.removed,
    }[state]
    return next(step for step, seen in spy.seen.items() if reached(seen) and bool(step % STEPS) == mid_epoch)


@pytest.mark.parametrize("start", ["full model", "model of the checkpoint"])
@pytest.mark.parametrize(
    ("saved", "state"),
    [
        *mostly_slow([(saved, state) for saved in ("after an epoch", "within an epoch") for state in STATES], 2, 4),
        # After the first epoch, with some branches closed.
        *mostly_slow([("at an epoch's last step", state) for state in STATES[1:]], 1),
    ],
)
@pytest.mark.parametrize("optimizer", mostly_slow(OPTIMIZERS, 1))  # SGD has no state to restore
def test_resumed_run_is_the_uninterrupted_one(trained, tmp_path, optimizer, state, saved, start, caplog):
    whole, spy, out = trained(optimizer, "epoch" if saved == "after an epoch" else "steps")
    assert whole.model.side_head is not None
    checkpoint = f"{out}/checkpoint-{checkpoint_step(spy, state, mid_epoch=saved == 'within an epoch')}"
    model = (
        fresh_model(seed=99) if start == "full model" else AutoModelForImageClassification.from_pretrained(checkpoint)
    )
    resumed = make_trainer(tmp_path, model, **OPTIMIZERS[optimizer])
    with warnings_logged(caplog) as warned:
        resumed.train(resume_from_checkpoint=checkpoint)
    assert not [text for text in warned if "keys" in text]
    assert logged(resumed) == logged(whole)
    assert_same_weights(resumed.model, whole.model)
    assert removed_slots(resumed.model) == removed_slots(whole.model)
    assert closed_slots(resumed.model) == closed_slots(whole.model)
    assert pruning_callback(resumed).pruner.history == pruning_callback(whole).pruner.history
    assert_optimizer_fits(resumed)


@pytest.mark.parametrize("state", STATES[1:])
def test_resumed_with_the_callbacks_state_restored(trained, tmp_path, state):
    """Trainer replaces the given callback by a restored one."""
    whole, spy, out = trained()
    resumed = make_trainer(tmp_path, restore_callback_states_from_checkpoint=True, **SGD)
    given = pruning_callback(resumed)
    resumed.train(resume_from_checkpoint=f"{out}/checkpoint-{checkpoint_step(spy, state)}")
    assert pruning_callback(resumed) is not given
    assert logged(resumed) == logged(whole)
    assert_same_weights(resumed.model, whole.model)


def test_resumed_twice_saves_as_the_uninterrupted_run(trained, tmp_path):
    whole, spy, out = trained()
    first, second = tmp_path / "1", tmp_path / "2"
    for directory, since in (
        (first, out / f"checkpoint-{checkpoint_step(spy, 'some closed')}"),
        (second, first / f"checkpoint-{checkpoint_step(spy, 'some removed')}"),
    ):
        resumed = make_trainer(directory, save_strategy="epoch", **SGD)
        resumed.train(resume_from_checkpoint=str(since))
    for name in ("model.safetensors", "config.json"):
        last = f"checkpoint-{LAST}"
        assert (second / last / name).read_bytes() == (out / last / name).read_bytes()
    assert logged(resumed) == logged(whole)


def test_a_second_training_goes_on_pruning(tmp_path):
    trainer = make_trainer(tmp_path, budget=SOON, num_train_epochs=2, number=16, **SGD)
    trainer.train()
    first = removed_slots(trainer.model)
    assert first
    pruning_callback(trainer).arguments["keep"] = 1
    trainer.train()
    assert set(first) < set(removed_slots(trainer.model))
    assert pruning_callback(trainer).pruner.total == 9
    assert_optimizer_fits(trainer)


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_evaluates_to_the_live_model_of_its_time(trained, state, caplog):
    _, spy, out = trained()
    step = checkpoint_step(spy, state)
    seen = spy.seen[step]
    checkpoint = out / f"checkpoint-{step}"
    with warnings_logged(caplog) as warned:
        classifier = AutoModelForImageClassification.from_pretrained(checkpoint)
        headless = AutoModel.from_pretrained(checkpoint)
        EpsResNetBackbone.from_pretrained(checkpoint)
    assert warned == []
    assert torch.equal(logits(classifier, spy.images), seen.logits)
    with torch.no_grad():
        assert torch.equal(headless.eval()(spy.images).last_hidden_state, seen.features)
    for model in (classifier, headless):
        assert (closed_slots(model), removed_slots(model)) == (seen.closed, seen.removed)


def test_a_checkpoint_is_the_training_form(trained):
    _, spy, out = trained()
    step = checkpoint_step(spy, "some closed")
    seen, checkpoint = spy.seen[step], out / f"checkpoint-{step}"
    assert AutoConfig.from_pretrained(checkpoint).model_args["closed"] == seen.closed
    stored = safetensors.torch.load_file(checkpoint / "model.safetensors")
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint)
    for key, value in loaded.side_head.state_dict().items():
        assert torch.equal(value, seen.side_head[key])
        assert torch.equal(value, stored[f"side_head.{key}"])


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_saved_again_is_the_inference_form(trained, tmp_path, state):
    _, spy, out = trained()
    step = checkpoint_step(spy, state)
    seen = spy.seen[step]
    loaded = AutoModelForImageClassification.from_pretrained(out / f"checkpoint-{step}")
    loaded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "closed" not in config["model_args"]
    assert config["side_loss_weight"] == 0
    assert set(config["model_args"].get("removed", [])) == {*seen.closed, *seen.removed}
    assert not [key for key in safetensors.torch.load_file(tmp_path / "model.safetensors") if "side_head" in key]
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(spy.images), seen.logits)


def post_activation_trainer(tmp_path, model, **options) -> Trainer:
    """All branches are closed on every batch, so only weight decay changes them; none is removed.

    One epoch, because one branch opens at its end.
    """
    shut = dict(epsilon=1e6, live_removal=False)
    return make_trainer(
        tmp_path, model, (), shut, 16, num_train_epochs=1, lr_scheduler_type="constant", weight_decay=0.1, **options
    )


def from_timm() -> EpsResNetForImageClassification:
    return EpsResNetForImageClassification.from_timm(timm.create_model("eps_test_resnet", num_classes=3))


def from_config() -> EpsResNetForImageClassification:
    return fresh_model(architecture="eps_test_resnet")


@pytest.mark.parametrize("make", [from_timm, from_config])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_biases_that_bound_a_branch_decay_by_the_factor_of_weight_decay(tmp_path, make, optimizer):
    model = make()
    bounding = timm_eps.surgery.parameters.bounding_parameters(model)
    parameters = dict(model.named_parameters())
    biases = {name: parameter for name, parameter in parameters.items() if "bn" in name and name.endswith("bias")}
    last = {name for name, parameter in biases.items() if parameter in bounding}
    inner = {name for name in biases if name.startswith("timm_model.layer") and name not in last}
    assert last
    assert inner
    with torch.no_grad():
        for parameter in biases.values():
            parameter.uniform_(0.5, 1.5)
    before = {name: parameter.clone() for name, parameter in biases.items()}
    options = OPTIMIZERS[optimizer]
    trainer = post_activation_trainer(tmp_path, model, **options)
    trainer.train()
    spared = set(trainer.optimizer.param_groups[1]["params"])
    assert {parameters[name] for name in last} <= spared, "Trainer itself decays them"
    factor = 1 - options["learning_rate"] * 0.1
    for name in last:
        expected = before[name].clone()
        for _ in range(trainer.state.global_step):
            expected *= factor
        assert torch.equal(parameters[name], expected), name
    assert [name for name in inner if not torch.equal(parameters[name], before[name])] == []


def test_what_trainer_decays_is_not_decayed_twice(tmp_path):
    """The weight decay of SGD and of the callback differ only in the last bits."""
    model = from_timm()
    bounding = timm_eps.surgery.parameters.bounding_parameters(model)
    scales = {n: p for n, p in model.named_parameters() if p in bounding and not n.endswith("bias")}
    assert scales
    with torch.no_grad():
        for parameter in scales.values():
            parameter.uniform_(0.5, 1.5)
    before = {name: parameter.clone() for name, parameter in scales.items()}
    trainer = post_activation_trainer(tmp_path, model, **SGD)
    trainer.train()
    for name, parameter in scales.items():
        expected = before[name] * (1 - SGD["learning_rate"] * 0.1) ** trainer.state.global_step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_load_best_model_at_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="load_best_model_at_end is not supported"):
        make_trainer(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: timm.create_model("eps_resnet20")])
def test_a_model_that_does_not_save_its_structure_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"not (Linear|EpsResNet)\. Wrap a timm model with .*from_timm\(model\)"):
        make_trainer(tmp_path, make())


@pytest.mark.parametrize("budget", [dict(epsilon=1.0, keep=4), dict(patience=2)])
def test_both_or_neither_of_epsilon_and_keep(tmp_path, budget):
    trainer = make_trainer(tmp_path, budget=budget, max_steps=1)
    with pytest.raises(ValueError, match="exactly one of epsilon, keep"):
        trainer.train()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_no_weight_decay_warns(tmp_path, weight_decay, caplog):
    trainer = make_trainer(tmp_path, max_steps=1, weight_decay=weight_decay, **SGD)
    with warnings_logged(caplog) as warned:
        trainer.train()
    assert any("weight_decay is 0" in text for text in warned) == (weight_decay == 0)


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a training without the callback."""
    out = tmp_path_factory.mktemp("plain")
    make_trainer(out, budget=None, max_steps=2, save_strategy="steps", save_steps=2, **SGD).train()
    return out / "checkpoint-2"


def test_a_checkpoint_made_without_the_callback_is_refused(tmp_path, plain_checkpoint):
    trainer = make_trainer(tmp_path, **SGD)
    with pytest.raises(ValueError, match="step 2 has no state of an EpsilonCallback"):
        trainer.train(resume_from_checkpoint=str(plain_checkpoint))


def test_weights_and_pruner_of_different_runs_are_refused(trained, tmp_path):
    _, spy, out = trained()
    later = checkpoint_step(spy, "some removed")
    mixed = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(out / mixed.name, mixed)
    shutil.copy(out / f"checkpoint-{later}" / "trainer_state.json", mixed)
    with pytest.raises(ValueError, match=f"lack 0 branches, but its pruner had removed {len(spy.seen[later].removed)}"):
        make_trainer(tmp_path, **SGD).train(resume_from_checkpoint=str(mixed))


def test_a_checkpoint_of_a_shallower_network_is_refused(trained, tmp_path):
    _, _, out = trained()
    with pytest.raises(ValueError, match="from different runs"):
        make_trainer(tmp_path, fresh_model(architecture="eps_resnet32"), **SGD).train(
            resume_from_checkpoint=f"{out}/checkpoint-{STEPS}"
        )


def test_weights_of_a_part_leave_the_structure_alone(tmp_path):
    model = fresh_model()
    make_trainer(tmp_path, model=model)
    head = {key: value for key, value in model.timm_model.state_dict().items() if key.startswith("head.")}
    model.load_state_dict(head, strict=False)
    assert len(gates(model)) == 9


def test_a_model_that_lost_more_than_the_checkpoint_is_refused(trained, tmp_path):
    _, _, out = trained()
    model = AutoModelForImageClassification.from_pretrained(out / f"checkpoint-{LAST}")
    with pytest.raises(ValueError, match="removed from this model"):
        make_trainer(tmp_path, model, **SGD).train(resume_from_checkpoint=f"{out}/checkpoint-{STEPS}")


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = 0
            raise KeyboardInterrupt


def test_an_interrupted_trainer_resumes_itself(trained, tmp_path):
    whole, spy, _ = trained()
    step = checkpoint_step(spy, "some removed")
    trainer = make_trainer(tmp_path, callbacks=[Interrupt(step + 2)], save_strategy="epoch", **SGD)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert removed_slots(trainer.model) == spy.seen[step].removed
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer) == logged(whole)
    assert_same_weights(trainer.model, whole.model)


@pytest.mark.parametrize("criterion", mostly_slow(CRITERIA, 1))
def test_an_optimizer_of_ones_own_resumes(tmp_path, criterion):
    """Trainer gets the optimizer while the model still has all its blocks."""

    def run(checkpoint: str | None) -> Trainer:
        model = fresh_model()
        optimizer = torch.optim.SGD(timm_eps.param_groups(model, 5e-3), lr=1e-2, momentum=0.9)
        options = dict(num_train_epochs=4, number=16, save_strategy="epoch", optimizers=(optimizer, None))
        trainer = make_trainer(tmp_path, model, budget=SOON | {"criterion": criterion}, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(None)
    assert "removed" in AutoConfig.from_pretrained(tmp_path / "checkpoint-4").model_args
    resumed = run(str(tmp_path / "checkpoint-4"))
    assert logged(resumed) == logged(whole)
    assert_same_weights(resumed.model, whole.model)
    assert_optimizer_fits(resumed)


@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            dict(gradient_accumulation_steps=2),
            dict(bf16=True),
            dict(gradient_checkpointing=True),
            dict(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1),
            dict(torch_compile=True, torch_compile_backend="eager"),
            dict(torch_compile=True, torch_compile_backend="aot_eager"),
        ],
        0,
        1,
        3,
    ),
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_goes_with_trainers_options(tmp_path, options):
    budget = dict(keep=2, patience=1, criterion="importance")
    trainer = make_trainer(tmp_path, budget=budget, num_train_epochs=3, number=16, **SGD, **options)
    trainer.train()
    records = pruning_callback(trainer).pruner.history
    assert any(record["removed"] for record in records[:-1]), "it trained on after a removal"
    assert all(math.isfinite(entry[1]) for entry in logged(trainer))
    assert_optimizer_fits(trainer)
    trainer.save_model(tmp_path / "end")
    images = Images().images[:4]
    with torch.no_grad():
        live = trainer.model.eval().timm_model(images)  # accelerate wraps the forward of the model in mixed precision
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "end"), images), live)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """One start for all checks, because it takes long."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(here / "trainer_two_processes.py")]
    run = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    same_model_at_the_end(*(one["trainer"] for one in found))
    decided_on_the_largest_response(*(one["decisions"] for one in found))
    buffer_broadcast_leaves_the_responses(*(one["responses"] for one in found))
    gradients_are_synchronised_over_what_is_left(*(one["gradients"] for one in found))


def same_model_at_the_end(one: dict, other: dict) -> None:
    assert one["removed"]
    assert one == other
    assert all(math.isfinite(loss) for loss in one["losses"])
    for since, resumed in one.pop("resumed").items():
        assert resumed == one, f"from {since}: the first removal, or a step within an epoch"


def decided_on_the_largest_response(*both: dict) -> None:
    for found in both:
        open_on_one, low_on_both, nan_on_one, ran_on_one = found["slots"][:4]
        assert found["removed"] == [low_on_both, ran_on_one]
        assert {open_on_one, nan_on_one}.isdisjoint(found["closed"])


def buffer_broadcast_leaves_the_responses(small: dict, large: dict) -> None:
    """The second process sees larger inputs."""
    assert large["broadcast"]
    for found in (small, large):
        assert found["own"] == found["expected"]
        assert found["decided_on"] == large["own"]
    assert all(low < high for low, high in zip(small["own"], large["own"], strict=True))


def gradients_are_synchronised_over_what_is_left(*both: dict) -> None:
    for found in both:
        assert len(found["removed"]) == 2
        assert found["between_halves"] > 1e-3, "there is something to synchronise"
        assert found["from_mean"] < 1e-6
        assert found["before"] != found["after"], "the optimizer steps go on"
        assert found["options_kept"]
    assert both[0]["after"] == both[1]["after"]


def moved(model, before):
    """The side head's parameters that a training has changed."""
    return [key for key, value in model.side_head.state_dict().items() if not torch.equal(value, before[key])]


def with_side_term(outputs, labels, num_items_in_batch=None):
    loss = nn.functional.cross_entropy(outputs.logits, labels)
    return loss + 0.1 * nn.functional.cross_entropy(outputs.side_logits, labels)


def without_side_term(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


def trained_by(tmp_path, model, budget=SOON, loss=None, **options):
    trainer = make_trainer(tmp_path, model, budget=budget, max_steps=2, weight_decay=0.0, **SGD, **options)
    trainer.compute_loss_func = loss
    trainer.train()
    return trainer


@pytest.mark.parametrize("budget", [SOON, None])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (None, dict(label_smoothing_factor=0.1)),
        (without_side_term, {}),
        (without_side_term, dict(label_smoothing_factor=0.1, gradient_accumulation_steps=2)),
    ],
)
def test_a_loss_that_leaves_side_supervision_out_is_spoken_of(tmp_path, loss, options, budget, caplog):
    model = fresh_model()
    with warnings_logged(caplog) as warned:
        trained_by(tmp_path, model, budget, loss, **options)
    assert sum("Side supervision is off" in text and "side_logits" in text for text in warned) == 1
    smoothed = budget is not None and "label_smoothing_factor" in options
    assert any("label_smoothing_factor turns side supervision off" in text for text in warned) == smoothed


def test_without_a_side_head_no_loss_is_spoken_of(tmp_path, caplog):
    with warnings_logged(caplog) as warned:
        trained_by(tmp_path, fresh_model(side_loss_weight=0.0), label_smoothing_factor=0.1)
    assert not [text for text in warned if "upervision" in text]


def test_a_loss_that_has_the_side_term_trains_as_the_models_own(tmp_path, caplog):
    own, other = fresh_model(), fresh_model()
    before = {key: value.clone() for key, value in own.side_head.state_dict().items()}
    with warnings_logged(caplog) as warned:
        trained_by(tmp_path, own)
        trained_by(tmp_path, other, loss=with_side_term)
    assert not [text for text in warned if "upervision" in text]
    assert {key for key in moved(own, before) if "running" not in key and "tracked" not in key} == {
        name for name, _ in own.side_head.named_parameters()
    }
    for key, value in own.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


def test_an_own_loop_hears_of_side_supervision(caplog):
    model = fresh_model().train()
    with warnings_logged(caplog) as warned:
        for _ in range(2):
            nn.functional.cross_entropy(model(Images().images[:4]).logits, Images().labels[:4]).backward()
    assert sum("Side supervision is off" in text for text in warned) == 1
    assert len(model(Images().images[:4], return_dict=False)) == 1
    assert "side_logits" not in model.eval()(Images().images[:4])


@pytest.mark.parametrize("number", [2, 8])
def test_data_parallel_is_refused(tmp_path, number):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments.n_gpu  # noqa: B018  sets up the devices
    arguments._n_gpu = number
    with pytest.raises(ValueError, match=f"nn.DataParallel.*torchrun --nproc_per_node={number}"):
        Trainer(fresh_model(), arguments, callbacks=[EpsilonCallback(**SOON)])


def from_config_anew():
    return fresh_model(seed=11)


def from_timm_anew():
    torch.manual_seed(11)
    return EpsResNetForImageClassification.from_timm(
        timm.create_model("eps_resnet20", num_classes=3), side_loss_weight=0.1
    )


@pytest.mark.parametrize("make", mostly_slow([from_config_anew, from_timm_anew]))
def test_model_init_resumes(tmp_path, make, caplog):
    """In a new Trainer, and again in the same one."""

    def new_trainer(directory, *callbacks, **options):
        arguments = make_trainer(directory, **SGD, **options).args
        pruning = EpsilonCallback(**BUDGET)
        trainer = Trainer(model_init=make, args=arguments, train_dataset=Images(), callbacks=[pruning, *callbacks])
        trainer.remove_callback(PrinterCallback)
        return trainer

    spy = Spy(Images().images[:4])
    whole = new_trainer(tmp_path / "whole", spy, save_strategy="epoch")
    whole.train()
    resumed = new_trainer(tmp_path / "resumed")
    for state in ("some closed", "some removed"):
        with warnings_logged(caplog) as warned:
            resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{checkpoint_step(spy, state)}")
        assert not [text for text in warned if "keys" in text]
        assert logged(resumed) == logged(whole)
        assert_same_weights(resumed.model, whole.model)
        assert_optimizer_fits(resumed)


def test_a_callback_leaves_other_models_strict(tmp_path, trained):
    weights = trained()[0].model.state_dict()
    trainer = make_trainer(tmp_path, **SGD)
    other = fresh_model()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(weights)
    assert removed_slots(other) == []
    del trainer


def test_an_average_follows_in_trainer(tmp_path):
    class Averaging(TrainerCallback):
        def __init__(self, average):
            self.average = average

        def on_step_end(self, args, state, control, model, **kwargs):
            self.average.update(model)

    model = fresh_model()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    trainer = make_trainer(tmp_path, model, [Averaging(average)], SOON, 16, num_train_epochs=3, **SGD)
    pruning_callback(trainer).followers.append(average)
    trainer.train()
    assert removed_slots(average.module) == removed_slots(model) != []
    assert closed_slots(average.module) == closed_slots(model)
    assert average.module.config.model_args == model.config.model_args


def test_zero_scales_are_spoken_of_in_trainer(tmp_path, caplog):
    model = timm.create_model("eps_test_resnet", num_classes=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.zeros_(parameter)
    wrapper = EpsResNetForImageClassification.from_timm(model)
    with warnings_logged(caplog) as warned:
        make_trainer(tmp_path, wrapper, budget=SOON, max_steps=1, **SGD).train()
    assert sum("output zero" in text for text in warned) == 1
