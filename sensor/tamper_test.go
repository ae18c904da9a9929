// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// control takes hold of a process in the way that the first argument says; it leaves it as it
// was.
func control(r request) (reply, error) {
	pid, err := strconv.Atoi(r.Args[1])
	if err != nil {
		return reply{}, err
	}
	return reply{}, onThreadThatEnds(func() error { return controlBy(r.Args[0], pid, r.Count) })
}

// onThreadThatEnds frees what the thread traced. The runtime never ends the main thread:
// while that is held, another one does it.
func onThreadThatEnds(do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- onThreadThatEnds(do)
			runtime.UnlockOSThread()
			return
		}
		done <- do()
	}()
	return <-done
}

func controlBy(call string, pid, tid int) error {
	target := pid
	if tid != 0 {
		target = tid
	}
	word := uint64(0)
	local := unix.Iovec{Base: (*byte)(unsafe.Pointer(&word)), Len: 8}
	switch call {
	case "seize":
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, 0x4206, uintptr(target), 0, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	case "read", "write":
		address, err := stackOf(pid)
		if err != nil {
			return err
		}
		remote := []unix.RemoteIovec{{Base: uintptr(address), Len: 8}}
		if _, err = unix.ProcessVMReadv(pid, []unix.Iovec{local}, remote, 0); err == nil && call == "write" {
			_, err = unix.ProcessVMWritev(pid, []unix.Iovec{local}, remote, 0)
		}
		return err
	case "mem":
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return f.Close()
	case "look": // as ps(1) does
		_, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		return err
	}
	return errors.New("no such way: " + call)
}

// startVictim starts an actor that may be stopped, and can end nevertheless.
func startVictim(t testing.TB) *actor {
	t.Helper()
	a := startActor(t)
	t.Cleanup(func() { _ = unix.Kill(a.pid, unix.SIGCONT) })
	return a
}

// stackOf finds memory of a process that can be written.
func stackOf(pid int) (uint64, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, "[stack]") {
			_, end, _ := strings.Cut(strings.Fields(line)[0], "-")
			top, err := strconv.ParseUint(end, 16, 64)
			return top - 8, err
		}
	}
	return 0, errors.New("no stack")
}

// tamper stops the victim and takes hold of it.
func (m *matrix) tamper(t *testing.T, a *actor, priority *tap, how way) {
	if how.ring() {
		return // has no such operations
	}
	priority.rest()
	victim := strconv.Itoa(m.victim.pid)
	wait := func(what string, kind event.Kind) record {
		t.Helper()
		records := priority.until(what, func(r record) bool { return kindOf(r.SensorEventHeader) == kind })
		return records[len(records)-1]
	}
	var actor int
	if how == by32 {
		actor = a.must(request{Op: "run", Path: m.path32, Args: []string{"signal", victim}}).PID
	} else {
		actor = a.pid
		a.must(request{Op: "signal", Args: []string{victim}, Count: int(unix.SIGSTOP)})
		a.must(request{Op: "signal", Args: []string{victim}, Count: int(unix.SIGCONT)})
	}
	r := wait("signal", event.Signal)
	if s := r.tamper; int(r.Pid) != actor || int(s.TargetPid) != m.victim.pid || s.Signal != int32(unix.SIGSTOP) || s.TargetStartTime == 0 || r.StartTime == 0 {
		t.Errorf("%+v, want SIGSTOP of %d to %d", s, actor, m.victim.pid)
	}
	m.saw(event.Signal, how)
	if how == by32 {
		ran := a.must(request{Op: "run", Path: m.path32, Args: []string{"seize", victim}})
		if actor = ran.PID; ran.Output != "" {
			t.Errorf("seize: %s", ran.Output)
		}
	} else {
		a.must(request{Op: "control", Args: []string{"seize", victim}})
	}
	r = wait("ptrace", event.Ptrace)
	if p := r.tamper; int(r.Pid) != actor || int(p.TargetPid) != m.victim.pid || m.degraded != (p.Flags&uint32(event.TamperDegraded) != 0) {
		t.Errorf("%+v, want that of %d to %d", p, actor, m.victim.pid)
	}
	m.saw(event.Ptrace, how)
}

// tampered opens everything within the tree of a, with another process in the sensor's place.
func tampered(t *testing.T, a, victim *actor, o FileOptions, list ...Protected) *kernel {
	t.Helper()
	o.On = true
	return openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Files: o, Protected: list, Process: victim.pid})
}

func TestRootTamperSignals(t *testing.T) {
	a, stranger, victim, other := startActor(t), startActor(t), startVictim(t), startVictim(t)
	k := tampered(t, a, victim, FileOptions{})
	priority := newTap(t, k.priority)
	send := func(from, to *actor, signal unix.Signal) {
		t.Helper()
		from.must(request{Op: "signal", Args: []string{strconv.Itoa(to.pid)}, Count: int(signal)})
	}
	for _, signal := range []unix.Signal{0, unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH} {
		send(stranger, victim, signal) // harmless
	}
	send(a, other, unix.SIGSTOP) // to somebody else
	send(a, other, unix.SIGCONT)
	send(stranger, victim, unix.SIGSTOP) // out of the scope, and seen
	send(stranger, victim, unix.SIGCONT)
	records := priority.until("signal", func(r record) bool { return r.tamper != nil })
	r := records[len(records)-1]
	if s := r.tamper; int(r.Pid) != stranger.pid || int(s.TargetPid) != victim.pid || s.Signal != int32(unix.SIGSTOP) || s.Code != 0 || s.Result != 0 || s.Flags != 0 {
		t.Errorf("%+v", s)
	}
	if rest := priority.rest(); slices.ContainsFunc(rest, func(r record) bool { return r.tamper != nil }) {
		t.Errorf("more of them: %+v", rest)
	}
	c, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	if got := c[event.Signal]; got.Attempts != 1 || got.Lost != 0 {
		t.Errorf("counted %+v", got)
	}
}

func TestRootTamperPtrace(t *testing.T) {
	a, stranger, victim := startActor(t), startActor(t), startActor(t)
	k := tampered(t, a, victim, FileOptions{})
	degraded := k.find(event.Ptrace) == nil || strings.HasPrefix(k.find(event.Ptrace).section, "raw_tp")
	priority := newTap(t, k.priority)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", victim.pid))
	if err != nil || len(tasks) < 2 {
		t.Fatalf("threads %v, %v", tasks, err)
	}
	thread, err := strconv.Atoi(tasks[len(tasks)-1].Name())
	if err != nil {
		t.Fatal(err)
	}
	stranger.must(request{Op: "control", Args: []string{"look", strconv.Itoa(victim.pid)}}) // not seen
	for _, tt := range []struct {
		call string
		tid  int
		want event.TamperCall // of a system call
		many bool
	}{
		{call: "seize", want: event.TamperCallPtrace},
		{call: "seize", tid: thread, want: event.TamperCallPtrace},
		{call: "read", want: event.TamperCallVMRead},
		{call: "write", want: event.TamperCallVMWrite, many: true},
		{call: "mem"},
	} {
		t.Run(fmt.Sprint(tt.call, tt.tid != 0), func(t *testing.T) {
			if tt.call == "mem" && degraded {
				t.Skip("needs a hook on ptrace_access_check: system calls tell that a file is opened")
			}
			priority.rest()
			stranger.must(request{Op: "control", Args: []string{tt.call, strconv.Itoa(victim.pid)}, Count: tt.tid})
			n := 1
			if tt.many {
				n = 2 // it reads first
			}
			var r record
			for range n {
				records := priority.until("ptrace", func(r record) bool { return r.tamper != nil })
				r = records[len(records)-1]
			}
			p := r.tamper
			if int(r.Pid) != stranger.pid || degraded && event.TamperCall(p.Call) != tt.want || !degraded && p.Mode&2 == 0 {
				t.Errorf("%+v", p)
			}
			if !degraded || tt.call == "seize" {
				if int(p.TargetPid) != victim.pid || tt.tid != 0 && int(p.TargetTid) != tt.tid {
					t.Errorf("%+v", p)
				}
			}
		})
	}
}

// Changes of the sensor's files are reported whoever makes them, in spite of the scope, of
// exclusions and of the limit; those of other files beside them are not.
func TestRootProtectedFiles(t *testing.T) {
	dir := real(t, t.TempDir())
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"etc", "bin", "state"} {
		if err := os.Mkdir(at(name), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	program(t, at("bin"), "sensor")
	for _, name := range []string{"etc/config", "state/buffer", "bin/other"} {
		if err := os.WriteFile(at(name), []byte("x"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	a, stranger, victim := startActor(t), startActor(t), startActor(t)
	self, err := os.Readlink("/proc/self/exe") // what the actors run
	if err != nil {
		t.Fatal(err)
	}
	protected := []Protected{
		{at("bin/sensor"), event.FileOfBinary, true},
		{at("etc"), event.FileOfConfig, true},
		{at("etc/conf.d"), event.FileOfConfig, true},
		{at("state"), event.FileOfState, true},
		{at("absent/unit.d"), event.FileOfUnit, true},
	}
	k := tampered(t, a, victim, FileOptions{Rate: 1, Burst: 1, ExcludeExecutables: []string{self}, ExcludeDirectories: []string{dir}}, protected...)
	degraded := k.systemCallsOnly()
	priority, bulk := newTap(t, k.priority), newTap(t, k.bulk)
	do := func(who *actor, args ...string) {
		t.Helper()
		who.must(request{Op: "file", Args: args})
	}
	// Nobody's business: excluded, or out of the scope, or the sensor's own.
	do(a, "append", at("bin/other"))
	do(stranger, "append", at("bin/other"))
	do(victim, "append", at("etc/config"))
	do(victim, "append", at("state/buffer"))
	// Nor what has the same path below another root, as in a container.
	jail, prisoner := real(t, t.TempDir()), startActor(t)
	if err := os.CopyFS(filepath.Join(jail, dir), os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	prisoner.must(request{Op: "chroot", Path: jail})
	do(prisoner, "append", at("etc/config"))
	do(prisoner, "chmod", at("bin/sensor"))
	do(prisoner, "rename", at("bin/other"), at("bin/sensor"))
	do(prisoner, "mkdir", at("etc/conf.d"))
	wrote := event.FileModify
	if degraded {
		wrote = event.FileOpenWrite
	}
	for _, tt := range []struct {
		args []string
		kind event.Kind
		part string
		text bool // what system calls tell by a name that the programs do not look for
	}{
		{args: []string{"append", at("etc/config")}, kind: wrote, part: "configuration"},
		{args: []string{"chmod", at("bin/sensor")}, kind: event.FileChmod, part: "binary"},
		{args: []string{"chmod", at("state")}, kind: event.FileChmod, part: "state"},
		{args: []string{"rename", at("bin/other"), at("bin/sensor")}, kind: event.FileRename, part: "binary"},
		{args: []string{"mkdir", at("etc/conf.d")}, kind: event.FileMkdir, part: "configuration"},
		{args: []string{"mkdir", at("absent")}, kind: event.FileMkdir, part: "unit", text: true},
		{args: []string{"append", at("state/buffer")}, kind: wrote, part: "state"},
		{args: []string{"unlink", at("state/buffer")}, kind: event.FileDelete, part: "state", text: true},
		{args: []string{"unlink", at("bin/sensor")}, kind: event.FileDelete, part: "binary"},
		{args: []string{"rename", at("state"), at("elsewhere")}, kind: event.FileRename, part: "state"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			for _, who := range []*actor{stranger, a} {
				if degraded && tt.text {
					do(a, tt.args...)
					t.Skip("needs hooks on files: system calls tell names")
				}
				do(who, tt.args...)
				records := priority.until("file", func(r record) bool { return r.file != nil })
				r := records[len(records)-1]
				if got := event.FileFlags(r.file.Flags).Part(); kindOf(r.SensorEventHeader) != tt.kind || got != tt.part || int(r.Pid) != who.pid {
					t.Errorf("%s of the %s %s by %d", kindOf(r.SensorEventHeader), got, r.file.path, r.Pid)
				}
				if tt.kind != wrote && tt.kind != event.FileChmod {
					break // can be done once
				}
			}
		})
	}
	if rest := append(priority.rest(), bulk.rest()...); slices.ContainsFunc(rest, func(r record) bool { return r.file != nil }) {
		for _, r := range rest {
			if r.file != nil {
				t.Errorf("besides: %s of %s by %d", kindOf(r.SensorEventHeader), r.file.path, r.Pid)
			}
		}
	}
}

// A file that gets the number which a protected one leaves behind is another file: nothing is
// told of it, nor of what lies in such a directory. Under any other name the protected one is
// still told of, on an overlay as well, where nobody knows generations.
func TestRootProtectedNumbers(t *testing.T) {
	for _, tt := range []struct{ fs, make string }{
		{"ext4", `truncate -s 1M "$1" && mke2fs -F -i 16384 "$1"`}, // of 64 numbers: a free one is soon given away again
		{"xfs", `truncate -s 320M "$1" && mkfs.xfs "$1"`},
	} {
		t.Run(tt.fs, func(t *testing.T) { protectNumbers(t, tt.fs, tt.make) })
	}
}

func protectNumbers(t *testing.T, fs, format string) {
	a, stranger, victim := startActor(t), startActor(t), startActor(t)
	dir, over := real(t, t.TempDir()), real(t, t.TempDir())
	at := func(name string) string { return filepath.Join(dir, name) }
	do := func(who *actor, args ...string) {
		t.Helper()
		who.must(request{Op: "file", Args: args})
	}
	need(t, fs+" in a file", mountImage(t, a, dir, fs, format))
	for _, name := range []string{"etc", "etc/conf.d", "lower", "upper", "work"} {
		do(a, "mkdir", at(name))
	}
	need(t, "overlayfs", mount(t, a, over, "overlay", "lowerdir="+at("lower")+",upperdir="+at("upper")+",workdir="+at("work")))
	config, overlaid := at("etc/config"), filepath.Join(over, "config")
	protected := []Protected{{config, event.FileOfConfig, false}, {overlaid, event.FileOfConfig, false}, {at("etc/conf.d"), event.FileOfConfig, true}}
	for _, path := range []string{config, overlaid} {
		do(a, "create", path)
		do(a, "link", path, path+" by another name")
	}
	k := tampered(t, a, victim, FileOptions{}, protected...)
	files, priority := k.maps["protected_files"], newTap(t, k.priority) // what is told goes there
	told := func(what string, want bool, args ...string) {
		t.Helper()
		priority.rest()
		do(stranger, args...)
		// On old kernels an overlay opens the file below under the same path: told twice.
		if got := slices.ContainsFunc(priority.rest(), func(r record) bool { return r.file != nil && event.FileFlags(r.file.Flags).Part() == "configuration" }); got != want {
			t.Errorf("%s: %v is told: %t, want %t", what, args, got, want)
		}
	}
	mounts := mountTable()
	for path, known := range map[string]uint32{config: 1, overlaid: 0} {
		found, err := look(path, mounts)
		var p protection
		if err = errors.Join(err, files.Lookup(found.key, &p)); err != nil || p.GenerationKnown != known {
			t.Errorf("%s: %+v, %v, want generation known %d", path, p, err, known)
		}
		told("the same file", true, "append", path+" by another name")
	}
	if fs == "xfs" {
		return // it frees numbers in the background, so none is sure to be given away again
	}
	do(stranger, "unlink", config+" by another name")
	do(stranger, "unlink", overlaid+" by another name")
	reused := func(remove, path, create string) string {
		t.Helper()
		var was, now unix.Stat_t
		if err := unix.Lstat(path, &was); err != nil {
			t.Fatal(err)
		}
		do(stranger, remove, path)
		priority.rest()
		var others []string // the file system gives a number away again when it has no other
		defer func() {
			for _, path := range others {
				do(stranger, remove, path)
			}
		}()
		for i := range 1000 {
			again := filepath.Join(filepath.Dir(path), fmt.Sprint(create, i))
			do(stranger, create, again)
			if err := unix.Lstat(again, &now); err != nil {
				t.Fatal(err)
			}
			if now.Ino != was.Ino {
				others = append(others, again)
				continue
			}
			for _, r := range priority.rest() {
				if r.file != nil {
					t.Errorf("told: %s of %s", kindOf(r.SensorEventHeader), r.file.path)
				}
			}
			return again
		}
		t.Fatalf("no file got the number of %s", path)
		return ""
	}
	directory, file := reused("rmdir", at("etc/conf.d"), "mkdir"), reused("unlink", config, "create")
	told("in another directory", false, "create", directory+"/file")
	told("another file", false, "append", file)
	gone, err := look(overlaid, mounts)
	if err != nil {
		t.Fatal(err)
	}
	above := reused("unlink", overlaid, "create")
	told("another file of the overlay", false, "append", above)

	// Known by nothing but its number it is what it was.
	unknown := map[fileKey]protection{gone.key: {Of: uint32(event.FileOfConfig), Reach: reachItself}}
	var key fileKey
	var p protection
	for it := files.Iterate(); it.Next(&key, &p); {
		p.GenerationKnown = 0
		unknown[key] = p
	}
	if err := replace(files, unknown); err != nil {
		t.Fatal(err)
	}
	told("in the directory of that number", true, "append", directory+"/file")
	told("the file of that number", true, "append", file)
	told("the file of that number of the overlay", true, "append", above)
}

// What was replaced between two looks at it is protected whichever it is.
func TestProtectionsOfOneInode(t *testing.T) {
	itself := found{key: fileKey{1, 2}, generation: 3, generationKnown: true}
	other, unknown := itself, itself
	other.generation, unknown.generation, unknown.generationKnown = 4, 0, false
	for _, tt := range []struct {
		name  string
		again found
		want  protection
	}{
		{"under two names", itself, protection{3, reachItself, 3, 1}},
		{"replaced", other, protection{3, reachItself, 0, 0}},
		{"not to be found out", unknown, protection{3, reachItself, 0, 0}},
	} {
		for _, order := range [][]found{{itself, tt.again}, {tt.again, itself}} {
			p := protections{files: map[fileKey]protection{}}
			p.file(order[0], 1, reachItself)
			p.file(order[1], 2, reachItself)
			if got := p.files[itself.key]; got != tt.want {
				t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
			}
		}
	}
}

// mountImage mounts a file system in a file, which format makes.
func mountImage(t *testing.T, a *actor, dir, fs, format string) error {
	t.Helper()
	script := `said=$({ ` + format + ` && mount -t "$3" -o loop "$1" "$2"; } 2>&1) || { echo "$said"; exit 1; }`
	answer := a.do(request{Op: "shell", Args: []string{script, "sh", filepath.Join(t.TempDir(), "image"), dir, fs}})
	if answer.Err != "" {
		return errors.New(answer.Err)
	}
	t.Cleanup(func() { a.must(request{Op: "file", Args: []string{"umount", dir}}) })
	return nil
}

// TestGravity tells what the sensor and its service manager do while it starts from what others
// do to its files, on a host and in a pid namespace of its own, where it has another number.
func TestGravity(t *testing.T) {
	const host, inner, mnt = 0xeffffffc, 4026532180, 4026532177
	process := func(number, ns uint32, path string) *event.Process {
		return &event.Process{Key: event.ProcessKey{PID: number + 1000}, NSPID: number, NS: event.Namespaces{PID: ns}, Path: path}
	}
	outer := func(p *event.Process) *event.Process { // numbered as on a host
		p.Key.PID = p.NSPID
		return p
	}
	const ours, systemd = "/usr/bin/edr-sensor", "/usr/lib/systemd/systemd"
	in, on := identity{pid: 7, pidNS: inner, mntNS: mnt, executable: ours}, identity{pid: 7, pidNS: host, mntNS: mnt, executable: ours}
	change := func(p, parent *event.Process, kind event.Kind, mntNS uint32) *event.Event {
		return &event.Event{Kind: kind, Actor: p.Key, Subject: p, Parent: parent, Ancestors: []*event.Process{parent}, File: event.FileInfo{Flags: event.FileOfState, MntNS: mntNS}}
	}
	signal := func(by *event.Process) *event.Event {
		return &event.Event{Kind: event.Signal, Actor: by.Key, Creator: by, Tamper: event.TamperInfo{Signal: int32(unix.SIGKILL)}}
	}
	manager, shell := process(1, inner, systemd), process(5, inner, "/bin/sh")
	for _, tt := range []struct {
		name string
		who  identity
		ev   *event.Event
		want uint8
	}{
		{"itself", in, change(process(7, inner, ours), manager, event.FileOpenWrite, 2), gravityNone},
		{"itself, on a host", on, change(outer(process(7, host, ours)), outer(process(1, host, systemd)), event.FileOpenWrite, 2), gravityNone},
		{"its number, of which no more is known", on, &event.Event{Kind: event.FileOpenWrite, Actor: event.ProcessKey{PID: 7}, File: event.FileInfo{Flags: event.FileOfState}}, gravityNone},
		{"its number in another namespace", in, change(process(7, inner+1, "/bin/sh"), shell, event.FileOpenWrite, 2), gravityHigh},
		{"its number on the host", in, change(outer(process(7, host, "/bin/sh")), outer(process(9, host, "/bin/sh")), event.FileOpenWrite, 2), gravityHigh},
		{"a run that was killed before", in, change(process(6, inner, ours), manager, event.FileOpenWrite, 2), gravityNone},
		{"the program run by another", in, change(process(6, inner, ours), shell, event.FileOpenWrite, 2), gravityHigh},
		{"another child of systemd", in, change(process(6, inner, "/bin/sh"), manager, event.FileOpenWrite, 2), gravityHigh},
		{"systemd prepares it", in, change(process(6, inner, systemd), manager, event.Mount, mnt+1), gravityNone},
		{"somebody covers its directory", in, change(process(6, inner, "/bin/mount"), manager, event.Mount, mnt+1), gravityHigh},
		{"systemd covers its directory where it is", in, change(process(6, inner, systemd), manager, event.Mount, mnt), gravityHigh},
		{"systemd writes its state", in, change(process(6, inner, systemd), manager, event.FileOpenWrite, mnt+1), gravityHigh},
		{"a package manager", in, change(process(6, inner, "/usr/bin/dpkg"), shell, event.FileRename, 2), gravityMedium},
		{"killed by systemd", in, signal(manager), gravityNone},
		{"killed by systemd of the host", on, signal(outer(process(1, host, systemd))), gravityNone},
		{"killed by somebody", in, signal(shell), gravityHigh},
		{"killed by the init of a container", on, signal(process(1, inner, systemd)), gravityHigh},
	} {
		if got := tt.who.gravity(tt.ev); got != tt.want {
			t.Errorf("%s: gravity %d, want %d", tt.name, got, tt.want)
		}
	}
}
