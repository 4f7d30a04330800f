# GlusterFS with one brick and the options of docs/hosts.md. Its client is a FUSE daemon.
server() {
	mkdir -p /media/brick /media/glusterd /var/log/glusterfs /run/gluster
	mkdir -p /var/lib/glusterd
	mount --bind /media/glusterd /var/lib/glusterd
	glusterd
	gluster volume info v >/dev/null 2>&1 || {
		gluster volume create v 10.77.0.1:/media/brick force
		gluster volume set v client.strict-locks on
		gluster volume set v server.tcp-user-timeout "$LEASE"
		gluster volume set v server.keepalive-time $((LEASE / 2))
		gluster volume set v server.keepalive-interval 1
		gluster volume set v server.keepalive-count 5
		gluster volume set v network.ping-timeout "$LEASE"
		for p in quick-read io-cache read-ahead write-behind open-behind stat-prefetch readdir-ahead nl-cache; do
			gluster volume set v performance.$p off
		done
		gluster volume start v
	}
}

client() {
	mkdir -p /var/log/glusterfs /run/gluster /var/lib/glusterd
	for _ in $(seq 30); do
		mount.glusterfs 10.77.0.1:/v /mnt/n -o direct-io-mode=enable,attribute-timeout=0,entry-timeout=0 && break
		sleep 1
	done
}
