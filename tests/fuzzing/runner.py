"""Cases: a directory is made, some loaders read it in processes of their own, outputs are compared."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import worker
from .draft import Base
from .files import WEIGHTS, Directory
from .loaders import PACKAGE, STANDALONE
from .mutations import mutate
from .worker import Result

SECONDS = 20
# A process that other ones keep from the processor gets as many times that.
_PATIENCE = 10
# A process keeps a little of each load, so it is replaced now and then.
_LOADS_PER_PROCESS = 3000
_START_SECONDS = 300
# Transformer and convolutional twins take ten times as long to build as the CIFAR network.
_SHARE_OF_TWINS = 0.25


class Worker:
    """A process that loads directories, started when it is needed and replaced when it hangs or dies."""

    def __init__(self, kind: str, workdir: Path, seconds: float = SECONDS, names: Sequence[str] = ()) -> None:
        self.kind, self._workdir, self._seconds, self._names = kind, workdir, seconds, names
        self._process: Any = None
        self._connection: Any = None
        self._loads = 0

    def load(self, directory: Path, base: Path, loader: str) -> Result:
        """Let the process load a directory; time and death are faults of the load."""
        if self._process is None or self._loads >= _LOADS_PER_PROCESS:
            self.close()
            self.start()
        self._loads += 1
        try:
            self._connection.send((str(directory), str(base), loader))
            began = self._processor_time()[1]
            for _ in range(_PATIENCE):
                if self._connection.poll(self._seconds):
                    return Result(**self._connection.recv())
                state, used = self._processor_time()
                if state not in "RD" or used - began >= self._seconds / 2:
                    break
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self._kill()
            return Result(loader, faults=[("died", f"the process ended with {code}")])
        self._kill()
        return Result(loader, faults=[("time", f"more than {self._seconds} s")], seconds=self._seconds)

    def _processor_time(self) -> tuple[str, float]:
        """State of the process as Linux has it, and the seconds that it has run; '?' where that is not to be had."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return "?", 0.0

    def start(self) -> None:
        """Start the process.

        Raises:
            RuntimeError: It ends before it can load anything.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(theirs, self.kind, self._workdir, self._names), daemon=True
        )
        self._process.start()
        theirs.close()
        self._loads = 0
        try:
            ready = self._connection.poll(_START_SECONDS) and self._connection.recv() == "ready"
        except EOFError:
            ready = False
        if not ready:
            self._kill()
            log = self._workdir / f"{self.kind}.log"
            raise RuntimeError(f"A process for {self.kind!r} could not be started: {log.read_text()[-2000:]}")

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            try:
                self._connection.send(None)
                self._process.join(10)
            except OSError:
                pass
            self._kill()


@dataclass
class Case:
    """A case that ran."""

    number: int
    base: str
    notes: list[str]
    results: list[Result]
    faults: list[tuple[str, str, str]] = field(default_factory=list)  # loader, kind, sentence


class Fuzzer:
    """Makes and runs cases.

    Args:
        workdir: An empty directory.
        seed: First half of what decides a case; its number is the other.
        keep: Leave the directories of cases.
        share_of_twins: Share of the cases whose network is not the CIFAR network.
        names: Networks to change, ``cifar``, ``cifar_sibling`` and ``vit_pruned`` among them; all by default.
    """

    def __init__(
        self,
        workdir: Path,
        seed: int,
        keep: bool = False,
        share_of_twins: float = _SHARE_OF_TWINS,
        names: Sequence[str] = (),
    ) -> None:
        self.workdir, self.seed, self._keep, self._share = workdir.resolve(), seed, keep, share_of_twins
        self._lock = threading.Lock()
        for name in ("bases", "cases", "scratch", "canary"):
            (self.workdir / name).mkdir(parents=True)
        first = Worker("package", self.workdir, names=names)
        first.start()
        self._workers = [first]
        self._idle: dict[str, list[Worker]] = {"package": [first], "standalone": []}
        found = sorted(path.stem for path in (self.workdir / "bases").glob("*.json"))
        self.bases = {name: Base.read(self.workdir / "bases", name) for name in found}
        other = self.bases["cifar_sibling"].directory.text(WEIGHTS)
        (self.workdir / "canary" / "other.safetensors").write_bytes(other or b"")
        (self.workdir / "canary" / "secret.json").write_text('{"secret": 1}')

    def draw(self, number: int) -> tuple[Base, Directory, list[str], random.Random]:
        """A case: its base, its directory in memory, what is hostile about it, and the generator for what follows."""
        rng = random.Random(f"{self.seed}:{number}")
        is_twin = rng.random() < self._share
        base = self.bases[rng.choice([name for name in self.bases if name.startswith("cifar") != is_twin])]
        return base, *mutate(base, self.bases, self.workdir / "canary", rng), rng

    def run_case(self, number: int, all_loaders: bool = False) -> Case:
        """Make a case and let three or four loaders read it."""
        base, directory, notes, rng = self.draw(number)
        place = self.workdir / "cases" / str(number)
        directory.write(place)
        loaders = loaders_of(base.name) if all_loaders else sorted(_drawn(base.name.startswith("cifar"), rng))
        results = [self.load(place, base, loader) for loader in loaders]
        if not self._keep:
            shutil.rmtree(place)
        return _compared(Case(number, base.name, notes, results))

    def run_sound(self, name: str, loaders: Sequence[str] = ()) -> Case:
        """Let loaders, by default all, read a network as it was saved."""
        base = self.bases[name]
        loaders = [loader for loader in loaders_of(name) if not loaders or loader in loaders]
        return _compared(Case(-1, name, [], [self.load(base.path, base, loader) for loader in loaders]))

    def run(self, numbers: Iterable[int], jobs: int = 1) -> Iterator[Case]:
        """Run cases, some at the same time, each job with processes of its own; they come in order."""
        pool = ThreadPoolExecutor(jobs)
        try:
            yield from pool.map(self.run_case, numbers)
        finally:
            pool.shutdown(cancel_futures=True)

    def load(self, place: Path, base: Base, loader: str) -> Result:
        """Let an idle process, or a new one, read a directory."""
        kind = "standalone" if loader in STANDALONE else "package"
        with self._lock:
            if not self._idle[kind]:
                self._workers.append(Worker(kind, self.workdir))
                self._idle[kind].append(self._workers[-1])
            found = self._idle[kind].pop()
        try:
            return found.load(place, base.path, loader)
        finally:
            with self._lock:
                self._idle[kind].append(found)

    def close(self) -> None:
        """End all processes."""
        for each in self._workers:
            each.close()

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def loaders_of(name: str) -> list[str]:
    """The loaders of a network: the code beside a saved model is that of the CIFAR networks."""
    return [*PACKAGE, *(STANDALONE if name.startswith("cifar") else ())]


def _drawn(is_cifar: bool, rng: random.Random) -> set[str]:
    """Loaders of a case: timm and transformers always have one in it, so that outputs can be compared."""
    drawn = {
        rng.choice(["timm", "timm", "auto"]),
        rng.choice(PACKAGE),
        rng.choice(["auto", "auto_new", "auto_resized"]),
    }
    drawn.add(rng.choice([*STANDALONE, "standalone", "standalone"]) if is_cifar else rng.choice(PACKAGE))
    return drawn


def _compared(case: Case) -> Case:
    """Collect the faults of a case; outputs of loaders that found nothing wrong must agree."""
    case.faults = [(result.loader, kind, sentence) for result in case.results for kind, sentence in result.faults]
    for output in ("logits", "pooled", "maps"):
        same = [result for result in case.results if result.compared and result.output and result.output[0] == output]
        for other in same[1:]:
            if not _close(same[0].output[1], other.output[1]):  # type: ignore[index]
                case.faults.append((other.loader, "disagree", f"other {output} than {same[0].loader}"))
    return case


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, list) or isinstance(other, list):
        return False
    return one == other or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) or (one != one and other != other)
