// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSalvageOfLargerFile damages the newest meta page of a file that has grown, and opens
// it with the size that it had: the older meta page knows nothing of what the last
// transaction has put behind its end, and that is not cut off before it is salvaged.
func TestSalvageOfLargerFile(t *testing.T) {
	o := small(fastDir(t))
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(6, 6))}
	s.q = open(t, o)
	s.must(s.q.Resize(t.Context(), 2*o.Cap))
	newest := func() (meta, []byte) {
		data := read(t, s.q.path)
		m, err := metaInForce(bytes.NewReader(data), int64(len(data)))
		s.must(err)
		return m, data
	}
	done := 0
	for at, _ := newest(); done < 5; {
		s.produce(10, 2000, false)
		s.must(s.q.Flush(t.Context()))
		m, data := newest()
		grown, last := m.pages > at.pages, s.q.Bounds().Last
		if at = m; !grown || int64(m.pages)*pageSize <= o.Cap {
			continue
		}
		done++
		data[int64(m.txid%2)*pageSize+pageHeader] ^= 1
		c := o
		c.Dir = fastDir(t)
		plant(t, c.Dir, data)
		copyFile(t, filepath.Join(c.Dir, sidecarName), filepath.Join(o.Dir, sidecarName))
		q := open(t, c)
		st := q.Stats()
		if st.Recovery == nil || !st.Recovery.Exact || st.Last != last || st.Corrupt != 0 || invariant(st) != nil {
			t.Errorf("transaction %d, %d pages: %+v %+v", m.txid, m.pages, st, st.Recovery)
		}
		closeQueue(t, q)
	}
}

// TestSalvageOfWhatWasNotCommitted damages the newest meta page of a file amid a transaction,
// whose root has taken the page of the root that the older meta page leads to: that state
// is of a transaction that never was, and what it says to be there is not lost.
func TestSalvageOfWhatWasNotCommitted(t *testing.T) {
	o := small(fastDir(t))
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(6, 6))}
	s.q = open(t, o)
	var data []byte
	var known *state
	found := 0
	for n := 0; n < 300 && found < 5; n++ {
		s.produce(10, 2000, false)
		s.must(s.q.Flush(t.Context()))
		before, was := data, known
		data, known = read(t, s.q.path), readSidecar(o.Dir, bootID()).state
		if was == nil || known.gen != was.gen+1 {
			continue
		}
		m, err := metaInForce(bytes.NewReader(before), int64(len(before)))
		s.must(err)
		amid := append(bytes.Clone(before[:2*pageSize]), data[2*pageSize:]...)
		amid[int64(m.txid%2)*pageSize+pageHeader] ^= 1
		if st, _, err := treeState(bytes.NewReader(amid), int64(len(amid)), int(1-m.txid%2)); err != nil || st.gen != known.gen {
			continue // another page
		}
		found++
		c := o
		c.Dir = fastDir(t)
		plant(t, c.Dir, amid)
		plantSidecar(t, c.Dir, was, bootID())
		q := open(t, c)
		st := q.Stats()
		if st.Recovery == nil || !st.Recovery.Exact || st.Last != was.last || st.Corrupt != 0 ||
			be64(q.Mark()) != be64(was.mark) || invariant(st) != nil {
			t.Errorf("last %d, was %d: %+v %+v", st.Last, was.last, st, st.Recovery)
		}
		closeQueue(t, q)
	}
	if found == 0 {
		t.Error("no root has taken the page of another")
	}
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
	m, err := preflight(bytes.NewReader(data), int64(len(data)), 0)
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

// TestBadSectors opens files of which the disk does not yield every page, at the start and
// while a commit is read back: what it yields is salvaged, the rest is counted, and a disk
// that yields it after all costs nothing.
func TestBadSectors(t *testing.T) {
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(8, 8))}
	prepare := func(t *testing.T, o Options) uint64 {
		s.t = t
		s.led, s.pos, s.item = newLedger(), 0, 0
		s.q = open(t, o)
		for range 60 {
			s.produce(3, 2000, false)
			s.must(s.q.Flush(t.Context()))
		}
		return s.q.Bounds().Last
	}
	rootPage := func(path string) int64 {
		b := read(t, path)
		m, err := metaInForce(bytes.NewReader(b), int64(len(b)))
		s.must(err)
		return int64(m.root) * pageSize
	}
	t.Run("for a moment", func(t *testing.T) {
		o := small(fastDir(t))
		last := prepare(t, o)
		closeQueue(t, s.q)
		left := 3
		o.badSector = func(int64, int64) error {
			if left--; left >= 0 {
				return syscall.EIO
			}
			return nil
		}
		s.q = open(t, o)
		if st := s.q.Stats(); st.Recovery != nil || st.Last != last {
			t.Errorf("%+v", st)
		}
	})
	for name, pages := range map[string]func(bad int64, off, n int64) bool{
		"root": func(bad, off, n int64) bool { return off <= bad && bad < off+n },
		// Among them a meta and many chunks.
		"every fifth page": func(_, off, n int64) bool { return (off/pageSize)%5 == 1 || n > 4*pageSize },
		"all":              func(_, _, _ int64) bool { return true },
	} {
		t.Run("at the start: "+name, func(t *testing.T) {
			o := small(fastDir(t))
			last := prepare(t, o)
			epoch := s.q.Epoch()
			closeQueue(t, s.q)
			bad, ino := rootPage(s.q.path), inode(t, s.q.path)
			o.badSector = func(off, n int64) error {
				if inode(t, s.q.path) == ino && pages(bad, off, n) {
					return syscall.EIO
				}
				return nil
			}
			s.q = open(t, o)
			st := s.q.Stats()
			if r := st.Recovery; r == nil || !errors.Is(r.Cause, syscall.EIO) || r.Aside == "" {
				t.Fatalf("%+v", st.Recovery)
			}
			// Where the disk yields no state, the sidecar has it.
			if s.q.Epoch() != epoch || st.Records+st.Corrupt+st.InDoubt != last {
				t.Errorf("epoch %s, was %s: %+v", s.q.Epoch(), epoch, st)
			}
			for range 20 {
				s.settle()
			}
			s.must(s.verify())
			t.Logf("%d salvaged, %d corrupt", st.Salvaged, st.Corrupt)
		})
	}
	t.Run("after a failed commit", func(t *testing.T) {
		o := small(fastDir(t))
		var g gate
		g.install(&o)
		var ino atomic.Uint64 // of the file whose tree cannot be read
		o.badSector = func(off, n int64) error {
			if ino.Load() != 0 && inode(t, s.q.path) == ino.Load() && off > pageSize && n == pageSize {
				return syscall.EIO
			}
			return nil
		}
		last := prepare(t, o)
		epoch := s.q.Epoch()
		g.mu.Lock()
		ino.Store(inode(t, s.q.path))
		g.failAfter = 1
		g.mu.Unlock()
		for range 20 {
			s.settle()
		}
		st := s.q.Stats()
		if r := st.Recovery; r == nil || !r.Exact || !errors.Is(r.Cause, syscall.EIO) || s.q.Epoch() != epoch || r.Salvaged < last {
			t.Errorf("epoch %s, was %s: %+v", s.q.Epoch(), epoch, r)
		}
		s.must(s.verify())
	})
}

func inode(t *testing.T, path string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestSalvageKnowsWhatCameToNothing: a kill amid a transaction leaves chunks that were
// never committed, and that meant to drop more than the one that was given their seqs.
func TestSalvageKnowsWhatCameToNothing(t *testing.T) {
	stale := find{first: 7, seq: 7, count: 5, head: 4, time: 10, at: 1}
	live := []find{
		{first: 1, seq: 1, count: 3, head: 1, time: 5, at: 2},
		{first: 4, seq: 4, count: 3, head: 1, time: 6, at: 3},
		{first: 7, seq: 7, count: 3, head: 1, time: 20, at: 4},
		{first: 10, seq: 10, count: 4, head: 1, time: 21, at: 5},
	}
	s := &state{epoch: strings.Repeat("0", epochLen), gen: 9, last: 13, head: 1}
	got, keep := account(s, true, append([]find{stale}, live...), time.Now())
	if !slices.Equal(keep, live) || got.corrupt != 0 || got.epoch != s.epoch {
		t.Errorf("kept %+v, %+v", keep, got)
	}
}

// What was given up is live although it is named as lost, reported or not; when its chunk
// is gone it counts as any other.
func TestRestoreAfterGivingUp(t *testing.T) {
	for name, acked := range map[string]uint64{"not reported": 6, "reported": 8} {
		t.Run(name, func(t *testing.T) {
			s := &state{epoch: "01234567890123456789", head: 1, last: 10, acked: acked, lease: 10, given: []uint64{5}}
			s.losses.add(span{5, 5}.loss("refused"))
			s.losses.name(span{5, 5}.loss("refused"), 8)
			got, keep := account(s, true, []find{{first: 1, head: 1, count: 3}, {first: 7, head: 1, count: 4}}, time.Now())
			if got.epoch != s.epoch || len(keep) != 2 || got.reclaimed != 3 || got.salvaged != 7 {
				t.Errorf("epoch %s, %d chunks, %d reclaimed, %d salvaged; want %s, 2, 3, 7", got.epoch, len(keep), got.reclaimed, got.salvaged, s.epoch)
			}
		})
	}
}
