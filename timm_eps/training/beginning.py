"""Preparation of a network before its training: its teacher, and the removal of branches at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from ..cutting.prune import prune
from ..files.config_checks import check_slots
from ..hf.distillation import Distillation
from ..surgery.branches import gates
from ..surgery.removal import removed_slots
from . import build, checkpoints, choices
from .arguments import Arguments, ModelArguments
from .evaluation import Evaluation
from .inputs import ImageData, saved_config
from .progress import load_state
from .run_checkpoints import find_checkpoint

__all__ = ["as_dense", "before", "cut", "dense_epochs", "describe", "is_prepared", "knows_classes", "teach"]


def is_prepared(args: Arguments) -> bool:
    """Whether the network is prepared before its training."""
    return args.model.has_weights or args.pruning.prune_at == "start" or args.distillation.teacher is not None


def knows_classes(args: ModelArguments, images: ImageData) -> bool:
    """Whether the network has a saved classifier for the classes of the images."""
    if not args.model_name_or_path:
        return False
    return saved_config(args.model_name_or_path).num_labels == len(images.label_names)


def dense_epochs(args: Arguments, is_trained: bool) -> int:
    """Number of epochs to fine-tune the dense network first, as a teacher or for choosing branches.

    Args:
        args: Arguments of the run.
        is_trained: Whether the network has learnt the classes, from :func:`knows_classes`.

    Raises:
        ValueError: It has not learnt the classes, and the number of epochs is 0.
    """
    by_loss = (args.pruning.prune_at, args.pruning.criterion) == ("start", "leave_one_out")
    if args.distillation.teacher != "self" and not by_loss:
        return 0
    if args.distillation.dense_epochs is not None:
        return args.distillation.dense_epochs
    if is_trained:
        return 0
    if not args.training.num_train_epochs:
        raise ValueError("The classifier is new, and --num_train_epochs 0 does not train it; use --dense_epochs.")
    return args.training.num_train_epochs


def as_dense(results: dict[str, Any]) -> dict[str, Any]:
    """Results of the dense network's training, renamed with the prefix ``dense_``."""
    return {f"dense_{name}": value for name, value in results.items() if name != "eval_images"}


def before(model: nn.Module, found: Evaluation, images: ImageData) -> dict[str, Any]:
    """Results of a network before its training, by the names of the results file."""
    results: dict[str, Any] = {"start_eval_accuracy": found.accuracy}
    if not removed_slots(model):  # it is the dense network
        results |= {"dense_eval_accuracy": found.accuracy}
        results |= {"dense_eval_accuracy_by_class": found.by_class(images.label_names)}
    return results


def describe(args: Arguments, accelerator: Accelerator, images: ImageData) -> dict[str, Any]:
    """Print which branches can be removed from the initial network. Returns empty results."""
    accelerator.print(f"To train {args.model.name} on {images}; seed {args.training.seed}.")
    if accelerator.is_main_process:
        set_seed(args.training.seed)
        model = build.model(args.model, args.paper, images).to(accelerator.device).eval()
        is_trained = knows_classes(args.model, images)
        print(choices.describe(args.pruning, model, images.analysed(accelerator.device), is_trained))
    return {}


def teach(args: Arguments, accelerator: Accelerator, images: ImageData, model: nn.Module, trained: nn.Module) -> None:
    """Give a network its teacher, if the arguments name one.

    Args:
        args: Arguments of the run.
        accelerator: Accelerator of the run.
        images: Images with the classes that the teacher must have.
        model: Student.
        trained: Dense network, the teacher with ``--teacher self``.
    """
    teaching = args.distillation
    shares = {"weight": teaching.teacher_weight, "temperature": teaching.teacher_temperature}
    if teaching.teacher == "self":
        model.distillation = Distillation.of_itself(trained, **shares)  # type: ignore[assignment]
    elif teaching.teacher:
        teacher = choices.load_teacher(teaching.teacher, images.label_names, images.pretrained_cfg)
        model.distillation = Distillation(teacher.to(accelerator.device), **shares)  # type: ignore[assignment]


def cut(args: Arguments, accelerator: Accelerator, images: ImageData, model: nn.Module, trained: nn.Module) -> None:
    """Remove branches at the start, if requested. Every process must call this.

    Args:
        args: Arguments of the run.
        accelerator: Accelerator of the run.
        images: Images for comparing branches.
        model: Network to remove branches from.
        trained: Dense network, by which the branches are chosen.
    """
    if args.pruning.prune_at == "ramp" or args.pruning.no_gates:
        return
    batches = images.analysed(accelerator.device)
    prune(model, _slots_to_remove(args, accelerator, trained, batches))
    if not args.training.num_train_epochs and choices.estimate_statistics(model, batches):
        accelerator.print("The statistics of batch norm were estimated again on training images.")


def _slots_to_remove(
    args: Arguments, accelerator: Accelerator, model: nn.Module, batches: choices.Batches
) -> list[str]:
    """The branches to remove. A resumed run uses those of its beginning."""
    if checkpoint := find_checkpoint(args, Path(args.output_dir)):
        with checkpoints.taking_up(checkpoint):
            removed = check_slots("removed", load_state(checkpoint / "training.json")["removed"])
        return [slot for slot in removed if slot in gates(model)]
    chosen: list[list[str] | None] = [None]
    if accelerator.is_main_process:
        chosen = [choices.choose_slots(args.pruning, model, batches, Path(args.output_dir) / "branches.json")]
    slots = broadcast_object_list(chosen)[0]
    accelerator.print(f"Removing {len(slots)} of {len(gates(model))} branches before the training.")
    return slots
