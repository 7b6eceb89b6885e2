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

_OF_DENSE = "of the dense network: a share (0.5), or a number of"


@dataclass
class ModelArguments:
    """The initial model."""

    title: ClassVar[str] = "model"
    model_name_or_path: str | None = option("a saved model, of this package or of timm: name on the Hub, or directory")
    architecture: str | None = option("a timm model, with or without eps_ before its name; default eps_resnet110")
    pretrained: bool = flag("begin with timm's weights; eps_resnet50.a1_in1k names a tag")
    model_args: dict[str, Any] | None = option(
        'JSON with keyword arguments for timm, such as {"drop_rate": 0.1}', json_object
    )
    ignore_mismatched_sizes: bool = flag("new classifier where the saved one does not fit")

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
    train_dir: str | None = option("a directory with one sub-directory of images a class")
    validation_dir: str | None = option("the same, to validate on")
    test_dir: str | None = option("the same, to test the final network on, once")
    train_split_name: str = option("or several, such as train+extra", default="train")
    test_split_name: str | None = option("a split of the data set to test the final network on, once")
    train_val_split: float = option("share to validate on if there is no such split", share, 0.15)
    image_column_name: str | None = option("found by type if not given; images, encoded files or paths")
    label_column_name: str | None = option("found by type if not given; classes, strings or whole numbers")
    max_train_samples: int | None = option("draw this many; of a stream, make so many an epoch", at_least(1))
    max_eval_samples: int | None = option("draw this many; of a stream, the first ones", at_least(1))
    streaming: bool = flag("read images as they come, for data that do not fit the disk")
    shuffle_buffer_size: int = option("of a stream: draw the next of so many images", at_least(1), 1000)
    corrupt_images: str = option("skip: leave them out and count them", default="error", choices=["error", "skip"])
    image_size: int | None = option("side in pixels; default that of the architecture, digits 8", at_least(4))
    fold: int = option("which fifth of the digits to validate on, 0 to 4", int, 0)
    augmentation: str = option(
        "crop: after padding; resized_crop: for large images, read when needed; distort: the paper's for SVHN",
        default="crop",
        choices=["crop", "distort", "resized_crop"],
    )
    padding: int | None = option("of crop and distort, pixels on each side; default size // 8", at_least(0))
    color_jitter: list[float] | None = option("of resized_crop: brightness, contrast and saturation", finite, nargs=3)
    flip: bool = flag("mirror half the images; not for digits")
    crop_pct: float | None = option("share of the side that the centre crop for evaluation leaves", share)
    dataloader_num_workers: int = option("processes that read large images", at_least(0), 0)

    @property
    def is_digits(self) -> bool:
        """Whether the images are scikit-learn's digits, the default."""
        return self.dataset_name is None and self.train_dir is None


@dataclass
class PruningArguments:
    """The budget, and which branches are removed when."""

    title: ClassVar[str] = "how much may stay, which branches go, and when"
    keep: float | None = option("share (0.25) or number (14) of branches to keep; default 0.25", fraction_or_number)
    target_params: float | None = option(f"{_OF_DENSE} parameters", fraction_or_number)
    target_macs: float | None = option(f"{_OF_DENSE} multiply-adds for an image", fraction_or_number)
    target_latency: float | None = option(
        f"{_OF_DENSE} milliseconds of a forward pass on this device", fraction_or_number
    )
    latency_batch_size: int = option("images of that pass", at_least(1), 32)
    no_gates: bool = flag("train the dense network only")
    prune_at: str = option(
        "start: remove branches, then train; ramp: while it trains. Default: start for a network that begins with "
        "weights, ramp for one from scratch",
        choices=["start", "ramp"],
    )
    criterion: str = option(
        "which branches go first: by response; by an estimate of what the loss would change without them; by what "
        "it does change; or the last of the network. Default: last at the start, response on the ramp",
        choices=["response", "importance", "leave_one_out", "last"],
    )
    epsilon_warmup_epochs: int = option("ramp: epochs with all gates open first; default 4, or fewer", at_least(0))
    ramp_epochs: int = option("epochs from there to the full budget; default 8, or fewer", at_least(0))
    patience: int = option("ramp: epochs a branch stays closed before it is removed", at_least(1), 3)
    no_live_removal: bool = flag("ramp: remove closed branches at the end, not during training")

    @property
    def has_budget(self) -> bool:
        """Whether a budget is given."""
        return any(getattr(self, name) is not None for name in BUDGETS)


@dataclass
class DistillationArguments:
    """The teacher."""

    title: ClassVar[str] = "distillation"
    teacher: str | None = option("self, or a saved model, on the Hub or a directory, with the same classes")
    teacher_weight: float = option("its share of the loss; the labels have the rest", share, 0.5)
    teacher_temperature: float = option("divisor of the logits of both", finite, 2.0)
    dense_epochs: int | None = option(
        "with --teacher self or --criterion leave_one_out: epochs in which the dense network is fine-tuned first; "
        "default: as many as --num_train_epochs if its classifier is new, else 0",
        at_least(0),
    )


@dataclass
class TrainingArguments:
    """The training."""

    title: ClassVar[str] = "training"
    num_train_epochs: int = option("default 60; 20 for a network that begins with weights", at_least(0))
    steps_per_epoch: int | None = option(
        "define an epoch as this many optimizer steps instead of one pass over the data",
        at_least(1),
    )
    eval_strategy: str = option("no: test the final network only", default="epoch", choices=["epoch", "no"])
    early_stopping_patience: int | None = option("stop after so many epochs without a better accuracy", at_least(1))
    per_device_train_batch_size: int = option("default 128; 32 where weights are fine-tuned", at_least(2))
    per_device_eval_batch_size: int = option("images at once in evaluation", at_least(1), 512)
    gradient_accumulation_steps: int = option("batches of a step", at_least(1), 1)
    optimizer: str = option("of torch", default="sgd", choices=["sgd", "adamw"])
    learning_rate: float = option(
        "default 0.1 for sgd and 0.001 for adamw; a tenth of it for a network that begins with weights", float
    )
    momentum: float = option("of sgd", finite, 0.9)
    nesterov: bool = flag("of sgd")
    weight_decay: float = option("default 5e-3; 1e-4 for a network that begins with weights", finite)
    lr_scheduler: str = option(
        "multistep and restarting are the paper's, for ImageNet and for small images",
        default="cosine",
        choices=["cosine", "multistep", "restarting"],
    )
    num_warmup_steps: int | None = option(
        "with cosine: steps of rising rate first; default 0; 5 %% of all for a network that begins with weights",
        at_least(0),
    )
    lr_decay_start: float = option(
        "with cosine: share of the training at full rate first; default 0.3; 0 for a network that begins with weights",
        share,
    )
    label_smoothing_factor: float = option("probability that is spread over all classes", share, 0.0)
    mixup_alpha: float = option("mix images; 0 is off, 0.2 is usual", not_negative, 0.0)
    cutmix_alpha: float = option("paste a part of one image into another; 0 is off", not_negative, 0.0)
    model_ema: bool = flag("test and save a moving average of the weights")
    model_ema_decay: float = option("of the average, reached after a warm-up", share, 0.9998)
    mixed_precision: str | None = option("default: as accelerate was configured", choices=["no", "fp16", "bf16"])
    num_threads: int | None = option("on the CPU, of each process; default: all cores, divided", at_least(1))
    ddp_timeout: int = option("seconds to wait for another process before this one ends", at_least(1), 1800)
    compile: bool = flag("by torch.compile; compiles anew after each removal")
    cuda_graphs: bool = flag("start a step's kernels all at once: deep networks train faster")
    channels_last: bool = flag("the memory format that accelerators prefer")
    sync_batchnorm: bool = flag("batch norm over the batches of all processes")
    seed: int = option("of all that is random", int, 0)
    compare_dense: bool = flag("train the same recipe with the gates off as well")


@dataclass
class CheckpointArguments:
    """Checkpoints and logs during the training."""

    title: ClassVar[str] = "checkpoints and tracking"
    checkpointing_steps: int | str | None = option("a number of steps, or 'epoch'; default: none", steps_or_epoch)
    checkpoints_total_limit: int | None = option("keep only the last ones", at_least(1))
    resume_from_checkpoint: str | None = option(
        "a checkpoint's directory, or 'latest' in --output_dir; begins anew if there is none",
        nargs="?",
        const="latest",
    )
    with_tracking: bool = flag("log to the trackers of --report_to")
    report_to: list[str] | None = option("tensorboard, wandb, comet_ml, ...; default all that are installed", nargs="+")
    logging_steps: int | None = option("also log the loss every so many steps, not only each epoch", at_least(1))


@dataclass
class SavingArguments:
    """Saving and publishing of the model."""

    title: ClassVar[str] = "saving and the Hub"
    with_remote_code: bool = flag("add code with which transformers loads the model without this package")
    with_onnx: bool = flag("add onnx/model.onnx")
    with_onnx_int8: bool = flag("add onnx/model_int8.onnx, in eight bits, calibrated on training images")
    with_exported_program: bool = flag("add model.pt2, which plain torch loads")
    license: str = option("of the weights, for the card", default="apache-2.0")
    push_to_hub: bool = flag("push what is in --output_dir, in one commit")
    hub_model_id: str | None = option("owner/name; default the name of --output_dir, under your own")
    hub_token: str | None = option("default: the one that `hf auth login` stored")
    hub_private_repo: bool = flag("if the repository is made now")
    hub_revision: str | None = option("the branch to push to; default main")

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
        "not with cosine: epochs at which the rate falls", at_least(1), [82, 123, 300], nargs="+"
    )
    lr_restart_milestones: list[int] = option("the same, counted from a restart", at_least(1), [41, 61, 150], nargs="+")
    lr_factors: list[float] = option("of the rate, between them", finite, [1, 0.1, 0.01, 0.002], nargs="+")
    weight_decay_drop: list[float] | None = option(
        "multiply it every so often", finite, nargs=2, metavar=("STEPS", "FACTOR")
    )
