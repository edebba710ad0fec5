"""Datasets in the machine's pool, and what a run may not leave there."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from tests.vm.machine import Machine

# Each line is one thing of a run.  /proc/*/mountinfo escapes blanks, and names every namespace.
_LOOK = r"""
zfs list -H -t snapshot -o name | sed -n 's/.*@atomtx-.*/snapshot &/p'
zfs list -H -t snapshot -o name | grep -v '^$' | tr '\n' '\0' |
  xargs -0 -r zfs holds -H 2>/dev/null | sed 's/^/hold /'
cat /proc/[0-9]*/mountinfo 2>/dev/null | sed -n 's/.* - zfs \([^ ]*@atomtx-[^ ]*\) .*/mount \1/p' |
  sort -u
pgrep -af 'atomtx[.]runner' | sed 's/^/process /'
true
"""


def make_datasets(vm: Machine, *names: str, options: str = "") -> list[str]:
    """Create file systems, parents first, with `zfs create` *options*; return their names."""
    words = [shlex.quote(name) for name in names]
    vm.run("set -e\n" + "\n".join(f"zfs create {options} {word}" for word in words), timeout=600)
    return list(names)


def fill(vm: Machine, folder: str, *, files: int, size_bytes: int) -> None:
    """Write *files* files of random bytes into *folder*."""
    where = shlex.quote(folder)
    total = files * size_bytes
    vm.run(f"cd {where} && head -c {total} /dev/urandom | split -a 4 -b {size_bytes} - file-")


def leftovers(vm: Machine, *, foreign: Collection[str] = ()) -> list[str]:
    """Return what any run has left on the machine; *foreign*: names of snapshots not to count."""
    lines = vm.run(_LOOK).stdout.splitlines()
    return [line for line in lines if line.split(" ", 1)[1].split("\t")[0] not in foreign]
