"""`atomtx doctor`: what is installed, what is missing, what this user may do."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from .. import (
    __version__,
    aside,
    audit,
    config,
    history,
    journalfile,
    lvmio,
    process,
    statedir,
    system,
)
from ..errors import AtomtxError, ExitStatus, JournalError, UserError
from ..volumes import btrfs
from . import echo, json_option, render
from .jobs import problems_of

_ASK_S = 20.0
_CAP_SYS_PTRACE, _CAP_SYS_ADMIN = 19, 21  # linux/capability.h
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_NAMESPACE_TEST = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(os.strerror(ctypes.get_errno()) if libc.unshare({_CLONE_NEWNS}) else 0)
"""


@dataclass(frozen=True)
class Check:
    """One thing looked at: "ok", "note", "warning", or "missing" where atomtx needs it."""

    name: str
    status: str
    detail: str
    hint: str | None = None


@click.command()
@json_option
def doctor(as_json: bool) -> ExitStatus:
    """
    Check what is installed, allowed and healthy.

    Looks for ZFS, the clients and Python's parts, tries what this user may do, and checks the
    journal and the configuration. Changes nothing on the machine.

    \b
    Example:
      atomtx doctor

    \b
    EXIT STATUS
      0  all that is needed is there; there may be warnings
      1  something that is needed is missing
      2  wrong usage
    """
    state = statedir.find()
    found = [check for look in _LOOKS for check in look(state)]
    good = all(check.status != "missing" for check in found)
    if as_json:
        echo(render.to_json({"ok": good, "version": __version__, "checks": found}))
    else:
        echo("\n".join(line for check in found for line in _lines(check)))
    return ExitStatus.COMPLETED if good else ExitStatus.FAILED


def _lines(check: Check) -> list[str]:
    first = render.printable(f"{check.status:<8}  {check.name:<18}  {check.detail}")
    return [first, f"{'':<30}{check.hint}"] if check.hint else [first]


# -- what is installed -------------------------------------------------------------------------


def _python(_: Path) -> Iterator[Check]:
    import sqlite3

    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    enough = sqlite3.sqlite_version_info >= journalfile.SQLITE_NEEDED
    hint = None if enough else "3.37 or later is needed"
    yield Check("sqlite", "ok" if enough else "missing", sqlite3.sqlite_version, hint)


def _zfs(_: Path) -> Iterator[Check]:
    said = _ask("zfs", "version")
    userland = _first(r"^zfs-(\d.*)$", said)
    if not userland and (btrfs.mounted() or lvmio.devices()):
        yield Check("zfs", "note", "not installed: only btrfs and LVM can be backed up")
        return
    if userland:
        yield Check("zfs", "ok", userland)
    else:
        yield Check("zfs", "missing", "not installed", system.here.ZFS_HINTS[0])
    module = _module_version()
    if module:
        yield Check("zfs module", "ok", module)
    else:
        yield Check("zfs module", "missing", "not loaded", system.here.ZFS_HINTS[1])
    if userland and module and userland.split("-")[0] != module.split("-")[0]:
        yield Check("zfs versions", "warning", f"userland {userland}, module {module}", "reboot")
    there = os.access("/dev/zfs", os.R_OK | os.W_OK)
    yield Check("/dev/zfs", *(("ok", "usable") if there else ("missing", "absent, or not ours")))


def _btrfs(_: Path) -> Iterator[Check]:
    """Try to reach the top level of each file system, which changes nothing."""
    for filesystem in btrfs.mounted():
        problem = btrfs.problem(filesystem)
        yield Check("btrfs", "warning" if problem else "ok", problem or f"{filesystem} is usable")


def _lvm(_: Path) -> Iterator[Check]:
    """See that LVM can be asked, where some of its volumes are active."""
    if not lvmio.devices():
        return
    lvm = lvmio.Lvm()
    try:
        volumes, stuck = lvm.volumes(), lvm.suspended()
    except AtomtxError as exc:
        yield Check("lvm", "warning", exc.message, "install lvm2 and dmsetup")
        return
    version = _first(r"LVM version:\s*(\S+)", _ask("lvs", "--version"))
    yield Check("lvm", "ok", f"{version}, {len(volumes)} logical volumes")
    for device in stuck:
        hint = f"if nobody is at work on it: `dmsetup resume {device.name}`"
        yield Check("lvm", "warning", f"{device.name} is suspended", hint)
    if any(volume.is_thin for volume in volumes) and not process.which("thin_check"):
        hint = "install thin-provisioning-tools: without it no thin pool is activated at boot"
        yield Check("lvm", "warning", "thin_check is not installed", hint)


def _module_version() -> str:
    try:
        return Path("/sys/module/zfs/version").read_text().strip()
    except OSError:
        return _first(r"^zfs-kmod-(\d.*)$", _ask("zfs", "version"))


def _programs(_: Path) -> Iterator[Check]:
    """Try a channel program that changes nothing: they destroy by identity, many at once."""
    if not _ask("zfs", "version") and (btrfs.mounted() or lvmio.devices()):
        return
    pools = _ask("zpool", "list", "-H", "-o", "name").splitlines()
    if not pools:
        yield Check("channel programs", "note", "not tried: no pool is imported")
        return
    argv = ["zfs", "program", "-n", pools[0], "-"]
    try:
        tried = process.run(argv, stdin="return 0", timeout_s=_ASK_S)
        problem = None if tried.ok else tried.last_line()
    except AtomtxError as exc:
        problem = exc.message
    if problem:
        hint = "snapshots will be destroyed one by one, which is slow for many"
        yield Check("channel programs", "warning", problem, hint)
    else:
        yield Check("channel programs", "ok", f"usable (tried on {pools[0]})")


def _clients(_: Path) -> Iterator[Check]:
    found = {
        "restic": _first(r"^restic (\S+)", _ask("restic", "version", env=os.environ)),
        "kopia": _first(r"^(\S+)", _ask("kopia", "--version", env=os.environ)),
        "borg": _first(r"^borg\S* (\S+)", _ask("borg", "--version", env=os.environ)),
        "xfsdump": _first(r"version (\S+)", _ask("xfsdump", "-h", env=os.environ)),
    }
    for name, version in found.items():
        yield _client(name, version) if version else Check(name, "note", "not installed")
    if not any(found.values()):
        hint = "install restic, kopia, borg or xfsdump; without one, only --command can be used"
        yield Check("clients", "warning", f"none of {', '.join(found)} is installed", hint)
    if not system.here.NAMESPACES:
        return
    yield Check(
        "clients",
        "note",
        "a client that leaves the run's mount namespace reads live files, not the snapshot",
        "so do docker, podman, systemd-run and ssh in --command: start the client itself",
    )


def _client(name: str, version: str) -> Check:
    from ..clients import borg, restic

    check_version = {"restic": restic.check_version, "borg": borg.check_version}.get(name)
    try:
        if check_version:
            check_version(version)
    except UserError as exc:
        return Check(name, "warning", exc.message, exc.hint)
    return Check(name, "ok", version)


# -- what this user may do ---------------------------------------------------------------------


def _rights(_: Path) -> Iterator[Check]:
    user = os.geteuid()
    if user == 0:
        yield Check("user", "ok", "root")
    else:
        yield Check("user", "missing", f"user {user}, not root", "run atomtx as root")
    if not system.here.NAMESPACES:
        yield Check(
            "mounts", "note", f"{system.here.NAME}: by nullfs, in a tree", "docs/freebsd.md"
        )
        return
    held = _has_capability(_CAP_SYS_ADMIN)
    yield Check("CAP_SYS_ADMIN", "ok" if held else "missing", "held" if held else "not held")
    if _has_capability(_CAP_SYS_PTRACE):
        yield Check("CAP_SYS_PTRACE", "ok", "held")
    else:
        hint = "a client of another user that outlives its runner cannot be seen: `recover` waits"
        yield Check("CAP_SYS_PTRACE", "warning", "not held", hint)
    problem = _namespace_problem()
    if problem:
        hint = "in a container, allow mounts; `--layout tree` needs no namespace"
        yield Check("mount namespace", "missing", problem, hint)
    else:
        yield Check("mount namespace", "ok", "can be made")


def _has_capability(number: int) -> bool:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return os.geteuid() == 0
    return bool(int(_first(r"^CapEff:\s*([0-9a-f]+)$", status) or "0", 16) >> number & 1)


def _namespace_problem() -> str | None:
    """Try, in a child, to make a mount namespace; return why it cannot be, or None."""
    try:
        tried = process.run([sys.executable, "-I", "-c", _NAMESPACE_TEST], timeout_s=_ASK_S)
    except AtomtxError as exc:
        return exc.message
    return None if tried.ok else tried.last_line()


# -- the journal -------------------------------------------------------------------------------


def _state_directory(state: Path) -> Iterator[Check]:
    try:
        statedir.check(state)
    except FileNotFoundError:
        yield Check("state directory", "note", f"{state} is not there; the first backup makes it")
        return
    except AtomtxError as exc:
        yield Check("state directory", "missing", exc.message, exc.hint)
        return
    kind = statedir.file_system(state)
    where = f"{state} ({kind or 'unknown file system'})"
    if statedir.is_in_memory(kind):
        hint = f"it is in memory: {statedir.LOST}; {journalfile.ELSEWHERE}"
        yield Check("state directory", "warning", where, hint)
    else:
        yield Check("state directory", "ok", where)
    if kind == "zfs":
        yield from _zfs_settings(state)


def _zfs_settings(state: Path) -> Iterator[Check]:
    said = _ask("zfs", "get", "-H", "-o", "value", "sync,refreservation", str(state)).split("\n")
    sync, reserved = [*said, "", ""][:2]
    if sync == "disabled":
        hint = "`zfs inherit sync` there: a power cut can undo what the journal was promised"
        yield Check("state directory", "warning", "its dataset has sync=disabled", hint)
    if reserved in ("none", "0"):
        hint = "a dataset of its own with refreservation=64M keeps room when the pool is full"
        yield Check("state directory", "note", "its dataset has no reservation", hint)


def _journal(state: Path) -> Iterator[Check]:
    for path in aside.damaged(state):
        hint = "`atomtx recover --scan` lists what its runs left; move it away when you are done"
        yield Check("journal", "warning", f"a damaged one lies aside at {path}", hint)
    path = state / journalfile.NAME
    try:
        report = audit.check(state)
        unfinished = len(history.open_runs(path)) if report.ok else 0
    except JournalError as exc:
        yield Check("journal", "missing", exc.message, exc.hint)
        return
    except AtomtxError as exc:  # another user's
        yield Check("journal", "warning", exc.message, exc.hint)
        return
    for finding in report.findings:
        status = "missing" if finding.kind == audit.DAMAGE else "note"
        yield Check("journal", status, finding.text, "`atomtx journal check`; docs/recovery.md")
    settings = ", ".join(journalfile.PRAGMAS)
    if not report.exists:
        yield Check("journal", "note", f"{path} is not there; the first backup makes it")
    elif report.ok:
        yield Check("journal", "ok", f"healthy, version {report.version}; {settings}")
    if unfinished:
        hint = "`atomtx status` tells more"
        yield Check("runs", "note", f"{unfinished} not ended", hint)


# -- asking ------------------------------------------------------------------------------------


def _ask(*argv: str, env: Mapping[str, str] | None = None) -> str:
    """
    Return what a program prints; empty where it is not there.

    Its exit status says little: `zfs version` prints the userland's and then fails, where the
    module is not loaded.
    """
    try:
        return process.run(argv, env=env, timeout_s=_ASK_S).stdout
    except AtomtxError:
        return ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""


def _configuration(_: Path) -> Iterator[Check]:
    path = config.find()
    if not config.is_there():
        yield Check("configuration", "note", f"{path} is absent", "`atomtx config init` writes one")
        return
    try:
        found = config.load(path)
    except AtomtxError as exc:
        first = exc.message.splitlines()[0]
        yield Check("configuration", "warning", first, "see `atomtx config check`")
        return
    problems = problems_of(found)
    for problem in problems:
        yield Check("configuration", "warning", str(problem))
    if not problems:
        yield Check("configuration", "ok", f"{path}, jobs: {', '.join(found.jobs) or 'none'}")


_LOOKS: tuple[Callable[[Path], Iterator[Check]], ...] = (
    _python,
    _zfs,
    _btrfs,
    _lvm,
    _programs,
    _clients,
    _rights,
    _state_directory,
    _journal,
    _configuration,
)
