// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

func jsonLogger(t *testing.T, level string) (context.Context, *Levels, func() []map[string]any) {
	t.Helper()
	var out bytes.Buffer
	l, err := New(Options{Format: FormatAuto, Level: level}, &out)
	if err != nil {
		t.Fatal(err)
	}
	return l.Into(t.Context()), l.Levels, func() []map[string]any {
		t.Helper()
		var lines []map[string]any
		for line := range strings.Lines(out.String()) {
			// A decoder of maps would hide a key that stands twice.
			if n := strings.Count(line, `"`+KeyCaseID+`"`); n > 1 {
				t.Errorf("%d times %s in %s", n, KeyCaseID, line)
			}
			m := map[string]any{}
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatalf("line %q: %v", line, err)
			}
			if _, err := time.Parse(time.RFC3339Nano, m["time"].(string)); err != nil {
				t.Errorf("time: %v", err)
			}
			delete(m, "time")
			lines = append(lines, m)
		}
		return lines
	}
}

func TestChildrenInheritKeys(t *testing.T) {
	ctx, _, lines := jsonLogger(t, "info")
	agent := With(ctx, zap.String(KeyAgentID, "a-1"), zap.String(KeyComponent, "agent"))
	inCase := With(agent, zap.String(KeyCaseID, "c-1"), zap.String(KeyInvestigationID, "i-1"))
	other := With(inCase, zap.String(KeyCaseID, "c-2"), zap.String(KeyComponent, "sensor"))

	var wg sync.WaitGroup
	child, cancel := context.WithCancel(other)
	defer cancel()
	wg.Go(func() { From(child).Info("from a goroutine") })
	wg.Wait()
	From(inCase).Warn("in the case", zap.Uint64(KeySeq, 7))
	From(agent).Info("outside")

	want := []map[string]any{
		{"level": "info", "msg": "from a goroutine", "agent_id": "a-1", "component": "sensor", "case_id": "c-2", "investigation_id": "i-1"},
		{"level": "warn", "msg": "in the case", "agent_id": "a-1", "component": "agent", "case_id": "c-1", "investigation_id": "i-1", "seq": 7.0},
		{"level": "info", "msg": "outside", "agent_id": "a-1", "component": "agent"},
	}
	if d := cmp.Diff(want, lines()); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestLevelChangesAtRunTime(t *testing.T) {
	ctx, levels, lines := jsonLogger(t, "warn")
	sensor, transport := From(With(ctx, zap.String(KeyComponent, "sensor"))), From(With(ctx, zap.String(KeyComponent, "transport")))
	say := func(what string) {
		From(ctx).Info(what + ", of no component")
		sensor.Info(what)
		transport.Info(what)
	}
	must := func(c Change, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	say("hidden")
	must(levels.Override("sensor", "debug", 0, nil))
	say("sensor")
	must(levels.Override("", "info", 0, nil))
	must(levels.Override("sensor", "error", 0, nil))
	say("all but sensor")
	must(levels.Reset("sensor"))
	say("all")
	must(levels.Reset(""))
	say("hidden again")
	if err := levels.Configure("error", map[string]string{"transport": "info", "sensor": ""}); err != nil {
		t.Fatal(err)
	}
	say("transport as configured")

	var got []string
	for _, l := range lines() {
		c, _ := l["component"].(string)
		got = append(got, c+": "+l["msg"].(string))
	}
	want := []string{
		"sensor: sensor",
		": all but sensor, of no component", "transport: all but sensor",
		": all, of no component", "sensor: all", "transport: all",
		"transport: transport as configured",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

// TestOverrideEnds lets the time of a level pass, and of one that was replaced.
func TestOverrideEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, levels, _ := jsonLogger(t, "info")
		ended := make(chan Change, 8)
		set := func(component, level string, lasts time.Duration) Change {
			t.Helper()
			c, err := levels.Override(component, level, lasts, func(c Change) { ended <- c })
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		set("sensor", "debug", time.Minute)
		c := set("sensor", "error", 10*time.Minute) // the minute counts no more
		if c.Before != "debug" || c.After != "error" || time.Until(c.Until) != 10*time.Minute {
			t.Errorf("change %+v", c)
		}
		set("transport", "debug", time.Hour)
		time.Sleep(9 * time.Minute) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if len(ended) > 0 {
			t.Errorf("ended early: %+v", <-ended)
		}
		until := c.Until
		want := []Level{
			{"", "info", "info", nil},
			{"agent", "info", "info", nil},
			{"sensor", "error", "info", &until},
			{"transport", "debug", "info", levels.List()[3].Until},
		}
		if d := cmp.Diff(want, levels.List()); d != "" {
			t.Errorf("levels (-want +got):\n%s", d)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if d := cmp.Diff(Change{Component: "sensor", Before: "error", After: "info"}, <-ended); d != "" {
			t.Errorf("end (-want +got):\n%s", d)
		}
		if _, err := levels.Reset(""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if len(ended) > 0 {
			t.Errorf("ended after a reset: %+v", <-ended)
		}
	})
}

func TestLevelsRefuse(t *testing.T) {
	_, levels, _ := jsonLogger(t, "info")
	for _, c := range []struct {
		err  func() error
		want string
	}{
		{func() error { _, err := levels.Override("worker", "info", 0, nil); return err }, `log component "worker": must be one of agent, sensor, transport`},
		{func() error { _, err := levels.Override("", "trace", 0, nil); return err }, `log level "trace": must be one of debug, info, warn, error`},
		{func() error { _, err := levels.Reset("x"); return err }, `log component "x": must be one of agent, sensor, transport`},
		{func() error { return levels.Configure("info", map[string]string{"sensor": "x"}) }, `component sensor: log level "x": must be one of debug, info, warn, error`},
	} {
		if err := c.err(); err == nil || err.Error() != c.want {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
}

// TestUnboundIsVisible runs itself with another standard error, because that is
// where an unbound line goes.
func TestUnboundIsVisible(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stderr")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func(old *os.File) { os.Stderr = old }(os.Stderr)
	os.Stderr = f
	From(t.Context()).Info("lost")
	From(With(t.Context(), zap.String(KeyComponent, "x"))).Info("still lost")

	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(text) != 2 {
		t.Fatalf("lines: %q", text)
	}
	for _, line := range text {
		if !strings.Contains(line, `"logger":"unbound"`) || !strings.Contains(line, `"unbound":true`) {
			t.Errorf("nothing says that this is unbound: %s", line)
		}
	}
	if !strings.Contains(text[1], `"component":"x"`) {
		t.Errorf("lost its field: %s", text[1])
	}
}

func TestJournalPrefix(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, env string
		want      []string
	}{
		{"ours", fmt.Sprintf("%d:%d", st.Dev, st.Ino), []string{"<7>{", "<6>{", "<4>{", "<3>{"}},
		{"somebody else's", "1:1", []string{"{", "{", "{", "{"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", c.env)
			if err := f.Truncate(0); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Seek(0, 0); err != nil {
				t.Fatal(err)
			}
			logs, err := New(Options{Format: FormatJSON, Level: "debug"}, f)
			if err != nil {
				t.Fatal(err)
			}
			l := logs.logger.With(zap.String("k", "v"))
			l.Debug("d")
			l.Info("two\nlines")
			l.Warn("w")
			l.Error("e")
			b, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for line := range strings.Lines(string(b)) {
				got = append(got, line[:strings.Index(line, "{")+1])
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("prefixes (-want +got):\n%s", d)
			}
		})
	}
}

func TestConsole(t *testing.T) {
	var out bytes.Buffer
	logs, err := New(Options{Format: FormatConsole, Level: "info"}, &out)
	if err != nil {
		t.Fatal(err)
	}
	l := logs.logger
	l.Info("plain")
	l = l.With(zap.String(KeyAgentID, "a-1"))
	l.Warn("redis is away", zap.Error(errors.New("dial: refused")), zap.Duration("after", 3*time.Second), zap.String("x", ""))
	l.Named("part").Error("two\nlines")
	l.Info("\x1b[2Jclear, café")
	l.Debug("hidden")

	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, line[len("15:04:05.000 "):])
	}
	want := []string{
		"INFO  plain\n",
		`WARN  redis is away                        error="dial: refused" after=3s x="" agent_id=a-1` + "\n",
		`ERROR part: two\nlines                     agent_id=a-1` + "\n",
		`INFO  \x1b[2Jclear, café                   agent_id=a-1` + "\n",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}

	c := console{colour: true}
	var b bytes.Buffer
	c.paint(&b, red, "x")
	if got := b.String(); got != "\x1b[31mx\x1b[0m" {
		t.Errorf("painted %q", got)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []struct{ format, level, want string }{
		{"xml", "info", `log format "xml": must be one of auto, console, json, journal`},
		{"json", "loud", `log level "loud": must be one of debug, info, warn, error`},
	} {
		if _, err := New(Options{Format: Format(c.format), Level: c.level}, &bytes.Buffer{}); err == nil || err.Error() != c.want {
			t.Errorf("New(%q, %q): %v, want %s", c.format, c.level, err, c.want)
		}
	}
}

func TestLimiterCountsWhatItSuppresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, _, lines := jsonLogger(t, "info")
		l := NewLimiter(10 * time.Second)
		for range 25 { // one line at 0 s, 10 s and 20 s
			l.Log(ctx, zapcore.WarnLevel, "refused", "redis is away", zap.Int("n", 1))
			time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
		}
		l.Log(ctx, zapcore.WarnLevel, "oom", "redis is full")
		if n := l.Forget("refused"); n != 4 {
			t.Errorf("forgot %d, want 4", n)
		}
		l.Log(ctx, zapcore.WarnLevel, "refused", "redis is away again")

		want := []map[string]any{
			{"level": "warn", "msg": "redis is away", "n": 1.0},
			{"level": "warn", "msg": "redis is away", "n": 1.0, "suppressed": 9.0},
			{"level": "warn", "msg": "redis is away", "n": 1.0, "suppressed": 9.0},
			{"level": "warn", "msg": "redis is full"},
			{"level": "warn", "msg": "redis is away again"},
		}
		if d := cmp.Diff(want, lines()); d != "" {
			t.Errorf("lines (-want +got):\n%s", d)
		}
	})
}

// TestLimiterSettles says what was suppressed even when no further line comes.
func TestLimiterSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, _, lines := jsonLogger(t, "info")
		l := NewLimiter(10 * time.Second)
		for i := range 5 {
			l.Log(ctx, zapcore.ErrorLevel, "decode", "decode record", zap.Int("n", i))
		}
		l.Log(ctx, zapcore.WarnLevel, "once", "once")
		l.Settle()                   // too early
		time.Sleep(10 * time.Second) //nolint:forbidigo // the bubble's clock
		l.Settle()
		l.Settle() // said already
		l.Log(ctx, zapcore.ErrorLevel, "decode", "decode record", zap.Int("n", 5))
		l.Flush()
		l.Flush()
		want := []map[string]any{
			{"level": "error", "msg": "decode record", "n": 0.0},
			{"level": "warn", "msg": "once"},
			{"level": "error", "msg": "decode record", "n": 4.0, "suppressed": 3.0},
			{"level": "error", "msg": "decode record", "n": 5.0},
		}
		if d := cmp.Diff(want, lines()); d != "" {
			t.Errorf("lines (-want +got):\n%s", d)
		}
		if len(l.keys) > 1 {
			t.Errorf("%d keys are kept, though nothing is suppressed", len(l.keys))
		}
	})
}

func TestLimiterIsBounded(t *testing.T) {
	l := NewLimiter(time.Hour)
	for i := range 10 * maxLimiterKeys {
		l.Allow(fmt.Sprint(i))
	}
	if n := len(l.keys); n > maxLimiterKeys+1 {
		t.Errorf("%d keys", n)
	}
}

// BenchmarkDisabledDebug is what a debug line costs that nobody wants.
func BenchmarkDisabledDebug(b *testing.B) {
	logs, err := New(Options{Format: FormatJSON, Level: "info"}, &bytes.Buffer{})
	if err != nil {
		b.Fatal(err)
	}
	ctx := With(logs.Into(b.Context()), zap.String(KeyAgentID, "a-1"), zap.String(KeyComponent, "sensor"))
	b.Run("from context", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if l := From(ctx).Check(zapcore.DebugLevel, "batch"); l != nil {
				l.Write(zap.Int(KeyCount, 1))
			}
		}
	})
	log := From(ctx)
	b.Run("logger at hand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if l := log.Check(zapcore.DebugLevel, "batch"); l != nil {
				l.Write(zap.Int(KeyCount, 1))
			}
		}
	})
}
