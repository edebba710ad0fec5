#!/usr/bin/env bash
# Build the test machine: a Debian trixie disk with OpenZFS, restic, kopia and our Python
# dependencies, its kernel and its initrd, in the cache folder that is the only argument.
#
# Everything comes from the package mirrors that this host's own apt, pip and go are set to.
# The ZFS module is compiled by dkms inside the new root, natively: under an emulated CPU the
# same takes twenty times as long.  The result is complete or absent: it is built beside its
# final name and renamed.
set -euo pipefail

cache=${1:?usage: build.sh CACHE_DIR}
here=$(cd "$(dirname "$0")" && pwd)
. "$here/versions.sh"
root=$cache/root.partial
final=$cache/machine-$IMAGE_VERSION

say() { printf 'vm: %s\n' "$*" >&2; }
[ "$(id -u)" = 0 ] || { say 'building the test machine needs root'; exit 1; }
[ -e "$final/complete" ] && exit 0
exec 9>"$cache/build.lock"
flock 9
[ -e "$final/complete" ] && exit 0

need=()
for pair in qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mmdebstrap:mmdebstrap \
            ssh:openssh-client mke2fs:e2fsprogs; do
  command -v "${pair%%:*}" >/dev/null || need+=("${pair##*:}")
done
if [ ${#need[@]} -gt 0 ]; then
  say "installing on this host: ${need[*]}"
  apt-get update -q >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${need[@]}" >&2
fi
command -v go >/dev/null || { say 'Go is needed to build kopia and the restic versions'; exit 1; }

mkdir -p "$cache"
"$here/clients.sh" "$cache"

mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
         grep -m1 -E '/debian/?$' || echo http://deb.debian.org/debian)
say "installing Debian trixie from $mirror (some minutes)"
rm -rf --one-file-system "$root"
mmdebstrap --variant=minbase --components=main,contrib \
  --aptopt='APT::Install-Recommends "false"' \
  --include="$(echo "$DEBIAN_PACKAGES" | tr -s ' \n' ',,' | sed 's/^,//;s/,$//')" \
  trixie "$root" "$mirror" >"$cache/debootstrap.log" 2>&1 ||
  { tail -20 "$cache/debootstrap.log" >&2; exit 1; }
kernel=$(basename "$(ls -d "$root"/lib/modules/*)")

say "compiling the ZFS module for $kernel (about 5 minutes)"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
trap 'umount "$root/proc" "$root/dev" 2>/dev/null || true' EXIT
chroot "$root" dkms autoinstall -k "$kernel" >"$cache/dkms.log" 2>&1 ||
  { tail -20 "$cache/dkms.log" >&2; exit 1; }
chroot "$root" depmod "$kernel"
chroot "$root" modinfo -k "$kernel" zfs >/dev/null

say 'installing our Python dependencies'
python3 -m pip download -q --dest "$root/wheels" --python-version 3.13 --only-binary=:all: \
  $PYTHON_PACKAGES
chroot "$root" python3 -m venv /venv
chroot "$root" /venv/bin/pip install -q --no-index --find-links /wheels $PYTHON_PACKAGES

say 'configuring the machine'
install -d -m 700 "$root/root/.ssh" "$root/clients"
install -m 755 "$cache/clients"/* "$root/clients/"
ln -s /clients/kopia "$root/usr/local/bin/kopia"
ssh-keygen -q -t ed25519 -N '' -f "$cache/key.partial"
install -m 600 "$cache/key.partial.pub" "$root/root/.ssh/authorized_keys"
"$here/configure.sh" "$root"
cat >"$root/etc/initramfs-tools/conf.d/atomtx" <<'EOF'
MODULES=list
RESUME=none
EOF
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -c -k "$kernel" >"$cache/initramfs.log" 2>&1 ||
  chroot "$root" update-initramfs -u -k "$kernel" >>"$cache/initramfs.log" 2>&1
umount "$root/proc" "$root/dev"
trap - EXIT

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
