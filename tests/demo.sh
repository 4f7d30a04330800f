#!/usr/bin/env bash
# The main job on a local key: demo.sh PROGRAM. Everything stays below demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
kmsfs=$PWD/$1 demo=$PWD/demo
export XDG_STATE_HOME=$demo/state XDG_CONFIG_HOME=$demo/config
show() { printf '\n$ %s\n' "$*"; "$@"; }

if grep -q " $demo/plain fuse" /proc/self/mounts 2>/dev/null; then "$kmsfs" umount "$demo/plain"; fi
rm -rf "$demo"
mkdir -p "$demo/cipher" "$demo/plain"
tree=$(go env GOROOT)/src/net

show "$kmsfs" init --key "local:$demo/demo.key" "$demo/cipher"
show "$kmsfs" mount "$demo/cipher" "$demo/plain"
trap 'grep -q " $demo/plain fuse" /proc/self/mounts && "$kmsfs" umount "$demo/plain" || true' EXIT

show cp -a "$tree" "$demo/plain/net"
printf 'There is nothing to see here, unless you have the key.\n' >"$demo/plain/letter.txt"

printf '\nThe same file, as plaintext:\n'
show cat "$demo/plain/letter.txt"
sync "$demo/plain/letter.txt"
file=$(find "$demo/cipher" -maxdepth 1 -type f ! -name 'kmsfs.*' | head -n 1)
printf '\nand as ciphertext, %s:\n' "${file#"$PWD"/}"
od -A d -t x1z -N 64 "$file"
echo '   ... the rest of the header, and the sealed block:'
od -A d -t x1z -j 1024 "$file"
if grep -rqF 'nothing to see here' "$demo/cipher"; then echo "the plaintext stands in the ciphertext"; exit 1; fi

show "$kmsfs" umount "$demo/plain"
show "$kmsfs" mount "$demo/cipher" "$demo/plain"
printf '\nComparing %s files with the original ... ' "$(find "$tree" -type f | wc -l)"
diff -r "$tree" "$demo/plain/net"
echo "all the same."
show "$kmsfs" info "$file"
show "$kmsfs" umount "$demo/plain"

cat <<TXT

It works. To go on by hand, from here:

  export XDG_STATE_HOME=$demo/state
  $1 mount demo/cipher demo/plain
  $1 umount demo/plain
TXT
