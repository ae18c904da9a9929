// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// parseEntry reads journald's native format, as journald does.
func parseEntry(b []byte) (fields [][2]string, err error) {
	for len(b) > 0 {
		line, rest, ok := bytes.Cut(b, []byte{'\n'})
		if !ok {
			return nil, fmt.Errorf("no end of line after %q", b)
		}
		if name, value, ok := bytes.Cut(line, []byte{'='}); ok {
			fields = append(fields, [2]string{string(name), string(value)})
			b = rest
			continue
		}
		if len(rest) < 8 {
			return nil, fmt.Errorf("no length after %q", line)
		}
		n := binary.LittleEndian.Uint64(rest)
		rest = rest[8:]
		if n >= uint64(len(rest)) || rest[n] != '\n' {
			return nil, fmt.Errorf("%s: a value of %d bytes does not end there", line, n)
		}
		fields = append(fields, [2]string{string(line), string(rest[:n])})
		b = rest[n+1:]
	}
	return fields, nil
}

func TestJournalEntry(t *testing.T) {
	bound := []zapcore.Field{zap.String(KeyAgentID, "a-1"), zap.String(KeyCaseID, "C-17"), zap.String(KeyComponent, "agent")}
	got, err := parseEntry(appendEntry(nil, zapcore.Entry{Level: zapcore.WarnLevel, Message: "decided"}, "edr-sensor", bound, []zapcore.Field{
		zap.String(KeyCode, "MODE"), zap.String(KeyReason, "two\nlines"), zap.Duration("after", 3*time.Second), zap.Uint64(KeyCount, 1<<63),
		zap.Error(errors.New("dial: refused")), zap.Any("by_kind", map[string]uint64{"process.exec": 3}), zap.Bool("priority", true), zap.Float64("load", 0.5),
		zap.Time("from", time.Unix(0, 0).UTC()), zap.Strings("missing", []string{"a", "b"}),
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := [][2]string{
		{"MESSAGE", `decided code=MODE reason="two\nlines" after=3s count=9223372036854775808 error="dial: refused" priority=true load=0.5 from="1970-01-01 00:00:00 +0000 UTC"`},
		{"PRIORITY", "4"},
		{"SYSLOG_IDENTIFIER", "edr-sensor"},
		{"AGENT_ID", "a-1"},
		{"CASE_ID", "C-17"},
		{"COMPONENT", "agent"},
		{"MESSAGE_ID", MessageID("MODE")},
		{"CODE", "MODE"},
		{"REASON", "two\nlines"},
		{"AFTER", "3s"},
		{"COUNT", "9223372036854775808"},
		{"ERROR", "dial: refused"},
		{"BY_KIND", `{"process.exec":3}`},
		{"EDR_PRIORITY", "true"},
		{"LOAD", "0.5"},
		{"FROM", "1970-01-01T00:00:00Z"},
		{"MISSING", `["a","b"]`},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("entry (-want +got):\n%s", d)
	}
}

// TestMessageIDs pins them: people put them into filters and alerts.
func TestMessageIDs(t *testing.T) {
	for code, want := range map[string]string{
		"START": "a1953443b9c25b6eacf0d610b5b8c6ef",
		"MODE":  "e241540c6d9d5297bdff095ca6e57443",
	} {
		if got := MessageID(code); got != want {
			t.Errorf("MESSAGE_ID of %s is %s, was %s", code, got, want)
		}
	}
}

// FuzzJournalEntry wants every value to come out as it went in, under a name
// that journald accepts, and no value to become a field of its own.
func FuzzJournalEntry(f *testing.F) {
	f.Add("redis is away", "error", "dial: refused\nMESSAGE_ID=0")
	f.Add("x\ny", "", "")
	f.Add("0", "\x00", "0")
	f.Add("", "_pid", "\x00\xff=\n\n")
	f.Add("\x1b[31m", "message", strings.Repeat("é", 300))
	f.Fuzz(func(t *testing.T, msg, key, value string) {
		if key == KeyCode {
			t.Skip("adds a field")
		}
		got, err := parseEntry(appendEntry(nil, zapcore.Entry{Message: msg}, "edr-sensor", nil, []zapcore.Field{zap.String(key, value)}))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 4 || got[3][1] != value {
			t.Fatalf("fields %q", got)
		}
		for _, f := range got {
			if name := f[0]; len(name) == 0 || len(name) > 64 || strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" || name[0] == '_' || name[0] >= '0' && name[0] <= '9' {
				t.Errorf("field name %q", name)
			}
		}
		if strings.ContainsAny(got[0][1], "\n\x1b\x00") {
			t.Errorf("message %q", got[0][1])
		}
	})
}

// journald is the system's own, in a mount name space that ends with it.
type journald struct {
	cmd  *exec.Cmd
	root string
}

func startJournald(t *testing.T) *journald {
	t.Helper()
	const program = "/lib/systemd/systemd-journald"
	require := func(ok bool, missing string) {
		if !ok && os.Getenv("EDR_REQUIRE_ALL") != "" {
			t.Fatalf("EDR_REQUIRE_ALL: %s", missing)
		}
		if !ok {
			t.Skip(missing)
		}
	}
	require(os.Geteuid() == 0, "a mount name space needs root")
	_, err := os.Stat(program)
	require(err == nil, "no "+program+" (Debian package systemd)")
	_, err = exec.LookPath("journalctl")
	require(err == nil, "no journalctl (Debian package systemd)")

	// Without an instance name it would read the kernel's log and audit too.
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "mount -t tmpfs none /run && mount -t tmpfs none /var/log && mkdir -p /run/systemd /var/log/journal && exec "+program+" edrtest")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	j := &journald{cmd, fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("journald: %s", out.String())
		}
	})
	eventually(t, "journald listens", func() bool {
		return (&journalWriter{path: j.socket()}).send([]byte("MESSAGE=are you there\n")) == nil
	})
	return j
}

func (j *journald) socket() string { return j.root + "/run/systemd/journal.edrtest/socket" }

// read returns the entries that match, as journalctl finds them.
func (j *journald) read(t *testing.T, match ...string) (entries []map[string]any) {
	t.Helper()
	dirs, err := filepath.Glob(j.root + "/var/log/journal/*")
	if err != nil || len(dirs) == 0 {
		return nil
	}
	out, err := exec.CommandContext(t.Context(), "journalctl", append([]string{"-D", dirs[0], "-o", "json", "--all", "--no-pager"}, match...)...).Output()
	if err != nil {
		return nil // nothing is there yet
	}
	for line := range bytes.Lines(out) {
		var e map[string]any
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("journalctl: %v: %s", err, line)
		}
		entries = append(entries, e)
	}
	return entries
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

// TestJournald writes to the real one and asks journalctl, as people do.
func TestJournald(t *testing.T) {
	j := startJournald(t)
	var stderr bytes.Buffer
	logs, err := newLog(Options{Format: FormatJournal, Level: "info"}, &stderr, j.socket())
	if err != nil {
		t.Fatal(err)
	}
	ctx := With(logs.Into(t.Context()), zap.String(KeyAgentID, "a-1"), zap.String(KeyComponent, "agent"))
	inCase := With(ctx, zap.String(KeyCaseID, "C-17"), zap.String(KeyInvestigationID, "I-4"))
	From(ctx).Info("started", zap.String(KeyCode, "START"))
	From(inCase).Warn("decided", zap.String(KeyCode, "MODE"), zap.String(KeyReason, "Redis is away\nfor long"))
	From(ctx).Warn("decided", zap.String(KeyCode, "MODE"))
	large := strings.Repeat("x", 3<<20) // no datagram holds that
	From(ctx).Error("large", zap.String("text", large))

	eventually(t, "all four are stored", func() bool { return len(j.read(t, "AGENT_ID=a-1")) == 4 })
	got := j.read(t, "MESSAGE_ID="+MessageID("MODE"), "CASE_ID=C-17")
	if len(got) != 1 {
		t.Fatalf("%d entries with MESSAGE_ID and CASE_ID, want 1: %v", len(got), got)
	}
	for k, want := range map[string]string{
		"MESSAGE": `decided code=MODE reason="Redis is away\nfor long"`, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "edr-sensor", "REASON": "Redis is away\nfor long",
		"INVESTIGATION_ID": "I-4", "COMPONENT": "agent", "_TRANSPORT": "journal", "_PID": fmt.Sprint(os.Getpid()),
	} {
		if got[0][k] != want {
			t.Errorf("%s is %q, want %q", k, got[0][k], want)
		}
	}
	if got := j.read(t, "PRIORITY=3", "AGENT_ID=a-1"); len(got) != 1 || got[0]["TEXT"] != large {
		t.Errorf("the large entry did not arrive whole")
	}
	if stderr.Len() > 0 || logs.Dropped() > 0 {
		t.Errorf("%d dropped, standard error: %s", logs.Dropped(), stderr.String())
	}
}

// TestJournaldStalls stops journald: writing goes on without it, and what it
// never got is counted and said.
func TestJournaldStalls(t *testing.T) {
	j := startJournald(t)
	null, err := os.OpenFile("/dev/full", os.O_WRONLY, 0) // a standard error that takes nothing
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	logs, err := newLog(Options{Format: FormatJournal, Level: "info"}, null, j.socket())
	if err != nil {
		t.Fatal(err)
	}
	log := From(With(logs.Into(t.Context()), zap.String(KeyAgentID, "a-1")))
	if err := j.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	const lines = 2000
	var slowest, sum time.Duration
	for i := range lines {
		start := time.Now()
		log.Info("line", zap.Int("n", i))
		d := time.Since(start)
		slowest, sum = max(slowest, d), sum+d
	}
	t.Logf("with journald stopped a line took %v on average, %v at most; %d of %d were dropped", sum/lines, slowest, logs.Dropped(), lines)
	dropped := logs.Dropped()
	if dropped == 0 || dropped == lines {
		t.Errorf("%d of %d lines dropped", dropped, lines)
	}
	if err := j.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "journald takes lines again", func() bool {
		log.Info("probe")
		return len(j.read(t, "MESSAGE_ID="+MessageID("LOG_DROPPED"))) > 0
	})
	eventually(t, "what was written and what was dropped add up", func() bool {
		log.Info("probe") // the last one before may have been dropped, and nothing told of that yet
		stored, said := 0, uint64(0)
		for _, e := range j.read(t, "MESSAGE_ID="+MessageID("LOG_DROPPED")) {
			n, err := strconv.ParseUint(e["COUNT"].(string), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			said += n
		}
		for _, e := range j.read(t, "AGENT_ID=a-1") {
			if strings.HasPrefix(e["MESSAGE"].(string), "line ") {
				stored++
			}
		}
		return said == logs.Dropped() && uint64(stored)+dropped == lines
	})
}

// TestJournalAway falls back to standard error, and to the journal again.
func TestJournalAway(t *testing.T) {
	var stderr bytes.Buffer
	path := filepath.Join(t.TempDir(), "socket")
	logs, err := newLog(Options{Format: FormatJournal, Level: "info"}, &stderr, path)
	if err != nil {
		t.Fatal(err)
	}
	log := From(With(logs.Into(t.Context()), zap.String(KeyAgentID, "a-1")))
	log.Info("nobody there", zap.Int("n", 1))
	if got := stderr.String(); !strings.Contains(got, `"msg":"nobody there","agent_id":"a-1","n":1}`) {
		t.Errorf("standard error: %s", got)
	}
	receive := func(text string) {
		t.Helper()
		_ = os.Remove(path)
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(fd)
		if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		log.Info(text)
		b := make([]byte, 4096)
		n, err := syscall.Read(fd, b)
		if err != nil || !bytes.HasPrefix(b[:n], []byte("MESSAGE="+text+"\n")) {
			t.Errorf("the journal got %q, %v", b[:max(n, 0)], err)
		}
	}
	receive("first")
	receive("another one") // the socket before is dead
	if logs.Dropped() > 0 {
		t.Errorf("%d dropped", logs.Dropped())
	}
}

// TestJournalIsChosen by JOURNAL_STREAM, as under systemd; what does not reach the
// journal keeps its priority on standard error.
func TestJournalIsChosen(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	logs, err := newLog(Options{Format: FormatAuto, Level: "info"}, f, filepath.Join(t.TempDir(), "no journal"))
	if err != nil {
		t.Fatal(err)
	}
	if l, ok := logs.logger.Core().(*filter); !ok {
		t.Fatalf("the outermost core is %T", logs.logger.Core())
	} else if _, ok := l.Core.(*journalCore); !ok {
		t.Errorf("lines go to %T", l.Core)
	}
	From(logs.Into(t.Context())).Warn("hello")
	b, err := os.ReadFile(f.Name())
	if err != nil || !bytes.HasPrefix(b, []byte(`<4>{"level":"warn"`)) {
		t.Errorf("standard error has %q, %v", b, err)
	}
}
