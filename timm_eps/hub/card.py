"""The model card on the Hub, from the values of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..names import is_cifar_network
from ..report import comparison_table, outcome, timed
from .onnx_forms import forms_table

__all__ = ["RESULT_KEYS", "render_card"]

# Keys that a card with results needs. Other keys are only kept in all_results.json.
RESULT_KEYS = (
    "architecture", "arguments", "blocks_kept", "blocks_total", "dataset", "dense_macs", "dense_params",
    "eval_accuracy", "eval_images", "eval_split", "hardware", "macs", "params", "seed", "train_images",
)  # fmt: skip


_SHOWN = 10  # class names


def render_card(
    architecture: str,
    repo_id: str,
    *,
    blocks_total: int,
    blocks_kept: int,
    label_names: Sequence[str] = (),
    input_size: Sequence[int] = (3, 224, 224),
    results: Mapping[str, Any] | None = None,
    picture: str | None = None,
    remote_code: bool = False,
    onnx: str | None = None,
    program: str | None = None,
    onnx_int8: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The model card, from the values of a run.

    Args:
        architecture: Name of the unpruned network in timm.
        repo_id: Name of the model on the Hub, or of its directory.
        blocks_total: Residual blocks of the unpruned network.
        blocks_kept: Those that stayed.
        label_names: Names of the classes; none for a network without a classifier.
        input_size: Shape (C, H, W) of the images.
        results: Values of ``all_results.json``; without them the card states the structure only.
        picture: File name of the picture, if there is one.
        remote_code: Whether the repository has the code to load the model without this package.
        onnx: Path of the ONNX file, if there is one.
        program: Path of the program for plain torch, if there is one.
        onnx_int8: Path of the ONNX file in eight bits, if there is one.
        base_model: Name on the Hub of the model that a training began with; that of ``results`` wins.

    Raises:
        ValueError: ``results`` lacks one of :data:`RESULT_KEYS`.
    """
    results = results or {}
    base_model = results.get("base_model") or base_model
    if results and (missing := [key for key in RESULT_KEYS if key not in results]):
        raise ValueError(
            f"results lacks {', '.join(missing)}; RESULT_KEYS of timm_eps.hub.card lists the required keys."
        )
    task = "image-classification" if label_names else "image-feature-extraction"
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
    card = ModelCard.from_template(
        data,
        template_str=template,
        model_name=data.model_name,
        repo_id=repo_id,
        task=task,
        timm_id=f"hf-hub:{repo_id}" if "/" in repo_id else f"local-dir:{repo_id}",
        picture=picture,
        remote_code=remote_code,
        onnx=onnx,
        program=program,
        onnx_int8=onnx_int8,
        forms=forms_table(results.get("onnx_forms", {})) if onnx or onnx_int8 else "",
        base_model=base_model,
        is_twin=not is_cifar_network(architecture),
        results=results,
        input_size=input_size,
        output="logits" if label_names else "features",
        purpose=_purpose(label_names, input_size),
        summary=_summary(architecture, blocks_total, blocks_kept, results),
        structure=_structure(architecture, blocks_total, blocks_kept),
        table=comparison_table(results) if results else "",
        provenance=_provenance(results) if results else "",
        recipe=_recipe(results) if results else "",
        limits=_limits(results),
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)  # where an option was off
    return card


def _purpose(label_names: Sequence[str], input_size: Sequence[int]) -> str:
    channels, height, width = input_size
    images = f"images of {height}×{width} pixels and {channels} channel{'s' if channels > 1 else ''}"
    if not label_names:
        return f"An image encoder. It turns {images} into features, for another network or for search."
    shown = ", ".join(str(name) for name in label_names[:_SHOWN])
    more = f", and {len(label_names) - _SHOWN} more" if len(label_names) > _SHOWN else ""
    return f"An image classifier with {len(label_names)} classes: {shown}{more}. It reads {images}."


def _summary(architecture: str, total: int, kept: int, results: Mapping[str, Any]) -> str:
    """What was gained and what it cost, one line each."""
    if kept == total:
        text = f"This `{architecture}` has all its {total} residual branches"
        return f"{text}. {outcome(results)}" if results else f"{text}."
    text = f"This `{architecture}` keeps {kept} of {total} residual branches"
    if not results:
        return f"{text}."
    share = 100 * results["params"] / results["dense_params"]
    lines = [f"- **Smaller**: it keeps {kept} of {total} residual branches and {share:.1f} % of the parameters."]
    if fastest := [(key, what) for key, what in timed(results) if f"dense_{key}" in results][:1]:
        key, what = fastest[0]
        ratio = results[f"dense_{key}"] / results[key]
        lines.append(f"- **Faster**: it is {ratio:.2f} times as fast as the dense network ({what}).")
    accuracy = f"it classifies {100 * results['eval_accuracy']:.2f} % of the {results['eval_images']} images of"
    dense = results.get("dense_eval_accuracy")
    before = "" if dense is None else f" The dense network classifies {100 * dense:.2f} %."
    lines.append(f"- **Accuracy**: {accuracy} {results['dataset']} ({results['eval_split']}) correctly.{before}")
    return f"This is `{architecture}` without the residual branches that its task does not need.\n\n" + "\n".join(lines)


def _structure(architecture: str, total: int, kept: int) -> str:
    if kept == total:
        return f"Nothing: `{architecture}` has all its {total} residual branches."
    return (
        f"{total - kept} of {total} residual branches. Each was closed, before or during training, and then deleted. A "
        'probe showed that this changed no output. `model_args["removed"]` in `config.json` lists these branches. The '
        "weights are safetensors."
    )


def _provenance(results: Mapping[str, Any]) -> str:
    return (
        f"One run, seed {results['seed']}. Multiply-adds are those of convolutions and matrix products. Latencies are "
        f"medians of forward passes, timed in turn on {results['hardware']}. Brackets hold the quartiles of their "
        "ratios."
    )


def _recipe(results: Mapping[str, Any]) -> str:
    listed = "\n".join(f"- `{name}`: {value}" for name, value in sorted(results["arguments"].items()))
    return f"Trained with `accelerate launch train_hf.py`:\n\n{listed}"


def _limits(results: Mapping[str, Any]) -> str:
    text = (
        "The remaining blocks were chosen for this task. Fine-tune the network before you use the structure on another "
        "task, and compare it with the same structure trained from scratch, which is often as accurate. The speed-up "
        "depends on the hardware and the batch size."
    )
    if not results:
        return text
    return (
        f"Trained once, on {results['train_images']} images of {results['dataset']}, and tested on "
        f"{results['eval_images']} images. {text}"
    )
