// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func scopeOf(kind event.CaseScopeKind, k event.ProcessKey) event.CaseScope {
	return event.CaseScope{Kind: kind, PID: k.PID, StartTicks: k.StartTime / tick}
}

func caseIDs(ev *event.Event) (ids []string) {
	for _, c := range ev.Cases {
		ids = append(ids, c.ID)
	}
	return ids
}

func (h *host) change(kind event.Kind, actor event.ProcessKey, path, path2 string) *event.Event {
	ev := h.at(kind, actor)
	ev.File = event.FileInfo{Path: []byte(path), Path2: []byte(path2)}
	return h.apply(ev)
}

// family is a process with a child and a grandchild, beside a stranger.
type family struct{ root, child, grandchild, stranger event.ProcessKey }

func (h *host) family() (f family) {
	f.root, f.stranger = key(10, 5*tick), key(99, 6*tick)
	h.exec(f.root, event.ProcessKey{}, "/bin/bash")
	h.exec(f.stranger, event.ProcessKey{}, "/bin/sh")
	f.child, _ = h.fork(f.root, 11)
	f.grandchild, _ = h.fork(f.child, 12)
	return f
}

func want(t *testing.T, ev *event.Event, ids ...string) {
	t.Helper()
	if diff := cmp.Diff(ids, caseIDs(ev)); diff != "" {
		t.Errorf("%s of %d (-want +got):\n%s", ev.Kind, ev.Actor.PID, diff)
	}
}

func TestCaseOfOneProcess(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	covered := h.SetCases([]*event.Case{{ID: "c", Scope: scopeOf(event.CaseProcess, f.child)}}, nil)
	if diff := cmp.Diff([]int{1}, covered); diff != "" {
		t.Errorf("covered %s", diff)
	}
	want(t, h.connect(f.child), "c")
	want(t, h.exec(f.child, f.root, "/bin/other"), "c")
	want(t, h.connect(f.root))
	want(t, h.connect(f.grandchild))
	young, ev := h.fork(f.child, 13)
	want(t, ev, "c") // it forks
	want(t, h.connect(young))
	want(t, h.exit(young, f.child))
	want(t, h.exit(f.child, f.root), "c")
	want(t, h.change(event.FileModify, f.child, "/late", ""), "c") // the bulk ring comes later

	// The pid is given to another process, which has no part in the case.
	again, ev := h.fork(f.stranger, f.child.PID)
	want(t, ev)
	want(t, h.connect(again))
}

func TestCaseOfASubtree(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	covered := h.SetCases([]*event.Case{{ID: "c", Scope: scopeOf(event.CaseSubtree, f.child)}}, nil)
	if diff := cmp.Diff([]int{2}, covered); diff != "" {
		t.Errorf("covered %s", diff)
	}
	want(t, h.connect(f.root))
	want(t, h.connect(f.stranger))
	want(t, h.connect(f.grandchild), "c")

	// The root ends and its child is handed to another; what that forks belongs to it.
	want(t, h.exit(f.child, f.root), "c")
	young, ev := h.fork(f.grandchild, 13)
	want(t, ev, "c")
	h.now += uint64(h.table.grace) + tick
	want(t, h.connect(young), "c")
	want(t, h.exit(f.grandchild, f.root), "c")
	orphan := h.execEvent(young, f.stranger, "/bin/orphan")
	want(t, h.apply(orphan), "c")
	last, _ := h.fork(young, 14)
	want(t, h.connect(last), "c")

	// Reused pids of the dead do not inherit.
	again, ev := h.fork(f.stranger, f.child.PID)
	want(t, ev)
	want(t, h.connect(again))
	h.SetCases(nil, nil)
	want(t, h.connect(last))

	// Another case may get the slot, and not the members.
	h.SetCases([]*event.Case{{ID: "d", Scope: scopeOf(event.CaseSubtree, f.stranger)}}, nil)
	want(t, h.connect(last))
	want(t, h.connect(again), "d")
}

// TestCaseOfAPathLate: an early event of a process belongs to the cases of what it ran then,
// and does not have the kernel collect for them any more.
func TestCaseOfAPathLate(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	early := h.at(event.FileCreate, f.child)
	h.exec(f.child, f.root, "/opt/new")
	list := []*event.Case{
		{ID: "old", Deep: true, Scope: event.CaseScope{Kind: event.CasePath, Text: "/bin/bash"}},
		{ID: "new", Scope: event.CaseScope{Kind: event.CasePath, Text: "/opt/new"}},
		{ID: "child", Scope: scopeOf(event.CaseProcess, f.child)},
	}
	h.SetCases(list, func(pid uint32, d Deep) {
		if pid == f.child.PID {
			t.Errorf("the kernel is to collect %d of what runs another program", d)
		}
	})
	want(t, h.apply(early), "old", "child")
	want(t, h.connect(f.child), "new", "child")
	h.SetCases(nil, nil)
	early.Cases = nil
	want(t, h.apply(early))
}

// TestCaseBeforeItsProcesses has a case of an earlier run, and a snapshot that shows
// children before their parents.
func TestCaseBeforeItsProcesses(t *testing.T) {
	h := newHost(t, nil)
	root, child, grandchild := key(30, 5*tick), key(20, 6*tick), key(10, 7*tick)
	c := &event.Case{ID: "c", Scope: scopeOf(event.CaseSubtree, root)}
	list := []*event.Case{c, {ID: "reused", Scope: event.CaseScope{Kind: event.CaseSubtree, PID: root.PID, StartTicks: 4}}}
	if diff := cmp.Diff([]int{0, 0}, h.SetCases(list, nil)); diff != "" {
		t.Errorf("covered %s", diff)
	}
	task := func(k, parent event.ProcessKey) *event.Event {
		ev := h.execEvent(k, parent, "/bin/sh")
		ev.Kind = event.Task
		return h.apply(ev)
	}
	task(grandchild, child)
	task(child, root)
	want(t, task(root, event.ProcessKey{}), "c")
	if diff := cmp.Diff([]int{3, 0}, h.SetCases(list, nil)); diff != "" {
		t.Errorf("covered %s", diff)
	}
	want(t, h.connect(grandchild), "c")
}

// TestCaseGoesOnInAnotherRun has a process of which no ancestor in the case is left, as
// an earlier run knew it, and another one that has its pid now.
func TestCaseGoesOnInAnotherRun(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	c := &event.Case{ID: "c", Scope: scopeOf(event.CaseSubtree, f.child)}
	h.SetCases([]*event.Case{c, {ID: "one", Scope: scopeOf(event.CaseProcess, f.stranger)}}, nil)
	young, _ := h.fork(f.grandchild, 13)
	roots := func(want ...event.ProcessKey) {
		t.Helper()
		if diff := cmp.Diff(map[*event.Case][]event.ProcessKey{c: want}, h.CaseRoots()); diff != "" {
			t.Errorf("roots (-want +got):\n%s", diff)
		}
	}
	roots(f.child)
	h.exit(f.child, f.root)
	roots(f.grandchild)
	other, _ := h.fork(f.grandchild, 14)
	h.exit(f.grandchild, f.root)
	roots(young, other)

	next := newHost(t, nil)
	next.now = h.now
	init := key(1, tick)
	stat := filepath.Join(next.proc, fmt.Sprint(young.PID), "stat")
	if err := os.Mkdir(filepath.Dir(stat), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, stat, statLine("sh", "1", fmt.Sprint(young.StartTime/tick)))
	c2 := &event.Case{ID: "c", Scope: c.Scope, Roots: []event.ProcessKey{young, key(15, 3*tick)}}
	next.SetCases([]*event.Case{c2}, nil)
	snapshot := func(k event.ProcessKey) *event.Event {
		ev := next.execEvent(k, init, "/bin/sh")
		ev.Kind = event.Task
		return next.apply(ev)
	}
	snapshot(init)
	want(t, snapshot(young), "c")
	want(t, snapshot(key(15, 4*tick))) // who has the pid now
	want(t, next.exec(young, init, "/bin/true"), "c")
	last, ev := next.fork(young, 16)
	want(t, ev, "c")
	if diff := cmp.Diff(map[*event.Case][]event.ProcessKey{c2: {young}}, next.CaseRoots()); diff != "" {
		t.Errorf("roots (-want +got):\n%s", diff)
	}
	want(t, next.exit(young, init), "c")
	want(t, next.connect(last), "c")
	next.SetCases(nil, nil)
	want(t, next.connect(last))
	if n := len(next.cases.known); n != 0 || next.CaseRoots() != nil {
		t.Errorf("%d processes are known after the case", n)
	}
}

// TestCaseOutlivesAFullTable: a member that is dropped from the table is one when it is
// met again, though its parent is gone.
func TestCaseOutlivesAFullTable(t *testing.T) {
	h := newHost(t, func(o *Options) { o.TableSize = 1 }) // the least there is
	f := h.family()
	h.SetCases([]*event.Case{{ID: "c", Scope: scopeOf(event.CaseSubtree, f.root)}}, nil)
	for i := range uint32(2 * tableMin) {
		h.exec(key(1000+i, 100*tick), event.ProcessKey{}, "/bin/sh")
	}
	if h.table.byKey[f.grandchild] != nil {
		t.Fatal("the table is not full")
	}
	want(t, h.connect(f.grandchild), "c")
	want(t, h.exit(f.child, f.root), "c")
	want(t, h.connect(f.stranger))
}

func TestCaseByAttributes(t *testing.T) {
	const id = "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"
	text := func(kind event.CaseScopeKind, s string) event.CaseScope { return event.CaseScope{Kind: kind, Text: s} }
	for _, tt := range []struct {
		name    string
		scope   event.CaseScope
		covered bool
	}{
		{"container", text(event.CaseContainer, id), true},
		{"container, short", text(event.CaseContainer, id[:12]), true},
		{"container, too short", text(event.CaseContainer, id[:11]), false},
		{"another container", text(event.CaseContainer, strings.Repeat("0", 64)), false},
		{"cgroup", text(event.CaseCgroup, "/system.slice/docker-"+id+".scope"), true},
		{"cgroup above", text(event.CaseCgroup, "/system.slice"), true},
		{"cgroup of half a name", text(event.CaseCgroup, "/system"), false},
		{"root cgroup", text(event.CaseCgroup, "/"), true},
		{"uid", event.CaseScope{Kind: event.CaseUser, UID: 1000}, true},
		{"effective uid", event.CaseScope{Kind: event.CaseUser, UID: 33}, true},
		{"login uid", event.CaseScope{Kind: event.CaseUser, UID: 500}, true},
		{"another uid", event.CaseScope{Kind: event.CaseUser, UID: 7}, false},
		{"no login", event.CaseScope{Kind: event.CaseUser, UID: event.Unset}, false},
		{"path", text(event.CasePath, "/opt/app/bin/tool"), true},
		{"path above", text(event.CasePath, "/opt/app"), true},
		{"path of half a name", text(event.CasePath, "/opt/a"), false},
		{"path below", text(event.CasePath, "/opt/app/bin/tool/x"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, nil)
			f := h.family()
			h.SetCases([]*event.Case{{ID: "c", Scope: tt.scope}}, nil)
			ids := []string{"c"}
			if !tt.covered {
				ids = nil
			}
			ev := h.execEvent(f.child, f.root, "/opt/app/bin/tool")
			ev.Exec.Cred.EUID, ev.Exec.LoginUID = 33, 500
			ev.Exec.CgroupPath, ev.Exec.CgroupID = []byte("/system.slice/docker-"+id+".scope"), 77
			want(t, h.apply(ev), ids...)
			want(t, h.connect(f.child), ids...)
			// A case that is opened later finds it as well.
			h.SetCases(nil, nil)
			want(t, h.connect(f.child))
			if got := h.SetCases([]*event.Case{{ID: "c", Scope: tt.scope}}, nil)[0]; (got > 0) != tt.covered {
				t.Errorf("covers %d processes", got)
			}
			want(t, h.connect(f.child), ids...)
		})
	}
}

func TestCaseOfAPathSeesFiles(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	h.SetCases([]*event.Case{{ID: "c", Scope: event.CaseScope{Kind: event.CasePath, Text: "/etc/app"}}}, nil)
	want(t, h.change(event.FileModify, f.root, "/etc/app/x", ""), "c")
	want(t, h.change(event.FileModify, f.root, "/etc/apple", ""))
	want(t, h.change(event.FileModify, f.root, "", ""))
	want(t, h.change(event.FileRename, f.root, "/tmp/x", "/etc/app/x"), "c")
	want(t, h.change(event.FileRename, f.root, "/etc/app/x", "/tmp/x"), "c")
	want(t, h.change(event.FileLink, f.root, "/tmp/x", "/etc/app"), "c")
	want(t, h.change(event.FileSymlink, f.root, "/tmp/x", "/etc/app")) // its text is no path
	want(t, h.change(event.FileDelete, event.ProcessKey{}, "/etc/app/x", ""), "c")

	ev := h.execEvent(f.child, f.root, "/bin/sh")
	ev.Exec.Filename = []byte("/etc/app/script")
	want(t, h.apply(ev), "c")
	want(t, h.connect(f.child)) // which is a shell
	h.exec(f.grandchild, f.child, "/etc/app/tool")
	want(t, h.exec(f.grandchild, f.child, "/bin/true"), "c") // it leaves
	want(t, h.connect(f.grandchild))
}

func TestSeveralCasesComeOldestFirst(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	list := []*event.Case{
		{ID: "a", Scope: scopeOf(event.CaseProcess, f.stranger)},
		{ID: "b", Scope: event.CaseScope{Kind: event.CaseUser, UID: 1000}},
		{ID: "c", Scope: scopeOf(event.CaseSubtree, f.root)},
	}
	h.SetCases(list, nil)
	want(t, h.connect(f.child), "b", "c")
	want(t, h.connect(f.stranger), "a", "b")
	// A new one gets the slot of the oldest, which is closed, and still comes last.
	list = append(list[1:], &event.Case{ID: "d", Scope: scopeOf(event.CaseSubtree, f.root)})
	h.SetCases(list, nil)
	want(t, h.connect(f.grandchild), "b", "c", "d")
	want(t, h.connect(f.stranger), "b")
}

// TestCloserOfAConnection: both the owner and who closes it are what the event is about.
func TestCloserOfAConnection(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	h.SetCases([]*event.Case{{ID: "c", Scope: scopeOf(event.CaseProcess, f.root)}}, nil)
	ev := h.at(event.TCPClose, f.stranger)
	ev.TCP.Closer = f.root
	want(t, h.apply(ev), "c")
	ev = h.at(event.TCPClose, f.stranger)
	ev.TCP.Closer = f.stranger
	want(t, h.apply(ev))
}

func TestUnknownProcessIsNobodys(t *testing.T) {
	h := newHost(t, nil)
	h.SetCases([]*event.Case{{ID: "root", Scope: event.CaseScope{Kind: event.CaseUser}}}, nil)
	want(t, h.connect(key(4711, 3*tick))) // gone before /proc was read: its zeroes are not root's
}

// TestDeepTellsTheKernel follows what the kernel is told of each process.
func TestDeepTellsTheKernel(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	told := map[uint32]Deep{}
	deepen := func(pid uint32, d Deep) {
		told[pid] = d
		if d == DeepOff {
			delete(told, pid)
		}
	}
	check := func(when string, want map[uint32]Deep) {
		t.Helper()
		if diff := cmp.Diff(want, told); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
	}
	tree := &event.Case{ID: "tree", Deep: true, Scope: scopeOf(event.CaseSubtree, f.child)}
	one := &event.Case{ID: "one", Deep: true, Scope: scopeOf(event.CaseProcess, f.child)}
	path := &event.Case{ID: "path", Deep: true, Scope: event.CaseScope{Kind: event.CasePath, Text: "/opt"}}
	shallow := &event.Case{ID: "shallow", Scope: scopeOf(event.CaseProcess, f.stranger)}
	h.SetCases([]*event.Case{one, shallow}, deepen)
	check("one process", map[uint32]Deep{11: DeepProcess})
	h.SetCases([]*event.Case{one, shallow, tree, path}, deepen)
	check("its tree", map[uint32]Deep{11: DeepSubtree, 12: DeepSubtree})
	young, ev := h.fork(f.child, 13)
	if !ev.Deep {
		t.Error("the fork is not wanted")
	}
	h.exec(f.stranger, event.ProcessKey{}, "/opt/x")
	check("a fork, and an exec into the path", map[uint32]Deep{11: DeepSubtree, 12: DeepSubtree, 13: DeepSubtree, 99: DeepSubtree})
	h.exec(f.stranger, event.ProcessKey{}, "/bin/x")
	h.exit(young, f.child)
	check("out of the path, and an exit", map[uint32]Deep{11: DeepSubtree, 12: DeepSubtree})
	if ev := h.connect(f.stranger); ev.Deep {
		t.Error("a case that is not deep wants everything")
	}
	h.SetCases([]*event.Case{shallow}, deepen)
	check("closed", map[uint32]Deep{})
}

func TestDeepLiftsTheLimitsOfHashing(t *testing.T) {
	h := newHost(t, func(o *Options) { o.HashMaxBytes, o.HashPerSecond = 1, 1e-9 })
	f := h.family()
	prog := filepath.Join(t.TempDir(), "prog")
	writeFile(t, prog, "content")
	run := func() *event.Process {
		ev := h.execEvent(f.child, f.root, prog)
		ev.Exec.Exe = fileAt(t, prog)
		return h.apply(ev).Subject
	}
	if p := run(); p.HashNote != noteSize {
		t.Errorf("without a case: %q %q, want too large", p.SHA256, p.HashNote)
	}
	h.SetCases([]*event.Case{{ID: "c", Deep: true, Scope: scopeOf(event.CaseSubtree, f.root)}}, nil)
	if p := run(); p.SHA256 == "" {
		t.Errorf("in a deep case: %q", p.HashNote)
	}
}

func TestSetCasesTakesNoMoreThanItCan(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	var list []*event.Case
	for i := range event.MaxCases + 3 {
		list = append(list, &event.Case{ID: fmt.Sprint(i), Scope: scopeOf(event.CaseProcess, f.root)})
	}
	if n := len(h.SetCases(list, nil)); n != len(list) {
		t.Errorf("%d answers", n)
	}
	if n := len(h.connect(f.root).Cases); n != event.MaxCases {
		t.Errorf("%d cases, want %d", n, event.MaxCases)
	}
}

// BenchmarkCases measures what open cases add to an event; compare with 0.
func BenchmarkCases(b *testing.B) {
	for _, n := range []int{0, 1, event.MaxCases} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			h := newHost(b, nil)
			f := h.family()
			kinds := []event.CaseScope{
				scopeOf(event.CaseSubtree, f.root),
				{Kind: event.CasePath, Text: "/opt/app"},
				{Kind: event.CaseUser, UID: 1000},
				{Kind: event.CaseCgroup, Text: "/user.slice"},
				scopeOf(event.CaseProcess, f.stranger),
			}
			var list []*event.Case
			for i := range n {
				list = append(list, &event.Case{ID: fmt.Sprint(i), Scope: kinds[i%len(kinds)]})
			}
			h.SetCases(list, nil)
			ev := h.at(event.FileModify, f.grandchild)
			ev.File.Path = []byte("/home/alice/src/project/file.c")
			b.ReportAllocs()
			for b.Loop() {
				ev.Cases = nil
				h.Apply(ev)
			}
			if (len(ev.Cases) > 0) != (n > 0) {
				b.Fatalf("%d cases match", len(ev.Cases))
			}
		})
	}
}

// TestTaggingAllocatesNothing is the benchmark's claim as a test.
func TestTaggingAllocatesNothing(t *testing.T) {
	h := newHost(t, nil)
	f := h.family()
	var list []*event.Case
	for i := range event.MaxCases {
		list = append(list, &event.Case{ID: fmt.Sprint(i), Scope: scopeOf(event.CaseSubtree, f.root)})
	}
	h.SetCases(list, nil)
	ev := h.at(event.FileModify, f.child)
	if n := testing.AllocsPerRun(100, func() { h.Apply(ev) }); n != 0 {
		t.Errorf("%v allocations for an event in %d cases", n, event.MaxCases)
	}
}
