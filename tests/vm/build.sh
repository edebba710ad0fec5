#!/usr/bin/env bash
# Build the test machine: a Debian trixie disk with OpenZFS, LVM, restic, kopia and our Python
# dependencies, its kernel and its initrd, in the cache folder that is the only argument.
#
# Everything comes from the package mirrors that this host's own apt, pip and go are set to.
# The ZFS module is compiled by dkms inside the new root, natively: under an emulated CPU the
# same takes twenty times as long.  The result is complete or absent: it is built beside its
# final name and renamed.
set -euo pipefail

cache=${1:?usage: build.sh CACHE_DIR}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/versions.sh
. "$here/versions.sh"
python=${PYTHON:-python3}
root=$cache/root.partial
final=$cache/machine-$IMAGE_VERSION

say() { printf 'vm: %s\n' "$*" >&2; }
give_up() { tail -20 "$1" >&2; say "failed, see $1"; exit 1; }

[ -e "$final/complete" ] && exit 0
[ "$(id -u)" = 0 ] || { say 'building the test machine needs root'; exit 1; }
# In a mount namespace of its own: a build that is killed leaves no mounts behind.
[ "${ATOMTX_BUILD:-}" = unshared ] || exec env ATOMTX_BUILD=unshared unshare --mount "$0" "$cache"
mkdir -p "$cache"
exec 9>"$cache/build.lock"
flock 9
[ -e "$final/complete" ] && exit 0

"$here/needs.sh" qemu-system-x86_64 qemu-img mmdebstrap ssh ssh-keygen mke2fs go pip venv borg-headers
"$here/clients.sh" "$cache"

sources=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null || true)
mirror=$(grep -m1 -E '/debian/?$' <<<"$sources" || true) # none on Ubuntu: mmdebstrap knows one
options=(--aptopt='APT::Install-Recommends "false"')
while read -r line; do
  options+=(--aptopt="$line")
done < <(apt-config dump Acquire | grep -iE '^Acquire::https?::proxy' || true)
say "installing Debian trixie from ${mirror:-its mirror} and compiling its ZFS module (about 10 minutes)"
rm -rf --one-file-system "$root"
# shellcheck disable=SC2086  # a list of words
mmdebstrap --variant=minbase --components=main,contrib "${options[@]}" \
  --include="$(printf '%s,' $DEBIAN_PACKAGES)" \
  trixie "$root" ${mirror:+"$mirror"} >"$cache/debootstrap.log" 2>&1 || give_up "$cache/debootstrap.log"
kernel=$(basename "$(ls -d "$root"/lib/modules/*)")
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
{
  chroot "$root" dkms autoinstall -k "$kernel"  # most likely done by the package already
  chroot "$root" depmod "$kernel"
  chroot "$root" modinfo -k "$kernel" zfs
} >"$cache/dkms.log" 2>&1 || give_up "$cache/dkms.log"

say 'installing our Python dependencies'
# shellcheck disable=SC2086  # a list of words
"$python" -m pip download -q --dest "$root/wheels" --python-version 3.13 --only-binary=:all: \
  $PYTHON_PACKAGES
chroot "$root" python3 -m venv /venv
# shellcheck disable=SC2086
chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin /venv/bin/pip install -q --no-index --find-links /wheels $PYTHON_PACKAGES

say 'configuring the machine'
install -d -m 700 "$root/root/.ssh"
install -d -m 755 "$root/clients"
install -m 755 "$cache/clients"/* "$root/clients/"
ln -s /usr/bin/restic "$root/clients/restic-0.18"
ln -s /clients/kopia "$root/usr/local/bin/kopia"
rm -f "$cache/key.partial" "$cache/key.partial.pub"
ssh-keygen -q -t ed25519 -N '' -C atomtx-vm -f "$cache/key.partial"
install -m 600 "$cache/key.partial.pub" "$root/root/.ssh/authorized_keys"
"$here/configure.sh" "$root"
printf '%s\n' MODULES=list RESUME=none >"$root/etc/initramfs-tools/conf.d/atomtx"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >"$root/etc/initramfs-tools/modules"
rm -f "$root/boot/initrd.img-$kernel"
chroot "$root" update-initramfs -c -k "$kernel" >"$cache/initramfs.log" 2>&1 ||
  give_up "$cache/initramfs.log"
umount "$root/proc" "$root/dev"

say 'writing the disk'
rm -rf "$final.partial"
mkdir "$final.partial"
cp "$root/boot/vmlinuz-$kernel" "$final.partial/vmlinuz"
cp "$root/boot/initrd.img-$kernel" "$final.partial/initrd"
mv "$cache/key.partial" "$final.partial/key"
rm -f "$cache/key.partial.pub"
truncate -s 6G "$final.partial/disk.raw"
mke2fs -q -t ext4 -L atomtx -d "$root" "$final.partial/disk.raw"
qemu-img convert -O qcow2 "$final.partial/disk.raw" "$final.partial/disk.qcow2"
rm "$final.partial/disk.raw"
rm -rf --one-file-system "$root"
touch "$final.partial/complete"
mv "$final.partial" "$final"
say "built $final"
