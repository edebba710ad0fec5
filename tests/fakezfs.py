"""
Stands for zfs(8) and zpool(8): pools in a JSON file, for tests that run without a machine.

It is a program, because a test kills what it starts, and lock F is passed on to it.  It knows the
commands that the engine uses, and answers as OpenZFS 2.3 does; what ZFS itself does is tested in
the virtual machine alone.  Faults are the test's wish, in "faults" by command:

    "refuse"   it fails, and has done nothing        "skew"     a transaction group a snapshot
    "silent"   it does nothing, and says that it did "foreign"  somebody else's have these names
    "busy"     it answers that they are in use       "wait"     until there is a file "go"
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("FAKE_ZFS", "/nonexistent"))
MARK = "atomtx:run"


def main(program: str, argv: list[str]) -> int:
    """Answer one command."""
    pool: dict[str, Any] = json.loads((HOME / "pool.json").read_text())
    with open(HOME / "zfs.log", "a") as log:
        log.write(json.dumps([program, *argv]) + "\n")
    status = _answer(pool, program, argv)
    new = HOME / f"pool.{os.getpid()}"
    new.write_text(json.dumps(pool))
    new.replace(HOME / "pool.json")
    return status


def _answer(pool: dict[str, Any], program: str, argv: list[str]) -> int:
    if program == "zpool":
        for name, guid in pool["pools"].items():
            print(name, guid, "ONLINE", sep="\t")
        return 0
    verb, words = argv[0], argv[1:]
    fault = pool["faults"].get(verb)
    if fault == "silent":
        return 0
    while fault == "wait" and not (HOME / "go").exists():
        time.sleep(0.05)
    if fault == "refuse":
        print(f"cannot {verb}: out of luck", file=sys.stderr)
        return 1
    if verb == "get":
        return _get(pool, words)
    if verb == "holds":
        return _holds(pool, words[1:])
    if verb == "snapshot":
        return _snapshot(pool, words[1].partition("=")[2], words[2:], fault)
    if verb in ("hold", "release"):
        return _hold(pool, verb, words[0], words[1:])
    if verb == "destroy":
        return _destroy(pool, words)
    if verb == "program":
        return _program(pool, words[7], words[8], words[9:], fault)
    raise SystemExit(f"fakezfs knows no {argv}")


def _get(pool: dict[str, Any], words: list[str]) -> int:
    if "-r" in words:  # the marks of whole pools
        for name, snapshot in pool["snapshots"].items():
            if snapshot["mark"] and name.split("/")[0] in words:
                print(name, snapshot["mark"], sep="\t")
        return 0
    wanted, names = words[3], words[4:]
    status = 0
    for name in names:
        if wanted in ("keystatus", "clones"):
            print(name, "-", sep="\t")
            continue
        found = pool["snapshots"].get(name)
        if found is None:
            print(f"cannot open '{name}': snapshot does not exist", file=sys.stderr)
            status = 1
            continue
        for prop in ("guid", "createtxg", "creation"):
            print(name, prop, found[prop], "-", sep="\t")
        print(name, MARK, found["mark"] or "-", "local" if found["mark"] else "-", sep="\t")
    return status


def _holds(pool: dict[str, Any], names: list[str]) -> int:
    found = [name for name in names if name in pool["snapshots"]]
    for name in found:
        for tag in pool["snapshots"][name]["holds"]:
            print(name, tag, "Sat Nov 21 07:00 2026", sep="\t")
    for name in names:
        if name not in found:
            print(f"cannot open '{name}': dataset does not exist", file=sys.stderr)
    if not found:
        print("no datasets available", file=sys.stderr)
    return int(len(found) < len(names))


def _snapshot(pool: dict[str, Any], mark: str, names: list[str], fault: str | None) -> int:
    if any(name in pool["snapshots"] for name in names):
        print("cannot create snapshot: dataset already exists", file=sys.stderr)
        return 1
    pool["txg"] += 1
    for name in names:
        pool["txg"] += fault == "skew"
        pool["guid"] += 1
        dataset = name.partition("@")[0]
        pool["snapshots"][name] = {
            "guid": str(pool["guid"]),
            "createtxg": str(pool["txg"]),
            "creation": str(pool["now"]),
            "mark": "another" if fault == "foreign" else mark,
            "kept": None,
            "holds": [],
        }
        import shutil  # half of the time that this program takes to start

        shutil.copytree(
            HOME / "live" / dataset, stored(name), symlinks=True, ignore=_without_children(dataset)
        )
    return 0


def _without_children(dataset: str) -> Callable[[str, list[str]], list[str]]:
    """Leave the directories of other datasets empty, where the table of mounts is played too."""
    mounts = HOME / "mounts.json"
    table = json.loads(mounts.read_text())["mounts"] if mounts.exists() else []
    others = {entry["node"] for entry in table if entry["special"] != dataset}
    return lambda directory, names: names if directory in others else []


def _hold(pool: dict[str, Any], verb: str, tag: str, names: list[str]) -> int:
    status = 0
    for name in names:
        holds = pool["snapshots"].get(name, {}).get("holds")
        if holds is None or (tag in holds) == (verb == "hold"):
            print(f"cannot {verb} '{name}'", file=sys.stderr)
            status = 1
        elif verb == "hold":
            holds.append(tag)
        else:
            holds.remove(tag)
    return status


def _program(pool: dict[str, Any], verb: str, run: str, words: list[str], fault: str | None) -> int:
    """Answer as destroy.lua does."""
    answers = [
        _judge(pool, verb, run, *words[i : i + 3], fault=fault) for i in range(0, len(words), 3)
    ]
    print(json.dumps({"return": {str(n): answer for n, answer in enumerate(answers, 1)}}))
    return 0


def _destroy(pool: dict[str, Any], words: list[str]) -> int:
    """Destroy one snapshot as FreeBSD does, where it unmounts it by force first."""
    import fakefreebsd  # type: ignore[import-not-found]

    (name,) = words
    if name not in pool["snapshots"]:
        print("could not find any snapshots to destroy; check snapshot names.", file=sys.stderr)
        return 1
    if pool["snapshots"][name]["holds"] or not fakefreebsd.force_off(name):
        print(f"cannot destroy snapshot {name}: dataset is busy", file=sys.stderr)
        return 1
    del pool["snapshots"][name]
    return 0


def _judge(
    pool: dict[str, Any], verb: str, run: str, name: str, guid: str, txg: str, *, fault: str | None
) -> str:
    found = pool["snapshots"].get(name)
    if found is None:
        return "absent"
    number = int(found["guid"])  # unsigned; to a channel program it is not
    signed = number - 2**64 if number >= 2**63 else number
    if (f"g{signed}", f"t{found['createtxg']}") != (guid, txg):
        return "foreign"
    if found["mark"] != run:
        return "unmarked"
    if verb == "keep":
        found["mark"], found["kept"] = None, run
    elif found["holds"] or fault == "busy" or _is_mounted(name):
        return "error 16"
    else:
        del pool["snapshots"][name]
    return "done"


def _is_mounted(name: str) -> bool:
    mounts = HOME / "mounts.json"
    if mounts.exists():  # FreeBSD's are played: a channel program does not unmount (zcp_synctask.c)
        return any(entry["special"] == name for entry in json.loads(mounts.read_text())["mounts"])
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if f" {name} " in Path("/proc", pid, "mountinfo").read_text():
                return True
        except OSError:
            continue
    return False


def stored(snapshot: str) -> Path:
    """Return where the files of a snapshot are kept."""
    return HOME / "frozen" / snapshot.replace("/", "%")
