"""A process that loads one directory at a time and says what happened. A crash or a hang of it is a result too."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# MB above what the process holds before a load.
MEMORY_LIMIT = 1500


@dataclass
class Result:
    """What came of one load.

    Args:
        loader: Name of the loader.
        outcome: 'loaded', 'refused' by this package, 'failed' elsewhere, or 'stopped' by the fuzzer.
        faults: Kinds of faults, each with a sentence.
        message: The error, shortened.
        place: File and line of the last frame of the error.
        library: Library of the last frame of the error.
        good_message: Whether a refusal of this package is one short line that names a field or a file.
        seconds: Processor time.
        megabytes: Peak memory above what was in use before.
        output: Which output was computed, and its numbers.
        compared: Whether the output must be that of other loaders.
    """

    loader: str
    outcome: str = "stopped"
    faults: list[tuple[str, str]] = field(default_factory=list)
    message: str = ""
    place: str = ""
    library: str = ""
    good_message: bool = False
    seconds: float = 0.0
    megabytes: float = 0.0
    output: tuple[str, Any] | None = None
    compared: bool = False


def main(connection: Any, kind: str, workdir: Path, names: Sequence[str] = ()) -> None:
    """Serve loads until the connection ends.

    Args:
        connection: Takes (directory, base, loader), gives the fields of a :class:`Result`.
        kind: 'package', 'standalone' or 'planted'.
        workdir: Place of the networks, the cases and all caches. The first process of the package saves the networks.
        names: Networks to save; all by default.
    """
    _prepare(kind, workdir)
    import torch

    torch.set_num_threads(1)
    # The oracle is imported here because imports write caches, which a load must not.
    from . import bases, guard, loaders, oracle  # noqa: F401

    found: dict[str, loaders.Loader]
    roots: list[Path]
    if kind == "package":
        found, roots = loaders.package_loaders()
        if not any((workdir / "bases").iterdir()):
            bases.build(workdir / "bases", names)
    elif kind == "standalone":
        found, roots = loaders.standalone_loaders(workdir / "bases" / "cifar", workdir)
    else:
        from . import planted

        found, roots = {name: loader for name, (loader, _) in planted.LOADERS.items()}, [Path(planted.__file__)]
    canary = workdir / "canary"
    watch = guard.Guard([workdir / "scratch"], [workdir / "cases", canary, workdir / "bases"], canary)
    if kind != "planted":
        _warm_up(found, workdir / "bases")
    guard.limit_memory(2 * MEMORY_LIMIT)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        directory, base, loader = task
        connection.send(asdict(_attempt(loader, found[loader], Path(directory), Path(base), watch, canary, roots)))


def _prepare(kind: str, workdir: Path) -> None:
    """Caches of this process alone, no colours and progress, output into a file; before any library is imported."""
    from .draft import CLOSED_PORT

    scratch = workdir / "scratch"
    (scratch / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ.update(
        HF_ENDPOINT=CLOSED_PORT, HF_HOME=str(scratch / "hf"), TORCH_HOME=str(scratch / "torch"),
        TMPDIR=str(scratch / "tmp"),
        XDG_CACHE_HOME=str(scratch / "cache"), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_TELEMETRY="1", MPLCONFIGDIR=str(scratch / "matplotlib"),
    )  # fmt: skip
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HF_MODULES_CACHE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
    ):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = True
    log = os.open(workdir / f"{kind}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _warm_up(loaders: dict[str, Any], bases: Path) -> None:
    """Import what the first load of each kind imports; a fault of a sound directory shows in the cases."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in ("cifar", "vit_pruned") if "auto" in loaders else ("cifar",):
        for loader in loaders.values():
            try:
                loaded = loader(str(bases / name))
                if loaded.model is not None:
                    loaded.model.eval()(torch.zeros(2, 3, *(2 * [8 if name == "cifar" else 32])))
            except Exception as error:
                print(f"warming up on {name}: {error!r}", flush=True)


def _attempt(
    name: str, loader: Any, directory: Path, base: Path, watch: Any, canary: Path, roots: list[Path]
) -> Result:
    import torch

    from . import guard, oracle

    result = Result(name)
    before, (held, _) = guard.snapshot(directory, canary), guard.memory()
    guard.forget_peak()
    error: BaseException | None = None
    loaded = None
    began = time.process_time()
    try:
        with watch.watching():
            loaded = loader(str(directory))
        result.outcome = "loaded"
    except BaseException as raised:
        error = raised
    result.seconds = time.process_time() - began
    result.megabytes = max(guard.memory()[1] - held, 0.0)
    result.faults += watch.events
    if (after := guard.snapshot(directory, canary)) != before:
        changed = sorted(set(before.items()) ^ set(after.items()))
        result.faults.append(("written", f"{changed[0][0]} changed"))
    if result.megabytes > MEMORY_LIMIT or oracle.took_memory(error):
        result.faults.append(("memory", f"{result.megabytes:.0f} MB, {str(error)[:150]}"))
    if error is not None:
        if not watch.events:
            _judge_error(result, error, directory, base, roots, oracle)
    elif loaded is not None and loaded.model is not None:
        # Another configuration may have made another network of the files.
        kinds = {type(module).__name__ for module in loaded.model.modules()}
        size = 32 if kinds & {"ConvNeXt", "ResNet", "VisionTransformer"} else 8
        images = torch.linspace(-2, 2, 2 * 3 * size * size).sin().mul(3).reshape(2, 3, size, size)
        faults, output = [], None
        try:
            with watch.watching():
                faults, output = oracle.judge_model(loaded, directory, base, images)
        except BaseException as raised:
            if not watch.events:
                faults.append(("judge", f"{type(raised).__name__}: {raised} at {oracle.place_of(raised)}"[:300]))
        result.faults += faults + watch.events
        result.output = (loaded.output, output)
        result.compared = loaded.weights and not loaded.new_classifier and not result.faults
    return result


def _judge_error(
    result: Result, error: BaseException, directory: Path, base: Path, roots: list[Path], oracle: Any
) -> None:
    path, line = oracle.place_of(error)
    result.message = f"{type(error).__name__}: {error}"[:400]
    result.place = f"{'/'.join(path.parts[-2:])}:{line}"
    result.library = oracle.library_of(path)
    result.outcome = "failed"
    if any(path == root or path.is_relative_to(root) for root in roots):
        result.library = "this package"
        result.outcome = "refused"
        if any(kind == "memory" for kind, _ in result.faults):
            return  # an allocation that failed is a fault already
        if not oracle.is_refusal(error, path, line):
            result.faults.append(("traceback", f"{result.message} at {result.place}"[:300]))
        elif problem := oracle.judge_message(str(error), oracle.words_of(directory, base)):
            result.faults.append(("message", f"{problem}: {result.message}"[:300]))
        else:
            result.good_message = True
    elif not isinstance(error, Exception):
        result.faults.append(("exit", f"{result.message} at {result.place}"))
