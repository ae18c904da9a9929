// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
	"github.com/aurorasoc/edr-sensor/transport"
)

// TestLineage starts one installation again and again: as it was, after what makes a
// copy of it, and with a file that says nothing.
func TestLineage(t *testing.T) {
	root, state := t.TempDir(), t.TempDir()
	identify := func(id string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "etc/machine-id"), []byte(id), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(configured string) *Agent {
		t.Helper()
		a := &Agent{tap: &tap{}}
		a.cfg.Agent.StateDir, a.cfg.Agent.ID = state, configured
		id, err := agentID(configured, state)
		if err != nil {
			t.Fatal(err)
		}
		a.identity.ID = id
		if a.queue, err = buffer.Open(t.Context(), buffer.Options{Dir: a.bufferDir(), Cap: 16 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := a.settle(t.Context(), root); err != nil {
			t.Fatal(err)
		}
		return a
	}
	end := func(a *Agent) place {
		t.Helper()
		if err := a.queue.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
		return *a.place.Load()
	}
	identify("one")
	a := open("")
	s := newSink(a.queue, a.tap, ocsf.New(event.Host{}, a.identity), &a.place)
	for range 3 {
		if err := s.End(append(s.Begin(), "{}"...), false, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := a.remember([]string{"p1"}); err != nil {
		t.Fatal(err)
	}
	first := end(a)

	a = open("")
	if !slices.Equal(a.lineage.Processes, []string{"p1"}) || a.moved != nil {
		t.Errorf("as it was: %+v, moved %v", a.lineage, a.moved)
	}
	if p := end(a); p != first {
		t.Errorf("as it was: %v, want %v", p, first)
	}

	identify("two") // cloned
	a = open("")
	cloned := end(a)
	if a.moved == nil || a.moved.Code != "IDENTITY_NEW" || a.moved.Count != 3 || a.moved.Before != first.agent || a.moved.After != cloned.agent {
		t.Errorf("cloned: %+v", a.moved)
	}
	if cloned.agent == first.agent || cloned.epoch <= first.epoch || a.identity.ID != cloned.agent {
		t.Errorf("cloned: %v, was %v", cloned, first)
	}
	if id, err := agentID("", state); err != nil || id != cloned.agent {
		t.Errorf("the next start has id %s, %v", id, err)
	}
	a = open("")
	if p := end(a); p != cloned || a.moved != nil {
		t.Errorf("a copy that has moved: %v, want %v", p, cloned)
	}

	identify("three") // the operator's id is the operator's
	a = open("configured")
	named := end(a)
	if named.agent != "configured" || named.epoch <= cloned.epoch || a.moved == nil {
		t.Errorf("configured: %v, was %v", named, cloned)
	}

	// The buffer is restored from a copy.
	dir := filepath.Join(state, "buffer")
	if err := os.CopyFS(dir+".copy", os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir+".copy", dir); err != nil {
		t.Fatal(err)
	}
	a = open("configured")
	restored := end(a)
	if restored.agent != "configured" || restored.epoch <= named.epoch || a.moved == nil || !strings.Contains(a.moved.Message, "restored") {
		t.Errorf("restored: %v, was %v: %+v", restored, named, a.moved)
	}

	if err := os.WriteFile(lineageFile(state), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	a = open("configured")
	if p := end(a); p != restored || a.moved != nil {
		t.Errorf("with a file that says nothing: %v, want %v", p, restored)
	}
}

// full mounts a file system for a state directory. The result takes all of its space.
func full(t *testing.T) (dir string, fill func()) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("edr-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skip("mount:", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir, func() {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatal("not full:", err)
		}
	}
}

// TestFullDiskStartsAgain: what settle cannot write keeps the sensor from nothing, and
// what it did not write down it finds out again.
func TestFullDiskStartsAgain(t *testing.T) {
	root := t.TempDir()
	machine := func(id string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "etc"), 0o755), os.WriteFile(filepath.Join(root, "etc/machine-id"), []byte(id), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	state, fill := full(t)
	queue, err := buffer.Open(t.Context(), buffer.Options{Dir: filepath.Join(t.TempDir(), "buffer"), Cap: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer queue.Close(context.Background())
	start := func() (*Agent, *observer.ObservedLogs) {
		t.Helper()
		a := &Agent{queue: queue}
		a.cfg.Agent.StateDir = state
		var err error
		if a.identity.ID, err = agentID("", state); err != nil {
			t.Fatal(err)
		}
		core, logs := observer.New(zap.ErrorLevel)
		if err := a.settle(logging.Into(t.Context(), zap.New(core)), root); err != nil {
			t.Fatal(err)
		}
		return a, logs
	}
	machine("one")
	start()
	fill()
	if a, logs := start(); a.moved != nil || logs.Len() > 0 {
		t.Errorf("as it was: moved %v, %v", a.moved, logs.All())
	}
	machine("two")
	first, logs := start()
	if first.moved == nil || logs.FilterMessageSnippet("is not kept").Len() != 1 {
		t.Errorf("cloned: moved %v, %v", first.moved, logs.All())
	}
	if err := os.Remove(filepath.Join(state, "ballast")); err != nil {
		t.Fatal(err)
	}
	if a, logs := start(); a.moved == nil || a.identity.ID == first.identity.ID || logs.Len() > 0 {
		t.Errorf("with room: moved %v, %v", a.moved, logs.All())
	}
	if a, _ := start(); a.moved != nil {
		t.Errorf("at last: moved %v", a.moved)
	}
}

// runs runs a to its end, which the result asks for. What it logs is in logs.
func runs(t *testing.T, cfg config.Config) (a *Agent, view *viewer, logs *observer.ObservedLogs, end func()) {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	ctx, cancel := context.WithCancel(logging.Into(t.Context(), zap.New(core)))
	a, err := New(ctx, Options{Loaded: Loaded{Config: cfg}, Version: "test"})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	view = a.tap.open(false)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	return a, view, logs, func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestLinesOfACloneHaveItsID: also those of the sender, which was made by the start.
func TestLinesOfACloneHaveItsID(t *testing.T) {
	cfg := onlyThis(t, os.Getpid())
	cfg.Transport.Address, cfg.Transport.TLS = "127.0.0.1:1", config.TLS{Enabled: true, CAFile: "/no/such/file"}
	if err := errors.Join(
		os.MkdirAll(cfg.Agent.StateDir, 0o700),
		os.WriteFile(filepath.Join(cfg.Agent.StateDir, "agent_id"), []byte("original\n"), 0o600),
		lineage{Machine: "another"}.save(cfg.Agent.StateDir),
	); err != nil {
		t.Fatal(err)
	}
	a, view, logs, end := runs(t, cfg)
	decided(t, view, "DELIVERY_HELD")
	end()
	id := a.place.Load().agent
	lines := logs.FilterField(zap.String(logging.KeyCode, "DELIVERY_HELD"))
	if lines.Len() == 0 || id == "original" || lines.FilterField(zap.String(logging.KeyAgentID, id)).Len() != lines.Len() {
		t.Errorf("agent %s: %v", id, lines.All())
	}
}

// TestRunIsSummedUpOverEpochs: a run whose buffer goes on in a new epoch has seen no fewer
// records for that.
func TestRunIsSummedUpOverEpochs(t *testing.T) {
	cfg := onlyThis(t, os.Getpid())
	stopped := func(logs *observer.ObservedLogs, what string) uint64 {
		return logs.FilterField(zap.String(logging.KeyCode, "STOPPED")).All()[0].ContextMap()[what].(uint64)
	}
	_, _, logs, end := runs(t, cfg)
	end()
	before := stopped(logs, "kept")
	a, _, logs, end := runs(t, cfg)
	for limit := time.Now().Add(time.Minute); a.queue.Stats().Last <= before; pass(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("nothing was written")
		}
	}
	a.queue.Ack(before + 1)
	if _, err := a.renew(t.Context(), transport.Fencing{Cause: "because"}); err != nil {
		t.Fatal(err)
	}
	end()
	seen, sent, kept := stopped(logs, "seen"), stopped(logs, "sent"), stopped(logs, "kept")
	if before == 0 || seen == 0 || before+seen != sent+kept || sent != before+1 {
		t.Errorf("%d before, %d seen, %d sent, %d kept", before, seen, sent, kept)
	}
}

// TestMoveWhileRunning: after a fencing the worker goes on in the new place, and status
// says it.
func TestMoveWhileRunning(t *testing.T) {
	a := &Agent{tap: &tap{}}
	a.cfg.Agent.StateDir = t.TempDir()
	a.identity.ID = "old"
	var err error
	if a.queue, err = buffer.Open(t.Context(), buffer.Options{Dir: a.bufferDir(), Cap: 16 << 20}); err != nil {
		t.Fatal(err)
	}
	defer a.queue.Close(context.Background())
	if err := a.settle(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	encoder := ocsf.New(event.Host{}, a.identity)
	encoder.Bind(a.queue.Epoch())
	s := newSink(a.queue, a.tap, encoder, &a.place)
	write := func() (uid, agent string, seq uint64) {
		t.Helper()
		rec := encoder.Append(s.Begin(), s.Next(), 0, &event.Event{Kind: event.Lifecycle, Self: &event.SelfInfo{Name: "x"}})
		var e struct {
			Metadata struct {
				UID      string
				Sequence uint64
				Product  any
			}
		}
		if err := json.Unmarshal(rec, &e); err != nil {
			t.Fatal(err)
		}
		text := string(rec)
		if err := s.End(rec, false, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Flush(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		return e.Metadata.UID, text, e.Metadata.Sequence
	}
	for range 3 {
		write()
	}
	if err := a.queue.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.queue.Ack(2)
	i, err := a.move(t.Context(), "fffff0c0ffee0badf00d", true, "because")
	if err != nil || i.Count != 1 {
		t.Fatal(i, err)
	}
	p := a.place.Load()
	if p.agent == "old" || p.epoch <= "fffff0c0ffee0badf00d" {
		t.Errorf("moved to %v", p)
	}
	write() // still says the old place: it was begun before
	_, text, seq := write()
	if seq != 3 || !strings.Contains(text, p.agent) || strings.Contains(text, `"old"`) {
		t.Errorf("seq %d of %s", seq, text)
	}
	if got := a.queue.Next(); got != 4 {
		t.Errorf("next %d", got)
	}
}
