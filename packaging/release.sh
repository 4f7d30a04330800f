#!/bin/sh
# release.sh OUT makes a release in the empty directory OUT: for each architecture in ARCHS a static
# program, a Debian and an RPM package; for each of RESTORE (system/architecture) the program that reads
# volumes without mounting them; the bills of materials, and the checksums of all. Two runs on the same
# commit, with the same Go, make the same bytes.
set -eu
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -z "$(ls -A "$out")" ] || { echo "$out is not empty" >&2; exit 1; }
GO=${GO:-go}
ARCHS=${ARCHS:-amd64 arm64}
RESTORE=${RESTORE-darwin/arm64 darwin/amd64 windows/amd64}

# A version is a tag like v1.2.3. Without one it is 0.0.0, and tells the commit.
VERSION=${VERSION:-$(git describe --tags --match 'v[0-9]*' 2>/dev/null || echo "0.0.0-dev.$(git rev-list --count HEAD)")}
VERSION=${VERSION#v}
export VERSION
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

STAGE=$(mktemp -d)
export STAGE
trap 'rm -rf "$STAGE"' EXIT
tool() { # what a tool says is told if it fails
	"$GO" tool -modfile=packaging/tools/go.mod "$@" >"$STAGE/log" 2>&1 || { cat "$STAGE/log" >&2; exit 1; }
}
build() { # build OS ARCH FILE, with the further flags BUILDFLAGS
	# shellcheck disable=SC2086
	CGO_ENABLED=0 GOOS=$1 GOARCH=$2 "$GO" build ${BUILDFLAGS:-} -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X main.version=$VERSION" -o "$3" ./cmd/kmsfs
}

bill() { # bill NAME writes the bill of materials of a program
	tool cyclonedx-gomod bin -json -licenses -noserial -notimestamp -version "$VERSION" -output "$out/$1.cdx.json" "$out/$1"
}

host=$("$GO" env GOHOSTARCH)
build linux "$host" "$STAGE/$host/kmsfs"
"$STAGE/$host/kmsfs" generate "$STAGE"
gzip -n -9 "$STAGE"/man1/*
mkdir "$STAGE/doc"
cp README.md CHANGELOG.md docs/*.md blockcrypt/FORMAT.md tests/POSIX.md docs/deploy/*.yml docs/deploy/*.json "$STAGE/doc"
find "$STAGE" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
chmod -R u=rwX,go=rX "$STAGE"

for ARCH in $ARCHS; do
	export ARCH
	[ "$ARCH" = "$host" ] || build linux "$ARCH" "$STAGE/$ARCH/kmsfs"
	cp "$STAGE/$ARCH/kmsfs" "$out/kmsfs-$VERSION-linux-$ARCH"
	tool nfpm package -f packaging/nfpm.yaml -p deb -t "$out"
	tool nfpm package -f packaging/nfpm.yaml -p rpm -t "$out"
	bill "kmsfs-$VERSION-linux-$ARCH"
done
for target in $RESTORE; do
	name=kmsfs-$VERSION-${target%/*}-${target#*/}
	[ "${target%/*}" != windows ] || name=$name.exe
	build "${target%/*}" "${target#*/}" "$out/$name"
	bill "$name"
done
cd "$out"
sha256sum -- * >SHA256SUMS
