// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// program copies /bin/true, so that a test may do to it what it likes.
func program(t testing.TB, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// real is the path without symbolic links: the one the kernel walks to.
func real(t testing.TB, path string) string {
	t.Helper()
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func argv(args ...string) []byte {
	return []byte(strings.Join(args, "\x00") + "\x00")
}

func TestRootExec(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	priority := newTap(t, k.priority)
	dir := real(t, t.TempDir())
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := program(t, dir, "plain")
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh -e\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	setuid := program(t, dir, "setuid")
	a.must(request{Op: "file", Args: []string{"setuid", setuid}})
	deep := dir
	for len(deep) < 3000 {
		deep = filepath.Join(deep, strings.Repeat("d", 60))
	}
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("0123456789abcdef", 6250) // 100,000 bytes
	shell := real(t, "/bin/sh")

	// run executes and returns the last exec of the process, with its exit seen.
	run := func(t *testing.T, r request) *execRecord {
		t.Helper()
		r.Op = "run"
		ran := a.must(r)
		if ran.Output != "" {
			t.Errorf("the program said %q", ran.Output)
		}
		pid := ran.PID
		records := priority.until("exit", exited(pid))
		var last *execRecord
		for _, r := range records {
			if r.exec != nil && int(r.Pid) == pid {
				last = r.exec
			}
		}
		if last == nil {
			t.Fatalf("no exec of process %d", pid)
		}
		return last
	}

	t.Run("plain", func(t *testing.T) {
		e := run(t, request{Path: plain, Args: []string{"one", "", "three three"}, Dir: deep})
		if e.filename != plain || e.interp != plain || e.exe != plain || e.cwd != deep {
			t.Errorf("filename %q, interp %q, exe %q, cwd %q; want %q in %q", e.filename, e.interp, e.exe, e.cwd, plain, deep)
		}
		if want := argv(plain, "one", "", "three three"); !bytes.Equal(e.argv, want) || int(e.ArgvSize) != len(want) {
			t.Errorf("argv %q (%d), want %q", e.argv, e.ArgvSize, want)
		}
		if e.Flags&^uint32(event.FlagCgroupV1) != 0 {
			t.Errorf("flags %#x", e.Flags)
		}
		if text(e.Comm[:]) != "plain" {
			t.Errorf("comm %q", text(e.Comm[:]))
		}
		if e.Header.Pid != e.Header.Tid || int(e.ParentPid) != a.pid || e.NsPid != e.Header.Pid {
			t.Errorf("pid %d, tid %d, parent %d, ns pid %d; want parent %d", e.Header.Pid, e.Header.Tid, e.ParentPid, e.NsPid, a.pid)
		}
		if e.Header.StartTime == 0 || e.Header.StartTime > e.Header.Ktime || e.ParentStartTime == 0 || e.ParentStartTime > e.Header.StartTime {
			t.Errorf("parent started at %d, process at %d, exec at %d", e.ParentStartTime, e.Header.StartTime, e.Header.Ktime)
		}
		var st unix.Stat_t
		if err := unix.Stat(plain, &st); err != nil {
			t.Fatal(err)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(plain, &fs); err != nil {
			t.Fatal(err)
		}
		got := []any{
			e.Exe.Ino, e.Exe.Size, e.Exe.MtimeNs, e.Exe.CtimeNs, e.Exe.DevMajor, e.Exe.DevMinor,
			e.Exe.Mode, e.Exe.Nlink, e.Exe.Uid, e.Exe.Gid, e.Exe.FsMagic,
		}
		want := []any{
			st.Ino, uint64(st.Size), st.Mtim.Nano(), st.Ctim.Nano(), unix.Major(st.Dev), unix.Minor(st.Dev),
			st.Mode, uint32(st.Nlink), st.Uid, st.Gid, uint32(fs.Type),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("file (-stat +record):\n%s", diff)
		}
	})
	t.Run("credentials", func(t *testing.T) {
		e := run(t, request{Path: plain, UID: 12345})
		c := e.Cred
		for name, id := range map[string]uint32{
			"uid": c.Uid, "gid": c.Gid, "euid": c.Euid, "egid": c.Egid, "suid": c.Suid, "sgid": c.Sgid, "fsuid": c.Fsuid, "fsgid": c.Fsgid,
		} {
			if id != 12345 {
				t.Errorf("%s is %d", name, id)
			}
		}
		if c.CapEffective != 0 || c.CapPermitted != 0 || c.CapBounding == 0 {
			t.Errorf("capabilities: effective %#x, permitted %#x, bounding %#x", c.CapEffective, c.CapPermitted, c.CapBounding)
		}
		if event.ProcessFlags(e.Flags)&event.FlagSecureExec != 0 {
			t.Error("secureexec without any gain")
		}
	})
	t.Run("setuid", func(t *testing.T) {
		e := run(t, request{Path: setuid, UID: 12345})
		if e.Cred.Uid != 12345 || e.Cred.Euid != 0 || e.Cred.CapEffective == 0 || event.ProcessFlags(e.Flags)&event.FlagSecureExec == 0 {
			t.Errorf("uid %d, euid %d, effective %#x, flags %#x", e.Cred.Uid, e.Cred.Euid, e.Cred.CapEffective, e.Flags)
		}
	})
	t.Run("pid namespace", func(t *testing.T) {
		pid := a.must(request{Op: "run", Path: plain, PIDNS: true}).PID
		records := priority.until("exit", exited(pid))
		e := one(t, records, event.Exec, pid).exec
		inum, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", a.pid))
		if err != nil {
			t.Fatal(err)
		}
		if e.NsPid != 1 || fmt.Sprintf("pid:[%d]", e.Ns.Pid) == inum || e.Ns.Pid == 0 {
			t.Errorf("process %d in namespace %d, outside is %s", e.NsPid, e.Ns.Pid, inum)
		}
		if f := one(t, records, event.Fork, a.pid).fork; int(f.ChildPid) != pid || f.ChildNsPid != 1 || f.ChildPidNs != e.Ns.Pid {
			t.Errorf("fork of %d, which is %d in namespace %d", f.ChildPid, f.ChildNsPid, f.ChildPidNs)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		ran := a.must(request{Op: "run", Path: plain, TTY: true})
		e := one(t, priority.until("exit", exited(ran.PID)), event.Exec, ran.PID).exec
		if got := text(e.Tty[:]); got != ran.Local || got == "" {
			t.Errorf("terminal %q, want %q", got, ran.Local)
		}
	})
	t.Run("script", func(t *testing.T) {
		e := run(t, request{Path: script, Args: []string{"argument"}})
		if e.filename != script || e.interp != "/bin/sh" || e.exe != shell || event.ProcessFlags(e.Flags)&event.FlagScript == 0 {
			t.Errorf("filename %q, interp %q, exe %q, flags %#x", e.filename, e.interp, e.exe, e.Flags)
		}
		if want := argv("/bin/sh", "-e", script, "argument"); !bytes.Equal(e.argv, want) {
			t.Errorf("argv %q, want %q", e.argv, want)
		}
	})
	t.Run("memfd", func(t *testing.T) {
		e := run(t, request{Path: "/proc/self/exe", Env: []string{memfdEnv + "=" + plain}})
		want := event.FlagMemfd | event.FlagDeleted
		if event.ProcessFlags(e.Flags)&want != want || e.exe != "/memfd:edr-test" || !strings.HasPrefix(e.filename, "/dev/fd/") {
			t.Errorf("exe %q, filename %q, flags %#x", e.exe, e.filename, e.Flags)
		}
		if want := argv("in-memory", "argument"); !bytes.Equal(e.argv, want) {
			t.Errorf("argv %q, want %q", e.argv, want)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		gone := program(t, dir, "gone")
		// The shell opens it, unlinks it, and runs what the descriptor still holds.
		e := run(t, request{Path: "/bin/sh", Args: []string{"-c", `exec 9<"$1"; rm "$1"; exec /proc/self/fd/9`, "sh", gone}})
		if f := event.ProcessFlags(e.Flags); f&event.FlagDeleted == 0 || f&event.FlagMemfd != 0 || e.exe != gone || e.Exe.Nlink != 0 {
			t.Errorf("exe %q, flags %#x, links %d", e.exe, e.Flags, e.Exe.Nlink)
		}
	})
	t.Run("large argv", func(t *testing.T) {
		args := []string{large, large[1:], "end"}
		e := run(t, request{Path: plain, Args: args})
		if want := argv(append([]string{plain}, args...)...); !bytes.Equal(e.argv, want) || int(e.ArgvSize) != len(want) {
			t.Errorf("argv of %d bytes (says %d) differs from the %d given", len(e.argv), e.ArgvSize, len(want))
		}
		if event.ProcessFlags(e.Flags)&(event.FlagArgvTruncated|event.FlagArgvFault) != 0 {
			t.Errorf("flags %#x", e.Flags)
		}
	})
	t.Run("argv above the bound", func(t *testing.T) {
		args := []string{large, large, large}
		e := run(t, request{Path: plain, Args: args})
		want := argv(append([]string{plain}, args...)...)
		if len(e.argv) != 256<<10 || !bytes.Equal(e.argv, want[:256<<10]) || int(e.ArgvSize) != len(want) {
			t.Errorf("argv of %d bytes (says %d of %d)", len(e.argv), e.ArgvSize, len(want))
		}
		if event.ProcessFlags(e.Flags)&event.FlagArgvTruncated == 0 {
			t.Errorf("flags %#x", e.Flags)
		}
	})
	t.Run("paths above the bound", func(t *testing.T) {
		// Relative steps, since no path that long can be given at once.
		e := run(t, request{Path: "/bin/sh", Dir: deep, Args: []string{"-c", fmt.Sprintf(
			`n=$(printf %%060d 0); i=0; while [ $i -lt 30 ]; do mkdir $n && cd -P $n || exit 1; i=$((i+1)); done; exec %s`, plain)}})
		if event.ProcessFlags(e.Flags)&event.FlagCWDTruncated == 0 || e.CwdLen > 4096 || e.exe != plain {
			t.Errorf("cwd of %d bytes, flags %#x, exe %q", e.CwdLen, e.Flags, e.exe)
		}
		if !strings.HasSuffix(e.cwd, strings.Repeat("0", 60)) {
			t.Errorf("cwd ends with %q", e.cwd[max(0, len(e.cwd)-80):])
		}
	})
}

// A record that the ring has no room for is sent again with the start of its argv.
func TestRootExecCutsArgvBeforeLosingIt(t *testing.T) {
	a := startActor(t)
	k := openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: 64 << 10})
	priority := newTap(t, k.priority)
	long := strings.Repeat("x", 100_000)
	pid := a.must(request{Op: "run", Path: "/bin/true", Args: []string{long}}).PID
	e := one(t, priority.until("exit", exited(pid)), event.Exec, pid).exec
	want := argv("/bin/true", long)
	if !bytes.Equal(e.argv, want[:4096]) || int(e.ArgvSize) != len(want) || event.ProcessFlags(e.Flags)&event.FlagArgvTruncated == 0 {
		t.Errorf("argv of %d bytes, says %d, flags %#x", len(e.argv), e.ArgvSize, e.Flags)
	}
	counters, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	if c := counters[event.Exec]; c.Lost != 0 {
		t.Errorf("%d of %d counted as lost", c.Lost, c.Attempts)
	}
}

func TestRootForkAndExit(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	priority := newTap(t, k.priority)
	for _, tt := range []struct {
		name   string
		script string
		code   int32
		signal uint32
	}{
		{"success", "exit 0", 0, 0},
		{"code", "exit 7", 7, 0},
		{"largest code", "exit 255", 255, 0},
		{"killed", "kill -9 $$", 0, 9},
		{"terminated", "kill -15 $$", 0, 15},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pid := a.must(request{Op: "run", Path: "/bin/sh", Args: []string{"-c", tt.script}}).PID
			records := priority.until("exit", exited(pid))
			exit, exec := one(t, records, event.Exit, pid), one(t, records, event.Exec, pid)
			if e := exit.exit; e.ExitCode != tt.code || e.Signal != tt.signal || int(e.ParentPid) != a.pid || text(e.Comm[:]) != "sh" {
				t.Errorf("code %d, signal %d, parent %d, comm %q", e.ExitCode, e.Signal, e.ParentPid, text(e.Comm[:]))
			}
			if exit.StartTime != exec.StartTime || exit.exit.ParentStartTime != exec.exec.ParentStartTime {
				t.Errorf("start times: exit %d of %d, exec %d of %d", exit.StartTime, exit.exit.ParentStartTime, exec.StartTime, exec.exec.ParentStartTime)
			}
			fork := one(t, records, event.Fork, a.pid)
			if f := fork.fork; int(f.ChildPid) != pid || f.ChildStartTime != exec.StartTime || f.ChildNsPid != f.ChildPid || fork.StartTime != exec.exec.ParentStartTime {
				t.Errorf("fork of %d at %d by one that started at %d", f.ChildPid, f.ChildStartTime, fork.StartTime)
			}
		})
	}
}

// Threads are not processes: none is reported, and of all that end at once exactly
// one reports the process.
func TestRootThreads(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	priority := newTap(t, k.priority)
	var pids []int
	for range 20 {
		pids = append(pids, a.must(request{Op: "run", Path: "/proc/self/exe", Env: []string{threadEnv + "=30"}}).PID)
	}
	marker := a.must(request{Op: "run", Path: "/bin/true"}).PID
	records := priority.until("exit", exited(marker))
	unseen := uint64(0)
	for _, pid := range pids {
		if !slices.ContainsFunc(records, exited(pid)) {
			unseen++
			continue
		}
		exec, exit := one(t, records, event.Exec, pid), one(t, records, event.Exit, pid)
		if exec.StartTime != exit.StartTime {
			t.Errorf("process %d started at %d and %d", pid, exec.StartTime, exit.StartTime)
		}
	}
	// Since 7.0 tracepoints can be preempted, and the kernel leaves out a program's
	// run while another one of it stands on that CPU. The sensor reports what it
	// left out as lost; nothing else may be missing.
	if missed, err := k.missed(); err != nil || unseen > missed {
		t.Errorf("%d exits were not seen, the kernel left out %d runs, %v", unseen, missed, err)
	}
	forks := 0
	for _, r := range records {
		if r.fork != nil {
			forks++
		}
	}
	if want := len(pids) + 1; forks != want {
		t.Errorf("%d forks, want %d", forks, want)
	}
}

func TestRootScopeTree(t *testing.T) {
	a := startActor(t)
	before := a.spawn() // and has a child of its own, all before the kernel is asked
	below := before.spawn()
	stranger := startActor(t)
	k := watch(t, a)
	priority, bulk := newTap(t, k.priority), newTap(t, k.bulk)

	outside := stranger.must(request{Op: "run", Path: "/bin/true"}).PID
	stranger.must(request{Op: "tcp", Network: "tcp4", Up: 10})
	inside := below.must(request{Op: "run", Path: "/bin/sh", Args: []string{"-c", "/bin/true; /bin/true; exit 3"}}).PID
	records := priority.until("exit", exited(inside))
	if exit := one(t, records, event.Exit, inside); exit.exit.ExitCode != 3 {
		t.Errorf("exit code %d", exit.exit.ExitCode)
	}
	children := 0
	for _, r := range records {
		if int(r.Pid) == outside || int(r.Pid) == stranger.pid {
			t.Errorf("%s of process %d, which is out of scope", kindOf(r.SensorEventHeader), r.Pid)
		}
		if r.exec != nil && int(r.exec.ParentPid) == inside {
			children++
		}
	}
	if children != 2 {
		t.Errorf("%d execs of children, want 2", children)
	}

	t.Run("tcp", func(t *testing.T) {
		requireHook(t, k, event.TCPClose)
		below.must(request{Op: "tcp", Network: "tcp4", Up: 20})
		for _, r := range bulk.until("close", func(r record) bool { return kindOf(r.SensorEventHeader) == event.TCPClose }) {
			if int(r.Pid) != below.pid {
				t.Errorf("%s of process %d, want %d", kindOf(r.SensorEventHeader), r.Pid, below.pid)
			}
		}
	})

	// Who has ended is out of scope: its number may be somebody else's tomorrow.
	var value uint8
	if err := k.maps["scope_pids"].Lookup(uint32(inside), &value); err == nil {
		t.Errorf("process %d is in scope after its end", inside)
	}
	for _, pid := range []int{a.pid, before.pid, below.pid} {
		if err := k.maps["scope_pids"].Lookup(uint32(pid), &value); err != nil {
			t.Errorf("process %d: %v", pid, err)
		}
	}
}

func TestRootScopeCgroup(t *testing.T) {
	require(t, "root")
	require(t, "cgroup2")
	mount, err := cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(mount, fmt.Sprintf("edr-test-%d", os.Getpid()))
	child := filepath.Join(group, "child")
	root := startActor(t) // control groups are root's
	root.must(request{Op: "shell", Args: []string{`mkdir -p "$1"`, "sh", child}})
	t.Cleanup(func() { root.must(request{Op: "shell", Args: []string{`rmdir "$1" "$2"`, "sh", child, group}}) })
	var st unix.Stat_t
	if err := unix.Stat(group, &st); err != nil {
		t.Fatal(err)
	}
	a, stranger := startActor(t), startActor(t)
	for pid, dir := range map[int]string{a.pid: child, stranger.pid: mount} {
		root.must(request{Op: "shell", Args: []string{`echo "$1" >"$2"`, "sh", fmt.Sprint(pid), filepath.Join(dir, "cgroup.procs")}})
	}
	k := openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeCgroup, CgroupID: st.Ino}})
	priority := newTap(t, k.priority)
	outside := stranger.must(request{Op: "run", Path: "/bin/true"}).PID
	inside := a.must(request{Op: "run", Path: "/bin/true"}).PID
	records := priority.until("exit", exited(inside))
	e := one(t, records, event.Exec, inside).exec
	if want := "/" + filepath.Base(group) + "/child"; e.cgroup != want || event.ProcessFlags(e.Flags)&event.FlagCgroupV1 != 0 {
		t.Errorf("cgroup %q, flags %#x, want %q", e.cgroup, e.Flags, want)
	}
	if err := unix.Stat(child, &st); err != nil {
		t.Fatal(err)
	}
	fork := one(t, records, event.Fork, a.pid).fork
	if e.CgroupId != st.Ino || fork.ChildCgroupId != st.Ino {
		t.Errorf("cgroup id %d, of the fork %d, want %d", e.CgroupId, fork.ChildCgroupId, st.Ino)
	}
	for _, r := range records {
		if int(r.Pid) == outside || int(r.Pid) == stranger.pid {
			t.Errorf("%s of process %d, which is out of scope", kindOf(r.SensorEventHeader), r.Pid)
		}
	}
}

// What the iterator says of a process is what an exec would have said, and what
// /proc says.
func TestRootSnapshot(t *testing.T) {
	a := startActor(t)
	child := a.spawn()
	stranger := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.Task)
	got := map[int]*execRecord{}
	if err := k.snapshot(func(rec []byte) error {
		r := parse(t, rec)
		if kindOf(r.SensorEventHeader) != event.Task {
			t.Errorf("a record of kind %s", kindOf(r.SensorEventHeader))
		}
		got[int(r.Pid)] = r.exec
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[a.pid] == nil || got[child.pid] == nil || got[stranger.pid] != nil {
		t.Fatalf("%d processes, want %d and %d", len(got), a.pid, child.pid)
	}
	e := got[child.pid]
	if int(e.ParentPid) != a.pid || e.ParentStartTime != got[a.pid].Header.StartTime {
		t.Errorf("parent %d of %d, want %d", e.ParentPid, e.ParentStartTime, a.pid)
	}
	proc := func(name string) string {
		path, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", child.pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	if e.exe != strings.TrimSuffix(proc("exe"), " (deleted)") || e.cwd != proc("cwd") {
		t.Errorf("exe %q, cwd %q", e.exe, e.cwd)
	}
	for name, inum := range map[string]uint32{
		"mnt": e.Ns.Mnt, "pid": e.Ns.Pid, "net": e.Ns.Net, "user": e.Ns.User,
		"uts": e.Ns.Uts, "ipc": e.Ns.Ipc, "cgroup": e.Ns.Cgroup, "time": e.Ns.Time,
	} {
		if got, want := fmt.Sprintf("%s:[%d]", name, inum), proc("ns/"+name); got != want {
			t.Errorf("namespace %s, want %s", got, want)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child.pid))
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range map[string]uint64{
		"CapInh": e.Cred.CapInheritable, "CapPrm": e.Cred.CapPermitted, "CapEff": e.Cred.CapEffective,
		"CapBnd": e.Cred.CapBounding, "CapAmb": e.Cred.CapAmbient,
	} {
		if line := fmt.Sprintf("%s:\t%016x\n", name, set); !strings.Contains(string(status), line) {
			t.Errorf("%q is not in /proc/%d/status", line, child.pid)
		}
	}
	for name, id := range map[string]uint32{"loginuid": e.Loginuid, "sessionid": e.Sessionid} {
		want, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", child.pid, name))
		if err == nil && string(want) != fmt.Sprint(id) {
			t.Errorf("%s %d, want %s", name, id, want)
		}
	}
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", child.pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(cgroups), ":"+e.cgroup+"\n") {
		t.Errorf("cgroup %q is not in %q", e.cgroup, cgroups)
	}
	if e.Header.Ktime == 0 || e.Header.StartTime == 0 || e.ArgvLen != 0 || e.FilenameLen != 0 || e.InterpLen != 0 {
		t.Errorf("record %+v", e.Header)
	}
}
