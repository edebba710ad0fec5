"""Names are checked once, at the edge, and carry the run that made them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx.errors import UserError
from atomtx.names import MAX_NAME_BYTES, Dataset, RunId, Snapshot, Target, is_within

RUN = RunId("0123456789abcdef")


def test_new_run_ids() -> None:
    """Each run gets an id of its own, which reads back."""
    made = {RunId.new() for _ in range(100)}
    assert len(made) == 100
    assert {RunId.parse(run) for run in made} == made


@pytest.mark.parametrize("text", ["", "0123", "0123456789ABCDEF", "0123456789abcdef\n", "x" * 16])
def test_not_a_run_id(text: str) -> None:
    """What is not a whole run id is refused; no prefix is guessed at."""
    with pytest.raises(UserError, match="is not a run id"):
        RunId.parse(text)


@given(st.binary(min_size=8, max_size=8))
def test_token_round_trip(random: bytes) -> None:
    """The name that a run gives to its snapshots leads back to that run."""
    run = RunId(random.hex())
    assert RunId.from_token(run.token) == run


@pytest.mark.parametrize(
    "token", ["", RUN, "atomtx-", f"atomtx-{RUN}-2", f"my-atomtx-{RUN}", f"atomtx-{RUN.upper()}"]
)
def test_foreign_token(token: str) -> None:
    """A name that only looks like ours is nobody's run."""
    assert RunId.from_token(token) is None


@pytest.mark.parametrize("text", ["tank", "zroot/usr/home", "tank/with space", "tank/a.b:c_d-e"])
def test_dataset(text: str) -> None:
    """Every name that ZFS allows is taken as it is, spaces included."""
    assert str(Dataset.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tank/a@x", "names a snapshot"),
        ("tank/a%b", "'%' cannot be in its name"),
        ("tank/a,b", "',' cannot be in its name"),
        ("tank/a#b", "'#' cannot be in its name"),
        ("-r", "cannot begin with '-'"),
        ("", "is not the name of a dataset"),
        ("tank//a", "is not the name of a dataset"),
        ("tank/a/", "is not the name of a dataset"),
        ("/tank/a", "is not the name of a dataset"),
        ("tank/ a", "is not the name of a dataset"),
        ("tank/a\nb", "is not the name of a dataset"),
        ("tank/ä", "is not the name of a dataset"),
        ("tank/" + "a" * 251, "is longer than 255 bytes"),
    ],
)
def test_not_a_dataset(text: str, says: str) -> None:
    """What could be read as another thing by `zfs` never reaches it, and the message says why."""
    with pytest.raises(UserError, match=says):
        Dataset.parse(text)


def test_pool() -> None:
    """The pool is the first part of a dataset's name."""
    assert [Dataset(name).pool for name in ("tank", "tank/a/b")] == ["tank", "tank"]


def test_snapshot() -> None:
    """A snapshot is named for its dataset and its run, and reads back."""
    snapshot = Dataset("tank/with space").snapshot(RUN).check()
    assert str(snapshot) == "tank/with space@atomtx-0123456789abcdef"
    assert Snapshot.parse(str(snapshot)) == snapshot


@pytest.mark.parametrize("text", ["", "tank/a", "tank/a@", "@x"])
def test_not_a_snapshot(text: str) -> None:
    """Half a snapshot's name is never taken for one."""
    with pytest.raises(ValueError, match="is not a snapshot"):
        Snapshot.parse(text)


def test_snapshot_that_is_too_long() -> None:
    """A dataset whose snapshot ZFS would refuse is refused before anything is done."""
    room = MAX_NAME_BYTES - len(f"@{RUN.token}")
    longest = Dataset("t" * room).snapshot(RUN)
    assert longest.check() is longest
    with pytest.raises(UserError, match="too long to be snapshotted"):
        Dataset("t" * (room + 1)).snapshot(RUN).check()


def test_is_within() -> None:
    """A path is within itself, its ancestors and the root, not within a name that begins alike."""
    parents = [p for p in ("/", "/a", "/a/b", "/a/b/c", "/a/bc", "/b") if is_within("/a/b", p)]
    assert parents == ["/", "/a", "/a/b"]


# -- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "dataset"),
    [
        ("backup", "", "backup"),
        ("backup/here", "", "backup/here"),
        ("backup/b c:d", "", "backup/b c:d"),  # a colon after the slash is the dataset's
        ("nas:backup", "nas", "backup"),
        ("root@nas.example.org:backup/here", "root@nas.example.org", "backup/here"),
        ("[fe80::1%eth0]:backup/here", "fe80::1%eth0", "backup/here"),
        ("me@[::1]:backup/here", "me@::1", "backup/here"),
    ],
)
def test_target(text: str, host: str, dataset: str) -> None:
    """A target is a dataset, of this machine or of the one before the colon."""
    target = Target.parse(text)
    assert (target.host, target.dataset.name) == (host, dataset)
    assert str(target) == text  # as the journal keeps it


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":backup",
        "nas:",
        "-oProxyCommand=x:backup",  # ssh would take it for an option
        "na s:backup",
        "-l@nas:backup",
        "me@-l:backup",
        "::1:backup/x",
        "nas;reboot:backup",
        "backup@snap",
        "nas:backup/../x y\n",
        "a:b:c",
    ],
)
def test_no_target(text: str) -> None:
    with pytest.raises(UserError):
        Target.parse(text)


def test_copies() -> None:
    """The copy of POOL/PATH is TARGET/PATH; of the pool's own dataset, the target."""
    target = Target.parse("nas:backup/here")
    assert target.copy_of(Dataset("tank/home/ann")) == Dataset("backup/here/home/ann")
    assert target.copy_of(Dataset("tank")) == Dataset("backup/here")
    assert target.shown("backup/here/x") == "nas:backup/here/x"
    with pytest.raises(UserError, match="longer than"):
        target.copy_of(Dataset(f"tank/{'x' * 245}"))
