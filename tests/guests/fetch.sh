#!/bin/sh
# Fetches User-Mode Linux and what an NFS server and its clients need, from Debian, into the directory $1,
# if it is not there. Nothing is installed.
set -eu
[ ! -d "$1" ] || exit 0
if [ "$(id -u)" != 0 ] || [ "$(uname -m)" != x86_64 ]; then
	echo "hosts with kernels of their own need root and amd64: not tested"
	exit 0
fi
rm -rf "$1.part"
mkdir -p "$1.part/debs" "$1.part/mods/lib/modules"
cd "$1.part"
packages="user-mode-linux uml-utilities kmod libkmod2 nfs-kernel-server nfs-common libwrap0"
(
	cd debs
	# shellcheck disable=SC2086
	apt-get download -qq $packages || { apt-get update -qq && apt-get download -qq $packages; }
)
for d in debs/*.deb; do dpkg-deb -x "$d" root; done
for l in modprobe insmod rmmod lsmod depmod modinfo; do ln -sfn ../bin/kmod root/sbin/$l; done
for m in root/usr/lib/uml/modules/*; do ln -sfn "../../../$m" "mods/lib/modules/$(basename "$m")"; done
rm -r debs
cd - >/dev/null
mv "$1.part" "$1"
