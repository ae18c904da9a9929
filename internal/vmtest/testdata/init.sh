#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first process of the virtual machine. It runs what is in /tests/plan, a line
# "name package command..." each, and says on the serial port REPORT what happens: another
# one belongs to the kernel, so that no message tears a line of a test apart.

export PATH=/bin HOME=/root TMPDIR=/tmp

# No system runs on the kernel's initial file system, so neither do the tests: the
# script moves everything to a mount and starts again.
if [ "$1" != again ]; then
	/bin/busybox --install -s /bin 2>/dev/null # but for those that are there
	mkdir /new
	mount -t tmpfs -o mode=755,size=75% root /new
	cp /init /new # a copy: switch_root knows an initial file system by this file
	mv /modules /tests /bin /new
	exec /new/bin/busybox switch_root /new /init again
fi

mkdir -p /proc /sys /dev /tmp /run /root /etc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t tracefs tracefs /sys/kernel/tracing
mount -t securityfs securityfs /sys/kernel/security
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
chmod 1777 /tmp
echo root:x:0:0:root:/root:/bin/sh >/etc/passwd
echo root:x:0: >/etc/group
for module in /modules/*; do
	insmod "$module"
done
hostname vm
ip link set lo up

stty -F "/dev/$REPORT" raw
exec >"/dev/$REPORT" 2>&1
say() { echo "@vm $*"; }

say kernel "$(uname -r)"
say security "$(cat /sys/kernel/security/lsm)"
while read -r name package command <&3; do
	cd "/tests/$package" || continue
	read -r up _ </proc/uptime
	say begin "$name" "$up"
	timeout -s KILL 1050 sh -c "$command" </dev/null # later than its own limit
	code=$?
	read -r up _ </proc/uptime
	echo # should the last line be unfinished
	say end "$name" "$up" $code
done 3</tests/plan
say done
poweroff -f
