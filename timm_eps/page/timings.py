"""Latency of the dense and the pruned network by runtime: from the results of a run, or measured now."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from ..analysis.measure import repeats_for
from ..files.value_checks import is_number, refuse
from ..hub.onnx_export import OnnxNetwork
from ..report import paired_seconds, spread_of_ratios
from ..surgery.branches import probe_batch

__all__ = ["Timing", "measure_timings", "read_timings"]

RUNTIMES = {"": "PyTorch, eager", "compiled": "PyTorch, compiled", "onnx": "ONNX Runtime"}
_KEY = re.compile(r"(?!dense_)(?:(\w{1,40})_)?latency_batch(\d{1,6})_seconds")


class Timing(NamedTuple):
    """Time of a forward pass of both networks.

    Attributes:
        runtime: Name of the runtime.
        batch_size: Images per pass.
        dense: Median milliseconds of the dense network; None if it was not measured.
        now: Median milliseconds of the saved network.
        speedup: Quartiles of the ratio dense to now, turn by turn; None if unknown.
        spread: Quartiles of the milliseconds of both, dense first; None if unknown.
    """

    runtime: str
    batch_size: int
    dense: float | None
    now: float
    speedup: tuple[float, float] | None = None
    spread: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def ratio(self) -> float | None:
        """Speed-up of the saved network."""
        return None if self.dense is None else self.dense / self.now


def read_timings(results: Mapping[str, Any], source: str) -> list[Timing]:
    """The latencies in the results of a run, by runtime and batch size.

    Args:
        results: Values of ``all_results.json``.
        source: Name of the file, for messages.

    Raises:
        ValueError: A time is no positive number.
    """
    found = []
    for key in results:
        if not (matched := _KEY.fullmatch(key)):
            continue
        prefix, size = matched[1] or "", int(matched[2])
        dense = _milliseconds(results, f"dense_{key}", source) if f"dense_{key}" in results else None
        quartiles = results.get(key.replace("_seconds", "_speedup_quartiles"))
        if quartiles is not None:
            quartiles = _pair(key.replace("_seconds", "_speedup_quartiles"), quartiles, source)
        runtime = RUNTIMES.get(prefix, prefix.replace("_", " "))
        found.append(Timing(runtime, size, dense, _milliseconds(results, key, source), quartiles))
    order = list(RUNTIMES.values())
    return sorted(found, key=lambda t: (order.index(t.runtime) if t.runtime in order else len(order), t[:2]))


def _milliseconds(results: Mapping[str, Any], key: str, source: str) -> float:
    if not (is_number(results[key], 0.0, 1e6) and results[key]):
        raise refuse(f"{key} of {source}", "a positive number of seconds", results[key])
    return 1000 * results[key]


def _pair(key: str, value: Any, source: str) -> tuple[float, float]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(is_number(each, 0.0, 1e9) for each in value)):
        raise refuse(f"{key} of {source}", "a list of two numbers", value)
    return value[0], value[1]


def measure_timings(
    dense: nn.Module, now: nn.Module, batch_sizes: Sequence[int], compiled: bool = False
) -> list[Timing]:
    """Measure both networks in turn on the saved one's device: eager, compiled on request, ONNX Runtime if installed.

    Args:
        dense: The dense network, a timm model. Its weights do not matter.
        now: The saved network, a timm model.
        batch_sizes: Images per pass.
        compiled: Whether to measure ``torch.compile`` as well, which takes a minute.
    """
    pairs: dict[str, dict[str, nn.Module]] = {"": {"dense": dense, "now": now}}
    if compiled:
        pairs["compiled"] = {name: torch.compile(net) for name, net in pairs[""].items()}  # type: ignore[misc]
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        pairs["onnx"] = {name: OnnxNetwork(net) for name, net in pairs[""].items()}
    found = []
    with torch.no_grad():
        for kind, pair in pairs.items():
            for size in batch_sizes:
                batch = probe_batch(now, size)
                batch = batch.cpu().float() if kind == "onnx" else batch
                seconds = paired_seconds(pair, batch, repeats_for(pair["dense"], batch))
                found.append(_summary(RUNTIMES[kind], size, seconds))
    return found


def _summary(runtime: str, size: int, seconds: Mapping[str, Sequence[float]]) -> Timing:
    thousandths = {name: [1000 * second for second in values] for name, values in seconds.items()}
    lower, upper = spread_of_ratios(thousandths["dense"], thousandths["now"])
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in thousandths.items()}
    return Timing(
        runtime,
        size,
        quartiles["dense"][1],
        quartiles["now"][1],
        (lower, upper),
        ((quartiles["dense"][0], quartiles["dense"][2]), (quartiles["now"][0], quartiles["now"][2])),
    )
