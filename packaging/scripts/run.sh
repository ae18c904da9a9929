#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job, live: a private Redis on a unix socket and the sensor, both in a
# scratch directory, and the events as Redis holds them. Ctrl-C ends all of it.
#   run.sh [all|tree]     tree: only processes started from the same shell
set -euo pipefail
cd "$(dirname "$0")/../.."

scope=${1:-all}
if [ "$(id -u)" != 0 ]; then
	echo "edr-sensor reads the kernel with BPF, which needs root: run it with sudo" >&2
	exit 77
fi
if [ ! -r /sys/kernel/btf/vmlinux ]; then
	echo "this kernel has no BTF (/sys/kernel/btf/vmlinux): edr-sensor needs one built with CONFIG_DEBUG_INFO_BTF, 5.10 or newer" >&2
	exit 77
fi
packaging/scripts/deps.sh redis-server:redis-server

# The shell that make (and sudo) were called from.
calling_shell() {
	local pid=$PPID comm
	while [ "$pid" -gt 1 ]; do
		comm=$(cat "/proc/$pid/comm")
		if [ "$comm" != make ] && [ "$comm" != sudo ] && [ "$comm" != su ] &&
			! tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q 'run\.sh'; then
			break
		fi
		pid=$(awk '/^PPid:/ { print $2 }' "/proc/$pid/status")
	done
	echo "$pid"
}
if [ "$scope" = tree ]; then
	scope=tree:$(calling_shell)
fi

dir=$(mktemp -d /tmp/edr-sensor.XXXXXX)
redis= sensor= viewer=
finish() {
	trap '' INT TERM
	[ -z "$viewer" ] || kill "$viewer" 2>/dev/null || true
	if [ -n "$sensor" ] && kill -TERM "$sensor" 2>/dev/null; then
		wait "$sensor" || true
	fi
	if [ -n "$redis" ] && kill -TERM "$redis" 2>/dev/null; then
		wait "$redis" || true
	fi
	echo
	sed -n 's/.*"msg":"stopped".*"seen":\([0-9]*\).*"sent":\([0-9]*\).*"lost":\([0-9]*\).*/\1 records seen, \2 sent to Redis, \3 lost/p' "$dir/sensor.log" 2>/dev/null || true
	rm -rf "$dir"
}
trap finish EXIT
trap 'exit 0' INT TERM

setsid redis-server --port 0 --unixsocket "$dir/redis.sock" --unixsocketperm 600 --dir "$dir" \
	--appendonly yes --appendfsync everysec --save '' --maxmemory-policy noeviction \
	--logfile "$dir/redis.log" --daemonize no &
redis=$!

cat >"$dir/edr-sensor.yaml" <<YAML
agent: {state_dir: $dir/state}
log: {format: json}
control: {socket: $dir/control.sock}
http: {listen: "127.0.0.1:0"}
sensor: {scope: "$scope"}
buffer: {cap: 64MiB}
transport: {address: "unix://$dir/redis.sock"}
YAML

setsid bin/edr-sensor run --config "$dir/edr-sensor.yaml" 2>"$dir/sensor.log" &
sensor=$!

for _ in $(seq 100); do
	[ -S "$dir/control.sock" ] && break
	if ! kill -0 "$sensor" 2>/dev/null; then
		cat "$dir/sensor.log" >&2
		exit 1
	fi
	sleep 0.1
done

echo "edr-sensor watches $scope; log in $dir/sensor.log; Ctrl-C ends it"
bin/edr-sensor events --config "$dir/edr-sensor.yaml" --follow -o compact &
viewer=$!
wait "$viewer" || true
