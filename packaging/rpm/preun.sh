# Not for an upgrade: the old version runs until the new one takes over from it.
if [ "$1" -eq 0 ] && command -v systemctl >/dev/null; then
	if [ -d /run/systemd/system ]; then
		systemctl --no-reload disable --now edr-sensor.service || :
	else
		systemctl --no-reload disable edr-sensor.service || :
	fi
fi
exit 0
