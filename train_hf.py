#!/usr/bin/env python
"""Train an image classifier that loses the residual blocks its task does not need.

    accelerate launch train_hf.py                      # eps_resnet110 on scikit-learn's digits; needs no network
    accelerate launch train_hf.py --compare_dense      # and the same recipe with the gates off, for comparison
    accelerate launch train_hf.py --dataset_name uoft-cs/cifar10 --flip --output_dir outputs/cifar10
    accelerate launch train_hf.py --config hub_configs/eps_resnet110.digits.json --keep 0.3
    accelerate launch train_hf.py --architecture eps_resnet18 --image_size 32 --keep 0.5    # any twin of a timm model
    accelerate launch train_hf.py --model_name_or_path me/dense --dataset_name me/images --target_latency 0.6
    accelerate launch train_hf.py --model_name_or_path me/dense --dataset_name me/images --dry_run    # what can go

A JSON file given with --config holds arguments by name; a flag on the command line wins over it. What is written to
--output_dir, and with --push_to_hub to the Hub: the model (timm and transformers load it), README.md (its card),
blocks.png, all_results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, is_compiled_module, set_seed
from huggingface_hub import create_repo
from safetensors import SafetensorError
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm.auto import tqdm

import timm_eps
from timm_eps import report
from timm_eps.files.config_checks import check_slots
from timm_eps.hub import onnx_export
from timm_eps.hub.failures import WRITE_ERRORS, one_line
from timm_eps.surgery.branches import gates
from timm_eps.surgery.distributed import rewrap
from timm_eps.surgery.removal import removed_slots
from timm_eps.training import checkpoints, data, start
from timm_eps.training.arguments import begins_with_weights, binding_arguments, parse_arguments, used_arguments
from timm_eps.training.average import load_average, new_average, save_average
from timm_eps.training.building import build_model, build_optimizer, build_pruner, build_scheduler
from timm_eps.training.cuda_graphs import GraphedPasses
from timm_eps.training.directory_lock import locked
from timm_eps.training.ending import as_script, reading_images
from timm_eps.training.evaluation import Evaluation, evaluate
from timm_eps.training.inputs import analysed_batches, note_corrupt, prepare_data
from timm_eps.training.interruption import Interruption, InterruptionError
from timm_eps.training.launching import start_accelerator, start_trackers
from timm_eps.training.losses import label_mixer, smooth_labels
from timm_eps.training.process_state import all_finite, check_random_states, load_own, save_own
from timm_eps.training.progress import Progress, check_like, check_pruner, dump_json, load_state
from timm_eps.training.publishing import base_model, check_reload, compare, hardware, logits_of, push, versions
from timm_eps.training.step_watch import StepWatch
from timm_eps.training.sync_batchnorm import synchronize_batchnorm

# What a checkpoint holds at the least, whatever its list of files says.
CHECKPOINT_FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "training.json")


class Training:
    """One training run, from the seed or from a checkpoint on, in one process of one or several.

    Args:
        args: Of the command line.
        accelerator: Accelerate's.
        splits: Images to train and to validate on.
        pretrained_cfg: timm's description of the input.
        directory: Where checkpoints go.
        is_dense: Whether this is the dense network, for comparison or as a teacher.
        model: What to begin with; if None, what the arguments say.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        splits: dict[str, data.Images],
        pretrained_cfg: dict[str, Any],
        directory: Path,
        is_dense: bool,
        model: nn.Module | None = None,
    ) -> None:
        self.args, self.accelerator, self.splits, self.directory = args, accelerator, splits, directory
        self.is_dense = is_dense
        share = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
        set_seed(args.seed)
        model = build_model(args, pretrained_cfg, splits["train"]) if model is None else model
        self.model = model.to(accelerator.device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if args.sync_batchnorm:
            self.model = synchronize_batchnorm(self.model)
        self.optimizer = build_optimizer(args, self.model)
        self.batches = data.TrainingBatches(
            splits["train"], args.per_device_train_batch_size, args.seed, num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda", buffer_size=args.shuffle_buffer_size,
            per_epoch=args.steps_per_epoch and args.steps_per_epoch * args.gradient_accumulation_steps, **share,
        )  # fmt: skip
        steps_per_epoch = math.ceil(len(self.batches) / args.gradient_accumulation_steps)
        self.scheduler = build_scheduler(args, self.optimizer, steps_per_epoch * args.num_train_epochs)
        classes = len(splits["train"].label_names)
        self.mix = label_mixer(classes, args.mixup_alpha, args.cutmix_alpha)
        if self.mix or args.label_smoothing_factor:
            smooth_labels(self.model, args.label_smoothing_factor)
        self.normalize = data.Normalize(pretrained_cfg).to(accelerator.device)
        self.average = new_average(self.model, args.model_ema_decay) if args.model_ema else None
        closes = args.prune_at == "ramp" and not (args.no_gates or is_dense)
        self.pruner = (
            build_pruner(
                args, self.model, self.optimizer, analysed_batches(args, accelerator, splits, pretrained_cfg),
                [self.average] if self.average else [],
            )
            if closes
            else None
        )  # fmt: skip
        accelerator.free_memory()  # of a training before this one
        self.network, self.prepared_optimizer = accelerator.prepare(self.model, self.optimizer)

        padding = pretrained_cfg["input_size"][-1] // 8 if args.padding is None else args.padding
        self.augment: Callable[[Tensor, data.Draws], Tensor] = {
            "crop": data.PadCropFlip(padding, args.flip),
            "distort": data.Distort(padding),
            "resized_crop": lambda images, draws: images,  # done as the images are read
        }[args.augmentation]
        # The same in all processes, which augment one batch together; what else is random differs between them.
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        self.draws = data.Draws(generator, **share)
        if accelerator.num_processes > 1:
            set_seed(args.seed, device_specific=True)
        self.graphs = GraphedPasses(self.passes) if args.cuda_graphs else None
        self.progress = Progress()
        self.clock = time.perf_counter()
        self.loss = torch.zeros((), device=accelerator.device)  # as progress.loss, of this process
        self.watch = StepWatch(accelerator.num_processes, accelerator.device)
        self.interruption = Interruption()
        self.signum = 0  # of a signal that tells all processes to stop

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the results."""
        try:
            with self.interruption, reading_images():
                self.train_epochs()
        except ChildProcessError as error:
            if signum := self.interruption.signum:  # it was for those that read images as well
                raise self.interrupted(signum) from error
            raise ChildProcessError(f"{error} {self.remedy()}") from error
        # Without the autocast that mixed precision wraps around forward: what is measured now is what will be loaded.
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.final.to(memory_format=torch.contiguous_format)
        with reading_images():
            found = self.evaluate()
            tested = self.evaluate("test") if "test" in self.splits else None
        results = {
            "eval_accuracy": found.accuracy,
            "eval_accuracy_by_class": found.by_class(self.splits["train"].label_names),
            "eval_accuracy_by_epoch": self.progress.accuracies,
            "eval_images": found.images,
            "train_loss_by_epoch": self.progress.losses,
            "train_seconds": self.progress.seconds,
        }
        if tested is not None:
            results |= {"test_accuracy": tested.accuracy, "test_images": tested.images}
        return results

    @property
    def final(self) -> nn.Module:
        """The network that is tested and saved: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    def train_epochs(self) -> None:
        """All epochs that are left, unless a signal stops them."""
        for epoch in range(self.progress.epoch, self.args.num_train_epochs):
            if self.stops_early():
                break
            dense = "dense, " if self.is_dense or self.args.no_gates else ""
            name = f"{dense}epoch {epoch + 1}/{self.args.num_train_epochs}"
            with tqdm(
                total=len(self.batches), initial=self.progress.batch, desc=name, mininterval=0.5,
                disable=not self.accelerator.is_local_main_process,
            ) as bar:  # fmt: skip
                bar.set_postfix_str(self.time_left())
                self.clock = time.perf_counter()
                with self.queue():
                    self.train_epoch(epoch, bar)
                self.end_epoch()
                bar.set_postfix_str(self.summary())
            if self.signum:
                raise self.interrupted(self.signum)
        if signum := self.watch.last().signum:
            raise self.interrupted(signum)

    def stops_early(self) -> bool:
        """Whether the accuracy has not risen for so many epochs, of those since the structure changed last."""
        patience, accuracies = self.args.early_stopping_patience, self.progress.accuracies
        if patience is None:
            return False
        if self.pruner:
            if self.pruner.discarded < self.pruner.total - self.pruner.wanted:
                return False
            changed = [index for index, record in enumerate(self.pruner.history) if record["removed"]]
            accuracies = accuracies[max(changed, default=-1) + 1 :]
        return len(accuracies) - (accuracies.index(max(accuracies)) if accuracies else 0) > patience

    def time_left(self) -> str:
        """What the epochs to come take, by those before, for the progress bar."""
        progress, batches = self.progress, len(self.batches)
        done = progress.epoch * batches + progress.batch
        if not done:
            return ""
        left = progress.seconds / done * (self.args.num_train_epochs * batches - done)
        return f"{timedelta(seconds=round(left))} left in all"

    def queue(self) -> AbstractContextManager[None]:
        """Where an epoch is computed."""
        if self.graphs is None:
            return nullcontext()
        gains = (gate.gain for gate in gates(self.model).values() if gate.gain is not None)
        return self.graphs.queue([*self.model.parameters(), *gains])

    def train_epoch(self, epoch: int, bar: tqdm) -> None:
        """The batches of an epoch, from where the run stands on. Nothing in a step waits for the device."""
        self.network.train()
        if not self.pruner:  # nobody asks what the gates see; what they hold trains on
            for gate in gates(self.model).values():
                gate.training = False
        together = self.args.gradient_accumulation_steps
        for index, (images, labels, corrupt) in enumerate(
            self.batches.epoch(epoch, self.progress.batch), start=self.progress.batch
        ):
            note_corrupt(self.args, corrupt, "train", self.progress.corrupt)
            is_last = index + 1 == len(self.batches)
            takes_step = is_last or (index + 1) % together == 0
            accumulated = min(together, len(self.batches) - index // together * together)
            with nullcontext() if takes_step else self.accelerator.no_sync(self.network):
                batch = self.read(images), self.there(labels)
                if self.mix:
                    batch = self.mix(*batch)
                self.loss += self.graphs(*batch) if self.graphs else self.passes(*batch, accumulated)
            self.progress.batch = index + 1
            if takes_step:
                self.take_step()
                self.look()
                if not is_last:  # at the end of the epoch there is more to do first
                    if self.is_due():
                        self.lap()
                        self.save()
                    if self.signum:
                        raise self.interrupted(self.signum)
            bar.update()

    def passes(self, images: Tensor, labels: Tensor, accumulated: int = 1) -> Tensor:
        """Forward and backward; the loss of a batch, of so many whose gradients make a step."""
        loss = self.network(images, labels=labels).loss
        self.accelerator.backward(loss / accumulated)
        return loss.detach()

    def there(self, values: Tensor) -> Tensor:
        return values.to(self.accelerator.device, non_blocking=True)

    def read(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W), augmented and normalised, on the device."""
        x = self.normalize(self.augment(self.there(images), self.draws))
        return x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x

    def take_step(self) -> None:
        args, progress = self.args, self.progress
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        progress.step += 1
        if self.average is not None:
            self.average.update(self.model, step=progress.step)
        if args.lr_scheduler == "cosine" and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        if args.weight_decay_drop and progress.step % args.weight_decay_drop[0] == 0:
            for group in self.optimizer.param_groups:
                group["weight_decay"] *= args.weight_decay_drop[1]
        if args.logging_steps and progress.step % args.logging_steps == 0:
            self.log({"loss": self.mean_loss(), "learning_rate": self.optimizer.param_groups[0]["lr"]})

    def lap(self) -> None:
        """Count the time since the epoch began, or since the last lap, as time of training."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def mean_loss(self) -> float:
        """Of the batches of this epoch so far, over all processes."""
        return self.accelerator.reduce(self.loss, "mean").item() / self.progress.batch

    def look(self) -> None:
        """Find out whether a process was told to stop or has diverged; every process must call this."""
        seen = self.watch.look(self.interruption.signum, self.loss)
        self.signum = self.signum or seen.signum
        if not seen.is_finite:
            self.check_finite()

    def check_finite(self) -> None:
        """Raise, in all processes, if the loss or the weights of one are not finite; this waits for the device."""
        loss = self.mean_loss() if self.progress.batch else 0.0
        all_are = self.accelerator.reduce(all_finite(self.model).float()).item() == self.accelerator.num_processes
        if math.isfinite(loss) and all_are:
            return
        what = f"The loss of epoch {self.progress.epoch + 1} is {loss}"
        if math.isfinite(loss):
            what = f"The weights of epoch {self.progress.epoch + 1} are not finite"
        raise ValueError(
            f"{what}; lower --learning_rate {self.args.learning_rate}. It was seen after step {self.progress.step}, "
            f"and nothing was written since. {self.remedy(going_on=False)}"
        )

    def remedy(self, going_on: bool = True) -> str:
        """What there is to go on from, for an error."""
        last = checkpoints.newest_whole(self.directory, CHECKPOINT_FILES)
        if last is None:
            return "There is no checkpoint."
        return f"Go on with --resume_from_checkpoint, from {last}." if going_on else f"{last} is whole."

    def interrupted(self, signum: int) -> InterruptionError:
        last = checkpoints.newest_whole(self.directory, CHECKPOINT_FILES)
        return InterruptionError(signum, self.progress.step, last)

    def end_epoch(self) -> None:
        args, progress, pruner = self.args, self.progress, self.pruner
        self.check_finite()
        progress.losses.append(self.mean_loss())
        self.share_statistics()
        rates = {"epsilon": pruner.epsilon} if pruner else {}
        rates["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if pruner and pruner.step():
            rewrap(self.network)
            if is_compiled_module(self.network):
                torch.compiler.reset()  # or torch stops compiling after a number of structures
        if args.lr_scheduler != "cosine":
            restarts = pruner and args.lr_scheduler == "restarting"
            self.scheduler.step(pruner.discarded if restarts else None)
        self.lap()
        found: dict[str, float] = {"train_loss": progress.losses[-1]}
        if args.eval_strategy == "epoch":
            progress.accuracies.append(self.evaluate().accuracy)
            found["eval_accuracy"] = progress.accuracies[-1]
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self.loss.zero_()
        if pruner:
            found |= {"blocks": pruner.total - pruner.discarded}
            found |= {f"response/{slot}": value for slot, value in pruner.history[-1]["responses"].items()}
        self.log({**found, **rates, "epoch": progress.epoch})
        self.look()
        if self.is_due() or (args.checkpointing_steps and progress.epoch == args.num_train_epochs):
            self.save()

    def summary(self) -> str:
        progress, pruner = self.progress, self.pruner
        left = f", blocks {pruner.total - pruner.discarded}/{pruner.total}" if pruner else ""
        right = f", accuracy {progress.accuracies[-1]:.4f}" if progress.accuracies else ""
        return f"loss {progress.losses[-1]:.4f}{right}{left}"

    def log(self, values: dict[str, Any]) -> None:
        prefix = "dense/" if self.is_dense else ""
        self.accelerator.log({f"{prefix}{name}": value for name, value in values.items()}, step=self.progress.step)

    def evaluate(self, split: str = "validation") -> Evaluation:
        """What the network gets right of a split, over all processes."""
        return evaluate(
            self.args, self.accelerator, self.final, self.splits, self.normalize, self.progress.corrupt, split
        )

    def share_statistics(self) -> None:
        """Give all processes the same statistics of batch norm: their mean."""
        if self.draws.processes > 1:
            for network in (self.model, self.average):
                if network is not None:
                    distribute_bn(network, self.draws.processes, reduce=True)

    def is_due(self) -> bool:
        every = self.args.checkpointing_steps
        if self.signum:
            return bool(every)
        return self.progress.batch == 0 if every == "epoch" else bool(every) and self.progress.step % every == 0

    def save(self) -> None:
        """Write a checkpoint; every process must call this.

        Raises:
            ValueError: The loss or the weights are not finite.
            OSError: It cannot be written; those before it stay.
        """
        self.check_finite()
        self.progress.loss = self.loss.item()
        staging = checkpoints.staging_of(self.directory, self.progress.step)
        try:
            self.write(staging)
        except WRITE_ERRORS as error:
            checkpoints.clear_unfinished(self.directory)
            raise OSError(
                f"The checkpoint of step {self.progress.step} could not be written to {self.directory} "
                f"({one_line(error)}). {self.remedy()}"
            ) from error

    def write(self, staging: Path) -> None:
        if self.accelerator.is_main_process:
            checkpoints.clear_unfinished(self.directory)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging))
        if self.draws.processes > 1:
            save_own(self.model, self.loss, staging / f"process_{self.draws.rank}.safetensors")
        if self.accelerator.is_main_process:
            if self.average is not None:
                save_average(self.average, staging)
            state = {
                "run": self.identity(),
                "removed": removed_slots(self.model),
                "progress": asdict(self.progress),
                "scheduler": self.scheduler.state_dict(),
                "pruner": self.pruner and self.pruner.state_dict(),
                "draws": self.draws.generator.get_state().numpy().tobytes().hex(),
            }
            dump_json(state, staging / "training.json")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoints.commit(staging)
            checkpoints.discard_oldest(self.directory, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it would have."""
        found = {**binding_arguments(self.args), "number of processes": self.draws.processes}
        found |= {
            "gates": "off, as the dense network" if self.is_dense or self.args.no_gates else "on",
            "mixed precision": self.accelerator.mixed_precision,
        }
        found |= {"batches an epoch": len(self.batches)}  # last, as it follows from others
        return json.loads(json.dumps(found))

    def resume(self, checkpoint: Path) -> None:
        """Take up the run where a checkpoint left it; every process must call this.

        Raises:
            ValueError: It is of another run, or does not fit.
        """
        with checkpoints.taking_up(checkpoint):
            state = load_state(checkpoint / "training.json")
        before, now = state["run"], self.identity()
        for name in {**before, **now}:
            if now.get(name) != before.get(name):
                raise ValueError(
                    f"The run of {checkpoint} has {name} {before.get(name)}, this one {now.get(name)}: it would "
                    "not go on as it began. Give the same arguments, or begin anew in another --output_dir."
                )
        with checkpoints.taking_up(checkpoint):
            self.take_up(checkpoint, state)
        self.accelerator.print(
            f"Going on from {checkpoint}: {self.progress.epoch} epochs and {self.progress.batch} batches are done."
        )

    def take_up(self, checkpoint: Path, state: dict[str, Any]) -> None:
        accumulated = self.args.gradient_accumulation_steps
        progress = Progress.of(
            state["progress"], epochs=self.args.num_train_epochs, batches=len(self.batches), accumulated=accumulated
        )
        check_like(state["scheduler"], self.scheduler.state_dict(), "scheduler")
        if not 0 <= state["scheduler"]["last_epoch"] <= progress.step:
            raise ValueError(f"scheduler.last_epoch must be 0 to {progress.step}")
        if self.pruner:  # the weights fit the smaller structure only
            check_pruner(state["pruner"], progress.epoch)
            self.pruner.load_state_dict(state["pruner"])
            rewrap(self.network)
        if self.average is not None:
            load_average(self.average, checkpoint)
        self.accelerator.load_state(str(checkpoint))
        check_random_states(checkpoint / f"random_states_{self.draws.rank}.pkl")
        self.scheduler.load_state_dict(state["scheduler"])
        self.draws.generator.set_state(torch.frombuffer(bytearray.fromhex(state["draws"]), dtype=torch.uint8))
        self.progress = progress
        self.loss.fill_(progress.loss)
        if self.draws.processes > 1:
            load_own(self.model, self.loss, checkpoint / f"process_{self.draws.rank}.safetensors")


def find_checkpoint(args: argparse.Namespace, directory: Path) -> Path | None:
    """The checkpoint to go on from; None to begin.

    Raises:
        ValueError: The one that is asked for cannot be used, or a new run would mix its own with those of another.
    """
    wanted = args.resume_from_checkpoint
    if wanted == "latest" or (wanted and directory != Path(args.output_dir)):
        return checkpoints.newest_whole(directory, CHECKPOINT_FILES)
    if wanted:
        if reason := checkpoints.why_torn(wanted, CHECKPOINT_FILES):
            raise ValueError(
                f"--resume_from_checkpoint {wanted} is not a whole checkpoint ({reason}); 'latest' finds the last one "
                "that is."
            )
        return Path(wanted)
    if args.checkpointing_steps and (others := checkpoints.all_checkpoints(directory)):
        raise ValueError(
            f"{directory} holds checkpoints of a run before, the last one {others[-1].name}: go on with "
            "--resume_from_checkpoint, delete them, or take another --output_dir."
        )
    return None


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    splits: dict[str, data.Images],
    pretrained_cfg: dict[str, Any],
    *,
    is_dense: bool = False,
    model: nn.Module | None = None,
) -> tuple[Training, dict[str, Any]]:
    """A training to its end, or that of the dense network before or beside it. Returns it and its results."""
    directory = Path(args.output_dir) / ("dense" if is_dense else "")
    training = Training(args, accelerator, splits, pretrained_cfg, directory, is_dense, model)
    if checkpoint := find_checkpoint(args, directory):
        training.resume(checkpoint)
    return training, training.run()


def begin(
    args: argparse.Namespace,
    accelerator: Accelerator,
    splits: dict[str, data.Images],
    pretrained_cfg: dict[str, Any],
) -> tuple[nn.Module | None, dict[str, Any]]:
    """What the training begins with: its network, cut for the budget, with its teacher; and what is known by then.

    The network is None where the training begins with what the arguments say.
    """
    has_weights, closes_later = begins_with_weights(args), args.prune_at == "ramp"
    if not has_weights and closes_later and not args.teacher:
        return None, {}
    set_seed(args.seed)
    model = build_model(args, pretrained_cfg, splits["train"]).to(accelerator.device)
    trained, results = model, {}
    is_trained = start.knows_classes(args, splits)
    if epochs := start.dense_epochs(args, is_trained):
        first = argparse.Namespace(**{**vars(args), "num_train_epochs": epochs, "teacher": None})
        accelerator.print(f"The dense network is fine-tuned first, for {epochs} epochs.")
        training, dense = train(first, accelerator, splits, pretrained_cfg, is_dense=True)
        trained = training.final
        results = {f"dense_{name}": value for name, value in dense.items() if name != "eval_images"}
        accelerator.print(f"It took {dense['train_seconds']:.0f} s; accuracy {dense['eval_accuracy']:.4f}.")
    elif is_trained:
        normalize = data.Normalize(pretrained_cfg).to(accelerator.device)
        found = evaluate(args, accelerator, model, splits, normalize)
        results = {"start_eval_accuracy": found.accuracy}
        if not removed_slots(model):  # it is the dense network
            results |= {"dense_eval_accuracy": found.accuracy}
            results |= {"dense_eval_accuracy_by_class": found.by_class(splits["train"].label_names)}
    shares = {"weight": args.teacher_weight, "temperature": args.teacher_temperature}
    if args.teacher == "self":
        model.distillation = timm_eps.Distillation.of_itself(trained, **shares)
    elif args.teacher:
        teacher = start.load_teacher(args.teacher, splits["train"].label_names, pretrained_cfg)
        model.distillation = timm_eps.Distillation(teacher.to(accelerator.device), **shares)
    if not (closes_later or args.no_gates):
        batches = analysed_batches(args, accelerator, splits, pretrained_cfg)
        timm_eps.prune(model, slots_to_remove(args, accelerator, trained, batches))
        if not args.num_train_epochs and start.estimate_statistics(model, batches):
            accelerator.print("The statistics of batch norm were taken anew on training images.")
    return model, results


def slots_to_remove(
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, batches: start.Batches
) -> list[str]:
    """The branches to remove before the training; of a run that goes on, those that it began without."""
    if checkpoint := find_checkpoint(args, Path(args.output_dir)):
        with checkpoints.taking_up(checkpoint):
            removed = check_slots("removed", load_state(checkpoint / "training.json")["removed"])
        return [slot for slot in removed if slot in gates(model)]
    chosen = [None]
    if accelerator.is_main_process:
        chosen = [start.choose_slots(args, model, batches)]
    slots = broadcast_object_list(chosen)[0]
    accelerator.print(f"Removing {len(slots)} of {len(gates(model))} branches before the training.")
    return slots


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv, __doc__)
    transformers.logging.disable_progress_bar()
    accelerator = start_accelerator(args)
    with ExitStack() as held:
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(args.output_dir))
        try:
            return run(args, accelerator)
        except InterruptionError:
            accelerator.end_training()  # trackers write what they hold
            raise


def run(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """The whole run in one of its processes: data, training, saving, the Hub. Returns the results."""
    repo_id = None
    if accelerator.is_main_process:  # better to fail here than after the training
        tempfile.TemporaryFile(dir=args.output_dir).close()
        if args.with_onnx:
            onnx_export.check_installed()
        if args.push_to_hub:
            wanted = args.hub_model_id or Path(args.output_dir).resolve().name
            repo_id = create_repo(
                wanted, private=args.hub_private_repo or None, token=args.hub_token, exist_ok=True
            ).repo_id
    if args.compare_dense:
        find_checkpoint(args, Path(args.output_dir) / "dense")  # raises now, not when the first half is trained
    if args.with_tracking:
        start_trackers(args, accelerator)

    splits, pretrained_cfg, about, pictures = prepare_data(args, accelerator)
    corrupt: list[str] = []
    for name, split in splits.items():
        if name == "analysed":  # they are among those to train on
            continue
        note_corrupt(args, getattr(split, "unreadable", []), name, corrupt)

    size = "x".join(str(n) for n in pretrained_cfg["input_size"])
    tested = "a stream" if args.streaming else f"{len(splits['validation']):,}"
    doing = "To train" if args.dry_run else "Training"
    accelerator.print(
        f"{doing} {args.model_name_or_path or args.architecture} on {len(splits['train']):,} images of "
        f"{about['dataset']} ({size}, {len(splits['train'].label_names)} classes), "
        f"testing on {tested} ({about['eval_split']}); seed {args.seed}."
    )
    if args.dry_run:
        return dry_run(args, accelerator, splits, pretrained_cfg)
    model, known = begin(args, accelerator, splits, pretrained_cfg)
    training, results = train(args, accelerator, splits, pretrained_cfg, model=model)
    corrupt = sorted(set(gather_object([*corrupt, *training.progress.corrupt])))
    results |= known
    if args.compare_dense and "dense_train_seconds" not in results:
        _, dense = train(args, accelerator, splits, pretrained_cfg, is_dense=True)
        results |= {f"dense_{name}": value for name, value in dense.items() if name != "eval_images"}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return results
    if corrupt:
        print(f"{len(corrupt)} images could not be read and were left out, such as {', '.join(corrupt[:5])}.")
    model, history = training.final, training.pruner.history if training.pruner else []
    model.config.base_model = base_model(args) or model.config.base_model
    sample = data.Normalize(pretrained_cfg)(splits["validation"].first(32)).to(accelerator.device)
    live = logits_of(model, sample)
    timm_eps.remove_closed(model)
    results |= about
    results |= compare(model, sample, {1, 128} | ({args.latency_batch_size} if args.target_latency else set()))
    results |= {
        "architecture": model.config.architecture,
        "arguments": used_arguments(args),
        "base_model": model.config.base_model,
        "corrupt_images": len(corrupt),
        "epsilon": max((record["epsilon"] for record in history), default=0.0),
        "train_images": len(splits["train"]),
        "license": args.license,
        "num_processes": accelerator.num_processes,
        "seed": args.seed,
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    if args.keep is not None and training.pruner:
        results["blocks_wanted"] = training.pruner.wanted
    saved = {
        "results": results, "history": history, "remote_code": args.with_remote_code, "onnx": args.with_onnx,
    }  # fmt: skip
    try:
        timm_eps.save_pretrained(model, args.output_dir, repo_id=repo_id, **saved)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The trained model could not be saved in {args.output_dir} ({one_line(error)}). {training.remedy()}"
        ) from error

    print(f"\n{report.outcome(results)}\n\n{report.comparison_table(results)}\n")
    if changes := report.class_changes(results):
        print(f"{changes}\n")
    print(f"Saved in {args.output_dir}. Logits of {len(sample)} test images after reloading it through:")
    print(check_reload(args.output_dir, live, sample, pictures(len(sample))) + ".")
    if repo_id is not None:
        push(args, model, repo_id, f"Trained on {about['dataset']}, {results['blocks_kept']} blocks left", saved)
    return results


def dry_run(
    args: argparse.Namespace, accelerator: Accelerator, splits: dict[str, data.Images], pretrained_cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print what can be removed from the network that the training would begin with. Returns nothing."""
    if accelerator.is_main_process:
        set_seed(args.seed)
        model = build_model(args, pretrained_cfg, splits["train"]).to(accelerator.device).eval()
        batches = analysed_batches(args, accelerator, splits, pretrained_cfg)
        print(start.describe(args, model, batches, start.knows_classes(args, splits)))
    return {}


if __name__ == "__main__":
    with as_script("train_hf.py"):
        main()
