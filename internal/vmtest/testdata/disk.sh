#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The first process of a virtual machine with a Debian on its disk: adds what is in
# /payload, and hands over to systemd.

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in /modules/*; do
	insmod "$module"
done
mkdir /disk
mount -t ext4 /dev/vda /disk
cp -a /payload/. /disk
umount /dev
exec switch_root /disk /sbin/init
