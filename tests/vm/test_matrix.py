"""
Each kind of volume with each client: killed and resumed, backed up, restored and compared.

A set has a volume of every kind that the client can save; what is restored is compared kind by
kind.  The table is printed when all tests have ended, and stands in docs/clients.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.extent import FULL
from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import ENV, Answer, atomtx, runs
from tests.vm.scene import Prepare, kill_run, make_journal, script, until
from tests.vm.tank import leftovers
from tests.vm.test_crash import settle

Told = dict[str, dict[str, Any]]  # of each path, what files_guest tells
# By kind: the word that names a volume, and where it is mounted.
KINDS = {
    "ZFS": ("tank/srv", "/tank/srv"),
    "btrfs": ("/srv/btrfs", "/srv/btrfs"),
    "LVM, XFS": ("data/xfs", "/srv/xfs"),
    "LVM, ext4": ("data/ext4", "/srv/ext4"),
    "LVM thin, XFS": ("data/thin-xfs", "/srv/thin-xfs"),
    "LVM thin, ext4": ("data/thin-ext4", "/srv/thin-ext4"),
    "read live, XFS": ("--read-live=/srv/live", "/srv/live"),
}
ON_XFS = tuple(kind for kind in KINDS if kind.endswith("XFS"))
LIVE = "read live, XFS"
FILES = "/root/files_guest.py"
STOPPED = "/root/stopped"
RESTORED = "/srv/restored"
_MAKE = f"""
set -e
zfs create -o acltype=posixacl -o xattr=sa tank/srv
vgcreate -q data {DATA_DISKS[1]}
lvcreate -qy -L 320M -n xfs data
lvcreate -qy -L 64M -n ext4 data
lvcreate -qy --type thin-pool -L 1G -n pool data
lvcreate -qy -V 320M --thinpool pool -n thin-xfs data
lvcreate -qy -V 64M --thinpool pool -n thin-ext4 data
lvcreate -qy -L 320M -n restored data
mkdir -p /srv/xfs /srv/ext4 /srv/thin-xfs /srv/thin-ext4 /srv/btrfs /srv/live {RESTORED}
for name in xfs ext4 thin-xfs thin-ext4; do
  mkfs.${{name#thin-}} -q /dev/data/$name
  mount /dev/data/$name /srv/$name
done
mkfs.xfs -q /dev/data/restored
mount /dev/data/restored {RESTORED}
truncate -s 320M /root/live.img /root/btrfs.img
mkfs.xfs -q /root/live.img
mount -o loop /root/live.img /srv/live
mkfs.btrfs -q /root/btrfs.img
mount -o loop /root/btrfs.img /mnt
btrfs -q subvolume create /mnt/srv
umount /mnt
mount -o loop,subvol=srv /root/btrfs.img /srv/btrfs
python3 {FILES} make {" ".join(path for _, path in KINDS.values())}
sync
"""

# The first time the client is stopped when it has begun to write, so that it is killed there.  It
# stands still while that is looked for: what is left to write then takes it less than a look.
_WRAPPER = """
case "$*" in *@WORD@*) ;; *) exec @PROGRAM@ "$@" ;; esac
test -e /root/stopped && exec @PROGRAM@ "$@"
touch /root/mark
@PROGRAM@ "$@" & client=$!
while kill -STOP $client; do
  find @WRITES@ -type f -newer /root/mark -size +0 | grep -q . && break
  kill -CONT $client
  sleep 0.01
done
touch /root/stopped
wait
"""
_TAR = """
set -e
rm -f /srv/tar/new
tar --acls --xattrs --sparse --format=posix -cf /srv/tar/new "$@" 2>/dev/null
mv /srv/tar/new /srv/tar/tar
"""


@dataclass(frozen=True)
class Subject:
    """A client as the matrix has it: how it is set up and called, and what it is known to lose."""

    name: str
    env: dict[str, str]
    setup: str
    word: str  # an argument of the command that saves
    writes: str  # where that writes
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = tuple(KINDS)
    loses: frozenset[str] = frozenset()  # properties, by their names in files_guest
    omits: frozenset[str] = frozenset()  # kinds of files
    holes: tuple[str, ...] = ()  # what a restore needs besides to make holes again
    program: str = ""
    restore: str = ""  # where `show` knows none
    exact: Callable[[dict[str, Any]], None] = field(default=lambda _: None)


def _whole_seconds(entry: dict[str, Any]) -> None:
    entry["time"] = None if entry["kind"] == "l" else entry["time"] // 10**9


def _times_of_files(entry: dict[str, Any]) -> None:
    if entry["kind"] in "dl":  # of a directory kopia keeps the time of the newest file in it
        entry["time"] = None


SUBJECTS = (
    Subject(
        "restic",
        {"RESTIC_REPOSITORY": "/srv/restic", "RESTIC_PASSWORD": "secret-of-tests"},
        "restic init -q",
        word="backup",
        writes="/srv/restic/data",
    ),
    Subject(
        "kopia",
        {"KOPIA_PASSWORD": "secret-of-tests", "KOPIA_CHECK_FOR_UPDATES": "false"},
        "mkdir /srv/kopia && kopia repository create filesystem --path /srv/kopia",
        word="create",
        writes="/srv/kopia -path '/srv/kopia/p*'",
        loses=frozenset(("links", "attributes", "access lists")),
        omits=frozenset("p"),
        holes=("--write-sparse-files",),
        exact=_times_of_files,
    ),
    Subject(
        "borg",
        {"BORG_REPO": "/srv/borg", "BORG_PASSPHRASE": "secret-of-tests"},
        "borg init -e repokey-blake2",
        word="create",
        writes="/srv/borg/data",
        # It makes holes of whole chunks, which have up to 8 MiB otherwise.
        options=("--", "--chunker-params", "10,16,12,4095"),
    ),
    Subject(
        "xfsdump",
        {},
        "mkdir -m 700 /srv/dumps && cat /proc/sys/kernel/random/uuid > /srv/dumps/.atomtx-xfsdump",
        word="-l",
        writes="/srv/dumps -path '*.part*' -name dump",
        options=("--", "--destination", "/srv/dumps"),
        kinds=ON_XFS,
        exact=_whole_seconds,
    ),
    Subject(
        "command",
        {},
        "mkdir /srv/tar",
        word="/srv",
        writes="/srv/tar -name new",
        program="/root/tar",
        restore=f"tar --acls --xattrs --xattrs-include='*' -xpf /srv/tar/tar -C {RESTORED}",
    ),
)


def volumes(vm: Machine) -> None:
    vm.put(Path(__file__).with_name("files_guest.py"), FILES)
    vm.run(_MAKE, timeout=600)
    script(vm, "/root/tar", _TAR)
    make_journal(vm)


def told(vm: Machine, subject: Subject, root: str = "") -> dict[str, Told]:
    """Return what is to be known of the volumes' files below *root*, by the kind of volume."""
    paths = {kind: KINDS[kind][1] for kind in subject.kinds}
    out = vm.run(f"sync; python3 {FILES} tell '{root}' {' '.join(paths.values())}").stdout
    entries: dict[str, dict[str, Any]] = json.loads(out)
    kept = {name: each for name, each in entries.items() if each["kind"] not in subject.omits}
    for entry in kept.values():
        subject.exact(entry)
        for name in subject.loses:
            del entry[name]
    return {
        kind: {name: each for name, each in kept.items() if name.startswith(f"{path}/")}
        for kind, path in paths.items()
    }


def compare(found: dict[str, Told], expected: dict[str, Told]) -> None:
    """Fail with all that was not restored as it was."""
    wrong = [line for kind in expected for line in differences(found[kind], expected[kind])]
    assert wrong == [], "\n".join(wrong)


def differences(found: Told, expected: Told) -> list[str]:
    """Return what was not restored as it was, in words."""
    lines = [f"{name} is not there" for name in expected.keys() - found.keys()]
    lines += [f"{name} was not there" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        for what, value in expected[name].items():
            if found[name][what] != value:
                lines.append(f"{name}: {what} was {value}, is {found[name][what]}")
    return sorted(lines)


def change(vm: Machine, subject: Subject) -> None:
    """Change the live files, but those that are read live."""
    paths = [KINDS[kind][1] for kind in subject.kinds if kind != LIVE]
    vm.run(f"for d in {' '.join(paths)}; do echo later > $d/a/file; rm $d/a/soft; done; sync")


def restored(vm: Machine, subject: Subject) -> dict[str, Told]:
    """Restore the last run by the commands that `show` prints, and tell what is there."""
    vm.run(f"cd {RESTORED} && rm -rf srv tank && mkdir srv tank")
    answer = atomtx(vm, "show", runs(vm)[0]["id"], "--to", RESTORED, "--json", env=subject.env)
    assert answer.status == 0, answer.output
    commands = [subject.restore] if subject.restore else []
    for backup in json.loads(answer.stdout)["backups"] if not commands else ():
        shown = backup["restore"]
        first = [*shown["argv"], *subject.holes]
        variables = [f"{name}={value}" for name, value in shown["environment"].items()]
        commands += [
            f"cd {shown['cwd']} && {shlex.join(['env', *variables, *argv])}"
            for argv in (first, *shown["then"])
        ]
    secrets = "".join(f"export {name}={value}\n" for name, value in subject.env.items())
    vm.run(secrets + "set -e\n" + "\n".join(commands), timeout=600)
    return told(vm, subject, RESTORED)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_matrix(
    prepared: Prepare, subject: Subject, record_property: Callable[[str, object], None]
) -> None:
    """
    The client is killed with all of the run when it has begun to write; recover saves the moment.

    It is restored by the commands that `show` prints, and is what it was, but for what the client
    is known to lose.  With ATOMTX_CRASH=full the changed files are then backed up by a second run.
    """
    vm = prepared("tank", volumes)
    without = [name for name in ENV if name.startswith("RESTIC") and name not in subject.env]
    secrets = "".join(f"export {name}={value}\n" for name, value in subject.env.items())
    vm.run(secrets + subject.setup, timeout=300)
    wrapper = _WRAPPER.replace("@PROGRAM@", subject.program or subject.name)
    wrapper = wrapper.replace("@WORD@", subject.word).replace("@WRITES@", subject.writes)
    words = [KINDS[kind][0] for kind in subject.kinds]
    program = script(vm, f"/root/{subject.name}-wrapper", wrapper)
    words += ["--client", subject.name, "--command", program, *subject.options]

    def backup(*options: str, **how: Any) -> Answer:
        argv = ("backup", *options, *words)
        return atomtx(vm, *argv, env=subject.env, without=without, started=True, **how)

    answer = backup("--require-atomic")
    assert answer.status == 2, answer.output
    before = told(vm, subject)
    assert all(len(entries) >= 7 for entries in before.values())
    backup(background=True)
    until(vm, f"test -e {STOPPED}")
    kill_run(vm)
    change(vm, subject)
    assert told(vm, subject) != before
    settle(vm, env=subject.env, without=without)
    check(vm, attempts=2)
    compare(restored(vm, subject), before)
    if FULL:
        before = told(vm, subject)
        answer = backup()
        assert answer.status == 0, answer.output
        check(vm, attempts=1)
        compare(restored(vm, subject), before)
    for kind in subject.kinds:
        record_property("matrix", {"kind": kind, "client": subject.name})


def check(vm: Machine, *, attempts: int) -> None:
    """See that the last run is completed, says what of it was no moment, and left nothing."""
    run = runs(vm)[0]
    assert (run["outcome"], run["state"]) == ("completed", "destroyed")
    assert run["attempts"] == attempts
    assert run["not_a_moment"] == ["/srv/live"]
    assert leftovers(vm) == []
    assert vm.run("btrfs subvolume list -s /srv/btrfs").stdout == ""
    show = json.loads(atomtx(vm, "show", run["id"], "--json").stdout)
    assert "within" in json.dumps(show["steps"])  # the measured time between the snapshots
