"""What a load must not do: an audit hook that records and stops it, directories that must not change, peak memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .draft import MARKER

_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the file system by the position of the paths that they change.
_CHANGES = {
    "os.chflags": (0,), "os.chmod": (0,), "os.chown": (0,), "os.link": (0, 1), "os.mkdir": (0,), "os.remove": (0,),
    "os.removexattr": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.setxattr": (0,), "os.symlink": (1,),
    "os.truncate": (0,), "os.utime": (0,), "shutil.chown": (0,), "shutil.copyfile": (1,), "shutil.copymode": (1,),
    "shutil.copystat": (1,), "shutil.copytree": (1,), "shutil.make_archive": (0,), "shutil.move": (0, 1),
    "shutil.rmtree": (0,), "shutil.unpack_archive": (1,), "tempfile.mkdtemp": (0,), "tempfile.mkstemp": (0,),
}  # fmt: skip
_REQUESTS = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
    "socket.sendmsg", "socket.bind", "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect",
    "telnetlib.Telnet.open", "webbrowser.open",
)  # fmt: skip
_PROCESSES = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile",
    "pty.spawn", "os.kill", "os.killpg", "pickle.find_class",
)  # fmt: skip


class Forbidden(BaseException):
    """Stops a load in the middle of what it must not do. No handler of ordinary errors catches it."""


class Guard:
    """Watches one load at a time; events go to :attr:`events` as (kind of fault, what happened).

    Args:
        scratch: Directories in which a load may write: caches and temporary files.
        hostile: Directories whose code must not run.
        canary: A directory whose files nobody but a hostile configuration names.
    """

    def __init__(self, scratch: Sequence[Path], hostile: Sequence[Path], canary: Path) -> None:
        self._scratch = tuple(f"{path}{os.sep}" for path in scratch)
        self._hostile = tuple(f"{path}{os.sep}" for path in hostile)
        self._canary = f"{canary}{os.sep}"
        self._active = False
        self.events: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.events = []
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._active and (kind := self._kind(event, args)):
            self.events.append((kind, f"{event} {_short(args)} from {_caller()}"))
            raise Forbidden(kind)

    def _kind(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return None
            if isinstance(flags, int) and flags & _WRITE:
                return None if self._may_write(path) else "written"
            # A link in the directory may lead there, as links of the Hub's cache lead to its blobs.
            is_named = os.path.abspath(os.fsdecode(path)).startswith(self._canary)
            return "read outside" if is_named else None
        if event in _CHANGES:
            return None if all(self._may_write(args[place]) for place in _CHANGES[event]) else "written"
        if event in _REQUESTS:
            return "requested"
        if event in _PROCESSES:
            return "executed"
        if event == "import":
            return "executed" if str(args[0]).startswith("transformers_modules.") or self._is_hostile(args[1]) else None
        if event == "exec":
            return "executed" if self._is_hostile(getattr(args[0], "co_filename", None)) else None
        if event == "compile":
            source = args[0] if isinstance(args[0], str) else repr(args[0])
            return "executed" if MARKER in source or self._is_hostile(args[1]) else None
        return None

    def _may_write(self, path: Any) -> bool:
        if path is None or isinstance(path, int):
            return True
        return os.fspath(path) in ("/dev/null", b"/dev/null") or _is_below(path, self._scratch)

    def _is_hostile(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and _is_below(path, self._hostile)


def _is_below(path: Any, roots: str | tuple[str, ...]) -> bool:
    return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(roots)


def _short(args: Any) -> str:
    text = repr(args)
    return text if len(text) < 160 else text[:157] + "..."


def _caller() -> str:
    """The places that led to an event, outermost first, without those of the fuzzer."""
    frame, found = sys._getframe(3), []
    while frame is not None and "fuzzing" not in frame.f_code.co_filename:
        if "site-packages" in (name := frame.f_code.co_filename) or "timm_eps" in name:
            found.append(f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join([*found[:2], *found[-2:]] if len(found) > 4 else found)


def snapshot(*roots: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time and permissions of all that is below directories."""
    found = {}
    for root in roots:
        for place, folders, files in os.walk(root):
            for name in (".", *folders, *files):
                status = os.lstat(path := os.path.join(place, name))
                found[path] = (status.st_size, status.st_mtime_ns, status.st_mode)
    return found


def memory() -> tuple[float, float]:
    """Resident memory of this process now and its peak, in MB. Zero where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(lines["VmRSS"].split()[0]) / 1000, int(lines["VmHWM"].split()[0]) / 1000)
    except (OSError, KeyError):
        return 0.0, 0.0


def forget_peak() -> None:
    """Let the peak begin at what is in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def limit_memory(megabytes: int) -> None:
    """Let allocations fail that go beyond what is in use now by so much. The files of weights are not mapped twice."""
    import resource

    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = int(lines["VmData"].split()[0]) * 1024 + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (OSError, KeyError, ValueError):
        return
