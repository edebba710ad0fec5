"""Copies in another pool and on another machine, on real ZFS: killed anywhere, and cut off."""

from __future__ import annotations

import pytest

from tests.extent import some
from tests.vm import remote
from tests.vm.machine import DATA_DISKS, Machine
from tests.vm.remote import Answer, atomtx, runs, stop_at
from tests.vm.scene import Prepare, make_journal, running
from tests.vm.tank import make_datasets, make_pool

PATTERN = ("--pattern", "s-%Y%m%d%H%M%S")
NAMES = ("tank/a", "tank/vol", "tank/enc")
DATASETS = ("tank/a", "tank/a/b c", "tank/enc", "tank/vol")
HERE = "backup/here"
CLONE = ("clone", "-r", *NAMES, *PATTERN)
SLOW = ("--rate", "512K")
PASSPHRASE = "correct horse"


def two_pools(vm: Machine) -> None:
    make_pool(vm, "backup", DATA_DISKS[1])
    vm.run(f"zfs create {HERE} && zfs create backup/there")
    make_datasets(vm, "tank/a", "tank/a/b c")
    vm.run(
        "zfs create -V 16M tank/vol && zfs set compression=gzip tank/a &&"
        f" echo {PASSPHRASE!r} | zfs create -o encryption=on -o keyformat=passphrase tank/enc"
    )
    # A machine that reaches itself by ssh is as good as another one.
    vm.run(
        "test -f /root/.ssh/id_ed25519 || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519;"
        " cat /root/.ssh/id_ed25519.pub >> /root/.ssh/authorized_keys;"
        " ssh -o StrictHostKeyChecking=accept-new -o BatchMode=yes localhost true",
        timeout=120,
    )
    make_journal(vm)


@pytest.fixture
def pools(prepared: Prepare) -> Machine:
    """The machine with datasets, a volume, an encrypted dataset, and a pool for copies."""
    return prepared("tank", two_pools)


def snap(vm: Machine, *, size: int = 200_000) -> None:
    """Change all that is copied, and take snapshots that stay."""
    for folder in ("/tank/a", "/tank/a/b c", "/tank/enc"):
        vm.run(f"cd '{folder}' && head -c {size} /dev/urandom > f$(ls | wc -l)")
    vm.run(f"head -c {size} /dev/urandom | dd of=/dev/zvol/tank/vol conv=notrunc 2>/dev/null")
    vm.run("sleep 1.1; sync")  # one a second
    answer = atomtx(vm, "snap", "-r", *NAMES, *PATTERN)
    assert answer.status == 0, answer.output


def clone(
    vm: Machine,
    *words: str,
    at: str = "none",
    who: str = "front",
    delay_s: float = 0,
    to: str = HERE,
) -> Answer:
    return atomtx(vm, *CLONE, "--to", to, *words, kill=stop_at(at, who, delay_s=delay_s))


def cut_off(vm: Machine, *, who: str = "front later", to: str = HERE) -> Answer:
    """Clone slowly, and have it ended in mid-stream, which leaves a token at the copy of tank/a."""
    # By ssh, the target is asked first; not compressed, it is not asked for zstd.
    at = "start:zfs receive#1" if to == HERE else "start:ssh#2"
    answer = clone(vm, *SLOW, "--no-compress", at=at, who=who, delay_s=5, to=to)
    copy = copy_of("tank/a", to.rpartition(":")[2])
    vm.run(f"while pgrep -f '[z]fs receive'; do sleep 0.2; done; zfs list -Ho name {copy}")
    assert vm.run(f"zfs get -Ho value receive_resume_token {copy}").stdout.startswith("1-")
    return answer


def copy_of(dataset: str, below: str = HERE) -> str:
    return f"{below}/{dataset.partition('/')[2]}"


def guids(vm: Machine, dataset: str) -> list[tuple[str, str]]:
    """Return the names and guids of a dataset's snapshots of the pattern, the oldest first."""
    lines = vm.run(
        f"zfs list -Hp -d 1 -t snapshot -s createtxg -o name,guid '{dataset}' 2>/dev/null || true"
    ).stdout.splitlines()
    pairs = [line.split("\t") for line in lines]
    return [(name.partition("@")[2], guid) for name, guid in pairs if "@s-" in name]


def holds(vm: Machine, dataset: str) -> dict[str, str]:
    """Return the tag of each hold on a dataset's snapshots, by the snapshot's short name."""
    out = vm.run(f"zfs list -Hpt snapshot -o name '{dataset}' | xargs -d '\\n' zfs holds -H").stdout
    return {line.split("\t")[0].partition("@")[2]: line.split("\t")[1] for line in out.splitlines()}


def check_copies(vm: Machine, below: str = HERE, *, contents: bool = True) -> None:
    """Every copy has the snapshots of its dataset, is equal, held, read-only and not mounted."""
    for dataset in DATASETS:
        copy, there = copy_of(dataset, below), guids(vm, dataset)
        assert guids(vm, copy) == there, copy
        newest = there[-1][0]
        target = below if below == HERE else f"localhost:{below}"
        assert f":{target}:" in holds(vm, dataset).get(newest, "")
        assert holds(vm, copy) == {newest: "atomtx-clone"}
        facts = vm.run(f"zfs get -Ho value readonly,mounted,receive_resume_token '{copy}'").stdout
        mounted = "-" if dataset == "tank/vol" else "no"
        assert facts.split() == ["on", mounted, "-"], copy
        if contents:
            assert sums(vm, f"{dataset}@{newest}") == sums(vm, f"{copy}@{newest}")


def sums(vm: Machine, snapshot: str) -> str:
    """Return a checksum of all that is in a snapshot; of one that is encrypted load the key."""
    dataset = snapshot.partition("@")[0]
    if dataset.endswith("vol"):
        device = f"/dev/zvol/{snapshot}"
        found = vm.run(
            f"zfs set snapdev=visible {dataset} && udevadm settle &&"
            f" until test -e {device}; do sleep 0.1; done; sha256sum < {device};"
            f" zfs inherit snapdev {dataset}; udevadm settle"
        ).stdout
        assert found
        return found
    load = f"echo {PASSPHRASE!r} | zfs load-key {dataset} 2>/dev/null;" if "enc" in dataset else ""
    unload = f"zfs unload-key {dataset};" if "backup" in dataset and load else ""
    found = vm.run(
        f"{load} mount -t zfs '{snapshot}' /mnt && cd /mnt &&"
        " find . -printf '%p %y %m %U %G %s %T@\\n' | sort &&"
        f" find . -type f -print0 | sort -z | xargs -0 sha256sum; cd /; umount /mnt; {unload}"
    ).stdout
    assert found
    return found


def recovered(vm: Machine) -> Answer:
    """Recover; nothing may be left to do."""
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    assert "nothing to recover" in atomtx(vm, "recover").output
    return answer


def test_course(pools: Machine) -> None:
    """The first time all of it, then what is new, then nothing; what is foreign stays at home."""
    vm = pools
    snap(vm)
    snap(vm)
    vm.run("zfs snapshot -r tank@foreign")
    dry = clone(vm, "--dry-run")
    assert dry.status == 0, dry.output
    assert f"tank/a/b c to {HERE}/a/b c: all of tank/a/b c@s-" in dry.stdout
    assert guids(vm, f"{HERE}/a") == []
    answer = clone(vm)
    assert answer.status == 0, answer.output
    assert "4 copies are up to date" in answer.output
    check_copies(vm)
    assert vm.run(f"zfs get -Ho value compression {HERE}/a").stdout == "gzip\n"
    assert vm.run(f"zfs get -Ho value keystatus {HERE}/enc").stdout == "unavailable\n"
    sent = vm.run("zpool history backup | grep -c 'zfs receive'").stdout
    answer = clone(vm)
    assert answer.status == 0, answer.output
    assert vm.run("zpool history backup | grep -c 'zfs receive'").stdout == sent
    snap(vm)
    vm.run("zfs unload-key -a 2>/dev/null; zfs umount tank/enc && zfs unload-key tank/enc")
    answer = clone(vm)
    assert answer.status == 0, answer.output
    check_copies(vm)
    (run, *_) = runs(vm)
    assert (run["state"], run["outcome"]) == ("cloned", "completed")


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_killed(pools: Machine) -> None:
    """Killed at a point, recover brings all copies up to date; a hold is never left behind."""
    vm = pools
    snap(vm)
    points = [p for p in clone(vm).points if "before:" not in p]
    assert {"start:zfs send#1", "start:zfs receive#1", "journal:cloned#1"} <= set(points)
    for point in some(points, 4):
        snap(vm)
        known = len(runs(vm))
        assert clone(vm, at=point).status == -9, point
        recovered(vm)
        if len(runs(vm)) == known:  # it was not in the journal yet
            assert clone(vm).status == 0
        (run, *_) = runs(vm)
        assert (run["state"], run["outcome"]) == ("cloned", "completed"), point
        check_copies(vm, contents=False)
    check_copies(vm)


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_cut_off(pools: Machine) -> None:
    """Killed in mid-stream, what has arrived is gone on with; nothing is sent twice."""
    vm = pools
    snap(vm, size=8_000_000)
    assert cut_off(vm).status == -9
    answer = recovered(vm)
    assert "the rest of tank/a@s-" in answer.output
    check_copies(vm)
    assert vm.run(f"zfs get -Ho value compression {HERE}/a").stdout == "gzip\n"
    # The rest of a stream has no properties.
    marks = vm.run(f"zfs get -Ho value -t snapshot -r atomtx:kept {HERE}").stdout.split()
    assert len(marks) == len(DATASETS)
    assert "-" not in marks


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
@pytest.mark.parametrize("stage", ["zfs send", "zfs receive"])
def test_stage_killed(pools: Machine, stage: str) -> None:
    """No stage of the pipe fails unseen; the others are copied, and the next clone mends it."""
    vm = pools
    snap(vm, size=3_000_000)
    with running(vm, *CLONE, "--to", HERE, *SLOW) as started:
        vm.run(
            f"until pgrep -f '[z]fs receive'; do sleep 0.2; done; sleep 3; pkill -9 -f '^{stage}'"
        )
    answer = started.result()
    assert answer.status == 3, answer.output
    assert f"{stage}" in answer.output
    (run, *_) = runs(vm)
    assert run["outcome"] == "partial"
    assert clone(vm).status == 0
    check_copies(vm)


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_interrupted(pools: Machine) -> None:
    """Ctrl-C: what has arrived stays, and the next clone goes on with it."""
    vm = pools
    snap(vm, size=8_000_000)
    answer = cut_off(vm, who="signal 2")
    assert answer.status == 130, answer.output
    assert "nothing to recover" in atomtx(vm, "recover").output
    assert vm.run("pgrep -c zfs || true").stdout.strip() == "0"
    answer = clone(vm)
    assert answer.status == 0, answer.output
    assert "the rest of tank/a@s-" in answer.output
    check_copies(vm)


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_given_up(pools: Machine) -> None:
    """`recover --rollback` throws away what was cut off, and releases what that needed."""
    vm = pools
    snap(vm, size=8_000_000)
    assert cut_off(vm).status == -9
    answer = atomtx(vm, "recover", "--rollback")
    assert answer.status in (0, 3), answer.output
    assert vm.run(f"zfs list -H -o name -r {HERE}").stdout.split() == [HERE]
    assert set(vm.run("zfs list -Hpt snapshot -o userrefs").stdout.split()) == {"0"}


@pytest.mark.full
def test_power_cut(pools: Machine) -> None:
    """After a power cut in mid-stream, recover goes on with what had reached the disk."""
    vm = pools
    snap(vm)
    assert clone(vm).status == 0
    snap(vm, size=8_000_000)
    atomtx(vm, *CLONE, "--to", HERE, *SLOW, background=True)
    vm.run("until pgrep -f '[z]fs receive'; do sleep 0.2; done; sleep 12")
    vm.power_off_hard()
    vm.boot()
    remote.install(vm)
    vm.run("zpool list backup >/dev/null 2>&1 || zpool import -a")
    vm.run(f"echo {PASSPHRASE!r} | zfs load-key tank/enc && zfs mount -a")
    recovered(vm)
    check_copies(vm)
    (run, *_) = runs(vm)
    assert (run["state"], run["outcome"]) == ("cloned", "completed")


def test_ssh(pools: Machine) -> None:
    """Through ssh, killed in mid-stream at the other end and at this one; compressed."""
    vm = pools
    target = "localhost:backup/there"
    snap(vm, size=4_000_000)
    with running(vm, *CLONE, "--to", target, *SLOW) as started:
        vm.run("until pgrep -f '[z]fs receive'; do sleep 0.2; done; sleep 3; pkill -9 '^ssh$'")
    answer = started.result()
    assert answer.status == 3, answer.output
    assert "zfs receive localhost:backup/there/a: killed by SIGKILL" in answer.output
    assert cut_off(vm, to=target).status == -9
    assert "the rest of tank/a@s-" in recovered(vm).output
    check_copies(vm, "backup/there")
    snap(vm)
    answer = clone(vm, to=target)
    assert answer.status == 0, answer.output
    check_copies(vm, "backup/there")


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_unreachable(pools: Machine) -> None:
    """A machine that cannot be reached: the clone fails; an interrupted one waits for it."""
    vm = pools
    snap(vm, size=4_000_000)
    answer = clone(vm, to="nowhere.invalid:backup/there")
    assert answer.status == 1, answer.output
    assert "nowhere.invalid cannot be reached" in answer.output
    target = "localhost:backup/there"
    assert cut_off(vm, to=target).status == -9
    vm.run("mv /root/.ssh/authorized_keys /root/.ssh/away")  # the test's own connection stays
    answer = atomtx(vm, "recover")
    vm.run("mv /root/.ssh/away /root/.ssh/authorized_keys")
    assert answer.status == 6, answer.output
    assert "localhost cannot be reached" in answer.output
    recovered(vm)
    check_copies(vm, "backup/there")


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_pool_away(pools: Machine) -> None:
    """Where the target's pool is not there, or is another of its name, nothing is concluded."""
    vm = pools
    snap(vm)
    assert clone(vm).status == 0
    snap(vm, size=4_000_000)
    assert cut_off(vm).status == -9
    held = {dataset: holds(vm, dataset) for dataset in DATASETS}
    vm.run("zpool export backup")
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "pool backup is not imported" in answer.output
    assert atomtx(vm, "recover", "--rollback").status == 6
    vm.run(
        "truncate -s 100M /tmp/other && zpool create backup /tmp/other && zfs create backup/here"
    )
    answer = atomtx(vm, "recover")
    assert answer.status == 6, answer.output
    assert "the pool backup that is imported is another one" in answer.output
    assert {dataset: holds(vm, dataset) for dataset in DATASETS} == held
    vm.run("zpool destroy backup && rm /tmp/other && zpool import backup")
    recovered(vm)
    check_copies(vm)


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_own_way(pools: Machine) -> None:
    """A copy that has something of its own is left alone, and told; the others are copied."""
    vm = pools
    snap(vm)
    assert clone(vm).status == 0
    snap(vm)
    vm.run(f"zfs snapshot {HERE}/a@mine")
    vm.run(
        f'c=\'{HERE}/a/b c\'; zfs set readonly=off "$c" && zfs mount "$c" &&'
        ' echo x > "/$c/x" && zfs umount "$c" && zfs set readonly=on "$c"'
    )
    answer = clone(vm)
    assert answer.status == 3, answer.output
    assert f"{HERE}/a has a snapshot of its own, @mine" in answer.output
    assert "has been modified" in answer.output
    assert len(guids(vm, f"{HERE}/vol")) == 2
    vm.run(f"zfs destroy {HERE}/a@mine")
    answer = clone(vm, "--discard-changes")
    assert answer.status == 0, answer.output
    check_copies(vm)


@pytest.mark.full
def test_discard_beside_a_part(pools: Machine) -> None:
    """A copy was written to beside a part of a stream: the rest arrives once that is undone."""
    vm = pools
    snap(vm)
    assert clone(vm).status == 0
    snap(vm, size=8_000_000)
    assert cut_off(vm, who="signal 2").status == 130
    copy = f"{HERE}/a"
    vm.run(
        f"zfs set readonly=off {copy} && zfs mount {copy} && echo x > /{copy}/x &&"
        f" zfs umount {copy} && zfs set readonly=on {copy}"
    )
    answer = clone(vm)
    assert answer.status == 3, answer.output
    assert "has been modified" in answer.output
    answer = clone(vm, "--discard-changes")
    assert answer.status == 0, answer.output
    check_copies(vm)


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_from_bookmark(pools: Machine) -> None:
    """Where the last common snapshot is gone at home, its bookmark is what a clone begins at."""
    vm = pools
    snap(vm)
    assert clone(vm).status == 0
    first = guids(vm, "tank/a")[0][0]
    snap(vm)
    for dataset in DATASETS:
        vm.run(
            f"zfs release {holds(vm, dataset)[first]} '{dataset}@{first}' &&"
            f" zfs bookmark '{dataset}@{first}' '{dataset}#{first}' &&"
            f" zfs destroy '{dataset}@{first}'"
        )
    answer = clone(vm)
    assert answer.status == 0, answer.output
    for dataset in DATASETS:
        assert guids(vm, copy_of(dataset))[1:] == guids(vm, dataset)


def test_room(pools: Machine) -> None:
    """
    A copy has no quota of its source's, and holds more snapshots; no room is reserved for it.

    Nor a refquota, which may be less than what an older snapshot refers to.
    """
    vm = pools
    vm.run(
        "zfs set quota=11M refquota=8M reservation=3M refreservation=2M tank/a &&"
        " zfs set refreservation=16M reservation=16M tank/vol && zfs set quota=5750K tank/enc"
    )
    for _ in range(3):
        vm.run("rm -f /tank/a/f* '/tank/a/b c/f'* /tank/enc/f*")
        snap(vm, size=2_000_000)
        answer = clone(vm)
        assert answer.status == 0, answer.output
        assert "Warning" not in answer.output
        gone = [f"'{d}@{name}'" for d in DATASETS for name, _guid in guids(vm, d)[:-1]]
        destroyed = "".join(f"zfs destroy {name} && " for name in gone)  # all but the newest
        vm.run(f"{destroyed}zpool wait -t free tank && zpool sync tank")  # until then it counts
    room = {name: _room(vm, copy_of(name)) for name in NAMES}
    assert room["tank/a"] == {"quota": 0, "refquota": 0, "reservation": 0} | _FREE
    assert room["tank/enc"] == {"quota": 0, "refquota": 0, "reservation": 0} | _FREE
    assert room["tank/vol"] == {"reservation": 0} | _FREE
    assert [len(guids(vm, copy_of(dataset))) for dataset in DATASETS] == [3] * 4
    assert int(vm.run(f"zfs list -Hpo used {HERE}/a").stdout) > 11 << 20
    snap(vm, size=2_000_000)  # beside the last files: it refers to 4 MB
    vm.run("rm -f /tank/a/f* && zpool sync tank && zfs set quota=none refquota=3M tank/a")
    answer = clone(vm)
    assert answer.status == 0, answer.output
    snap(vm, size=1_000_000)
    answer = clone(vm)
    assert answer.status == 0, answer.output
    assert _room(vm, copy_of("tank/a"))["refquota"] == 0


_FREE = {"refreservation": 0}


def _room(vm: Machine, dataset: str) -> dict[str, int]:
    """Return the properties that limit or reserve the room of a dataset, if it has them."""
    names = "quota,refquota,reservation,refreservation"
    lines = vm.run(f"zfs get -Hpo property,value {names} {dataset}").stdout.splitlines()
    pairs = (line.split("\t") for line in lines)
    return {name: int(value) for name, value in pairs if value not in ("-", "none")}


@pytest.mark.full  # tests/unit/test_cloner.py has it, played
def test_pruned(pools: Machine) -> None:
    """Copies are pruned where the user says so; what the next clone begins with stays."""
    vm = pools
    for _ in range(3):
        snap(vm)
    assert clone(vm).status == 0
    prune = ("prune", "-r", HERE, *PATTERN, "--keep-last", "1")
    answer = atomtx(vm, *prune)
    assert "nothing to prune: 0 kept snapshots stay" in answer.output
    answer = atomtx(vm, *prune, "--copies")
    assert answer.status == 0, answer.output
    assert "8 kept snapshots destroyed, 4 stay" in answer.output
    assert "zfs destroy backup" not in vm.run("zpool history backup").stdout
    answer = atomtx(vm, "prune", "-r", *NAMES, *PATTERN, "--keep-last", "1")
    assert "8 kept snapshots destroyed, 4 stay" in answer.output
    snap(vm)
    answer = clone(vm)
    assert answer.status == 0, answer.output
    check_copies(vm)


def test_refused(pools: Machine) -> None:
    """What cannot be is said in one line, and nothing is begun."""
    vm = pools
    answer = clone(vm)
    assert answer.status == 2, answer.output
    assert "no kept snapshot" in answer.output
    snap(vm)
    for words, text in [
        (("--to", "backup/nope/deep"), "there is no dataset backup/nope"),
        (("--to", "tank/a"), "one of the datasets that are to be copied"),
        (("--to", "-oProxyCommand=x:y"), "is not a target"),
    ]:
        answer = atomtx(vm, *CLONE, *words)
        assert answer.status in (1, 2), (words, answer.output)
        assert text in answer.output
    assert set(vm.run("zfs list -Hpt snapshot -o userrefs").stdout.split()) <= {"0", "1"}
