#!/bin/sh
# Before the package goes, or is replaced: mounts do not need its files to go on, and to end.
if [ -r /proc/mounts ] && grep -q ' fuse\.kmsfs ' /proc/mounts; then
	echo "kmsfs: these mounts go on with the program that made them; umount ends each when all is on the disk:" >&2
	sed -n 's/^[^ ]* \([^ ]*\) fuse\.kmsfs .*/  \1/p' /proc/mounts >&2
fi
exit 0
