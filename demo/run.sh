#!/usr/bin/env bash
# The main job, shown as a terminal session: on this machine's own ZFS where its kernel has it,
# else on btrfs, else, or with ZFS=vm, on ZFS in the virtual machine of the tests.  Called by
# `make demo`, which sets PYTHON.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:?}

has_zfs() {
  [ -c /dev/zfs ] || modprobe -q zfs 2>/dev/null || return 1
  [ -c /dev/zfs ]
}
has_btrfs() {
  grep -qw btrfs /proc/filesystems || modprobe -q btrfs 2>/dev/null || return 1
  losetup --find >/dev/null 2>&1
}
on_this_machine() { # WHAT KIND COMMAND...
  echo "This machine's kernel has $1: the demo uses one on a file, and removes it."
  "$here/../tests/vm/needs.sh" "${@:3}"
  PATH=$(dirname "$python"):$PATH exec "$here/session.sh" "$2"
}

if [ "$(id -u)" = 0 ] && [ "${ZFS:-}" != vm ]; then
  if has_zfs; then on_this_machine ZFS zfs zpool restic; fi
  if has_btrfs; then on_this_machine btrfs btrfs mkfs.btrfs restic; fi
fi
echo 'The demo runs on ZFS in a virtual machine.'
echo 'The first time that takes some minutes: it is built from Debian packages.'
exec "$python" "$here/in_machine.py"
