"""
The streams of `tests/fakezfs.py`: `zfs send`, `zfs receive`, and what is left of one cut off.

A stream is lines of JSON: for each snapshot where it begins, BLOCKS blocks, and its end.  What is
refused is what OpenZFS 2.3 refuses, in its words.  Faults:

    send      "stall DATASET"   half of its first snapshot, then nothing until nobody reads it
    receive   "kill COPY"       at that half, it kills the front end, and reads on
              "signal COPY"     it sends the front end a SIGTERM instead
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

import faketoken  # type: ignore[import-not-found]

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Pool = dict[str, Any]

BLOCKS = faketoken.BLOCKS
_HALF = BLOCKS // 2
_BLOCK = "x" * 100


class Refused(Exception):
    """What goes to stderr; the exit status is 1."""


def said(work: Any, *args: Any) -> int:
    """Return the exit status of what is refused, or done."""
    try:
        work(*args)
    except Refused as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


# -- what there is -----------------------------------------------------------------------------


def snapshots(pool: Pool, dataset: str) -> list[str]:
    """Return the snapshots of a dataset, the oldest first."""
    found = [name for name in pool["snapshots"] if name.partition("@")[0] == dataset]
    return sorted(found, key=lambda name: int(pool["snapshots"][name]["createtxg"]))


def facts(pool: Pool, dataset: str) -> Pool:
    """Return what is known of a dataset but its kind: "encryption", "token", "modified"."""
    found: Pool = pool.setdefault("facts", {}).setdefault(dataset, {})
    return found


def is_imported(pool: Pool, name: str) -> bool:
    return name.partition("@")[0].partition("#")[0].split("/")[0] in pool["pools"]


def list_points(pool: Pool, types: list[str], columns: list[str], names: list[str]) -> int:
    """Answer `zfs list -d 1`: datasets, their children, and what they have of points in time."""
    away = [n for n in names if n not in pool["datasets"] or not is_imported(pool, n)]
    for name in away:
        print(f"cannot open '{name}': dataset does not exist", file=sys.stderr)
    there = set(names) - set(away)
    rows = [(n, k) for n, k in pool["datasets"].items() if there & {n, n.rpartition("/")[0]}]
    rows += [(n, "snapshot") for n in pool["snapshots"] if n.partition("@")[0] in there]
    rows += [(n, "bookmark") for n in pool.get("bookmarks", ()) if n.partition("#")[0] in there]
    for name, kind in rows:
        if kind in types:
            print(*(_column(pool, name, kind, column) for column in columns), sep="\t")
    return int(bool(away))


def _column(pool: Pool, name: str, kind: str, column: str) -> str:
    if column in ("name", "type"):
        return name if column == "name" else kind
    point = {**pool["snapshots"], **pool.get("bookmarks", {})}.get(name)
    if column in ("encryption", "receive_resume_token"):
        known = {} if point else pool.get("facts", {}).get(name, {})
        if column == "encryption":
            return str(known.get("encryption", "off"))
        return str(known.get("token", "-"))
    if point is None:
        return {"guid": f"guid of {name}", "createtxg": "1"}.get(column, "-")
    if column == "userrefs":
        return str(len(point["holds"])) if kind == "snapshot" else "-"
    return str(point.get({"atomtx:kept": "kept"}.get(column, column)) or "-")


def roll_back(pool: Pool, name: str) -> None:
    dataset = name.partition("@")[0]
    if snapshots(pool, dataset)[-1:] != [name]:
        raise Refused(
            f"cannot rollback to '{name}': more recent snapshots or bookmarks exist\n"
            "use '-r' to force deletion of the following snapshots and bookmarks:"
        )
    facts(pool, dataset)["modified"] = False


def mark(pool: Pool, kept: str, names: list[str]) -> None:
    for name in names:
        if name not in pool["snapshots"]:
            raise Refused(f"cannot open '{name}': dataset does not exist")
        pool["snapshots"][name] |= {"kept": kept, "received": False}


# -- send --------------------------------------------------------------------------------------


def send(pool: Pool, words: list[str]) -> None:
    """Write a stream, or with -nP its size."""
    is_dry = words[0] == "-nP"
    raw, steps = _asked(pool, words[is_dry:])
    if is_dry:
        print("size", sum(BLOCKS - done for *_, done in steps) * len(_BLOCK), sep="\t")
        return
    try:
        for line in _stream(pool, raw, steps):
            os.write(1, (json.dumps(line) + "\n").encode())
            if _stalls(pool, steps, line):
                _await_end()
    except BrokenPipeError:
        raise Refused(f"warning: cannot send '{steps[0][0]}': Broken pipe") from None


def _asked(pool: Pool, words: list[str]) -> tuple[bool, list[tuple[str, str, int]]]:
    """Return whether it is raw, and for each snapshot its name, its base's guid, what is there."""
    if words[0] == "-t":
        wish = faketoken.unpacked(words[1])
        _there(pool, wish["toname"])
        done = int(wish["bytes"])
        return "rawok" in wish, [(wish["toname"], wish.get("fromguid", ""), done)]
    flags, *base, to = words
    _there(pool, to)
    if not base:
        return "w" in flags, [(to, "", 0)]
    begins = {**pool["snapshots"], **pool.get("bookmarks", {})}.get(base[1])
    if begins is None:
        raise Refused(f"cannot send '{to}': incremental source ({base[1]}) does not exist")
    wanted = [to]
    if base[0] == "-I":
        row = snapshots(pool, to.partition("@")[0])
        wanted = row[row.index(base[1]) + 1 : row.index(to) + 1]
    bases = [begins["guid"], *(pool["snapshots"][name]["guid"] for name in wanted)]
    return "w" in flags, [(name, base, 0) for name, base in zip(wanted, bases, strict=False)]


def _there(pool: Pool, name: str) -> None:
    if name not in pool["snapshots"] or not is_imported(pool, name):
        raise Refused(f"cannot open '{name}': snapshot does not exist")


def _stream(pool: Pool, raw: bool, steps: list[tuple[str, str, int]]) -> Iterator[Pool]:
    for name, base, done in steps:
        found = pool["snapshots"][name]
        dataset = name.partition("@")[0]
        yield {
            "begin": name,
            "guid": found["guid"],
            "base": base,
            "raw": raw,
            "done": done,
            "kind": pool["datasets"][dataset],
            "encryption": facts(pool, dataset).get("encryption", "off") if raw else "off",
            # The properties come at its head: the rest of one that was cut off has none.
            "kept": None if done else found["kept"],
        }
        for n in range(done, BLOCKS):
            yield {"block": n, "text": _BLOCK}
        yield {"end": name}
    yield {"over": True}


def _stalls(pool: Pool, steps: list[tuple[str, str, int]], line: Pool) -> bool:
    name, _, done = steps[0]
    fault = f"stall {name.partition('@')[0]}"
    return pool["faults"].get("send") == fault and done == 0 and line.get("block") == _HALF - 1


def _await_end() -> None:
    poll = select.poll()
    poll.register(1, 0)
    poll.poll()
    raise BrokenPipeError


# -- receive -----------------------------------------------------------------------------------


def receive(pool: Pool, words: list[str], home: str) -> None:
    """Read a stream into a copy; at its untimely end keep what there is of it."""
    copy = words[-1]
    if words[0] == "-A":
        _abort(pool, copy)
        return
    if "-s" not in words or "-u" not in words or "-F" in words:
        raise SystemExit(f"fakezfs receives nothing with {words}")
    marks: dict[str, str | None] = {}
    now: Pool = {}
    blocks = 0
    for line in map(json.loads, sys.stdin):
        if "begin" in line:
            now, blocks = line, line["done"]
            _check(pool, copy, now)
        elif "block" in line:
            assert line["block"] == blocks, "not where it was cut off"
            blocks += 1
            _play(pool["faults"].get("receive", ""), copy, blocks)
        elif "end" in line:
            marks[_arrived(pool, copy, now)] = now["kept"]
            _log(home, copy, now, blocks - now["done"])
            now = {}
        elif "over" in line:
            for name, kept in marks.items():
                pool["snapshots"][name] |= {"kept": kept, "received": bool(kept)}
            return
    _cut_off(pool, copy, now, blocks, home)


def _check(pool: Pool, copy: str, now: Pool) -> None:
    kind = "incremental" if now["base"] else "new filesystem"
    parent = copy.rpartition("/")[0]
    token = faketoken.unpacked(facts(pool, copy)["token"]) if facts(pool, copy).get("token") else {}
    if not is_imported(pool, copy) or (parent and parent not in pool["datasets"]):
        raise Refused(
            f"cannot open '{parent or copy}': dataset does not exist\n"
            f"cannot receive {kind} stream: unable to restore to destination"
        )
    if token:
        if (token["toguid"], token["bytes"]) != (now["guid"], str(now["done"])):
            raise Refused(
                f"cannot receive {kind} stream: destination {copy} contains\n"
                'partially-complete state from "zfs receive -s".'
            )
    elif now["done"]:
        raise Refused("cannot receive resume stream: there is nothing to resume")
    elif not now["base"] and copy in pool["datasets"]:
        raise Refused(
            f"cannot receive new filesystem stream: destination '{copy}' exists\n"
            "must specify -F to overwrite it"
        )
    if now["base"]:
        _check_base(pool, copy, now)


def _check_base(pool: Pool, copy: str, now: Pool) -> None:
    if copy not in pool["datasets"]:
        raise Refused(f"cannot receive incremental stream: destination '{copy}' does not exist")
    row = snapshots(pool, copy)
    if not row or pool["snapshots"][row[-1]]["guid"] != now["base"]:
        raise Refused(
            f"cannot receive incremental stream: most recent snapshot of {copy} does not\n"
            "match incremental source"
        )
    if facts(pool, copy).get("modified"):
        raise Refused(
            f"cannot receive incremental stream: destination {copy} has been modified\n"
            "since most recent snapshot"
        )


def _play(fault: str, copy: str, blocks: int) -> None:
    kind, _, wanted = fault.partition(" ")
    number = {"kill": signal.SIGKILL, "signal": signal.SIGTERM}.get(kind)
    if number and wanted == copy and blocks == _HALF:
        os.kill(int(os.environ.get("FAKE_FRONT") or os.getppid()), number)


def _made(pool: Pool, copy: str, now: Pool) -> None:
    pool["datasets"][copy] = now["kind"]
    if now["encryption"] != "off":
        facts(pool, copy)["encryption"] = now["encryption"]


def _arrived(pool: Pool, copy: str, now: Pool) -> str:
    _made(pool, copy, now)
    facts(pool, copy).pop("token", None)
    name = f"{copy}@{now['begin'].partition('@')[2]}"
    pool["txg"] += 1
    pool["snapshots"][name] = {
        "guid": now["guid"],
        "createtxg": str(pool["txg"]),
        "creation": str(pool["now"]),
        "mark": None,
        "kept": None,
        "holds": [],
    }
    return name


def _cut_off(pool: Pool, copy: str, now: Pool, blocks: int, home: str) -> None:
    if not now:
        raise Refused("cannot receive: failed to read from stream")
    _made(pool, copy, now)
    token = faketoken.made(
        now["begin"], done=blocks, to=now["guid"], base=now["base"], raw=now["raw"]
    )
    facts(pool, copy)["token"] = token
    _log(home, copy, now, blocks - now["done"])
    raise Refused(
        "cannot receive incremental stream: checksum mismatch or incomplete stream.\n"
        "Partially received snapshot is saved.\n"
        "A resuming stream can be generated on the sending system by running:\n"
        f"    zfs send -t {token}"
    )


def _abort(pool: Pool, copy: str) -> None:
    if not facts(pool, copy).pop("token", None):
        raise Refused(f"'{copy}' does not have any resumable receive state to abort")
    if not snapshots(pool, copy):
        del pool["datasets"][copy], pool["facts"][copy]


def _log(home: str, copy: str, now: Pool, blocks: int) -> None:
    with open(f"{home}/arrived.log", "a") as log:
        log.write(json.dumps([copy, now["guid"], blocks]) + "\n")
