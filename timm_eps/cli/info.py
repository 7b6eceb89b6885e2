"""``timm-eps info``: architecture, removed branches and possible loaders of a saved network. No weights are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.saving import PROGRAM, RESULTS
from .networks import check_name
from .output import add_json, answer, saved_percent, size_text, table
from .push import read_results

__all__ = ["HELP", "add_arguments", "describe", "run"]

HELP = "Show the architecture, removed branches, savings and possible loaders of a saved network."

# Larger networks are not built for a trial of export_timm.
_LARGE = 300_000_000
_RESULTS = (
    "dataset", "eval_split", "eval_accuracy", "eval_images", "dense_eval_accuracy", "test_accuracy", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.usage = "timm-eps info DIRECTORY|ID [--json]"
    parser.add_argument("model", metavar="DIRECTORY|ID", help="a saved network, or its id on the Hub")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    found = describe(args.model)
    answer(args, found, _text(found))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Describe a saved network as the JSON object of this verb.

    The configuration is checked as every loader checks it. The weights of a directory are compared with the
    configuration. Weights on the Hub are not downloaded.

    Args:
        name: A directory, or an id on the Hub.

    Raises:
        ValueError: The configuration or the weights are invalid.
        OSError: There is no such model.
    """
    from .. import EpsResNetConfig
    from ..hf.model_files import TransformersFiles
    from ..models.stored import read_config

    check_name(name)
    files, directory = _files(name)
    stored = read_config(directory / "config.json")
    config = EpsResNetConfig.from_pretrained(name)
    if Path(name).is_dir() and (saved := TransformersFiles.of(EpsResNetConfig, name, {})):
        saved.check(replaces_classifier=False)
    classes = stored.get("num_classes") or 0
    structure = _structure(config, classes)
    results = read_results(directory) or {}
    return {
        "name": name,
        "architecture": config.architecture,
        "num_classes": classes,
        **structure,
        "results": {key: results[key] for key in _RESULTS if isinstance(results.get(key), int | float | str)},
        "files": files,
        "bytes": sum(files.values()),
        "loaders": _loaders(stored, config, classes, files, structure["parameters"]["now"]),
    }


def _files(name: str) -> tuple[dict[str, int], Path]:
    """File sizes in bytes by path, and a directory with the configuration and the results."""
    root = Path(name)
    if root.is_dir():
        if not (root / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json, so no network was saved there.")
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}, root
    from huggingface_hub import HfApi, hf_hub_download

    siblings = HfApi().model_info(name, files_metadata=True).siblings or []
    files = {one.rfilename: one.size or 0 for one in siblings}
    if RESULTS in files:
        hf_hub_download(name, RESULTS)
    return files, Path(hf_hub_download(name, "config.json")).parent


def _structure(config: Any, classes: int) -> dict[str, Any]:
    """Branches, parameters and multiply-adds, dense and now. The networks are built without memory."""
    import timm
    import torch

    from ..analysis.measure import network_without, size_of
    from ..surgery.branches import gates, input_size, stage_of
    from ..surgery.removal import check_known, natural_order

    given = dict(config.model_args or {})
    removed, closed = list(given.pop("removed", None) or []), list(given.pop("closed", None) or [])
    options = {**given, "pretrained": False, "num_classes": classes}
    with torch.device("meta"):
        dense = timm.create_model(config.architecture, **options)
        now = timm.create_model(config.architecture, **options, removed=removed) if removed else dense
    check_known(now, closed)
    shape = tuple((config.pretrained_cfg or {}).get("input_size") or input_size(dense))
    sizes = size_of(dense, shape), size_of(network_without(now, closed), shape)
    slots = sorted(gates(dense), key=natural_order)
    kept = [slot for slot in slots if slot not in {*removed, *closed}]
    stages: dict[str, dict[str, Any]] = {}
    for slot in slots:
        stage = stages.setdefault(stage_of(slot), {"all": 0, "kept": 0, "removed": []})
        stage["all"] += 1
        stage["kept"] += slot in kept
        stage["removed"] += [slot] if slot in removed else []
    return {
        "input_size": list(shape),
        "branches": {"all": len(slots), "kept": len(kept), "removed": len(removed), "closed": len(closed)},
        "removed": sorted(removed, key=natural_order),
        "closed": sorted(closed, key=natural_order),
        "stages": stages,
        "parameters": _saving(sizes[0].parameters, sizes[1].parameters),
        "multiply_adds": _saving(sizes[0].macs, sizes[1].macs),
    }


def _saving(dense: int, now: int) -> dict[str, float]:
    return {"dense": dense, "now": now, "saved_percent": round(saved_percent(dense, now), 2)}


def _loaders(
    stored: Mapping[str, Any], config: Any, classes: int, files: Mapping[str, int], parameters: int
) -> dict[str, Any]:
    """Programs that can load the network: with this package, and without."""
    auto = "AutoModelForImageClassification" if classes else "AutoModel"
    is_stock = stored.get("model_type", "timm_wrapper") == "timm_wrapper"
    reason = None if is_stock else _why_not_stock(config, classes, parameters)
    return {
        "with_timm_eps": ["timm", auto, "AutoBackbone", *(["pipeline"] if classes else [])],
        "stock": is_stock,
        "export_timm": {"possible": reason is None, "reason": reason},
        "remote_code": bool(stored.get("auto_map")),
        "onnx": [path for path in files if path.startswith("onnx/") and path.endswith(".onnx")],
        "exported_program": [PROGRAM] if PROGRAM in files else [],
    }


def _why_not_stock(config: Any, classes: int, parameters: int) -> str | None:
    """Reason why ``export_timm`` cannot write a network, from a trial with random weights. None if it can."""
    import tempfile

    import timm

    from .. import export_timm

    if parameters > _LARGE:
        return f"not tried, as the network has {parameters:,} parameters; timm-eps export --format timm says"
    given = dict(config.model_args or {})
    gone = [*(given.pop("removed", None) or []), *(given.pop("closed", None) or [])]
    model = timm.create_model(config.architecture, pretrained=False, num_classes=classes, **given, removed=gone)
    with tempfile.TemporaryDirectory() as directory:
        try:
            export_timm(model, directory)
        except ValueError as error:
            return str(error)
    return None


def _text(found: Mapping[str, Any]) -> str:
    size = "x".join(map(str, found["input_size"]))
    lines = [f"{found['name']}: {found['architecture']}, {found['num_classes']} classes, images of {size}", ""]
    rows: list[tuple[str, ...]] = [("branches", "all", "kept", "removed")]
    rows += [
        (f"  {name}", str(stage["all"]), str(stage["kept"]), str(len(stage["removed"])))
        for name, stage in found["stages"].items()
    ]
    branches = found["branches"]
    rows.append(("  together", *(str(branches[name]) for name in ("all", "kept", "removed"))))
    lines += table(rows)
    lines += [f"removed: {slot}" for slot in found["removed"]] + [f"closed: {slot}" for slot in found["closed"]]
    rows = [("size", "dense", "now", "saved")]
    for name in ("parameters", "multiply_adds"):
        value = found[name]
        rows.append(
            (name.replace("_", "-"), *(f"{value[k]:,}" for k in ("dense", "now")), f"{value['saved_percent']} %")
        )
    lines += ["", *table(rows), "", *_results_lines(found["results"])]
    lines.append(f"files: {size_text(found['bytes'])}")
    lines += [f"  {path}  {size_text(size)}" for path, size in found["files"].items()]
    return "\n".join([*lines, "", *_loader_lines(found)])


def _results_lines(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, what in (("eval_accuracy", "accuracy"), ("dense_eval_accuracy", "accuracy of the dense network"),
                      ("test_accuracy", "accuracy on the test split")):  # fmt: skip
        if isinstance(value := results.get(key), int | float):
            lines.append(f"{what}: {100 * value:.2f} %")
    if lines and "dataset" in results:
        lines[0] += f" of {results.get('eval_images', 'the')} images of {results['dataset']}"
        lines[0] += f" ({results['eval_split']})" if "eval_split" in results else ""
    return [*lines, ""] if lines else []


def _loader_lines(found: Mapping[str, Any]) -> list[str]:
    loaders, name = found["loaders"], found["name"]
    rows = [("with timm_eps", f"{', '.join(loaders['with_timm_eps'])}")]
    if loaders["stock"]:
        rows.append(("stock timm", "yes"))
    elif loaders["export_timm"]["possible"]:
        rows.append(("stock timm", f"after timm-eps export {name} --format timm --output PATH"))
    else:
        rows.append(("stock timm", f"no: {loaders['export_timm']['reason']}"))
    if loaders["stock"]:
        rows.append(("stock transformers", "yes"))
    else:
        rows.append(
            (
                "stock transformers",
                "yes, with trust_remote_code=True" if loaders["remote_code"] else "no: no remote code is here",
            )
        )
    rows.append(("ONNX Runtime", ", ".join(loaders["onnx"]) or "no: no file is in onnx/"))
    rows.append(("plain torch", ", ".join(loaders["exported_program"]) or f"no: no {PROGRAM} is here"))
    return ["who can load it", *(f"  {who:<20}{how}" for who, how in rows)]
