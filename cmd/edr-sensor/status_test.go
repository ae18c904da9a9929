// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// statuses are what a sensor may answer, at a quarter past five.
func statuses() map[string]string {
	kinds := func(n int) string {
		var all []string
		for i, kind := range []string{
			"process.exec", "process.exit", "process.fork", "process.snapshot", "net.connect", "net.connect_failed", "net.accept", "net.listen", "net.close",
			"file.create", "file.write", "file.delete", "file.rename", "file.link", "file.symlink", "file.mkdir", "file.chmod", "file.chown", "file.truncate",
		} {
			all = append(all, fmt.Sprintf("%q:%d", kind, n*(i+1)))
		}
		return "{" + strings.Join(all, ",") + "}"
	}
	return map[string]string{
		"troubled": `{
 "version":"1.2.3","agent_id":"a-1","mode":"truncating","since":"2026-11-23T15:00:00Z","reason":"the buffer is full","scope":"all",
 "problems":[{"reason":"the buffer is full and drops its oldest records: 77 in all","metric":"buffer_truncations_total"},{"reason":"Redis at redis:6379 does not take events: held: OOM command not allowed when used memory > 'maxmemory' (raise maxmemory, or trim the streams)","metric":"transport_connected"}],
 "context":{"case_id":"c-1"},
 "cases":[{"case_id":"C-17","scope":{"kind":"subtree","value":"4711"},"collect":"deep","until":"2026-11-23T19:00:00Z","tagged":12345}],
 "coverage":[{"event":"file.create","hook":"raw_tp/sys_exit","blind":"io_uring"},{"event":"file.write","hook":"raw_tp/sys_exit","blind":"io_uring"},{"event":"file.delete","hook":"raw_tp/sys_exit","blind":"io_uring"},
  {"event":"process.exec","hook":"tp_btf/sched_process_exec","required":true},{"event":"net.close","hook":"","errors":["load on_inet_sock_set_state: permission denied"]}],
 "sensor":{"events":` + kinds(123457) + `,"lost":{"process.exec":12,"file.write":1},"suppressed":{"file.write":93120},"rings":{"priority":{"used":8388608,"size":16777216},"bulk":{"used":0,"size":8388608}}},
 "rates":{"events":{"process.exec":12.34,"file.write":4211.7},"delivered":0,"fill_bytes":98304},
 "buffer":{"records":120000,"unsent":90000,"last":130000,"bytes":536870912,"unsent_bytes":530870912,"cap":536870912,"truncated":77,"recovery":{"at":"2026-11-20T17:15:00Z","cause":"buffer file is damaged: preflight: page 7: used twice","exact":true,"salvaged":1234567,"lost":300},"quarantined_bytes":536870912,"oldest_unsent":"2026-11-23T15:29:00Z","full_in_seconds":61.2},
 "warnings":[{"time":"2026-11-23T15:30:01Z","level":"warn","msg":"Delivery Held","code":"DELIVERY_HELD","reason":"OOM command not allowed"},{"time":"2026-11-23T16:30:01Z","level":"error","msg":"\u001b]0;owned\u0007 the buffer is full","error":"no space"}],
 "transport":{"state":"held","address":"redis:6379","since":"2026-11-23T15:30:00Z","error_class":"oom","error":"OOM command not allowed when used memory > 'maxmemory'","hint":"raise maxmemory, or trim the streams","acked":40000}}`,
		"well": `{"version":"1","agent_id":"a","mode":"online","reason":"all events are seen, kept and delivered","since":"2026-11-23T17:14:58.5Z","scope":"tree:1",
 "coverage":[{"event":"process.exec","hook":"tp_btf/sched_process_exec"}],
 "sensor":{"events":{"process.exec":20,"net.close":0}},"rates":{"events":{"process.exec":0.2},"delivered":1234.5,"fill_bytes":-1000},
 "transport":{"state":"connected","address":"unix:///r","since":"2026-11-20T17:15:00Z","acked":5},"buffer":{"last":5,"records":5,"bytes":40,"unsent_bytes":1,"cap":100,"oldest_unsent":"2026-11-23T17:14:59.9Z"}}`,
		"unserved": `{"version":"1","agent_id":"a","mode":"online","reason":"http.listen is not served: h","since":"2026-11-23T17:14:58.5Z","problems":[{"reason":"http.listen is not served: listen tcp 127.0.0.1:9477: bind: address already in use"}],
 "transport":{"state":"connected","address":"h:1","since":"2026-11-23T17:14:00Z","acked":5}}`,
		"drains": `{"version":"1","agent_id":"a","mode":"online","since":"2026-11-23T17:14:58.5Z","rates":{"delivered":4000,"fill_bytes":-2000000},
 "transport":{"state":"connected","address":"h:1","since":"2026-11-23T17:14:00Z","acked":5},"buffer":{"unsent":90,"last":95,"records":95,"bytes":400000000,"unsent_bytes":300000000,"cap":500000000,"oldest_unsent":"2026-11-23T16:14:59.9Z"}}`,
		"without-redis": `{"version":"1","agent_id":"a","mode":"buffering","transport":{"state":"off"},"buffer":{"oldest_unsent":"2026-11-20T17:14:59Z"}}`,
		// Everything that has a bound reaches it, and somebody has names for it.
		"worst": `{"version":"1.2.3-345-gabcdef","agent_id":"` + strings.Repeat("i", 128) + `","mode":"degraded","scope":"cgroup:/` + strings.Repeat("ü日", 99) + `",
 "problems":[{"reason":"` + strings.Repeat("long words ", 30) + `"},{"reason":"the kernel lost events","metric":"sensor_lost_events_total"}],
 "coverage":[{"event":"a"},{"event":"b"},{"event":"c"},{"event":"d"},{"event":"e"}],
 "sensor":{"events":` + kinds(18446744073709551) + `},
 "cases":[` + strings.Repeat(`{"case_id":"`+strings.Repeat("c", 100)+`","scope":{"kind":"path","value":"/\u001b[2J\u009b31m日本語"}},`, 9) + `{}],
 "errors":["` + strings.Repeat("e", 500) + `"],
 "warnings":[` + strings.Repeat(`{"msg":"`+strings.Repeat("w ", 100)+`"},`, 4) + `{}],
 "buffer":{"error":"no space left on device","recovery":{"at":"2026-11-23T17:10:00Z","cause":"preflight","salvaged":12},"quarantined_bytes":5368709120,"resize_error":"no space","hazards":["/b is on tmpfs: its content is gone"],"cap":1,"truncated":1},
 "transport":{"state":"retrying","address":"` + strings.Repeat("h", 200) + `:1","error":"` + strings.Repeat("dial ", 60) + `","hint":"` + strings.Repeat("check ", 60) + `","warning":"` + strings.Repeat("evict ", 60) + `"}}`,
	}
}

// styles are what a screen is tested on.
func styles() map[string]style {
	return map[string]style{
		"80x24": {width: 80, height: 24}, "200x60-colour": {width: 200, height: 60, colour: true}, "80x24-ascii": {width: 80, height: 24, ascii: true}, "no-terminal": {},
	}
}

func TestStatusScreen(t *testing.T) {
	now := time.Date(2026, 11, 23, 17, 15, 0, 0, time.UTC)
	for name, text := range statuses() {
		for look, st := range styles() {
			t.Run(name+"-"+look, func(t *testing.T) {
				var s sensorStatus
				if err := json.Unmarshal([]byte(text), &s); err != nil {
					t.Fatal(err)
				}
				checkScreen(t, filepath.Join("testdata", "screens", "status-"+name+"-"+look), s.screen(now, time.UTC, st).lines, st)
			})
		}
	}
}

// checkScreen holds a screen against its golden file and against the terminal it is
// for.
func checkScreen(t *testing.T, file string, lines []string, st style) {
	t.Helper()
	got := strings.Join(lines, "\n") + "\n"
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v: run the test with -args -update", err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("screen (-want +got):\n%s", d)
	}
	if st.height > 0 && len(lines) > st.height-1 && !strings.Contains(file, "worst") {
		t.Errorf("%d lines and the prompt do not fit on %d", len(lines), st.height)
	}
	paint := regexp.MustCompile("\x1b\\[[0-9]+m")
	for _, line := range lines {
		bare := paint.ReplaceAllString(line, "")
		switch {
		case st.width > 0 && columns(bare) > st.width:
			t.Errorf("wider than %d columns: %s", st.width, bare)
		case bare != line && !st.colour:
			t.Errorf("painted: %q", line)
		case st.ascii && strings.ContainsFunc(line, func(r rune) bool { return r >= 0x80 }):
			t.Errorf("not ASCII: %q", line)
		case strings.ContainsFunc(bare, unicode.IsControl):
			t.Errorf("a control character reaches the terminal: %q", line)
		}
	}
}

func TestStatusCommand(t *testing.T) {
	socket := fakeSensor(t, statuses()["troubled"], nil)
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

// FuzzStatusScreen shows whatever a sensor of another version, or somebody in its
// place, may answer.
func FuzzStatusScreen(f *testing.F) {
	for _, text := range statuses() {
		f.Add([]byte(text), 80, 24)
	}
	f.Add([]byte(`{"warnings":[{}],"cases":[{}],"rates":{"events":{"\u001b":-1e300}},"buffer":{"bytes":-1,"unsent_bytes":5,"cap":-7,"full_in_seconds":-1e300}}`), 20, 3)
	f.Fuzz(func(t *testing.T, text []byte, width, height int) {
		var s *sensorStatus
		if json.Unmarshal(text, &s) != nil || s == nil || width < 1 || width > 500 || height < 1 || height > 500 {
			return
		}
		now := time.Date(2026, 11, 23, 17, 15, 0, 0, time.UTC)
		view := top{now: func() time.Time { return now }}
		view.reset()
		view.count(text)
		view.pass(s)
		screens := [][]string{s.screen(now, time.UTC, style{width: width, height: height}).lines}
		for view.view = range topViews() {
			lines := view.draw(style{width: width, height: height})
			if len(lines) > max(height, 4) { // of which the terminal shows as many as it has
				t.Errorf("%d lines on %d", len(lines), height)
			}
			screens = append(screens, lines)
		}
		for _, line := range slices.Concat(screens...) {
			if columns(line) > width || strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("%d columns on %d: %q", columns(line), width, line)
			}
		}
	})
}
