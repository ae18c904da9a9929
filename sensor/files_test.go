// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// change does what the actor is asked to do with files: the first word says what, the
// others with which.
func change(args []string) error {
	path, second := args[1], args[len(args)-1]
	write := func(flags int, data string) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o640)
		if err != nil {
			return err
		}
		_, err = unix.Write(fd, []byte(data))
		return errors.Join(err, unix.Close(fd))
	}
	past := []unix.Timespec{{Sec: 1_000_000_000}, {Sec: 1_100_000_000, Nsec: 5}}
	switch args[0] {
	case "create":
		return write(unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, "hello")
	case "append":
		return write(unix.O_WRONLY|unix.O_APPEND, ", world")
	case "overwrite":
		return write(unix.O_WRONLY|unix.O_TRUNC, "bye")
	case "empty":
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0)
		return errors.Join(err, unix.Close(fd))
	case "open": // for writing, and do not
		return write(unix.O_RDWR, "")
	case "mknod":
		return unix.Mknod(path, unix.S_IFIFO|0o600, 0)
	case "mkdir":
		return unix.Mkdir(path, 0o750)
	case "symlink":
		return unix.Symlink(second, path)
	case "link":
		return unix.Link(path, second)
	case "rename":
		return unix.Rename(path, second)
	case "exchange":
		return unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, second, unix.RENAME_EXCHANGE)
	case "unlink":
		return unix.Unlink(path)
	case "rmdir":
		return unix.Rmdir(path)
	case "chmod":
		return unix.Chmod(path, 0o4755)
	case "chown":
		return unix.Chown(path, 12, 34)
	case "truncate":
		return unix.Truncate(path, 2)
	case "times":
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, past, 0)
	case "setxattr":
		return unix.Setxattr(path, "trusted.edr", []byte("value"), 0)
	case "chattr":
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		flags, err := strconv.ParseUint(second, 0, 32)
		return errors.Join(err, unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags)), unix.Close(fd))
	case "fsxattr": // the same in the form of XFS
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		x := [7]uint32{0x8}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), 0x401c5820, uintptr(unsafe.Pointer(&x))); errno != 0 {
			err = errno
		}
		return errors.Join(err, unix.Close(fd))
	case "removexattr":
		return unix.Removexattr(path, "trusted.edr")
	case "mount":
		return unix.Mount("edr-test", path, "tmpfs", unix.MS_NOSUID, "")
	case "move mount":
		return unix.MoveMount(unix.AT_FDCWD, path, unix.AT_FDCWD, second, 0)
	case "umount":
		return unix.Unmount(path, unix.MNT_DETACH)
	case "private": // what is mounted below is nobody else's business
		return unix.Mount("", path, "", unix.MS_PRIVATE, "")
	case "setuid": // root's
		return errors.Join(unix.Chown(path, 0, 0), unix.Chmod(path, 0o4755))
	}
	return fmt.Errorf("no such change: %s", args[0])
}

// fileFlags are the flags of a file that its inode has, 0 where there are none.
func fileFlags(path string) uint32 {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	flags, _ := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS) // 0 with the error
	return uint32(flags) & (0x10 | 0x20 | 0x8 | 0x80)
}

// watchFiles is watch with file events, with only the candidates that begin with a
// form, if one is given. That of LSM is the whole chain: it begins with LSM, which does
// not have every hook on every kernel. With kinds, of the hooks for files only theirs are
// attached.
func watchFiles(t testing.TB, a *actor, o FileOptions, form string, only ...event.Kind) *kernel {
	t.Helper()
	o.On = true
	k := prepare(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Files: o})
	k.attached = slices.DeleteFunc(k.attached, func(a attachment) bool {
		wanted := func(kind event.Kind) bool { return slices.Contains(only, kind) }
		return len(only) > 0 && len(a.syscalls) > 0 && !slices.ContainsFunc(a.kinds, wanted)
	})
	for i := range k.attached {
		switch h := &k.attached[i].hook; {
		case (len(h.syscalls) > 0 || h.constant != "") && form != "" && form != "lsm":
			h.chain = slices.DeleteFunc(h.chain, func(c candidate) bool { return !strings.HasPrefix(c[0], form) })
		case len(h.chain) > 1 && form == "raw":
			h.chain = h.chain[1:]
		}
	}
	start := time.Now()
	if err := k.attach(); err != nil {
		t.Fatal(err)
	}
	t.Logf("attached in %s", time.Since(start))
	return k
}

// lastFile returns the records up to that of a directory which is made, or removed when it
// is there, to end them.
func lastFile(a *actor, p *tap, dir string) []record {
	marker, op := filepath.Join(dir, "marker"), "mkdir"
	if _, err := os.Lstat(marker); err == nil {
		op = "rmdir"
	}
	a.must(request{Op: "file", Args: []string{op, marker}})
	records := p.until("marker", func(r record) bool { return r.file != nil && strings.HasSuffix(r.file.path, marker) })
	return records[:len(records)-1]
}

// settled is lastFile, and waits for what is still to come of the kinds wanted: a file that
// a ring's worker wrote is closed when that lets it go, which is after it told of the write.
func settled(a *actor, p *tap, dir string, want []event.Kind) []record {
	records := lastFile(a, p, dir)
	missing := func() bool {
		var got []event.Kind
		for _, r := range records {
			got = append(got, kindOf(r.SensorEventHeader))
		}
		return slices.ContainsFunc(want, func(k event.Kind) bool { return !slices.Contains(got, k) })
	}
	p.r.SetDeadline(time.Now().Add(patience))
	for missing() {
		raw, err := p.r.Read()
		if err != nil {
			break
		}
		records = append(records, parse(p.t, raw.RawSample))
	}
	return records
}

// changes does each operation on files in one way.
func changes(t *testing.T, a *actor, bulk *tap, k *kernel, m *matrix, how way) {
	// An ordinary directory on a mount of its own, so that there is one to cross.
	dir := real(t, t.TempDir())
	a.must(request{Op: "file", Args: []string{"mount", dir}})
	defer a.do(request{Op: "file", Args: []string{"umount", dir}})
	at := func(name string) string { return filepath.Join(dir, name) }
	file, other, link, folder := at("file"), at("other"), at("link"), at("folder")
	degraded := k.systemCallsOnly()
	a.must(request{Op: "file", Args: []string{"private", dir}})
	if err := os.Mkdir(at("elsewhere"), 0o755); err != nil {
		t.Fatal(err)
	}
	lastFile(a, bulk, dir)

	var had uint32 // file flags before
	stat := func(path string) (st unix.Stat_t) {
		_ = unix.Lstat(path, &st) // nothing, before it is there
		return st
	}
	for _, tt := range []struct {
		args  []string
		kind  event.Kind
		path2 string
		name  string
		check func(e *fileRecord, before, after unix.Stat_t) bool
		some  event.FileFlags
		also  event.Kind // a second event
	}{
		{args: []string{"create", file}, kind: event.FileCreate, also: event.FileModify, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return degraded || e.NewMode == unix.S_IFREG|0o640 && e.File.Ino == 0
		}},
		{args: []string{"append", file}, kind: event.FileModify, check: func(e *fileRecord, _, after unix.Stat_t) bool {
			return e.BytesWritten == 7 && e.File.Size == 12 && e.File.Ino == after.Ino && e.OpenFlags&unix.O_APPEND != 0
		}},
		{args: []string{"overwrite", file}, kind: event.FileModify, check: func(e *fileRecord, _, after unix.Stat_t) bool {
			return e.BytesWritten == 3 && e.File.Size == 3 && e.File.MtimeNs == after.Mtim.Nano()
		}},
		{args: []string{"open", file}},
		{args: []string{"mknod", other}, kind: event.FileCreate, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.NewMode&0o777 == 0o600
		}},
		{args: []string{"mkdir", folder}, kind: event.FileMkdir, some: event.FileDirectory, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.NewMode&0o777 == 0o750
		}},
		{args: []string{"symlink", link, "../to/where"}, kind: event.FileSymlink, path2: "../to/where"},
		{args: []string{"link", file, at("hard")}, kind: event.FileLink, path2: at("hard"), check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return degraded || e.File.Ino == before.Ino && e.File.Nlink == 1
		}},
		{args: []string{"chmod", file}, kind: event.FileChmod, some: event.FileNewMode, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return e.NewMode&0o7777 == 0o4755 && (degraded || e.File.Mode == before.Mode)
		}},
		{args: []string{"chown", file}, kind: event.FileChown, some: event.FileNewUID | event.FileNewGID, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return e.NewUid == 12 && e.NewGid == 34 && e.File.Uid == before.Uid && e.File.Gid == before.Gid
		}},
		{args: []string{"truncate", file}, kind: event.FileTruncate, some: event.FileNewSize, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.NewSize == 2 && (degraded || e.File.Size == 3)
		}},
		{args: []string{"empty", file}, kind: event.FileTruncate, some: event.FileNewSize, check: func(e *fileRecord, _, after unix.Stat_t) bool {
			return e.NewSize == 0 && after.Size == 0 && e.File.Size == 2
		}},
		{args: []string{"times", file}, kind: event.FileTimes, some: event.FileNewMTime | event.FileNewATime, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return e.NewMtimeNs == 1_100_000_000_000_000_005 && e.NewAtimeNs == 1e18 && (degraded || e.File.MtimeNs == before.Mtim.Nano())
		}},
		{args: []string{"setxattr", file}, kind: event.FileXattr, name: "trusted.edr"},
		{args: []string{"removexattr", file}, kind: event.FileXattr, name: "trusted.edr", some: event.FileXattrRemoved},
		{args: []string{"chattr", file, "0x20"}, kind: event.FileChattr, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return e.NewAttributes == 0x20 && (degraded || e.Attributes == had && e.File.Ino == before.Ino)
		}},
		{args: []string{"fsxattr", file}, kind: event.FileChattr, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.NewAttributes == 0x10 && (degraded || e.Attributes == had)
		}},
		{args: []string{"chattr", file, "0"}, kind: event.FileChattr, check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.NewAttributes == 0 && (degraded || e.Attributes == had)
		}},
		{args: []string{"rename", file, filepath.Join(folder, "moved")}, kind: event.FileRename, path2: filepath.Join(folder, "moved")},
		{args: []string{"rename", filepath.Join(folder, "moved"), other}, kind: event.FileRename, path2: other, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return degraded || event.FileFlags(e.Flags)&event.FileReplaced != 0 && e.TargetIno != 0 && e.File.Ino == before.Ino
		}},
		{args: []string{"exchange", other, link}, kind: event.FileRename, path2: link, some: event.FileExchanged},
		{args: []string{"unlink", link}, kind: event.FileDelete, check: func(e *fileRecord, before, _ unix.Stat_t) bool {
			return degraded || e.File.Ino == before.Ino && event.FileFlags(e.Flags)&event.FileDirectory == 0
		}},
		{args: []string{"mount", folder}, kind: event.Mount, path2: "edr-test", name: "tmpfs", check: func(e *fileRecord, _, _ unix.Stat_t) bool {
			return e.OpenFlags&unix.MS_NOSUID != 0
		}},
		{args: []string{"move mount", folder, at("elsewhere")}, kind: event.MountMove, path2: at("elsewhere"), name: "tmpfs"},
		{args: []string{"umount", at("elsewhere")}, kind: event.Umount, name: "tmpfs"},
		{args: []string{"rmdir", folder}, kind: event.FileDelete, some: event.FileDirectory},
	} {
		t.Run(strings.Join(append([]string{tt.args[0]}, tt.kind.String()), " "), func(t *testing.T) {
			before := stat(tt.args[1])
			had = fileFlags(tt.args[1])
			done := a.do(m.request("file", how, tt.args...))
			if done.Err != "" {
				switch {
				case tt.kind == event.FileXattr, tt.kind == event.FileChattr && degraded:
					m.impossible[tt.kind] = true
					t.Skip(done.Err)
				case tt.kind == event.FileChattr: // a file system without: the attempt is seen
					t.Log(done.Err)
				default:
					t.Fatal(done.Err)
				}
			}
			if len(done.Missing) > 0 { // later operations need what this one does
				a.do(request{Op: "file", Args: tt.args})
				lastFile(a, bulk, dir)
				return
			}
			pid := a.pid
			if done.PID != 0 {
				pid = done.PID
			}
			after := stat(tt.args[1])
			var want []event.Kind
			also := tt.also
			if tt.args[0] == "truncate" && how.ring() { // of a file that it opens
				also = event.FileModify
			}
			for _, kind := range kinds(tt.kind, also) {
				if kind == event.FileModify && degraded {
					m.done(kind, how) // and not seen
					kind = event.FileOpenWrite
				}
				if kind != event.None {
					want = append(want, kind)
				}
			}
			if degraded && tt.args[0] == "open" {
				want = kinds(event.FileOpenWrite)
			}
			if degraded && tt.args[0] == "empty" { // its flags are not looked at
				want = nil
			}
			for _, kind := range want {
				m.done(kind, how)
			}
			if !m.sees(how) {
				want = nil
			}
			var got []event.Kind
			for _, r := range settled(a, bulk, dir, want) {
				got = append(got, kindOf(r.SensorEventHeader))
				e, flags := r.file, event.FileFlags(r.file.Flags)
				m.saw(kindOf(r.SensorEventHeader), how)
				if int(r.Pid) != pid || e.CgroupId == 0 || e.MntNs == 0 || flags&event.FileDegraded != 0 != degraded {
					t.Errorf("%s of process %d, cgroup %d, mount namespace %d, flags %#x", kindOf(r.SensorEventHeader), r.Pid, e.CgroupId, e.MntNs, flags)
				}
				if e.path != tt.args[1] {
					t.Errorf("path %q, want %q", e.path, tt.args[1])
				}
				if flags&(event.FilePathTruncated|event.FilePath2Truncated) != 0 {
					t.Errorf("flags %#x", flags)
				}
				if kindOf(r.SensorEventHeader) != tt.kind {
					continue
				}
				// System calls do not name the type of what is moved or detached.
				unnamed := degraded && (tt.kind == event.Umount || tt.kind == event.MountMove)
				if e.path2 != tt.path2 || e.name != tt.name && !unnamed {
					t.Errorf("second path %q, name %q; want %q, %q", e.path2, e.name, tt.path2, tt.name)
				}
				if flags&tt.some != tt.some {
					t.Errorf("flags %#x, want %#x", flags, tt.some)
				}
				if tt.check != nil && !tt.check(e, before, after) {
					t.Errorf("record %+v\nbefore %+v\nafter %+v", e.SensorFileEvent, before, after)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("events %v, want %v", got, want)
			}
		})
	}
}

// A file that was open for writing before the start is known by then, and its close tells
// what was written since.
func TestRootFilesOpenBefore(t *testing.T) {
	a, stranger := startActor(t), startActor(t)
	dir := real(t, t.TempDir())
	path := filepath.Join(dir, "early")
	a.must(request{Op: "hold", Path: path, Up: 100})
	stranger.must(request{Op: "hold", Path: filepath.Join(dir, "other"), Up: 100})
	t.Run("known", func(t *testing.T) {
		k := watchFiles(t, a, FileOptions{}, "", event.FileModify)
		if err := k.seed(func(h hook, name string) (*ebpf.Program, *ebpf.ProgramSpec, error) {
			return k.load(h, name, kernelTypes)
		}, true); err != nil {
			t.Fatal(err)
		}
		var key uint64
		var value [56]byte // struct written of bpf/file.bpf.h
		files := 0
		entries := k.maps["written_files"].Iterate()
		for entries.Next(&key, &value) {
			pid := binary.NativeEndian.Uint32(value[40:])
			if size, pos := binary.NativeEndian.Uint64(value[16:]), binary.NativeEndian.Uint64(value[24:]); int(pid) == a.pid && size == 100 && pos == 100 {
				files++
			} else if int(pid) != a.pid {
				t.Errorf("a file of process %d", pid)
			}
		}
		if err := entries.Err(); err != nil || files != 1 {
			t.Errorf("%d files of process %d of 100 bytes are known, want 1; %v", files, a.pid, err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		k := watchFiles(t, a, FileOptions{}, "", event.FileModify)
		if len(k.find(event.FileModify).programs) == 0 {
			t.Skip("this kernel refuses every hook for file.write")
		}
		bulk := newTap(t, k.bulk)
		a.must(request{Op: "let go", Up: 23})
		e := bulk.until("close", func(r record) bool { return r.file != nil && r.file.path == path })[0].file
		if kindOf(e.Header) != event.FileModify || int(e.Header.Pid) != a.pid || e.BytesWritten != 23 || e.File.Size != 123 || event.FileFlags(e.Flags) != event.FileEarly {
			t.Errorf("record %+v", e.SensorFileEvent)
		}
	})
}

// The mode of what comes into being is that which it has then.
func TestRootUmask(t *testing.T) {
	a := startActor(t)
	k := watchFiles(t, a, FileOptions{}, "", event.FileCreate, event.FileMkdir)
	bulk := newTap(t, k.bulk)
	a.must(request{Op: "umask", Count: 0o077})
	for _, dir := range []string{real(t, t.TempDir()), "/dev/shm"} {
		for _, op := range []string{"create", "mkdir"} {
			path := filepath.Join(dir, "umask "+op)
			defer os.Remove(path)
			a.must(request{Op: "file", Args: []string{op, path}})
			e := bulk.until(op, func(r record) bool { return r.file != nil && r.file.path == path })[0].file
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if event.FileFlags(e.Flags)&event.FileNewMode != 0 && uint32(e.NewMode)&0o777 != st.Mode&0o777 {
				t.Errorf("%s: mode %#o, is %#o", path, e.NewMode&0o777, st.Mode&0o777)
			}
		}
	}
}

// What one process does too much of is counted and told, and does not hide others.
func TestRootFilesSuppressed(t *testing.T) {
	a := startActor(t)
	b := a.spawn()
	k := watchFiles(t, a, FileOptions{Rate: 1, Burst: 10}, "", event.FileMkdir)
	bulk := newTap(t, k.bulk)
	dir := real(t, t.TempDir())
	for i := range 50 {
		a.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(dir, fmt.Sprint(i))}})
	}
	b.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(dir, "b")}})
	made := map[int]uint64{}
	for _, r := range bulk.rest() {
		made[int(r.Pid)]++
	}
	sums, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	c := sums[event.FileMkdir]
	if made[a.pid] < 10 || made[a.pid] > 20 || made[b.pid] != 1 || c.Suppressed != 50-made[a.pid] || c.Attempts != made[a.pid]+1 {
		t.Errorf("%d records of the one and %d of the other, counted %+v", made[a.pid], made[b.pid], c)
	}
}

func TestRootFilesExcluded(t *testing.T) {
	a := startActor(t)
	dir := real(t, t.TempDir())
	quiet, missing := filepath.Join(dir, "quiet"), filepath.Join(dir, "missing")
	deep := filepath.Join(quiet, "deep", "er")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	k := watchFiles(t, a, FileOptions{ExcludeDirectories: []string{missing, quiet}}, "", event.FileModify, event.FileMkdir)
	if errs := k.find(event.FileModify).errs; len(errs) == 0 || !strings.Contains(errs[0].Error(), missing) {
		t.Errorf("nothing is said of %s: %v", missing, errs)
	}
	bulk := newTap(t, k.bulk)
	a.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(deep, "unseen")}})
	a.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(dir, "seen")}})
	// A name as the caller wrote it does not tell which directories it leads through.
	degraded := strings.HasPrefix(k.find(event.FileMkdir).section, "raw_tp")
	for _, r := range bulk.rest() {
		if r.file == nil || r.file.path != filepath.Join(dir, "seen") && !degraded {
			t.Errorf("record of %+v", r.file)
		}
	}
	sums, err := k.counters()
	if err != nil {
		t.Fatal(err)
	}
	if c := sums[event.FileMkdir]; !degraded && (c.Suppressed != 1 || c.Attempts != 1) {
		t.Errorf("counted %+v", c)
	}
	exe := real(t, "/proc/self/exe")
	k = watchFiles(t, a, FileOptions{ExcludeExecutables: []string{exe}}, "", event.FileCreate, event.FileModify)
	a.must(request{Op: "file", Args: []string{"create", filepath.Join(dir, "file")}})
	if sums, err = k.counters(); err != nil {
		t.Fatal(err)
	}
	for kind, c := range sums {
		if event.Kind(kind) >= event.FileCreate && c.Attempts != 0 {
			t.Errorf("%s: %+v", event.Kind(kind), c)
		}
	}
	if sums[event.FileCreate].Suppressed != 1 {
		t.Errorf("counted %+v", sums[event.FileCreate])
	}
}

func TestArgumentShiftIgnoresWhatHasNoParameters(t *testing.T) {
	if shift, err := argumentShift(nil, "", []string{"dentry"}); shift != 0 || err != nil {
		t.Errorf("%d, %v", shift, err)
	}
}

// TestRootFilterChangesLive changes the filter under running programs, also to one
// that does not fit, which must change nothing.
func TestRootFilterChangesLive(t *testing.T) {
	a := startActor(t)
	dir := real(t, t.TempDir())
	k := watchFiles(t, a, FileOptions{}, "", event.FileMkdir, event.FileModify)
	exe := real(t, "/proc/self/exe")
	n := 0
	made := func(times int) (seen, suppressed uint64) {
		t.Helper()
		before, err := k.counters()
		if err != nil {
			t.Fatal(err)
		}
		for range times {
			n++
			a.must(request{Op: "file", Args: []string{"mkdir", filepath.Join(dir, fmt.Sprint("made ", n))}})
		}
		after, err := k.counters()
		if err != nil {
			t.Fatal(err)
		}
		b, c := before[event.FileMkdir], after[event.FileMkdir]
		return c.Attempts - b.Attempts, c.Suppressed - b.Suppressed
	}
	counted := func(what string, times int, wantSeen, wantSuppressed uint64) {
		t.Helper()
		if seen, suppressed := made(times); seen != wantSeen || suppressed != wantSuppressed {
			t.Errorf("%s: %d seen, %d suppressed; want %d and %d", what, seen, suppressed, wantSeen, wantSuppressed)
		}
	}
	set := func(o FileOptions, absent int) {
		t.Helper()
		missing, err := k.filter(o)
		if err != nil || len(missing) != absent {
			t.Errorf("filter %+v: missing %v, %v", o, missing, err)
		}
	}
	counted("at first", 2, 2, 0)
	set(FileOptions{ExcludeExecutables: []string{exe, "/no/such/file"}}, 1)
	counted("executable excluded", 2, 0, 2)

	var many []string
	for i := range fileExclusions {
		many = append(many, filepath.Join(dir, fmt.Sprint("excluded ", i)))
		if err := os.Mkdir(many[i], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.filter(FileOptions{ExcludeDirectories: many}); err == nil {
		t.Error("more exclusions than fit beside those that are there were accepted")
	}
	counted("after a filter that does not fit", 2, 0, 2)

	set(FileOptions{ExcludeExecutables: []string{"/bin/sh"}}, 0)
	counted("another executable excluded", 2, 2, 0)
	set(FileOptions{Rate: 1, Burst: 1}, 0)
	start := time.Now()
	seen, suppressed := made(5)
	if most := 1 + uint64(time.Since(start)/time.Second); seen < 1 || seen > most || seen+suppressed != 5 {
		t.Errorf("limited to one a second: %d seen, %d suppressed of 5 within %s", seen, suppressed, time.Since(start))
	}
	set(FileOptions{}, 0)
	counted("unlimited", 5, 5, 0)
	var key exclusionKey
	var value uint8
	if k.maps["file_exclusions"].Iterate().Next(&key, &value) {
		t.Errorf("exclusion %+v is left", key)
	}
}
