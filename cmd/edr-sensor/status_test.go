// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

const troubled = `{
 "version":"1.2.3","agent_id":"a-1","mode":"truncating","since":"2026-11-23T15:00:00Z","reason":"the buffer is full","scope":"all",
 "context":{"case_id":"c-1"},
 "coverage":[{"event":"file.create","hook":"raw_tp/sys_exit"},{"event":"process.exec","hook":"tp_btf/sched_process_exec","required":true},{"event":"net.close","hook":"","errors":["load on_inet_sock_set_state: permission denied"]}],
 "sensor":{"events":{"process.exec":1234567,"net.close":0,"file.create":20,"file.write":15},"lost":{"process.exec":12,"file.write":1},"suppressed":{"file.write":93120},"rings":{"priority":{"used":8388608,"size":16777216},"bulk":{"used":0,"size":8388608}}},
 "buffer":{"records":120000,"unsent":90000,"last":130000,"bytes":268435456,"cap":536870912,"truncated":77,"Err":{}},
 "transport":{"state":"held","address":"redis:6379","since":"2026-11-23T15:30:00Z","error_class":"oom","error":"OOM command not allowed","hint":"raise maxmemory","acked":40000}}`

func TestStatusScreen(t *testing.T) {
	now := time.Date(2026, 11, 23, 17, 30, 0, 0, time.UTC)
	for _, c := range []struct{ name, status, want string }{
		{"troubled", troubled, `edr-sensor 1.2.3  a-1  truncating for 2h30m
          the buffer is full
scope     all
case_id   c-1
coverage  2 of 3 kinds of events, 1 degraded: by system calls, not io_uring
          missing net.close: load on_inet_sock_set_state: permission denied
seen      1,234,602 events; 13 lost in the kernel, 93,120 left out as configured
          file.*                         35  lost 1  left out 93,120
          process.exec            1,234,567  lost 12
rings     bulk 0 % of 8.0 MiB, priority 50 % of 16.0 MiB
buffer    120,000 records, 256.0 MiB of 512.0 MiB (50 %), 90,000 not sent
          77 records dropped unsent, 0 damaged
redis     redis:6379, held for 2h0m, 90,000 behind
          oom: OOM command not allowed
          raise maxmemory
`},
		{
			"well", `{"version":"1","agent_id":"a","mode":"online","since":"2026-11-23T17:29:58.5Z","scope":"tree:1",
 "transport":{"state":"connected","address":"unix:///r","since":"2026-11-20T17:30:00Z","acked":5,"last_reply":"2026-11-23T17:29:59.9Z"},"buffer":{"last":5,"cap":100}}`,
			`edr-sensor 1  a  online for 1.5s
scope     tree:1
coverage  0 of 0 kinds of events
seen      0 events; 0 lost in the kernel
buffer    0 records, 0 B of 100 B (0 %), 0 not sent
redis     connected to unix:///r for 3 days, 0 behind, last reply 100ms ago
`,
		},
		{"without Redis", `{"version":"1","agent_id":"a","mode":"buffering","transport":{"state":"off"}}`, `edr-sensor 1  a  buffering for an unknown time
scope     
coverage  0 of 0 kinds of events
seen      0 events; 0 lost in the kernel
buffer    0 records, 0 B of 0 B (0 %), 0 not sent
redis     not configured: events stay in the buffer
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s sensorStatus
			if err := json.Unmarshal([]byte(c.status), &s); err != nil {
				t.Fatal(err)
			}
			screen := s.screen(now, false)
			if d := cmp.Diff(c.want, screen); d != "" {
				t.Errorf("screen (-want +got):\n%s", d)
			}
			lines := strings.Split(screen, "\n")
			if len(lines) > 24 {
				t.Errorf("%d lines do not fit a screen", len(lines))
			}
			for _, line := range lines {
				if utf8.RuneCountInString(line) > 80 {
					t.Errorf("wider than a screen: %s", line)
				}
			}
		})
	}
}

func TestStatusCommand(t *testing.T) {
	socket := fakeSensor(t, troubled, nil)
	code, out, errs := run(t, "status", "--socket", socket)
	if code != 0 || !strings.Contains(out, "truncating") || errs != "" {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	code, out, _ = run(t, "status", "--json", "--config", configFor(t, "control: {socket: "+socket+"}\n"))
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); code != 0 || err != nil || v["mode"] != "truncating" {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
	code, _, errs = run(t, "status", "--socket", fakeSensor(t, "<html>", nil))
	if code != exitFailure || !strings.Contains(errs, "read status: ") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}
