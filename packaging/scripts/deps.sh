#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that the tests and the live demo need, when they
# are missing. Without root it only says what is missing.
set -euo pipefail

want=("$@")
if [ ${#want[@]} -eq 0 ]; then
	want=(redis-server:redis-server redis-benchmark:redis-tools promtool:prometheus gcc:gcc strace:strace mkfs.xfs:xfsprogs
		clang-19:clang-19 llvm-strip-19:llvm-19 clang-format-19:clang-format-19 /usr/include/bpf/bpf_core_read.h:libbpf-dev
		qemu-system-x86_64:qemu-system-x86 qemu-system-aarch64:qemu-system-arm cpio:cpio xz:xz-utils mmdebstrap:mmdebstrap systemd-analyze:systemd
		lintian:lintian rpmlint:rpmlint rpm:rpm man:man-db zsh:zsh fish:fish)
fi

missing=()
for w in "${want[@]}"; do
	[[ ${w%%:*} == /* && -e ${w%%:*} ]] || command -v "${w%%:*}" >/dev/null || missing+=("${w##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "missing Debian packages: ${missing[*]} (run as root to have them installed)" >&2
	exit 0
fi
command -v apt-get >/dev/null || {
	echo "missing: ${missing[*]}; this is not Debian, install their equivalents" >&2
	exit 1
}

# Servers come for the tests, which start their own: no service of ours may run.
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	made=1
	trap 'rm -f "$policy"' EXIT
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Again after a pause: a mirror can be between two states, and another apt at work.
for try in 1 2 3; do
	apt-get update -qq -o Acquire::Retries=5 &&
		apt-get install -y -qq -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 --no-install-recommends "${missing[@]}" >/dev/null && break
	[ $try -lt 3 ] || exit 1
	sleep 15
done
[ -z "$made" ] || rm -f "$policy"
