// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestLogLevels changes levels of a running sensor as an operator does: the lines
// follow, and each change is a decision, also the one back.
func TestLogLevels(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.env = []string{"EDR_SENSOR_LOG__LEVEL=warn", "EDR_SENSOR_LOG__COMPONENTS__AGENT=info"}
	h.start()
	log := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(binary(t), append([]string{"log", "--config", h.config}, args...)...)
		cmd.Env = append(os.Environ(), h.env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("edr-sensor log %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	has := func(parts ...string) bool {
		for _, l := range h.log.all() {
			all := true
			for _, p := range parts {
				all = all && bytes.Contains(l, []byte(p))
			}
			if all {
				return true
			}
		}
		return false
	}
	if got, want := log(), "COMPONENT  LEVEL  CONFIGURED\n(all)      warn   warn\nagent      info   info\nsensor     warn   warn\ntransport  warn   warn\n"; got != want {
		t.Errorf("edr-sensor log:\n%s\nwant:\n%s", got, want)
	}
	w.do(order{Op: "exec", From: 1, N: 5})
	h.delivered(30 * time.Second)
	if has(`"level":"debug"`) {
		t.Error("a debug line before any was asked for")
	}

	if got := log("debug", "--component", "transport"); !strings.Contains(got, "transport  debug  warn") || strings.Contains(got, "sensor     debug") {
		t.Errorf("edr-sensor log debug --component transport:\n%s", got)
	}
	w.do(order{Op: "exec", From: 10, N: 5})
	eventually(t, 30*time.Second, "transport writes debug lines", func() bool { return has(`"level":"debug"`, `"component":"transport"`) })
	if has(`"level":"debug"`, `"component":"sensor"`) {
		t.Error("a debug line of the sensor, though only those of transport were asked for")
	}
	log("reset")
	if got := log("debug", "--component", "sensor", "--for", "20s"); !regexp.MustCompile(`sensor     debug  warn  for [0-9]+s more`).MatchString(got) {
		t.Errorf("edr-sensor log debug --component sensor --for 20s:\n%s", got)
	}
	eventually(t, 60*time.Second, "the level goes back by itself", func() bool {
		return has(`"code":"LOG_LEVEL"`, `"before":"debug"`, `"after":"warn"`, "the time is over")
	})
	h.finish()

	var changes []string
	for _, r := range readStreams(t, server.Client()) {
		if r.event.StatusCode == "LOG_LEVEL" {
			changes = append(changes, string(r.data))
		}
	}
	if len(changes) != 4 {
		t.Fatalf("%d decisions about levels, want 4: %s", len(changes), changes)
	}
	if !strings.Contains(changes[0], `"peer_uid":0`) || !strings.Contains(changes[0], `"log_component":"transport"`) || !strings.Contains(changes[1], `"transport":"warn"`) {
		t.Errorf("the decision does not say who asked for what: %s", changes[0])
	}
}
