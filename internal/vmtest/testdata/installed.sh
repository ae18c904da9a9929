#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The service of the virtual machine that runs the tests, as init.sh does without systemd.

stty -F /dev/ttyS1 raw
exec >/dev/ttyS1 2>&1
say() { echo "@vm $*"; }

cd /tests || exit 1
say kernel "$(uname -r)"
say security "$(cat /sys/kernel/security/lsm)"

run() { # name, test
	read -r up _ </proc/uptime
	say begin "$1" "$up"
	timeout -s KILL 1330 ./run.test -test.v=test2json -test.timeout=22m -test.run="^$2\$" </dev/null
	code=$?
	read -r up _ </proc/uptime
	echo # should the last line be unfinished
	say end "$1" "$up" $code
}

if [ -e reboot ]; then # a test left that for the one after it
	run "$1-rebooted" TestRebooted
else
	run "$1" "$2"
	if [ -e reboot ]; then
		systemctl reboot
		exit
	fi
fi
say done
systemctl poweroff --force --force
