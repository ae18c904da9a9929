// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"testing"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// A service's sandbox is mounted by systemd's child before it runs the service, over all
// that the sensor has; any other mount there is tampering.
func TestGravityOfMounts(t *testing.T) {
	systemd := event.Process{Path: "/usr/lib/systemd/systemd", Parent: event.ProcessKey{PID: 1}}
	executor := systemd
	executor.Path = "/usr/lib/systemd/systemd-executor"
	named, orphan := systemd, systemd
	named.Path = "/tmp/systemd"
	orphan.Parent.PID = 700
	for _, tt := range []struct {
		name    string
		kind    event.Kind
		subject *event.Process
		want    uint8
	}{
		{"sandbox", event.Mount, &systemd, gravityNone},
		{"sandbox, taken down", event.Umount, &systemd, gravityNone},
		{"sandbox, put in place", event.MountMove, &executor, gravityNone},
		{"write by the same", event.FileModify, &systemd, gravityHigh},
		{"only called systemd", event.Mount, &named, gravityHigh},
		{"not of the first process", event.Mount, &orphan, gravityHigh},
		{"unknown process", event.Mount, nil, gravityHigh},
	} {
		ev := event.Event{Kind: tt.kind, Subject: tt.subject, File: event.FileInfo{Flags: event.FileOfBinary}}
		if got := (identity{pid: 4711}).gravity(&ev); got != tt.want {
			t.Errorf("%s: gravity %d, want %d", tt.name, got, tt.want)
		}
	}
}
