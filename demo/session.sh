#!/usr/bin/env bash
# Back up, kill a second backup in the middle, recover, look back, restore and compare: on ZFS, or,
# with the argument "btrfs", on btrfs.  Everything is in one folder and one pool or file system,
# which are removed at the end.
set -euo pipefail

kind=${1:-zfs}
pool=atomtx-demo
work=$(mktemp -d /var/tmp/atomtx-demo.XXXXXX)
made=
cleanup() {
  cd /
  if [ "$made" ]; then zpool destroy "$pool"; fi
  if mountpoint --quiet "$work/home"; then umount "$work/home"; fi
  rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
export ATOMTX_STATE_DIR=$work/state RESTIC_REPOSITORY=$work/repository \
  RESTIC_PASSWORD_FILE=$work/password RESTIC_CACHE_DIR=$work/cache
echo 'not a secret' >password

note() { # LINE...
  echo
  printf '# %s\n' "$@"
}
run() { # COMMAND LINE: show it as typed, and run it
  printf '$ %s\n' "$1"
  eval "$1"
}

if [ "$kind" = zfs ]; then
  volume=$pool/home files=pool/home list="zfs list -H -t snapshot -o name -r $pool"
  note 'A pool on a file, two datasets, some files, and a restic repository.'
  run 'truncate -s 1G disk'
  run "zpool create -m \$PWD/pool $pool \$PWD/disk"
  made=yes # a pool of that name that was there before is none of ours
  run "zfs create $pool/home && zfs create $pool/home/ann"
else
  # shellcheck disable=SC2016  # shown as it is
  volume='$PWD/home' files=home list='btrfs subvolume list -s home'
  note 'A file system on a file, a subvolume in it, some files, and a restic repository.'
  run 'truncate -s 1G disk'
  run 'mkfs.btrfs --quiet disk >/dev/null'
  run 'mkdir home && mount -o loop disk home'
  run 'btrfs subvolume create home/ann'
fi
run "head -c 8M /dev/urandom | split -b 64K - $files/file-"
run "head -c 8M /dev/urandom | split -b 64K - $files/ann/file-"
run 'restic init --quiet'

if [ "$kind" = zfs ]; then
  note 'The first backup: both datasets, at the same moment.'
else
  note 'The first backup: the file system, and the subvolume in it.'
fi
run "atomtx backup --recursive $volume"

note 'More files.  The second backup is slowed down, and killed in the middle: atomtx, its' \
  'runner and restic, all with SIGKILL.'
run "head -c 24M /dev/urandom | split -b 128K - $files/ann/new-"
run "cp -a $files expected    # to compare with later"
printf '$ %s\n' "atomtx backup --recursive $volume -- --limit-upload 4096 >log 2>&1 &"
atomtx backup --recursive "$(eval "echo $volume")" -- --limit-upload 4096 >log 2>&1 &
backup=$!
repository_size() { du -s repository | cut -f1; }
before=$(repository_size)
until [ "$(repository_size)" -gt $((before + 4000)) ]; do
  kill -0 $backup || { cat log; echo 'demo: the backup ended before it could be killed' >&2; exit 1; }
  sleep 0.1
done
runner=$(pgrep -P $backup | tr '\n' ' ')
client=$(for pid in $runner; do pgrep -P "$pid"; done | tr '\n' ' ')
run "kill -9 $backup $runner${client% }"
wait $backup 2>/dev/null || true
run "$list"

note 'Life goes on: a file changes after the moment of that backup.'
run "echo changed >$files/ann/new-aa"

note 'The interrupted backup is finished, of the same moment.'
run 'atomtx recover'
run 'atomtx history'
if [ "$kind" = zfs ]; then run "zfs list -t snapshot -r $pool"; else run "$list"; fi

note 'What restic restores is the moment of the second backup.'
run 'restic restore latest --quiet --target restored'
run "diff -r expected \"restored\$PWD/$files\" && echo identical"
