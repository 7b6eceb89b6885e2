#!/usr/bin/env python
"""Train an image classifier and remove the residual blocks that its task does not need.

    accelerate launch train_hf.py                      # eps_resnet110 on scikit-learn's digits; no internet
    accelerate launch train_hf.py --compare_dense      # and the same recipe with the gates off, for comparison
    accelerate launch train_hf.py --dataset_name uoft-cs/cifar10 --flip --output_dir outputs/cifar10
    accelerate launch train_hf.py --config hub_configs/eps_resnet110.digits.json --keep 0.3
    accelerate launch train_hf.py --architecture eps_resnet18 --image_size 32 --keep 0.5    # any twin of a timm model
    accelerate launch train_hf.py --model_name_or_path me/dense --dataset_name me/images --target_latency 0.6
    accelerate launch train_hf.py --model_name_or_path me/dense --dataset_name me/images --dry_run    # only a report

A JSON file for --config contains arguments by name. Flags on the command line take precedence. The script writes to
--output_dir, and with --push_to_hub to the Hub: the model (timm and transformers load it), README.md (its card),
blocks.png, all_results.json.
"""

# An ordinary training with Accelerate, written to be read from top to bottom and copied. Lines marked (1) to (4) are
# specific to timm_eps. Everything around the steps, from flags to checkpoints, is in timm_eps/training.

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

import timm_eps
from timm_eps import report
from timm_eps.hub.onnx_forms import forms_table
from timm_eps.surgery.distributed import rewrap
from timm_eps.training import beginning, build, publishing, run_checkpoints
from timm_eps.training.arguments import Arguments, parse_arguments
from timm_eps.training.cuda_graphs import GraphedPasses
from timm_eps.training.ending import as_script, reading_images
from timm_eps.training.evaluation import Evaluation, count_correct
from timm_eps.training.inputs import ImageData
from timm_eps.training.launching import start_accelerator, trackers
from timm_eps.training.run import Run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Read the images, train, save and publish. Returns the results, in every process."""
    args = parse_arguments(argv, __doc__)
    transformers.logging.disable_progress_bar()
    accelerator = start_accelerator(args)
    with publishing.taking_outputs(args, accelerator) as repo_id, trackers(args, accelerator):
        images = ImageData.load(args, accelerator)
        if args.dry_run:
            return beginning.describe(args, accelerator, images)
        accelerator.print(f"Training {args.model.name} on {images}; seed {args.training.seed}.")
        model, known = begin(args, accelerator, images)
        run, results = train(args, accelerator, images, model=model)
        results |= known
        if args.training.compare_dense and "dense_train_seconds" not in results:
            _, dense = train(args, accelerator, images, is_dense=True)
            results |= beginning.as_dense(dense)
        images.corrupt = sorted(set(gather_object(images.corrupt)))
        accelerator.end_training()
        if accelerator.is_main_process:
            publish(args, run, results, repo_id)
        return results


def begin(args: Arguments, accelerator: Accelerator, images: ImageData) -> tuple[nn.Module | None, dict[str, Any]]:
    """The initial network, pruned for the budget, with its teacher; and the results so far.

    The network is None if it needs no preparation: then it is built from the arguments.
    """
    if not beginning.is_prepared(args):
        return None, {}
    set_seed(args.training.seed)
    model = trained = build.model(args.model, args.paper, images).to(accelerator.device)
    results: dict[str, Any] = {}
    is_trained = beginning.knows_classes(args.model, images)
    if epochs := beginning.dense_epochs(args, is_trained):
        accelerator.print(f"The dense network is fine-tuned first, for {epochs} epochs.")
        first = args.changed(num_train_epochs=epochs, teacher=None)
        run, dense = train(first, accelerator, images, is_dense=True)
        accelerator.print(f"It took {dense['train_seconds']:.0f} s; accuracy {dense['eval_accuracy']:.4f}.")
        trained, results = run.final, beginning.as_dense(dense)
    elif is_trained:
        results = beginning.before(model, evaluate(args, accelerator, images, model), images)
    beginning.teach(args, accelerator, images, model, trained)
    beginning.cut(args, accelerator, images, model, trained)
    return model, results


def prepare(
    args: Arguments, accelerator: Accelerator, images: ImageData, is_dense: bool = False, model: nn.Module | None = None
) -> Run:
    """A training before its first step. For a dense network the gates are off.

    It starts with a model, or builds one from the arguments.
    """
    set_seed(args.training.seed)
    model = build.place(model or build.model(args.model, args.paper, images), args.training, accelerator.device)
    optimizer = build.optimizer(args.training, model)  # (1) with param_groups
    batches = build.batches(args, accelerator, images)
    scheduler = build.scheduler(args.training, args.paper, optimizer, len(batches))
    average = build.average(args.training, model)
    pruner = None if is_dense else build.pruner(args, model, optimizer, images, average)  # (2) EpsilonPruner
    run = Run(args, accelerator, images, model, optimizer, batches, scheduler, average, pruner, is_dense)
    run.graphs = GraphedPasses(partial(forward_backward, run)) if args.training.cuda_graphs else None
    return run


def train(args: Arguments, accelerator: Accelerator, images: ImageData, **begun: Any) -> tuple[Run, dict[str, Any]]:
    """Train from the beginning or from a checkpoint to the end. Returns the run and its results."""
    run = prepare(args, accelerator, images, **begun)
    run_checkpoints.resume(run)
    with run.stoppable():
        for epoch in run.epochs():
            with run.epoch_bar(epoch) as bar:
                with run.queue():
                    train_epoch(run, epoch, bar)
                end_epoch(run)
            run.stop_if_told()
        run.stop_if_told(is_end=True)
    # Without the autocast of mixed precision around forward, so that the results are those of the saved model.
    accelerator.unwrap_model(run.network, keep_fp32_wrapper=False, keep_torch_compile=False)
    run.gather()
    run.final.to(memory_format=torch.contiguous_format)
    validated = evaluate(args, accelerator, images, run.final)
    tested = evaluate(args, accelerator, images, run.final, "test") if "test" in images.splits else None
    return run, run.results(validated, tested)


def train_epoch(run: Run, epoch: int, bar: tqdm) -> None:
    """Train on the remaining batches of an epoch. No step waits for the device."""
    run.network.train()
    together = run.args.training.gradient_accumulation_steps
    for index, (images, labels, corrupt) in enumerate(
        run.batches.epoch(epoch, run.progress.batch), start=run.progress.batch
    ):
        run.images.note_corrupt(corrupt, "train")
        is_last = index + 1 == len(run.batches)
        takes_step = is_last or (index + 1) % together == 0
        accumulated = min(together, len(run.batches) - index // together * together)
        with nullcontext() if takes_step else run.accelerator.no_sync(run.network):
            batch = run.read(images, labels)
            run.loss += run.graphs(*batch) if run.graphs else forward_backward(run, *batch, accumulated)
        run.progress.batch = index + 1
        if takes_step:
            take_step(run)
            run.look()
            if not is_last:  # the end of the epoch has more to do first
                run_checkpoints.save_if_due(run)
                run.stop_if_told()
        bar.update()


def forward_backward(run: Run, images: Tensor, labels: Tensor, accumulated: int = 1) -> Tensor:
    """Forward and backward pass of a batch; ``accumulated`` batches form a step. Returns the loss."""
    loss = run.network(images, labels=labels).loss
    run.accelerator.backward(loss / accumulated)
    return loss.detach()


def take_step(run: Run) -> None:
    """A step of the optimizer and of everything that advances per step."""
    training, dropped, progress = run.args.training, run.args.paper.weight_decay_drop, run.progress
    run.prepared_optimizer.step()
    run.prepared_optimizer.zero_grad()
    progress.step += 1
    if run.average is not None:
        run.average.update(run.model, step=progress.step)
    if training.lr_scheduler == "cosine" and not run.accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
    if dropped and progress.step % dropped[0] == 0:
        for group in run.optimizer.param_groups:
            group["weight_decay"] *= dropped[1]
    if (every := run.args.checkpoints.logging_steps) and progress.step % every == 0:
        run.log({"loss": run.mean_loss(), "learning_rate": run.learning_rate})


def end_epoch(run: Run) -> None:
    """Close and remove branches, evaluate, log, and write a checkpoint if one is due."""
    training, progress, pruner = run.args.training, run.progress, run.pruner
    run.check_finite()
    progress.losses.append(run.mean_loss())
    run.share_statistics()
    values = {"train_loss": progress.losses[-1], "learning_rate": run.learning_rate}
    if pruner:
        values["epsilon"] = pruner.epsilon
        if pruner.step():  # (3)
            rewrap(run.network)  # (4) DistributedDataParallel and torch.compile still have the removed branches
        values["blocks"] = pruner.total - pruner.discarded
        values |= {f"response/{slot}": value for slot, value in pruner.history[-1]["responses"].items()}
    if training.lr_scheduler != "cosine":
        restarts = pruner and training.lr_scheduler == "restarting"
        run.scheduler.step(pruner.discarded if restarts else None)
    run.lap()
    if training.eval_strategy == "epoch":
        values["eval_accuracy"] = evaluate(run.args, run.accelerator, run.images, timm_eps.gathered(run.final)).accuracy
        progress.accuracies.append(values["eval_accuracy"])
    progress.epoch, progress.batch = progress.epoch + 1, 0
    run.loss.zero_()
    run.log({**values, "epoch": progress.epoch})
    run.look()
    run_checkpoints.save_if_due(run)


@torch.no_grad()
def evaluate(
    args: Arguments, accelerator: Accelerator, images: ImageData, model: nn.Module, split: str = "validation"
) -> Evaluation:
    """Accuracy of a network on the images of a split, over all processes."""
    model.eval()
    device, classes = accelerator.device, len(images.label_names)
    normalize = images.normalize(device)
    count = torch.zeros(2, classes, dtype=torch.int64, device=device)
    with reading_images():
        for batch, labels, corrupt in build.evaluation_batches(args, accelerator, images, split):
            images.note_corrupt(corrupt, split)
            if len(labels):
                pixels, labels = (each.to(device, non_blocking=True) for each in (batch, labels))
                count += count_correct(model(normalize(pixels)).logits, labels, classes)
    correct, seen = accelerator.reduce(count).tolist()
    if not sum(seen):
        raise ValueError(f"No image of the {split} split can be read.")
    return Evaluation(correct, seen)


def publish(args: Arguments, run: Run, results: dict[str, Any], repo_id: str | None) -> None:
    """Compare with the dense network, save, check every loader, and push. Completes the results."""
    model, images, sample = run.final, run.images, run.images.sample(32, run.device)
    live = publishing.logits_of(model, sample)
    timm_eps.remove_closed(model)
    results |= publishing.compare(args, model, sample) | publishing.facts(args, run)
    results |= publishing.onnx_forms(args, model, images)
    history = run.pruner.history if run.pruner else []
    saved = {"results": results, "history": history, **args.saving.extras()}
    saved["onnx_int8"] = publishing.calibration(args, images)
    publishing.save(model, args.output_dir, run.remedy, repo_id=repo_id, **saved)
    print(f"\n{report.outcome(results)}\n\n{report.comparison_table(results)}\n")
    if "onnx_forms" in results:
        print(f"{forms_table(results['onnx_forms'])}\n")
    for said in filter(None, (report.class_changes(results), publishing.left_out(images))):
        print(f"{said}\n")
    print(f"Saved in {args.output_dir}. Logits of {len(sample)} test images after reloading it through:")
    print(publishing.check_reload(args.output_dir, live, sample, images.pictures(len(sample))) + ".")
    if repo_id is not None:
        message = f"Trained on {images.about['dataset']}, {results['blocks_kept']} blocks remain"
        publishing.push(args.saving, args.output_dir, model, repo_id, message, **saved)


if __name__ == "__main__":
    with as_script("train_hf.py"):
        main()
