"""Real clients on real ZFS: nothing is read twice, each result is kept, wrappers are clients."""

from __future__ import annotations

import json

import pytest

from tests.vm.machine import Machine
from tests.vm.remote import atomtx, backups, restic_command, runs
from tests.vm.scene import WITH_COPIER, Prepare, is_copied, make_journal, script
from tests.vm.tank import fill, leftovers, make_datasets

RESTICS = {
    "0.14": "/clients/restic-0.14.0",
    "0.16": "/clients/restic-0.16.5",
    "0.18": "/usr/bin/restic",
    "0.19": "/clients/restic-0.19.1",
}
HAS_FEATURE = ("0.18", "0.19")  # device-id-for-hardlinks, from 0.17 on


def trace(vm: Machine, program: str) -> str:
    """Make a wrapper that notes, outside the client, each file that it opens; return its path."""
    # With the filter in the kernel no other system call stops the client.
    strace = "strace --seccomp-bpf -f -qq -e trace=openat -e signal=none -o /root/trace"
    return script(vm, "/root/traced", f'exec {strace} {program} "$@"')


def files_read(vm: Machine) -> list[str]:
    """Return the files of the pool that the traced client opened, directories left out."""
    lines = vm.run("grep -h '\"/tank/' /root/trace || true", check=False).stdout.splitlines()
    opened = [line for line in lines if "O_DIRECTORY" not in line and " = -1 " not in line]
    paths = {line.split('"')[1] for line in opened}
    found = vm.run(
        'while read -r p; do test -f "$p" && echo "$p"; done; true', input="\n".join(paths) + "\n"
    )
    return sorted(found.stdout.split("\n")[:-1])


def nested_datasets(vm: Machine) -> None:
    make_datasets(vm, "tank/a", "tank/a/kid")
    vm.run(
        "for d in /tank/a /tank/a/kid; do for i in 0 1 2 3 4; do mkdir -p $d/dir$i;"
        " head -c 20000 /dev/urandom | split -b 5000 - $d/dir$i/; done; done"
    )
    make_journal(vm)


@pytest.fixture
def tree(prepared: Prepare) -> Machine:
    """The machine with two nested datasets of ten directories, no hard links."""
    return prepared("tank", nested_datasets)


def restic_repository(vm: Machine) -> None:
    nested_datasets(vm)
    vm.run(restic_command("init"))


@pytest.fixture
def restic(prepared: Prepare) -> Machine:
    """The same with an empty repository of the machine's own restic."""
    return prepared("tank", restic_repository)


def kopia_repository(vm: Machine) -> None:
    nested_datasets(vm)
    vm.run(
        "KOPIA_PASSWORD='correct horse' kopia repository create filesystem --path /srv/kopia",
        timeout=300,
    )


@pytest.fixture
def kopia(prepared: Prepare) -> Machine:
    """The same with an empty repository of kopia, and connected to it."""
    return prepared("tank", kopia_repository)


@pytest.mark.parametrize(
    "version",
    [v if v == "0.19" else pytest.param(v, marks=pytest.mark.full) for v in RESTICS],
)
def test_restic_reads_nothing_again(tree: Machine, version: str) -> None:
    """
    The second backup of unchanged data opens no file; from 0.17 on it adds few tree blobs.

    Those are the roots of the datasets and their ancestors: their inodes are synthetic and
    change with each snapshot.
    """
    vm, restic = tree, RESTICS[version]
    vm.run(restic_command("init", restic))
    wrapper = trace(vm, restic)
    command = ("backup", "-r", "tank/a", "--client", "restic", "--command", wrapper)
    assert (first := atomtx(vm, *command)).status == 0, first.output
    assert len(files_read(vm)) == 40
    before = len(json_lines(vm, restic))
    assert (second := atomtx(vm, *command)).status == 0, second.output
    assert files_read(vm) == []
    added = len(json_lines(vm, restic)) - before
    if version in HAS_FEATURE:
        assert added <= 4  # /, /tank, /tank/a, /tank/a/kid
    assert [run["outcome"] for run in runs(vm)] == ["completed", "completed"]
    assert leftovers(vm) == []


def json_lines(vm: Machine, restic: str) -> list[str]:
    """Return the tree blobs of the repository."""
    listed = vm.run(restic_command("list blobs", restic)).stdout
    return [line for line in listed.splitlines() if line.startswith("tree")]


def test_restic_moment(restic: Machine) -> None:
    """The backup's time in the repository is the snapshot's, whatever the time zone."""
    vm = restic
    answer = atomtx(vm, "backup", "tank/a", env={"TZ": "America/New_York"})
    assert answer.status == 0, answer.output
    shown = json.loads(atomtx(vm, "show", "--json", runs(vm)[0]["id"]).stdout)
    moment = shown["run"]["moment_at"] if "run" in shown else shown["moment_at"]
    as_utc = vm.run(f"date -u -d '{backups(vm)[0]['time']}' +%Y-%m-%dT%H:%M:%S").stdout.strip()
    assert moment.startswith(as_utc)


@pytest.mark.full  # tests/contract/test_clients.py has it without ZFS
def test_clock_set_back(restic: Machine) -> None:
    """After the clock was set back the parent is still found: no file is read again."""
    vm = restic
    wrapper = trace(vm, "/usr/bin/restic")
    command = ("backup", "-r", "tank/a", "--client", "restic", "--command", wrapper)
    assert atomtx(vm, *command).status == 0
    vm.run("date -s '-2 hours'")
    assert (second := atomtx(vm, *command)).status == 0, second.output
    assert files_read(vm) == []


def test_partial(restic: Machine) -> None:
    """restic's exit 3, some files could not be read, is `partial`, exit 3."""
    vm = restic
    # A file that even root cannot open: restic runs as another user through a wrapper.
    vm.run(
        "touch /tank/a/secret && chmod 600 /tank/a/secret && useradd -m backup2;"
        " chown -R backup2 /srv/repo; cat > /root/as-user <<'END'\n#!/bin/sh\n"
        'exec setpriv --reuid backup2 --regid backup2 --clear-groups restic --no-cache "$@"\nEND\n'
        "chmod 755 /root/as-user /root"
    )
    answer = atomtx(vm, "backup", "tank/a", "--client", "restic", "--command", "/root/as-user")
    assert answer.status == 3, answer.output
    assert runs(vm)[0]["outcome"] == "partial"
    assert len(backups(vm)) == 1
    assert leftovers(vm) == []


def test_kopia(kopia: Machine) -> None:
    """kopia makes a manifest a dataset, each a result; the second run opens no file."""
    vm = kopia
    make_datasets(vm, "tank/z")
    fill(vm, "/tank/z", files=4, size_bytes=1000)
    env = {"KOPIA_PASSWORD": "correct horse", "KOPIA_CHECK_FOR_UPDATES": "false"}
    wrapper = trace(vm, "kopia")
    without = ("RESTIC_REPOSITORY", "RESTIC_PASSWORD")
    command = ("backup", "-r", "tank/a", "tank/z", "--client", "kopia", "--command", wrapper)
    first = atomtx(vm, *command, env=env, without=without)
    assert first.status == 0, first.output
    assert len(files_read(vm)) == 44
    assert (second := atomtx(vm, *command, env=env, without=without)).status == 0, second.output
    assert files_read(vm) == []
    shown = json.loads(atomtx(vm, "show", "--json", runs(vm)[0]["id"]).stdout)
    assert [b["path"] for b in shown["backups"]] == ["/tank/a", "/tank/z"]
    assert len({b["backup_id"] for b in shown["backups"]}) == 2
    listed = json.loads(
        vm.run("KOPIA_PASSWORD='correct horse' kopia snapshot list --json", timeout=300).stdout
    )
    assert {b["backup_id"] for b in shown["backups"]} <= {m["id"] for m in listed}
    assert leftovers(vm) == []


def test_kopia_is_found(kopia: Machine) -> None:
    """Without --client a connected kopia repository is what the environment names."""
    vm = kopia
    without = ("RESTIC_REPOSITORY", "RESTIC_PASSWORD")
    env = {"KOPIA_PASSWORD": "correct horse"}
    answer = atomtx(vm, "backup", "tank/a", env=env, without=without)
    assert answer.status == 0, answer.output
    assert runs(vm)[0]["client"] == "kopia"


def test_command_gets_paths(tree: Machine) -> None:
    """Any command gets the paths appended, frozen, and its exit status is the result."""
    vm = tree
    vm.run(
        "cat > /root/mine <<'END'\n#!/bin/sh\necho \"$@\" > /root/arguments\n"
        "cat /tank/a/dir0/aa > /root/seen\necho changed >> /root/live\nEND\nchmod 755 /root/mine"
    )
    answer = atomtx(vm, "backup", "tank/a", "--command", "/root/mine backup", "--", "--tag", "x y")
    assert answer.status == 0, answer.output
    assert vm.run("cat /root/arguments").stdout == "backup --tag x y /tank/a\n"
    assert vm.run("cmp /root/seen /tank/a/dir0/aa").status == 0
    vm.run("printf '#!/bin/sh\\nexit 7\\n' > /root/mine")
    answer = atomtx(vm, "backup", "tank/a", "--command", "/root/mine backup")
    assert answer.status == 1
    assert "7" in runs(vm)[0]["reason"]
    assert leftovers(vm) == []


def test_tree_layout(restic: Machine) -> None:
    """--layout tree shows the snapshots under one root, relative, and takes it all away."""
    vm = restic
    wrapper = trace(vm, "/usr/bin/restic")
    options = ("--layout", "tree", "--root", "/tree", "--client", "restic", "--command", wrapper)
    assert (one := atomtx(vm, "backup", "-r", "tank/a", *options)).status == 0, one.output
    assert (two := atomtx(vm, "backup", "-r", "tank/a", *options)).status == 0, two.output
    opened = vm.run("grep -c 'openat.*dir./' /root/trace || true", check=False).stdout.strip()
    assert opened == "0"
    assert "/tank/a/kid/dir0/aa" in vm.run(restic_command("ls latest")).stdout
    assert vm.run("test -e /tree", check=False).status == 1
    assert leftovers(vm) == []


@pytest.mark.parametrize(
    "state",
    [
        "mounted",
        *(
            pytest.param(s, marks=pytest.mark.full)
            for s in ("snapshotted", "backing-up", "unmounting")
        ),
    ],
)
def test_tree_layout_killed(tree: Machine, state: str) -> None:
    """A run in the tree layout that is killed is settled too, its mounts and directories gone."""
    vm = tree
    options = ("--layout", "tree", "--root", "/tree", *WITH_COPIER)
    kill = {"at": f"journal:{state}#1", "who": "all"}
    assert atomtx(vm, "backup", "-r", "tank/a", *options, kill=kill).status == -9
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert runs(vm)[0]["outcome"] == "completed"
    assert is_copied(vm)
    assert vm.run("diff -r /tank/a /srv/copy/tree/tank/a").status == 0
    assert vm.run("test -e /tree", check=False).status == 1
    assert leftovers(vm) == []
