"""The model card: what a visitor of the Hub reads of a network, from the run's own values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..names import is_cifar_network
from ..report import comparison_table, outcome
from .onnx_forms import forms_table

__all__ = ["RESULT_KEYS", "render_card"]

# What a card with results states; further keys are kept in all_results.json as they are.
RESULT_KEYS = (
    "architecture", "arguments", "blocks_kept", "blocks_total", "dataset", "dense_macs", "dense_params",
    "eval_accuracy", "eval_images", "eval_split", "hardware", "macs", "params", "seed", "train_images",
)  # fmt: skip


def render_card(
    architecture: str,
    repo_id: str,
    *,
    blocks_total: int,
    blocks_kept: int,
    classifies: bool = True,
    results: Mapping[str, Any] | None = None,
    picture: str | None = None,
    remote_code: bool = False,
    onnx: str | None = None,
    onnx_int8: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The model card, from the run's own values.

    Args:
        architecture: timm's name of the unpruned network.
        repo_id: Name of the model on the Hub, or of its directory.
        blocks_total: Residual blocks of the unpruned network.
        blocks_kept: Those that stayed.
        classifies: Whether the network has a classifier.
        results: Values of ``all_results.json``; without them the card states the structure only.
        picture: File name of the picture, if there is one.
        remote_code: Whether the code to load the model without this package is beside it.
        onnx: Path of the ONNX file, if there is one.
        onnx_int8: Path of the ONNX file in eight bits, if there is one.
        base_model: Name on the Hub of the model that a training began with; that of ``results`` wins.

    Raises:
        ValueError: ``results`` lacks one of :data:`RESULT_KEYS`.
    """
    results = results or {}
    base_model = results.get("base_model") or base_model
    if results and (missing := [key for key in RESULT_KEYS if key not in results]):
        raise ValueError(
            f"results lacks {', '.join(missing)}; RESULT_KEYS of timm_eps.hub.card lists what a card states."
        )
    task = "image-classification" if classifies else "image-feature-extraction"
    data = ModelCardData(
        license=results.get("license", "apache-2.0"),
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "transformers", "eps-resnet", *(["pruned"] if blocks_kept < blocks_total else [])],
        datasets=[results["dataset_id"]] if results.get("dataset_id") else None,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        metrics=["accuracy"] if results else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=results.get("dataset_id") or "local",
                dataset_name=results["dataset"],
                dataset_split=results["eval_split"],
                metric_type="accuracy",
                metric_value=results["eval_accuracy"],
            )
        ]
        if results
        else None,
    )
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        model_name=data.model_name,
        repo_id=repo_id,
        task=task,
        auto_class="AutoModelForImageClassification" if classifies else "AutoModel",
        timm_id=f"hf-hub:{repo_id}" if "/" in repo_id else f"local-dir:{repo_id}",
        blocks_total=blocks_total,
        blocks_kept=blocks_kept,
        picture=picture,
        remote_code=remote_code,
        onnx=onnx,
        onnx_int8=onnx_int8,
        forms=forms_table(results.get("onnx_forms", {})) if onnx or onnx_int8 else "",
        base_model=base_model,
        is_twin=not is_cifar_network(architecture),
        results=results,
        summary=_summary(architecture, blocks_total, blocks_kept, results),
        table=comparison_table(results) if results else "",
        provenance=_provenance(results) if results else "",
        recipe=_recipe(results) if results else "",
        limits=_limits(results),
    )


def _summary(architecture: str, total: int, kept: int, results: Mapping[str, Any]) -> str:
    if kept == total:
        text = f"This `{architecture}` has all its {total} residual branches"
        return f"{text}. {outcome(results)}" if results else f"{text}."
    text = f"This `{architecture}` keeps {kept} of {total} residual branches"
    if not results:
        return text + "."
    share = 100 * (1 - results["params"] / results["dense_params"])
    return (
        f"{text} and {100 - share:.1f} % of the parameters, and classifies "
        f"{100 * results['eval_accuracy']:.2f} % of the {results['eval_images']} images of "
        f"{results['dataset']} ({results['eval_split']}) correctly."
    )


def _provenance(results: Mapping[str, Any]) -> str:
    return (
        f"One run, seed {results['seed']}. Multiply-adds are counted over convolutions and matrix products. Latencies "
        f"are medians of forward passes in turn on {results['hardware']}; brackets hold the quartiles of their ratios."
    )


def _recipe(results: Mapping[str, Any]) -> str:
    listed = "\n".join(f"- `{name}`: {value}" for name, value in sorted(results["arguments"].items()))
    return f"Trained with `accelerate launch train_hf.py`:\n\n{listed}"


def _limits(results: Mapping[str, Any]) -> str:
    text = (
        "Which blocks a task needs was found on that task: fine-tune before you use the structure on another, and "
        "compare with the same structure trained from scratch, which often does as well. What was gained in speed "
        "depends on the hardware and the batch size."
    )
    if not results:
        return text
    return (
        f"Trained on {results['train_images']} and tested on {results['eval_images']} images of {results['dataset']}, "
        f"once. {text}"
    )
