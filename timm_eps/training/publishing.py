"""What comes after a training: the comparison with the dense network, the proof that all loaders agree, the Hub."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any

import timm
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, pipeline

import timm_eps

from .. import report
from ..gate import EpsilonGate
from ..hub.failures import NETWORK_ERRORS, one_line
from ..hub.saving import push_to_hub
from .arguments import hub_id

__all__ = ["base_model", "check_reload", "compare", "hardware", "logits_of", "push", "versions"]

# huggingface_hub raises the last one when an upload fails.
_PUSH_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, RuntimeError)


def compare(model: Any, images: Tensor, batch_sizes: Iterable[int] = (1, 128)) -> dict[str, Any]:
    """Structure, size and speed of the pruned network beside the unpruned one of its architecture."""
    arguments = dict(model.config.model_args)
    removed = arguments.pop("removed", [])
    arguments.pop("closed", None)
    dense = timm.create_model(model.config.architecture, num_classes=model.config.num_labels, **arguments)
    dense.to(images.device)
    total = sum(isinstance(module, EpsilonGate) for module in dense.modules())
    found = {"blocks_total": total, "blocks_kept": total - len(removed), "removed": removed}
    pair: dict[str, nn.Module] = {"dense_": dense, "": model.timm_model}
    for prefix, network in pair.items():
        found[f"{prefix}params"] = report.count_parameters(network)
        found[f"{prefix}macs"] = report.count_macs(network, images[:1])
    for batch_size in batch_sizes:
        batch = images.repeat(math.ceil(batch_size / len(images)), 1, 1, 1)[:batch_size]
        for prefix, latency in report.paired_latency(pair, batch).items():
            found[f"{prefix}latency_batch{batch_size}_seconds"] = latency
    return found


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) of a batch, and of its images one by one: other kernels run, which round differently."""
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
        raise RuntimeError(f"The model saved in {directory} computes other logits than the live one: {wrong}.")
    return ", ".join(f"{name} {'equal' if value == 0 else f'within {value:.1e}'}" for name, value in largest.items())


def difference(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def push(args: argparse.Namespace, model: nn.Module, repo_id: str, message: str, saved: dict[str, Any]) -> None:
    """Push the trained model to the Hub.

    Args:
        args: Of the command line.
        model: The model, as it was saved.
        repo_id: Name on the Hub.
        message: Title of the commit.
        saved: Further arguments of :func:`timm_eps.push_to_hub`.

    Raises:
        OSError: The push failed; what is saved is there to try again.
    """
    try:
        commit = push_to_hub(
            model, repo_id, token=args.hub_token, revision=args.hub_revision, commit_message=message, **saved
        )
    except _PUSH_ERRORS as error:
        raise OSError(
            f"The push of what is saved in {args.output_dir} to {repo_id} failed: {one_line(error, limit=1000)}. "
            f"To try again: hf upload {repo_id} {args.output_dir}"
        ) from error
    print(f"Pushed to {commit.repo_url} ({commit.oid[:7]}).")


def hardware(accelerator: Accelerator) -> str:
    """What all processes of a run compute on."""
    one = report.hardware(accelerator.device)
    return one if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes, each {one}"


def base_model(args: argparse.Namespace) -> str | None:
    """Where the weights came from that the training began with, by a name on the Hub."""
    if args.pretrained:
        known = timm.get_pretrained_cfg(args.architecture)
        return known.hf_hub_id if known is not None else None
    return hub_id(args.model_name_or_path)


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    return {module.__name__: str(module.__version__) for module in (timm_eps, timm, torch, transformers)}
