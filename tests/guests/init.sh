#!/bin/bash
# The first process of a User-Mode Linux guest. The guest's root is the host's own tree, to read only; what
# it writes is in memory. LAB is the laboratory's directory, HN the guest's name, IP its address, ROLE
# "server" or "client", LEASE the seconds after which the server takes a silent client for dead.
# BACKING.sh has a function for each role: what a server starts on the disk at /media, and what a client
# mounts at /mnt/n. Then the guest runs the scripts that appear in LAB/share/HN.
export LD_LIBRARY_PATH=$LAB/root/usr/lib/x86_64-linux-gnu HOME=/root
export PATH=$LAB/share:/usr/sbin:/usr/bin:/sbin:/bin:$LAB/root/usr/sbin:$LAB/root/sbin:$LAB/root/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm
for d in /run /var/lib /var/log /mnt /media /dev/shm; do mount -t tmpfs tmpfs $d; done
mkdir /run/etc
cp -a /etc/. /run/etc/
mount --bind /run/etc /etc
# /tmp and /root are the guest's own; the laboratory, and the packages beside its root, stay where they are.
packages=$(cd -P "$LAB/root/.." && pwd)
mkdir -p /mnt/share /mnt/n /mnt/p /mnt/lab /mnt/packages
mount --bind "$LAB" /mnt/lab
mount --bind "$packages" /mnt/packages
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o mode=700 tmpfs /root
mkdir -p "$LAB" "$packages"
mount --bind /mnt/lab "$LAB"
mount --bind /mnt/packages "$packages"
mount -t hostfs none /mnt/share -o "$LAB/share"
hostname "$HN"
echo "$LAB/share/modprobe" >/proc/sys/kernel/modprobe
modprobe fuse || echo "modprobe fuse failed"
. "$LAB/$BACKING.sh"
ip link set lo up
ip addr add "$IP/24" dev eth0
"$LAB/connect.sh"
if [ "$ROLE" = server ]; then
	mount -t ext4 -o usrquota /dev/ubda /media
	server
else
	client
fi
dir=/mnt/share/$HN
: >"$dir/ready"
mkfifo /run/tick
exec 8<>/run/tick
i=0
while :; do
	if [ -e "$dir/cmd.$i.go" ]; then
		(
			exec 8>&-
			bash "$dir/cmd.$i" </dev/null >"$dir/out.$i" 2>&1
			echo $? >"$dir/rc.$i.new"
			mv "$dir/rc.$i.new" "$dir/rc.$i"
		) &
		i=$((i + 1))
	else
		read -r -t 0.05 -u 8
	fi
done
