// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// selfRecord is the part of a decision that the tests look at.
type selfRecord struct {
	Code     string `json:"status_code"`
	Message  string `json:"message"`
	Unmapped struct {
		Sensor map[string]any `json:"sensor"`
	} `json:"unmapped"`
}

// decisions are those of a stream with one of the codes, in order.
func decisions(t *testing.T, recs []record, stream string, codes ...string) (out []selfRecord) {
	t.Helper()
	for _, r := range recs {
		if r.stream != stream || !slices.Contains(codes, r.event.StatusCode) {
			continue
		}
		var d selfRecord
		if err := json.Unmarshal(r.data, &d); err != nil {
			t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}

// TestReload changes the configuration under a sensor that sees events all the time:
// what can change at once does, what is wrong changes nothing, each is a decision,
// and no event is lost by it.
func TestReload(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := server.Client()
	defer c.Close()
	h := newHost(t, w, server.Addr(), "")
	h.env = []string{"EDR_SENSOR_BUFFER__RETAIN_AGE=1h"} // verifyTail reads all decisions from the buffer
	good, err := os.ReadFile(h.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(h.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.start()
	counted := func(code string) int {
		return len(decisions(t, readStreams(t, c, decisionsKey), decisionsKey, code))
	}
	hangup := func(code string, n int) {
		t.Helper()
		if err := h.proc.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, fmt.Sprintf("%d %s are in Redis", n, code), func() bool { return counted(code) == n })
	}

	done, stop := make(chan int), make(chan struct{})
	go func() {
		n := 0
		for ; ; n += 20 {
			select {
			case <-stop:
				done <- n
				return
			default:
				w.do(order{Op: "exec", From: n, N: 20, PerSec: 50})
			}
		}
	}()

	// With a defect in it nothing of it is applied, and no secret is repeated.
	const secret = "hunter2"
	bad := strings.Replace(string(good), "level: debug}", "level: error}", 1) + "buffer: {cap: 1MiB}\nredis: {password: " + secret + "}\n"
	write(bad)
	hangup("CONFIG_REJECTED", 1)
	out, err := exec.Command(binary(t), "reload", "--config", h.config).CombinedOutput() // as the unit does
	if code := exitCode(err); code != 78 || !strings.Contains(string(out), "buffer.cap") || strings.Contains(string(out), secret) {
		t.Errorf("reload of a bad file: exit code %d, %s", code, out)
	}

	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", w.pid()))
	if err != nil {
		t.Fatal(err)
	}
	better := strings.Replace(string(good), "sensor: {", fmt.Sprintf("sensor: {file: {per_process: 7, exclude_executables: [%q, /no/such/file]}, process_table: 4096, ", exe), 1)
	better = strings.Replace(better, "level: debug}", "level: info, components: {sensor: warn}}", 1)
	write(better + "buffer: {cap: 48MiB}\n")
	hangup("CONFIG_RELOADED", 1)
	eventually(t, 30*time.Second, "the buffer was made smaller", func() bool { return counted("BUFFER_RESIZED") == 1 })
	if st, err := os.Stat(filepath.Join(h.dir, "state", "buffer", "q.db")); err != nil || st.Size() != 48<<20 {
		t.Errorf("%v, %v", st, err)
	}
	dir := t.TempDir()
	close(stop)
	execs := <-done
	w.do(order{Op: "create", Dir: dir, N: 40})

	// The same file again: nothing is left to apply, and what waits is still said.
	out, err = exec.Command(binary(t), "reload", "--config", h.config).CombinedOutput()
	if want := "the configuration is good\n  no effect exclude /no/such/file: no such file or directory\n  waits     sensor.process_table: 65536 → 4096\nTry: systemctl restart edr-sensor\n"; err != nil || string(out) != want {
		t.Errorf("reload: %v, %q; want %q", err, out, want)
	}
	eventually(t, 30*time.Second, "what was left out is reported", func() bool {
		return len(decisions(t, readStreams(t, c, agentsKey), agentsKey, "SUPPRESSED")) > 0
	})
	if code := h.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	recs := readStreams(t, c)
	h.verifyTail(recs, server)
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs are named lost", lost)
	}
	seen := 0
	for _, r := range recs {
		switch {
		case strings.Contains(string(r.data), secret):
			t.Errorf("the secret is in %s", r.data)
		case r.event.Metadata.EventCode == "process.exec" && strings.Contains(r.event.Process.CmdLine, " edr-e2e-"):
			seen++
		case strings.HasPrefix(r.event.Metadata.EventCode, "file.") && strings.HasPrefix(r.event.File.Path, dir):
			t.Errorf("%s of an excluded executable: %s", r.event.Metadata.EventCode, r.event.File.Path)
		}
	}
	if seen != execs {
		t.Errorf("%d of %d execs are in the stream", seen, execs)
	}
	if strings.Contains(h.log.tail(1_000_000), secret) {
		t.Error("the secret is in the log")
	}

	rejected := decisions(t, recs, decisionsKey, "CONFIG_REJECTED")
	for i, by := range []string{"SIGHUP", "control socket"} {
		if len(rejected) != 2 {
			t.Fatalf("rejected %+v, want two", rejected)
		}
		problems, _ := json.Marshal(rejected[i].Unmapped.Sensor["problems"])
		if text := string(problems); rejected[i].Unmapped.Sensor["asked_by"] != by || !strings.Contains(text, h.config+":") || !strings.Contains(text, "buffer.cap") || !strings.Contains(text, "redis") {
			t.Errorf("rejected: %+v", rejected[i])
		}
	}
	codes := []string{}
	for _, d := range decisions(t, recs, decisionsKey, "CONFIG_LOADED", "CONFIG_REJECTED", "CONFIG_RELOADED", "FILTER_CHANGED") {
		codes = append(codes, d.Code)
	}
	if d := gocmp.Diff([]string{"CONFIG_LOADED", "CONFIG_REJECTED", "CONFIG_REJECTED", "CONFIG_RELOADED", "FILTER_CHANGED", "CONFIG_RELOADED"}, codes); d != "" {
		t.Errorf("decisions (-want +got):\n%s", d)
	}
	reloaded := decisions(t, recs, decisionsKey, "CONFIG_RELOADED")[0].Unmapped.Sensor
	applied, _ := json.Marshal(reloaded["applied"])
	if !strings.Contains(string(applied), `"key":"log.level"`) || !strings.Contains(string(applied), `"key":"log.components.sensor"`) {
		t.Errorf("applied %s", applied)
	}
	waits, _ := json.Marshal(reloaded["needs_restart"])
	if !strings.Contains(string(applied), `"key":"sensor.file.per_process"`) || !strings.Contains(string(applied), `"before":"1000"`) || strings.Contains(string(applied), "process_table") ||
		!strings.Contains(string(waits), `"key":"sensor.process_table"`) || reloaded["before"] == reloaded["after"] {
		t.Errorf("reloaded: %v", reloaded)
	}
	loaded := decisions(t, recs, decisionsKey, "CONFIG_LOADED")[0].Unmapped.Sensor
	sources, _ := json.Marshal(loaded["sources"])
	settings, _ := json.Marshal(loaded["settings"])
	if !strings.Contains(string(sources), h.config) || !strings.Contains(string(settings), `"log.level":"debug"`) || strings.Contains(string(settings), "buffer.cap") {
		t.Errorf("loaded: sources %s, settings %s", sources, settings)
	}
}

func exitCode(err error) int {
	if e, ok := err.(*exec.ExitError); ok { //nolint:errorlint // as Run returns it
		return e.ExitCode()
	}
	return 0
}

// verifyTail takes Redis away, starts the sensor again, and wants the decisions that
// had been delivered before from its buffer, unchanged and in the order of seq.
func (h *host) verifyTail(recs []record, server *redistest.Server) {
	h.t.Helper()
	var want []string
	slices.SortFunc(recs, func(a, b record) int { return cmp.Compare(a.seq, b.seq) })
	for _, r := range recs {
		if r.stream != eventsKey {
			want = append(want, string(r.data))
		}
	}
	server.Kill9()
	h.start()
	cmd := exec.Command(binary(h.t), "decisions", "--config", h.config, "--json", "--since", "1h")
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil || !strings.Contains(errs.String(), "what the sensor's buffer still has") {
		h.t.Errorf("decisions without Redis: %v, %s", err, errs.String())
	}
	got := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if d := gocmp.Diff(want, got[:min(len(want), len(got))]); d != "" {
		h.t.Errorf("decisions of the run before (-want +got):\n%s", d)
	}
	h.kill9()
}
