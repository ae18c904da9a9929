// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
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
