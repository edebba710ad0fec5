"""Bad input, on a real machine: one clear line, what to do next, and nothing changed."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.remote import atomtx, restic_command, runs
from tests.vm.tank import fill, leftovers, make_datasets

KEY = "printf 'correct horse\\n' > /root/key"

# what was typed -> words of the message, words of the hint
WRONG = {
    ("tank/none",): ("tank/none", "zfs list"),
    ("nopool/a",): ("pool nopool is not imported", "zpool import"),
    ("tank/a@x",): ("names a snapshot", "name the dataset"),
    ("tank/a%b",): ("cannot be in its name", ""),
    ("tank/a,b",): ("cannot be in its name", ""),
    ("tank/a", "tank/a"): ("given twice", "once"),
    ("-r", "tank/a", "tank/a/kid"): ("already included", "leave out"),
    ("tank/vol",): ("tank/vol", ""),
    ("tank/legacy",): ("tank/legacy", "mount"),
    ("tank/none2",): ("tank/none2", "mountpoint"),
    ("tank/off",): ("tank/off", ""),
    ("tank/noauto",): ("tank/noauto", "mount"),
    ("tank/unmounted",): ("tank/unmounted", "zfs mount"),
    ("tank/locked",): ("tank/locked", "zfs mount -l"),
    ("/nowhere/at/all",): ("/nowhere/at/all", ""),
    ("/tank/a/dir",): ("tank/a", ""),
    (): ("nothing was named", "--all"),
    ("-a", "tank/a"): ("exclude each other", ""),
    ("tank/a", "--root", "/x"): ("of no use", "--layout tree"),
    ("tank/a", "--client", "kopia"): ("kopia", "connect"),
    ("tank/a", "--client", "restic", "--command", "/no/such/restic"): ("/no/such/restic", ""),
    ("tank/a", "--", "-r", "rest:http://u:secretpw@h/"): ("secret", ""),
    ("tank/a", "--", "-x"): ("one-file-system", ""),
}


@pytest.fixture(scope="module")
def zoo(machine: Machine) -> Machine:
    """The machine with a dataset of each kind that cannot simply be backed up."""
    machine.load("tank")
    make_datasets(machine, "tank/a", "tank/a/kid", "tank/unmounted")
    fill(machine, "/tank/a", files=1, size_bytes=100)
    machine.run(
        f"set -e; mkdir -p /tank/a/dir; {KEY}; zfs create -V 8M tank/vol;"
        " zfs create -o mountpoint=legacy tank/legacy; zfs create -o mountpoint=none tank/none2;"
        " zfs create -o canmount=off tank/off; zfs create -o canmount=noauto tank/noauto;"
        " zfs unmount tank/unmounted; zfs create -o encryption=on -o keyformat=passphrase"
        " -o keylocation=file:///root/key tank/locked; zfs unload-key tank/locked 2>/dev/null ||"
        " { zfs unmount tank/locked; zfs unload-key tank/locked; };"
        f" {restic_command('init')}",
        timeout=300,
    )
    return machine


@pytest.fixture
def zoo_vm(zoo: Machine) -> Machine:
    return zoo


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_refused(zoo_vm: Machine, words: tuple[str, ...]) -> None:
    """It is refused with status 2, one line and a hint, and nothing was changed."""
    vm = zoo_vm
    before = vm.run("zfs list -H -t all -o name; zpool history -i | wc -l").stdout
    answer = atomtx(vm, "backup", *words)
    message, hint = WRONG[words]
    assert answer.status == 2, answer.output
    assert "Traceback" not in answer.output
    assert "secretpw" not in answer.output
    lines = answer.stderr.strip().splitlines()
    assert len(lines) <= 2
    assert message in lines[0], answer.stderr
    assert hint in answer.stderr
    assert vm.run("zfs list -H -t all -o name; zpool history -i | wc -l").stdout == before
    assert runs(vm) == []


def test_leading_dash(zoo_vm: Machine) -> None:
    """A name that begins with a dash is taken for an option that does not exist: status 2."""
    answer = atomtx(zoo_vm, "backup", "-tank/a")
    assert answer.status == 2
    assert "-t" in answer.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RESTIC_PASSWORD": "wrong"}, "password is wrong"),
        ({"RESTIC_PASSWORD": ""}, "password"),
        ({"RESTIC_REPOSITORY": "/srv/absent"}, "absent"),
        ({"ATOMTX_STATE_DIR": "/proc/atomtx"}, "/proc/atomtx"),
    ],
)
def test_environment(zoo_vm: Machine, env: dict[str, str], message: str) -> None:
    """A wrong password, repository or state directory is told before the first snapshot."""
    answer = atomtx(zoo_vm, "backup", "tank/a", env=env)
    assert answer.status == 2, answer.output
    assert message in answer.stderr.lower()
    assert leftovers(zoo_vm) == []


def test_no_client(zoo_vm: Machine) -> None:
    """Where nothing names a client, that is said, with the ways to name one."""
    answer = atomtx(zoo_vm, "backup", "tank/a", without=("RESTIC_REPOSITORY",))
    assert answer.status == 2
    assert "--client" in answer.stderr


def test_not_root(zoo_vm: Machine) -> None:
    """Without root it says so, changing nothing."""
    answer = zoo_vm.run(
        "cd / && setpriv --reuid nobody --regid nogroup --clear-groups env"
        " RESTIC_REPOSITORY=/srv/repo RESTIC_PASSWORD=x /venv/bin/atomtx backup tank/a",
        check=False,
        timeout=120,
    )
    assert answer.status == 2, answer.stderr
    assert "root" in answer.stderr


def test_damaged_and_newer_journal(zoo_vm: Machine) -> None:
    """A newer journal is refused and left as it is; a corrupt one too, under another name."""
    vm = zoo_vm
    for content, status, word in (
        ("head -c 8192 /dev/urandom > $J", 1, "damaged"),
        ("sqlite_newer", 2, "newer"),
    ):
        make = content
        if content == "sqlite_newer":
            make = (
                "python3 -c \"import sqlite3,os; c=sqlite3.connect(os.environ['J']);"
                " c.execute('create table t(x)'); c.execute('pragma application_id=0x61746f6d');"
                " c.execute('pragma user_version=99'); c.commit()\""
            )
        vm.run(f"export J=/var/lib/atomtx/journal.db; mkdir -p /var/lib/atomtx; rm -f $J; {make}")
        before = vm.run("sha256sum /var/lib/atomtx/journal.db").stdout
        looking = [("history",), ("recover", "--dry-run")]
        for command in (*looking, ("backup", "tank/a")):
            assert vm.run("sha256sum /var/lib/atomtx/journal.db").stdout == before
            answer = atomtx(vm, *command)
            assert answer.status == status, answer.output
            assert word in answer.stderr
        kept = "/var/lib/atomtx/journal.db" + (".damaged-*Z" if word == "damaged" else "")
        assert vm.run(f"sha256sum {kept}").stdout.split()[0] == before.split()[0]
    vm.run("rm -rf /var/lib/atomtx")


def test_all_reports_what_it_skips(zoo_vm: Machine) -> None:
    """Under -a what cannot be backed up is reported, and the rest is backed up (promise 7)."""
    answer = atomtx(zoo_vm, "backup", "-a")
    assert answer.status == 0, answer.output
    for name in ("tank/vol", "tank/locked", "tank/legacy", "tank/noauto", "tank/unmounted"):
        assert f"{name} is not in the backup" in answer.output, answer.output
    assert runs(zoo_vm)[0]["outcome"] == "completed"
    assert leftovers(zoo_vm) == []


def test_child_not_included(zoo_vm: Machine) -> None:
    """Without -r a child dataset below the mountpoint is named, never silently missing."""
    answer = atomtx(zoo_vm, "backup", "tank/a")
    assert answer.status == 0, answer.output
    assert "tank/a/kid is not in the backup" in answer.output
