"""The arguments of ``train_hf.py``, in groups: model, data, pruning, distillation, training, checkpoints and saving.

The help texts of the flags document the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...budget import BUDGETS
from .options import (
    at_least,
    finite,
    flag,
    fraction_or_number,
    json_object,
    not_negative,
    option,
    share,
    steps_or_epoch,
)  # fmt: skip

__all__ = [
    "CheckpointArguments", "DataArguments", "DistillationArguments", "ModelArguments", "PaperArguments",
    "PruningArguments", "SavingArguments", "TrainingArguments",
]  # fmt: skip

_OF_DENSE = "target as a share of the dense network (0.5) or as a number of"


@dataclass
class ModelArguments:
    """The initial model."""

    title: ClassVar[str] = "model"
    model_name_or_path: str | None = option(
        "a saved model of this package or of timm: a directory, or a name on the Hub"
    )
    architecture: str | None = option("a timm model, with or without the prefix eps_; default eps_resnet110")
    pretrained: bool = flag("start with timm's pretrained weights; a tag is written as in eps_resnet50.a1_in1k")
    model_args: dict[str, Any] | None = option(
        'JSON with keyword arguments for timm, such as {"drop_rate": 0.1}', json_object
    )
    ignore_mismatched_sizes: bool = flag("replace the classifier if the number of classes differs")

    @property
    def has_weights(self) -> bool:
        """Whether the network starts with pretrained weights."""
        return bool(self.model_name_or_path or self.pretrained)

    @property
    def name(self) -> str:
        """Name of the network."""
        return str(self.model_name_or_path or self.architecture)


@dataclass
class DataArguments:
    """The images."""

    title: ClassVar[str] = "data (without any of these: scikit-learn's digits)"
    dataset_name: str | None = option("a data set on the Hub, or a directory that datasets.load_dataset reads")
    dataset_config_name: str | None = option("configuration of the data set")
    train_dir: str | None = option("a directory with one sub-directory of images per class")
    validation_dir: str | None = option("the same for the validation images")
    test_dir: str | None = option("the same for the images of one final test")
    train_split_name: str = option("training split, or several such as train+extra", default="train")
    test_split_name: str | None = option("split for one final test")
    train_val_split: float = option(
        "validation share of the training split, if there is no validation split", share, 0.15
    )
    image_column_name: str | None = option("column of images, encoded files or paths; default: found by type")
    label_column_name: str | None = option("column of classes, strings or whole numbers; default: found by type")
    max_train_samples: int | None = option("number of images to draw; with --streaming: images per epoch", at_least(1))
    max_eval_samples: int | None = option("number of images to draw; with --streaming: the first ones", at_least(1))
    streaming: bool = flag("stream the images, for data sets larger than the disk")
    shuffle_buffer_size: int = option(
        "with --streaming: size of the buffer from which images are drawn", at_least(1), 1000
    )
    corrupt_images: str = option(
        "error: stop at a corrupt image; skip: leave it out and count it", default="error", choices=["error", "skip"]
    )
    image_size: int | None = option("side in pixels; default: the architecture's, 8 for the digits", at_least(4))
    fold: int = option("validation fold of the digits, 0 to 4", int, 0)
    augmentation: str = option(
        "crop: padding and a random crop; resized_crop: for large images, which are read when needed; distort: the "
        "paper's for SVHN",
        default="crop",
        choices=["crop", "distort", "resized_crop"],
    )
    padding: int | None = option("with crop and distort: pixels on each side; default: image size // 8", at_least(0))
    color_jitter: list[float] | None = option("with resized_crop: brightness, contrast and saturation", finite, nargs=3)
    flip: bool = flag("mirror half of the images; not for digits")
    crop_pct: float | None = option("side of the centre crop for evaluation, as a share of the image side", share)
    dataloader_num_workers: int = option("number of processes that read large images", at_least(0), 0)

    @property
    def is_digits(self) -> bool:
        """Whether the images are scikit-learn's digits, the default."""
        return self.dataset_name is None and self.train_dir is None


@dataclass
class PruningArguments:
    """The budget, the criterion, and the time of removal."""

    title: ClassVar[str] = "how many branches are removed, which, and when"
    keep: float | None = option("share (0.25) or number (14) of branches to keep; default 0.25", fraction_or_number)
    target_params: float | None = option(f"{_OF_DENSE} parameters", fraction_or_number)
    target_macs: float | None = option(f"{_OF_DENSE} multiply-adds per image", fraction_or_number)
    target_latency: float | None = option(
        f"{_OF_DENSE} milliseconds of a forward pass on this device", fraction_or_number
    )
    latency_batch_size: int = option("batch size of that forward pass", at_least(1), 32)
    no_gates: bool = flag("train the dense network only")
    prune_at: str = option(
        "start: remove branches before training; ramp: during training. Default: start for a network with pretrained "
        "weights, ramp for a new network",
        choices=["start", "ramp"],
    )
    criterion: str = option(
        "order of removal, by smallest response; by smallest estimated change of the loss (importance); by smallest "
        "measured change (leave_one_out); from the end of each stage (stage_ends) or of the network (last). Default: "
        "stage_ends with --prune_at start, response with ramp",
        choices=["response", "importance", "leave_one_out", "stage_ends", "last"],
    )
    epsilon_warmup_epochs: int = option(
        "ramp: first epochs, with all gates open; default 4, fewer in short trainings", at_least(0)
    )
    ramp_epochs: int = option(
        "ramp: epochs from the warm-up to the full budget; default 8, fewer in short trainings", at_least(0)
    )
    patience: int = option("ramp: epochs between closing and removal of a branch", at_least(1), 3)
    no_live_removal: bool = flag("ramp: remove closed branches only at the end of the training")

    @property
    def has_budget(self) -> bool:
        """Whether a budget is given."""
        return any(getattr(self, name) is not None for name in BUDGETS)


@dataclass
class DistillationArguments:
    """The teacher."""

    title: ClassVar[str] = "distillation"
    teacher: str | None = option("self, or a saved model with the same classes: a directory, or a name on the Hub")
    teacher_weight: float = option("share of the teacher in the loss; the labels have the rest", share, 0.5)
    teacher_temperature: float = option("divisor of the logits of teacher and student", finite, 2.0)
    dense_epochs: int | None = option(
        "with --teacher self or --criterion leave_one_out: epochs for fine-tuning the dense network first; default: "
        "--num_train_epochs for a new classifier, else 0",
        at_least(0),
    )


@dataclass
class TrainingArguments:
    """The training."""

    title: ClassVar[str] = "training"
    num_train_epochs: int = option("number of epochs; default 60, with pretrained weights 20", at_least(0))
    steps_per_epoch: int | None = option(
        "define an epoch as this many optimizer steps instead of one pass over the data",
        at_least(1),
    )
    eval_strategy: str = option(
        "when to evaluate; no: only the final network", default="epoch", choices=["epoch", "no"]
    )
    early_stopping_patience: int | None = option("stop after this many epochs without a better accuracy", at_least(1))
    per_device_train_batch_size: int = option(
        "batch size in training; default 128, with pretrained weights 32", at_least(2)
    )
    per_device_eval_batch_size: int = option("batch size in evaluation", at_least(1), 512)
    gradient_accumulation_steps: int = option("batches per optimizer step", at_least(1), 1)
    optimizer: str = option("optimizer of torch", default="sgd", choices=["sgd", "adamw"])
    learning_rate: float = option(
        "learning rate; default 0.1 for sgd and 0.001 for adamw, with pretrained weights a tenth", float
    )
    momentum: float = option("momentum of sgd", finite, 0.9)
    nesterov: bool = flag("use Nesterov momentum with sgd")
    weight_decay: float = option("L2 coefficient; default 5e-3, with pretrained weights 1e-4", finite)
    lr_scheduler: str = option(
        "schedule of the learning rate; the paper uses multistep for ImageNet and restarting for small images",
        default="cosine",
        choices=["cosine", "multistep", "restarting"],
    )
    num_warmup_steps: int | None = option(
        "with cosine: number of first steps with a rising rate; default 0, with pretrained weights 5 %% of all steps",
        at_least(0),
    )
    lr_decay_start: float = option(
        "with cosine: share of the training before the rate falls; default 0.3, with pretrained weights 0",
        share,
    )
    label_smoothing_factor: float = option("probability spread over all classes", share, 0.0)
    mixup_alpha: float = option("mix pairs of images; 0 is off, 0.2 is usual", not_negative, 0.0)
    cutmix_alpha: float = option("paste a part of one image into another; 0 is off", not_negative, 0.0)
    model_ema: bool = flag("evaluate and save a moving average of the weights")
    model_ema_decay: float = option("decay of the average, reached after a warm-up", share, 0.9998)
    mixed_precision: str | None = option(
        "number format; default: the setting of accelerate", choices=["no", "fp16", "bf16"]
    )
    num_threads: int | None = option(
        "CPU threads per process; default: the cores divided by the processes", at_least(1)
    )
    ddp_timeout: int = option("seconds to wait for another process before this one ends", at_least(1), 1800)
    compile: bool = flag("use torch.compile; it compiles again after each removal")
    cuda_graphs: bool = flag("launch all kernels of a step at once; deep networks train faster")
    channels_last: bool = flag("use the memory format that accelerators prefer")
    sync_batchnorm: bool = flag("compute batch norm over the batches of all processes")
    seed: int = option("seed of all random numbers", int, 0)
    compare_dense: bool = flag("also train the dense network with the same recipe")


@dataclass
class CheckpointArguments:
    """Checkpoints and logs during the training."""

    title: ClassVar[str] = "checkpoints and tracking"
    checkpointing_steps: int | str | None = option(
        "steps between checkpoints, or 'epoch'; default: no checkpoints", steps_or_epoch
    )
    checkpoints_total_limit: int | None = option("number of checkpoints to keep, the last ones", at_least(1))
    resume_from_checkpoint: str | None = option(
        "a checkpoint directory, or 'latest' in --output_dir; without a checkpoint the training starts anew",
        nargs="?",
        const="latest",
    )
    with_tracking: bool = flag("log to the trackers named by --report_to")
    report_to: list[str] | None = option(
        "tensorboard, wandb, comet_ml, ...; default: all installed trackers", nargs="+"
    )
    logging_steps: int | None = option(
        "steps between further logs of the loss; default: one log per epoch", at_least(1)
    )


@dataclass
class SavingArguments:
    """Saving and publishing of the model."""

    title: ClassVar[str] = "saving and the Hub"
    with_remote_code: bool = flag("add code, so that transformers loads the model without this package")
    with_onnx: bool = flag("add onnx/model.onnx")
    with_onnx_int8: bool = flag("add onnx/model_int8.onnx, in eight bits, calibrated on training images")
    with_exported_program: bool = flag("add model.pt2, which plain torch loads")
    license: str = option("licence of the weights, for the card", default="apache-2.0")
    push_to_hub: bool = flag("push --output_dir in one commit")
    hub_model_id: str | None = option("owner/name; default: your account and the name of --output_dir")
    hub_token: str | None = option("token; default: the token of `hf auth login`")
    hub_private_repo: bool = flag("make a new repository private")
    hub_revision: str | None = option("branch to push to; default main")

    def extras(self) -> dict[str, bool]:
        """Additional files, as arguments of :func:`timm_eps.save_pretrained`."""
        return {
            "remote_code": self.with_remote_code,
            "onnx": self.with_onnx,
            "exported_program": self.with_exported_program,
        }


@dataclass
class PaperArguments:
    """Settings of the paper."""

    title: ClassVar[str] = "the paper's own settings"
    epsilon: float | None = option("a fixed threshold for all branches, instead of a budget", finite)
    side_loss_weight: float | None = option("weight of the side head's loss; default 0.1 for CIFAR networks", finite)
    per_pixel_mean: bool = flag("for CIFAR: the network subtracts the mean of each pixel, not only of each channel")
    lr_milestones: list[int] = option(
        "with multistep and restarting: epochs at which the rate falls", at_least(1), [82, 123, 300], nargs="+"
    )
    lr_restart_milestones: list[int] = option(
        "the same, counted from the last restart", at_least(1), [41, 61, 150], nargs="+"
    )
    lr_factors: list[float] = option(
        "factors of the learning rate between these epochs", finite, [1, 0.1, 0.01, 0.002], nargs="+"
    )
    weight_decay_drop: list[float] | None = option(
        "multiply the weight decay by FACTOR every STEPS steps", finite, nargs=2, metavar=("STEPS", "FACTOR")
    )
