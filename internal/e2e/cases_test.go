// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// command runs a subcommand against the host's sensor, as a user, and returns its
// output and exit code.
func (h *host) command(uid uint32, args ...string) (string, int) {
	h.t.Helper()
	cmd := exec.Command(binary(h.t), append(args, "--socket", filepath.Join(h.dir, "control.sock"))...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		h.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (h *host) must(want string, args ...string) {
	h.t.Helper()
	if out, code := h.command(0, args...); code != 0 || !strings.Contains(out, want) {
		h.t.Fatalf("edr-sensor %s: exit code %d, %q, want %q", strings.Join(args, " "), code, out, want)
	}
}

func (r *record) tagged(caseID string) bool {
	return slices.ContainsFunc(r.event.Metadata.Tags, func(t struct{ Name, Value string }) bool { return t.Name == "case_id" && t.Value == caseID })
}

// subject is the process that an event is about.
func (r *record) subject() *process {
	if strings.HasPrefix(r.event.Metadata.EventCode, "process.") {
		return &r.event.Process
	}
	return &r.event.Actor.Process
}

// TestCases opens a case on a subtree while it works, kills the sensor, lets the root
// of the subtree end, and closes the case: every event of the subtree in that time
// carries the ids, and no other event does.
func TestCases(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), fmt.Sprintf("sensor: {scope: \"tree:%d\", file: {per_process: 20}}", w.pid()))
	dir, secret := t.TempDir(), t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	tell := func(name, script string) int {
		t.Helper()
		return w.do(order{Op: "shell", Name: name, Script: script}).PID
	}
	busy := func(stage string) {
		t.Helper()
		for _, name := range []string{"in", "out"} {
			tell(name, fmt.Sprintf(`/bin/true %[1]s-%[2]s; /bin/sh -c '/bin/true %[1]s-%[2]s-below; true'; mkdir %[3]s/%[1]s-%[2]s`, name, stage, dir))
		}
	}
	// The answer to a command comes before its record, which may get its seq after those
	// of events that the worker reads in the same turn.
	decided := func(code string) {
		t.Helper()
		eventually(t, 30*time.Second, "there is a record of "+code, func() bool {
			return slices.ContainsFunc(readStreams(t, server.Client()), func(r record) bool {
				return r.stream == approvalsKey && r.tagged("C-17") && r.event.StatusCode == code
			})
		})
	}
	// Both have a child that is there before the sensor; that of the shell which is
	// to be watched outlives it. It is a writer of its fifo, too: it would take the
	// end of file of one line's writer for the next line.
	in := tell("in", fmt.Sprintf(`(read line; /bin/true in-orphan; read line; /bin/true in-known; read line; /bin/true in-too-late) <>%s >/dev/null 2>&1 &`, fifo))
	tell("out", "sleep 1000 >/dev/null 2>&1 & stranger=$!")
	h.start()
	_, quiet := h.get("/metrics")
	busy("before")
	h.delivered(30 * time.Second) // what has ended is known to have

	h.must("it covers 2 running processes", "case", "open", "--case-id", "C-17", "--investigation-id", "I-4", "--user-id", "mara", "--subtree", fmt.Sprint(in), "--collect", "deep")
	h.must("case C-18 is open on path "+secret, "case", "open", "--case-id", "C-18", "--path", secret, "--ttl", "10m")
	if out, code := h.command(0, "case", "open", "--case-id", "C-17", "--pid", fmt.Sprint(in)); code != 1 || !strings.Contains(out, "is open already") {
		t.Errorf("the same case again: exit code %d, %s", code, out)
	}
	for dir := filepath.Dir(binary(t)); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := h.command(65534, "case", "list"); code != 77 || strings.Contains(out, "C-17") {
		t.Errorf("nobody lists the cases: exit code %d, %s", code, out)
	}
	if _, body := h.get("/status"); strings.Contains(body, "C-17") {
		t.Error("/status over HTTP tells everybody who is investigated")
	}
	decided("CASE_OPENED")
	busy("open")
	tell("in", fmt.Sprintf(`i=0; while [ $i -lt 100 ]; do : >%s/$i; i=$((i+1)); done`, dir))
	tell("out", fmt.Sprintf(`: >%s/file`, secret))
	tell("in", fmt.Sprintf(`: >%s/both`, secret))
	_, page := h.get("/metrics")
	metricstest.Moved(t, metricstest.Parse(quiet), metricstest.Parse(page), "cases_open")
	if !strings.Contains(page, "\ncases_open 2\n") {
		t.Error("cases_open is not 2")
	}

	h.delivered(30 * time.Second)
	h.kill9()
	h.start()
	busy("resumed")
	tell("out", "kill $stranger")
	tell("in", "exit")
	work := func(marker string) {
		t.Helper()
		eventually(t, 30*time.Second, "the orphan reads", func() bool {
			f, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0) // ENXIO while it has not opened it
			if err != nil {
				return false
			}
			_, err = f.WriteString("go\n")
			return errors.Join(err, f.Close()) == nil
		})
		eventually(t, 30*time.Second, "the orphan has done "+marker, func() bool {
			recs := readStreams(t, server.Client())
			i := slices.IndexFunc(recs, func(r record) bool {
				return r.event.Metadata.EventCode == "process.exec" && strings.HasSuffix(r.event.Process.CmdLine, " "+marker)
			})
			return i >= 0 && slices.ContainsFunc(recs, func(r record) bool {
				return r.event.Metadata.EventCode == "process.exit" && r.event.Process.UID == recs[i].event.Process.UID
			})
		})
	}
	work("in-orphan")
	// Nothing on the host shows any more to which subtree the orphan belongs.
	if code := h.stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
	h.start()
	work("in-known")
	if got := h.mustStatus().Cases; len(got) != 2 || got[0].ID != "C-17" || got[0].Tagged == 0 {
		t.Errorf("status: %+v", got)
	}
	h.must("case C-17 is closed", "case", "close", "C-17")
	decided("CASE_CLOSED")
	work("in-too-late")
	h.delivered(30 * time.Second)
	if code := h.stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}

	for _, id := range []string{"C-17", "C-18"} {
		checkCaseLines(t, h.log.all(), map[string]string{"case_id": id})
	}
	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs are named lost, want none", lost)
	}
	checkCase(t, recs, in)
	created := 0
	for _, r := range recs {
		if r.event.Metadata.EventCode == "file.create" && r.tagged("C-17") && filepath.Dir(r.event.File.Path) == dir {
			created++
		}
		if below := strings.HasPrefix(r.event.File.Path, secret+"/"); below != r.tagged("C-18") && strings.HasPrefix(r.event.Metadata.EventCode, "file.") {
			t.Errorf("%s of %s: in C-18 %t", r.event.Metadata.EventCode, r.event.File.Path, !below)
		}
		if r.event.File.Path == secret+"/both" && (!r.tagged("C-17") || r.event.Metadata.Correlation != "I-4") {
			t.Errorf("%s is in both cases: %v %q", r.event.File.Path, r.event.Metadata.Tags, r.event.Metadata.Correlation)
		}
	}
	if created != 100 {
		t.Errorf("%d of 100 files created are there: deep collection has a limit", created)
	}
}

// checkCase holds what carries the ids of C-17 against who descends from its root.
func checkCase(t *testing.T, recs []record, root int) {
	t.Helper()
	slices.SortFunc(recs, func(a, b record) int { return int(int64(a.seq) - int64(b.seq)) })
	var decisions []string
	parents := map[string]string{}
	rootUID := ""
	var opened, closed uint64
	for _, r := range recs {
		ev := r.event
		if r.stream == approvalsKey && r.tagged("C-17") {
			decisions = append(decisions, ev.StatusCode)
			switch ev.StatusCode {
			case "CASE_OPENED":
				opened = r.seq
			case "CASE_CLOSED":
				closed = r.seq
			}
		}
		if p := ev.Process; p.UID != "" {
			if p.Parent != nil && parents[p.UID] == "" {
				parents[p.UID] = p.Parent.UID
			}
			if ev.Metadata.EventCode == "process.fork" {
				parents[p.UID] = ev.Actor.Process.UID
			}
			if p.PID == root {
				rootUID = p.UID
			}
		}
	}
	if want := []string{"CASE_OPENED", "CASE_REJECTED", "CASE_RESUMED", "CASE_RESUMED", "CASE_CLOSED"}; !slices.Equal(decisions, want) {
		t.Errorf("decisions %v, want %v", decisions, want)
	}
	member := func(uid string) bool {
		for range parents {
			if uid == rootUID || uid == "" {
				break
			}
			uid = parents[uid]
		}
		return uid == rootUID && uid != ""
	}
	in, out := 0, 0
	codes := map[string]int{}
	for _, r := range recs {
		ev := r.event
		if strings.HasPrefix(ev.Metadata.EventCode, "sensor.") {
			continue
		}
		want := r.seq > opened && r.seq < closed && (member(r.subject().UID) || ev.Metadata.EventCode == "process.fork" && member(ev.Actor.Process.UID))
		if got := r.tagged("C-17"); got != want {
			t.Errorf("seq %d, %s of %s by %d %q: in the case %t, want %t", r.seq, ev.Metadata.EventCode, ev.File.Path, r.subject().PID, r.subject().CmdLine, got, want)
		}
		if want {
			in++
			codes[ev.Metadata.EventCode]++
		} else {
			out++
		}
	}
	for _, marker := range []string{"in-open", "in-open-below", "in-resumed", "in-resumed-below", "in-orphan", "in-known"} {
		if !slices.ContainsFunc(recs, func(r record) bool {
			return r.tagged("C-17") && r.event.Metadata.EventCode == "process.exec" && strings.HasSuffix(r.event.Process.CmdLine, " "+marker)
		}) {
			t.Errorf("no exec of %s in the case", marker)
		}
	}
	for _, code := range []string{"process.exec", "process.exit", "process.fork", "file.create", "file.mkdir", "process.snapshot"} {
		if codes[code] == 0 {
			t.Errorf("no %s in the case: %v", code, codes)
		}
	}
	t.Logf("%d events in the case, %d outside: %v", in, out, codes)
}
