// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"cmp"
	"math/bits"
	"slices"
	"strings"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// shortContainerID is how much of a container's id people are shown.
const shortContainerID = 12

// caseSet is a set of open cases, a bit for each slot.
type caseSet uint16

// cases are the open cases, as the worker knows them. A process is covered for one
// of two reasons. It is a member: the root of a case, or born below one, which is
// noted in its table entry. Or its attributes match, which is found out once for
// each image it runs.
type cases struct {
	slots      [event.MaxCases]*event.Case
	order      []int   // the slots in use, that of the oldest case first
	rooted     caseSet // a process, or a subtree
	inherited  caseSet // a subtree: children are members, too
	attributes caseSet // container, control group, user, path
	paths      caseSet
	deep       caseSet
	generation uint32 // of the set: what was found out about processes before is void
	deepen     func(pid uint32, d Deep)
	// known are members that are not in the table: from an earlier run of the sensor,
	// or dropped from a full table while they run.
	known   map[event.ProcessKey]caseSet
	matched [event.MaxCases]*event.Case
}

// Deep says how much of a process is collected for a case.
type Deep uint8

// What a process is to deep collection.
const (
	DeepOff     Deep = iota
	DeepProcess      // of this process
	DeepSubtree      // of this process and of those it forks
)

// SetCases makes list, of at most event.MaxCases and oldest first, the open cases. It
// returns how many running processes each of them covers. Deepen, if set, is told of
// running processes of which a case wants everything, and when it does no more.
func (e *Enricher) SetCases(list []*event.Case, deepen func(pid uint32, d Deep)) (covered []int) {
	c := &e.cases
	c.deepen = deepen
	gone := c.replace(list[:min(len(list), event.MaxCases)])
	for key := range c.known {
		if e.table.byKey[key] == nil && !e.proc.is(key) {
			delete(c.known, key) // it ended when nobody looked
		}
	}
	c.generation++
	e.table.forget(gone)
	e.table.seed()
	covered = make([]int, len(list))
	for _, p := range e.table.byKey {
		if p.Exited {
			continue
		}
		set := e.covers(p)
		for i, slot := range c.order {
			covered[i] += int(set >> slot & 1)
		}
	}
	return covered
}

// replace puts list into the slots. A case stays in its slot for as long as it is
// open; the slots that another case may get are returned.
func (c *cases) replace(list []*event.Case) (gone caseSet) {
	open := map[*event.Case]bool{}
	for _, k := range list {
		open[k] = true
	}
	held := map[*event.Case]int{}
	for slot, k := range c.slots {
		if k != nil && !open[k] {
			c.slots[slot] = nil
			gone |= 1 << slot
		} else if k != nil {
			held[k] = slot
		}
	}
	known := c.known
	for key, set := range known {
		if known[key] = set &^ gone; known[key] == 0 {
			delete(known, key)
		}
	}
	*c = cases{slots: c.slots, generation: c.generation, deepen: c.deepen, known: known}
	for _, k := range list {
		slot, ok := held[k]
		for !ok {
			ok = c.slots[slot] == nil
			if !ok {
				slot++
			}
		}
		c.put(slot, k)
		if _, ok := held[k]; !ok {
			for _, key := range k.Roots {
				c.know(key, 1<<slot)
			}
		}
	}
	return gone
}

func (c *cases) put(slot int, k *event.Case) {
	bit := caseSet(1) << slot
	c.slots[slot] = k
	c.order = append(c.order, slot)
	switch k.Scope.Kind {
	case event.CaseProcess:
		c.rooted |= bit
	case event.CaseSubtree:
		c.rooted |= bit
		c.inherited |= bit
	case event.CasePath:
		c.paths |= bit
		c.attributes |= bit
	default:
		c.attributes |= bit
	}
	if k.Deep {
		c.deep |= bit
	}
}

// know remembers a member that is not in the table, as long as there is room.
func (c *cases) know(key event.ProcessKey, set caseSet) {
	const most = 65536
	if c.known == nil {
		c.known = map[event.ProcessKey]caseSet{}
	}
	if len(c.known) < most || c.known[key] != 0 {
		c.known[key] |= set
	}
}

// roots are the cases whose root the process is, or of which it was a member before.
func (c *cases) roots(key event.ProcessKey) (set caseSet) {
	set = c.known[key]
	for left := c.rooted; left != 0; left &= left - 1 {
		slot := bits.TrailingZeros16(uint16(left))
		if s := &c.slots[slot].Scope; s.PID == key.PID && s.StartTicks == key.StartTime/tick {
			set |= 1 << slot
		}
	}
	return set
}

// matching are the cases that the attributes of the process are those of.
func (c *cases) matching(p *event.Process) (set caseSet) {
	for left := c.attributes; left != 0; left &= left - 1 {
		slot := bits.TrailingZeros16(uint16(left))
		if s := &c.slots[slot].Scope; matches(s, p) {
			set |= 1 << slot
		}
	}
	return set
}

func matches(s *event.CaseScope, p *event.Process) bool {
	switch s.Kind {
	case event.CaseContainer:
		return p.Container != nil && isContainer(p.Container.ID, s.Text)
	case event.CaseCgroup:
		return below(p.CgroupPath, s.Text)
	case event.CaseUser:
		known := !p.Partial || p.Path != "" // else the zeroes are nobody's
		return known && (p.Cred.UID == s.UID || p.Cred.EUID == s.UID) || p.LoginUID == s.UID && s.UID != event.Unset
	case event.CasePath:
		return below(p.Path, s.Text)
	}
	return false
}

func isContainer(id, wanted string) bool {
	return id != "" && (id == wanted || len(wanted) >= shortContainerID && strings.HasPrefix(id, wanted))
}

// below tells whether path is at or below the directory.
func below[T string | []byte](path T, dir string) bool {
	if len(path) < len(dir) || string(path[:len(dir)]) != dir {
		return false
	}
	return len(path) == len(dir) || dir == "/" || path[len(dir)] == '/'
}

// touching are the cases of paths that the event itself names.
func (c *cases) touching(ev *event.Event) (set caseSet) {
	for left := c.paths; left != 0; left &= left - 1 {
		slot := bits.TrailingZeros16(uint16(left))
		dir := c.slots[slot].Scope.Text
		var hit bool
		switch ev.Kind {
		case event.Exec:
			hit = below(ev.Exec.OldPath, dir) || below(ev.Exec.Filename, dir)
		case event.FileRename, event.FileLink, event.MountMove:
			hit = below(ev.File.Path, dir) || below(ev.File.Path2, dir)
		default:
			hit = isFile(ev.Kind) && below(ev.File.Path, dir)
		}
		if hit {
			set |= 1 << slot
		}
	}
	return set
}

func isFile(k event.Kind) bool { return k >= event.FileCreate && k < event.Lifecycle }

// covers returns the cases that cover the process.
func (e *Enricher) covers(p *entry) caseSet {
	if p.caseAsOf != e.cases.generation {
		p.caseAsOf, p.alike = e.cases.generation, e.cases.matching(&p.Process)
		if p.in != nil { // the kernel is not told of what it ran before
			e.deepen(p)
		}
	}
	return p.member | p.alike
}

// deepen tells the kernel how much of the process is wanted, when that changed.
func (e *Enricher) deepen(p *entry) {
	d := DeepOff
	if set := (p.member | p.alike) & e.cases.deep; set&^(e.cases.rooted&^e.cases.inherited) != 0 {
		d = DeepSubtree
	} else if set != 0 {
		d = DeepProcess
	}
	if p.Exited {
		d = DeepOff
	}
	if d != p.deep {
		p.deep = d
		if e.cases.deepen != nil {
			e.cases.deepen(p.Key.PID, d)
		}
	}
}

// tag sets the cases that cover an event, the oldest first.
func (e *Enricher) tag(ev *event.Event, subject, creator *entry) {
	c := &e.cases
	var set caseSet
	if subject != nil {
		set = e.covers(subject)
	}
	if creator != nil && creator != subject {
		set |= e.covers(creator)
	}
	if c.paths != 0 {
		set |= c.touching(ev)
	}
	if set == 0 {
		return
	}
	n := 0
	for _, slot := range c.order {
		if set>>slot&1 != 0 {
			c.matched[n] = c.slots[slot]
			n++
		}
	}
	ev.Cases, ev.Deep = c.matched[:n:n], set&c.deep != 0
}

// CaseRoots returns the running processes by which the members of each case of a
// subtree are found again in a new run: those whose parent is no member.
func (e *Enricher) CaseRoots() map[*event.Case][]event.ProcessKey {
	c := &e.cases
	if c.inherited == 0 {
		return nil
	}
	all := map[*event.Case][]event.ProcessKey{}
	add := func(key event.ProcessKey, set caseSet) {
		for left := set & c.inherited; left != 0; left &= left - 1 {
			k := c.slots[bits.TrailingZeros16(uint16(left))]
			all[k] = append(all[k], key)
		}
	}
	for _, p := range e.table.byKey {
		if p.Exited || p.member == 0 {
			continue
		}
		above := caseSet(0)
		if parent := e.table.byKey[p.Parent]; parent != nil && !parent.Exited {
			above = parent.member
		}
		add(p.Key, p.member&^above)
	}
	for key, set := range c.known {
		if e.table.byKey[key] == nil {
			add(key, set)
		}
	}
	for _, keys := range all {
		slices.SortFunc(keys, func(a, b event.ProcessKey) int {
			return cmp.Or(cmp.Compare(a.StartTime, b.StartTime), cmp.Compare(a.PID, b.PID))
		})
	}
	return all
}

// forget takes the members out of cases that are closed.
func (t *table) forget(gone caseSet) {
	if gone == 0 {
		return
	}
	for _, p := range t.byKey {
		p.member &^= gone
	}
}

// seed finds the members among the processes in the table: the roots and, over any
// number of generations, what was born below them.
func (t *table) seed() {
	if t.cases.rooted == 0 {
		return
	}
	t.seeding++
	var line []*entry
	for _, p := range t.byKey {
		line = line[:0]
		for a := p; a != nil && a.seeded != t.seeding; a = t.byKey[a.Parent] {
			a.seeded = t.seeding // which also ends a circle
			a.member |= t.cases.roots(a.Key)
			line = append(line, a)
		}
		for _, child := range slices.Backward(line) {
			if a := t.byKey[child.Parent]; a != nil {
				child.member |= a.member & t.cases.inherited
			}
		}
	}
}
