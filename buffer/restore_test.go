// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestFileHarmedWhileOpen cuts, removes and replaces the file under an open queue: the
// process lives, the epoch goes on, what is intact is delivered, the rest is named.
func TestFileHarmedWhileOpen(t *testing.T) {
	for name, do := range map[string]func(path string) error{
		"cut":     func(path string) error { return os.Truncate(path, 300*kib) },
		"emptied": func(path string) error { return os.Truncate(path, 0) },
		"removed": os.Remove,
		"replaced": func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.WriteFile(path, bytes.Repeat([]byte("not ours"), 1<<18), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := small(fastDir(t))
			s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(6, 6))}
			s.q = open(t, o)
			for range 200 {
				s.produce(3, 2000, false)
				s.must(s.q.Flush(t.Context()))
			}
			s.deliver(50, 1<<20, 0)
			epoch := s.q.Epoch()
			s.must(s.q.Flush(t.Context())) // no transaction runs now
			s.must(do(s.q.path))
			for range 30 {
				s.settle()
			}
			st := s.q.Stats()
			if st.Recovery == nil || !st.Recovery.Exact || s.q.Epoch() != epoch {
				t.Fatalf("not restored: %+v", st)
			}
			if lost := name == "cut" || name == "emptied"; lost != (st.Corrupt > 0) || st.Recovery.Lost > st.Corrupt {
				t.Errorf("%d records are lost, %+v", st.Corrupt, st.Recovery)
			}
			s.must(s.verify())
			closeQueue(t, s.q)
			check(t, s.q.path)
			t.Logf("%d salvaged, %d lost", st.Salvaged, st.Corrupt)
		})
	}
}

// TestFileThatIsNotTheOneLeftHere opens files that are sound, or not there, and yet
// not what the process before has left.
func TestFileThatIsNotTheOneLeftHere(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(t *testing.T, path string, early []byte)
		exact bool
	}{
		"missing": {func(t *testing.T, path string, _ []byte) { remove(t, path) }, true},
		"put back from a copy": {func(t *testing.T, path string, early []byte) {
			plant(t, filepath.Dir(path), early)
		}, true},
		"empty": {func(t *testing.T, path string, _ []byte) { plant(t, filepath.Dir(path), nil) }, true},
		"of an older epoch": {func(t *testing.T, path string, _ []byte) {
			data := tamper(t, read(t, path), func(s *state) { s.epoch = "00" + s.epoch[2:] })
			plant(t, filepath.Dir(path), data)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := small(fastDir(t))
			s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(6, 6))}
			s.q = open(t, o)
			var early []byte
			for i := range 60 {
				s.produce(3, 2000, false)
				s.must(s.q.Flush(t.Context()))
				if i == 30 {
					closeQueue(t, s.q)
					early = read(t, s.q.path)
					s.q = open(t, o)
				}
			}
			epoch := s.q.Epoch()
			closeQueue(t, s.q)
			c.do(t, s.q.path, early)
			s.q = open(t, o)
			st := s.q.Stats()
			if st.Recovery == nil || st.Recovery.Exact != c.exact || (s.q.Epoch() == epoch) != c.exact || s.q.Epoch() < epoch {
				t.Fatalf("epoch %s, was %s: %+v %+v", s.q.Epoch(), epoch, st, st.Recovery)
			}
			if !c.exact {
				return
			}
			if st.Corrupt == 0 || st.Corrupt+st.InDoubt+st.Records != 180 {
				t.Errorf("%+v", st)
			}
			for range 20 {
				s.settle()
			}
			s.must(s.verify())
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSalvageOnFullFileSystem damages a file where no second one of its size fits:
// the damaged one then gives its space up.
func TestSalvageOnFullFileSystem(t *testing.T) {
	dir := filepath.Join(mount(t, "-t", "tmpfs", "-o", "size=3m", "tmpfs"), "buffer")
	o := small(dir)
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(6, 6))}
	s.q = open(t, o)
	for range 400 {
		s.produce(3, 2000, false)
		s.must(s.q.Flush(t.Context()))
	}
	path := s.q.path
	closeQueue(t, s.q)
	data := read(t, path)
	m, err := preflight(bytes.NewReader(data), int64(len(data)))
	s.must(err)
	clear(data[m.root*pageSize:][:pageSize])
	plant(t, dir, data)
	s.q = open(t, o)
	st := s.q.Stats()
	if st.Recovery == nil || !st.Recovery.Exact || st.Recovery.Aside != "" || st.Records == 0 {
		t.Fatalf("%+v %+v", st, st.Recovery)
	}
	for range 30 {
		s.settle()
	}
	s.must(s.verify())
	t.Logf("%d salvaged, %d dropped for space, %d corrupt", st.Recovery.Salvaged, st.Truncated, st.Corrupt)
}
