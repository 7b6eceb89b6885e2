"""INT8.md from int8.json."""

from __future__ import annotations

from typing import Any

from benchmarks.int8.networks import EPOCHS, RECIPE, TRAINED

TITLES = {
    "digits": f"eps_resnet110, scikit-learn's digits at 8x8, {EPOCHS} epochs",
    "lite0": (
        f"EfficientNet-Lite0 with ImageNet weights, {TRAINED:,} images of Fashion-MNIST at 48x48, {RECIPE.steps} steps "
        f"of {RECIPE.batch_size} images"
    ),
}


def page(stored: dict[str, Any]) -> str:
    """The text of INT8.md."""
    lines = [
        "Networks as ONNX files in ONNX Runtime. `int8` is the static form, calibrated on 512 training images. One "
        "run, seed 0. Agreement is the share of test images for which a file and the float32 file of the same network "
        "choose the same class. All files of a network are timed in turn: medians in milliseconds, and in brackets the "
        "median of the ratios to the dense float32 file.",
    ]
    for name, record in stored.items():
        lines += ["", f"## {TITLES[name]}", "", *forms(record)]
        if "settings" in record:
            lines += ["", *settings(record["settings"])]
        versions = ", ".join(f"{key} {value}" for key, value in sorted(record["versions"].items()))
        lines += ["", f"{record['hardware']}; {versions}."]
    return "\n".join(lines) + "\n"


def forms(record: dict[str, Any]) -> list[str]:
    """The table of one network."""
    columns = sorted({(row["threads"], row["batch"]) for row in record["latency"]})
    timed = {(row["name"], row["threads"], row["batch"]): row for row in record["latency"]}
    heads = [f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}" for threads, batch in columns]
    lines = [
        f"| | accuracy | agreement | file, MB | {' | '.join(heads)} |",
        f"|---|---:|---:|---:|{'---:|' * len(heads)}",
    ]
    for state, found in record["forms"].items():
        for form, row in found.items():
            cells = [f"{state}, {form}", f"{100 * row['accuracy']:.2f} %", f"{100 * row['agreement']:.2f} %"]
            cells.append(f"{row['bytes'] / 1e6:.2f}")
            for threads, batch in columns:
                one = timed.get((f"{state}, {form}", threads, batch))
                cells.append("" if one is None else f"{1000 * one['seconds']:.2f} ({one['ratio']:.2f}×)")
            lines.append(f"| {' | '.join(cells)} |")
    images = next(iter(next(iter(record["forms"].values())).values()))["images"]
    return [*lines, "", f"{images:,} test images, of which the dynamic form was given at most 500."]


def settings(found: dict[str, Any]) -> list[str]:
    """The table of the settings, on the dense network."""
    lines = [
        "Settings of the static form, one change at a time: dense network, at most 2,000 test images. The error is "
        "that of the logits against float32, relative. The latency is that of a batch of 32 over float32.",
        "",
        "| | accuracy | agreement | error | latency |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in found.items():
        shares = f"{100 * row['accuracy']:.2f} % | {100 * row['agreement']:.2f} %"
        lines.append(f"| {name} | {shares} | {row['error']:.3f} | {row['ratio']:.2f}× |")
    return lines
