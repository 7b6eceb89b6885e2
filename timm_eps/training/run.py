"""One training in one of several processes: its parts, its progress, and the decisions that all processes share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ..pruner import EpsilonPruner
from ..surgery.sharding import gathered
from . import build, checkpoints, data
from .arguments import Arguments
from .cuda_graphs import GraphedPasses
from .ending import reading_images
from .evaluation import Evaluation
from .inputs import ImageData
from .interruption import Interruption, InterruptionError
from .losses import label_mixer, smooth_labels
from .process_state import all_finite
from .progress import Progress
from .sharded import checkpoint_files
from .step_watch import StepWatch

__all__ = ["Run"]


class Run:
    """The parts of a training and its state. The loop that uses them is in ``train_hf.py``.

    Args:
        args: Arguments of the command line.
        accelerator: Accelerator of the run.
        images: Images for training and validation.
        model: Model on its device, from :func:`.build.place`.
        optimizer: Optimizer of its parameters.
        batches: Training batches of this process.
        scheduler: Scheduler of the learning rate.
        average: Average of the weights, or None.
        pruner: Pruner, or None in the training of a dense network.
        is_dense: Whether this is the dense network, for comparison or as a teacher.

    Attributes:
        network: Model wrapped by Accelerate.
        prepared_optimizer: Optimizer wrapped by Accelerate.
        progress: Progress of the training.
        loss: Sum over the batches of the current epoch, in this process.
        signum: Number of a signal that stops all processes, or 0.
        graphs: Object that captures a step as a CUDA graph, if requested.
        directory: Directory of the checkpoints.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Accelerator,
        images: ImageData,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: data.TrainingBatches,
        scheduler: LRScheduler,
        average: ModelEmaV3 | None = None,
        pruner: EpsilonPruner | None = None,
        is_dense: bool = False,
    ) -> None:
        self.args, self.accelerator, self.images = args, accelerator, images
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.batches, self.average, self.pruner, self.is_dense = batches, average, pruner, is_dense
        self.device = accelerator.device
        self.directory = Path(args.output_dir) / ("dense" if is_dense else "")
        training = args.training
        self.mix = label_mixer(len(images.label_names), training.mixup_alpha, training.cutmix_alpha)
        if self.mix or training.label_smoothing_factor:
            smooth_labels(model, training.label_smoothing_factor)
        self.normalize = images.normalize(self.device)
        self.augment = build.augmentation(args.data, images.pretrained_cfg["input_size"][-1])
        accelerator.free_memory()  # of an earlier training
        self.network, self.prepared_optimizer = accelerator.prepare(model, optimizer)
        # The same in all processes, which augment one batch together. Other random numbers differ between them.
        self.generator = torch.Generator()
        self.generator.set_state(torch.get_rng_state())
        self.draws = data.Draws(self.generator, rank=accelerator.process_index, processes=accelerator.num_processes)
        if accelerator.num_processes > 1:
            set_seed(training.seed, device_specific=True)
        self.progress = Progress()
        self.loss = torch.zeros((), device=self.device)
        self.graphs: GraphedPasses | None = None
        self.signum = 0
        self.watch = StepWatch(accelerator.num_processes, self.device, training.ddp_timeout)
        self.interruption = Interruption()
        self.clock = time.perf_counter()

    @property
    def final(self) -> nn.Module:
        """The network to test and save: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    def gather(self) -> None:
        """End the training: each process gets the whole network if its parameters were sharded. All must call this."""
        self.model = gathered(self.model)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]

    # Computation of an epoch.

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, unless the accuracy stops rising."""
        for epoch in range(self.progress.epoch, self.args.training.num_train_epochs):
            if self.stops_early():
                break
            yield epoch

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Context for the epochs, which records signals and failures of processes that read images.

        Raises:
            ChildProcessError: A process that reads images failed.
        """
        try:
            with self.interruption, reading_images():
                yield
        except ChildProcessError as error:
            if signum := self.interruption.signum:  # the signal also reached the processes that read images
                raise self.interrupted(signum) from error
            raise ChildProcessError(f"{error} {self.remedy()}") from error

    @contextmanager
    def epoch_bar(self, epoch: int) -> Iterator[tqdm]:
        """The progress bar of an epoch, with the remaining time of all epochs. Starts the training clock."""
        dense = "dense, " if self.is_dense or self.args.pruning.no_gates else ""
        with tqdm(
            total=len(self.batches), initial=self.progress.batch, mininterval=0.5, postfix=self.time_left(),
            desc=f"{dense}epoch {epoch + 1}/{self.args.training.num_train_epochs}",
            disable=not self.accelerator.is_local_main_process,
        ) as bar:  # fmt: skip
            self.clock = time.perf_counter()
            yield bar
            bar.set_postfix_str(self.summary())

    def queue(self) -> AbstractContextManager[None]:
        """Context for the steps of an epoch."""
        return nullcontext() if self.graphs is None else self.graphs.queue(self.model)

    def read(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device of the network: uint8 images (B, C, H, W), augmented, normalised and mixed."""
        images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
        x = self.normalize(self.augment(images, self.draws))
        if self.args.training.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.mix(x, labels) if self.mix else (x, labels)

    # Reports.

    def lap(self) -> None:
        """Count the time since the epoch began, or since the last lap, as time of training."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def mean_loss(self) -> float:
        """Mean loss of the batches of this epoch so far, over all processes."""
        return self.accelerator.reduce(self.loss, "mean").item() / self.progress.batch

    def log(self, values: dict[str, Any]) -> None:
        """Log values to the trackers."""
        prefix = "dense/" if self.is_dense else ""
        self.accelerator.log({f"{prefix}{name}": value for name, value in values.items()}, step=self.progress.step)

    def time_left(self) -> str | None:
        """Estimated time of the remaining epochs, for the progress bar."""
        progress, batches = self.progress, len(self.batches)
        done = progress.epoch * batches + progress.batch
        if not done:
            return None
        left = progress.seconds / done * (self.args.training.num_train_epochs * batches - done)
        return f"{timedelta(seconds=round(left))} left in all"

    def summary(self) -> str:
        """Summary of the finished epoch, for the progress bar."""
        progress, pruner = self.progress, self.pruner
        left = f", blocks {pruner.total - pruner.discarded}/{pruner.total}" if pruner else ""
        right = f", accuracy {progress.accuracies[-1]:.4f}" if progress.accuracies else ""
        return f"loss {progress.losses[-1]:.4f}{right}{left}"

    def results(self, validated: Evaluation, tested: Evaluation | None) -> dict[str, Any]:
        """Results of the training, by the names of the results file."""
        found = {
            "eval_accuracy": validated.accuracy,
            "eval_accuracy_by_class": validated.by_class(self.images.label_names),
            "eval_accuracy_by_epoch": self.progress.accuracies,
            "eval_images": validated.images,
            "train_loss_by_epoch": self.progress.losses,
            "train_seconds": self.progress.seconds,
        }
        return found if tested is None else {**found, "test_accuracy": tested.accuracy, "test_images": tested.images}

    # Decisions of all processes together.

    def stops_early(self) -> bool:
        """Whether early stopping applies. It counts only epochs after the last change of the structure."""
        patience, accuracies = self.args.training.early_stopping_patience, self.progress.accuracies
        if patience is None:
            return False
        if self.pruner:
            if self.pruner.discarded < self.pruner.total - self.pruner.wanted:
                return False
            history = enumerate(self.pruner.history)
            changed = [index for index, record in history if record["removed"] or record.get("held")]
            accuracies = accuracies[max(changed, default=-1) + 1 :]
        return len(accuracies) - (accuracies.index(max(accuracies)) if accuracies else 0) > patience

    def share_statistics(self) -> None:
        """Average the batch norm statistics over all processes."""
        if self.draws.processes > 1:
            for network in (self.model, self.average):
                if network is not None:
                    distribute_bn(network, self.draws.processes, reduce=True)

    def look(self) -> None:
        """Check whether a process was told to stop or has diverged. Every process must call this."""
        seen = self.watch.look(self.interruption.signum, self.loss)
        self.signum = self.signum or seen.signum
        if not seen.is_finite:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise in all processes if the loss or the weights of one are not finite. This waits for the device."""
        loss = self.mean_loss() if self.progress.batch else 0.0
        all_are = self.accelerator.reduce(all_finite(self.model).float()).item() == self.accelerator.num_processes
        if math.isfinite(loss) and all_are:
            return
        what = f"The loss of epoch {self.progress.epoch + 1} is {loss}"
        if math.isfinite(loss):
            what = f"The weights of epoch {self.progress.epoch + 1} are not finite"
        raise ValueError(
            f"{what}; lower --learning_rate {self.args.training.learning_rate}. It was detected after step "
            f"{self.progress.step}, and no checkpoint was written since. {self.remedy(going_on=False)}"
        )

    def stop_if_told(self, is_end: bool = False) -> None:
        """Raise InterruptionError if a signal told a process to stop.

        Args:
            is_end: Whether this is the last step, so that the processes must exchange signals now.
        """
        if signum := self.signum or (self.watch.last().signum if is_end else 0):
            raise self.interrupted(signum)

    def interrupted(self, signum: int) -> InterruptionError:
        """The error for a training that was told to stop."""
        last = checkpoints.newest_whole(self.directory, checkpoint_files())
        return InterruptionError(signum, self.progress.step, last)

    def remedy(self, going_on: bool = True) -> str:
        """How to continue from a checkpoint, for error messages."""
        last = checkpoints.newest_whole(self.directory, checkpoint_files())
        if last is None:
            return "There is no checkpoint."
        return f"Go on with --resume_from_checkpoint, from {last}." if going_on else f"{last} is whole."
