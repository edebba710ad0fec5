"""What tests need around a run: light clients, a backup at work, a disk that is full."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.vm.machine import Machine
from tests.vm.remote import Answer, atomtx

# A base state, and what makes of it the state that a file's tests begin with; see conftest.py.
Prepare = Callable[[str, Callable[[Machine], None]], Machine]

_STATE = "/var/lib/atomtx"
READY, GO = "/tmp/ready", "/tmp/go"
# As a client's script: it says that it runs, and ends when it is told to.
WAITS = f"touch {READY}\nwhile ! test -e {GO}; do sleep 0.2; done"
HOST = "nsenter -t 1 -m"  # out of the run's namespace

# A client where restic is not the point, a tenth of its time: what it copied is at COPY when whole.
COPIER, COPY = "/root/copier", "/srv/copy"
_COPIES = f"""
set -e
rm -rf {COPY}.partial
mkdir {COPY}.partial
for path; do
  mkdir -p "{COPY}.partial/$path"
  cp -a "$path/." "{COPY}.partial/$path"
done
rm -rf {COPY}
mv {COPY}.partial {COPY}
"""
WITH_COPIER = ("--command", COPIER)
# A block that was being provisioned when the power went has leaked: nobody has it, nothing is lost.
# By default thin_check(8) finds fault with that, and LVM does not activate the pool.
LVM_REPAIRS = 'global { thin_check_options=["-q", "--auto-repair"] }'


def script(vm: Machine, path: str, text: str) -> str:
    """Write a script, of the shell where it names nothing else, and return its path."""
    first = "" if text.startswith("#!") else "#!/bin/sh\n"
    vm.run(f"cat > {path}; chmod 755 {path}", input=f"{first}{text}\n")
    return path


def make_journal(vm: Machine) -> None:
    """Have an empty journal made, which costs a run seconds there; and the copier put there."""
    answer = atomtx(vm, "recover")
    assert answer.status == 0, answer.output
    script(vm, COPIER, _COPIES)


def is_copied(vm: Machine) -> bool:
    """Tell whether the copier has made a whole copy."""
    return vm.run(f"test -e {COPY}", check=False).status == 0


@contextmanager
def running(vm: Machine, *argv: str, **options: Any) -> Iterator[Future[Answer]]:
    """
    Run one command while the block acts on the machine; its answer when it has ended.

    Where the block fails, all is killed: a test that fails must not wait for a client that waits.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(atomtx, vm, *argv, **options)
        except BaseException:
            kill_run(vm, (options.get("env") or {}).get("ATOMTX_STATE_DIR", _STATE))
            raise


def runs(vm: Machine, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the runs of the journal that *env* names, the newest first."""
    answer = atomtx(vm, "history", "--json", env=env)
    assert answer.status == 0, answer.output
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return found


def until(vm: Machine, condition: str, *, timeout_s: int = 120) -> None:
    """Wait in the machine until a shell condition holds."""
    vm.run(
        f"n=0; until {condition}; do sleep 0.2; n=$((n+1));"
        f" if [ $n -gt {timeout_s * 5} ]; then exit 1; fi; done",
        timeout=timeout_s * 3,
    )


def let_go(vm: Machine) -> None:
    """Let a client that waits come to its end."""
    vm.run(f"touch {GO}")


def fill(path: str) -> str:
    """Return the shell command that fills the file system of *path* to the last block."""
    sizes = "1M 64k 4k 512"
    return (
        f"for n in 1 2; do for s in {sizes}; do"
        f" dd if=/dev/zero of={path}.$n.$s bs=$s 2>/dev/null || true; done; sync; done"
    )


def kill_run(vm: Machine, state: str = _STATE) -> None:
    """Kill front end, runner and client of the runs at work."""
    vm.run(f"fuser -s -k -KILL {state}/runs/*/*.lock; sleep 1")
