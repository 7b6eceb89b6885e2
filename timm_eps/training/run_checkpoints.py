"""The checkpoints of a run: when they are written, their content, and how a run resumes from one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..hub.failures import WRITE_ERRORS, one_line
from ..surgery.distributed import rewrap
from ..surgery.removal import removed_slots
from ..surgery.sharding import is_sharded
from . import checkpoints
from .arguments import Arguments, binding_arguments
from .average import load_average, save_average
from .process_state import check_random_states, load_own, save_own
from .progress import Progress, check_like, check_pruner, dump_json, load_state
from .run import Run
from .sharded import checkpoint_files

__all__ = ["find_checkpoint", "resume", "save", "save_if_due"]


def find_checkpoint(args: Arguments, directory: Path) -> Path | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        ValueError: The requested checkpoint cannot be used, or a new run would mix its checkpoints with old ones.
    """
    wanted = args.checkpoints.resume_from_checkpoint
    if wanted == "latest" or (wanted and directory != Path(args.output_dir)):
        return checkpoints.newest_whole(directory, checkpoint_files())
    if wanted:
        if reason := checkpoints.why_torn(wanted, checkpoint_files()):
            raise ValueError(
                f"--resume_from_checkpoint {wanted} is not an intact checkpoint ({reason}); 'latest' finds the last "
                "intact one."
            )
        return Path(wanted)
    if args.checkpoints.checkpointing_steps and (others := checkpoints.all_checkpoints(directory)):
        raise ValueError(
            f"{directory} contains checkpoints of an earlier run, the last one {others[-1].name}. Resume it with "
            "--resume_from_checkpoint, delete them, or use another --output_dir."
        )
    return None


def save_if_due(run: Run) -> None:
    """Write a checkpoint if one is due after this step or epoch, or if a signal ends the run; all processes call it."""
    every, progress = run.args.checkpoints.checkpointing_steps, run.progress
    if not every:
        return
    is_end = progress.batch == 0
    is_last = is_end and progress.epoch == run.args.training.num_train_epochs
    if run.signum or is_last or (is_end if every == "epoch" else progress.step % int(every) == 0):
        if not is_end:
            run.lap()
        save(run)


def save(run: Run) -> None:
    """Write a checkpoint; every process must call this.

    Raises:
        ValueError: The loss or the weights are not finite.
        OSError: The checkpoint cannot be written. Earlier ones stay.
    """
    run.check_finite()
    run.progress.loss, run.progress.corrupt = run.loss.item(), run.images.corrupt
    staging = checkpoints.staging_of(run.directory, run.progress.step)
    try:
        _write(run, staging)
    except WRITE_ERRORS as error:
        checkpoints.clear_unfinished(run.directory)
        raise OSError(
            f"The checkpoint of step {run.progress.step} could not be written to {run.directory} "
            f"({one_line(error)}). {run.remedy()}"
        ) from error


def _write(run: Run, staging: Path) -> None:
    accelerator = run.accelerator
    if accelerator.is_main_process:
        checkpoints.clear_unfinished(run.directory)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    if run.draws.processes > 1:
        save_own(run.model, run.loss, _own_file(run, staging))
    if accelerator.is_main_process:
        if run.average is not None:
            save_average(run.average, staging)
        state = {
            "run": _identity(run),
            "removed": removed_slots(run.model),
            "progress": asdict(run.progress),
            "scheduler": run.scheduler.state_dict(),
            "pruner": run.pruner and run.pruner.state_dict(),
            "draws": run.generator.get_state().numpy().tobytes().hex(),
        }
        dump_json(state, staging / "training.json")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.commit(staging)
        checkpoints.discard_oldest(run.directory, run.args.checkpoints.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def _own_file(run: Run, checkpoint: Path) -> Path:
    return checkpoint / f"process_{run.draws.rank}.safetensors"


def _identity(run: Run) -> dict[str, Any]:
    """Facts that must be the same for a run to resume exactly."""
    found = {
        **binding_arguments(run.args),
        "number of processes": run.draws.processes,
        "gates": "off, as the dense network" if run.is_dense or run.args.pruning.no_gates else "on",
        "mixed precision": run.accelerator.mixed_precision,
        **({"sharded parameters": True} if is_sharded(run.model) else {}),
        "batches an epoch": len(run.batches),  # last, because it follows from the others
    }
    return json.loads(json.dumps(found))


def resume(run: Run) -> None:
    """Resume the run from the checkpoint of the arguments, if any. Every process must call this.

    Raises:
        ValueError: The checkpoint is from another run, or does not fit.
    """
    checkpoint = find_checkpoint(run.args, run.directory)
    if checkpoint is None:
        return
    with checkpoints.taking_up(checkpoint):
        state = load_state(checkpoint / "training.json")
    before, now = state["run"], _identity(run)
    for name in {**before, **now}:
        if now.get(name) != before.get(name):
            raise ValueError(
                f"The run of {checkpoint} has {name} {before.get(name)}, but this one {now.get(name)}. Use the same "
                "arguments, or start a new run in another --output_dir."
            )
    with checkpoints.taking_up(checkpoint):
        _take_up(run, checkpoint, state)
    run.accelerator.print(
        f"Resuming from {checkpoint}: {run.progress.epoch} epochs and {run.progress.batch} batches are done."
    )


def _take_up(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    training = run.args.training
    progress = Progress.of(
        state["progress"], epochs=training.num_train_epochs, batches=len(run.batches),
        accumulated=training.gradient_accumulation_steps,
    )  # fmt: skip
    check_like(state["scheduler"], run.scheduler.state_dict(), "scheduler")
    if not 0 <= state["scheduler"]["last_epoch"] <= progress.step:
        raise ValueError(f"scheduler.last_epoch must be 0 to {progress.step}")
    if run.pruner:  # the weights fit only the smaller structure
        check_pruner(state["pruner"], progress.epoch)
        run.pruner.load_state_dict(state["pruner"])
        rewrap(run.network)
    if run.average is not None:
        load_average(run.average, checkpoint)
    run.accelerator.load_state(str(checkpoint))
    check_random_states(checkpoint / f"random_states_{run.draws.rank}.pkl")
    run.scheduler.load_state_dict(state["scheduler"])
    run.generator.set_state(torch.frombuffer(bytearray.fromhex(state["draws"]), dtype=torch.uint8))
    run.progress = progress
    run.images.corrupt = sorted({*run.images.corrupt, *progress.corrupt})
    run.loss.fill_(progress.loss)
    if run.draws.processes > 1:
        load_own(run.model, run.loss, _own_file(run, checkpoint))
