# Samba and the kernel's SMB client, whose symlinks are its own (mfsymlinks).
server() {
	mkdir -p /media/export /media/samba /run/samba
	chmod 777 /media/export
	cat >/run/smb.conf <<-END
		[global]
		server role = standalone server
		server min protocol = SMB3_11
		disable spoolss = yes
		load printers = no
		private dir = /media/samba
		state directory = /media/samba
		cache directory = /media/samba
		lock directory = /run/samba
		pid directory = /run/samba
		ncalrpc dir = /run/samba/rpc
		log file = /run/samba/log
		interfaces = 10.77.0.1/24
		kernel oplocks = no
		[n]
		path = /media/export
		read only = no
		case sensitive = yes
		mangled names = no
		strict sync = yes
		ea support = yes
		create mask = 0777
	END
	printf 'x\nx\n' | smbpasswd -c /run/smb.conf -s -a root
	smbd -D -s /run/smb.conf
}

client() {
	for m in cmac hmac sha512_generic gcm ccm aes_generic ctr cifs; do modprobe $m; done
	for _ in $(seq 30); do
		mount.cifs //10.77.0.1/n /mnt/n -o "vers=3.1.1,username=root,password=x,mfsymlinks,noperm,cache=none,actimeo=0" && break
		sleep 1
	done
}
