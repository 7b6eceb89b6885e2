"""After a training: the comparison with the dense network, a check of all loaders, and the Hub."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import create_repo
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, pipeline

import timm_eps

from .. import report
from ..gate import EpsilonGate
from ..hub import onnx_export
from ..hub.failures import NETWORK_ERRORS, one_line
from ..hub.onnx_forms import measure_forms
from ..hub.onnx_int8 import check_int8
from ..hub.saving import push_to_hub, save_pretrained
from ..report import paired_seconds
from .arguments import Arguments, ModelArguments, SavingArguments, hub_id, used_arguments
from .directory_lock import locked
from .inputs import ImageData
from .run import Run
from .run_checkpoints import find_checkpoint

__all__ = [
    "base_model", "calibration", "check_reload", "compare", "facts", "hardware", "left_out", "logits_of", "onnx_forms",
    "push", "save", "taking_outputs", "versions",
]  # fmt: skip

# huggingface_hub raises the last one when an upload fails.
_PUSH_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, RuntimeError)


def compare(args: Arguments, model: Any, images: Tensor) -> dict[str, Any]:
    """Structure, size and speed of the pruned network compared with the unpruned one.

    Speed is measured in torch and, with ``--with_onnx``, in ONNX Runtime if it is installed.
    """
    batch_sizes = {1, 128} | ({args.pruning.latency_batch_size} if args.pruning.target_latency else set())
    arguments = dict(model.config.model_args)
    removed = arguments.pop("removed", [])
    arguments.pop("closed", None)
    dense = timm.create_model(model.config.architecture, num_classes=model.config.num_labels, **arguments)
    dense.pretrained_cfg = model.timm_model.pretrained_cfg  # an exported file takes images of one size
    dense.to(images.device)
    total = sum(isinstance(module, EpsilonGate) for module in dense.modules())
    found = {"blocks_total": total, "blocks_kept": total - len(removed), "removed": removed}
    pair: dict[str, nn.Module] = {"dense_": dense, "": model.timm_model}
    for prefix, network in pair.items():
        found[f"{prefix}params"] = report.count_parameters(network)
        found[f"{prefix}macs"] = report.count_macs(network, images[:1])
    batches = {size: images.repeat(math.ceil(size / len(images)), 1, 1, 1)[:size] for size in sorted(batch_sizes)}
    found |= _latencies(pair, batches)
    if args.saving.with_onnx and find_spec("onnxruntime"):
        sessions = {prefix: onnx_export.OnnxNetwork(network) for prefix, network in pair.items()}
        on_cpu = {size: batch.cpu() for size, batch in batches.items()}
        found |= _latencies(sessions, on_cpu, "onnx_")
    return found


def onnx_forms(args: Arguments, model: nn.Module, images: ImageData) -> dict[str, Any]:
    """What each ONNX file that is written is worth, under ``onnx_forms``.

    Accuracy is that on the images to validate on, in this process, on the CPU. Nothing is found without ONNX Runtime.
    """
    exports: dict[str, dict[str, Any]] = {"float32": {}} if args.saving.with_onnx else {}
    if args.saving.with_onnx_int8:
        exports["int8"] = {"quantize": "static", "calibration": calibration(args, images)}
    if not exports or not find_spec("onnxruntime"):
        return {}
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / f"{name}.onnx" for name in exports}
        for name, options in exports.items():
            onnx_export.export_onnx(model, files[name], **options)
        return {"onnx_forms": measure_forms(files, images.batches_of("validation", torch.device("cpu")))}


def calibration(args: Arguments, images: ImageData) -> list[Tensor] | None:
    """Training images to calibrate eight bits on, normalised; None without ``--with_onnx_int8``."""
    if not args.saving.with_onnx_int8:
        return None
    return [batch for batch, _ in images.batches_of("calibration", torch.device("cpu"))]


def _latencies(pair: Mapping[str, nn.Module], batches: dict[int, Tensor], runtime: str = "") -> dict[str, Any]:
    """Median latencies, and the quartiles of the speedup over paired measurements."""
    found: dict[str, Any] = {}
    for size, batch in batches.items():
        name = f"{runtime}latency_batch{size}"
        seconds = paired_seconds(pair, batch)
        found |= {f"{prefix}{name}_seconds": statistics.median(values) for prefix, values in seconds.items()}
        found[f"{name}_speedup_quartiles"] = report.spread_of_ratios(seconds["dense_"], seconds[""])
    return found


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) of a batch, and of its images one by one, because other kernels round differently."""
    model.eval()
    answers = [model(images), *(model(image) for image in images.split(1))]
    batch, *singles = (getattr(answer, "logits", answer).cpu() for answer in answers)
    return batch, torch.cat(singles)


def check_reload(directory: str, live: tuple[Tensor, Tensor], images: Tensor, pictures: list) -> str:
    """Load the directory by every loader and compare logits with the live model's. Raises if one differs."""
    by_timm = timm.create_model(f"local-dir:{directory}", pretrained=True).to(images.device)
    by_auto = AutoModelForImageClassification.from_pretrained(directory).to(images.device)
    classify = pipeline("image-classification", model=directory, device=images.device)
    number_of = by_auto.config.label2id
    scores = torch.empty_like(live[1])
    for row, answers in enumerate(classify(pictures, top_k=len(number_of), function_to_apply="none")):
        for answer in answers:
            scores[row, number_of[answer["label"]]] = answer["score"]
    largest = {
        "timm": difference(logits_of(by_timm, images), live),
        "AutoModelForImageClassification": difference(logits_of(by_auto, images), live),
        "pipeline": difference([scores], live[1:]),
    }
    if wrong := {name: value for name, value in largest.items() if not value <= 1e-5}:
        raise RuntimeError(f"The model saved in {directory} has other logits than the trained one: {wrong}.")
    return ", ".join(f"{name} {'equal' if value == 0 else f'within {value:.1e}'}" for name, value in largest.items())


def difference(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@contextmanager
def taking_outputs(args: Arguments, accelerator: Accelerator) -> Iterator[str | None]:
    """Lock the output directory, and check before the training that results can be written.

    Yields:
        Name on the Hub of the repository to push to, which is created if needed. None without a push, and in all
        processes except the main one.

    Raises:
        OSError: The directory cannot be written to, or the Hub refuses.
        ImportError: The packages for ONNX are not installed.
        ValueError: Another run writes there, or has left checkpoints.
    """
    with ExitStack() as held:
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(args.output_dir))
        repo_id = _check_outputs(args) if accelerator.is_main_process else None
        if args.training.compare_dense:  # raises before the training, not in the middle
            find_checkpoint(args, Path(args.output_dir) / "dense")
        yield repo_id


def _check_outputs(args: Arguments) -> str | None:
    tempfile.TemporaryFile(dir=args.output_dir).close()
    if args.saving.with_onnx or args.saving.with_onnx_int8:
        onnx_export.check_installed()
    if args.saving.with_onnx_int8:
        check_int8("static", calibration=())
    if not args.saving.push_to_hub:
        return None
    wanted = args.saving.hub_model_id or Path(args.output_dir).resolve().name
    private = args.saving.hub_private_repo or None
    return create_repo(wanted, private=private, token=args.saving.hub_token, exist_ok=True).repo_id


def facts(args: Arguments, run: Run) -> dict[str, Any]:
    """Facts about a run for the results and the card. Also records the base model in the model."""
    model: Any = run.final
    images, pruner = run.images, run.pruner
    model.config.base_model = base_model(args.model) or model.config.base_model
    found = {} if pruner is None or args.pruning.keep is None else {"blocks_wanted": pruner.wanted}
    return {
        **found,
        **images.about,
        "epsilon": max((record["epsilon"] for record in pruner.history), default=0.0) if pruner else 0.0,
        "architecture": model.config.architecture,
        "arguments": used_arguments(args),
        "base_model": model.config.base_model,
        "corrupt_images": len(images.corrupt),
        "train_images": len(images.splits["train"]),
        "license": args.saving.license,
        "num_processes": run.accelerator.num_processes,
        "seed": args.training.seed,
        "hardware": hardware(run.accelerator),
        "versions": versions(),
    }


def left_out(images: ImageData) -> str:
    """A line about the images that could not be read, if any."""
    some = ", ".join(images.corrupt[:5])
    return f"{len(images.corrupt)} images could not be read and were left out, such as {some}." if some else ""


def save(model: nn.Module, output_dir: str, remedy: Callable[[], str], **saved: Any) -> None:
    """Save the trained model.

    Args:
        model: The model.
        output_dir: Directory to save to.
        remedy: Function that returns how to continue if this fails.
        **saved: Further arguments of :func:`timm_eps.save_pretrained`.

    Raises:
        OSError: The model could not be saved.
    """
    try:
        save_pretrained(model, output_dir, **saved)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The trained model could not be saved in {output_dir} ({one_line(error)}). {remedy()}"
        ) from error


def push(args: SavingArguments, output_dir: str, model: nn.Module, repo_id: str, message: str, **saved: Any) -> None:
    """Push the trained model to the Hub.

    Args:
        args: Arguments with token and git branch.
        output_dir: Directory of the saved model.
        model: Model, as it was saved.
        repo_id: Name on the Hub.
        message: Title of the commit.
        **saved: Further arguments of :func:`timm_eps.push_to_hub`.

    Raises:
        OSError: The push failed. The saved files can be pushed again.
    """
    try:
        commit = push_to_hub(
            model, repo_id, token=args.hub_token, revision=args.hub_revision, commit_message=message, **saved
        )
    except _PUSH_ERRORS as error:
        raise OSError(
            f"The push of {output_dir} to {repo_id} failed: {one_line(error, limit=1000)}. "
            f"To try again: hf upload {repo_id} {output_dir}"
        ) from error
    assert commit is not None, "the trained model is whole"
    print(f"Pushed to {commit.repo_url} ({commit.oid[:7]}).")


def hardware(accelerator: Accelerator) -> str:
    """The hardware of all processes of a run."""
    one = report.hardware(accelerator.device)
    return one if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes, each {one}"


def base_model(args: ModelArguments) -> str | None:
    """Name on the Hub of the initial weights."""
    if args.pretrained:
        known = timm.get_pretrained_cfg(args.name)
        return known.hf_hub_id if known is not None else None
    return hub_id(args.model_name_or_path)


def versions() -> dict[str, str]:
    """Versions of the packages that affect the results of a run."""
    return {module.__name__: str(module.__version__) for module in (timm_eps, timm, torch, transformers)}
