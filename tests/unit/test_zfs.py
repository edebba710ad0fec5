"""
The `zfs` and `zpool` commands, with a program in their place that notes its words.

It prints what OpenZFS 2.3.9 printed on Linux 6.12.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomtx import locks, process
from atomtx.errors import EffectError, UserError
from atomtx.plan import DatasetFacts, Pool
from atomtx.volumes import zfs
from atomtx.volumes.ends import End
from atomtx.volumes.kind import Identity, Kept
from atomtx.volumes.zfs import Zfs, checked, pools_for

RUN = "0123456789abcdef"
TOKEN = f"atomtx-{RUN}"
A, B = f"tank/with space@{TOKEN}", f"tank/b@{TOKEN}"
OK = ("", "", 0)
ABSENT = "cannot open '{}': dataset does not exist\n"

# Each call takes the next answer; the last one stays.
FAKE = """#!{python}
import json, os, sys
here = os.path.dirname(__file__)
answers = json.load(open(os.path.join(here, "answers")))
number = len(os.listdir(os.path.join(here, "calls")))
call = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "stdin": sys.stdin.read(),
         "fds": sorted(os.readlink("/proc/self/fd/" + n) for n in os.listdir("/proc/self/fd")
                       if os.path.exists("/proc/self/fd/" + n))}}
json.dump(call, open(os.path.join(here, "calls", str(number)), "w"))
out, err, status = answers[min(number, len(answers) - 1)]
sys.stdout.write(out)
sys.stderr.write(err)
sys.stdout.flush()
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@dataclass
class Fake:
    """The programs, and what they were called with."""

    folder: Path

    def answer(self, *answers: tuple[str, str, int]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))
        for file in (self.folder / "calls").iterdir():
            file.unlink()

    @property
    def calls(self) -> list[dict[str, Any]]:
        files = sorted((self.folder / "calls").iterdir(), key=lambda f: int(f.name))
        return [json.loads(file.read_text()) for file in files]

    @property
    def argvs(self) -> list[list[str]]:
        return [call["argv"] for call in self.calls]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    (folder / "calls").mkdir(parents=True)
    for name in ("zfs", "zpool", "ssh"):
        (folder / name).write_text(FAKE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setitem(process.BASE_ENVIRONMENT, "PATH", f"{folder}:/usr/bin:/bin")
    made = Fake(folder)
    made.answer(("", "", 0))
    return made


def identity(name: str, guid: int = 5, txg: int = 7, mark: str | None = RUN) -> Identity:
    return Identity(name, str(guid), str(txg), 1_785_000_000, mark)


def got(*found: Identity, source: str = "local") -> str:
    """Print snapshots as `zfs get -Hp -o name,property,value,source` does."""
    return "".join(
        f"{i.name}\tguid\t{i.guid}\t-\n{i.name}\tcreatetxg\t{i.createtxg}\t-\n"
        f"{i.name}\tcreation\t{i.creation_s}\t-\n"
        + (f"{i.name}\tatomtx:run\t{i.mark}\t{source}\n" if i.mark else
           f"{i.name}\tatomtx:run\t-\t-\n")
        for i in found
    )  # fmt: skip


# -- looking ---------------------------------------------------------------------------------


def test_pools(fake: Fake) -> None:
    """The imported pools are listed with the guid that tells them from others of their name."""
    fake.answer(("tank\t17446744073709551615\tONLINE\nz root\t2\tSUSPENDED\n", "", 0))
    assert Zfs().pools() == [
        Pool("tank", "17446744073709551615", "ONLINE"),
        Pool("z root", "2", "SUSPENDED"),
    ]
    assert fake.argvs == [["zpool", "list", "-Hp", "-o", "name,guid,health"]]


def test_no_pools(fake: Fake) -> None:
    """A machine without an imported pool has none; one without the module is an error."""
    assert Zfs().pools() == []
    fake.answer(("", "The ZFS modules cannot be auto-loaded.\n", 1))
    with pytest.raises(EffectError, match="cannot list the pools: The ZFS modules"):
        Zfs().pools()


def test_datasets(fake: Fake) -> None:
    """The datasets of a pool are listed with names, blanks and all, in one command."""
    fake.answer(
        (
            "tank\tfilesystem\t1\t/tank\ton\tyes\t-\n"
            "tank/with space\tfilesystem\t2\tlegacy\tnoauto\tno\tunavailable\n"
            "tank/vol\tvolume\t3\t-\t-\t-\tavailable\n",
            "",
            0,
        )
    )
    assert Zfs().datasets("tank") == [
        DatasetFacts("tank", "filesystem", "1", "/tank", "on", True, "-"),
        DatasetFacts(
            "tank/with space", "filesystem", "2", "legacy", "noauto", False, "unavailable"
        ),
        DatasetFacts("tank/vol", "volume", "3", "-", "-", False, "available"),
    ]
    assert fake.argvs[0][-1] == "tank"
    fake.answer(("", ABSENT.format("tank"), 1))
    with pytest.raises(EffectError, match="cannot list the datasets of pool tank"):
        Zfs().datasets("tank")


# What str.splitlines() takes for the end of a line, and `zfs` does not.
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("odd", ["\t", "\t\t", *SEPARATORS, " \udcff"])
def test_odd_mountpoint(fake: Fake, odd: str) -> None:
    """A mountpoint is read as it is, whatever its owner has put into it."""
    fake.answer(
        (
            f"tank\tfilesystem\t1\t/a{odd}b\ton\tyes\t-\n"
            "tank/b\tfilesystem\t2\t/b\ton\tno\tavailable\n",
            "",
            0,
        )
    )
    assert Zfs().datasets("tank") == [
        DatasetFacts("tank", "filesystem", "1", f"/a{odd}b", "on", True, "-"),
        DatasetFacts("tank/b", "filesystem", "2", "/b", "on", False, "available"),
    ]


@pytest.mark.parametrize(
    "odd",
    [
        "/x\ny",
        "/x\n",
        "/x\ry",
        "/x\n\n\ty",
        "/x\ton\tyes\t-\ntank/b\tfilesystem\t2\t/another",  # two lines that are whole
    ],
)
def test_mountpoint_of_two_lines(fake: Fake, odd: str) -> None:
    """Nobody can tell what is a dataset then: an error that says where, and none is left out."""
    lines = [f"tank\tfilesystem\t1\t{odd}\ton\tyes\t-", "tank/b\tfilesystem\t2\t/b\ton\tyes\t-"]
    for each in (lines, lines[::-1]):
        fake.answer(("\n".join(each) + "\n", "", 0))
        with pytest.raises(EffectError, match="cannot read the datasets of pool tank: ") as caught:
            Zfs().datasets("tank")
        assert "\n" not in str(caught.value)
        assert "zfs get -r mountpoint tank" in str(caught.value)


@pytest.mark.parametrize("odd", SEPARATORS)
def test_odd_marks(fake: Fake, odd: str) -> None:
    """A mark that somebody else has set to anything is no run's, and hinders nothing."""
    fake.answer((got(identity(A, mark=f"x{odd}y"), identity(B)), "", 0))
    assert [each.mark for each in Zfs().identities([A, B]).values()] == [f"x{odd}y", RUN]
    fake.answer((f"{A}\tx{odd}y\n{B}\t{RUN}\n", "", 0))
    assert Zfs().marked(["tank"]) == [(A, f"x{odd}y"), (B, RUN)]
    fake.answer((f"{A}\tx{odd}y\tnow\n{A}\t{TOKEN}\tnow\n", "", 0))
    assert Zfs().holders([A]) == {A: [f"x{odd}y", TOKEN]}
    far = f"tank/b\tfilesystem\t1\t5\t-\tx{odd}y\t-\n{B}\tsnapshot\t2\t6\t0\tx{odd}y\t-\n"
    fake.answer((far, "", 0))
    assert [each.name for each in End().copies(["tank/b"])["tank/b"].snapshots] == [B]


def test_identities(fake: Fake) -> None:
    """A snapshot is what the pool says: guid, transaction group, time, and its own mark."""
    found = [identity(A, guid=2**64 - 1), identity(B)]
    fake.answer((got(*found), "", 0))
    assert Zfs().identities([A, B]) == {A: found[0], B: found[1]}
    (argv,) = fake.argvs
    assert argv[:2] == ["zfs", "get"]
    assert argv[-2:] == [A, B]


@pytest.mark.parametrize("source", ["inherited from tank", "received", "default", "-"])
def test_foreign_mark(fake: Fake, source: str) -> None:
    """Promise 2: a mark that was not set on the snapshot itself is no mark of ours."""
    fake.answer((got(identity(A), source=source), "", 0))
    assert Zfs().identities([A])[A].mark is None


def test_no_mark(fake: Fake) -> None:
    """A snapshot of somebody else has no mark."""
    fake.answer((got(identity(A, mark=None)), "", 0))
    assert Zfs().identities([A])[A].mark is None


def test_absent(fake: Fake) -> None:
    """A snapshot that ZFS says is not there is absent; those that are there are still found."""
    fake.answer((got(identity(B)), ABSENT.format(A), 1))
    assert Zfs().identities([A, B]) == {B: identity(B)}
    fake.answer(("", ABSENT.format(A) + ABSENT.format(B), 1))
    assert Zfs().identities([A, B]) == {}


def test_none_asked(fake: Fake) -> None:
    """Where nothing is asked, nothing is run: without names `zfs get` would tell of everything."""
    assert Zfs().identities([]) == {}
    assert Zfs().marked([]) == []
    assert Zfs().sizes([]) == {}
    assert Zfs().destroy([], run=RUN) == {}
    assert Zfs().keep([], run=RUN) == {}
    Zfs().release([], tag=TOKEN)
    assert fake.argvs == []


@pytest.mark.parametrize(
    ("out", "err", "status"),
    [
        ("", "internal error: out of memory\n", 1),
        ("", "Permission denied the ZFS utilities must be run as root.\n", 1),
        ("", ABSENT.format(A) + "cannot open 'tank/b': I/O error\n", 1),
        ("", "", -9),
        (got(identity(A)), "", -6),
        ("", ABSENT.format(A), -9),
        ("", "", 1),
    ],
)
def test_not_seen_is_not_absent(fake: Fake, out: str, err: str, status: int) -> None:
    """Promise 2: only ZFS's own word is absence: no other error is, nor a killed command."""
    fake.answer((out, err, status))
    with pytest.raises(EffectError, match="cannot look at the snapshots"):
        Zfs().identities([A, B])


def test_marked(fake: Fake) -> None:
    """Marked snapshots are found by a mark of their own alone, in the named pools alone."""
    fake.answer((f"{A}\t{RUN}\n", "", 0))
    assert Zfs().marked(["tank", "zroot"]) == [(A, RUN)]
    (argv,) = fake.argvs
    assert argv[argv.index("-s") + 1] == "local"
    assert argv[-2:] == ["tank", "zroot"]
    # Whoever may set user properties may set one to this, which is no run.
    fake.answer((f"{B}\tx\ty\n{B}\tx\ny\n{A}\t{RUN}\n", "", 0))
    assert Zfs().marked(["tank"]) == [(B, "x"), (A, RUN)]
    fake.answer(("", "out of memory\n", 1))
    with pytest.raises(EffectError, match="cannot look for marked snapshots"):
        Zfs().marked(["tank"])


@pytest.mark.parametrize(
    ("source", "keeper", "is_copy"),
    [
        ("local", RUN, False),
        ("received", RUN, True),
        ("inherited from tank", "", False),
        ("-", "", False),
    ],
)
def test_kept(fake: Fake, source: str, keeper: str, is_copy: bool) -> None:
    """
    Promise 2: whose mark is not its own was kept by nobody; holds and clones are told.

    A mark that came with `zfs receive` is its own, and told apart.
    """
    values = {"guid": 5, "createtxg": 7, "creation": 1_785_000_000, "userrefs": 2}
    lines = [f"{A}\t{name}\t{value}\t-\n" for name, value in values.items()]
    lines += [f"{A}\tclones\ttank/x,tank/y\t-\n", f"{A}\tatomtx:kept\t{RUN}\t{source}\n"]
    lines += [f"{A}\tatomtx:transient\t-\t-\n"]
    fake.answer(("".join(lines), "", 0))
    expected = Kept(A, "5", "7", 1_785_000_000, keeper, 2, ("tank/x", "tank/y"), is_copy)
    assert Zfs().kept(["tank/with space"]) == [expected]
    assert fake.argvs[0][:6] == ["zfs", "get", "-Hp", "-d", "1", "-t"]


@pytest.mark.parametrize("value", ["a\tb", "a\nb"])
def test_kept_unreadable(fake: Fake, value: str) -> None:
    """A mark that somebody set to what cannot be read is an error with a hint."""
    fake.answer((f"{A}\tguid\t5\t-\n{A}\tatomtx:kept\t{value}\tlocal\n", "", 0))
    with pytest.raises(EffectError, match="is no line of them"):
        Zfs().kept(["tank"])


@pytest.mark.parametrize(
    ("kept", "transient", "expected"),
    [
        ("local", (RUN, "local"), True),
        ("local", (RUN, "inherited from tank/with space"), False),
        ("local", (RUN, "received"), False),
        ("local", ("another", "local"), False),
        ("local", ("-", "-"), False),
        ("received", (RUN, "local"), False),  # a copy: at home it went, here it is thinned
        ("inherited from tank", (RUN, "local"), False),
    ],
)
def test_transient(fake: Fake, kept: str, transient: tuple[str, str], expected: bool) -> None:
    """Promise 2: both marks are its own, and of one run, or it is not meant to go again."""
    values = {"guid": 5, "createtxg": 7, "creation": 9, "userrefs": 0, "clones": ""}
    lines = [f"{A}\t{name}\t{value}\t-\n" for name, value in values.items()]
    lines += [f"{A}\tatomtx:kept\t{RUN}\t{kept}\n", "\t".join((A, "atomtx:transient", *transient))]
    fake.answer(("".join(lines), "", 0))
    assert [each.is_transient for each in Zfs().kept(["tank"])] == [expected]
    assert "atomtx:transient" in fake.argvs[0][fake.argvs[0].index("-o") + 2].split(",")


def test_prune_transient(fake: Fake) -> None:
    """The channel program is told of which ones it has to compare that mark as well."""
    there = [Kept(A, "5", "7", 0, RUN, 0, ()), Kept(B, "6", "7", 0, RUN, 0, (), is_transient=True)]
    fake.answer(judged("done", "done"))
    assert list(Zfs().prune(there, bookmark=False)) == [{A: "done", B: "done"}]
    words = fake.argvs[0][fake.argvs[0].index("none") + 1 :]
    assert words[3::4] == [f"k{RUN}", f"t{RUN}"]


def test_locked(fake: Fake) -> None:
    """Promise 14: a dataset whose key is not loaded is told."""
    fake.answer(("tank/a\tavailable\ntank/b c\tunavailable\ntank/d\t-\n", "", 0))
    assert Zfs().locked(["tank/a", "tank/b c", "tank/d"]) == ["tank/b c"]


# -- changing --------------------------------------------------------------------------------


def test_take(fake: Fake) -> None:
    """Promise 8: all snapshots of a pool are one command, each name one word, and marked."""
    assert Zfs().take([A, B], run=RUN) is None
    assert fake.argvs == [["zfs", "snapshot", "-o", f"atomtx:run={RUN}", A, B]]


@pytest.mark.parametrize(
    ("said", "status", "hint"),
    [
        ("cannot create snapshots : out of space\n", 1, "no room"),
        ("cannot create snapshots : permission denied\n", 1, "as root"),
        (
            "cannot open 'tank/nope': dataset does not exist\nusage:\n\tsnapshot ...\n",
            2,
            "try again",
        ),
        ("cannot create snapshot 'tank/a@x': dataset already exists\n", 1, "the command was"),
        ("", -9, "the command was"),
    ],
)
def test_take_complains(fake: Fake, said: str, status: int, hint: str) -> None:
    """A complaint is handed on, not raised: only a look at the pool tells what was done."""
    fake.answer(("", said, status))
    complaint = Zfs().take([A], run=RUN)
    assert complaint is not None
    assert complaint.message.startswith("cannot take the snapshots: ")
    assert hint in (complaint.hint or "")


def test_too_many(fake: Fake) -> None:
    """Promise 8: what does not fit in one command is refused: two would be two moments."""
    with pytest.raises(EffectError, match="too many for one"):
        Zfs().take([f"tank/{'a' * 200}{n}@{TOKEN}" for n in range(9000)], run=RUN)
    assert fake.argvs == []


def test_as_many_as_were_taken(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one command could take is looked at, held and destroyed by as many as it needs."""
    names = [f"tank/{'a' * 200}{n}@{TOKEN}" for n in range(4000)]
    monkeypatch.setattr(os, "sysconf", lambda name: (1 << 20) + (1 << 17))  # of 4 MiB of stack
    assert Zfs().take(names, run=RUN) is None
    Zfs().hold(names, tag=TOKEN)
    known = [Identity(name, str(2**63 + n), "7", 0, RUN) for n, name in enumerate(names)]
    answers = {str(n): "done" for n in range(1, len(names) + 1)}
    fake.answer((json.dumps({"return": answers}), "", 0))
    assert Zfs().destroy(known, run=RUN) == dict.fromkeys(names, "done")
    assert [argv[:2] for argv in fake.argvs] == [["zfs", "program"]] * 2
    words = [word for argv in fake.argvs for word in argv if "@" in word]
    assert words == names
    assert max(sum(len(word) + 9 for word in argv) for argv in fake.argvs) < (1 << 20) + 1000


HELD = f"{A}\t{TOKEN}\tFri Jul  3 12:00 2026\n{A}\tother\tFri Jul  3 12:00 2026\n"


def test_hold(fake: Fake) -> None:
    """A hold is one command for all; its tag and each name are one word."""
    Zfs().hold([A, B], tag=TOKEN)
    assert fake.argvs == [["zfs", "hold", TOKEN, A, B]]


def test_hold_again(fake: Fake) -> None:
    """Promise 4: a hold that is there already is success; one that is not, is failure."""
    exists = f"cannot hold snapshot '{A}': tag already exists on this dataset\n"
    fake.answer(("", exists, 1), (HELD, "", 0))
    Zfs().hold([A], tag=TOKEN)
    fake.answer(("", exists, 1), (HELD, "", 0), ("", "pool is read-only\n", 1), (HELD, "", 0))
    with pytest.raises(EffectError, match=f"cannot hold {B}: pool is read-only"):
        Zfs().hold([A, B], tag=TOKEN)
    assert fake.argvs[2] == ["zfs", "hold", TOKEN, B]


def test_killed_hold(fake: Fake) -> None:
    """A `zfs hold` that was killed is looked at, and what it had not done is tried once more."""
    fake.answer(("", "", -9), (HELD, "", 0), OK)
    Zfs().hold([A, B], tag=TOKEN)
    assert [argv[1] for argv in fake.argvs] == ["hold", "holds", "hold"]


def test_release(fake: Fake) -> None:
    """A release is one command for all; a hold that is gone is success, one that stays is not."""
    Zfs().release([A, B], tag=TOKEN)
    assert fake.argvs == [["zfs", "release", TOKEN, A, B]]
    gone = f"cannot release hold from snapshot '{A}': no such tag on this dataset\n"
    fake.answer(("", gone, 1), (f"{A}\tother\tx\n", "", 0))
    Zfs().release([A], tag=TOKEN)
    refused = ("", "cannot release: pool is read-only\n", 1)
    fake.answer(refused, (HELD, "", 0), refused, (HELD, "", 0))
    with pytest.raises(EffectError, match=f"cannot release {A}"):
        Zfs().release([A, B], tag=TOKEN)
    assert fake.argvs[2] == ["zfs", "release", TOKEN, A]


def test_holders(fake: Fake) -> None:
    """The tags on each snapshot are told, whoever set them."""
    fake.answer((HELD, "", 0))
    assert Zfs().holders([A]) == {A: [TOKEN, "other"]}


def test_holders_of_absent(fake: Fake) -> None:
    """Promise 4: a snapshot that is gone has no holds; those of the others are told."""
    fake.answer((HELD, ABSENT.format(B), 1))
    assert Zfs().holders([A, B]) == {A: [TOKEN, "other"]}
    fake.answer(("", ABSENT.format(A) + "no datasets available\n", 1))
    assert Zfs().holders([A]) == {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((HELD, "cannot open 'tank/b': I/O error\n", 1), "I/O error"),
        (("", "permission denied\n", 1), "permission denied"),
        (("", "", 1), "exit status 1"),
        (("", "", -9), "exit status -9"),
        (("", ABSENT.format(B), -9), "does not exist"),
    ],
)
def test_holders_unknown(fake: Fake, answer: tuple[str, str, int], said: str) -> None:
    """Promise 2: a `zfs holds` that failed, or was killed, never means that there are no holds."""
    fake.answer(answer)
    with pytest.raises(EffectError, match=f"cannot look at the holds: .*{said}"):
        Zfs().holders([A, B])


NOISE = "All you do is seen\n"  # of a far login shell, before and after


@pytest.mark.parametrize("noise", ["", NOISE])
def test_far_absence(fake: Fake, noise: str) -> None:
    """What is gone on another machine is gone, whatever its login shell says besides."""
    fake.answer((HELD, noise + ABSENT.format(B) + noise, 1))
    assert End(host="nas").holders([A, B]) == {A: [TOKEN, "other"]}
    none = f"{noise}{ABSENT.format(A)}no datasets available\n{noise}"
    fake.answer(("", none, 1))
    assert End(host="nas").holders([A]) == {}
    assert End(host="nas").copies(["tank/b"]) == {}


@pytest.mark.parametrize(
    ("err", "status"),
    [
        ("internal error: out of memory\n", 1),
        ("Permission denied the ZFS utilities must be run as root.\n", 1),
        ("The ZFS modules are not loaded.\n", 1),
        ("cannot open 'tank/c': I/O error\n", 1),
        ("env: 'zfs': No such file or directory\n", 127),
        ("Aborted\n", 134),
        ("usage:\n", 2),
    ],
)
def test_far_failure_is_no_absence(fake: Fake, err: str, status: int) -> None:
    """Promise 2: another machine's failure is none, also where something is absent besides."""
    fake.answer(("", NOISE + ABSENT.format(A) + err + NOISE, status))
    with pytest.raises(EffectError, match="cannot look at the holds of nas"):
        End(host="nas").holders([A, B])
    with pytest.raises(EffectError, match="cannot list the datasets of nas"):
        End(host="nas").copies(["tank/a", "tank/b"])


def test_release_unknown(fake: Fake) -> None:
    """Promise 2: a release that failed is not taken for done where the holds cannot be seen."""
    fake.answer(("", "pool is read-only\n", 1), ("", "permission denied\n", 1))
    with pytest.raises(EffectError, match="cannot look at the holds"):
        Zfs().release([A], tag=TOKEN)


# -- destroying ------------------------------------------------------------------------------


def judged(*verdicts: str) -> tuple[str, str, int]:
    """Answer as `zfs program -j` does."""
    returned = {str(n): verdict for n, verdict in enumerate(verdicts, 1)}
    return json.dumps({"return": returned}), "", 0


def test_destroy(fake: Fake) -> None:
    """Promise 2: identity and mark go along, and are judged where nothing can come between."""
    fake.answer(judged("done", "foreign"))
    verdicts = Zfs().destroy([identity(A), identity(B, guid=6)], run=RUN)
    assert verdicts == {A: "done", B: "foreign"}
    (argv,) = fake.argvs
    assert argv[:2] == ["zfs", "program"]
    script = argv.index(str(zfs._SCRIPT))
    assert argv[script - 1] == "tank"
    assert argv[script + 1 :] == ["destroy", RUN, A, "g5", "t7", B, "g6", "t7"]


def test_keep(fake: Fake) -> None:
    """Keeping is judged in the same way as destroying."""
    fake.answer(judged("done"))
    assert Zfs().keep([identity(A)], run=RUN) == {A: "done"}
    assert fake.argvs[0][-5:] == ["keep", RUN, A, "g5", "t7"]


@pytest.mark.parametrize(
    ("guid", "word"),
    [
        (1, "g1"),
        (2**63 - 1, "g9223372036854775807"),
        (2**63, "g-9223372036854775808"),
        (10553267218660608254, "g-7893476855048943362"),
        (2**64 - 1, "g-1"),
    ],
)
def test_signed_guid(fake: Fake, guid: int, word: str) -> None:
    """A channel program's integers are signed: a guid of 2^63 and more is passed as it sees it."""
    fake.answer(judged("done"))
    Zfs().destroy([identity(A, guid=guid)], run=RUN)
    assert word in fake.argvs[0]


@pytest.mark.parametrize(("code", "verdict"), [(16, "busy"), (17, "busy")])
def test_busy(fake: Fake, code: int, verdict: str) -> None:
    """A snapshot that is used, held or cloned is busy: it can be tried again."""
    fake.answer(judged(f"error {code}"))
    assert Zfs().destroy([identity(A)], run=RUN) == {A: verdict}


def test_error_of_the_program(fake: Fake) -> None:
    """Any other error of ZFS is told."""
    fake.answer(judged("error 30"))
    with pytest.raises(EffectError, match="error 30"):
        Zfs().destroy([identity(A)], run=RUN)


NO_PROGRAMS = ("", "Channel programs are not supported.\n", 1)


def test_one_by_one(fake: Fake) -> None:
    """Where channel programs cannot be had each one is proven, destroyed and looked for again."""
    fake.answer(
        NO_PROGRAMS,
        *((got(identity(A)), "", 0), OK, ("", ABSENT.format(A), 1)),
        *((got(identity(B)), "", 0), OK, ("", ABSENT.format(B), 1)),
    )
    assert Zfs().destroy([identity(A), identity(B)], run=RUN) == {A: "done", B: "done"}
    assert [argv[1] for argv in fake.argvs] == ["program", *("get", "destroy", "get") * 2]
    assert [argv for argv in fake.argvs if argv[1] == "destroy"] == [
        ["zfs", "destroy", A],
        ["zfs", "destroy", B],
    ]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (("", ABSENT.format(A), 1), "absent"),
        ((got(identity(A, guid=6)), "", 0), "foreign"),
        ((got(identity(A, txg=8)), "", 0), "foreign"),
        ((got(identity(A, mark=None)), "", 0), "unmarked"),
        ((got(identity(A, mark="f" * 16)), "", 0), "unmarked"),
        ((got(identity(A), source="inherited from tank"), "", 0), "unmarked"),
    ],
)
@pytest.mark.parametrize("verb", ["destroy", "keep"])
def test_one_by_one_unproven(
    fake: Fake, found: tuple[str, str, int], verdict: str, verb: str
) -> None:
    """Promise 2: one by one, too, nothing is touched that is not proven to be ours."""
    fake.answer(NO_PROGRAMS, found)
    act: Callable[..., dict[str, str]] = getattr(Zfs(), verb)
    assert act([identity(A)], run=RUN) == {A: verdict}
    kept_already = [["zfs", "get"]] if (verb, verdict) == ("keep", "unmarked") else []
    assert [argv[:2] for argv in fake.argvs] == [["zfs", "program"], ["zfs", "get"], *kept_already]


def test_one_by_one_kept_already(fake: Fake) -> None:
    """What this run kept before it was killed is kept: the mark says so, and is its own."""
    for source, verdict in (("local", "done"), ("inherited from tank", "unmarked")):
        unmarked = (got(identity(A, mark=None)), "", 0)
        fake.answer(NO_PROGRAMS, unmarked, (f"{RUN}\t{source}\n", "", 0))
        assert Zfs().keep([identity(A)], run=RUN) == {A: verdict}


def test_pool_of_its_root(fake: Fake) -> None:
    """A snapshot of a pool's own dataset is of that pool, for a channel program as well."""
    root = "tank@atomtx-1"
    fake.answer(judged("done"))
    assert Zfs().destroy([identity(root)], run=RUN) == {root: "done"}
    assert fake.argvs[0][7] == "tank"


@pytest.mark.parametrize(
    "said", ["dataset is busy\n", "snapshot is cloned\n", "it's being held. Run 'zfs holds'.\n", ""]
)
def test_one_by_one_busy(fake: Fake, said: str) -> None:
    """One that is still there and ours after the command is busy, also where it was killed."""
    fake.answer(NO_PROGRAMS, (got(identity(A)), "", 0), ("", said, 1), (got(identity(A)), "", 0))
    assert Zfs().destroy([identity(A)], run=RUN) == {A: "busy"}


def test_one_by_one_refused(fake: Fake) -> None:
    """What cannot be destroyed for another reason, as on a pool that is read-only, is told."""
    said = f"cannot destroy snapshot {A}: pool is read-only\n"
    fake.answer(NO_PROGRAMS, (got(identity(A)), "", 0), ("", said, 1), (got(identity(A)), "", 0))
    with pytest.raises(EffectError, match=f"cannot destroy {A}: .*pool is read-only"):
        Zfs().destroy([identity(A)], run=RUN)


def test_one_by_one_status(fake: Fake) -> None:
    """Promise 2: an exit status never proves that an effect did not happen."""
    killed = ((got(identity(A)), "", 0), ("", "", -9), ("", ABSENT.format(A), 1))
    fake.answer(NO_PROGRAMS, *killed, ("tank\t1\tONLINE\n", "", 0))
    assert Zfs().destroy([identity(A)], run=RUN) == {A: "done"}


def test_one_by_one_exported(fake: Fake) -> None:
    """Nor does it that one did: with its whole pool gone, the snapshot is on it still."""
    said = ("", f"cannot open '{A}': no such pool\n", 1)
    gone = ((got(identity(A)), "", 0), said, ("", ABSENT.format(A), 1))
    fake.answer(NO_PROGRAMS, *gone, ("other\t1\tONLINE\n", "", 0))
    assert Zfs().destroy([identity(A)], run=RUN) == {A: "absent"}


def test_pool_that_goes_as_it_is_listed(fake: Fake) -> None:
    """Where all there are are meant, none of a pool that was exported meanwhile are."""
    gone = ("", "cannot open 'tank': no such pool\n", 1)
    fake.answer(gone, ("other\t1\tONLINE\n", "", 0))
    assert Zfs().datasets("tank", may_go=True) == []
    for answers, may_go in (((gone, ("tank\t1\tFAULTED\n", "", 0)), True), ((gone,), False)):
        fake.answer(*answers)
        with pytest.raises(EffectError, match="cannot list the datasets of pool tank"):
            Zfs().datasets("tank", may_go=may_go)


def test_one_by_one_keep(fake: Fake) -> None:
    """A kept snapshot gets its new mark before it loses the old one."""
    fake.answer(NO_PROGRAMS, (got(identity(A)), "", 0), OK)
    assert Zfs().keep([identity(A)], run=RUN) == {A: "done"}
    assert fake.argvs[2:] == [
        ["zfs", "set", f"atomtx:kept={RUN}", A],
        ["zfs", "inherit", "atomtx:run", A],
    ]
    fake.answer(NO_PROGRAMS, (got(identity(A)), "", 0), ("", "pool is read-only\n", 1))
    with pytest.raises(EffectError, match="cannot keep"):
        Zfs().keep([identity(A)], run=RUN)


@pytest.mark.parametrize(
    "name",
    [
        *("tank/a", "tank/a@", "@x", "", "tank/a@x,y", "tank/a@x%y", "tank/a@%", "-x@y", "-R"),
        *("tank/a@x@y", "-@x"),
    ],
)
def test_checked(name: str) -> None:
    """What `zfs destroy` takes for a dataset, a list, a range or an option never gets there."""
    with pytest.raises(AssertionError, match="not the name of one snapshot"):
        checked(name)


@pytest.mark.parametrize("name", [A, "tank@x", "tank/a-b_c.d:e f@atomtx-0", "tank/a,b%c@x"])
def test_checked_name(name: str) -> None:
    """The name of one snapshot passes as it is, blanks and all."""
    assert checked(name) == name


@given(st.text(max_size=12))
def test_checked_any(name: str) -> None:
    """Whatever passes has one `@`, something on both sides, and no list or range behind it."""
    try:
        passed = checked(name)
    except AssertionError:
        return
    dataset, at, snapshot = passed.partition("@")
    assert (passed, at) == (name, "@")
    assert dataset
    assert snapshot
    assert not passed.startswith("-")
    assert not set(snapshot) & set("@,%")


def test_checked_before_destroying(fake: Fake) -> None:
    """The check stands before the channel program as well as before the single command."""
    with pytest.raises(AssertionError):
        Zfs().destroy([replace(identity(A), name="tank/a")], run=RUN)
    assert fake.argvs == []


# -- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 200])
def test_one_process(fake: Fake, count: int) -> None:
    """Section 13: each thing that is done or asked is one process, whatever the number."""
    names = [f"tank/a{n}@{TOKEN}" for n in range(count)]
    found = [identity(name) for name in names]
    calls: list[tuple[tuple[str, str, int], Callable[[Zfs], object]]] = [
        ((got(*found), "", 0), lambda z: z.identities(names)),
        (OK, lambda z: z.take(names, run=RUN)),
        (OK, lambda z: z.hold(names, tag=TOKEN)),
        (OK, lambda z: z.release(names, tag=TOKEN)),
        (judged(*["done"] * count), lambda z: z.destroy(found, run=RUN)),
        (judged(*["done"] * count), lambda z: z.keep(found, run=RUN)),
    ]
    for answer, call in calls:
        fake.answer(answer)
        call(Zfs())
        assert len(fake.argvs) == 1


def test_lock(fake: Fake, tmp_path: Path) -> None:
    """Promise 6: the commands inherit F: it is held while one of a killed front end lives."""
    lock = tmp_path / "front.lock"
    lock.touch()
    with locks.acquired(lock) as descriptor:
        Zfs(descriptor).pools()
        Zfs().pools()
    with_lock, without = (call["fds"] for call in fake.calls)
    assert str(lock) in with_lock
    assert str(lock) not in without


def test_scripts_are_shipped() -> None:
    """The channel programs lie beside the module that runs them."""
    assert zfs._SCRIPT.is_file()
    assert zfs._PRUNE.is_file()


@pytest.mark.parametrize("function", ["is_same", "bears"])
def test_one_proof(function: str) -> None:
    """Promise 2: both channel programs prove a snapshot in the same words."""
    text = re.compile(rf"^function {function}\(.*?^end$", re.MULTILINE | re.DOTALL)
    of_destroy, of_prune = (text.findall(s.read_text()) for s in (zfs._SCRIPT, zfs._PRUNE))
    assert of_destroy == of_prune
    assert len(of_prune) == 1


def _no_zpool() -> list[Pool]:
    process.run(["no-such-zpool"])
    return []


@pytest.mark.parametrize("names", [("hme",), ("/home", "hme")])
def test_name_without_zfs(names: tuple[str, ...]) -> None:
    """On a machine without ZFS a mistyped word is told, not only that a program is missing."""
    with pytest.raises(UserError) as caught:
        pools_for(names, _no_zpool)
    assert caught.value.message == "there is no dataset hme: no-such-zpool is not installed"
    assert "from /" in (caught.value.hint or "")


@pytest.mark.parametrize("names", [(), ("/home",)])
def test_no_zpool_for_a_path(names: tuple[str, ...]) -> None:
    """What lies on ZFS, or is asked for as all of it, lacks the program."""
    with pytest.raises(EffectError, match=r"^no-such-zpool is not installed"):
        pools_for(names, _no_zpool)
