#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the deb, the rpm and the bill of materials of this tree, for amd64 and arm64 or for those named:
#   packages.sh [amd64|arm64 ...]
# DIST (dist) is where they go, VERSION and SOURCE_DATE_EPOCH default to what git
# says. The same tree, compiler and version give the same bytes.
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022
export LC_ALL=C TZ=UTC CGO_ENABLED=0
unset GOOS GOARCH GOAMD64 GOARM64 GOEXPERIMENT # would make another binary

VERSION=${VERSION:-$(packaging/scripts/version.sh)}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y go.mod)}
DIST=${DIST:-dist}
GO=${GO:-go}
arches=("$@")
[ ${#arches[@]} -gt 0 ] || arches=(amd64 arm64)

mkdir -p "$DIST"
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
# What an earlier call left would look like a part of this one.
rm -f "$DIST"/edr-sensor[_-]*.{deb,rpm,json}

# The version names the commit; what git says beyond that depends on the checkout.
build() {
	[ -e "$stage/$1" ] || GOOS=linux GOARCH=$1 "$GO" build -trimpath -buildvcs=false \
		-ldflags "-s -w -X main.version=$VERSION" -o "$stage/$1/edr-sensor" ./cmd/edr-sensor
}

# What is the same on both architectures: written by the binary of this machine.
host=$("$GO" env GOHOSTARCH)
build "$host"
for shell in bash zsh fish; do
	"$stage/$host/edr-sensor" completion $shell >"$stage/completion.$shell"
done
"$stage/$host/edr-sensor" man | gzip -9n >"$stage/edr-sensor.1.gz"
{
	cat <<-ROFF
		.TH EDR\-SENSOR.YAML 5 "" "edr\-sensor ${VERSION//-/\\-}" ""
		.SH NAME
		edr\-sensor.yaml \- configuration of edr\-sensor
		.SH DESCRIPTION
		The file as it is installed in /etc/edr\-sensor, with every key, its default and its meaning.
		.PP
		.nf
	ROFF
	sed 's/\\/\\e/g; s/-/\\-/g; s/^[.'"'"']/\\\&&/' packaging/config/edr-sensor.yaml
	printf '%s\n' .fi '.SH SEE ALSO' '.BR edr\-sensor (1)'
} | gzip -9n >"$stage/edr-sensor.yaml.5.gz"
cat >"$stage/changelog.yaml" <<YAML
- semver: "$VERSION-1"
  date: "$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)"
  packager: edr-sensor authors <edr-sensor@users.noreply.github.com>
  deb: {urgency: medium, distributions: [stable]}
  changes:
    - note: "https://github.com/aurorasoc/edr-sensor/commits has every change."
YAML

for arch in "${arches[@]}"; do
	build "$arch"
	"$GO" run ./packaging/sbom -version "$VERSION" -bom "$DIST/edr-sensor_${VERSION}_$arch.cdx.json" \
		-licenses "$stage/$arch/third-party-licenses.txt" "$stage/$arch/edr-sensor"
	for format in deb rpm; do
		doc=file # what nfpm calls doc is not put into a deb
		[ $format = deb ] || doc=doc
		sed "s|\${STAGE}|$stage|g; s|\${ARCH}|$arch|g; s|\${VERSION}|$VERSION|g; s|\${DOC}|$doc|g" packaging/nfpm.yaml >"$stage/nfpm.yaml"
		"$GO" tool -modfile=nfpm.mod nfpm package --config "$stage/nfpm.yaml" --packager $format --target "$DIST"
	done
done
