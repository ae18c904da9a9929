// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// observer reads a ring as the worker does: ahead, in place, enriched.
type observer struct {
	t    testing.TB
	ring *ring
	wait *waiter
	dec  decoder
	enr  *enrich.Enricher
}

func newObserver(t testing.TB, k *kernel) *observer {
	t.Helper()
	h, err := enrich.LoadHost()
	if err != nil {
		t.Fatal(err)
	}
	o := &observer{t: t, enr: enrich.New(enrich.Options{Host: h, HashWait: patience})}
	t.Cleanup(o.enr.Close)
	if o.ring, err = openRing(k.priority); err != nil {
		t.Fatal(err)
	}
	if o.wait, err = newWaiter(o.ring); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.wait.close(); err != nil {
			t.Error(err)
		}
		if err := o.ring.close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

func (o *observer) understand(rec []byte) *event.Event {
	o.t.Helper()
	ev := new(event.Event)
	if err := o.dec.decode(rec, ev); err != nil {
		o.t.Fatal(err)
	}
	o.enr.Prefetch(ev)
	o.enr.Apply(ev)
	o.enr.EndBatch()
	return ev
}

// until returns the event of a kind about a process whose command is comm.
func (o *observer) until(kind event.Kind, comm string) *event.Event {
	o.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		rec, ok, err := o.ring.next()
		if err != nil {
			o.t.Fatal(err)
		}
		if !ok {
			if err := o.wait.wait(time.Second); err != nil {
				o.t.Fatal(err)
			}
			continue
		}
		if ev := o.understand(rec); ev.Kind == kind && ev.Subject != nil && ev.Subject.Comm == comm {
			return ev
		}
	}
	o.t.Fatalf("no %s of %s", kind, comm)
	return nil
}

// mount mounts until the end of the test.
func mount(t *testing.T, a *actor, dir, kind, data string) error {
	if answer := a.do(request{Op: "shell", Args: []string{`mount -t "$1" -o "$2" none "$3"`, "sh", kind, data, dir}}); answer.Err != "" {
		return errors.New(answer.Err)
	}
	t.Cleanup(func() { a.must(request{Op: "file", Args: []string{"umount", dir}}) })
	return nil
}

// TestRootUnderstand follows one process of a real kernel from the snapshot of its
// parent to its end, on the file systems that programs come from.
func TestRootUnderstand(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	o := newObserver(t, k)
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	if err := k.snapshot(func(rec []byte) error {
		ev := o.understand(rec)
		if ev.Actor.PID != uint32(a.pid) {
			return nil
		}
		seen++
		if s := ev.Subject; s.Path != real(t, binary) || s.CmdLine == "" || len(ev.Exec.Argv) == 0 || s.Partial || s.SHA256 == "" {
			t.Errorf("snapshot of the actor: %+v", s)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if seen != 1 {
		t.Fatalf("the actor was reported %d times", seen)
	}

	for _, tt := range []struct {
		name  string
		mount func(t *testing.T, dir string) error
	}{
		{"file system of TMPDIR", func(*testing.T, string) error { return nil }},
		{"directory of root's", func(t *testing.T, dir string) error {
			a.must(request{Op: "shell", Args: []string{`cp /bin/true "$1/private"; chmod 0711 "$1/private"; chown 0 "$1"; chmod 0700 "$1"`, "sh", dir}})
			t.Cleanup(func() {
				a.must(request{Op: "shell", Args: []string{`rm -rf "$1"/*; chmod 0777 "$1"`, "sh", dir}})
			})
			return nil
		}},
		{"tmpfs", func(t *testing.T, dir string) error { return mount(t, a, dir, "tmpfs", "rw") }},
		{"overlayfs", func(t *testing.T, dir string) error {
			// On a tmpfs of its own: an overlay cannot stand on every file system.
			base := t.TempDir()
			if err := mount(t, a, base, "tmpfs", "rw"); err != nil {
				return err
			}
			layers := []string{filepath.Join(base, "lower"), filepath.Join(base, "upper"), filepath.Join(base, "work")}
			for _, d := range layers {
				if err := os.Mkdir(d, 0o755); err != nil {
					return err
				}
			}
			program(t, layers[0], "below")
			return mount(t, a, dir, "overlay", "lowerdir="+layers[0]+",upperdir="+layers[1]+",workdir="+layers[2])
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := real(t, t.TempDir())
			if err := tt.mount(t, dir); err != nil {
				t.Skip("mount:", err)
			}
			if unix.Access(dir, unix.W_OK) == nil {
				program(t, dir, "above")
			}
			for _, name := range []string{"above", "below", "private"} {
				path := filepath.Join(dir, name)
				content, err := os.ReadFile(path)
				if errors.Is(err, os.ErrNotExist) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				sum := sha256.Sum256(content)
				before := time.Now()
				a.must(request{Op: "run", Path: path, Args: []string{"it's", ""}})
				after := time.Now()
				ev := o.until(event.Exec, name)
				want := []string{path, path, path + ` 'it'\''s' ''`, hex.EncodeToString(sum[:]), "", real(t, binary)}
				got := []string{string(ev.Exec.Filename), ev.Subject.Path, ev.Subject.CmdLine, ev.Subject.SHA256, ev.Subject.HashNote, ev.Exec.OldPath}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", name, diff)
				}
				if at := time.Unix(0, ev.Time); at.Before(before.Add(-time.Millisecond)) || at.After(after.Add(time.Millisecond)) {
					t.Errorf("%s: at %v, not in %v..%v", name, at, before, after)
				}
				if ev.Parent == nil || ev.Parent.Key.PID != uint32(a.pid) || ev.Parent.SHA256 == "" || ev.Subject.CPID == "" || ev.Subject.User == "" {
					t.Errorf("%s: subject %+v, parent %+v", name, ev.Subject, ev.Parent)
				}
				end := o.until(event.Exit, name)
				if end.Subject.Key != ev.Subject.Key || !end.Subject.Exited || end.Subject.Path != path {
					t.Errorf("%s: end of %+v", name, end.Subject)
				}
				o.ring.release(o.ring.position())
			}
		})
	}
}
