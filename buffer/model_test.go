// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var modelOps = flag.Int("model.ops", 50_000, "operations of TestModel")

// fastDir is a directory in memory where there is one: what is tested with it
// does not depend on the disk, and needs tens of thousands of commits.
func fastDir(t testing.TB) string {
	const tmpfs = 0x01021994
	var fs unix.Statfs_t
	if unix.Statfs("/dev/shm", &fs) != nil || fs.Type != tmpfs || fs.Bavail*uint64(fs.Bsize) < 256*mib {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "edr-buffer-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// gate lets a test hold the writer between transactions, and fail them.
type gate struct {
	mu         sync.Mutex // held from before until after a transaction
	failBefore int        // transactions to fail before they start
	failAfter  int        // transactions to fail after they are durable
}

var errInjected = errors.New("injected")

func (g *gate) before() error {
	g.mu.Lock()
	if g.failBefore > 0 {
		g.failBefore--
		g.mu.Unlock()
		return errInjected
	}
	return nil
}

func (g *gate) after() error {
	defer g.mu.Unlock()
	if g.failAfter > 0 {
		g.failAfter--
		return errInjected
	}
	return nil
}

func (g *gate) install(o *Options) { o.BeforeCommit, o.afterCommit = g.before, g.after }

// copyFile copies the file while no transaction runs: what a kill would leave.
func copyFile(t testing.TB, dst, src string) {
	t.Helper()
	in, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestModel runs random operations of worker, sender, disk and fate against a
// queue, and holds it to the invariant after each and to the ledger at the end
// of each life of the file.
func TestModel(t *testing.T) {
	const lives = 10
	ops := *modelOps
	if raceDetector() {
		ops /= 4 // it is that much slower
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var total Stats
	var crashes, reopens, faults, flips int
	for life := range lives {
		rng := rand.New(rand.NewPCG(seed, uint64(life)))
		root := fastDir(t)
		m := &modelRun{sim: sim{t: t, led: newLedger(), rng: rng}, root: root, dir: filepath.Join(root, "0")}
		m.open()
		for op := range ops / lives {
			m.step()
			if err := invariant(m.q.Stats()); err != nil {
				t.Fatalf("life %d op %d: %v", life, op, err)
			}
		}
		for range 30 { // names of losses are themselves delivered
			m.settle()
		}
		if err := m.verify(); err != nil {
			t.Fatalf("life %d: %v", life, err)
		}
		s := m.q.Stats()
		total.Last += s.Last
		total.Truncated += s.Truncated
		total.Corrupt += s.Corrupt
		total.Reclaimed += s.Reclaimed
		crashes, reopens, faults, flips = crashes+m.crashes, reopens+m.reopens, faults+m.faults, flips+m.flips
		closeQueue(t, m.q)
	}
	t.Logf("%d records: %d truncated, %d corrupt, %d reclaimed; %d crashes, %d reopens, %d failed commits, %d damaged chunks",
		total.Last, total.Truncated, total.Corrupt, total.Reclaimed, crashes, reopens, faults, flips)
	if total.Truncated == 0 || total.Corrupt == 0 || total.Reclaimed == 0 || crashes == 0 || faults == 0 {
		t.Error("the run did not meet everything it is meant to")
	}
}

func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

type modelRun struct {
	sim
	gate                            gate
	root, dir                       string
	outage                          bool
	crashes, reopens, faults, flips int
}

func (m *modelRun) open() {
	o := small(m.dir)
	o.RetainBytes = 256 * kib
	m.gate.install(&o)
	q, err := Open(m.t.Context(), o)
	m.must(err)
	if r := q.Stats().Recovery; r != nil {
		m.t.Fatalf("a good file was set aside: %v", r.Cause)
	}
	m.q = q
	if mark := q.Mark(); mark != nil {
		c := cursor{b: mark}
		m.item = be64(c.bytes(8))
	} else {
		m.item = 0
	}
	if !m.outage {
		m.connect()
	}
}

func (m *modelRun) step() {
	switch n := m.rng.IntN(1000); {
	case n < 500:
		m.produce(m.rng.IntN(20), 1+m.rng.IntN(3000), m.rng.IntN(10) == 0)
	case n < 560:
		m.must(m.q.Flush(m.t.Context()))
	case n < 970:
		if m.outage {
			return
		}
		m.produce(1, 50, false) // so that there is something to read
		fate := 0
		if m.rng.IntN(20) == 0 {
			fate = 1 + m.rng.IntN(2)
		}
		m.deliver(1+m.rng.IntN(300), 1+m.rng.IntN(128*kib), fate)
		if fate != 0 {
			if m.rng.IntN(2) == 0 {
				m.outage = true // the server has it or not, and is gone
			} else {
				m.connect()
			}
		}
	case n < 978:
		// An outage lasts long enough to overrun the file.
		if m.outage = !m.outage || m.rng.IntN(4) > 0; !m.outage {
			m.connect()
		}
	case n < 984:
		m.crash()
	case n < 988:
		m.reopens++
		closeQueue(m.t, m.q)
		m.open()
	case n < 994:
		m.faults++
		m.gate.mu.Lock()
		if m.rng.IntN(2) == 0 {
			m.gate.failBefore = 1 + m.rng.IntN(2)
		} else {
			m.gate.failAfter = 1 + m.rng.IntN(2)
		}
		m.gate.mu.Unlock()
	case n < 997:
		m.flip()
	default:
		m.q.wake() // for nothing
	}
}

// crash goes on with a copy of the file as it is on disk now.
func (m *modelRun) crash() {
	m.crashes++
	next := filepath.Join(m.root, fmt.Sprint(m.crashes))
	m.must(os.Mkdir(next, 0o700))
	m.gate.mu.Lock()
	copyFile(m.t, filepath.Join(next, fileName), filepath.Join(m.dir, fileName))
	m.gate.failBefore, m.gate.failAfter = 0, 0
	m.gate.mu.Unlock()
	closeQueue(m.t, m.q)
	m.must(os.RemoveAll(m.dir))
	m.dir = next
	m.open()
}

// flip damages one byte of a live chunk that is not on its way.
func (m *modelRun) flip() {
	m.gate.mu.Lock()
	defer m.gate.mu.Unlock()
	m.q.mu.Lock()
	l := m.q.index.live()
	var e entry
	if len(l) > 0 {
		e = l[m.rng.IntN(len(l))]
	}
	m.q.mu.Unlock()
	if e.root == 0 {
		return
	}
	m.flips++
	f, err := os.OpenFile(filepath.Join(m.dir, fileName), os.O_RDWR, 0)
	m.must(err)
	defer f.Close()
	at := int64(e.root)*pageSize + leafHeader + int64(m.rng.IntN(chunkHeader))
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	m.must(err)
	b[0] ^= 1 << m.rng.IntN(8)
	_, err = f.WriteAt(b[:], at)
	m.must(err)
}

func be64(b []byte) (v uint64) {
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v
}
