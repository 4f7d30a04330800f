#!/bin/sh
# Fetches User-Mode Linux and what an NFS server and its clients need, from Debian, into the directory $1.
# Nothing is installed.
set -eu
mkdir -p "$1/debs" "$1/mods/lib/modules"
cd "$1"
packages="user-mode-linux uml-utilities kmod libkmod2 nfs-kernel-server nfs-common libwrap0"
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
(
	cd debs
	# shellcheck disable=SC2086
	apt-get download -qq $packages || { $sudo apt-get update -qq && apt-get download -qq $packages; }
)
for d in debs/*.deb; do dpkg-deb -x "$d" root; done
for l in modprobe insmod rmmod lsmod depmod modinfo; do ln -sfn ../bin/kmod root/sbin/$l; done
for m in root/usr/lib/uml/modules/*; do ln -sfn "$PWD/$m" "mods/lib/modules/$(basename "$m")"; done
rm -r debs
