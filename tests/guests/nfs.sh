# The kernel's NFS server and client.
options=vers=4.2
server() {
	modprobe nfsd
	mkdir -p /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs /run/lock
	touch /var/lib/nfs/rmtab /var/lib/nfs/etab
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
}

client() {
	modprobe nfsv4
	for _ in $(seq 100); do
		mount.nfs4 10.77.0.1:/ /mnt/n -o "$options" && break
		sleep 0.2
	done
}
