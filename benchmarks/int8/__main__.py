"""Accuracy, size and latency of networks as float32 and eight-bit ONNX files.

    python -m benchmarks.pretrained.prepare      # once; prints the packages to install
    python -m benchmarks.int8                    # about ten minutes on two cores; writes int8.json and INT8.md
    python -m benchmarks.int8 --settings         # also compares the settings of the quantization
    python -m benchmarks.int8 --latency          # measures only the latencies again

Networks are trained once and kept under outputs/int8. Results in int8.json are not measured again. Other processes
disturb the latencies, so nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.int8.networks import MAKERS, READERS, ROOT, STATES, Images, network
from benchmarks.int8.page import page
from benchmarks.int8.settings import compare_settings
from benchmarks.pretrained.prepare import DIRECTORY
from timm_eps import export_onnx, report
from timm_eps.hub.onnx_export import OnnxFile
from timm_eps.hub.onnx_int8 import quantize_file
from timm_eps.training.publishing import versions

STORED, PAGE = ROOT / "benchmarks" / "int8.json", ROOT / "benchmarks" / "INT8.md"
FORMS = ("float32", "int8", "int8, dynamic")
THREADS, BATCHES, EVALUATED, SLOW = (1, 2), (1, 32), 250, 500


def export(net: nn.Module, images: Images, directory: Path, name: str) -> dict[str, Path]:
    """The files of a network by form."""
    files = {form: directory / f"{name}-{index}.onnx" for index, form in enumerate(FORMS)}
    export_onnx(net, files["float32"])  # exported once, because torch's exporter takes most of the time
    quantize_file(files["float32"], files["int8"], images.calibration)
    quantize_file(files["float32"], files["int8, dynamic"], None)
    return files


def logits_of(path: Path, images: Tensor) -> Tensor:
    """Logits (N, classes) of all images."""
    session = OnnxFile(path)
    return torch.cat([session(batch) for batch in images.split(EVALUATED)])


def accuracies(files: dict[str, Path], images: Images, most: int) -> dict[str, dict[str, Any]]:
    """Accuracy, agreement with float32, and file size of each form.

    The dynamic form is slow, so it gets at most 500 images.
    """
    found, classes = {}, {}
    for form, path in files.items():
        count = min(most, SLOW) if "dynamic" in form else most
        classes[form] = logits_of(path, images.tested[:count]).argmax(1)
        labels, whole = images.labels[:count], classes["float32"][:count]
        found[form] = {
            "accuracy": float((classes[form] == labels).float().mean()),
            "agreement": float((classes[form] == whole).float().mean()),
            "images": len(labels),
            "bytes": path.stat().st_size,
        }
    return found


def latencies(files: dict[str, Path], image: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Median seconds of each file, and median and quartiles of its ratio to the dense float32 file, timed in turn."""
    rows = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        sessions = {name: OnnxFile(path) for name, path in files.items()}
        for size in BATCHES:
            timed = {name: one for name, one in sessions.items() if size == 1 or "dynamic" not in name}
            seconds = report.paired_seconds(timed, image.repeat(size, 1, 1, 1), repeats)
            for name, own in seconds.items():
                ratios = [one / whole for one, whole in zip(own, seconds["dense, float32"], strict=True)]
                rows.append(
                    {
                        "name": name,
                        "threads": threads,
                        "batch": size,
                        "seconds": statistics.median(own),
                        "ratio": statistics.median(ratios),
                        "quartiles": statistics.quantiles(ratios, n=4)[::2],
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", choices=list(MAKERS), nargs="+", default=list(MAKERS))
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where prepare.py wrote images and weights")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "int8", help="where networks are kept")
    parser.add_argument("--settings", action="store_true", help="compare the settings of the quantization as well")
    parser.add_argument("--latency", action="store_true", help="measure the latencies anew")
    parser.add_argument("--tested", type=int, default=10_000, help="at most so many test images")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    args = parser.parse_args()
    stored: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name in args.networks:
        record = stored.setdefault(name, {})
        wanted = {"forms", "latency", *(["settings"] if args.settings else [])}
        if record.keys() >= wanted and not args.latency:
            continue
        torch.set_num_threads(args.threads)
        nets = {state: network(name, state, args.output.resolve(), args.directory) for state in STATES}
        read = {state: READERS[name](net, args.directory) for state, net in nets.items()}
        with tempfile.TemporaryDirectory() as directory:
            files = {state: export(net, read[state], Path(directory), state) for state, net in nets.items()}
            if "forms" not in record:
                record["forms"] = {state: accuracies(files[state], read[state], args.tested) for state in STATES}
                record["parameters"] = {state: report.count_parameters(net) for state, net in nets.items()}
            if args.settings and "settings" not in record:
                record["settings"] = compare_settings(nets["dense"], read["dense"])
            if "latency" not in record or args.latency:
                named = {f"{state}, {form}": path for state in STATES for form, path in files[state].items()}
                record["latency"] = latencies(named, read["dense"].tested[:1], args.repeats)
        record["hardware"], record["versions"] = report.hardware("cpu"), versions()
        stored = (json.loads(STORED.read_text()) if STORED.exists() else {}) | {name: record}
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(stored))
        print(page({name: record}), flush=True)
    PAGE.write_text(page(stored))


if __name__ == "__main__":
    main()
