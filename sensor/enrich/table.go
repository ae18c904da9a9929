// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"time"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// table holds the processes of this host, at most max of them.
//
// A process is live until its exit is seen. Then it is kept for a grace time, so
// that events that come late still find it, and after that for as long as a
// descendant is in the table, so that the lineage of a daemon leads past the
// shell that started it. When the table is full, processes go in this order:
// those that exited, oldest exit first, then the live one not used for longest.
type table struct {
	max     int
	grace   uint64 // nanoseconds
	evicted func(live bool)

	byKey  map[event.ProcessKey]*entry
	byPID  map[uint32]*entry // the youngest with that pid
	live   order             // least recently used first
	exited order             // oldest exit first, within the grace time
	held   order             // oldest exit first, past it: kept for descendants
	now    uint64            // newest kernel time seen
	serial uint64

	cases   *cases
	seeding uint32 // number of the last seed
}

// entry is one process. The numbers that tie it to its parent's entry, not a
// pointer, keep an evicted parent from staying in memory.
type entry struct {
	event.Process
	asOf     uint64   // kernel time of the newest exec or snapshot applied
	before   *entry   // as it was before the newest exec, in no list; nil if unknown
	job      *hashJob // of HashNote "pending"
	member   caseSet  // cases it is in by birth
	alike    caseSet  // cases that its attributes match, as of caseAsOf
	caseAsOf uint32   // generation of the cases
	seeded   uint32
	deep     Deep

	unlearned bool // what it runs is not known until an event tells

	id       uint64 // of this entry, never reused
	parentID uint64 // entry that counts this one among its children, or 0
	children int

	in         *order
	prev, next *entry
}

// keep remembers what the process is, for events from before the exec that is to be applied.
func (p *entry) keep() {
	b := p.before
	if b == nil {
		b = new(entry)
	}
	*b = *p
	b.before, b.in, b.prev, b.next = nil, nil, nil, nil
	p.before = b
}

// at returns the process as it was at a kernel time, as far as that is remembered.
func (p *entry) at(ktime uint64) *entry {
	if ktime >= p.asOf || p.before == nil {
		return p
	}
	b := p.before
	b.Parent, b.Exited, b.ExitTime, b.member = p.Parent, p.Exited, p.ExitTime, p.member // no exec changes these
	return b
}

// tableMin is enough for one event: the processes it names must not push each
// other out.
const tableMin = 64

func newTable(size int, grace time.Duration, evicted func(live bool)) *table {
	return &table{
		cases: &cases{},
		max:   max(size, tableMin), grace: uint64(grace), evicted: evicted,
		byKey: make(map[event.ProcessKey]*entry), byPID: make(map[uint32]*entry),
	}
}

func (t *table) len() int { return len(t.byKey) }

// use returns the process, or nil, and marks it as used.
func (t *table) use(key event.ProcessKey) *entry {
	e := t.byKey[key]
	if e != nil && e.in == &t.live {
		t.live.moveToBack(e)
	}
	return e
}

// find returns the process of a pid whose start time, in clock ticks, is given.
func (t *table) find(pid uint32, ticks uint64) *entry {
	if e := t.byPID[pid]; e != nil && e.Key.StartTime/tick == ticks {
		return e
	}
	return nil
}

// add puts a live process, not yet in the table, into it. p.Parent need not be.
func (t *table) add(p event.Process) *entry {
	for len(t.byKey) >= t.max {
		t.evict()
	}
	t.serial++
	e := &entry{Process: p, id: t.serial}
	t.byKey[p.Key] = e
	t.live.pushBack(e)
	if t.cases.rooted != 0 {
		e.member = t.cases.roots(e.Key)
	}
	if old := t.byPID[p.Key.PID]; old == nil || old.Key.StartTime < p.Key.StartTime {
		t.byPID[p.Key.PID] = e
		if old != nil && !old.Exited {
			t.exit(old, p.Key.StartTime) // its pid was given away: its exit was lost
		}
	}
	t.adopt(e, p.Parent)
	return e
}

// adopt makes parent the parent of e.
func (t *table) adopt(e *entry, parent event.ProcessKey) {
	t.orphan(e)
	e.Parent = parent
	if t.byKey[e.Key] != e {
		return // it was held for the one it was orphaned from: a circle, which is now gone
	}
	if p := t.byKey[parent]; p != nil && p != e {
		p.children++
		e.parentID = p.id
		if born := p.member & t.cases.inherited; born&^e.member != 0 {
			e.member |= born
			e.caseAsOf = 0
		}
	}
}

// orphan takes e from its parent's count, and drops a parent that was only kept
// for e.
func (t *table) orphan(e *entry) {
	if e.parentID == 0 {
		return
	}
	p := t.byKey[e.Parent]
	known := p != nil && p.id == e.parentID
	e.parentID = 0
	if !known {
		return // evicted since
	}
	if p.children--; p.children == 0 && p.in == &t.held {
		t.remove(p)
	}
}

// exit marks a process as exited. A second call changes the time only.
func (t *table) exit(e *entry, ktime uint64) {
	e.ExitTime = ktime
	if e.Exited {
		return
	}
	e.Exited = true
	t.live.remove(e)
	t.exited.pushBack(e)
	// A storm of short processes must not fill the memory with them.
	for t.exited.len > t.max/4 {
		if held := t.retire(t.exited.front); !held {
			t.evicted(false)
		}
	}
}

// expire ends the grace time of processes that exited before ktime less grace.
func (t *table) expire(ktime uint64) {
	t.now = max(t.now, ktime)
	for e := t.exited.front; e != nil && e.ExitTime+t.grace <= t.now; e = t.exited.front {
		t.retire(e)
	}
}

// retire ends one process's grace time: it stays while it has descendants.
func (t *table) retire(e *entry) (held bool) {
	if e.children == 0 {
		t.remove(e)
		return false
	}
	t.exited.remove(e)
	e.before = nil
	t.held.pushBack(e)
	return true
}

func (t *table) evict() {
	for _, l := range [...]*order{&t.held, &t.exited, &t.live} {
		if e := l.front; e != nil {
			t.evicted(l == &t.live)
			if l == &t.live && e.member != 0 {
				t.cases.know(e.Key, e.member)
			}
			t.remove(e)
			return
		}
	}
}

func (t *table) remove(e *entry) {
	delete(t.byKey, e.Key)
	if t.byPID[e.Key.PID] == e {
		delete(t.byPID, e.Key.PID)
	}
	e.in.remove(e)
	t.orphan(e)
}

// order is a doubly linked list through its entries.
type order struct {
	front, back *entry
	len         int
}

func (l *order) pushBack(e *entry) {
	e.in, e.prev, e.next = l, l.back, nil
	if l.back == nil {
		l.front = e
	} else {
		l.back.next = e
	}
	l.back = e
	l.len++
}

func (l *order) remove(e *entry) {
	if e.prev == nil {
		l.front = e.next
	} else {
		e.prev.next = e.next
	}
	if e.next == nil {
		l.back = e.prev
	} else {
		e.next.prev = e.prev
	}
	e.in, e.prev, e.next = nil, nil, nil
	l.len--
}

func (l *order) moveToBack(e *entry) {
	if l.back != e {
		l.remove(e)
		l.pushBack(e)
	}
}
