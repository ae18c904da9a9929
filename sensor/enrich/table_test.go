// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func key(pid uint32, start uint64) event.ProcessKey {
	return event.ProcessKey{PID: pid, StartTime: start}
}

// modelTable does what table does with nothing but a slice in which it searches.
type modelTable struct {
	max     int
	grace   uint64
	now     uint64
	order   int // number of the last thing that happened
	procs   []*modelProc
	evicted map[bool]int
}

type modelProc struct {
	key, parent event.ProcessKey
	counted     *modelProc // the parent that was there when this one was adopted
	exited      bool
	exitTime    uint64
	used, ended int // when
	held        int // when, or 0
}

func (m *modelTable) tick() int { m.order++; return m.order }

func (m *modelTable) find(k event.ProcessKey) *modelProc {
	for _, p := range m.procs {
		if p.key == k {
			return p
		}
	}
	return nil
}

func (m *modelTable) children(p *modelProc) (n int) {
	for _, c := range m.procs {
		if c.counted == p {
			n++
		}
	}
	return n
}

// first returns the process of a state that comes first by when.
func (m *modelTable) first(in func(*modelProc) bool, when func(*modelProc) int) (first *modelProc) {
	for _, p := range m.procs {
		if in(p) && (first == nil || when(p) < when(first)) {
			first = p
		}
	}
	return first
}

func isLive(p *modelProc) bool   { return !p.exited }
func isExited(p *modelProc) bool { return p.exited && p.held == 0 }
func isHeld(p *modelProc) bool   { return p.held != 0 }

func (m *modelTable) firstExited() *modelProc {
	return m.first(isExited, func(p *modelProc) int { return p.ended })
}

func (m *modelTable) remove(p *modelProc) {
	m.procs = slices.DeleteFunc(m.procs, func(q *modelProc) bool { return q == p })
	m.orphan(p)
}

func (m *modelTable) orphan(p *modelProc) {
	parent := p.counted
	p.counted = nil
	if parent != nil && m.find(parent.key) == parent && isHeld(parent) && m.children(parent) == 0 {
		m.remove(parent)
	}
}

func (m *modelTable) adopt(p *modelProc, parent event.ProcessKey) {
	m.orphan(p)
	p.parent = parent
	if q := m.find(parent); q != p {
		p.counted = q
	}
}

func (m *modelTable) use(k event.ProcessKey) *modelProc {
	p := m.find(k)
	if p != nil {
		p.used = m.tick()
	}
	return p
}

func (m *modelTable) add(k, parent event.ProcessKey) *modelProc {
	for len(m.procs) >= m.max {
		p := m.first(isHeld, func(p *modelProc) int { return p.held })
		if p == nil {
			p = m.firstExited()
		}
		if p == nil {
			p = m.first(isLive, func(p *modelProc) int { return p.used })
		}
		m.evicted[isLive(p)]++
		m.remove(p)
	}
	youngest := (*modelProc)(nil)
	for _, p := range m.procs {
		if p.key.PID == k.PID && (youngest == nil || p.key.StartTime > youngest.key.StartTime) {
			youngest = p
		}
	}
	p := &modelProc{key: k, used: m.tick()}
	m.procs = append(m.procs, p)
	if youngest != nil && youngest.key.StartTime < k.StartTime && !youngest.exited {
		m.exit(youngest, k.StartTime)
	}
	m.adopt(p, parent)
	return p
}

func (m *modelTable) exit(p *modelProc, ktime uint64) {
	p.exitTime = ktime
	if p.exited {
		return
	}
	p.exited, p.ended = true, m.tick()
	for {
		n := 0
		for _, q := range m.procs {
			if isExited(q) {
				n++
			}
		}
		if n <= m.max/4 {
			return
		}
		if !m.retire(m.firstExited()) {
			m.evicted[false]++
		}
	}
}

func (m *modelTable) retire(p *modelProc) bool {
	if m.children(p) == 0 {
		m.remove(p)
		return false
	}
	p.held = m.tick()
	return true
}

func (m *modelTable) expire(ktime uint64) {
	m.now = max(m.now, ktime)
	for p := m.firstExited(); p != nil && p.exitTime+m.grace <= m.now; p = m.firstExited() {
		m.retire(p)
	}
}

// state is what both tables must agree on.
type state struct {
	Key, Parent event.ProcessKey
	Exited      bool
	ExitTime    uint64
	Held        bool
	Children    int
}

func (m *modelTable) states() (out []state) {
	for _, p := range m.procs {
		out = append(out, state{p.key, p.parent, p.exited, p.exitTime, isHeld(p), m.children(p)})
	}
	return sorted(out)
}

func (t *table) states() (out []state) {
	for k, e := range t.byKey {
		out = append(out, state{k, e.Parent, e.Exited, e.ExitTime, e.in == &t.held, e.children})
	}
	return sorted(out)
}

func sorted(s []state) []state {
	slices.SortFunc(s, func(a, b state) int {
		if a.Key.PID != b.Key.PID {
			return int(a.Key.PID) - int(b.Key.PID)
		}
		return int(a.Key.StartTime) - int(b.Key.StartTime)
	})
	return s
}

// check finds what no comparison with the model would: broken links.
func (t *table) check() error {
	n := 0
	for name, l := range map[string]*order{"live": &t.live, "exited": &t.exited, "held": &t.held} {
		count := 0
		var prev *entry
		for e := l.front; e != nil; prev, e = e, e.next {
			if e.prev != prev || e.in != l || t.byKey[e.Key] != e {
				return fmt.Errorf("list %s is broken at %v", name, e.Key)
			}
			if e.Exited != (l != &t.live) {
				return fmt.Errorf("%v is in list %s, exited %v", e.Key, name, e.Exited)
			}
			if youngest := t.byPID[e.Key.PID]; youngest != nil && youngest.Key.StartTime < e.Key.StartTime {
				return fmt.Errorf("pid %d leads to %v, not to %v", e.Key.PID, youngest.Key, e.Key)
			}
			count++
		}
		if l.back != prev || l.len != count {
			return fmt.Errorf("list %s has %d entries, says %d", name, count, l.len)
		}
		n += count
	}
	if n != len(t.byKey) || len(t.byPID) > n || n > t.max {
		return fmt.Errorf("%d entries in lists, %d by key, %d by pid, bound %d", n, len(t.byKey), len(t.byPID), t.max)
	}
	return nil
}

// play runs one random history on both tables.
func play(t *testing.T, seed uint64, steps int) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 0))
	evicted := map[bool]int{}
	real := newTable(tableMin, 100*time.Nanosecond, func(live bool) { evicted[live]++ })
	model := &modelTable{max: tableMin, grace: 100, evicted: map[bool]int{}}
	var (
		now  = uint64(1000)
		keys []event.ProcessKey // ever seen
	)
	// Each history leans to one side: few exits fill the table with live
	// processes, many with exited ones.
	exits := rnd.IntN(60)
	pids := []int{20, 100, 5000}[rnd.IntN(3)] // few pids are reused soon
	known := func() event.ProcessKey {
		if len(keys) == 0 || rnd.IntN(20) == 0 {
			return key(uint32(rnd.IntN(pids)), 1)
		}
		// Mostly of late, as parents are.
		return keys[len(keys)-1-rnd.IntN(min(len(keys), 1+rnd.IntN(100)))]
	}
	for step := range steps {
		now += uint64(rnd.IntN(10))
		switch what := rnd.IntN(100); {
		case what < exits:
			if k := known(); real.byKey[k] != nil {
				real.exit(real.use(k), now)
				model.exit(model.use(k), now)
			}
		case what < 70:
			k, parent := key(uint32(rnd.IntN(pids)), now), known()
			if rnd.IntN(10) == 0 {
				parent = event.ProcessKey{}
			}
			if real.byKey[k] == nil {
				real.add(event.Process{Key: k, Parent: parent})
				model.add(k, parent)
				keys = append(keys, k)
			}
		case what < 80:
			k := known()
			if (real.use(k) != nil) != (model.use(k) != nil) {
				t.Fatalf("seed %d step %d: the tables disagree about %v", seed, step, k)
			}
		case what < 85:
			if k, parent := known(), known(); real.byKey[k] != nil {
				real.adopt(real.byKey[k], parent)
				model.adopt(model.find(k), parent)
			}
		default:
			real.expire(now)
			model.expire(now)
		}
		if err := real.check(); err != nil {
			t.Fatalf("seed %d step %d: %v", seed, step, err)
		}
		if want, got := model.states(), real.states(); !slices.Equal(want, got) {
			t.Fatalf("seed %d step %d (-model +table):\n%s", seed, step, cmp.Diff(want, got))
		}
		if !maps.Equal(model.evicted, evicted) {
			t.Fatalf("seed %d step %d: evicted %v, model %v", seed, step, evicted, model.evicted)
		}
	}
}

func TestTableAgainstModel(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		play(t, seed, 400)
	}
}

func FuzzTable(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(func(t *testing.T, seed uint64) { play(t, seed, 300) })
}

func TestTableKeepsExitedForLateEvents(t *testing.T) {
	tab := newTable(1000, time.Second, func(bool) { t.Error("evicted") })
	e := tab.add(event.Process{Key: key(1, 10)})
	tab.exit(e, 20)
	tab.expire(20 + 1e9 - 1)
	if tab.use(key(1, 10)) != e {
		t.Error("gone before its grace time is over")
	}
	tab.expire(20 + 1e9)
	if tab.use(key(1, 10)) != nil {
		t.Error("still there after its grace time")
	}
}

// TestTableKeepsLineage is the daemon that forks twice: as long as it runs, the
// shell that started it is known.
func TestTableKeepsLineage(t *testing.T) {
	tab := newTable(1000, time.Second, func(bool) { t.Error("evicted") })
	shell := tab.add(event.Process{Key: key(10, 1)})
	between := tab.add(event.Process{Key: key(11, 2), Parent: shell.Key})
	daemon := tab.add(event.Process{Key: key(12, 3), Parent: between.Key})
	tab.exit(between, 4)
	tab.exit(shell, 5)
	tab.expire(1e12)
	if tab.use(shell.Key) == nil || tab.use(between.Key) == nil {
		t.Fatal("the ancestors of a running process are gone")
	}
	tab.exit(daemon, 1e12)
	tab.expire(2e12)
	if tab.len() != 0 {
		t.Errorf("%d processes are left after the last of them ended", tab.len())
	}
}

func TestTableLostExit(t *testing.T) {
	tab := newTable(1000, time.Second, func(bool) {})
	first := tab.add(event.Process{Key: key(10, 100*tick)})
	second := tab.add(event.Process{Key: key(10, 200*tick)})
	if !first.Exited || first.ExitTime != 200*tick {
		t.Errorf("a process whose pid was given away: exited %v at %d", first.Exited, first.ExitTime)
	}
	if got := tab.find(10, 200); got != second {
		t.Errorf("find = %v", got)
	}
	if got := tab.find(10, 100); got != nil {
		t.Errorf("find by the start time of the old one = %v", got.Key)
	}
	// One that is entered late must not end the younger one.
	tab.add(event.Process{Key: key(10, 150*tick)})
	if second.Exited || tab.byPID[10] != second {
		t.Error("an older process took the pid from a younger one")
	}
}
