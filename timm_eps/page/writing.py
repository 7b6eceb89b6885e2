"""Write the page to a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import report
from ..analysis.report import Analysis
from ..hub.saving import PAGE
from . import answer_sections, sections
from .comparing import answers_of, load_dense
from .saved import SavedNetwork, load_analysis, load_network, load_results
from .timings import measure_timings

__all__ = ["write_page"]

_TEMPLATE = Path(__file__).parent / "page.html"


def write_page(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    dense: nn.Module | str | os.PathLike[str] | None = None,
    analysis: Analysis | None = None,
    latency_batch_sizes: Sequence[int] = (),
    compiled: bool = False,
    device: torch.device | str = "cpu",
    images_name: str = "",
) -> Path:
    """Write one HTML file that shows a saved network: removed branches, savings, and changed answers.

    The page needs no server, no script and no connection. The directory alone gives the structure, the size, the code
    for loading, and the contents of ``all_results.json`` and ``branches.json``, if these files exist. With ``batches``
    the page also has the accuracy and the confused classes. With ``dense`` as well, it compares both networks image by
    image, and shows up to 24 images whose answer changed.

    Example::

        timm_eps.save_pretrained(model, "out")
        timm_eps.write_page("out")                                    # out/report.html, from the directory alone
        timm_eps.write_page("out", "page.html", batches=batches, dense=teacher)
        timm_eps.write_page("out", analysis=timm_eps.analyze(teacher, batches))

    Args:
        directory: Directory written by :func:`timm_eps.save_pretrained` or ``train_hf.py``.
        output: The file to write; by default ``report.html`` in the directory.
        batches: Pairs of images (B, C, H, W), normalised for the network, and labels (B,), or dicts with
            ``pixel_values`` and ``labels``. They are read once. Use images that no network was trained on.
        dense: The network to compare with: a model, a directory, or a name on the Hub.
        analysis: The report of :func:`timm_eps.analyze` on the dense network; by default ``branches.json``.
        latency_batch_sizes: Batch sizes for measuring the latency now: eager mode, and ONNX Runtime if onnx, onnxscript
            and onnxruntime are installed. Without batch sizes, the page shows the latencies of the run.
        compiled: Whether to measure ``torch.compile`` as well.
        device: Device for the answers and the latency.
        images_name: Name of the images on the page.

    Returns:
        Path of the file.

    Raises:
        ValueError: The directory holds no network of this package, one of its files is damaged or describes another
            network, the images do not fit, or ``dense`` has other classes.
        OSError: The file cannot be written.
    """
    if batches is None and dense is not None:
        raise ValueError("dense needs batches: without images the two networks cannot be compared.")
    if compiled and not latency_batch_sizes:
        raise ValueError("compiled needs latency_batch_sizes, which says what to measure.")
    if wrong := [size for size in latency_batch_sizes if not (isinstance(size, int) and size > 0)]:
        raise ValueError(f"latency_batch_sizes must hold whole numbers of at least 1, got {wrong[0]!r}.")
    network = load_network(directory)
    try:
        network.body.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's errors for a missing device
        raise ValueError(f"device {str(device)[:40]!r} cannot be used: {str(error).splitlines()[0][:100]}") from None
    content = _content(network, batches, dense, analysis, latency_batch_sizes, compiled, images_name)
    path = Path(output) if output is not None else network.directory / PAGE
    _write(path, _render(content))
    return path


def _content(
    network: SavedNetwork,
    batches: Iterable[Any] | None,
    dense: nn.Module | str | os.PathLike[str] | None,
    analysis: Analysis | None,
    latency_batch_sizes: Sequence[int],
    compiled: bool,
    images_name: str,
) -> dict[str, Any]:
    results, body = load_results(network), network.body
    described = load_analysis(network, analysis)
    parameter = next(body.parameters())
    other = None if dense is None else load_dense(dense, network).to(parameter.device)
    answers = None if batches is None else answers_of(network, batches, other)
    timings = results.timings if results else []
    hardware = str(results.values.get("hardware") or "") if results else ""
    if latency_batch_sizes:
        timings = measure_timings(
            network.build_dense().to(parameter.device, parameter.dtype), body, latency_batch_sizes, compiled
        )
        hardware = report.hardware(parameter.device)
    accuracy = answer_sections.accuracy(network, results, answers)
    return {
        "title": network.directory.resolve().name,
        "architecture": network.architecture,
        "is_pruned": bool(network.removed),
        "is_classifier": bool(body.num_classes),
        "is_measured": answers is not None,
        "compares": answers is not None and answers.before is not None,
        "images_name": images_name or (str(results.values.get("dataset") or "") if results and not answers else ""),
        "facts": sections.facts(network, accuracy or {}, timings),
        "structure": sections.structure(network) if network.stages else None,
        "size": sections.size(network),
        "latency": sections.latency(timings, bool(network.removed)),
        "is_timed_now": bool(latency_batch_sizes),
        "hardware": hardware,
        "accuracy": accuracy,
        "confusion": answer_sections.confusion(network.class_names, answers),
        "examples": answer_sections.examples(network.class_names, answers, body.pretrained_cfg),
        "costs": sections.costs(network, described),
        "provenance": sections.provenance(results),
        "input_size": tuple(body.pretrained_cfg["input_size"]),
        "has_code": (network.directory / "modeling_eps_resnet.py").is_file(),
        "has_onnx": (network.directory / "onnx" / "model.onnx").is_file(),
    }


def _render(content: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    # Names of classes, data sets and repositories come from other people's files, so all text is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(content)


def _write(path: Path, text: str) -> None:
    """Write the whole page or nothing. Half a character in a damaged name becomes a question mark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(text.encode("utf-8", "replace"))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
