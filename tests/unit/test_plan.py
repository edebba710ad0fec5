"""The plan of a run: what the journal stores and `--dry-run` prints."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import plan
from atomtx.errors import UserError
from atomtx.intents import (
    EndClient,
    HoldSnapshots,
    Mount,
    MountVolumes,
    Origin,
    RunClient,
    Source,
    TakeSnapshots,
)
from atomtx.names import RunId, is_within
from atomtx.plan import (
    SYSTEM_PATHS,
    Chosen,
    ClientPlan,
    DatasetFacts,
    Existing,
    LeftOut,
    Plan,
    PlannedVolume,
    Pool,
    Request,
    Selection,
)

RUN = RunId("0123456789abcdef")
POOLS = (Pool("tank", "11", "ONLINE"), Pool("zroot", "22", "ONLINE"))
CLIENT = ClientPlan(
    name="restic",
    command=("restic-home",),
    extra=("--tag", "x y"),
    cwd="/root",
    version="0.18.0",
    repository="abc",
    environment=(("HOME", "/root"),),
    secrets=("RESTIC_PASSWORD",),
)


def selection(*volumes: tuple[str, str], asked: tuple[str, ...] = (), **more: Any) -> Selection:
    """Make a selection of (name, mountpoint)."""
    chosen = [
        Chosen(DatasetFacts(name, "filesystem", f"guid of {name}", at, "on", True, "-"), at)
        for name, at in volumes
    ]
    values = {"skipped": (), "uncovered": (), "notes": ()} | more
    return Selection(asked=asked, volumes=tuple(chosen), **values)


def assemble(
    *volumes: tuple[str, str], request: Request | None = None, asked: Any = (), **more: Any
) -> Plan:
    values: dict[str, Any] = {"pools": POOLS, "run": RUN, "client": CLIENT} | more
    request = request or Request(asked, all=not asked)
    return plan.assemble(request, selection(*volumes, asked=asked), **values)


HOME, SRC, BOOT = ("tank/home", "/home"), ("tank/home/src", "/home/src"), ("zroot/boot", "/boot")
ROOT = ("zroot/ROOT", "/")
TREE = Request(("tank/home",), layout="tree", root="/restic/")


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mountpoints", "expected"),
    [
        ((), ()),
        (("/a/b", "/a", "/a/b/c"), ("/a",)),
        (("/a b", "/a", "/a/b", "/a-b/c"), ("/a", "/a b", "/a-b/c")),
        (("/a", "/"), ("/",)),
    ],
)
def test_targets(mountpoints: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """The client is given the topmost mountpoints alone."""
    assert plan.targets(mountpoints) == expected


PATHS = st.lists(st.sampled_from(["a", "b", "a b", "a-", ".a", "ä"]), max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)


@given(st.lists(PATHS))
def test_each_mountpoint_has_one_target(mountpoints: list[str]) -> None:
    """Each mountpoint is within exactly one target, and each target is a mountpoint."""
    tops = plan.targets(mountpoints)
    assert set(tops) <= set(mountpoints)
    for path in mountpoints:
        assert sum(is_within(path, top) for top in tops) == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", "/"), ("//", "/"), ("/a/", "/a"), ("//a//b/./c/..", "/a/b"), ("/..", "/")],
)
def test_normal(path: str, expected: str) -> None:
    """However a path is typed, it is compared in one form."""
    assert plan.normal(path) == expected


# -- assemble ----------------------------------------------------------------------------------


def test_volumes() -> None:
    """A plan names each snapshot that will be taken, with its pool's identity and its own."""
    made = assemble(HOME, BOOT)
    assert made.volumes == (
        PlannedVolume(
            kind="zfs",
            pool="tank",
            pool_guid="11",
            name="tank/home",
            guid="guid of tank/home",
            mountpoint="/home",
            snapshot="tank/home@atomtx-0123456789abcdef",
        ),
        PlannedVolume(
            kind="zfs",
            pool="zroot",
            pool_guid="22",
            name="zroot/boot",
            guid="guid of zroot/boot",
            mountpoint="/boot",
            snapshot="zroot/boot@atomtx-0123456789abcdef",
        ),
    )
    assert made.targets == ("/boot", "/home")
    assert (made.run, made.client) == (RUN, CLIENT)


def test_snapshot_name_that_is_too_long() -> None:
    """A name that ZFS would refuse is refused while nothing has been done."""
    with pytest.raises(UserError, match="too long to be snapshotted"):
        assemble(("tank/" + "a" * 240, "/a"))


def test_job_key() -> None:
    """A job is known again by its datasets, client, repository, command and tree."""
    key = assemble(HOME, BOOT).job
    assert len(key) == 32
    assert int(key, 16)
    assert assemble(BOOT, HOME, run=RunId.new(), notes=["x"], retries=3).job == key
    others = [
        assemble(HOME),
        assemble(HOME, BOOT, request=TREE, asked=("tank/home",)),
        *(
            assemble(HOME, BOOT, client=dataclasses.replace(CLIENT, **change))
            for change in (
                {"name": "kopia"},
                {"repository": None},
                {"command": ("restic-", "home")},
            )
        ),
    ]
    assert len({key, *(other.job for other in others)}) == len(others) + 1


def test_named_job() -> None:
    """A named job is known by its name, whatever it holds; no unnamed job can have its key."""
    named = Request(("tank/home",), job="0123456789abcdef0123456789abcdef")
    made = assemble(HOME, request=named, asked=("tank/home",))
    other = dataclasses.replace(CLIENT, name="kopia", repository=None)
    assert assemble(HOME, BOOT, request=named, asked=("tank/home",), client=other).job == made.job
    assert (made.job, made.label) == (plan.job_key(named.job), named.job)
    assert " " in made.job  # the others are hexadecimal
    renamed = dataclasses.replace(named, job="b")
    assert assemble(HOME, request=renamed, asked=("tank/home",)).job != made.job


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "restic backup"),
        ({"nice": 10}, "nice -n 10 restic backup"),
        ({"io_class": "idle"}, "ionice --class idle restic backup"),
        (
            {"nice": 1, "io_class": "best-effort:7"},
            "nice -n 1 ionice --class best-effort --classdata 7 restic backup",
        ),
    ],
)
def test_prioritized(values: dict[str, Any], words: str) -> None:
    """Niceness and class of I/O come before the client's own words, and only where wanted."""
    made = assemble(HOME, **values)
    assert plan.prioritized(made, ("restic", "backup")) == tuple(words.split())
    assert plan.from_json(plan.to_json(made)) == made


LONG = tuple(f"zroot/usr/home/user{n:02}" for n in range(20))


@pytest.mark.parametrize(
    ("request_", "asked", "label"),
    [
        (Request((), all=True), (), "-a"),
        (Request(("/home",)), ("tank/home",), "tank/home"),
        (Request(("x", "y")), ("tank/x", "tank/y"), "tank/x, tank/y"),
        (Request(("x",), recursive=True), ("tank/x",), "tank/x -r"),
        (Request(LONG), LONG, f"{LONG[0]}, {LONG[1]} and 18 more"),
        (Request(LONG, recursive=True), LONG, f"{LONG[0]}, {LONG[1]} and 18 more -r"),
        (Request(("a" * 90, "b")), ("a" * 90, "b"), "a" * 90 + " and 1 more"),
    ],
)
def test_label(request_: Request, asked: tuple[str, ...], label: str) -> None:
    """A job is called what its user asked for, in one short line."""
    assert assemble(HOME, request=request_, asked=asked).label == label


def test_live_paths() -> None:
    """What the client needs and the set would hide stays live, and is left out and reported."""
    live = ("/home/u/.cache/", "/home/u/.cache/restic", "/home/repo", "/var/lib/atomtx", "/homes")
    made = assemble(HOME, live_paths=live)
    assert made.live_paths == ("/home/repo", "/home/u/.cache")
    assert made.excludes == made.live_paths
    assert made.notes == (
        "/home/repo is not in the backup: the client needs it as it is now",
        "/home/u/.cache is not in the backup: the client needs it as it is now",
    )


def test_live_paths_of_a_root() -> None:
    """A set with the root leaves out the running system's directories, which are live anyway."""
    made = assemble(ROOT, live_paths=("/run/user/0/agent", "/root/.cache"))
    assert made.live_paths == ("/root/.cache",)
    assert made.excludes == ("/dev", "/proc", "/root/.cache", "/run", "/sys")
    assert set(SYSTEM_PATHS) < set(made.excludes)
    assert "/proc is not in the backup: it belongs to the running system" in made.notes


@pytest.mark.parametrize("volume", [HOME, ROOT])
def test_live_paths_on_another_mount(volume: tuple[str, str]) -> None:
    """What is mounted below is empty in the frozen files: it is brought back as a whole, once."""
    seams = frozenset({"/home", "/home/usb", "/home/usb/restic", "/home/usual", "/run", "/var"})
    needed = ("/home/usb/restic/x", "/home/usb/cache", "/home/u/.cache", "/var/lib/atomtx", "/run")
    chosen = dataclasses.replace(selection(volume, HOME), seams=seams)
    values: dict[str, Any] = {"pools": POOLS, "run": RUN, "client": CLIENT, "live_paths": needed}
    made = plan.assemble(Request((volume[0],)), chosen, **values)
    var = ("/var",) if volume == ROOT else ()
    assert made.live_paths == ("/home/u/.cache", "/home/usb", *var)
    assert set(made.excludes) == {*made.live_paths, *(SYSTEM_PATHS if var else ())}
    assert "/home/usb is not in the backup: the client needs it as it is now" in made.notes
    assert plan.is_frozen(made, "/home/usual")
    tree = plan.assemble(dataclasses.replace(TREE, names=(volume[0],)), chosen, **values)
    assert tree.live_paths == ("/home/u/.cache",)


@pytest.mark.parametrize("live", ["/home/src", "/home"])
def test_live_volume_that_was_named(live: str) -> None:
    """A named volume that the client needs live cannot be frozen for it: the plan is refused."""
    with pytest.raises(UserError, match=f"tank/home.* the client needs {live} as it is now"):
        assemble(HOME, SRC, asked=("tank/home", "tank/home/src"), live_paths=[live])


def test_live_volume_under_all() -> None:
    """Under -a the volume of a local repository or of /tmp is left out, and said."""
    made = assemble(HOME, SRC, BOOT, live_paths=["/home/src", "/boot"])
    assert [volume.name for volume in made.volumes] == ["tank/home"]
    assert made.targets == ("/home",)
    assert made.excludes == ("/home/src",)
    assert "tank/home/src is not in the backup: the client needs /home/src as it is now" in (
        made.notes
    )
    assert "zroot/boot is not in the backup: the client needs /boot as it is now" in made.notes


def test_part_of_no_volume() -> None:
    """What would be named in vain is a fault of ours, not a backup without it."""
    assert plan.paths_to_read(["/home", "/srv"], ["/home/a"]) == ("/home/a", "/srv")
    with pytest.raises(AssertionError):
        plan.paths_to_read(["/home"], ["/homes"])


def test_named() -> None:
    """The plan knows which volumes were named, and which were only found."""
    assert assemble(HOME, BOOT, asked=(BOOT[0],)).named == (BOOT[1],)
    assert assemble(HOME, BOOT).named == ()


def test_all_volumes_are_live() -> None:
    """A set of which nothing can be frozen is refused."""
    with pytest.raises(UserError, match="there is nothing to back up"):
        assemble(HOME, live_paths=["/home"])


def test_notes() -> None:
    """Promise 9: all that the backup will not hold is said, then what the client has to say."""
    chosen = selection(
        HOME,
        skipped=(LeftOut("tank/x", "it is not mounted"),),
        uncovered=(LeftOut("/home/m", "it is another file system (tmpfs, tmpfs)"),),
        notes=("tank/y is left out at your word",),
    )
    made = plan.assemble(
        Request((), all=True), chosen, pools=POOLS, run=RUN, client=CLIENT, notes=["no ACLs"]
    )
    assert made.notes == (
        "tank/x is not in the backup: it is not mounted",
        "/home/m is not in the backup: it is another file system (tmpfs, tmpfs)",
        "tank/y is left out at your word",
        "no ACLs",
    )


# -- intents -----------------------------------------------------------------------------------


def test_intents() -> None:
    """Promise 8: all snapshots of a pool are one step, taken and held before any is mounted."""
    home, src, boot = (f"{name}@{RUN.token}" for name, _ in (HOME, SRC, BOOT))
    assert plan.intents(assemble(HOME, BOOT, SRC)) == (
        TakeSnapshots("tank", "11", (home, src), RUN),
        TakeSnapshots("zroot", "22", (boot,), RUN),
        HoldSnapshots("tank", "11", (home, src), RUN.token),
        HoldSnapshots("zroot", "22", (boot,), RUN.token),
        MountVolumes("", (Mount(home, "/home"), Mount(boot, "/boot"), Mount(src, "/home/src"))),
    )


def test_intents_of_a_tree() -> None:
    """In a tree each snapshot is mounted at its live path under the root."""
    made = assemble(HOME, SRC, request=TREE, asked=("tank/home",))
    assert (made.layout, made.root) == ("tree", "/restic")
    assert plan.intents(made, ("/restic",))[-1] == MountVolumes(
        "/restic",
        (
            Mount(f"tank/home@{RUN.token}", "/restic/home"),
            Mount(f"tank/home/src@{RUN.token}", "/restic/home/src"),
        ),
        ("/restic",),
    )


def test_describe() -> None:
    """Promise 12: each step of the plan is told in order, with what undoes it."""
    made = assemble(HOME, SRC)
    client = RunClient("restic", (("restic", "backup", "/home"),), "/")
    assert plan.describe(made, (*plan.intents(made), client)) == (
        "1. snapshot 2 datasets of pool tank in one transaction",
        "   undo: destroy 2 snapshots of pool tank",
        "2. hold 2 snapshots of pool tank",
        "   undo: release 2 holds of pool tank",
        "3. mount 2 snapshots read-only at the live paths, in a namespace of its own",
        "   undo: unmount 2 snapshots with the namespace",
        "4. run restic backup /home",
        f"   undo: {EndClient('restic').describe()}",
    )
    assert plan.describe(made) == plan.describe(made, plan.intents(made))


# -- storing -----------------------------------------------------------------------------------

# Any text of a path or an argument: also bytes that are not UTF-8, as Python reads them.
TEXT = st.binary().map(lambda data: data.decode("utf-8", "surrogateescape"))
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
SOURCES = st.none() | st.builds(Source, st.integers(), TEXT, TEXT, st.integers())
ORIGINS = st.none() | st.builds(Origin, TEXT, TEXT, TEXT, st.integers())
VOLUMES = st.builds(
    PlannedVolume,
    *([TEXT] * (len(dataclasses.fields(PlannedVolume)) - 3)),
    source=SOURCES,
    origin=ORIGINS,
    existing=st.none() | st.builds(Existing, TEXT, TEXT),
)
CLIENTS = st.builds(
    ClientPlan,
    name=TEXT,
    command=TEXTS,
    extra=TEXTS,
    cwd=TEXT,
    version=TEXT,
    repository=st.none() | TEXT,
    environment=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    secrets=TEXTS,
)
PLANS = st.builds(
    Plan,
    run=TEXT,
    job=TEXT,
    label=TEXT,
    volumes=st.lists(VOLUMES, max_size=3).map(tuple),
    targets=TEXTS,
    layout=TEXT,
    root=TEXT,
    live_paths=TEXTS,
    excludes=TEXTS,
    notes=TEXTS,
    client=CLIENTS,
    keep_snapshots=st.booleans(),
    retries=st.integers(),
    keep_for_s=st.integers(),
    time_limit_s=st.integers(),
    grace_s=st.integers(),
)


@given(PLANS)
def test_round_trip(made: Plan) -> None:
    """A plan is read back from the journal as it was, and its text can be stored anywhere."""
    text = plan.to_json(made)
    assert text.isascii()
    assert plan.from_json(text) == made


def test_older_plan() -> None:
    """A plan that an older release stored had no time limit, and a grace of a minute."""
    data = json.loads(plan.to_json(assemble(HOME, BOOT, time_limit_s=5, grace_s=5)))
    del data["time_limit_s"], data["grace_s"]
    made = plan.from_json(json.dumps(data))
    assert (made.time_limit_s, made.grace_s) == (0, 60)


def test_round_trip_of_a_real_plan() -> None:
    """A plan that was made, not invented, is read back equal, down to what can be hashed."""
    made = assemble(HOME, BOOT, live_paths=["/home/x"], keep_snapshots=True, keep_for_s=60)
    again = plan.from_json(plan.to_json(made))
    assert again == made
    assert hash(again) == hash(made)


def test_as_read() -> None:
    """Of a whole root the client's policies and patterns are those of the root itself."""
    made = dataclasses.replace(assemble(HOME, request=TREE), excludes=("/home/x",))
    assert plan.as_read(made) == (("/home",), ("/home/x",))
    whole = dataclasses.replace(made, whole_root=True)
    assert plan.as_read(whole) == (("/restic",), ("/restic/home/x",))
