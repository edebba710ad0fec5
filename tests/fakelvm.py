"""
Stands for lvs, vgs, lvcreate, lvchange, lvremove and dmsetup, for tests without a machine.

Volume groups are in a JSON file.  It is a program, because lock F is passed on to it.  It knows
the commands that the engine uses, and says what LVM 2.03.31 says; what LVM itself does is tested
in the virtual machine alone.  What could touch more than one volume that was proven is not
answered: a bare group, a name without a selection.

Faults are the test's wish, in "faults" by command: "refuse" fails and has done nothing, "silent"
does nothing and says that it did, "half" is an `lvcreate` that was killed, "late" is a command that
was killed when all but the resumption of an origin was done, "unplug" has the disk
of all groups taken away, "all but one" is an `lvremove` that fails at the last volume, "removed
once" a `dmsetup` that fails once for a device that somebody removed while it looked at all.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from itertools import pairwise
from pathlib import Path

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from typing import Any

    State = dict[str, Any]

HOME = Path(os.environ.get("FAKE_LVM", "/nonexistent"))
PROGRAMS = ("lvs", "vgs", "lvcreate", "lvchange", "lvremove", "dmsetup")
EXTENT = 4 << 20
_PROOF = re.compile(
    r'\(lv_uuid="([^"]+)"((?: && lv_tags=\{"[^"]+"\})*)( && lv_attr!~"\^\[oO\]")?\)'
)
_NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]*")
_LONGEST = 124
# What lvm.conf may have in `report`, as LVM has it without.
_REPORT = {
    "compact_output": "0",
    "compact_output_cols": "",
    "binary_values_as_numeric": "0",
    "list_item_separator": ",",
    "prefixes": "0",
}
_RESERVED = ("_cpool", "_tdata", "_tmeta", "_pmspare", "_rimage")  # some of them


def install(home: Path, groups: dict[str, int]) -> Path:
    """Put the programs into *home*/bin; *groups* tells how many bytes are free in each."""
    from tests.standin import write_program

    uuids = {name: _uuid(f"vg{name}") for name in groups}
    state = {"groups": {n: {"uuid": uuids[n], "free": free} for n, free in groups.items()}}
    write(home, state | {"volumes": {}, "suspended": [], "faults": {}, "status": {}, "next": 1})
    (home / "bin").mkdir(exist_ok=True)
    for name in PROGRAMS:
        write_program(home / "bin" / name, "fakelvm", f"{name!r}, sys.argv[1:]")
    return home / "bin"


def _uuid(text: str) -> str:
    """Return a UUID as LVM writes them, from what somebody who reads a failure knows again."""
    plain = re.sub(r"\W", "", text).ljust(32, "z")[:32]
    ends = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(plain[a:b] for a, b in pairwise(ends))


def read(home: Path) -> State:
    found: State = json.loads((home / "lvm.json").read_text())
    return found


def write(home: Path, state: State) -> None:
    new = home / f"lvm.{os.getpid()}"
    new.write_text(json.dumps(state))
    new.replace(home / "lvm.json")


def add(home: Path, path: str, **values: Any) -> str:
    """Make a logical volume; return its UUID."""
    state = read(home)
    uuid = _make(state, path, **values)
    write(home, state)
    return uuid


def _make(state: State, path: str, **values: Any) -> str:
    n = state["next"]
    state["next"] += 1
    uuid = _uuid(f"lv{n:04d}{path}")
    given = {"attr": "-wi-ao----", "tags": [], "size": 1 << 30, "origin": "", "pool": ""}
    made = {"uuid": uuid, "minor": n, "time": 1_785_000_000 + n, "invalid": "", "used": False}
    state["volumes"][path] = made | given | values
    return uuid


def main(program: str, argv: list[str]) -> int:
    """Answer one command."""
    state = read(HOME)
    with open(HOME / "lvm.log", "a") as log:
        kind = stat.S_IFMT(os.fstat(0).st_mode)
        log.write(json.dumps([program, *argv, f"stdin={'file' if kind == stat.S_IFREG else ''}"]))
        log.write("\n")
    fault = state["faults"].get(program)
    if fault == "refuse":
        return _fail("out of luck")
    status = 0 if fault == "silent" else _ANSWERS[program](state, argv)
    if fault == "late":
        state["suspended"] = [_device(state, next(p for p in state["volumes"] if "thin" in p))]
    write(HOME, state)
    if fault == "late":
        os.kill(os.getpid(), 9)
    return status


def _fail(text: str, status: int = 5) -> int:
    print(f"  {text}", file=sys.stderr)
    return status


def _report(state: State, argv: list[str], kind: str, rows: list[dict[str, str]]) -> int:
    config = argv[argv.index("--config") + 1] if "--config" in argv else ""
    said = {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', config)}
    how = _REPORT | state.get("report", {}) | said
    columns = argv[argv.index("-o") + 1].split(",")
    rows = [{name: _value(name, row[name], how) for name in columns} for row in rows]
    everywhere = how["compact_output"] == "1"
    compact = columns if everywhere else how["compact_output_cols"].split(",")
    empty = [name for name in compact if not any(row.get(name) for row in rows)]
    rows = [{name: row[name] for name in columns if name not in empty} for row in rows]
    text = json.dumps({"report": [{kind: rows}], "log": []})
    # So LVM 2.03.16 does: what begins with one quotation mark ends with another.
    print(re.sub(r': "([^"]*)"', r": \"\1'", text) if how["prefixes"] == "1" else text)
    return 0


def _value(name: str, value: str, how: dict[str, str]) -> str:
    if name == "lv_tags":
        return value.replace(",", how["list_item_separator"])
    if how["binary_values_as_numeric"] == "1" and name in ("vg_exported", "lv_snapshot_invalid"):
        return {"": "0", "unknown": "-1"}.get(value, "1")
    return value


def _vgs(state: State, argv: list[str]) -> int:
    rows = [
        {
            "vg_name": n,
            "vg_uuid": g["uuid"],
            "vg_missing_pv_count": str(g.get("missing", 0)),
            "vg_exported": g.get("exported", ""),
        }
        for n, g in state["groups"].items()
    ]
    return _report(state, argv, "vg", rows)


def _lvs(state: State, argv: list[str]) -> int:
    rows = [_row(state, path) for path in state["volumes"]]
    return _report(state, argv, "lv", rows)


def _row(state: State, path: str) -> dict[str, str]:
    group, name = path.split("/")
    volume = state["volumes"][path]
    active = volume["attr"][4] != "-"
    origin = state["volumes"].get(f"{group}/{volume['origin']}", {"uuid": ""})
    return {
        "vg_name": group,
        "vg_uuid": state["groups"][group]["uuid"],
        "vg_free": str(state["groups"][group]["free"]),
        "vg_extent_size": str(EXTENT),
        "lv_name": name,
        "lv_uuid": volume["uuid"],
        "lv_tags": ",".join(volume["tags"]),
        "lv_attr": _attr(state, path),
        "lv_size": str(volume["size"]),
        "lv_time": str(volume["time"]),
        "origin": volume["origin"],
        "origin_uuid": origin["uuid"],
        "pool_lv": volume["pool"],
        "lv_snapshot_invalid": volume["invalid"]
        or ("" if "s" in volume["attr"][:1] else "unknown"),
        "lv_kernel_major": "254" if active else "-1",
        "lv_kernel_minor": str(volume["minor"]) if active else "-1",
    }


def _on(state: State, path: str) -> list[str]:
    """Return what cannot be without a volume: a thin volume of its own pool can."""
    group, name = path.split("/")
    pool = state["volumes"][path]["pool"]
    return [
        other
        for other, v in state["volumes"].items()
        if other.startswith(f"{group}/") and v["origin"] == name and v["pool"] != pool
    ]


def _attr(state: State, path: str) -> str:
    attr: str = state["volumes"][path]["attr"]
    return "o" + attr[1:] if _on(state, path) else attr


def _options(argv: list[str], *flags: str) -> tuple[dict[str, list[str]], list[str]]:
    """Part the options, of which *flags* have no value, from the names."""
    found: dict[str, list[str]] = {}
    names, words = [], iter(argv)
    for word in words:
        if word in flags:
            found[word] = []
        elif word.startswith("-"):
            found.setdefault(word, []).append(next(words))
        else:
            names.append(word)
    return found, names


def _lvcreate(state: State, argv: list[str]) -> int:
    options, (path,) = _options(argv, "--yes", "--snapshot")
    group = path.partition("/")[0]
    origin = state["volumes"].get(path)
    (name,) = options["--name"]
    if refused := _refused_name(group, name):
        return refused
    if origin is None:
        return _fail(f'Failed to find logical volume "{path}"')
    if f"{group}/{name}" in state["volumes"]:
        return _fail(f'Logical Volume "{name}" already exists in volume group "{group}"')
    values: dict[str, Any] = {"tags": options["--addtag"], "origin": path.partition("/")[2]}
    assert options["--permission"] == ["r"]
    if origin["pool"]:
        values |= {"attr": "Vri---tz-k", "pool": origin["pool"]}
    else:
        if "--size" not in options:
            return _fail("Please specify either size or extents with snapshots.")
        size = int(options["--size"][0].removesuffix("b"))
        free = state["groups"][group]["free"]
        if size > free:
            counts = f"({free // EXTENT} extents): {size // EXTENT} required."
            return _fail(f'Volume group "{group}" has insufficient free space {counts}')
        state["groups"][group]["free"] -= size
        values |= {"attr": "sri-a-s---", "size": size}
    if state["faults"].get("lvcreate") == "half":
        values |= {"attr": "-wi-a-----", "origin": ""}
        _make(state, f"{group}/{name}", **values)
        write(HOME, state)
        os.kill(os.getpid(), 9)
    _make(state, f"{group}/{name}", **values)
    live = HOME / "live" / path
    if live.exists():
        import shutil

        shutil.rmtree(stored(f"{group}/{name}"), ignore_errors=True)  # of one that was removed
        shutil.copytree(live, stored(f"{group}/{name}"))
    return 0


def _refused_name(group: str, name: str) -> int:
    if not _NAME.fullmatch(name):
        return _fail(f'Logical volume name "{name}" is invalid.', status=3)
    for word in _RESERVED:
        if word in name:
            return _fail(f'Names including "{word}" are reserved.', status=3)
    if len(group + name) > _LONGEST:
        length = len(group + name) + 3
        return _fail(f'Internal error: LV name "{group}/{name}" length {length} is not supported.')
    return 0


def _selected(state: State, options: dict[str, list[str]], names: list[str]) -> list[str]:
    """Return what is selected of *names*; LVM goes on after one that is not there."""
    parts = [_PROOF.fullmatch(part) for part in options["--select"][0].split(" || ")]
    if not all(parts) or not names or any("/" not in name for name in names):
        raise SystemExit(f"this may touch more than was proven: {options} {names}")
    proofs = {part[1]: set(re.findall(r'\{"([^"]+)"\}', part[2])) for part in parts if part}
    no_origins = {part[1] for part in parts if part and part[3]}
    there = [(name, state["volumes"][name]) for name in names if name in state["volumes"]]
    return [
        n
        for n, v in there
        if v["uuid"] in proofs and proofs[v["uuid"]] <= set(v["tags"])
        if v["uuid"] not in no_origins or _attr(state, n)[0] not in "oO"
    ]


def _not_found(state: State, names: list[str]) -> int:
    lost = [name for name in names if name not in state["volumes"]]
    return _fail(f'Failed to find logical volume "{lost[0]}"') if lost else 0


def _in_use(name: str, volume: Any) -> int:
    if volume["used"] == "by a device":
        return _fail(f"Logical volume {name} is used by another device.")
    return _fail(f"Logical volume {name} contains a filesystem in use.")


def _lvremove(state: State, argv: list[str]) -> int:
    options, names = _options(argv, "--yes")
    if state["faults"].get("lvremove") == "unplug":
        state["volumes"] = {}
        return _fail("Volume group not found")
    status = _not_found(state, names)
    selected = _selected(state, options, names)
    if state["faults"].get("lvremove") == "all but one":
        status = _fail(f"Failed to update pool for {selected.pop()}.")
    for name in selected:
        volume = state["volumes"][name]
        below = {n: state["volumes"][n] for n in _on(state, name)}
        if used := next((n for n, v in {name: volume, **below}.items() if v["used"]), None):
            status = _in_use(used, state["volumes"][used])
            continue
        for other in below:  # LVM does not ask the selection of these
            del state["volumes"][other]
        if not volume["pool"]:
            state["groups"][name.partition("/")[0]]["free"] += volume["size"]
        del state["volumes"][name]
        for other in state["volumes"].values():  # a thin snapshot needs its origin for nothing
            if other["pool"] and f"{name.partition('/')[0]}/{other['origin']}" == name:
                other["origin"] = ""
    return status


def _lvchange(state: State, argv: list[str]) -> int:
    options, names = _options(argv, "--yes", "--ignoreactivationskip", "--refresh")
    status = 0
    if options.get("--activate") == ["n"]:
        for name in _selected(state, options, names):
            volume = state["volumes"][name]
            if volume["used"]:
                status = _in_use(name, volume)
            else:
                volume["attr"] = volume["attr"][:4] + "-" + volume["attr"][5:]
    elif "--select" in options:
        status = _not_found(state, names)
        for name in _selected(state, options, names):
            tags = set(state["volumes"][name]["tags"]) - set(options["--deltag"])
            state["volumes"][name]["tags"] = sorted(tags | set(options["--addtag"]))
    elif "--activate" in options:
        for name in names:
            volume = state["volumes"][name]
            if volume["attr"].endswith("k") and "--ignoreactivationskip" not in options:
                continue
            volume["attr"] = volume["attr"][:4] + "a" + volume["attr"][5:]
    elif "--refresh" not in options or not names:
        raise SystemExit(f"fakelvm knows no lvchange {argv}")
    return status


def device_name(path: str) -> str:
    """Return what device-mapper calls a volume."""
    return "-".join(part.replace("-", "--") for part in path.split("/"))


def _healthy(state: State) -> dict[str, str]:
    active = {p: v for p, v in state["volumes"].items() if v["attr"][4] != "-"}
    words = {"s": "snapshot 16/8192 16", "V": "thin 2048 4095"}
    return {device_name(p): words.get(v["attr"][0], "linear") for p, v in active.items()}


def stored(path: str) -> Path:
    """Return where the files of a snapshot are."""
    return HOME / "stored" / path


def _device(state: State, path: str) -> tuple[str, str, str]:
    """Return the name, the UUID and the minor number of an active volume's device."""
    volume = state["volumes"][path]
    group = state["groups"][path.partition("/")[0]]["uuid"]
    uuid = f"LVM-{group}{volume['uuid']}".replace("-", "").replace("LVM", "LVM-", 1)
    return device_name(path), uuid, str(volume["minor"])


def _dmsetup(state: State, argv: list[str]) -> int:
    if state["faults"].get("dmsetup") == "removed once":
        del state["faults"]["dmsetup"]
        _answer_dmsetup(state, argv)
        return _fail("Device does not exist.\nCommand failed.", 1)
    return _answer_dmsetup(state, argv)


def _answer_dmsetup(state: State, argv: list[str]) -> int:
    if argv[0] == "info":
        for name, uuid, minor in state["suspended"]:
            print(f"{name}|{uuid}|254|{minor}|Suspended")
        print("other-active|LVM-otherother|254|99|Active")
        print("luks-1|CRYPT-LUKS2-1|254|98|Suspended")
        return 0
    if argv[0] == "resume":
        state["suspended"] = [row for row in state["suspended"] if row[0] != argv[1]]
        return 0
    if argv[0] == "status":
        for name, words in {**_healthy(state), **state["status"]}.items():
            print(f"{name}: 0 2097152 {words}")
        return 0
    raise SystemExit(f"fakelvm knows no dmsetup {argv}")


_ANSWERS = {
    "lvs": _lvs,
    "vgs": _vgs,
    "lvcreate": _lvcreate,
    "lvremove": _lvremove,
    "lvchange": _lvchange,
    "dmsetup": _dmsetup,
}
