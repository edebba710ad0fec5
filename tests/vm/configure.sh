#!/usr/bin/env bash
# Turn a fresh Debian root into the test machine: root by ssh key, one serial console, no waiting.
set -euo pipefail
root=${1:?usage: configure.sh ROOT}

echo atomtx-vm >"$root/etc/hostname"
printf '127.0.0.1 localhost atomtx-vm\n' >"$root/etc/hosts"
echo 'LABEL=atomtx / ext4 noatime 0 1' >"$root/etc/fstab"
mkdir -p "$root/etc/systemd/network"
cat >"$root/etc/systemd/network/10-lan.network" <<'EOF'
[Match]
Name=en* eth*
[Network]
Address=10.0.2.15/24
LinkLocalAddressing=no
EOF
cat >"$root/etc/ssh/sshd_config.d/atomtx.conf" <<'EOF'
UseDNS no
GSSAPIAuthentication no
MaxSessions 100
MaxStartups 100
PermitUserEnvironment no
# A connection costs two seconds after each return to a saved state, of code translated anew;
# with PAM, its session and its logind, it would be five.
UsePAM no
EOF
echo zfs >"$root/etc/modules-load.d/zfs.conf"
# The guest has little memory; a large ARC would only slow the snapshot of the whole machine.
echo 'options zfs zfs_arc_max=268435456' >"$root/etc/modprobe.d/zfs.conf"
echo 'ALL ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/tests"
chmod 440 "$root/etc/sudoers.d/tests"
chroot "$root" systemctl enable systemd-networkd ssh >/dev/null 2>&1
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer man-db.timer \
  systemd-timesyncd.service e2scrub_all.timer dpkg-db-backup.timer zfs-zed.service \
  zfs-import-cache.service zfs-import-scan.service fstrim.timer xfs_scrub_all.timer logrotate.timer \
  systemd-tmpfiles-clean.timer systemd-networkd-wait-online.service e2scrub_reap.service \
  systemd-udev-settle.service systemd-binfmt.service >/dev/null 2>&1
mkdir -p "$root/etc/systemd/system-generators"
ln -sf /dev/null "$root/etc/systemd/system-generators/systemd-ssh-generator"
# No questions at the first boot, and no journal that writes to the disk under test.
chroot "$root" systemd-machine-id-setup >/dev/null 2>&1
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/atomtx.conf"
chroot "$root" passwd -d root >/dev/null
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
# Nothing to bring up to date at the first boot.
touch "$root/etc/.updated" "$root/var/.updated"
