// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const bootID = "2899dae4-4fa4-4eef-95b6-6bc95325f61a"

// host is an Enricher over a scratch /proc and /etc.
type host struct {
	*Enricher
	t    testing.TB
	proc string
	now  uint64
}

func newHost(t testing.TB, change func(*Options)) *host {
	t.Helper()
	etc, proc := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(etc, "passwd"), "root:x:0:0::\nalice:x:1000:1000::\nwww-data:x:33:33::\n")
	writeFile(t, filepath.Join(etc, "group"), "root:x:0:\nusers:x:1000:\n")
	// However busy the machine is, what can be hashed is.
	o := Options{Host: event.Host{BootID: bootID}, HashWait: time.Minute, Registerer: prometheus.NewPedanticRegistry()}
	if change != nil {
		change(&o)
	}
	h := &host{t: t, proc: proc, now: 1000 * tick}
	h.Enricher = newEnricher(o.withDefaults(), procfs(proc), etc)
	h.hashes.now = later
	h.clock.read = func() (int64, int64) { return int64(h.now), int64(h.now) + 1e18 }
	h.clock.measure()
	t.Cleanup(h.Close)
	return h
}

// at stamps an event with a new kernel time.
func (h *host) at(kind event.Kind, actor event.ProcessKey) *event.Event {
	h.now += tick
	return &event.Event{Kind: kind, KTime: h.now, Actor: actor, TID: actor.PID}
}

func (h *host) apply(ev *event.Event) *event.Event {
	h.Prefetch(ev)
	h.Apply(ev)
	return ev
}

func (h *host) execEvent(actor, parent event.ProcessKey, path string) *event.Event {
	ev := h.at(event.Exec, actor)
	name := path[strings.LastIndexByte(path, '/')+1:]
	ev.Exec = event.ExecInfo{
		Parent: parent, NSPID: actor.PID, NS: event.Namespaces{PID: initialPIDNamespace, Mnt: 1},
		Cred: event.Cred{UID: 1000, GID: 1000}, LoginUID: 1000, SessionID: 3,
		ExePath: []byte(path), Comm: []byte(name), CWD: []byte("/home/alice"), TTY: []byte("pts/1"),
		CgroupID: 5, CgroupPath: []byte("/user.slice"), Argv: []byte(name + "\x00"), ArgvSize: uint32(len(name) + 1),
	}
	return ev
}

func (h *host) exec(actor, parent event.ProcessKey, path string) *event.Event {
	return h.apply(h.execEvent(actor, parent, path))
}

func (h *host) fork(parent event.ProcessKey, pid uint32) (event.ProcessKey, *event.Event) {
	ev := h.at(event.Fork, parent)
	child := key(pid, ev.KTime)
	ev.Fork = event.ForkInfo{Child: child, CgroupID: 5, NSPID: pid, PIDNS: initialPIDNamespace, Comm: []byte("forked")}
	return child, h.apply(ev)
}

func (h *host) exit(actor, parent event.ProcessKey) *event.Event {
	ev := h.at(event.Exit, actor)
	ev.Exit = event.ExitInfo{Parent: parent, Comm: []byte("exiting")}
	return h.apply(ev)
}

func (h *host) connect(actor event.ProcessKey) *event.Event {
	ev := h.at(event.TCPConnect, actor)
	return h.apply(ev)
}

func paths(ps []*event.Process) (out []string) {
	for _, p := range ps {
		out = append(out, p.Path)
	}
	return out
}

func TestApplyExec(t *testing.T) {
	h := newHost(t, nil)
	shell := key(10, 5*tick)
	h.exec(shell, event.ProcessKey{}, "/bin/bash")
	child, _ := h.fork(shell, 11)
	prog := filepath.Join(t.TempDir(), "prog")
	writeFile(t, prog, "content")

	ev := h.execEvent(child, shell, prog)
	ev.Exec.Exe = fileAt(t, prog)
	ev.Exec.Exe.UID = 33
	ev.Exec.Argv = []byte("prog\x00a b\x00")
	ev.Exec.CgroupPath, ev.Exec.CgroupID = []byte("/docker/"+strings.Repeat("ab", 32)), 6
	ev.Exec.Flags = event.FlagSecureExec
	h.apply(ev)

	want := &event.Process{
		Key: child, Parent: shell, NSPID: 11, CPID: commonProcessID(parseUUID(bootID), initialPIDNamespace, child.StartTime, 11),
		Comm: "prog", Path: prog, CmdLine: "prog 'a b'", CWD: "/home/alice", TTY: "pts/1",
		File: ev.Exec.Exe, Flags: event.FlagSecureExec, SHA256: sha("content"),
		Cred: ev.Exec.Cred, User: "alice", Group: "users", Owner: "www-data", NS: ev.Exec.NS,
		CgroupID: 6, CgroupPath: "/docker/" + strings.Repeat("ab", 32),
		Container: &event.Container{ID: strings.Repeat("ab", 32), Runtime: "docker"},
		LoginUID:  1000, SessionID: 3,
	}
	if diff := cmp.Diff(want, ev.Subject); diff != "" {
		t.Errorf("Subject (-want +got):\n%s", diff)
	}
	if ev.Parent == nil || ev.Parent.Path != "/bin/bash" || ev.Creator != nil {
		t.Errorf("Parent = %+v, Creator = %v", ev.Parent, ev.Creator)
	}
	if diff := cmp.Diff([]string{"/bin/bash"}, paths(ev.Ancestors)); diff != "" {
		t.Errorf("Ancestors (-want +got):\n%s", diff)
	}
	if ev.Exec.OldPath != "/bin/bash" {
		t.Errorf("OldPath = %q, want that of the forked shell", ev.Exec.OldPath)
	}
	if want := int64(ev.KTime) + 1e18; ev.Time != want {
		t.Errorf("Time = %d, want %d", ev.Time, want)
	}
	if again := h.exec(child, shell, "/bin/true"); again.Exec.OldPath != prog || again.Subject.SHA256 != "" {
		t.Errorf("after a second exec: OldPath %q, SHA256 %q", again.Exec.OldPath, again.Subject.SHA256)
	}
	// The record's memory is the ring's: nothing may point into it.
	for _, b := range [][]byte{ev.Exec.Comm, ev.Exec.CWD, ev.Exec.TTY, ev.Exec.CgroupPath, ev.Exec.Argv} {
		clear(b)
	}
	if p := h.connect(child).Subject; p.CWD != "/home/alice" || p.TTY != "pts/1" {
		t.Errorf("the process changed with the record: %+v", p)
	}
}

func TestApplyFork(t *testing.T) {
	h := newHost(t, nil)
	shell := key(10, 5*tick)
	h.exec(shell, event.ProcessKey{}, "/bin/bash")
	child, ev := h.fork(shell, 11)

	want := *h.table.use(shell)
	got := ev.Subject
	if got.Key != child || got.Parent != shell || got.NSPID != 11 || got.Comm != "forked" || got.CPID == "" || got.CPID == want.CPID {
		t.Errorf("child = %+v", got)
	}
	if got.Path != want.Path || got.CmdLine != want.CmdLine || got.Cred != want.Cred || got.CgroupPath != "/user.slice" || got.User != "alice" {
		t.Errorf("child = %+v, does not inherit %+v", got, want.Process)
	}
	if ev.Creator != ev.Parent || ev.Creator.Key != shell {
		t.Errorf("Creator = %v, Parent = %v", ev.Creator, ev.Parent)
	}

	t.Run("into another control group", func(t *testing.T) {
		h.exec(key(99, 98*tick), event.ProcessKey{}, "/bin/x").Subject.CgroupID = 5
		other := h.execEvent(key(98, 98*tick), event.ProcessKey{}, "/bin/x")
		other.Exec.CgroupID, other.Exec.CgroupPath = 77, []byte("/libpod_parent/libpod-"+strings.Repeat("cd", 32))
		h.apply(other)
		for id, want := range map[uint64]string{77: strings.Repeat("cd", 32), 78: ""} {
			ev := h.at(event.Fork, shell)
			ev.Fork = event.ForkInfo{Child: key(uint32(id), ev.KTime), NSPID: uint32(id), CgroupID: id}
			h.apply(ev)
			got := ""
			if c := ev.Subject.Container; c != nil {
				got = c.ID
			}
			if got != want || ev.Subject.CgroupID != id || want == "" && ev.Subject.CgroupPath != "" {
				t.Errorf("group %d: container %q, path %q", id, got, ev.Subject.CgroupPath)
			}
		}
	})
	t.Run("into another pid namespace", func(t *testing.T) {
		for pid, nspid := range map[uint32]uint32{200: 1, 201: 14} {
			ev := h.at(event.Fork, shell)
			child := key(pid, ev.KTime)
			ev.Fork = event.ForkInfo{Child: child, NSPID: nspid, PIDNS: 4026532999, CgroupID: 5}
			want := commonProcessID(h.boot, 4026532999, child.StartTime, nspid)
			if h.apply(ev); ev.Subject.CPID != want || ev.Subject.NS.PID != 4026532999 {
				t.Errorf("CPID = %q in namespace %d, want %q", ev.Subject.CPID, ev.Subject.NS.PID, want)
			}
		}
	})
	t.Run("known better from a snapshot", func(t *testing.T) {
		task := h.execEvent(key(300, h.now+10*tick), event.ProcessKey{}, "/bin/late")
		task.Kind = event.Task
		h.apply(task)
		ev := h.at(event.Fork, shell)
		ev.Fork = event.ForkInfo{Child: task.Actor, NSPID: 300}
		if h.apply(ev); ev.Subject.Path != "/bin/late" || ev.Subject.Parent != shell {
			t.Errorf("child = %+v", ev.Subject)
		}
	})
}

func TestApplyExit(t *testing.T) {
	h := newHost(t, nil)
	shell := key(10, 5*tick)
	h.exec(shell, event.ProcessKey{}, "/bin/bash")
	ev := h.exit(shell, key(1, 1))
	if p := ev.Subject; p.Path != "/bin/bash" || !p.Exited || p.ExitTime != ev.KTime || p.Parent != key(1, 1) || p.Partial {
		t.Errorf("Subject = %+v", p)
	}
	// A late connection event still finds it.
	if p := h.connect(shell).Subject; p.Path != "/bin/bash" || !p.Exited {
		t.Errorf("after its exit: %+v", p)
	}
	// One that was never seen.
	ev = h.exit(key(4000, 7), shell)
	if p := ev.Subject; !p.Partial || !p.Exited || p.Comm != "exiting" || p.LoginUID != event.Unset || ev.Parent == nil || ev.Parent.Key != shell {
		t.Errorf("unknown process: %+v, parent %v", p, ev.Parent)
	}
	if h.exit(event.ProcessKey{}, shell).Subject != nil {
		t.Error("an exit of nobody has a subject")
	}
}

// TestApplyLineage: a daemon stays the child of the shell that started it, also
// when the kernel hands it to init.
func TestApplyLineage(t *testing.T) {
	h := newHost(t, nil)
	initial, shell := key(1, 1), key(10, 5*tick)
	h.exec(initial, event.ProcessKey{}, "/sbin/init")
	h.exec(shell, initial, "/bin/bash")
	between, _ := h.fork(shell, 11)
	daemon, _ := h.fork(between, 12)
	h.exit(between, shell)
	ev := h.exec(daemon, initial, "/usr/sbin/daemon") // the kernel says init
	if diff := cmp.Diff([]string{"/bin/bash", "/bin/bash", "/sbin/init"}, paths(ev.Ancestors)); diff != "" {
		t.Errorf("Ancestors (-want +got):\n%s", diff)
	}
	if ev.Parent == nil || ev.Parent.Key != between || !ev.Parent.Exited {
		t.Errorf("Parent = %+v", ev.Parent)
	}
	// With CLONE_PARENT the creator is not the parent, and lives.
	sibling, _ := h.fork(shell, 13)
	if ev := h.exec(sibling, initial, "/bin/sibling"); ev.Parent == nil || ev.Parent.Key != initial {
		t.Errorf("Parent = %+v, want init", ev.Parent)
	}
}

func TestApplyBoundsAncestors(t *testing.T) {
	h := newHost(t, nil)
	p := key(1, 1)
	h.exec(p, event.ProcessKey{}, "/bin/0")
	for i := range uint32(40) {
		p, _ = h.fork(p, i+2)
	}
	if ev := h.connect(p); len(ev.Ancestors) != maxAncestors {
		t.Errorf("%d ancestors, bound %d", len(ev.Ancestors), maxAncestors)
	}
	// Nonsense from the kernel must not lead around in circles.
	self := key(500, 5)
	if ev := h.exec(self, self, "/bin/x"); len(ev.Ancestors) != 0 {
		t.Errorf("a process is its own ancestor: %v", paths(ev.Ancestors))
	}
	a, b := key(600, 5), key(601, 5)
	h.exec(a, b, "/bin/a")
	h.exec(b, a, "/bin/b")
	if ev := h.exec(a, b, "/bin/a"); len(ev.Ancestors) > maxAncestors {
		t.Errorf("%d ancestors", len(ev.Ancestors))
	}
}

// TestApplyPIDReuse: the same pid with another start time is another process.
func TestApplyPIDReuse(t *testing.T) {
	h := newHost(t, nil)
	first, second := key(10, 5*tick), key(10, 50*tick)
	h.exec(first, event.ProcessKey{}, "/bin/first")
	ev := h.exec(second, event.ProcessKey{}, "/bin/second")
	if ev.Exec.OldPath != "" {
		t.Errorf("OldPath = %q is another process's", ev.Exec.OldPath)
	}
	if p := h.connect(first).Subject; p.Path != "/bin/first" || !p.Exited {
		t.Errorf("first = %+v", p)
	}
	if p := h.connect(second).Subject; p.Path != "/bin/second" || p.Exited {
		t.Errorf("second = %+v", p)
	}
}

// TestApplyThreadExec: the kernel gives an exec in another thread the pid and the
// start time of the leader, so it is the same process.
func TestApplyThreadExec(t *testing.T) {
	h := newHost(t, nil)
	p := key(10, 5*tick)
	h.exec(p, event.ProcessKey{}, "/bin/java")
	ev := h.execEvent(p, event.ProcessKey{}, "/bin/new")
	ev.TID = 17
	if h.apply(ev); ev.Exec.OldPath != "/bin/java" || ev.Subject.Key != p {
		t.Errorf("OldPath = %q, Subject = %+v", ev.Exec.OldPath, ev.Subject)
	}
	if h.table.len() != 1 {
		t.Errorf("%d processes", h.table.len())
	}
}

// TestApplySnapshot: a process that ran before the sensor gets its arguments from
// /proc, unless its pid has another owner by now.
func TestApplySnapshot(t *testing.T) {
	h := newHost(t, nil)
	task := func(k event.ProcessKey, flags event.ProcessFlags) *event.Event {
		ev := h.execEvent(k, event.ProcessKey{}, "/usr/bin/python3")
		ev.Kind, ev.Exec.Argv, ev.Exec.ArgvSize, ev.Exec.Flags = event.Task, nil, 0, flags
		return h.apply(ev)
	}
	p := key(10, 5*tick+1)
	addProc(t, h.proc, "10", map[string]string{"stat": statLine("python3", "1", "5"), "cmdline": "python3\x00-c\x00import os\x00"})
	ev := task(p, 0)
	if got := string(ev.Exec.Argv); got != "python3\x00-c\x00import os\x00" || ev.Exec.ArgvSize != uint32(len(got)) || ev.Subject.CmdLine != "python3 -c 'import os'" {
		t.Errorf("Argv = %q of %d, CmdLine = %q", got, ev.Exec.ArgvSize, ev.Subject.CmdLine)
	}
	if ev.Exec.OldPath != "" || ev.Subject.Partial {
		t.Errorf("OldPath = %q, Subject = %+v", ev.Exec.OldPath, ev.Subject)
	}
	if ev := task(key(10, 9*tick), 0); len(ev.Exec.Argv) > 0 || ev.Subject.CmdLine != "" {
		t.Errorf("arguments of another process: %q", ev.Exec.Argv)
	}
	if ev := task(key(10, 5*tick+2), event.FlagKThread); len(ev.Exec.Argv) > 0 {
		t.Errorf("arguments of a kernel thread: %q", ev.Exec.Argv)
	}
	// An exec that was in the ring before the snapshot did not replace what the
	// snapshot shows.
	early := h.execEvent(p, event.ProcessKey{}, "/bin/early")
	early.KTime = ev.KTime - 1
	if h.apply(early); early.Exec.OldPath != "" {
		t.Errorf("OldPath = %q", early.Exec.OldPath)
	}
	addProc(t, h.proc, "20", map[string]string{"stat": statLine("x", "1", "7"), "cmdline": strings.Repeat("a\x00", argvMax)})
	if ev := task(key(20, 7*tick), 0); ev.Exec.Flags&event.FlagArgvTruncated == 0 || len(ev.Exec.Argv) > argvMax {
		t.Errorf("%d bytes of arguments, flags %b", len(ev.Exec.Argv), ev.Exec.Flags)
	}
}

// TestUnlearn has a snapshot show programs that were begun in events which come after it,
// as when a new process of the sensor reads what waits in the rings.
func TestUnlearn(t *testing.T) {
	h := newHost(t, nil)
	shell, child := key(10, 5*tick), key(11, 7*tick)

	early := h.at(event.TCPConnect, shell)
	forked := h.at(event.Fork, shell)
	forked.Fork = event.ForkInfo{Child: child, CgroupID: 5, NSPID: 11, PIDNS: initialPIDNamespace, Comm: []byte("sh")}
	inChild := h.at(event.TCPConnect, child)
	childExec := h.execEvent(child, shell, "/bin/curl")
	shellExec := h.execEvent(shell, event.ProcessKey{}, "/bin/after")
	for _, p := range []struct {
		key  event.ProcessKey
		path string
	}{{child, "/bin/curl"}, {shell, "/bin/after"}} {
		ev := h.execEvent(p.key, event.ProcessKey{}, p.path)
		ev.Kind = event.Task
		h.apply(ev)
	}
	h.Unlearn(child, forked.KTime)
	h.Unlearn(child, childExec.KTime)
	h.Unlearn(shell, shellExec.KTime)

	if p := h.apply(early).Subject; p == nil || p.Path != "" || p.CmdLine != "" || !p.Partial || p.Key != shell {
		t.Errorf("before the exec: %+v", p)
	}
	h.apply(forked)
	if p := h.apply(inChild).Subject; p == nil || p.Path != "" || p.Key != child {
		t.Errorf("between fork and exec: %+v", p)
	}
	if p := h.apply(childExec).Subject; p.Path != "/bin/curl" || p.Partial {
		t.Errorf("after the exec: %+v", p)
	}
	if ev := h.apply(shellExec); ev.Subject.Path != "/bin/after" || ev.Exec.OldPath != "" {
		t.Errorf("after the shell's exec: %+v", ev.Subject)
	}
	if p := h.connect(child).Parent; p == nil || p.Path != "/bin/after" {
		t.Errorf("parent %+v", p)
	}
	// What a snapshot does not know better stays.
	h.Unlearn(shell, h.now+tick)
	h.Unlearn(key(99, tick), 0)
	if p := h.connect(shell).Subject; p.Path != "/bin/after" {
		t.Errorf("unlearned for a later exec: %+v", p)
	}
}

// TestApplyLate has events come after execs that they preceded, as files and connections do:
// they are told of the program of then.
func TestApplyLate(t *testing.T) {
	h := newHost(t, nil)
	dir := t.TempDir()
	actor, unknown := key(10, 5*tick), key(20, 6*tick)
	exec := func(name, content string, uid uint32) *event.Event {
		path := filepath.Join(dir, name)
		writeFile(t, path, content)
		ev := h.execEvent(actor, event.ProcessKey{}, path)
		ev.Exec.Exe, ev.Exec.Cred = fileAt(t, path), event.Cred{UID: uid, GID: uid}
		return ev
	}
	first := exec("first", "one", 1000)
	child, _ := key(11, 7*tick), h.at(event.Fork, actor)
	early, ofChild := h.at(event.FileCreate, actor), h.at(event.FileCreate, child)
	before := h.at(event.TCPConnect, unknown)
	second := exec("second", "two", 33)
	with, between := h.at(event.FileCreate, actor), h.at(event.FileCreate, actor)
	with.KTime = second.KTime
	third := exec("third", "three", 0)

	h.apply(first)
	forked := h.at(event.Fork, actor)
	forked.KTime, forked.Fork = early.KTime, event.ForkInfo{Child: child, CgroupID: 5, NSPID: 11, PIDNS: initialPIDNamespace, Comm: []byte("first")}
	h.apply(forked)
	h.apply(second)
	check := func(ev *event.Event, name, content, user string) {
		t.Helper()
		p := h.apply(ev).Subject
		if p.Key != actor || p.Path != filepath.Join(dir, name) || p.CmdLine != name || p.SHA256 != sha(content) || p.User != user || p.CPID == "" {
			t.Errorf("at %d: %+v, want that of %s", ev.KTime, p, name)
		}
	}
	check(early, "first", "one", "alice")
	check(between, "second", "two", "www-data")
	check(with, "second", "two", "www-data")
	if p := h.apply(ofChild).Parent; p == nil || p.CmdLine != "first" {
		t.Errorf("parent of an early event: %+v", p)
	}
	if allocs := testing.AllocsPerRun(100, func() { h.Apply(early) }); allocs > 0 {
		t.Errorf("an early event costs %v allocations", allocs)
	}
	h.apply(third)
	check(early, "second", "two", "www-data") // no further back than the last exec
	check(between, "second", "two", "www-data")
	check(h.at(event.FileCreate, actor), "third", "three", "root")

	// Its end does not take that away, being no more than an ancestor does.
	h.exit(actor, event.ProcessKey{})
	check(between, "second", "two", "www-data")
	if !between.Subject.Exited {
		t.Error("it is not known to have ended")
	}
	h.now += uint64(time.Hour)
	h.connect(child)
	if p := h.table.byKey[actor]; p == nil || p.before != nil {
		t.Errorf("past its grace time: %+v", p)
	}

	h.exec(unknown, event.ProcessKey{}, "/bin/x")
	if p := h.apply(before).Subject; p.Key != unknown || p.Path != "" || p.CPID == "" || !p.Partial || p.LoginUID != event.Unset {
		t.Errorf("before the first exec that was seen: %+v", p)
	}
}

func TestApplyTCP(t *testing.T) {
	h := newHost(t, nil)
	server, other := key(10, 5*tick), key(11, 6*tick)
	h.exec(server, event.ProcessKey{}, "/bin/server")
	h.exec(other, server, "/bin/other")
	ev := h.at(event.TCPClose, server)
	ev.TCP.Closer = other
	h.apply(ev)
	if ev.Subject.Path != "/bin/server" || ev.Creator == nil || ev.Creator.Path != "/bin/other" {
		t.Errorf("Subject = %v, Creator = %v", ev.Subject, ev.Creator)
	}
	ev = h.at(event.TCPClose, server)
	ev.TCP.Closer = server
	if h.apply(ev); ev.Creator != nil {
		t.Errorf("Creator = %v, the owner itself", ev.Creator)
	}
	if ev := h.connect(event.ProcessKey{}); ev.Subject != nil || ev.Parent != nil || ev.Ancestors != nil || ev.Time == 0 {
		t.Errorf("an event of nobody: %+v", ev)
	}
}

// TestApplyUnknownActor: a process that was not seen to start is entered with what
// /proc knows, if its start time is the expected one.
func TestApplyFile(t *testing.T) {
	h := newHost(t, nil)
	actor := event.ProcessKey{PID: 20, StartTime: 2000}
	h.exec(actor, event.ProcessKey{}, "/bin/sh")
	ev := h.at(event.FileChown, actor)
	ev.File = event.FileInfo{File: event.File{Ino: 7, UID: 0}, Flags: event.FileNewUID, NewUID: 1000}
	ev.TCP.Closer = event.ProcessKey{PID: 99, StartTime: 1} // of an event before this one
	h.apply(ev)
	if ev.Subject == nil || ev.Subject.Path != "/bin/sh" || ev.Creator != nil {
		t.Errorf("subject %+v, creator %+v", ev.Subject, ev.Creator)
	}
	if ev.File.Owner != "root" || ev.File.NewOwner != "alice" {
		t.Errorf("owners %q and %q", ev.File.Owner, ev.File.NewOwner)
	}
	ev = h.at(event.FileCreate, actor)
	h.apply(ev)
	if ev.File.Owner != "" || ev.File.NewOwner != "" {
		t.Errorf("what is not there yet belongs to %q, %q", ev.File.Owner, ev.File.NewOwner)
	}
}

func TestApplyUnknownActor(t *testing.T) {
	h := newHost(t, nil)
	parent := key(42, 40*tick+9)
	h.exec(parent, event.ProcessKey{}, "/bin/parent")
	exe := filepath.Join(t.TempDir(), "prog")
	writeFile(t, exe, "content")
	addProc(t, h.proc, "42", map[string]string{"stat": statLine("parent", "1", "40")})
	addProc(t, h.proc, "50", map[string]string{
		"stat": statLine("prog", "42", "60"), "exe": "-> " + exe, "cmdline": "prog\x00", "status": "NSpid:\t50\nUid:\t33\t33\t33\t33\n",
		"ns/pid": "-> pid:[4026531836]", "cgroup": "0::/docker/" + strings.Repeat("ab", 32) + "\n",
	})
	known := key(50, 60*tick+5)
	ev := h.connect(known)
	p := ev.Subject
	if !p.Partial || p.Path != exe || p.Comm != "prog" || p.CmdLine != "prog" || p.User != "www-data" || p.Container == nil || p.CPID == "" {
		t.Errorf("Subject = %+v", p)
	}
	if ev.Parent == nil || ev.Parent.Key != parent {
		t.Errorf("Parent = %v", ev.Parent)
	}
	// Its hash is not waited for, and there when it is done.
	<-h.hashed(known)
	if p := h.connect(known).Subject; p.SHA256 != sha("content") || p.HashNote != "" {
		t.Errorf("hash %q, %q", p.SHA256, p.HashNote)
	}
	stranger := h.connect(key(50, 61*tick))
	if p := stranger.Subject; !p.Partial || p.Path != "" || p.CPID != "" || p.LoginUID != event.Unset {
		t.Errorf("a process that is gone: %+v", p)
	}
	if got := testutil.ToFloat64(h.metrics.partial); got != 2 {
		t.Errorf("enrich_partial_processes_total = %v, want 2", got)
	}
	// Its exec makes it whole.
	if p := h.exec(known, parent, "/bin/new").Subject; p.Partial || p.Path != "/bin/new" {
		t.Errorf("after an exec: %+v", p)
	}
	// The unknown parent of an exec is looked up too.
	addProc(t, h.proc, "70", map[string]string{"stat": statLine("sh", "42", "65"), "status": "NSpid:\t70\n", "ns/pid": "-> pid:[4026531836]"})
	if ev := h.exec(key(71, 70*tick), key(70, 65*tick), "/bin/x"); ev.Parent == nil || ev.Parent.Comm != "sh" || !ev.Parent.Partial || len(ev.Ancestors) != 2 {
		t.Errorf("Parent = %+v", ev.Parent)
	}
	if ev := h.exec(key(72, 71*tick), key(9999, 1), "/bin/x"); ev.Parent != nil {
		t.Errorf("Parent = %+v, a process that nobody knows", ev.Parent)
	}
}

// hashed is closed when the hash of a process is there.
func (h *host) hashed(k event.ProcessKey) <-chan struct{} {
	if job := h.table.use(k).job; job != nil {
		return job.done
	}
	done := make(chan struct{})
	close(done)
	return done
}

// TestApplyWaitsNoLongerThanItMay blocks the reader of executables for good: the
// events come through without a hash, which a later event then has.
func TestApplyWaitsNoLongerThanItMay(t *testing.T) {
	const events = 20
	h := newHost(t, func(o *Options) { o.HashWait = time.Millisecond })
	release := make(chan struct{})
	h.hashes.read = func(r io.Reader, b []byte) (int, error) { <-release; return io.ReadFull(r, b) }
	dir := t.TempDir()
	var batch []*event.Event
	for i := range uint32(events) {
		path := filepath.Join(dir, itoa(i))
		writeFile(t, path, itoa(i))
		ev := h.execEvent(key(100+i, tick), event.ProcessKey{}, path)
		ev.Exec.Exe = fileAt(t, path)
		batch = append(batch, ev)
		h.Prefetch(ev)
	}
	for _, ev := range batch {
		h.Apply(ev)
		if ev.Subject.HashNote != notePending || ev.Subject.SHA256 != "" {
			t.Fatalf("hash %q, %q; want pending", ev.Subject.SHA256, ev.Subject.HashNote)
		}
	}
	if h.left != 0 {
		t.Errorf("%v of the wait is left", h.left)
	}
	h.EndBatch()
	if h.left != time.Millisecond {
		t.Errorf("the next batch may wait %v", h.left)
	}
	child, _ := h.fork(batch[0].Actor, 500)
	if got := testutil.ToFloat64(h.metrics.hashes[notePending]); got != events {
		t.Errorf("enrich_hashes_total{result=pending} = %v, want %d", got, events)
	}
	close(release)
	for i, ev := range batch {
		<-h.hashed(ev.Actor)
		if p := h.connect(ev.Actor).Subject; p.SHA256 != sha(itoa(uint32(i))) || p.HashNote != "" {
			t.Errorf("later: hash %q, %q", p.SHA256, p.HashNote)
		}
	}
	if p := h.connect(child).Subject; p.SHA256 != sha("0") {
		t.Errorf("child of a process that was pending: hash %q, %q", p.SHA256, p.HashNote)
	}
}

// TestApplyNegativeWait never waits, also not for what would be there at once.
func TestApplyNegativeWait(t *testing.T) {
	h := newHost(t, func(o *Options) { o.HashWait = -1 })
	release := make(chan struct{})
	defer close(release)
	h.hashes.read = func(io.Reader, []byte) (int, error) { <-release; return 0, io.EOF }
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	ev := h.execEvent(key(100, tick), event.ProcessKey{}, path)
	ev.Exec.Exe = fileAt(t, path)
	if h.apply(ev); ev.Subject.HashNote != notePending {
		t.Errorf("note = %q", ev.Subject.HashNote)
	}
}

func TestApplyBoundsCommandLine(t *testing.T) {
	h := newHost(t, nil)
	for _, argv := range []string{
		strings.Repeat("a", 100_000) + "\x00", strings.Repeat("\x00", 9000), strings.Repeat("ü", 5000) + "\x00", strings.Repeat("\xff", 5000) + "\x00",
	} {
		ev := h.execEvent(key(10, tick), event.ProcessKey{}, "/bin/x")
		ev.Exec.Argv = []byte(argv)
		line := h.apply(ev).Subject.CmdLine
		if len(line) > event.MaxCmdLine || len(line) < event.MaxCmdLine-4 || strings.ToValidUTF8(line, "") != line {
			t.Errorf("command line of %d bytes ends in %q", len(line), line[len(line)-8:])
		}
	}
}

func TestApplyLeavesOwnEventsAlone(t *testing.T) {
	h := newHost(t, nil)
	ev := &event.Event{Kind: event.Lifecycle, Time: 7, Self: &event.SelfInfo{Name: "x"}}
	h.Prefetch(ev)
	if h.Apply(ev); ev.Time != 7 || ev.Subject != nil || h.table.len() != 0 {
		t.Errorf("Time = %d, Subject = %v, %d processes", ev.Time, ev.Subject, h.table.len())
	}
}

func TestTableIsBounded(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	h := newHost(t, func(o *Options) { o.TableSize, o.Registerer = 100, reg })
	before := metricstest.Gather(t, reg)
	parent := key(1, 1)
	h.exec(parent, event.ProcessKey{}, "/sbin/init")
	for i := range uint32(1000) {
		child, _ := h.fork(parent, i+2)
		if i%3 == 0 {
			h.exit(child, parent)
		}
		if h.table.len() > 100 {
			t.Fatalf("%d processes, bound 100", h.table.len())
		}
	}
	h.EndBatch()
	running, exited := testutil.ToFloat64(h.metrics.evicted), testutil.ToFloat64(h.metrics.released)
	if running+exited != 1001-100 || exited == 0 || testutil.ToFloat64(h.metrics.processes) != 100 {
		t.Errorf("evicted %v running and %v exited, %v are left", running, exited, testutil.ToFloat64(h.metrics.processes))
	}
	if h.table.use(parent) == nil {
		t.Error("the parent in use was evicted")
	}
	h.connect(key(5000, 1)) // not seen to start
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "enrich_evicted_total", "enrich_processes", "enrich_partial_processes_total")
}

// TestLateEventsOfTheGone: processes that ended before the table forgot them, and are met once
// more, as when a connection of theirs closes late, do not take the room of what is needed.
func TestLateEventsOfTheGone(t *testing.T) {
	h := newHost(t, func(o *Options) { o.TableSize = tableMin })
	shell := key(10, 5*tick)
	h.exec(shell, event.ProcessKey{}, "/bin/bash")
	daemon, _ := h.fork(shell, 11)
	h.exit(shell, event.ProcessKey{})
	h.now += uint64(2 * time.Minute)
	for i := range uint32(200) {
		ev := h.at(event.TCPClose, key(1000+i, tick))
		ev.TCP.Closer = ev.Actor
		if p := h.apply(ev).Subject; p == nil || p.Key != ev.Actor || !p.Partial || !p.Exited || p.ExitTime != ev.KTime {
			t.Fatalf("the process of a late close: %+v", p)
		}
	}
	if p := h.connect(daemon).Parent; p == nil || p.Path != "/bin/bash" {
		t.Errorf("the parent of a running process was given up for processes that are gone: %+v", p)
	}
	h.now += uint64(2 * time.Minute)
	if h.connect(daemon); h.table.len() != 2 {
		t.Errorf("%d processes are left, want the daemon and its parent", h.table.len())
	}

	// Whether a process that is not looked up runs is not known.
	h.Shed(false, true)
	if p := h.connect(key(2000, tick)).Subject; p == nil || p.Exited {
		t.Errorf("a process that was not looked up: %+v", p)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	newMetrics(reg)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	n, err := testutil.GatherAndCount(reg)
	if err != nil {
		t.Fatal(err)
	}
	if n != 13 {
		t.Errorf("%d series from the start, want 13", n)
	}
}

func TestInterner(t *testing.T) {
	n := newInterner()
	for i := range uint32(10_000) {
		for range 2 {
			if got := n.string([]byte(itoa(i))); got != itoa(i) {
				t.Fatalf("string(%d) = %q", i, got)
			}
		}
	}
	long := []byte(strings.Repeat("x", internMax+1))
	if got := n.string(long); got != string(long) {
		t.Errorf("long string = %q", got)
	}
	b := []byte("/usr/bin/env")
	if testing.AllocsPerRun(100, func() { n.string(b) }) > 0 {
		t.Error("a known string costs allocations")
	}
}

func BenchmarkApply(b *testing.B) {
	setup := func(b *testing.B) (h *host, shell event.ProcessKey) {
		h = newHost(b, nil)
		parent := event.ProcessKey{}
		for i := range uint32(5) { // systemd, sshd, sshd, sshd, bash
			shell = key(i+1, uint64(i+1)*tick)
			h.exec(shell, parent, "/usr/bin/"+itoa(i))
			parent = shell
		}
		return h, shell
	}
	b.Run("exec", func(b *testing.B) {
		h, shell := setup(b)
		path := filepath.Join(b.TempDir(), "prog")
		writeFile(b, path, "content")
		child, _ := h.fork(shell, 100)
		ev := h.execEvent(child, shell, path)
		ev.Exec.Exe = fileAt(b, path)
		ev.Exec.Argv = []byte("python3\x00-m\x00http.server\x00--bind\x00127.0.0.1\x008080\x00")
		b.ReportAllocs()
		for b.Loop() {
			h.Prefetch(ev)
			h.Apply(ev)
		}
	})
	b.Run("life", func(b *testing.B) { // fork, exec, exit of a new process
		h, shell := setup(b)
		exec, fork, exit := h.execEvent(shell, shell, "/bin/true"), h.at(event.Fork, shell), h.at(event.Exit, shell)
		pid := uint32(1000)
		b.ReportAllocs()
		for b.Loop() {
			pid++
			h.now += tick
			child := key(pid, h.now)
			fork.KTime, fork.Fork = h.now, event.ForkInfo{Child: child, CgroupID: 5, NSPID: pid, PIDNS: initialPIDNamespace, Comm: []byte("bash")}
			h.Apply(fork)
			exec.KTime, exec.Actor, exec.Exec.NSPID = h.now, child, pid
			h.Apply(exec)
			exit.KTime, exit.Actor, exit.Exit.Parent = h.now, child, shell
			h.Apply(exit)
		}
	})
	b.Run("tcp", func(b *testing.B) {
		h, shell := setup(b)
		ev := h.at(event.TCPConnect, shell)
		b.ReportAllocs()
		for b.Loop() {
			h.Apply(ev)
		}
	})
}
