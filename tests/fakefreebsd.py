"""
Stands for FreeBSD's mount, umount, sysctl, ps, fstat and procstat.

They are programs in PATH that keep their state in a file, and print and refuse what FreeBSD's
sources and manual pages say (docs/freebsd.md); an option that FreeBSD's do not have is refused.
What nullfs shows is shown by a real bind mount, so that a client reads the frozen files, and one
that is in use is busy.  Processes are those of this Linux.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import fakezfs  # type: ignore[import-not-found]

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND = 0x1, 0x2, 0x20, 0x1000
UMOUNT_NOFOLLOW = 0x8
MNAMELEN = 1024
EX_USAGE = 64
# sbin/mount/mntopts.h: MOPT_STDOPTS, as far as anybody gives them to nullfs
OPTIONS = {"ro", "rw", "nosuid", "noexec", "noatime", "nosymfollow", "force", "update"}
COLUMNS = ("pid", "ppid", "sid", "stat", "lstart", "comm", "command")
SNAPSHOT = re.compile(r"(.*)/\.zfs/snapshot/([^/]+)(/.*)?")


class Refused(Exception):
    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def main(program: str, argv: list[str]) -> int:
    """Answer one command."""
    with open(f"{fakezfs.HOME}/programs.log", "a") as log:
        log.write(json.dumps([program, *argv]) + "\n")
    programs: dict[str, Callable[[list[str]], int]] = {
        "mount": mount,
        "umount": umount,
        "sysctl": sysctl,
        "ps": ps,
        "fstat": fstat,
        "procstat": procstat,
    }
    try:
        return programs[program](argv)
    except Refused as exc:
        for line in str(exc).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        return exc.status


# -- the kernel ------------------------------------------------------------------------------


@contextmanager
def table() -> Iterator[dict[str, Any]]:
    """Read the mounts, and write them back, while nobody else does."""
    with open(f"{fakezfs.HOME}/mounts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = Path(fakezfs.HOME, "mounts.json")
        state: dict[str, Any] = json.loads(path.read_text())
        yield state
        new = path.with_suffix(".new")
        new.write_text(json.dumps(state))
        new.replace(path)


def add(state: dict[str, Any], special: str, node: str, fstype: str, *opts: str) -> None:
    """Put a mount at the end of the list; vfs_getnewfsid() gives each a new fsid."""
    state["fsids"] += 1
    high, low = divmod(state["fsids"], 256)
    fsid = f"{low:02x}ff003a{high:02x}000000"
    state["mounts"].append(
        {"special": special, "node": node, "fstype": fstype, "opts": list(opts), "fsid": fsid}
    )


def _normal(path: str) -> str:
    return re.sub("/+", "/", path)


def _topmost(state: dict[str, Any], node: str) -> dict[str, Any] | None:
    found = [m for m in state["mounts"] if _normal(m["node"]) == node]
    return found[-1] if found else None


def _walk_to_snapshot(state: dict[str, Any], path: str) -> str | None:
    """
    Mount a snapshot whose name below `.zfs/snapshot` is walked, as zfsctl_snapdir_lookup() does.

    Return its name; None for a path that leads elsewhere.
    """
    match = SNAPSHOT.fullmatch(path)
    if match is None:
        return None
    dataset = _topmost(state, match[1] or "/")
    pool = json.loads(Path(fakezfs.HOME, "pool.json").read_text())
    if dataset is None or dataset["fstype"] != "zfs" or "snapdir" in pool["faults"]:
        raise Refused(f"{path}: No such file or directory", EX_USAGE)
    name = f"{dataset['special']}@{match[2]}"
    if name not in pool["snapshots"] or match[3]:
        raise Refused(f"{path}: No such file or directory", EX_USAGE)
    if _topmost(state, _normal(path)) is None:
        node = f"{dataset['node']}/.zfs/snapshot/{match[2]}"  # "//.zfs" where it is that of "/"
        add(state, name, node, "zfs", "ignore", "local", "nosuid", "read-only")
    return name


def _is_covered(state: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Tell whether something is mounted on a mount, or on what it shows (vfs_mount.c)."""
    node = _normal(entry["node"])
    later = state["mounts"][state["mounts"].index(entry) + 1 :]
    on_it = any((_normal(m["node"]) + "/").startswith(node.rstrip("/") + "/") for m in later)
    return on_it or any(m["fstype"] == "nullfs" and m["special"] == node for m in later)


def force_off(name: str) -> bool:
    """
    Unmount a snapshot by force, as `zfs destroy` does; False where it is busy even so.

    dounmount() refuses it as long as a nullfs is on it.
    """
    with table() as state:
        for entry in [m for m in state["mounts"] if m["special"] == name]:
            if _is_covered(state, entry):
                return False
            state["mounts"].remove(entry)
            state["forced"].append(name)
    return True


# -- mount(8), umount(8) ---------------------------------------------------------------------


def mount(argv: list[str]) -> int:
    if argv == ["--libxo", "json", "-v"]:
        with table() as state:
            print(json.dumps({"mount": {"mounted": state["mounts"]}}))
        return 0
    if argv[:2] != ["-t", "nullfs"] or argv[2] != "-o" or len(argv) != 6:
        raise Refused(f"this fake knows no {argv}", EX_USAGE)
    options, source, target = argv[3].split(","), argv[4], argv[5]
    if not os.path.isdir(target):  # mountfs(): checkpath(), realpath(3)
        what = "Not a directory" if os.path.exists(target) else "No such file or directory"
        raise Refused(f"{target}: {what}")
    target = os.path.realpath(target)
    for option in options:
        if option not in OPTIONS:
            raise Refused(f"{target}: mount option <{option}> is unknown: Invalid argument")
    with table() as state:
        name = _walk_to_snapshot(state, source)
        if name is None:
            raise Refused(f"this fake shows snapshots alone, not {source}", EX_USAGE)
        for one, other in ((source, target), (target, source)):
            if (one + "/").startswith(other + "/"):
                raise Refused(f"{source} ({source}) and {target} are not distinct paths", EX_USAGE)
        if len(target.encode()) >= MNAMELEN:
            raise Refused(f"{target}: File name too long")
        add(state, source[: MNAMELEN - 1], target, "nullfs", "ignore", "nosuid", "read-only")
        _linux_mount(fakezfs.stored(name), target, MS_BIND)
        _linux_mount("none", target, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)
    return 0


def _linux_mount(source: str, target: str, flags: int) -> None:
    import ctypes  # half of the time that this program takes to start

    libc = ctypes.CDLL(None, use_errno=True)
    words = (os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None)
    if libc.mount(*words) != 0:
        raise Refused(f"{target}: {os.strerror(ctypes.get_errno())}")


def _linux_unmount(target: str) -> bool:
    import ctypes

    done: int = ctypes.CDLL(None).umount2(os.fsencode(target), UMOUNT_NOFOLLOW)
    return done == 0


def umount(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise Refused(f"this fake knows no {argv}: nothing of ours is forced", EX_USAGE)
    with table() as state:
        by = [m for m in state["mounts"] if m["fsid"] == argv[0]]
        by = by or [m for m in state["mounts"] if argv[0] in (m["node"], m["special"])][-1:]
        if not by:
            what = f"{argv[0]}: statfs: No such file or directory"
            raise Refused(f"{what}\n{argv[0]}: unknown file system")
        (entry,) = by
        busy = f"unmount of {entry['node']} failed: Device busy"
        if _is_covered(state, entry):
            raise Refused(busy)
        if entry["fstype"] == "nullfs" and not _linux_unmount(entry["node"]):
            raise Refused(busy)
        state["mounts"].remove(entry)
    return 0


# -- sysctl(8), ps(1), fstat(1), procstat(1) -------------------------------------------------


def sysctl(argv: list[str]) -> int:
    flags, names = [w for w in argv if w[:1] == "-"], [w for w in argv if w[:1] != "-"]
    if names != ["kern.boot_id"]:
        raise Refused(f"unknown oid '{names[0]}'")
    if "x" not in "".join(flags) and "o" not in "".join(flags):
        return 1  # show_var(): an opaque value is printed with -o or -x alone
    name = "" if "n" in "".join(flags) else "kern.boot_id: "
    print(f"{name}Format: Length:16 Dump:0x{Path(fakezfs.HOME, 'boot_id').read_text()}")
    return 0


def ps(argv: list[str]) -> int:
    flags, columns, pids = "", [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            raise Refused(f"illegal argument: {word}")
        for letter in word[1:]:
            if letter == "o":  # POSIX: after "=" all is the header of the last one
                names, _, header = next(words).partition("=")
                columns += [(name, header) for name in names.split(",")]
            elif letter == "p":
                pids += [int(pid) for pid in next(words).split(",")]
            elif letter in "axwe":
                flags += letter
            else:
                raise Refused(f"illegal option -- {letter}")
    for name, header in columns:
        if name not in COLUMNS:
            raise Refused(f"{name}: keyword not found")
        assert not header, "all columns of ours are without headers"
    if not pids:
        assert "a" in flags, "or it shows this user's alone"
        assert "x" in flags, "or it shows those with a terminal alone"
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    rows = [row for pid in pids if (row := _row(pid, "e" in flags))]
    for row in rows:
        print(*(row[name].ljust(6) for name, _ in columns[:-1]), row[columns[-1][0]])
    return 0 if rows else 1


def _row(pid: int, with_environment: bool) -> dict[str, str] | None:
    try:
        head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        words = [w for w in _nul(pid, "environ" if with_environment else "") if w]
        words += _nul(pid, "cmdline")
    except OSError:
        return None
    stat, comm = rest.split(), head.partition("(")[2]
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    started = round(booted / 60) * 60 + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    command = " ".join(words) or f"[{comm}]"
    return {
        "pid": str(pid),
        "ppid": stat[1],
        "sid": stat[3],
        "stat": f"{stat[0]}s",
        "lstart": time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(started)),
        "comm": comm,
        "command": command.replace("\n", "\\n"),  # strvis(3) with VIS_NL
    }


def _nul(pid: int, name: str) -> list[str]:
    if not name:
        return []
    try:
        data = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it is ending: a zombie's is empty
        return []
    return [word.decode(errors="replace") for word in data.split(b"\0")]


def fstat(argv: list[str]) -> int:
    same_file_system = argv[:1] == ["-f"]
    argv = argv[1:] if same_file_system else argv
    only = int(argv[1]) if argv[:1] == ["-p"] else None
    files = argv[2:] if only is not None else argv
    there = [file for file in files if os.path.exists(file)]
    for file in files:
        if file not in there:
            print(f"fstat: {file}: No such file or directory", file=sys.stderr)
    if not there:
        return 1
    wanted = {(os.stat(f).st_dev, os.stat(f).st_ino): f for f in there}
    mounts = _mount_ids(there) if same_file_system else set()
    print("USER     CMD          PID   FD MOUNT      INUM MODE         SZ|DV R/W", end="")
    print("" if same_file_system else " NAME")
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    for pid in pids if only is None else [only]:
        for fd, info, flags, mount_id in _open_files(pid):
            key = (info.st_dev, info.st_ino)
            if mount_id in mounts if same_file_system else key in wanted:
                rw = ("r", "w", "rw")[flags & 3]
                name = "" if same_file_system else f"  {wanted[key]}"
                comm = (_row(pid, False) or {"comm": "?"})["comm"]
                print(
                    f"{'root':<8.8} {comm:<10} {pid:>5} {fd:>4} {'/':<8} {info.st_ino:>6}", end=""
                )
                print(f" -rw-r--r--  {info.st_size:>6} {rw:>2}{name}")
    return 0


def _open_files(pid: int) -> Iterator[tuple[str, os.stat_result, int, int]]:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        try:
            info = os.stat(f"/proc/{pid}/fd/{name}")
            said = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
        except OSError:
            continue
        facts = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
        yield name, info, int(facts["flags"], 8), int(facts["mnt_id"])


def _mount_ids(paths: list[str]) -> set[int]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {int(w[0]) for w in lines if w[4].replace("\\040", " ") in paths}


def procstat(argv: list[str]) -> int:
    if argv[:2] != ["-h", "-e"] or len(argv) != 3:
        raise Refused(f"this fake knows no {argv}", EX_USAGE)
    row = _row(int(argv[2]), False)
    if row:  # procstat.c: without such a process nothing is printed
        words = " ".join(_nul(int(argv[2]), "environ")).strip()
        print(f"{argv[2]:>5} {row['comm']:<16} {words or '-'}")
    return 0
