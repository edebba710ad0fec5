#!/usr/bin/env bash
# See that each named command is on this host; install its Debian or Ubuntu package if root runs
# this, else say which packages are missing.
set -euo pipefail
python=${PYTHON:-python3}

package() { # COMMAND
  case $1 in
    qemu-system-x86_64) echo qemu-system-x86 ;;
    qemu-img) echo qemu-utils ;;
    mmdebstrap) echo mmdebstrap debian-archive-keyring ;;
    ssh | ssh-keygen | scp) echo openssh-client ;;
    mke2fs | mkfs.ext4) echo e2fsprogs ;;
    mkfs.xfs) echo xfsprogs ;;
    setfacl) echo acl ;;
    mtree) echo mtree-netbsd ;;
    ionice) echo util-linux ;;
    go) echo golang-go ;;
    pip) echo python3-pip ;;
    venv) echo python3-venv ;;
    zpool) echo zfsutils-linux ;;
    btrfs | mkfs.btrfs) echo btrfs-progs ;;
    borg) echo borgbackup ;;
    borg-headers) echo gcc pkg-config libc6-dev libssl-dev liblz4-dev libxxhash-dev libzstd-dev libacl1-dev ;;
    *) echo "$1" ;;
  esac
}

is_there() { # COMMAND
  case $1 in
    pip) "$python" -m pip --version >/dev/null 2>&1 ;;
    venv) "$python" -c 'import ensurepip' >/dev/null 2>&1 ;;
    borg-headers) [ -e /usr/include/sys/acl.h ] && command -v gcc >/dev/null &&
      pkg-config --exists libcrypto liblz4 libxxhash libzstd 2>/dev/null ;;
    *) PATH=$PATH:/usr/sbin:/sbin:/usr/local/go/bin command -v "$1" >/dev/null ;;
  esac
}

missing=()
for command in "$@"; do
  # shellcheck disable=SC2207  # packages are words
  is_there "$command" || missing+=($(package "$command"))
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  printf 'missing on this machine: %s\n' "${missing[*]}" >&2
  printf '  as root: apt-get install %s\n' "${missing[*]}" >&2
  exit 1
fi
printf 'installing on this machine: %s\n' "${missing[*]}" >&2
apt-get update -q >&2
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" >&2
