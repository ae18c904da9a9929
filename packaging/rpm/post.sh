# Nothing here fails the transaction because of the service. $1: how many versions
# are installed now.
unit=edr-sensor.service

if ! getent passwd edr-sensor >/dev/null; then
	if command -v systemd-sysusers >/dev/null; then
		systemd-sysusers edr-sensor.conf || :
	elif command -v useradd >/dev/null; then # a container or a chroot without systemd
		useradd --system --user-group --home-dir /var/lib/edr-sensor --no-create-home \
			--shell /usr/sbin/nologin --comment "EDR sensor" edr-sensor || :
	fi
fi

if [ "$1" -eq 1 ] && command -v systemctl >/dev/null; then
	# The distribution's or the administrator's preset says whether it is enabled.
	systemctl --no-reload preset $unit >/dev/null 2>&1 || :
fi

good=yes
/usr/bin/edr-sensor check --config /etc/edr-sensor/edr-sensor.yaml >/dev/null || good=

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || :
	action=try-restart # what was stopped stays stopped
	if [ "$1" -eq 1 ] || systemctl --quiet is-failed $unit; then
		action=start
	fi
	if [ $action = start ] && ! systemctl --quiet is-enabled $unit 2>/dev/null; then
		[ "$1" -ne 1 ] || echo "edr-sensor: installed, not started; to start it now and at every boot: systemctl enable --now edr-sensor"
	elif [ -z "$good" ] && systemctl --quiet is-active $unit; then
		echo "edr-sensor: not restarted, because it would refuse the configuration; the version that runs goes on. Correct what is said above, then: systemctl restart edr-sensor" >&2
	elif ! systemctl --quiet $action $unit; then
		echo "edr-sensor: does not run; see: systemctl status edr-sensor, edr-sensor doctor" >&2
	fi
elif [ -z "$good" ]; then
	echo "edr-sensor: would refuse this configuration when it is started" >&2
fi
exit 0
