#!/bin/sh
# Installs what the demo (fuse3), the tests (test), the long tests (soak) or those of several hosts (hosts)
# need, if it is missing: Debian packages as root or by sudo, moto_server into .venv. Says what to do where it
# cannot.
set -eu
cd "$(dirname "$0")/.."

need=""
want() { # want PACKAGE COMMAND: the package that brings a command
	command -v "$2" >/dev/null 2>&1 || need="$need $1"
}
want fuse3 fusermount3
if [ "${1:-}" = test ]; then
	want gcc gcc
	want libc6-dev gcc
	want rsync rsync
	want git git
	want sqlite3 sqlite3
	want util-linux setpriv
	want bc bc
	want acl setfacl
	want attr setfattr
	want libcap2-bin setcap
	want e2fsprogs mkfs.ext4
	want btrfs-progs mkfs.btrfs
	want restic restic
	want borgbackup borg
	want rclone rclone
	want rdiff-backup rdiff-backup
	want age age-keygen
	want rpm rpm
	want podman podman
	want runc runc
	want debootstrap debootstrap
	want qemu-user qemu-aarch64
	want python3 python3
	export PATH="$PWD/.venv/bin:$PATH"
	command -v aws >/dev/null 2>&1 || need="$need awscli"
	command -v moto_server >/dev/null 2>&1 || python3 -c 'import venv, ensurepip' 2>/dev/null || need="$need python3-venv"
fi
if [ "${1:-}" = hosts ]; then
	want make make
	want gcc gcc
	want libc6-dev gcc
	want git git
	want sqlite3 sqlite3
	want e2fsprogs mkfs.ext4
	want glusterfs-server glusterd
	want glusterfs-client glusterfs
	want quota setquota
	want samba smbd
	want ceph-mon ceph-mon
	want ceph-osd ceph-osd
	want ceph-mds ceph-mds
	want ceph-common ceph
	want cifs-utils mount.cifs
	want moosefs-master mfsmaster
	want moosefs-chunkserver mfschunkserver
	want moosefs-client mfsmount
fi
if [ "${1:-}" = soak ]; then
	want stress-ng stress-ng
	want qemu-utils qemu-img
	want xfsprogs mkfs.xfs
	[ -n "$(ls /usr/lib/postgresql/*/bin/pg_ctl 2>/dev/null)" ] || need="$need postgresql"
fi
sudo=""
if [ -n "$need" ]; then
	if [ "$(id -u)" = 0 ]; then :; elif command -v sudo >/dev/null 2>&1; then sudo=sudo; else
		echo "please install these packages as root, and try again: apt-get install$need" >&2
		exit 1
	fi
	if ! command -v apt-get >/dev/null 2>&1; then
		echo "please install what these Debian packages bring, and try again:$need" >&2
		exit 1
	fi
	echo "installing:$need"
	$sudo apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $need >/dev/null
fi
if [ "${1:-}" = test ] && ! command -v moto_server >/dev/null 2>&1; then
	echo "installing: moto_server into .venv"
	python3 -m venv .venv
	.venv/bin/pip install -q 'moto[kms,server]'
fi
if [ "${1:-}" = test ] && ! command -v promtool >/dev/null 2>&1; then
	# Alone: the package of Prometheus would start a server.
	echo "installing: promtool into .venv"
	mkdir -p .venv/bin .venv/prometheus
	(
		cd .venv/prometheus
		apt-get download -qq prometheus || { $sudo apt-get update -qq && apt-get download -qq prometheus; }
		dpkg-deb -x prometheus_*.deb . && mv usr/bin/promtool ../bin/
	)
	rm -r .venv/prometheus
fi
[ -e /dev/fuse ] || { echo "there is no /dev/fuse: load the kernel module (modprobe fuse), or pass the device to the container" >&2; exit 1; }
