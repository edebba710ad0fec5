"""
Stands for zfs(8) and zpool(8): pools in a JSON file, for tests that run without a machine.

It is a program, because a test kills what it starts, and lock F is passed on to it.  It knows the
commands that the engine uses, and answers as OpenZFS 2.3 does; what ZFS itself does is tested in
the virtual machine alone.  Faults are the test's wish, in "faults" by command:

    "refuse"   it fails, and has done nothing        "skew"     a transaction group a snapshot
    "silent"   it does nothing, and says that it did "foreign"  somebody else's have these names
    "busy"     it answers that they are in use       "wait"     until there is a file "go"
    "export"   somebody exports all pools before it

Of "zpool" there is "refuse" alone: the module is not loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False  # typing and pathlib take longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HOME = os.environ.get("FAKE_ZFS", "/nonexistent")
MARK, KEPT, TRANSIENT = "atomtx:run", "atomtx:kept", "atomtx:transient"


def main(program: str, argv: list[str]) -> int:
    """Answer one command."""
    before = _read("pool.json")
    pool: dict[str, Any] = json.loads(before)
    with open(f"{HOME}/zfs.log", "a") as log:
        log.write(json.dumps([program, *argv]) + "\n")
    status = _answer(pool, program, argv)
    after = json.dumps(pool)
    if after != before:  # else it would undo what was changed while it looked
        new = f"{HOME}/pool.{os.getpid()}"
        with open(new, "w") as file:
            file.write(after)
        os.replace(new, f"{HOME}/pool.json")
    return status


def _read(name: str) -> str:
    with open(f"{HOME}/{name}") as file:
        return file.read()


def _answer(pool: dict[str, Any], program: str, argv: list[str]) -> int:
    if program == "zpool" and pool["faults"].get("zpool") == "refuse":
        print("The ZFS modules are not loaded.", file=sys.stderr)
        return 1
    if program == "zpool":
        for name, guid in pool["pools"].items():
            print(name, guid, pool.get("health", {}).get(name, "ONLINE"), sep="\t")
        return 0
    verb, words = argv[0], argv[1:]
    fault = pool["faults"].get(verb)
    if fault == "silent":
        if verb == "receive":
            sys.stdin.read()
        return 0
    while fault == "wait" and not os.path.exists(f"{HOME}/go"):
        time.sleep(0.05)
    if fault == "refuse":
        print(f"cannot {verb}: out of luck", file=sys.stderr)
        return 1
    if verb in ("send", "receive", "rollback", "set") or argv[:4] == ["list", "-Hp", "-d", "1"]:
        return _of_streams(pool, verb, words)
    if verb == "list":
        return _list(pool, words[-1])
    if verb == "get":
        return _get(pool, words)
    if verb == "holds":
        return _holds(pool, words[1:])
    if verb == "snapshot":
        transient = words.pop(words.index("-o", 1) + 1) if words.count("-o") > 1 else ""
        names = words[2 + bool(transient) :]
        return _snapshot(pool, words[1].partition("=")[2], names, fault, transient)
    if verb in ("hold", "release"):
        return _hold(pool, verb, words[0], words[1:])
    if verb == "destroy":
        return _destroy(pool, words)
    if fault == "export":
        pool["pools"] = {}
    if verb == "program" and words[5] not in pool["pools"]:
        print(f"cannot open '{words[5]}': no such pool", file=sys.stderr)
        return 1
    if verb == "program" and words[6].endswith("prune.lua"):
        return _prune(pool, words[7], words[8:], fault)
    if verb == "program":
        return _program(pool, words[7], words[8], words[9:], fault)
    raise SystemExit(f"fakezfs knows no {argv}")


def _of_streams(pool: dict[str, Any], verb: str, words: list[str]) -> int:
    import fakesend  # type: ignore[import-not-found]  # it takes its time

    if verb == "list":
        types, columns, names = words[4].split(","), words[6].split(","), words[7:]
        return int(fakesend.list_points(pool, types, columns, names))
    work, *given = {
        "send": (fakesend.send, words),
        "receive": (fakesend.receive, words, HOME),
        "rollback": (fakesend.roll_back, words[0]),
        "set": (fakesend.mark, words[0].partition("=")[2], words[1:]),
    }[verb]
    return int(fakesend.said(work, pool, *given))


def _list(pool: dict[str, Any], top: str) -> int:
    for name, kind in pool["datasets"].items():
        if name.split("/")[0] == top:
            print(name, kind, f"guid of {name}", f"/{name}", "on", "yes", "-", sep="\t")
    return 0


def _get(pool: dict[str, Any], words: list[str]) -> int:
    if "-d" in words:
        return _snapshots_of(pool, words[words.index("-o") + 3 :])
    if "-r" in words and "-s" not in words:  # all snapshots of whole pools
        pools = words[words.index("-o") + 3 :]
        for name, snapshot in pool["snapshots"].items():
            if _pool_of(name) in pools:
                _print_proof(name, snapshot)
        return 0
    if "-r" in words:  # the marks of whole pools
        mark = "kept" if KEPT in words else "mark"
        for name, snapshot in pool["snapshots"].items():
            if snapshot[mark] and not snapshot.get("received") and _pool_of(name) in words:
                print(name, snapshot[mark], sep="\t")
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
        if wanted == "used":
            print(name, "4096", sep="\t")
        else:
            _print_proof(name, found)
    return status


def _pool_of(name: str) -> str:
    return name.split("/")[0].split("@")[0]


def _print_proof(name: str, found: dict[str, Any]) -> None:
    for prop in ("guid", "createtxg", "creation"):
        print(name, prop, found[prop], "-", sep="\t")
    print(name, MARK, found["mark"] or "-", "local" if found["mark"] else "-", sep="\t")


def _snapshots_of(pool: dict[str, Any], datasets: list[str]) -> int:
    away = [dataset for dataset in datasets if dataset.split("/")[0] not in pool["pools"]]
    for dataset in away:
        print(f"cannot open '{dataset}': dataset does not exist", file=sys.stderr)
    for name, found in pool["snapshots"].items():
        if name.partition("@")[0] not in datasets or name.partition("@")[0] in away:
            continue
        for prop in ("guid", "createtxg", "creation"):
            print(name, prop, found[prop], "-", sep="\t")
        print(name, "userrefs", len(found["holds"]), "-", sep="\t")
        print(name, "clones", ",".join(found.get("clones", ())), "-", sep="\t")
        source = "received" if found.get("received") else "local"
        print(name, KEPT, found["kept"] or "-", source if found["kept"] else "-", sep="\t")
        value, _, source = found.get("transient", "- -").partition(" ")  # "RUN inherited from ..."
        print(name, TRANSIENT, value, source or "local", sep="\t")
    return int(bool(away))


def _holds(pool: dict[str, Any], names: list[str]) -> int:
    if not names:
        print("missing dataset argument\nusage:", file=sys.stderr)
        return 2
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


def _snapshot(
    pool: dict[str, Any], mark: str, names: list[str], fault: str | None, transient: str
) -> int:
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
        if transient:
            pool["snapshots"][name]["transient"] = transient.removeprefix(f"{TRANSIENT}=")
        import shutil  # half of the time that this program takes to start

        shutil.rmtree(stored(name), ignore_errors=True)  # of one of that name that was destroyed
        shutil.copytree(
            f"{HOME}/live/{dataset}",
            stored(name),
            symlinks=True,
            ignore=_without_children(dataset),
        )
    return 0


def _without_children(dataset: str) -> Callable[[str, list[str]], list[str]]:
    """Leave the directories of other datasets empty, where the table of mounts is played too."""
    others = {entry["node"] for entry in _mounts() or () if entry["special"] != dataset}
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


def _prune(pool: dict[str, Any], bookmark: str, words: list[str], fault: str | None) -> int:
    """Answer as prune.lua does."""
    answers = [
        _pruned(pool, bookmark, *words[i : i + 4], fault=fault) for i in range(0, len(words), 4)
    ]
    print(json.dumps({"return": {str(n): answer for n, answer in enumerate(answers, 1)}}))
    return 0


def _pruned(
    pool: dict[str, Any],
    bookmark: str,
    name: str,
    guid: str,
    txg: str,
    kept: str,
    *,
    fault: str | None,
) -> str:
    found = pool["snapshots"].get(name)
    if found is None:
        return "absent"
    number = int(found["guid"])
    signed = number - 2**64 if number >= 2**63 else number
    if (f"g{signed}", f"t{found['createtxg']}") != (guid, txg):
        return "foreign"
    is_transient = found.get("transient") == found["kept"]
    if kept not in ("k", "r", *(f"{how}{found['kept']}" for how in "krt"[: 2 + is_transient])):
        return "unmarked"
    if found["holds"] or found.get("clones") or fault == "busy":
        return "error 16"
    if fault == "eio" and name == min(pool["snapshots"]):
        return "error 5"
    if bookmark == "bookmark" and fault != "full":
        facts = {key: found[key] for key in ("guid", "createtxg")}
        pool.setdefault("bookmarks", {})[name.replace("@", "#")] = facts
    del pool["snapshots"][name]
    return "no-bookmark" if fault == "full" and bookmark == "bookmark" else "done"


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
        return "done" if verb == "keep" and found["kept"] == run else "unmarked"
    if verb == "keep":
        found["mark"], found["kept"] = None, run
    elif found["holds"] or fault == "busy" or _is_mounted(name):
        return "error 16"
    else:
        del pool["snapshots"][name]
    return "done"


def _is_mounted(name: str) -> bool:
    table = _mounts()
    if table is not None:  # a channel program does not unmount (zcp_synctask.c)
        return any(entry["special"] == name for entry in table)
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/mountinfo") as file:
                if f" {name} " in file.read():
                    return True
        except OSError:
            continue
    return False


def _mounts() -> list[dict[str, Any]] | None:
    """Return the mounts where they are played, as FreeBSD's are; else None."""
    if not os.path.exists(f"{HOME}/mounts.json"):
        return None
    found: list[dict[str, Any]] = json.loads(_read("mounts.json"))["mounts"]
    return found


def stored(snapshot: str) -> str:
    """Return where the files of a snapshot are kept."""
    return f"{HOME}/frozen/{snapshot.replace('/', '%')}"
