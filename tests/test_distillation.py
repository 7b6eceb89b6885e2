"""Distillation: the teacher affects the training loss and nothing else."""

from __future__ import annotations

import copy
import io
import json

import pytest
import timm
import torch
from conftest import SLOTS, tiny_net
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

import timm_eps
from timm_eps import Distillation, EpsResNetConfig, EpsResNetForImageClassification
from timm_eps.hf.distillation import distillation_loss

LABELS = torch.tensor([0, 1, 2, 3])


def student(**fields) -> EpsResNetForImageClassification:
    config = EpsResNetConfig(architecture="eps_resnet20", num_labels=5, **fields)
    return EpsResNetForImageClassification(config).train()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_it_is_the_divergence_times_the_temperature_squared(temperature):
    mine, theirs = torch.randn(4, 5), torch.randn(4, 5)
    p, q = (F.softmax(logits / temperature, 1) for logits in (theirs, mine))
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(distillation_loss(mine, theirs, temperature), expected)
    assert distillation_loss(mine, mine, temperature) == pytest.approx(0, abs=1e-6)


def test_the_gradient_pulls_to_the_teacher_alone():
    mine, theirs = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(mine, theirs, 2.0).backward()
    assert theirs.grad is None
    expected = 2.0 / 2 * (F.softmax(mine / 2, 1) - F.softmax(theirs / 2, 1))
    torch.testing.assert_close(mine.grad, expected)


def test_half_precision_is_computed_in_float32():
    mine, theirs = torch.randn(4, 5), torch.randn(4, 5)
    found = distillation_loss(mine.bfloat16(), theirs.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_loss(mine.bfloat16().float(), theirs.bfloat16().float()))


def test_a_loop_of_ones_own(images):
    teacher, model = tiny_net(num_classes=5), tiny_net(num_classes=5)
    distillation = Distillation(teacher, weight=0.25, temperature=3.0)
    logits = model(images)
    labels_loss = F.cross_entropy(logits, LABELS)
    expected = 0.75 * labels_loss + 0.25 * distillation_loss(logits, teacher(images), 3.0)
    torch.testing.assert_close(distillation.loss(logits, labels_loss, images), expected)
    distillation.loss(logits, labels_loss, images).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("side_loss_weight", [0.0, 0.1])
def test_the_training_loss_of_the_transformers_class(images, side_loss_weight):
    model = student(side_loss_weight=side_loss_weight)
    plain = model(images, labels=LABELS)
    cross_entropy = F.cross_entropy(plain.logits, LABELS)
    teacher = tiny_net(num_classes=5)
    model.distillation = Distillation(teacher, weight=0.5, temperature=2.0)
    taught = 0.5 * cross_entropy + 0.5 * distillation_loss(plain.logits, teacher(images), 2.0)
    output = model(images, labels=LABELS)
    torch.testing.assert_close(output.loss, taught + (plain.loss - cross_entropy))
    as_tuple = model(images, labels=LABELS, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.loss)
    model.distillation = None
    torch.testing.assert_close(model(images, labels=LABELS).loss, plain.loss)


def test_evaluation_does_not_ask_the_teacher(images):
    model = student().eval()
    expected = model(images, labels=LABELS).loss

    class Refuses(nn.Module):
        def forward(self, images):
            raise AssertionError("asked")

    model.distillation = Distillation(Refuses())
    torch.testing.assert_close(model(images, labels=LABELS).loss, expected)
    assert model.train()(images).loss is None


def test_nothing_of_it_is_saved(images, tmp_path):
    def held():
        sizes = len(list(model.parameters())), len(list(model.modules())), len(list(model.buffers()))
        return set(model.state_dict()), model.config.to_dict(), sizes

    model = student(problem_type="single_label_classification")
    before = held()
    model.distillation = Distillation.of_itself(model)
    model(images, labels=LABELS).loss.backward()
    assert held() == before
    model.save_pretrained(tmp_path / "transformers")
    timm_eps.save_pretrained(model, tmp_path / "timm")
    for place in ("transformers", "timm"):
        assert "distil" not in json.dumps(json.loads((tmp_path / place / "config.json").read_text()))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / place).eval()
        assert loaded.distillation is None
        torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits, rtol=0, atol=0)


def test_copies_share_the_teacher_and_pickles_hold_none(images):
    model = student()
    model.distillation = Distillation.of_itself(model)
    assert copy.deepcopy(model).distillation is model.distillation
    file = io.BytesIO()
    torch.save(model, file)
    size = file.tell()
    file.seek(0)
    assert torch.load(file, weights_only=False).distillation is None
    bare = io.BytesIO()
    model.distillation = None
    torch.save(model, bare)
    assert size < 1.1 * bare.tell()


def test_of_itself_is_a_frozen_copy(images):
    model = student()
    distillation = Distillation.of_itself(model)
    before = distillation.answer(images)
    assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())
    torch.testing.assert_close(before, model.eval()(images).logits)
    timm_eps.prune(model, SLOTS[:2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(distillation.answer(images), before, rtol=0, atol=0)


def test_teachers_of_both_libraries_answer_alike(images):
    model = student().eval()
    wrapped, bare = Distillation(model), Distillation(copy.deepcopy(model.timm_model))
    torch.testing.assert_close(wrapped.answer(images), bare.answer(images))
    assert not wrapped.answer(images).requires_grad


def test_a_teacher_in_training_mode_is_put_into_evaluation(images):
    teacher = timm.create_model("eps_resnet20", num_classes=5).train()
    statistics = {name: value.clone() for name, value in teacher.named_buffers()}
    Distillation(teacher).answer(images)
    assert not teacher.training
    assert all(torch.equal(value, statistics[name]) for name, value in teacher.named_buffers())


@pytest.mark.parametrize("share", [lambda model: model, lambda model: model.timm_model])
def test_the_student_cannot_teach_itself_alive(share):
    model = student()
    with pytest.raises(ValueError, match=r"shares .*of_itself"):
        model.distillation = Distillation(share(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0}, "weight must be a number above 0 and at most 1, got 0"),
        ({"weight": 1.5}, "got 1.5"),
        ({"weight": float("nan")}, "got nan"),
        ({"weight": True}, "got True"),
        ({"weight": "0.5"}, "got '0.5'"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": -1}, "got -1"),
        ({"temperature": float("inf")}, "got inf"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation(nn.Identity(), **arguments)


def test_a_teacher_of_other_classes(images):
    model = student()
    model.distillation = Distillation(tiny_net(num_classes=7))
    with pytest.raises(ValueError, match=r"\(4, 5\), the teacher's \(4, 7\).*fine-tune the teacher"):
        model(images, labels=LABELS)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        Distillation("me/dense")


class Counted(nn.Module):
    """A teacher that counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_net(num_classes=5)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.network(images)


def trained(model, directory, **arguments):
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 5} for index in range(12)]
    settings = TrainingArguments(
        str(directory), num_train_epochs=2, per_device_train_batch_size=4, save_strategy="epoch", report_to=[],
        disable_tqdm=True, use_cpu=True, **arguments,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    return trainer


def test_trainer_distils_and_its_checkpoints_hold_no_teacher(tmp_path):
    model, teacher = student(), Counted()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model.distillation = Distillation(teacher)
    trained(model, tmp_path)
    assert teacher.seen == 24
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    place = tmp_path / "checkpoint-6"
    assert "distil" not in "".join(path.read_text() for path in place.glob("*.json"))
    keys = {key.removeprefix("timm_model.") for key in load_file(place / "model.safetensors")}
    assert keys <= model.timm_model.state_dict().keys() | model.state_dict().keys()


def test_a_loss_without_labels_says_that_the_teacher_is_not_in_it(tmp_path, caplog):
    hf_logging.warning_once.cache_clear()  # other tests may have shown the warning
    model, teacher = student(side_loss_weight=0.0), Counted()
    model.distillation = Distillation(teacher)
    trained(model, tmp_path, label_smoothing_factor=0.1)
    assert teacher.seen == 0
    assert "The teacher is not in the loss" in caplog.text
