#!/usr/bin/env python3
"""
A virtual machine with real OpenZFS and LVM, for the tests and for people.

By hand, one machine of your own that stays up until it is stopped:

    python3 tests/vm/machine.py start       start it, with the program of this checkout in /venv
    python3 tests/vm/machine.py ssh 'CMD'   run a command in it; without CMD, a shell
    python3 tests/vm/machine.py put A B     copy the file or folder A of here to B in it
    python3 tests/vm/machine.py get A B     copy A in it to B of here
    python3 tests/vm/machine.py install     put this checkout's program into it again
    python3 tests/vm/machine.py reset       back to a clean machine, with this checkout's program
    python3 tests/vm/machine.py crash       kill it as a power cut would, and boot it again
    python3 tests/vm/machine.py stop
    python3 tests/vm/machine.py build       make only what the others need, and is kept
    python3 tests/vm/machine.py clean       stop it, and remove all that is kept

`ATOMTX_MACHINE=NAME` names another one than the first; each takes 2 GiB of memory.

`start` builds what is missing: the first time that takes a quarter of an hour.  In the machine:
root, two empty disks (`DATA_DISKS`), zfs loaded, `atomtx` and `kopia` on the PATH, restic 0.18 as
`restic` and others as `/clients/restic-*`.  There is no way out to the network.  All files are in
`$ATOMTX_CACHE`, by default `~/.cache/atomtx`.

A qemu that is killed is a machine that crashed: what its kernel had given to the disk is there
at the next boot, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
DISKS = ("root", "data1", "data2")
DATA_DISKS = ("/dev/disk/by-id/virtio-data1", "/dev/disk/by-id/virtio-data2")
DATA_DISK_SIZE = "8G"
# https://bford.info/cachedir/, and what tells ours from another's.
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# What the tests of atomtx build once.  `make clean-vm` removes this folder.
"""
AGENT_PORT = 7777  # in the machine; see agent.py
# Two machines on two cores take a fifth less of the time with one each: emulated processors
# wait for each other.
CPUS = os.environ.get("ATOMTX_VM_CPUS", "1")
# Never `-accel kvm`, nor a list that has it: /dev/kvm can be there and not work.  With cx16
# qemu 7.2 corrupts the guest kernel's slab lists.
QEMU = (
    *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16", "-smp", CPUS),
    *("-m", "2048", "-nodefaults", "-no-user-config", "-display", "none"),
    *(
        "-netdev",
        "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:0-:7777",
    ),
    *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
)
# qemu translates a program anew at each address that it is loaded to: with addresses that are
# always the same, what starts many programs takes less than half of the time.
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off norandmaps panic=-1 quiet"
)


class MachineError(Exception):
    """The machine, or a command in it, did not do what it was told."""


@dataclass(frozen=True)
class Result:
    """A command that ended in the machine; 255 may also mean that the connection was lost."""

    status: int
    stdout: str
    stderr: str


def cache_folder() -> Path:
    """Return the folder for what is built once; it is never inside the checkout."""
    folder = _cache()
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TAG).write_text(_TAG_TEXT)
    return folder.resolve()


def _cache() -> Path:
    return Path(os.environ.get("ATOMTX_CACHE") or Path.home() / ".cache" / "atomtx")


def clean() -> None:
    """Remove the cache, with what runs from it; MachineError for another's folder."""
    folder = _cache()
    if not folder.exists():
        return
    tag = folder / _TAG
    if not (tag.is_file() and tag.read_text() == _TAG_TEXT):
        raise MachineError(f"{folder} is none that was made here for this: remove it by hand")
    for each in folder.resolve().glob("developer*"):
        machine = Machine(each, each, outlive=True)
        with contextlib.suppress(MachineError):  # it does not run
            machine.attach()
        machine.close()
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


class Machine:
    """One qemu process and the files of its own; see `open_machine` and `developers_machine`."""

    def __init__(self, folder: Path, image: Path, *, outlive: bool = False) -> None:
        self.folder = folder  # the disks, the serial log, the sockets' names
        self.image = image  # the kernel, the initrd and the ssh key
        self._outlive = outlive  # qemu stays when this process ends
        self.port = 0
        self.agent_port = 0
        self.pid = 0
        # A socket's path may have 107 bytes, and a cache folder's can be long.
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
        self._sockets = Path(f"/tmp/atomtx-vm-{name}")

    # Its life

    def boot(self, *, load: str | None = None, clock: str = "utc") -> None:
        """
        Start qemu on this machine's disks and wait until ssh answers.

        *load*: a saved state.  *clock*: the time that it boots at, such as 2026-11-22T12:00:00.
        """
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        log = self.folder / "serial.log"
        argv = [*QEMU, "-kernel", f"{self.image}/vmlinuz", "-initrd", f"{self.image}/initrd"]
        argv += ["-rtc", f"base={clock}"]
        argv += ["-append", KERNEL_ARGUMENTS, "-pidfile", str(self.folder / "pid")]
        argv += ["-chardev", f"file,id=serial,append=on,path={log}", "-serial", "chardev:serial"]
        argv += ["-qmp", f"unix:{self._sockets}/qmp,server=on,wait=off"]
        for disk in DISKS:
            # No flush reaches the host's disk, for speed: that matters to a power cut of the
            # host.  What the guest flushed is in the file when qemu alone is killed.
            argv += ["-drive", f"if=none,id={disk},cache=unsafe,file={self.folder}/{disk}.qcow2"]
            argv += ["-device", f"virtio-blk-pci,drive={disk},serial={disk}"]
        if load is not None:
            argv += ["-loadvm", load]
        if not self._outlive:
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with open(self.folder / "qemu.log", "ab") as errors:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        self.pid = child.pid
        self._child = child
        self._find_port()
        self._wait_for_ssh(timeout_s=60 if load else 300)
        if load is not None:
            self._set_clock()
        else:  # the disks' names come from udev
            self.run("systemctl is-system-running --wait; udevadm settle", timeout=300)

    def power_off_hard(self) -> None:
        """Kill qemu, as a power cut ends a machine."""
        self._disconnect()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._wait_for_end()

    def save(self, name: str) -> None:
        """Save the whole machine, memory and disks, under *name*; it goes on running."""
        self._disconnect()
        self._monitor(f"savevm {name}")
        self._wait_for_ssh(timeout_s=60)

    def load(self, name: str) -> None:
        """Return the whole machine to what `save` saved under *name*; its clock is set to now."""
        self._disconnect()
        self._monitor(f"loadvm {name}")
        self._wait_for_ssh(timeout_s=60)
        self._set_clock()

    def forget(self, name: str) -> None:
        """Remove what `save` saved under *name*."""
        self._monitor(f"delvm {name}")

    def close(self) -> None:
        """End it and remove its files."""
        if self.pid:
            self.power_off_hard()
        shutil.rmtree(self._sockets, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def attach(self) -> None:
        """Take over a qemu that another process started."""
        try:
            self.pid = int((self.folder / "pid").read_text())
            self._find_port()
        except (OSError, ValueError, MachineError) as exc:
            raise MachineError("the machine is not running: machine.py start") from exc

    # Commands and files

    def ssh(self, *, tty: bool = False) -> list[str]:
        """Return the start of an ssh command; all share one connection, for speed."""
        options = {
            "ControlMaster": "auto",
            "ControlPath": f"{self._sockets}/ssh",
            "ControlPersist": "yes",
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "ConnectTimeout": "10",
            "KexAlgorithms": "curve25519-sha256",  # the newer ones are slow under emulation
        }
        argv = ["ssh", "-F", "/dev/null", "-t" if tty else "-T", "-i", f"{self.image}/key"]
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        return [*argv, "-p", str(self.port), "root@127.0.0.1"]

    def run(
        self, command: str, *, check: bool = True, timeout: float = 120, input: str | None = None
    ) -> Result:
        """Run a shell command as root, *timeout* in seconds; a failure raises if *check*."""
        try:
            done = subprocess.run(
                [*self.ssh(), command],
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                timeout=timeout,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except subprocess.TimeoutExpired as exc:
            shown = b"".join(part for part in (exc.stdout, exc.stderr) if part).decode()
            raise MachineError(f"no end after {timeout:.0f} s: {command}\n{shown}") from None
        result = Result(done.returncode, done.stdout, done.stderr)
        if check and result.status:
            raise MachineError(
                f"exit status {result.status}: {command}\n{result.stdout}{result.stderr}"
                + (self._log() if result.status == 255 else "")
            )
        return result

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a shell command and return without waiting; its outputs are pipes."""
        return subprocess.Popen(
            [*self.ssh(), command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def put(self, local: Path | str, remote: str) -> None:
        """Copy a file or a folder of the host to the path *remote*."""
        self._copy(os.fspath(local), f"root@127.0.0.1:{remote}")

    def get(self, remote: str, local: Path | str) -> None:
        """Copy the file or folder *remote* to a path of the host."""
        self._copy(f"root@127.0.0.1:{remote}", os.fspath(local))

    def _copy(self, source: str, target: str) -> None:
        options = self.ssh()[1:-3]
        options.remove("-T")
        argv = ["scp", "-r", "-p", "-P", str(self.port), *options, source, target]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(f"cannot copy {source} to {target}: {done.stderr.strip()}")

    # Inside

    def qmp(self, execute: str, **arguments: object) -> Any:
        """Give qemu a command of its machine protocol and return the answer."""
        try:
            with socket.socket(socket.AF_UNIX) as qmp:
                qmp.settimeout(300)
                qmp.connect(f"{self._sockets}/qmp")
                lines = qmp.makefile("rw", encoding="utf-8")
                lines.readline()
                for request in (
                    {"execute": "qmp_capabilities"},
                    {"execute": execute, "arguments": arguments},
                ):
                    lines.write(json.dumps(request) + "\n")
                    lines.flush()
                    answer = json.loads(lines.readline())
                    while "event" in answer:
                        answer = json.loads(lines.readline())
        except (OSError, ValueError) as exc:
            raise MachineError(f"qemu does not answer: {exc}\n{self._log()}") from exc
        if "return" not in answer:
            raise MachineError(f"{execute}: {answer}")
        return answer["return"]

    def _monitor(self, command: str) -> str:
        """Give qemu's monitor a command; what its commands for states answer is an error."""
        text = str(self.qmp("human-monitor-command", **{"command-line": command}))
        if text and command.split()[0] in ("savevm", "loadvm", "delvm"):
            raise MachineError(f"{command}: {text}")
        return text

    def _find_port(self) -> None:
        """Ask qemu which port of the host it forwards to the machine's ssh."""
        end = time.monotonic() + 60
        while True:
            try:
                told = self._monitor("info usernet")
            except MachineError:
                if not self._alive() or time.monotonic() > end:
                    raise
                time.sleep(0.05)
                continue
            ports = dict(re.findall(r"HOST_FORWARD.*127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)", told))
            by_guest = {int(guest): int(host) for host, guest in ports.items()}
            if 22 not in by_guest:
                raise MachineError("qemu forwards no port")
            self.port, self.agent_port = by_guest[22], by_guest[AGENT_PORT]
            return

    def _alive(self) -> bool:
        child: subprocess.Popen[bytes] | None = getattr(self, "_child", None)
        if child is not None:
            return child.poll() is None
        return os.path.exists(f"/proc/{self.pid}")

    def _wait_for_end(self) -> None:
        end = time.monotonic() + 30
        while self._alive():
            if time.monotonic() > end:
                raise MachineError(f"qemu, process {self.pid}, does not end")
            time.sleep(0.02)
        self.pid = 0

    def _wait_for_ssh(self, *, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while True:
            try:
                result = self.run("true", check=False, timeout=20)
                said = result.stderr.strip()
                if result.status == 0:
                    return
            except MachineError as exc:
                said = str(exc)
            if not self._alive():
                raise MachineError(f"qemu ended\n{self._log()}")
            if time.monotonic() > end:
                raise MachineError(f"no ssh after {timeout_s:.0f} s: {said}\n{self._log()}")
            time.sleep(0.1)

    def _disconnect(self) -> None:
        """End the shared connection; the machine would keep its half of it in a saved state."""
        if self.port and (self._sockets / "ssh").exists():
            argv = self.ssh()
            subprocess.run([*argv[:-1], "-O", "exit", argv[-1]], capture_output=True, timeout=60)

    def _set_clock(self) -> None:
        self.run(f"date -s @{time.time() + 0.1:.3f} >/dev/null")

    def _log(self) -> str:
        parts = ["qemu runs" if self._alive() else "qemu ended"]
        for name in ("qemu.log", "serial.log"):
            with contextlib.suppress(OSError):
                parts.append((self.folder / name).read_text(errors="replace")[-2000:])
        return "\n".join(parts)


# What is built once: the image, and a booted machine on it.


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def image(cache: Path) -> Path:
    """Return the folder of the machine's image, built by build.sh where it is absent."""
    here = CHECKOUT / "tests" / "vm"
    needs = subprocess.run(
        [here / "needs.sh", "qemu-system-x86_64", "qemu-img", "ssh"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if needs.returncode:
        raise MachineError(needs.stderr)
    version = re.search(r"^IMAGE_VERSION=(\S+)", (here / "versions.sh").read_text(), re.M)
    assert version is not None
    folder = cache / f"machine-{version[1]}"
    if not (folder / "complete").exists():
        env = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run([here / "build.sh", cache], stdin=subprocess.DEVNULL, env=env)
        if done.returncode or not (folder / "complete").exists():
            raise MachineError("the test machine could not be built: see the lines above")
    return folder


def _key(folder: Path) -> str:
    """Return a key that changes with the image, with qemu and with the machine's hardware."""
    qemu = subprocess.run([QEMU[0], "--version"], capture_output=True, check=True).stdout
    facts = (folder.name, (folder / "complete").stat().st_mtime_ns, qemu, QEMU, KERNEL_ARGUMENTS)
    return hashlib.sha256(repr((facts, DISKS, DATA_DISK_SIZE)).encode()).hexdigest()[:12]


def _booted(cache: Path, image_folder: Path) -> Path:
    """Return a folder with the disks of a machine that holds the state 'booted'."""
    folder = cache / f"booted-{_key(image_folder)}"
    if (folder / "complete").exists():
        return folder
    for old in cache.glob("booted-*"):
        shutil.rmtree(old)
    partial = cache / "booting"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _say("booting the test machine (half a minute)")
    backing = ["-F", "qcow2", "-b", f"{image_folder}/disk.qcow2"]
    for disk in DISKS:
        end = backing if disk == "root" else []
        size = [] if disk == "root" else [DATA_DISK_SIZE]
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *end, f"{partial}/{disk}.qcow2", *size]
        subprocess.run(argv, check=True)
    machine = Machine(partial, image_folder)
    try:
        machine.boot()
        # Read what every test needs once, so that it is in the saved memory.
        machine.run(
            "systemctl stop '*.timer'; modprobe zfs && zfs version && zpool list &&"
            " /venv/bin/python -c 'import alembic.command, click, sqlalchemy, transitions' &&"
            " restic version && kopia --version && sync",
            timeout=300,
        )
        machine.save("booted")
    finally:
        machine.power_off_hard()
        shutil.rmtree(machine._sockets, ignore_errors=True)
    (partial / "complete").touch()
    partial.rename(folder)
    return folder


def _copy_booted(cache: Path, folder: Path) -> Path:
    """Fill *folder* with disks of its own, and return the image's folder."""
    with _locked(cache / "booted.lock"):
        image_folder = image(cache)
        booted = _booted(cache, image_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for disk in DISKS:
            name = f"{disk}.qcow2"
            copy = ["cp", "--sparse=always", "--reflink=auto"]
            subprocess.run([*copy, str(booted / name), str(folder / name)], check=True)
    return image_folder


def _say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


# Whose machine it is.


@contextlib.contextmanager
def open_machine() -> Iterator[Machine]:
    """Give a running machine, booted and clean, that ends with the block or with this process."""
    cache = cache_folder()
    work = cache / "work"
    work.mkdir(exist_ok=True)
    for left in work.iterdir():  # by a process that was killed
        if not os.path.exists(f"/proc/{left.name.partition('-')[0]}"):
            Machine(left, left).close()
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=work))
    machine = Machine(folder, _copy_booted(cache, folder))
    try:
        machine.boot(load="booted")
        yield machine
    finally:
        machine.close()


def developers_machine() -> Machine:
    """Return the machine that `start` starts, whether it runs or not."""
    cache = cache_folder()
    name = os.environ.get("ATOMTX_MACHINE")
    folder = cache / (f"developer-{name}" if name else "developer")
    return Machine(folder, image(cache), outlive=True)


def build_wheel(folder: Path) -> Path:
    """Build the checkout's wheel into *folder* and return its path."""
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    ready = subprocess.run([sys.executable, "-c", "import hatchling"], capture_output=True)
    if ready.returncode == 0:
        argv.append("--no-build-isolation")
    done = subprocess.run([*argv, str(CHECKOUT)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise MachineError(f"cannot build the wheel:\n{done.stdout}{done.stderr}")
    return wheels[0]


def install(machine: Machine, wheel: Path | None = None) -> None:
    """
    Put the checkout's program into the machine's /venv, in the place of any that is there.

    A wheel is unpacked by hand, as the wheel format allows: pip takes many seconds in there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch, "atomtx.tar")
        with zipfile.ZipFile(wheel or build_wheel(Path(scratch))) as source:
            source.extractall(f"{scratch}/files")
        with tarfile.open(files, "w") as target:
            target.add(f"{scratch}/files", ".")
        machine.put(files, "/tmp/atomtx.tar")
    machine.run(
        "set -e; cd /venv/lib/python3.*/site-packages; rm -rf atomtx atomtx-*.dist-info;"
        " tar xf /tmp/atomtx.tar --no-same-owner; rm /tmp/atomtx.tar; printf '%s\\n'"
        " '#!/venv/bin/python' 'import sys' 'from atomtx.cli import main' 'sys.exit(main())'"
        " >/venv/bin/atomtx; chmod 755 /venv/bin/atomtx;"
        " ln -sf /venv/bin/atomtx /usr/local/bin/atomtx"
    )


def _start(machine: Machine) -> None:
    with contextlib.suppress(MachineError):
        machine.attach()
        _say("it runs already: reset, or stop it first")
        return
    machine.close()
    _copy_booted(cache_folder(), machine.folder)
    machine.boot(load="booted")
    _install_what_builds(machine)
    _say(f"running, ssh on port {machine.port}")


def _install_what_builds(machine: Machine) -> None:
    try:
        install(machine)
    except MachineError as exc:
        _say(f"the machine runs, without the program: {exc}")


_COMMANDS = frozenset(
    ["build", "start", "ssh", "put", "get", "install", "reset", "crash", "stop", "clean"]
)


def main(words: Sequence[str]) -> int:
    """Do what the module's first lines promise."""
    command, *rest = words or ["help"]
    if command not in _COMMANDS:
        print(__doc__)
        return 2
    if command == "clean":
        clean()
        return 0
    if command == "build":
        with _locked(cache_folder() / "booted.lock"):
            _booted(cache_folder(), image(cache_folder()))
        return 0
    machine = developers_machine()
    if command == "start":
        _start(machine)
        return 0
    machine.attach()
    if command == "ssh":
        return subprocess.run([*machine.ssh(tty=not rest), *rest]).returncode
    if command == "put":
        machine.put(*rest)
    elif command == "get":
        machine.get(*rest)
    elif command == "install":
        install(machine)
    elif command == "reset":
        machine.load("booted")
        _install_what_builds(machine)
    elif command == "crash":
        machine.power_off_hard()
        machine.boot()
    elif command == "stop":
        machine.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MachineError as error:
        sys.exit(f"vm: {error}")
