#!/usr/bin/env bash
# The main job, shown as a terminal session: on this machine's own ZFS where its kernel has it,
# else in the virtual machine of the tests.  Called by `make demo`, which sets PYTHON.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:?}

has_zfs() {
  [ "$(id -u)" = 0 ] || return 1
  [ -c /dev/zfs ] || modprobe -q zfs 2>/dev/null || return 1
  [ -c /dev/zfs ]
}

if has_zfs; then
  echo "This machine's kernel has ZFS: the demo uses a pool on a file, and removes it."
  "$here/../tests/vm/needs.sh" zpool restic
  PATH=$(dirname "$python"):$PATH exec "$here/session.sh"
fi
echo 'This machine has no ZFS of its own (or you are not root): the demo runs in a virtual machine.'
echo 'The first time that takes some minutes: it is built from Debian packages.'
exec "$python" "$here/in_machine.py"
