#!/bin/bash
# The first process of a User-Mode Linux guest. The guest's root is the host's own tree, to read only; what
# it writes is in memory. LAB is the laboratory's directory, HN the guest's name, IP its address, ROLE
# "server" or "client", LEASE the seconds of an NFS lease. It mounts, and then runs the scripts that
# appear in LAB/share/HN.
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
# /tmp is the guest's own; the laboratory stays where it is.
mkdir -p /mnt/share /mnt/n /mnt/p /mnt/lab
mount --bind "$LAB" /mnt/lab
mount -t tmpfs tmpfs /tmp
mkdir -p "$LAB"
mount --bind /mnt/lab "$LAB"
mount -t tmpfs -o mode=700 tmpfs /root
mount -t hostfs none /mnt/share -o "$LAB/share"
hostname "$HN"
echo "$LAB/share/modprobe" >/proc/sys/kernel/modprobe
for m in sunrpc lockd nfs nfsv4 fuse; do modprobe $m || echo "modprobe $m failed"; done
ip link set lo up
ip link set eth0 up
ip addr add "$IP/24" dev eth0
# Neighbours that do not age: else a client whose server is away waits for ARP, and backs off past the
# end of the server's grace period.
for k in 1 2 3; do
	[ "10.77.0.$k" = "$IP" ] || ip neigh replace 10.77.0.$k lladdr 02:00:0a:4d:00:0$k nud permanent dev eth0
done
if [ "$ROLE" = server ]; then
	modprobe nfsd
	mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs /run/lock
	touch /var/lib/nfs/rmtab /var/lib/nfs/etab
	mount -t ext4 /dev/ubda /media
	mkdir -p /media/export /media/nfsdcld
	chmod 777 /media/export
	mount -t nfsd nfsd /proc/fs/nfsd
	mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
	# Which clients had locks must outlive a restart of the server.
	nfsdcld -F -s /media/nfsdcld -p /var/lib/nfs/rpc_pipefs &
	sleep 0.5
	echo "$LEASE" >/proc/fs/nfsd/nfsv4leasetime
	echo 20 >/proc/fs/nfsd/nfsv4gracetime
	echo "/media/export 10.77.0.0/24(rw,sync,no_root_squash,fsid=0,no_subtree_check,insecure)" >/etc/exports
	exportfs -r
	rpc.mountd -F -N 2 -N 3 &
	sleep 0.3
	rpc.nfsd -N 3 -V 4.2 -G 20 -L "$LEASE" 4
else
	for _ in $(seq 100); do
		mount.nfs4 10.77.0.1:/ /mnt/n -o vers=4.2 && break
		sleep 0.2
	done
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
