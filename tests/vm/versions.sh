# What the test machine holds.  A change here makes a new machine: raise IMAGE_VERSION.
IMAGE_VERSION=4

# restic 0.18 and borg 1.4 are Debian's own; the others and kopia are built with Go, each version
# pinned, and a borg for the tests on this host with pip.
RESTIC_VERSIONS='0.14.0 0.16.5 0.19.1'
KOPIA_VERSION=0.23.1
BORG_VERSION=1.4.5
GO_VERSION=1.25.8 # the highest that they ask for

DEBIAN_PACKAGES='
  linux-image-cloud-amd64 linux-headers-cloud-amd64 zfs-dkms zfsutils-linux
  borgbackup acl attr btrfs-progs
  systemd-sysv udev kmod dbus initramfs-tools openssh-server iproute2 procps
  python3 python3-venv restic strace sudo util-linux e2fsprogs psmisc ca-certificates less
  lvm2 thin-provisioning-tools xfsprogs xfsdump
'

PYTHON_PACKAGES='
  click>=8.1 sqlalchemy>=2.1,<2.2 alembic>=1.16 transitions>=0.9.3,<0.10 rich>=13
  pytest hypothesis
'
