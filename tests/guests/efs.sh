# NFS as Amazon EFS has it: version 4.1, no delegations, and the options of mount that Amazon describes.
. "$LAB/nfs.sh"
options=vers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport
echo 0 >/proc/sys/fs/leases-enable
