"""
The services of systemd, installed by the commands of docs/systemd.md themselves.

Timers fire, the power is cut in mid-run, the machine boots, what was interrupted goes on with the
same moment, mails arrive in a mailbox, and what is restored is equal.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.vm.machine import CHECKOUT, DATA_DISKS, Machine
from tests.vm.remote import atomtx, runs
from tests.vm.tank import fill, leftovers, make_datasets, make_pool

DOCUMENT = CHECKOUT / "docs" / "systemd.md"
BLOCK = re.compile(r"^<!-- (run|file): (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
# Writes where a confined service may not.
SENDMAIL = "#!/bin/sh\n(echo From atomtx; cat; echo) >> /var/mail/root\n"
SLOW = '[jobs.{}]\narguments = ["--limit-upload", "40"]\n'
# The machine's own units for it are masked: they wait for udev to settle.
IMPORT = r"""
[Unit]
DefaultDependencies=no
Requires=dev-disk-by\x2did-virtio\x2ddata1.device
After=dev-disk-by\x2did-virtio\x2ddata1.device
After=systemd-modules-load.service systemd-remount-fs.service
Before=zfs-import.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/zpool import -d /dev/disk/by-id tank
[Install]
WantedBy=zfs-import.target
"""
# The clock only goes forward, whatever time it is outside: a timer's time that was missed would be
# made up for at the next boot.
DAY = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}"
BOOTED = "/venv/bin/python /root/agent.py start"


def document(kind: str, name: str) -> Iterator[str]:
    """Yield the blocks of the document for a set-up: files, or commands a line each."""
    for what, of, text in BLOCK.findall(DOCUMENT.read_text()):
        if (what, of) == (kind, name):
            yield text


def commands(name: str) -> list[str]:
    lines = [line for text in document("run", name) for line in text.splitlines()]
    assert lines
    assert all(line.startswith("# ") for line in lines)
    return [line.removeprefix("# ") for line in lines]


class Host:
    """The machine with what a reader has before the document's first line."""

    def __init__(self, vm: Machine, job: str) -> None:
        self.vm = vm
        self.job = job
        self.service = f"atomtx@{job}.service"
        self._boots = 0
        # A timer counts from its own start: the clock may only be set forward after that.
        vm.run(f"date -s '{DAY} 02:00'")
        vm.run("mkdir -p /mnt/backup /var/mail && : >/var/mail/root")
        vm.run("cat >/usr/sbin/sendmail && chmod 755 /usr/sbin/sendmail", input=SENDMAIL)

    def follow(self, name: str, part: slice = slice(None)) -> None:
        """Do what the document says, a part of it."""
        for command in commands(name)[part]:
            self.vm.run(command, timeout=600)

    def configure(self, text: str) -> None:
        self.vm.run("mkdir -p /etc/atomtx && cat >/etc/atomtx/atomtx.toml", input=text)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        out = self.vm.run(f"systemctl show {unit} " + " ".join(f"-p {n}" for n in names)).stdout
        return dict(line.split("=", 1) for line in out.splitlines())

    def start(self) -> None:
        """Start a backup and return when its client sends data."""
        self.vm.run(f"systemctl start --no-block {self.service}")
        self.until(f"pgrep -f 'restic backu[p]' && ! {self.is_still('/mnt/backup')}", 300)

    def wait_for_timer(self, before: str) -> None:
        """Set the clock to just before the timer's time, and wait until it has started a backup."""
        self.vm.run(f"date -s '{DAY} {before}'")
        started = f"systemctl show -p ExecMainStartTimestampMonotonic {self.service}"
        self.until(f"{started} | grep -v '=0$'", 120)

    def is_still(self, folder: str) -> str:
        count = f"find {folder} -path '*/data/*' -type f | wc -l"
        return f"test $({count}) = $(cat /tmp/before 2>/dev/null || echo 0)"

    def count(self) -> None:
        self.vm.run("find /mnt/backup -path '*/data/*' -type f | wc -l >/tmp/before")

    def until(self, condition: str, seconds: int) -> None:
        """Wait for a shell condition; what the services said is shown where it does not come."""
        look = f"({condition}) >/dev/null 2>&1 && exit 0"
        wait = f"for i in $(seq {seconds}); do {look}; sleep 1; done; exit 1"
        if self.vm.run(wait, check=False, timeout=seconds * 3 + 60).status:
            raise AssertionError(f"not within {seconds} s: {condition}\n{self.said()}")

    def ended(self, unit: str = "", seconds: int = 600) -> dict[str, str]:
        """Wait until a service has ended; return how."""
        unit = unit or self.service
        self.until(
            f"systemctl show -p ActiveState {unit} | grep -Eq '=(inactive|failed)$'", seconds
        )
        return self.show(unit, "ActiveState", "Result", "ExecMainStatus")

    def said(self) -> str:
        return self.vm.run(
            "journalctl -o short-monotonic --no-pager -u 'atomtx*' | tail -60"
        ).stdout

    def mails(self, count: int = 0) -> str:
        """Return the mailbox, when it has *count* mails."""
        self.until(f"test $(grep -c '^From atomtx' /var/mail/root) -ge {count}", 120)
        return self.vm.run("cat /var/mail/root").stdout

    def boot(self, *, order: str = "") -> None:
        """Cut the power, or shut down in *order*, and boot."""
        if order:
            self.vm.run(order, check=False)
            end = time.monotonic() + 400
            while self.vm._alive() and time.monotonic() < end:
                time.sleep(1)
            assert not self.vm._alive(), "the machine does not shut down"
        self.vm.power_off_hard()
        self._boots += 1
        self.vm.boot(clock=f"{DAY}T{11 + self._boots}:00:00")
        self.vm.run(BOOTED, timeout=300)

    def resumed(self) -> None:
        """Wait until the boot's clean-up and the resumption have ended, and well."""
        for unit in ("atomtx-recover.service", f"atomtx-resume@{self.job}.service"):
            # One that was not started yet is inactive as well.
            self.until(
                f"systemctl show -p ExecMainStartTimestampMonotonic {unit} | grep -v '=0$'", 200
            )
            assert self.ended(unit)["Result"] == "success", self.said()


def restored(vm: Machine, live: str, below: str) -> None:
    """Check that what was restored is equal to what is live."""
    found = vm.run(
        f"diff -r {live} {below}{live} && find {below}{live} -type f | wc -l", check=False
    )
    assert found.status == 0, found.stdout + found.stderr
    assert int(found.stdout) > 0


def zfs_host(vm: Machine) -> tuple[Host, str, int]:
    """Follow the document's ZFS set-up up to the first start; return its file, and how many."""
    vm.run("cat >/etc/systemd/system/import-tank.service", input=IMPORT)
    vm.run("systemctl enable import-tank.service")
    make_datasets(vm, "tank/home", "tank/home/ann")
    for name in ("tank/home", "tank/home/ann"):
        fill(vm, f"/{name}", files=3, size_bytes=300_000)
    host = Host(vm, "home")
    (text,) = document("file", "zfs")
    host.configure(text)
    before_start = next(n for n, c in enumerate(commands("zfs")) if c.startswith("systemctl start"))
    host.follow("zfs", slice(before_start))
    return host, text, before_start


def test_zfs(vm: Machine) -> None:
    """The ZFS set-up of the document: timer, power cut, boot, mails, removal."""
    host, text, before_start = zfs_host(vm)

    # The timer.
    host.wait_for_timer("02:59:50")
    assert host.ended()["Result"] == "success", host.said()
    (run,) = runs(vm)
    assert (run["outcome"], run["state"]) == ("completed", "destroyed")
    assert leftovers(vm) == []

    # By hand, and restored.
    host.follow("zfs", slice(before_start, None))
    restored(vm, "/tank/home", "/var/tmp/restored")
    assert host.mails() == ""

    # The power is cut.
    host.configure(text.replace("[jobs.home]\n", SLOW.format("home")))
    host.count()
    fill(vm, "/tank/home/ann", files=3, size_bytes=500_000)
    vm.run("cp -a /tank/home /var/tmp/expected && sync")
    host.start()
    vm.run("echo later >/tank/home/later; sync")
    host.boot()
    host.resumed()
    assert [run["attempts"] for run in runs(vm)] == [2, 1, 1]
    assert {run["outcome"] for run in runs(vm)} == {"completed"}
    assert leftovers(vm) == []
    assert "found unfinished" in host.mails(1)
    vm.run("rm -rf /var/tmp/restored")
    host.follow("zfs", slice(-1, None))
    vm.run("diff -r /var/tmp/expected /var/tmp/restored/tank/home")
    check_boot(host)

    # Nothing is left of the units.
    host.follow("removal")
    assert vm.run("find /etc/systemd/system /var/lib/systemd/timers -name '*atomtx*'").stdout == ""


@pytest.mark.full
def test_stop_and_shutdown(vm: Machine) -> None:
    """A run that is stopped, and one in a machine that is shut down, are gone on with."""
    host, text, _ = zfs_host(vm)

    # It is stopped: the moment is kept, and the next start goes on with it.
    host.configure(text.replace("[jobs.home]\n", SLOW.format("home")))
    host.count()
    fill(vm, "/tank/home/ann", files=3, size_bytes=1_000_000)
    host.start()
    vm.run(f"systemctl stop {host.service}", timeout=300)
    assert host.ended()["ActiveState"] == "inactive", host.said()
    assert vm.run("pgrep restic", check=False).status == 1
    assert len(vm.run("zfs list -H -t snapshot -o name").stdout.split()) == 2
    host.configure(text)
    vm.run(f"systemctl start {host.service}", timeout=600)
    assert [run["attempts"] for run in runs(vm)] == [1, 2]
    assert leftovers(vm) == []

    # The machine is shut down.
    host.configure(text.replace("[jobs.home]\n", SLOW.format("home")))
    host.count()
    fill(vm, "/tank/home/ann", files=3, size_bytes=1_000_000)
    host.start()
    host.boot(order="systemctl --no-block poweroff")
    host.resumed()
    assert host.ended()["Result"] == "success", host.said()  # the timer's time was missed
    assert [run["attempts"] for run in runs(vm)] == [1, 2, 1, 2], host.said()
    assert {run["outcome"] for run in runs(vm)} == {"completed"}
    assert leftovers(vm) == []


def check_boot(host: Host) -> None:
    """Check that the boot has not waited for the resumption, nor for the clean-up."""
    resume = f"atomtx-resume@{host.job}.service"
    up = int(host.show("multi-user.target", "ActiveEnterTimestampMonotonic").popitem()[1])
    done = int(host.show(resume, "ExecMainExitTimestampMonotonic").popitem()[1])
    assert up < done
    after = host.show("multi-user.target", "After")["After"].split()
    assert "atomtx-recover.service" not in after


JOBS = """
[defaults]
recursive = true

[jobs.photos]
volumes = ["tank/home"]
client = "kopia"
environment = { KOPIA_CONFIG_PATH = "/etc/kopia/repository.config" }
credentials.KOPIA_PASSWORD = { file = "/etc/atomtx/password" }
retention = ["--keep-latest", "3"]
pre-hook = ["/usr/local/sbin/hook", "pre"]
post-hook = ["/usr/local/sbin/hook", "post"]
quiesce = ["/usr/local/sbin/hook", "quiesce"]
thaw = ["/usr/local/sbin/hook", "thaw"]
after-success = ["/usr/local/sbin/hook", "success"]
after-failure = ["/usr/local/sbin/hook", "failure"]
write-paths = ["/var/backups"]

[jobs.tree]
volumes = ["tank/home"]
client = "restic"
layout = "tree"
root = "/srv/frozen"
environment = { RESTIC_REPOSITORY = "/mnt/backup/restic" }
credentials.RESTIC_PASSWORD = { file = "/etc/atomtx/password" }

[jobs.own]
volumes = ["tank/home"]
client = "command"
command = ["tar", "--acls", "--xattrs", "-cf", "/var/backups/own.tar"]
write-paths = ["/var/backups"]
"""
# As another user, as a dump of a database is made.
HOOK = """#!/bin/sh
set -e
exec >>/var/backups/hooks
echo "$1 $ATOMTX_JOB $(runuser -u nobody -- id -un)"
"""
SET_UP = """
set -e
mkdir -p -m 700 /etc/atomtx /etc/kopia
mkdir -p /srv/frozen /var/backups
(umask 077; echo secret-of-tests >/etc/atomtx/password)
restic init -q --repo /mnt/backup/restic --password-file /etc/atomtx/password
mkdir /mnt/backup/kopia
KOPIA_PASSWORD=secret-of-tests KOPIA_CHECK_FOR_UPDATES=false kopia repository create filesystem \
    --path /mnt/backup/kopia --config-file /etc/kopia/repository.config --no-persist-credentials
"""

RESTORE = """
set -e
export KOPIA_PASSWORD=secret-of-tests KOPIA_CHECK_FOR_UPDATES=false
kopia="kopia --config-file /etc/kopia/repository.config"
$kopia snapshot list --json /tank/home >/tmp/list
id=$(python3 -c 'import json; print(json.load(open("/tmp/list"))[-1]["id"])')
$kopia restore $id /var/tmp/kopia/tank/home
restic restore -q latest --repo /mnt/backup/restic --password-file /etc/atomtx/password \
    --target /var/tmp/tree
mkdir /var/tmp/own
tar -xf /var/backups/own.tar -C /var/tmp/own
"""


@pytest.mark.full
def test_kinds_of_jobs(vm: Machine) -> None:
    """kopia, every hook, a tree and a command of one's own in the confined service; restored."""
    make_datasets(vm, "tank/home", "tank/home/ann")
    for name in ("tank/home", "tank/home/ann"):
        fill(vm, f"/{name}", files=3, size_bytes=100_000)
    host = Host(vm, "photos")
    vm.run(SET_UP, timeout=300)
    vm.run("cat >/usr/local/sbin/hook && chmod 755 /usr/local/sbin/hook", input=HOOK)
    host.configure(JOBS)
    vm.run("atomtx install systemd", timeout=300)
    for job in ("photos", "tree", "own"):
        done = vm.run(f"systemctl start atomtx@{job}.service", check=False, timeout=600)
        assert done.status == 0, host.said()
        assert (runs(vm)[0]["job"], runs(vm)[0]["outcome"]) == (f"job {job}", "completed")
        assert leftovers(vm) == []
    hooks = vm.run("cat /var/backups/hooks").stdout.splitlines()
    assert hooks == [
        f"{which} photos nobody" for which in ("pre", "quiesce", "thaw", "post", "success")
    ]

    vm.run(RESTORE, timeout=300)
    restored(vm, "/tank/home", "/var/tmp/kopia")
    restored(vm, "/tank/home", "/var/tmp/tree")
    restored(vm, "/tank/home", "/var/tmp/own")


JOB_OF_STEPS = """
[jobs.home]
volumes = ["tank/home"]
recursive = true
snap-pattern = "s-%Y%m%d%H%M%S"
clone-targets = ["safe"]
client = "restic"
environment = { RESTIC_REPOSITORY = "/mnt/backup/restic" }
credentials.RESTIC_PASSWORD = { file = "/etc/atomtx/password" }
notify-mail = ["root"]
steps = [
    "snap --transient",
    "sure scan-kept",
    "clone --transient",
    "backup --from-snapshots",
    "backup own",
    "unsnap --keep-last 1",
]

[jobs.own]
volumes = ["tank/home"]
recursive = true
client = "command"
command = ["tar", "--acls", "--xattrs", "-cf", "/var/backups/own.tar"]
write-paths = ["/var/backups"]
"""
RESTORE_OF_STEPS = """
set -e
restic restore -q latest --repo /mnt/backup/restic --password-file /etc/atomtx/password \\
    --target /var/tmp/restic
mkdir -p /var/tmp/own
tar -C /var/tmp/own -xf /var/backups/own.tar
zfs mount -a
"""


@pytest.mark.full
def test_job_of_steps(vm: Machine) -> None:
    """The steps of a job in one confined service, which is killed in its third step."""
    make_pool(vm, "safe", DATA_DISKS[1])
    make_datasets(vm, "tank/home", "tank/home/ann")
    for name in ("tank/home", "tank/home/ann"):
        fill(vm, f"/{name}", files=3, size_bytes=1_000_000)
    host = Host(vm, "home")
    vm.run(SET_UP, timeout=300)
    host.configure(JOB_OF_STEPS)
    vm.run("atomtx install systemd", timeout=300)
    done = vm.run(f"systemctl start {host.service}", check=False, timeout=900)
    assert done.status == 0, host.said()
    verbs = ["snap", "clone", "backup", "backup"]  # nothing goes the first time
    assert [run["verb"] for run in reversed(runs(vm))] == ["run", *verbs], host.said()

    fill(vm, "/tank/home/ann", files=3, size_bytes=1_000_000)
    vm.run(f"systemctl start --no-block {host.service}")
    host.until("pgrep -f 'zfs receiv[e]'", 300)
    vm.run(f"systemctl kill -s KILL {host.service}")
    assert host.ended()["Result"] == "signal"
    assert "atomtx@home.service was ended: signal (killed KILL)" in host.mails(1)
    done = vm.run(f"systemctl start {host.service}", check=False, timeout=900)
    assert done.status == 0, host.said()
    assert {run["outcome"] for run in runs(vm)} == {"completed"}
    vm.run(RESTORE_OF_STEPS, timeout=300)
    restored(vm, "/tank/home", "/var/tmp/restic")
    restored(vm, "/tank/home", "/var/tmp/own")
    for name in ("home", "home/ann"):
        mount = f"mount -t zfs -o zfsutil,ro safe/{name} /mnt"
        vm.run(f"{mount} && diff -r -x ann /tank/{name} /mnt && umount /mnt")


VOLUME_JOBS = """
[jobs.volumes]
volumes = ["data/home", "data/thin"]
read-live = ["/boot"]
client = "borg"
environment = { BORG_REPO = "/mnt/backup/borg" }
credentials.BORG_PASSPHRASE = { file = "/etc/atomtx/password" }
retention = ["--keep-last", "3"]

[jobs.dumps]
volumes = ["data/home"]
client = "xfsdump"
arguments = ["--destination", "/mnt/backup/dumps"]
"""
SET_UP_VOLUMES = f"""
set -e
mkdir -p -m 700 /etc/atomtx
(umask 077; echo secret-of-tests >/etc/atomtx/password)
vgcreate -q data {DATA_DISKS[1]}
lvcreate -qy -L 320M -n home data
lvcreate -qy --type thin-pool -L 128M -n pool data
lvcreate -qy -V 64M --thinpool pool -n thin data
mkfs.xfs -q /dev/data/home
mkfs.ext4 -q /dev/data/thin
mkdir -p /srv/home /srv/thin /mnt/backup
mount /dev/data/home /srv/home
mount /dev/data/thin /srv/thin
mkdir -m 700 /mnt/backup/dumps
cat /proc/sys/kernel/random/uuid >/mnt/backup/dumps/.atomtx-xfsdump
BORG_PASSPHRASE=secret-of-tests borg init -e repokey-blake2 /mnt/backup/borg
"""
RESTORE_VOLUMES = """
set -e
export BORG_PASSPHRASE=secret-of-tests
mkdir -p /var/tmp/borg /var/tmp/dump/srv/home
cd /var/tmp/borg
borg extract /mnt/backup/borg::$(borg list --short /mnt/backup/borg)
xfsrestore -F -J -f /mnt/backup/dumps/*/*/dump /var/tmp/dump/srv/home
"""


@pytest.mark.full
def test_volumes(vm: Machine) -> None:
    """Volumes of LVM and a directory that is read live, borg and xfsdump, in confined services."""
    vm.run(SET_UP_VOLUMES, timeout=600)
    for path in ("/srv/home", "/srv/thin"):
        fill(vm, path, files=3, size_bytes=100_000)
    host = Host(vm, "volumes")
    host.configure(VOLUME_JOBS)
    vm.run("atomtx install systemd", timeout=300)
    for job in ("volumes", "dumps"):
        done = vm.run(f"systemctl start atomtx@{job}.service", check=False, timeout=600)
        assert done.status == 0, host.said()
        assert (runs(vm)[0]["job"], runs(vm)[0]["outcome"]) == (f"job {job}", "completed")
        assert leftovers(vm) == []

    vm.run(RESTORE_VOLUMES, timeout=300)
    restored(vm, "/srv/home", "/var/tmp/borg")
    restored(vm, "/srv/thin", "/var/tmp/borg")
    restored(vm, "/boot", "/var/tmp/borg")
    restored(vm, "/srv/home", "/var/tmp/dump")


@pytest.mark.full
def test_failures(vm: Machine) -> None:
    """A run that fails and a service that is killed are told by a mail, with what to type."""
    make_datasets(vm, "tank/home")
    fill(vm, "/tank/home", files=2, size_bytes=100_000)
    host = Host(vm, "home")
    (text,) = document("file", "zfs")
    host.configure(text)
    before_start = next(n for n, c in enumerate(commands("zfs")) if c.startswith("systemctl start"))
    host.follow("zfs", slice(before_start))

    vm.run("mv /mnt/backup/restic /mnt/backup/away")
    assert vm.run(f"systemctl start {host.service}", check=False, timeout=300).status != 0
    mail = host.mails(1)
    assert "Subject: atomtx: home on atomtx-vm: failed" in mail
    assert "the repository is absent or out of reach" in mail
    assert "Next, as root on atomtx-vm:\n  atomtx doctor" in mail
    assert vm.run("ls /var/lib/atomtx/outbox").stdout == ""
    vm.run("mv /mnt/backup/away /mnt/backup/restic")

    host.configure(text.replace("[jobs.home]\n", SLOW.format("home")))
    fill(vm, "/tank/home", files=3, size_bytes=1_000_000)
    host.start()
    vm.run(f"systemctl kill --kill-whom=main -s KILL {host.service}")
    assert host.ended()["Result"] == "signal"
    mail = host.mails(2)
    assert "atomtx@home.service was ended: signal (killed KILL)" in mail
    assert vm.run("pgrep restic", check=False).status == 1
    host.configure(text)
    vm.run(f"systemctl start {host.service}", timeout=600)
    assert {run["outcome"] for run in runs(vm)} == {"completed"}
    assert leftovers(vm) == []


# -- btrfs -------------------------------------------------------------------------------------

SUBVOLUME = """
import fcntl, os, struct
top = os.open("/mnt/top", os.O_RDONLY)
name = bytearray(struct.pack("=q4088s", 0, b"@photos"))
fcntl.ioctl(top, 0x5000940E, name)  # BTRFS_IOC_SUBVOL_CREATE
"""


@pytest.fixture
def btrfs_vm(bare_vm: Machine, tmp_path: Path) -> Machine:
    """The machine with a subvolume at /srv/photos, mounted at each boot."""
    image = tmp_path / "btrfs"
    with open(image, "wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    packed = tmp_path / "btrfs.gz"
    packed.write_bytes(subprocess.run(["gzip", "-1c", image], stdout=-1, check=True).stdout)
    bare_vm.put(packed, "/root/btrfs.gz")
    bare_vm.run("gzip -dc /root/btrfs.gz | dd of=/dev/disk/by-id/virtio-data1 bs=1M status=none")
    bare_vm.run("mkdir -p /mnt/top /srv/photos && mount /dev/disk/by-id/virtio-data1 /mnt/top")
    bare_vm.run("python3 -", input=SUBVOLUME)
    line = "/dev/disk/by-id/virtio-data1 /srv/photos btrfs subvol=@photos 0 0"
    bare_vm.run(f"umount /mnt/top && echo '{line}' >>/etc/fstab && mount /srv/photos")
    return bare_vm


@pytest.mark.full
def test_btrfs(btrfs_vm: Machine) -> None:
    """The btrfs set-up of the document: started, the power cut, resumed, told, restored."""
    vm = btrfs_vm
    fill(vm, "/srv/photos", files=3, size_bytes=300_000)
    host = Host(vm, "photos")
    (text,) = document("file", "btrfs")
    host.configure(text)
    host.follow("btrfs", slice(-2))
    host.wait_for_timer("03:59:50")
    assert host.ended()["Result"] == "success", host.said()
    host.follow("btrfs", slice(-2, None))
    restored(vm, "/srv/photos", "/var/tmp/photos")

    host.configure(text.replace("[jobs.photos]\n", SLOW.format("photos")))
    host.count()
    fill(vm, "/srv/photos", files=3, size_bytes=1_000_000)
    vm.run("cp -a /srv/photos /var/tmp/expected; sync")
    host.start()
    vm.run("echo later >/srv/photos/later; sync")
    host.boot()
    host.resumed()
    assert [run["attempts"] for run in runs(vm)] == [2, 1, 1]
    assert {run["outcome"] for run in runs(vm)} == {"completed"}
    assert "found unfinished" in host.mails(1)
    vm.run("rm -rf /var/tmp/photos")
    host.follow("btrfs", slice(-1, None))
    vm.run("diff -r /var/tmp/expected /var/tmp/photos/srv/photos")
    assert atomtx(vm, "status").output == "no run is at work, none is unfinished\n"
    mount = "mount /dev/disk/by-id/virtio-data1 /mnt/top && ls -A /mnt/top && umount /mnt/top"
    assert vm.run(mount).stdout.split() == ["@photos"]
