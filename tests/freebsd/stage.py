"""
Whole runs as on FreeBSD: the engine's own processes, its programs played by tests/fakefreebsd.py.

In a front end and its runner nothing of Linux can be reached by the engine: `/proc`, `/sys`, the
system calls that FreeBSD does not have.  Two things are put in their place, because no program
makes them: kqueue(2), by a pidfd, and procctl(2), by prctl(2).
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from atomtx import system
from atomtx.plan import Plan
from atomtx.system import System, freebsd
from tests import fakezfs
from tests.scene import Scene
from tests.standin import write_program

PROGRAMS = ("mount", "umount", "sysctl", "ps", "fstat", "procstat")
ENGINE = str(Path(system.__file__).parent.parent) + os.sep
TESTS = str(Path(fakezfs.__file__).parent) + os.sep
# What neither FreeBSD nor its Python has.
ABSENT = ((os, "pidfd_open"), (signal, "pidfd_send_signal"), (os, "O_PATH"), (select, "epoll"))
ABSENT_CALLS = frozenset(("prctl", "unshare", "setns", "umount2", "pivot_root", "fanotify_init"))
CHECKED: System = freebsd  # by mypy: it has all that the engine asks for
_PR_SET_CHILD_SUBREAPER = 36


class FreeBSD(Scene):
    """A scene on FreeBSD; each plan is a tree's."""

    hangs_s = 900.0  # each of fifty programs starts a Python, maybe on a machine at work

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        for name in PROGRAMS:
            write_program(home / "bin" / name, "fakefreebsd", f"{name!r}, sys.argv[1:]")
        self.reboot()

    @property
    def tree(self) -> Path:
        return self.home / "tree"

    def reboot(self) -> None:
        """Begin another boot: its id is another one, and what was mounted is not."""
        (self.home / "boot_id").write_text(uuid.uuid4().hex)
        base = [
            ("zroot/ROOT/default", "/", "zfs", ["local", "nfsv4acls"]),
            ("devfs", "/dev", "devfs", ["multilabel"]),
        ]
        mounts = [
            {"special": s, "node": n, "fstype": t, "opts": o, "fsid": f"{number:016x}"}
            for number, (s, n, t, o) in enumerate(base, start=1)
        ]
        self._write_mounts(mounts=mounts, fsids=len(mounts), forced=[])

    def reboot_after_power_cut(self, datasets: Iterable[str]) -> None:
        """Lose every mount, as a machine does that is switched off, and mount the datasets."""
        for entry in reversed(self.mounts["mounts"]):
            if entry["fstype"] == "nullfs":
                subprocess.run(["/bin/umount", "-l", entry["node"]], check=True)
        self.reboot()
        for dataset in datasets:
            self.mount(dataset)

    @property
    def mounts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "mounts.json").read_text())
        return found

    def _write_mounts(self, **values: Any) -> None:
        (self.home / "mounts.json").write_text(json.dumps(values))

    def mount(self, dataset: str) -> None:
        """Mount a dataset at its live place, where it is not."""
        self._mount(dataset, str(self.live(dataset)))

    def _mount(self, special: str, node: str, fstype: str = "zfs") -> None:
        state = self.mounts
        if all(m["special"] != special for m in state["mounts"]):
            state["fsids"] += 1
            mount = {"special": special, "node": node, "fstype": fstype, "opts": ["local"]}
            state["mounts"].append(mount | {"fsid": f"{state['fsids']:016x}"})
            self._write_mounts(**state)

    def plan(self, *datasets: str, **values: Any) -> Plan:
        made = super().plan(*datasets, **{"layout": "tree", "root": str(self.tree)} | values)
        for dataset in datasets:
            self.mount(dataset)
        return made

    def _in_the_place_of_mounts(self) -> None:
        system.here = freebsd
        freebsd.boot_id.cache_clear()
        _play_kernel()
        _hide_linux()

    def programs(self, name: str) -> list[list[str]]:
        """Return the arguments of each start of a program of FreeBSD's."""
        path = self.home / "programs.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [argv[1:] for argv in map(json.loads, lines) if argv[0] == name]

    def close(self) -> None:
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            node = line.split()[4].replace("\\040", " ")
            if node.startswith(f"{self.home}/"):
                subprocess.run(["/bin/umount", "-l", node], check=False)
        super().close()

    def left(self) -> list[str]:
        state = self.mounts
        found = [str(m) for m in state["mounts"] if "@" in m["special"] or m["fstype"] == "nullfs"]
        found += [f"unmounted by force: {name}" for name in state["forced"]]
        return [*super().left(), *found]


class _Queue:
    """kqueue(2), for one EVFILT_PROC with NOTE_EXIT: a pidfd that can be read then, too."""

    def __init__(self, pidfd_open: Any) -> None:
        self._pidfd_open = pidfd_open
        self._descriptor = -1

    def control(self, changes: Iterable[tuple[int, ...]], most: int) -> list[object]:
        ((pid, *flags),) = changes
        assert flags == [-5, 1, 0x80000000], "EVFILT_PROC, EV_ADD, NOTE_EXIT"
        assert most == 0
        self._descriptor = self._pidfd_open(pid)
        return []

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Library:
    """libc, as far as FreeBSD's is asked."""

    def __init__(self) -> None:
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def procctl(self, idtype: int, identity: Any, command: int, argument: None) -> int:
        assert (idtype, identity.value, command, argument) == (0, 0, 2, None), "PROC_REAP_ACQUIRE"
        done: int = self._prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return done


def _play_kernel() -> None:
    pidfd_open = os.pidfd_open
    names: dict[str, Any] = {
        "kqueue": lambda: _Queue(pidfd_open),
        "kevent": lambda *args: args,
        "KQ_FILTER_PROC": -5,
        "KQ_EV_ADD": 1,
        "KQ_NOTE_EXIT": 0x80000000,
    }
    for name, value in names.items():
        setattr(select, name, value)
    library: Any = _Library()
    freebsd._libc = library


def _hide_linux() -> None:
    """Take away what is Linux's; for good: this process is a front end's, or a runner's."""
    for owner, name in ABSENT:
        delattr(owner, name)
    sys.addaudithook(_look_out)


def _look_out(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "os.stat") and args:
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if path.startswith(("/proc/", "/sys/")) and _is_of_engine():
            raise FileNotFoundError(2, "FreeBSD has no", path)
    elif event == "ctypes.dlsym" and args[1] in ABSENT_CALLS and _is_of_engine():
        raise AttributeError(f"FreeBSD has no {args[1]}")


def _is_of_engine() -> bool:
    """Tell whether the engine did it, not a test."""
    frame: FrameType | None = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith((ENGINE, TESTS)):
            return name.startswith(ENGINE)
        frame = frame.f_back
    return False
