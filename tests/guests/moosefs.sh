# MooseFS: a master and a chunk server in one guest. Its client is a FUSE daemon. By default
# the locks of a silent client end after a day.
server() {
	mkdir -p /media/master /media/chunks /media/disk
	[ -e /media/master/exports ] || {
		printf 'MFSM NEW' >/media/master/metadata.mfs
		echo '* / rw,alldirs,admin,maproot=0:0' >/media/master/exports
		echo '/media/disk' >/media/chunks/disks
	}
	cat >/run/master <<-END
		WORKING_USER = root
		WORKING_GROUP = root
		DATA_PATH = /media/master
		EXPORTS_FILENAME = /media/master/exports
		SESSION_SUSTAIN_TIME = $LEASE
	END
	cat >/run/chunks <<-END
		WORKING_USER = root
		WORKING_GROUP = root
		DATA_PATH = /media/chunks
		HDD_CONF_FILENAME = /media/chunks/disks
		MASTER_HOST = 10.77.0.1
	END
	mfsmaster -c /run/master -a start
	mfschunkserver -c /run/chunks start
}

client() {
	for _ in $(seq 30); do
		mfsmount /mnt/n -H 10.77.0.1 && break
		sleep 1
	done
}
