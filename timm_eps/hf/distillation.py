"""Distillation: while a network trains, the softened answers of a teacher are a part of its loss.

"Distilling the Knowledge in a Neural Network", G. Hinton, O. Vinyals, J. Dean, 2015, https://arxiv.org/abs/1503.02531.
The usual teacher of a pruned network is the dense network that it was cut from, fine-tuned on the same images.
"""

from __future__ import annotations

import copy
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of the student's softened probabilities from the teacher's, mean over the batch.

    It is multiplied by the temperature squared (section 2 of the source), so that its gradients keep their size when
    the temperature changes.

    Args:
        student_logits: Logits of shape (B, classes), in any floating-point type.
        teacher_logits: Logits of the same shape. They get no gradient.
        temperature: Divisor of both logits, above 0. Larger values show more of how the teacher ranks wrong classes.

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
    """A teacher, and how much of a student's training loss comes from it.

    Example::

        distillation = timm_eps.Distillation(teacher)
        for images, labels in batches:
            logits = model(images)
            loss = distillation.loss(logits, F.cross_entropy(logits, labels), images)

    In the transformers class, also under :class:`transformers.Trainer`, it is an attribute of the model::

        model.distillation = timm_eps.Distillation(teacher)

    Nothing of it is saved. It is no module, so the teacher is in no state dict, no configuration and no list of
    parameters of the student. A copy of the student shares the teacher, and a pickle of the student holds None instead.

    Args:
        teacher: A network that maps images (B, C, H, W) to logits (B, classes), or to a transformers output that holds
            them. It is put into evaluation mode and never trained.
        weight: Share of the teacher in the loss, above 0 and at most 1; the labels have the rest.
        temperature: Divisor of the logits of both, above 0; see :func:`distillation_loss`.

    Attributes:
        teacher (nn.Module): The network that answers, in evaluation mode.

    Raises:
        ValueError: ``weight`` or ``temperature`` is out of range.
        TypeError: ``teacher`` is no module.

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
        """Distillation from a frozen copy of a network as it is now.

        Call it after the dense network was fine-tuned and before branches are removed. Arguments are those of the
        class; of a transformers model, its own side head and teacher are not copied.
        """
        return cls(copy.deepcopy(getattr(model, "timm_model", model)).requires_grad_(False), weight, temperature)

    def loss(self, student_logits: Tensor, labels_loss: Tensor, images: Tensor) -> Tensor:
        """The training loss: ``(1 - weight) * labels_loss + weight * distillation_loss``.

        Args:
            student_logits: The student's logits for ``images``, (B, classes).
            labels_loss: The student's loss for the labels, 0-dimensional, a mean over the batch.
            images: The batch as the student read it, (B, C, H, W). The teacher reads the same.

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
        """Raise ValueError if the teacher shares parameters with the student, and would change as it trains."""
        own = set(self.teacher.parameters())
        if shared := [name for name, parameter in student.named_parameters() if parameter in own]:
            raise ValueError(
                f"The teacher shares {shared[0]!r} with the student, so it would change with it. Use "
                "Distillation.of_itself(model), which copies the network."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # it is never trained, so copies of a student may share it

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
