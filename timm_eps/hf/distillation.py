"""Distillation: the softened outputs of a teacher are a part of the training loss.

"Distilling the Knowledge in a Neural Network", G. Hinton, O. Vinyals, J. Dean, 2015, https://arxiv.org/abs/1503.02531.
The usual teacher of a pruned network is the dense network before pruning, fine-tuned on the same images.
"""

from __future__ import annotations

import copy
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..surgery.sharding import gathered, is_sharded

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of the student's softened probabilities from the teacher's, mean over the batch.

    It is multiplied by the squared temperature (section 2 of the source), so that the size of its gradients does not
    depend on the temperature.

    Args:
        student_logits: Logits of shape (B, classes), in any floating-point type.
        teacher_logits: Logits of the same shape. They get no gradient.
        temperature: Divisor of both logits, above 0. Larger values give more weight to the teacher's wrong classes.

    Returns:
        0-dimensional float32 tensor, at least 0, in nats.

    Raises:
        ValueError: The shapes differ.

    Source: https://arxiv.org/abs/1503.02531, section 2.

    Example::

        loss = distillation_loss(student(images), teacher(images).detach(), temperature=2.0)
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The student's logits have the shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}. Both need the same classes: fine-tune the teacher on the student's data "
            "set first."
        )
    student, teacher = (
        F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student_logits, teacher_logits.detach())
    )
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


class Distillation:
    """A teacher, and its share of a student's training loss.

    Example::

        distillation = timm_eps.Distillation(teacher)
        for images, labels in batches:
            logits = model(images)
            loss = distillation.loss(logits, F.cross_entropy(logits, labels), images)

    For the transformers class, also with :class:`transformers.Trainer`, set it as an attribute of the model::

        model.distillation = timm_eps.Distillation(teacher)

    It is not saved, and it is not a module. The teacher is therefore not in the student's state dict, configuration or
    parameters. A copy of the student shares the teacher. A pickle of the student contains None instead.

    Args:
        teacher: A network that maps images (B, C, H, W) to logits (B, classes), or to a transformers output with
            logits. It is put into evaluation mode and never trained.
        weight: Share of the teacher in the loss, above 0 and at most 1. The rest is the loss of the labels.
        temperature: Divisor of the logits of both networks, above 0; see :func:`distillation_loss`.

    Attributes:
        teacher (nn.Module): The teacher, in evaluation mode.

    Raises:
        ValueError: ``weight`` or ``temperature`` is out of range.
        TypeError: ``teacher`` is not a module.

    Source: https://arxiv.org/abs/1503.02531.
    """

    def __init__(self, teacher: nn.Module, weight: float = 0.5, temperature: float = 2.0) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}.")
        self.teacher = teacher.eval()
        self.weight = _positive("weight", weight, most=1.0)
        self.temperature = _positive("temperature", temperature)

    @classmethod
    def of_itself(cls, model: nn.Module, weight: float = 0.5, temperature: float = 2.0) -> Distillation:
        """Distillation from a frozen copy of a network in its current state.

        Call it after the dense network was fine-tuned and before branches are removed. The arguments are those of the
        class. The side head and the teacher of a transformers model are not copied. Every process must call this for a
        model sharded by FSDP2.
        """
        network = getattr(model, "timm_model", model)
        whole = gathered(network) if is_sharded(network) else copy.deepcopy(network)
        return cls(whole.requires_grad_(False), weight, temperature)

    def loss(self, student_logits: Tensor, labels_loss: Tensor, images: Tensor) -> Tensor:
        """The training loss: ``(1 - weight) * labels_loss + weight * distillation_loss``.

        Args:
            student_logits: The student's logits for ``images``, (B, classes).
            labels_loss: The student's loss for the labels, 0-dimensional, a mean over the batch.
            images: The student's input batch, (B, C, H, W). The teacher gets the same input.

        Returns:
            0-dimensional tensor to call ``backward`` on.

        Raises:
            ValueError: The teacher has other classes than the student.
        """
        taught = distillation_loss(student_logits, self.answer(images), self.temperature)
        return (1 - self.weight) * labels_loss + self.weight * taught

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """The teacher's logits for images (B, C, H, W): (B, classes), without a graph."""
        first = next(self.teacher.parameters(), None)
        if first is not None and first.device != images.device:
            self.teacher.to(images.device)
        output: Any = self.teacher(images)
        return getattr(output, "logits", output)

    def check_student(self, student: nn.Module) -> None:
        """Raise ValueError if the teacher shares parameters with the student, since it would change in training."""
        own = set(self.teacher.parameters())
        if shared := [name for name, parameter in student.named_parameters() if parameter in own]:
            raise ValueError(
                f"The teacher shares {shared[0]!r} with the student, so it would change with it. Use "
                "Distillation.of_itself(model), which copies the network."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # the teacher is never trained, so copies of a student may share it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __repr__(self) -> str:
        teacher = type(self.teacher).__name__
        return f"{type(self).__name__}({teacher}, weight={self.weight:g}, temperature={self.temperature:g})"


def _positive(name: str, value: float, most: float = float("inf")) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < value <= most or value == float("inf"):
        wanted = "a number above 0" + ("" if most == float("inf") else f" and at most {most:g}")
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    return float(value)
