"""One run at a time in a folder: a lock that other hosts see, too, and that a killed run leaves.

The lock is a file, FOLDER/.lock, which says who holds it. File locks of the system (flock, fcntl)
often do not reach other hosts of a shared folder; a file that is linked into place does. Its owner
touches it every few seconds, so that it can be told from one that a killed run left behind. In a
bucket (`_BucketLock`) the store itself decides who of two is first: it writes an object only over
the generation that the writer names.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from refine_jax.base.errors import RunError, UserError
from refine_jax.base.files import (
    json_field,
    missing_folders,
    parse_object,
    path_of,
    short,
)
from refine_jax.base.remote import RemotePath

NAME = ".lock"
BEAT = 5.0
"""Seconds between two signs of life of a lock's owner."""
PATIENCE = 60.0
"""Seconds without a sign of life after which an owner on another host is taken for dead."""

_LARGEST = 1 << 16  # bytes of a lock file that are read
_TRIES = 100
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_held: set[Lock] = set()


class _Seen(NamedTuple):
    """A lock file as it was found: its owner (None: unreadable), last sign of life, identity."""

    owner: dict[str, Any] | None
    touched: float
    file: tuple[int, int]


class Lock:
    """The lock of a folder. Use as a context manager, or call `take` and `release`.

    Of two that are taken at the same time, one is refused. A lock whose owner is dead is taken
    over: at once if that was a process of this host, after a minute of silence if it was elsewhere.
    """

    def __new__(cls, folder: str | os.PathLike, say: Callable[[str], None] = print) -> Lock:
        """Make the kind of lock that fits the folder."""
        return super().__new__(_BucketLock if isinstance(path_of(folder), RemotePath) else cls)

    def __init__(self, folder: str | os.PathLike, say: Callable[[str], None] = print):
        """folder: made if it is not there. say: prints that a dead owner's lock was taken over."""
        self.folder = path_of(folder)
        self.path = self.folder / NAME
        self._say = say
        self._token = secrets.token_hex(16)
        self._made: list[Path] = []  # folders that were not there before
        self._stop = threading.Event()
        self._process: int | None = None  # that holds it; its forks do not

    def take(self) -> None:
        """Take the lock.

        Raises RunError: another run holds it, or the folder cannot be written in.
        """
        self._text = json.dumps(_identity() | {"token": self._token}).encode("utf-8") + b"\n"
        try:
            self._made = missing_folders(self.folder)
            self._settle()
        except OSError as error:
            self._remove_folders()
            raise RunError(
                f"cannot write in the folder of the run, {self.folder}: "
                f"{error.strerror or error}. Choose another one (--workdir)."
            ) from None
        except UserError:
            self._remove_folders()
            raise
        self._process = os.getpid()
        self._stop.clear()
        _held.add(self)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, and remove the folders that were made for it if they are empty."""
        if not self._held_here():
            return
        self._process = None
        self._stop.set()
        _held.discard(self)
        with contextlib.suppress(OSError):
            if self._mine() is not False:
                self.path.unlink(missing_ok=True)
        self._remove_folders()

    def check(self) -> None:
        """Raise RunError if another run has taken the lock over, as after minutes of standstill."""
        if self._held_here() and self._mine() is False:
            raise RunError(
                f"Another run has taken {self.folder} over ({self.path} is no longer this run's), "
                f"as happens when one gives no sign of life for {PATIENCE:.0f} s. This one ends, "
                "so that the two do not mix."
            )

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _settle(self) -> None:
        """Place the lock, over that of a dead owner if need be; RunError if one lives."""
        for _ in range(_TRIES):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                if self._place():
                    return
            except FileNotFoundError:
                continue  # another run ended in this moment and removed the empty folder
            seen = self._look()
            if seen is None:
                continue  # it was released in this moment
            if _alive(seen, self._now()):
                raise RunError(self._refusal(seen))
            if self._move_away(seen):
                self._say(f"Took over the lock of {_describe(seen.owner)}, which is gone.")
        raise RunError(f"The lock of a run, {self.path}, could not be taken. Try again.")

    def _held_here(self) -> bool:
        return self._process == os.getpid()

    def _place(self) -> bool:
        """Put this process's lock file into place, in full; returns whether there was none."""
        own = self._beside()
        self._write(own)
        try:
            os.link(own, self.path)
        except FileExistsError:
            # NFS may answer so to a request that it repeats after it was done.
            return own.stat().st_nlink == 2
        except OSError:  # a file system without hard links
            try:
                self._write(self.path)
            except FileExistsError:
                return False
        finally:
            own.unlink(missing_ok=True)
        return True

    def _beside(self) -> Path:
        return self.folder / f"{NAME}.{secrets.token_hex(16)}"

    def _write(self, path: Path) -> None:
        with os.fdopen(_create(path), "wb") as file:
            file.write(self._text)

    def _look(self, path: Path | None = None) -> _Seen | None:
        """Read the lock file that is there; None if there is none.

        Raises RunError if something else has its name.
        """
        path = path or self.path
        try:
            # Open the file, do not only look at it: NFS asks its server again when a file is
            # opened.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK)
        except FileNotFoundError:
            return None
        except OSError:
            descriptor = None
        try:
            status = os.lstat(path) if descriptor is None else os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RunError(
                    f"{path} is no lock of a run but a link, folder or device. Remove it."
                )
            text = b"" if descriptor is None else os.read(descriptor, _LARGEST)
        except FileNotFoundError:
            return None
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return _Seen(_read_owner(text), status.st_mtime, (status.st_dev, status.st_ino))

    def _now(self) -> float:
        """Read the clock that dates the lock's file: those of hosts differ."""
        mark = self._beside()
        descriptor = _create(mark)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            mark.unlink(missing_ok=True)

    def _move_away(self, dead: _Seen) -> bool:
        """Remove the lock of a dead owner; returns False if the owner is another one by now.

        It is renamed first, which only one process can do. What another process placed since this
        one looked is put back.
        """
        gone = self._beside()
        try:
            self.path.rename(gone)
        except FileNotFoundError:
            return False
        seen = self._look(gone)
        if seen == dead:
            gone.unlink()
            return True
        try:
            os.link(gone, self.path)
        except FileExistsError:
            pass  # a third one was faster: the second will notice, and end
        except OSError:
            if not self.path.exists():
                gone.rename(self.path)
        gone.unlink(missing_ok=True)
        return False

    def _mine(self) -> bool | None:
        """Tell whether the lock file is this one's; None where it cannot be read just now."""
        try:
            seen = self._look()
            if seen is None:  # it was removed: put it back, unless another run was faster
                return self._place() or self._mine()
        except OSError:
            return None
        except RunError:
            return False
        return seen.owner is not None and seen.owner["token"] == self._token

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            if self._mine():
                with contextlib.suppress(OSError):
                    self._touch()

    def _touch(self) -> None:
        os.utime(self.path, follow_symlinks=False)

    def _refusal(self, seen: _Seen) -> str:
        if seen.owner is None:
            return (
                f"{self.path} is the lock of another run, but says not of which. Wait until that "
                "ends, or choose another --workdir. If there is none, remove the file."
            )
        end = f" (kill {seen.owner['pid']})" if _is_here(seen.owner) else ""
        return (
            f"{self.folder} is in use by another run: {_describe(seen.owner)}, since "
            f"{seen.owner['since']}. Wait until it ends, or end it{end}, or choose another "
            f"--workdir. A run that was killed on another host is noticed after {PATIENCE:.0f} s."
        )

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # something is in them
            for path in self._made:
                path.rmdir()


class _BucketLock(Lock):
    """The lock of a folder in a bucket: an object that is only ever written over its own kind.

    Each sign of life is a new generation of the object, and so cannot be written over another's.
    """

    def _place(self) -> bool:
        return self._write_over(0)

    def _write_over(self, generation: int) -> bool:
        """Write this process's lock over that generation; returns whether it is there."""
        try:
            self._generation = self.path.write_over(self._text, generation)
        except FileExistsError:
            # So it is answered, too, where the answer to a first request was lost.
            seen = self._look()
            if seen is None or seen.owner is None or seen.owner["token"] != self._token:
                return False
            self._generation = seen.file[0]
        return True

    def _look(self, path: RemotePath | None = None) -> _Seen | None:
        path = path or self.path
        try:
            status = path.stat()
            return _Seen(_read_owner(path.read_bytes()), status.st_mtime, (status.generation, 0))
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        mark = self._beside()
        mark.write_bytes(b"")
        try:
            return mark.stat().st_mtime
        finally:
            mark.unlink(missing_ok=True)

    def _move_away(self, dead: _Seen) -> bool:
        return self._write_over(dead.file[0])

    def _touch(self) -> None:
        self._write_over(self._generation)


def release_all() -> None:
    """Give back all locks of this process; for those who are about to call `os._exit`."""
    for lock in list(_held):
        lock.release()


def _create(path: Path) -> int:
    """Open a new file, never what a link there points to; returns the descriptor."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, 0o644)


def _identity() -> dict[str, Any]:
    """Describe by JSON values what tells this process from all others."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _read_owner(text: bytes) -> dict[str, Any] | None:
    """Read the owner that a lock file names; None if it names none."""
    kinds = {"host": str, "boot": str, "pid_namespace": int, "pid": int, "started": int}
    kinds |= {"since": str, "token": str}
    try:
        fields = parse_object(text, NAME, UserError)
        owner = {
            name: json_field(fields, name, kind, where=NAME, error=UserError)
            for name, kind in kinds.items()
        }
    except UserError:
        return None
    known = all(owner[name] is not None for name in ("host", "pid", "since", "token"))
    return owner if known and 0 < owner["pid"] < 1 << 31 else None


def _alive(seen: _Seen, now: float) -> bool:
    """Tell whether the owner of a lock lives; `now` is by the clock that dates the lock."""
    owner = seen.owner
    if owner is None or not _is_here(owner):
        return abs(now - seen.touched) < PATIENCE
    try:
        return _start_time(owner["pid"]) == owner["started"]
    except PermissionError:  # another user's, which some systems hide
        return True


def _is_here(owner: dict[str, Any]) -> bool:
    """Tell whether a lock's owner is, or was, a process that this one could see."""
    if owner["boot"] is None or owner["started"] is None:
        return False
    return (owner["boot"], owner["pid_namespace"]) == (_boot(), _pid_namespace())


def _boot() -> str | None:
    """Name this start of this machine; None where the system has no name for it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return None


def _pid_namespace() -> int | None:
    """Number the set of processes that this one can see: containers have their own."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return None


def _start_time(pid: int) -> int | None:
    """Tell when a process started, in ticks since the machine did; None if there is none.

    One that has ended and that its parent has not asked for yet is none. Raises PermissionError
    where the process is there but not to be seen.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
        return None
    # The second field is the command's name in brackets, which may hold any characters.
    fields = text.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "an unknown process"
    return f"process {owner['pid']} on host {short(owner['host'])[1:-1]}"
