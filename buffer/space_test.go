// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
)

// eachFileSystem runs fn on every file system that the buffer may meet, with room for
// its file twice over.
func eachFileSystem(t *testing.T, fn func(t *testing.T, dir string)) {
	for name, mounted := range map[string]func(t *testing.T) string{
		"tmpfs": func(t *testing.T) string { return mount(t, "-t", "tmpfs", "-o", "size=6m", "tmpfs") },
		"ext4":  func(t *testing.T) string { return mountImage(t, 16*mib, "mkfs.ext4") },
		"xfs":   func(t *testing.T) string { return mountImage(t, 320*mib, "mkfs.xfs") }, // it cannot be smaller
	} {
		t.Run(name, func(t *testing.T) { fn(t, mounted(t)) })
	}
}

// exhaust takes all the space that there is in dir, to the last block; release gives it
// back.
func exhaust(t *testing.T, dir string) (release func()) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	at := st.Size()
	for turn := 0; err == nil && turn < 100; turn++ { // what was removed before may still come back
		for size := int64(256 * mib); size >= pageSize; {
			if err := unix.Fallocate(int(f.Fd()), 0, at, size); err != nil {
				size /= 2
				continue
			}
			at += size
		}
		// What an allocation with metadata of its own could not have, a short write may.
		for n := 0; err == nil && n < 1000; n++ {
			_, err = f.Write(make([]byte, 512))
			at += 512
		}
	}
	if !noSpace(err) {
		t.Fatalf("not full: %v", err)
	}
	return func() {
		if err := os.Remove(f.Name()); err != nil {
			t.Fatal(err)
		}
		// XFS gives it back in the background.
		for free := int64(0); free < mib; {
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				t.Fatal(err)
			}
			if free = int64(fs.Bavail) * fs.Bsize; free < mib {
				<-time.After(time.Millisecond)
			}
		}
	}
}

// TestFullFileSystem: with its space set aside the buffer does not notice that there is
// none left, whatever it does; without room for its file it says so, and starts once
// there is.
func TestFullFileSystem(t *testing.T) {
	eachFileSystem(t, func(t *testing.T, dir string) {
		o := small(filepath.Join(dir, "buffer"))
		if err := os.Mkdir(o.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		release := exhaust(t, dir)
		_, err := Open(t.Context(), o)
		if !errors.Is(err, unix.ENOSPC) && (err == nil || !strings.Contains(err.Error(), "make room")) {
			t.Fatalf("open without space: %v", err)
		}
		t.Logf("without space: %v", err)
		if left, _ := filepath.Glob(filepath.Join(o.Dir, "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		release()
		s := &sim{t: t, led: newLedger(), model: new(model), rng: rand.New(rand.NewPCG(3, 3)), gone: map[uint64]bool{}}
		s.q = open(t, o)
		release = exhaust(t, dir)
		defer release()
		commits := 0.0
		for life := range 3 {
			for range 300 {
				s.produce(10, 2000, false)
				s.must(s.q.Flush(t.Context()))
			}
			// Some of it is delivered, and some of that the reply was lost of.
			s.connect()
			s.deliver(200, 1<<20, life%2*2)
			if st := s.q.Stats(); st.Err != nil || st.Truncated == 0 || testError(s.q, opCommit)+testError(s.q, opNote) != 0 {
				t.Errorf("on a full file system: %+v", st)
			}
			commits += testutil.ToFloat64(s.q.metrics.commits)
			closeQueue(t, s.q)
			s.q = open(t, o)
			if r := s.q.Stats().Recovery; r != nil {
				t.Errorf("set aside: %v", r.Cause)
			}
		}
		for range 30 {
			s.settle()
		}
		s.must(errors.Join(s.verify(), s.model.whole(s.q, s.led)))
		t.Logf("%v commits, all at once, %d records, %d truncated", commits, s.q.Stats().Last, s.q.Stats().Truncated)
	})
}

// TestSpaceRunsOutMidway: a file with holes, as a copy may have left it, needs space
// when there is none. Commits then fail, and say so; once there is space again they go
// on where they were, and nothing is lost but by the size of the file.
func TestSpaceRunsOutMidway(t *testing.T) {
	eachFileSystem(t, func(t *testing.T, dir string) {
		o := small(filepath.Join(dir, "buffer"))
		s := &sim{t: t, led: newLedger(), model: new(model), rng: rand.New(rand.NewPCG(3, 3)), gone: map[uint64]bool{}}
		s.q = open(t, o)
		s.produce(10, 2000, false)
		s.must(s.q.Flush(t.Context()))
		f, err := os.OpenFile(s.q.path, os.O_RDWR, 0)
		s.must(err)
		m, err := preflight(f, o.Cap, 0)
		s.must(err)
		used := int64(m.pages) * pageSize
		s.must(errors.Join(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, used, o.Cap-used), f.Close()))
		for range 2 {
			release := exhaust(t, dir)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for range 60 {
					s.produce(10, 2000, false)
				}
				s.must(s.q.Flush(t.Context()))
			}()
			var failed error
			for failed == nil {
				select {
				case <-done:
					t.Fatal("a full file system stopped no commit")
				case <-time.After(time.Millisecond):
					failed = s.q.Stats().Err
				}
			}
			st := s.q.Stats()
			if !errors.Is(failed, unix.ENOSPC) || invariant(st) != nil {
				t.Errorf("%v: %+v", failed, st)
			}
			// What is durable can be had meanwhile.
			if recs, err := s.q.Read(t.Context(), 0, nil, 10, 1<<20); err != nil || len(recs) == 0 {
				t.Errorf("%d records, %v", len(recs), err)
			}
			release()
			<-done
			if st := s.q.Stats(); st.Err != nil || st.Recovery != nil || testError(s.q, opCommit) == 0 {
				t.Errorf("with space again: %+v", st)
			}
		}
		for range 20 {
			s.settle()
		}
		s.must(errors.Join(s.verify(), s.model.whole(s.q, s.led)))
		closeQueue(t, s.q)
		check(t, s.q.path)
		t.Logf("%v failed commits, %d records, %d truncated", testError(s.q, opCommit), s.q.Stats().Last, s.q.Stats().Truncated)
	})
}

// TestNoSpaceForASecondFile: what needs one, with none left. It fails and says so, or
// does without; with space again it is done, and each record is accounted for.
func TestNoSpaceForASecondFile(t *testing.T) {
	fillUp := func(t *testing.T, dir string) *sim {
		s := &sim{t: t, led: newLedger(), model: new(model), rng: rand.New(rand.NewPCG(6, 6)), gone: map[uint64]bool{}}
		o := small(filepath.Join(dir, "buffer"))
		o.RetainBytes = 256 * kib
		s.q = open(t, o)
		for range 200 {
			s.produce(8, 2000, false)
			s.must(s.q.Flush(t.Context()))
		}
		s.connect()
		s.deliver(100, 1<<20, 0)
		return s
	}
	account := func(t *testing.T, s *sim) {
		t.Helper()
		for range 30 {
			s.settle()
		}
		s.must(errors.Join(s.verify(), s.model.whole(s.q, s.led)))
		st := s.q.Stats()
		closeQueue(t, s.q)
		check(t, s.q.path)
		t.Logf("%d records: %d truncated, %d corrupt, %d reclaimed, %d salvaged", st.Last, st.Truncated, st.Corrupt, st.Reclaimed, st.Salvaged)
	}
	t.Run("salvage at the start", func(t *testing.T) {
		eachFileSystem(t, func(t *testing.T, dir string) {
			s := fillUp(t, dir)
			o := s.q.o
			s.must(s.q.Flush(t.Context()))
			closeQueue(t, s.q)
			data := read(t, s.q.path)
			m, err := preflight(bytes.NewReader(data), int64(len(data)), 0)
			s.must(err)
			clear(data[m.root*pageSize:][:pageSize])
			plant(t, o.Dir, data)
			before, err := filepath.Glob(filepath.Join(o.Dir, "*"))
			s.must(err)
			release := exhaust(t, dir)
			q, err := Open(t.Context(), o)
			if err == nil {
				t.Logf("salvaged without: %+v", q.Stats().Recovery)
				s.q = q
				t.Cleanup(func() { closeQueue(t, q) })
				release()
			} else {
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
				t.Logf("without space: %v", err)
				after, err := filepath.Glob(filepath.Join(o.Dir, "*"))
				s.must(err)
				if strings.Join(before, " ") != strings.Join(after, " ") || !bytes.Equal(data, read(t, s.q.path)) {
					t.Errorf("not left as it was: %v, was %v", after, before)
				}
				release()
				s.q = open(t, o)
			}
			if r := s.q.Stats().Recovery; r == nil || !r.Exact || r.Lost != 0 {
				t.Fatalf("%+v", r)
			}
			account(t, s)
		})
	})
	t.Run("cut in use", func(t *testing.T) {
		eachFileSystem(t, func(t *testing.T, dir string) {
			s := fillUp(t, dir)
			s.must(s.q.Flush(t.Context()))
			s.must(os.Truncate(s.q.path, 300*kib))
			release := exhaust(t, dir)
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.produce(10, 2000, false)
				s.must(s.q.Flush(t.Context()))
			}()
			for !noSpace(s.q.Stats().Err) {
				select {
				case <-done:
					t.Fatal("a file was made without space")
				case <-time.After(time.Millisecond):
				}
			}
			release()
			<-done
			if r := s.q.Stats().Recovery; r == nil || !r.Exact || r.Lost == 0 {
				t.Fatalf("%+v", r)
			}
			account(t, s)
		})
	})
	t.Run("resize", func(t *testing.T) {
		eachFileSystem(t, func(t *testing.T, dir string) {
			s := fillUp(t, dir)
			release := exhaust(t, dir)
			size := s.q.Stats().Cap
			if err := s.q.Resize(t.Context(), size+mib); err == nil || s.q.Stats().Cap != size {
				t.Errorf("grown without space: %v", err)
			} else {
				t.Logf("grow: %v", err)
			}
			err := s.q.Resize(t.Context(), size-mib/4)
			if st := s.q.Stats(); (err == nil) != (st.Cap < size) {
				t.Errorf("shrink: %v, %+v", err, st)
			}
			t.Logf("shrink: %v", err)
			s.produce(10, 2000, false)
			s.must(s.q.Flush(t.Context()))
			release()
			s.must(s.q.Resize(t.Context(), size-mib/2))
			s.must(s.q.Resize(t.Context(), size+mib))
			account(t, s)
		})
	})
	t.Run("damaged chunk", func(t *testing.T) {
		eachFileSystem(t, func(t *testing.T, dir string) {
			s := fillUp(t, dir)
			release := exhaust(t, dir)
			s.q.mu.Lock()
			bad := s.q.index.live()[len(s.q.index.live())/2]
			s.q.mu.Unlock()
			f, err := os.OpenFile(s.q.path, os.O_RDWR, 0)
			s.must(err)
			_, err = f.WriteAt([]byte("rot"), int64(bad.root)*pageSize+leafHeader+8)
			s.must(errors.Join(err, f.Close()))
			for range 3 {
				s.settle()
			}
			if st := s.q.Stats(); st.Corrupt != uint64(bad.count) || st.Err != nil {
				t.Errorf("%+v", st)
			}
			release()
			account(t, s)
		})
	})
}

// exhaustInodes makes files until there can be no more.
func exhaustInodes(t *testing.T, dir string) (release func()) {
	t.Helper()
	many := filepath.Join(dir, "many")
	err := os.Mkdir(many, 0o700)
	for n := 0; err == nil && n < 1e6; n++ {
		err = os.WriteFile(filepath.Join(many, fmt.Sprint(n)), nil, 0o600)
	}
	if !noSpace(err) {
		t.Fatalf("not full: %v", err)
	}
	return func() {
		if err := os.RemoveAll(many); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStartOnFullFileSystem: the file is there, and nothing else can be made, no sidecar and
// no copy of a damaged chunk. The queue works and says what it does without; with space again it has
// its sidecar.
func TestStartOnFullFileSystem(t *testing.T) {
	run := func(t *testing.T, dir string, exhaust func(t *testing.T, dir string) func()) {
		o := small(filepath.Join(dir, "buffer"))
		s := &sim{t: t, led: newLedger(), model: new(model), rng: rand.New(rand.NewPCG(5, 5)), gone: map[uint64]bool{}}
		s.q = open(t, o)
		s.produce(10, 2000, false)
		closeQueue(t, s.q)
		side := filepath.Join(o.Dir, sidecarName)
		s.must(os.Remove(side))
		release := exhaust(t, dir)
		s.q = open(t, o)
		degraded := func() bool {
			return slices.ContainsFunc(s.q.Stats().Hazards, func(h Hazard) bool { return h.What == noSidecar && !h.Unsafe })
		}
		for range 300 {
			s.produce(10, 2000, false)
			s.must(s.q.Flush(t.Context()))
		}
		if st := s.q.Stats(); !degraded() || st.Err != nil || st.Recovery != nil || testError(s.q, opNote) < 300 {
			t.Errorf("%v notes failed: %+v", testError(s.q, opNote), st)
		}
		t.Log(s.q.Stats().Hazards)
		closeQueue(t, s.q)
		s.q = open(t, o)
		if st := s.q.Stats(); !degraded() || st.Recovery != nil {
			t.Errorf("opened again: %+v", st)
		}
		release()
		s.produce(10, 2000, false)
		s.must(s.q.Flush(t.Context()))
		if w := readSidecar(o.Dir, bootID()); degraded() || w.state == nil || w.gen != s.q.state.gen {
			t.Errorf("with space again: %v, %+v", s.q.Stats().Hazards, w)
		}
		for range 30 {
			s.settle()
		}
		s.must(errors.Join(s.verify(), s.model.whole(s.q, s.led)))
	}
	eachFileSystem(t, func(t *testing.T, dir string) { run(t, dir, exhaust) })
	t.Run("inodes", func(t *testing.T) {
		run(t, mountImage(t, 16*mib, "mkfs.ext4", "-N", "64"), exhaustInodes)
	})
}
