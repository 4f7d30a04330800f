# CephFS with one monitor, one OSD and one metadata server in a guest, and the kernel's client.
conf() {
	mkdir -p /etc/ceph /run/ceph
	cat >/etc/ceph/ceph.conf <<-END
		[global]
		fsid = 7f2b1c9e-4d0a-4c7a-9a51-0d5f6a2e8b11
		mon host = v1:10.77.0.1:6789
		public addr = 10.77.0.1
		ms bind msgr2 = false
		auth cluster required = none
		auth service required = none
		auth client required = none
		osd pool default size = 1
		mon allow pool size one = true
		mon data = /media/mon
		osd data = /media/osd
		bluestore block size = 1500000000
		osd memory target = 939524096
		keyring = /media/keyring
		log file = /run/ceph/\$name.log
		run dir = /run/ceph
	END
}

# The OSD ends if it asks the monitor for something before it knows the monitor's ID.
osd() {
	for _ in $(seq 5); do
		pgrep -x ceph-osd >/dev/null || ceph-osd -i 0
		sleep 2
	done
}

server() {
	conf
	if [ ! -d /media/mon ]; then
		mkdir /media/osd
		ceph-authtool --create-keyring /media/keyring --gen-key -n mon. --cap mon 'allow *'
		monmaptool --create --fsid 7f2b1c9e-4d0a-4c7a-9a51-0d5f6a2e8b11 --addv a '[v1:10.77.0.1:6789]' /run/monmap
		ceph-mon --mkfs -i a --monmap /run/monmap --keyring /media/keyring
		ceph-mon -i a
		ceph osd new 2c4f4c1e-8f1d-4f0d-8a60-6b1d3a1f0c22
		ceph-osd --mkfs -i 0 --osd-uuid 2c4f4c1e-8f1d-4f0d-8a60-6b1d3a1f0c22
		osd
		ceph osd pool create meta 4
		ceph osd pool create data 4
		ceph fs new v meta data
		ceph fs set v session_timeout 30 # the least that it takes
		ceph fs set v session_autoclose 30
	else
		ceph-mon -i a
		osd
	fi
	ceph-mds -i a
}

client() {
	modprobe ceph
	for _ in $(seq 60); do
		mount -i -t ceph 10.77.0.1:6789:/ /mnt/n -o name=admin,recover_session=clean && break
		sleep 1
	done
}
