// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// later is a clock at which no file of a test is too young to be cached.
func later() time.Time { return time.Now().Add(time.Hour) }

func newTestHasher(t *testing.T, proc procfs) *hasher {
	t.Helper()
	h := newHasher(1<<20, 1000, proc)
	h.now = later
	t.Cleanup(h.close)
	return h
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// fileAt is what the kernel would say of a file.
func fileAt(t testing.TB, path string) event.File {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fileOf(&st)
}

func programAt(t testing.TB, path string, pid uint32) program {
	return program{file: fileAt(t, path), path: []byte(path), pid: pid, parent: 1}
}

func sha(content string) string {
	sum := sha256.Sum256([]byte(content))
	return hex.EncodeToString(sum[:])
}

// await runs a request to its end.
func (h *hasher) await(t *testing.T, p program) (sum, note string) {
	t.Helper()
	sum, note, job := h.request(p)
	if job == nil {
		return sum, note
	}
	select {
	case <-job.done:
		return job.sum, job.note
	case <-t.Context().Done():
		t.Fatal("hashing does not end")
	}
	return "", ""
}

func TestHash(t *testing.T) {
	dir := t.TempDir()
	prog, moved := filepath.Join(dir, "prog"), filepath.Join(dir, "moved")
	elsewhere := filepath.Join(dir, "other")
	writeFile(t, elsewhere, "something else")
	for _, tt := range []struct {
		name      string
		prepare   func(t *testing.T, proc string)
		change    func(p *program)
		sum, note string
	}{
		{name: "by path", sum: sha("content")},
		{
			name: "by the process's own link, after a rename",
			prepare: func(t *testing.T, proc string) {
				if err := os.Rename(prog, moved); err != nil {
					t.Fatal(err)
				}
				addProc(t, proc, "7", map[string]string{"exe": "-> " + moved})
			},
			sum: sha("content"),
		},
		{
			name: "in the parent's root",
			prepare: func(t *testing.T, proc string) {
				root := filepath.Join(proc, "1", "root")
				if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Link(prog, moved); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(prog, filepath.Join(root, prog)); err != nil {
					t.Fatal(err)
				}
			},
			// The kernel's view, of before it was moved, has the ctime of after.
			change: func(p *program) { p.file = fileAt(t, moved) },
			sum:    sha("content"),
		},
		{
			name: "a symlink in its place, to the same file",
			prepare: func(t *testing.T, _ string) {
				if err := errors.Join(os.Rename(prog, moved), os.Symlink(moved, prog)); err != nil {
					t.Fatal(err)
				}
			},
			change: func(p *program) { p.file = fileAt(t, moved) },
			note:   noteGone,
		},
		{
			name: "a symlink on its path, out of the parent's root",
			prepare: func(t *testing.T, proc string) {
				root := filepath.Join(proc, "1", "root")
				if err := errors.Join(os.MkdirAll(root, 0o755), os.Symlink(dir, filepath.Join(root, "out"))); err != nil {
					t.Fatal(err)
				}
			},
			change: func(p *program) { p.path = []byte("/out/prog") },
			note:   noteGone,
		},
		{
			name: "the device differs, by the process's own link",
			prepare: func(t *testing.T, proc string) {
				addProc(t, proc, "7", map[string]string{"exe": "-> " + prog})
			},
			change: func(p *program) { p.file.DevMajor, p.file.DevMinor = 0, 99; p.path = []byte("/nowhere") },
			note:   noteGone,
		},
		{
			name: "the ctime was later, by the process's own link",
			prepare: func(t *testing.T, proc string) {
				addProc(t, proc, "7", map[string]string{"exe": "-> " + prog})
			},
			change: func(p *program) { p.file.CTime++ },
			note:   noteChanged,
		},
		{name: "elsewhere the device may not differ", change: func(p *program) { p.file.DevMinor++ }, note: noteGone},
		{name: "deleted", change: func(p *program) { p.flags = event.FlagDeleted }, note: noteGone},
		{name: "memfd", change: func(p *program) { p.flags = event.FlagMemfd }, note: noteGone},
		{name: "path cut short", change: func(p *program) { p.flags = event.FlagExeTruncated }, note: noteGone},
		{name: "no path", change: func(p *program) { p.path = nil }, note: noteGone},
		{
			name:    "another file in its place",
			prepare: func(t *testing.T, _ string) { writeFile(t, moved, "another"); rename(t, moved, prog) },
			note:    noteGone,
		},
		{
			name:    "the process runs something else by now",
			prepare: func(t *testing.T, proc string) { addProc(t, proc, "7", map[string]string{"exe": "-> " + elsewhere}) },
			sum:     sha("content"),
		},
		{name: "written to", prepare: func(t *testing.T, _ string) { writeFile(t, prog, "CONTENT") }, note: noteChanged},
		{name: "shorter", prepare: func(t *testing.T, _ string) { writeFile(t, prog, "c") }, note: noteChanged},
		{name: "too large", change: func(p *program) { p.file.Size = 1<<20 + 1 }, note: noteSize},
		{name: "kernel thread", change: func(p *program) { p.file = event.File{} }},
		{
			name:    "a directory",
			change:  func(p *program) { p.path = []byte(dir) },
			prepare: func(*testing.T, string) {},
			note:    noteError,
		},
		{
			name: "a pipe does not block",
			prepare: func(t *testing.T, _ string) {
				if err := os.Remove(prog); err != nil {
					t.Fatal(err)
				}
				if err := unix.Mkfifo(prog, 0o600); err != nil {
					t.Fatal(err)
				}
			},
			note: noteError,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, path := range []string{prog, moved} {
				if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			writeFile(t, prog, "content")
			p := programAt(t, prog, 7)
			proc := t.TempDir()
			if tt.prepare != nil {
				// In a tick of its own, so that the ctime moves.
				for path := filepath.Join(proc, "tick"); ; {
					writeFile(t, path, "")
					if fileAt(t, path).CTime > p.file.CTime {
						break
					}
				}
				tt.prepare(t, proc)
			}
			if tt.change != nil {
				tt.change(&p)
			}
			sum, note := newTestHasher(t, procfs(proc)).await(t, p)
			if sum != tt.sum || note != tt.note {
				t.Errorf("got %q, %q; want %q, %q", sum, note, tt.sum, tt.note)
			}
		})
	}
}

// mountAt mounts a file system on a new directory, until the test ends.
func mountAt(t *testing.T, kind, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("edr-test", dir, kind, 0, options); err != nil {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" && os.Geteuid() == 0 && kind == "tmpfs" {
			t.Fatalf("EDR_REQUIRE_ALL: mounting %s: %v", kind, err)
		}
		t.Skipf("mounting %s: %v", kind, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// TestHashOfTwoMounts: an inode's number, its size and its mtime are those of another
// file, in a mount of its own, that the process runs by the time of hashing.
func TestHashOfTwoMounts(t *testing.T) {
	old := time.Now().Add(-time.Hour)
	prog, other := filepath.Join(mountAt(t, "tmpfs", ""), "prog"), filepath.Join(mountAt(t, "tmpfs", ""), "prog")
	for path, content := range map[string]string{prog: "content", other: "CONTENT"} {
		writeFile(t, path, content)
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	p, o := programAt(t, prog, 7), fileAt(t, other)
	otherCTime := o.CTime
	o.DevMajor, o.DevMinor, o.CTime = p.file.DevMajor, p.file.DevMinor, p.file.CTime
	if p.file != o {
		t.Fatalf("%+v and %+v differ in more than the device and ctime", p.file, o)
	}
	p.path = nil
	onOverlay := p // and changed within one tick of the clock
	onOverlay.file.FSMagic, onOverlay.file.CTime = unix.OVERLAYFS_SUPER_MAGIC, otherCTime
	for _, tt := range []struct {
		name            string
		program         program
		runs, sum, note string
	}{
		{"the other", p, other, "", noteGone},
		{"the other, instead of one on overlayfs", onOverlay, other, "", noteGone},
		{"the program", p, prog, sha("content"), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proc := t.TempDir()
			addProc(t, proc, "7", map[string]string{"exe": "-> " + tt.runs})
			if sum, note := newTestHasher(t, procfs(proc)).await(t, tt.program); sum != tt.sum || note != tt.note {
				t.Errorf("got %q, %q; want %q, %q", sum, note, tt.sum, tt.note)
			}
		})
	}
}

// TestHashOnOverlay: of layers on several file systems, each file has another device
// than the kernel's.
func TestHashOnOverlay(t *testing.T) {
	lower, upper := mountAt(t, "tmpfs", ""), mountAt(t, "tmpfs", "")
	for _, dir := range []string{"files", "work"} {
		if err := os.Mkdir(filepath.Join(upper, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(lower, "prog"), "content")
	prog := filepath.Join(mountAt(t, "overlay", "lowerdir="+lower+",upperdir="+upper+"/files,workdir="+upper+"/work"), "prog")
	for _, tt := range []struct {
		name      string
		own       bool
		change    func(f *event.File)
		sum, note string
	}{
		{name: "by path", sum: sha("content")},
		{name: "by the process's own link", own: true, sum: sha("content")},
		{name: "the ctime moved", own: true, change: func(f *event.File) { f.CTime-- }, note: noteChanged},
		{name: "the ctime moved, the device is the kernel's", own: true, change: func(f *event.File) { f.CTime--; f.DevMinor-- }, sum: sha("content")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proc := t.TempDir()
			p := programAt(t, prog, 7)
			p.file.DevMinor, p.file.FSMagic = p.file.DevMinor+1, unix.OVERLAYFS_SUPER_MAGIC
			if tt.own {
				p.path = nil
				addProc(t, proc, "7", map[string]string{"exe": "-> " + prog})
			}
			if tt.change != nil {
				tt.change(&p.file)
			}
			if sum, note := newTestHasher(t, procfs(proc)).await(t, p); sum != tt.sum || note != tt.note {
				t.Errorf("got %q, %q; want %q, %q", sum, note, tt.sum, tt.note)
			}
		})
	}
}

// TestHashWakesNoWriter: what waits for a reader of a pipe does not get the hasher,
// which would leave it with a broken pipe, whether the pipe is where the program was,
// or a symlink there leads to it.
func TestHashWakesNoWriter(t *testing.T) {
	dir := t.TempDir()
	pipe, link, prog := filepath.Join(dir, "pipe"), filepath.Join(dir, "link"), filepath.Join(dir, "prog")
	if err := errors.Join(unix.Mkfifo(pipe, 0o600), os.Symlink(pipe, link)); err != nil {
		t.Fatal(err)
	}
	writeFile(t, prog, "content")
	tid, woken := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		fd, err := unix.Open(pipe, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		woken <- errors.Join(err, unix.Close(fd))
	}()
	for waits, id := false, <-tid; !waits; runtime.Gosched() {
		stat, err := os.ReadFile("/proc/self/task/" + strconv.Itoa(id) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		waits = bytes.Contains(stat, []byte(") S "))
	}
	for _, path := range []string{pipe, link} {
		p := programAt(t, prog, 7)
		p.path = []byte(path)
		newTestHasher(t, procfs(t.TempDir())).await(t, p)
		select {
		case err := <-woken:
			t.Fatalf("%s was opened: %v", path, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
	fd, err := unix.Open(link, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) // which does wake it
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
}

// TestHashWithoutOpenat2 finds a file, and follows no symlink in its place, where a
// seccomp filter refuses openat2.
func TestHashWithoutOpenat2(t *testing.T) {
	dir := t.TempDir()
	prog, link := filepath.Join(dir, "prog"), filepath.Join(dir, "link")
	writeFile(t, prog, "content")
	if err := os.Symlink(prog, link); err != nil {
		t.Fatal(err)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT2, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with its filter
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := errors.Join(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
			unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)); err != nil {
			t.Error("seccomp:", err)
			return
		}
		if _, err := unix.Openat2(unix.AT_FDCWD, dir, &unix.OpenHow{Flags: unix.O_PATH}); !errors.Is(err, unix.EPERM) {
			t.Errorf("openat2: %v", err)
		}
		for path, ok := range map[string]bool{prog: true, link: false} {
			at, err := find("/", path)
			if err != nil {
				t.Error(err)
				continue
			}
			if _, err := keyOfFD(at); (err == nil) != ok {
				t.Errorf("%s: %v", path, err)
			}
			unix.Close(at)
		}
	}()
	<-done
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// TestHashChangedWhileReading writes to the file between two chunks.
func TestHashChangedWhileReading(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prog")
	for _, tt := range []struct {
		name   string
		change func()
	}{
		{"grown", func() { writeFile(t, path, string(make([]byte, 3*hashChunk+1))) }},
		{"cut", func() { writeFile(t, path, "") }},
		{"same size", func() { writeFile(t, path, string(make([]byte, 3*hashChunk))) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			writeFile(t, path, string(make([]byte, 3*hashChunk)))
			old := time.Now().Add(-time.Hour)
			if err := os.Chtimes(path, old, old); err != nil {
				t.Fatal(err)
			}
			h := newTestHasher(t, procfs(t.TempDir()))
			reads := 0
			h.read = func(r io.Reader, b []byte) (int, error) {
				if reads++; reads == 2 {
					tt.change()
				}
				return io.ReadFull(r, b)
			}
			if sum, note := h.await(t, programAt(t, path, 7)); sum != "" || note != noteChanged {
				t.Errorf("got %q, %q; want %q", sum, note, noteChanged)
			}
		})
	}
}

func TestHashReadError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	h := newTestHasher(t, procfs(t.TempDir()))
	h.read = func(io.Reader, []byte) (int, error) { return 0, unix.EIO }
	if sum, note := h.await(t, programAt(t, path, 7)); sum != "" || note != noteError {
		t.Errorf("got %q, %q; want %q", sum, note, noteError)
	}
}

// TestHashOnce: one version of a file is read once, however many processes run it.
func TestHashOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	h := newTestHasher(t, procfs(t.TempDir()))
	reads, gate := 0, make(chan struct{})
	h.read = func(r io.Reader, b []byte) (int, error) {
		reads++
		<-gate
		return io.ReadFull(r, b)
	}
	_, _, first := h.request(programAt(t, path, 7))
	_, _, second := h.request(programAt(t, path, 8))
	if first == nil || first != second {
		t.Fatalf("jobs %p and %p; want one", first, second)
	}
	close(gate)
	<-first.done
	if first.sum != sha("content") {
		t.Errorf("sum = %q", first.sum)
	}
	if sum, _, job := h.request(programAt(t, path, 9)); job != nil || sum != sha("content") {
		t.Errorf("a known file: %q, job %p", sum, job)
	}
	if reads != 1 {
		t.Errorf("read %d times", reads)
	}
	if p := programAt(t, path, 9); testing.AllocsPerRun(100, func() { h.request(p) }) > 0 {
		t.Error("a known file costs allocations")
	}
	writeFile(t, path, "CONTENT, longer")
	if sum, note := h.await(t, programAt(t, path, 9)); sum != sha("CONTENT, longer") {
		t.Errorf("after a change: %q, %q", sum, note)
	}
}

// TestHashYoungFileIsNotCached: within the granularity of timestamps a file can
// change and keep them.
func TestHashYoungFileIsNotCached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	h := newTestHasher(t, procfs(t.TempDir()))
	now := time.Unix(0, fileAt(t, path).CTime).Add(time.Second)
	h.now = func() time.Time { return now }
	for range 2 {
		_, _, job := h.request(programAt(t, path, 7))
		if job == nil {
			t.Fatal("a young file was cached")
		}
		<-job.done
		if job.sum != sha("content") {
			t.Fatalf("got %q, %q", job.sum, job.note)
		}
		if _, _, again := h.request(programAt(t, path, 8)); again != job {
			t.Error("not shared within its batch")
		}
		h.endBatch()
	}
}

func TestHashFailureCountsForItsProcessOnly(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "prog")
	writeFile(t, path, "content")
	p := programAt(t, path, 7)
	p.path = nil
	h := newTestHasher(t, procfs(dir))
	if _, note := h.await(t, p); note != noteGone {
		t.Fatalf("note = %q", note)
	}
	first, _, job := h.request(p)
	if job == nil || !job.ended() {
		t.Errorf("asked again in the same batch: %q, job %v", first, job)
	}
	addProc(t, dir, "8", map[string]string{"exe": "-> " + path})
	p.pid = 8
	if sum, note := h.await(t, p); sum != sha("content") {
		t.Errorf("another process: %q, %q", sum, note)
	}
	h.endBatch()
	if len(h.jobs) != 0 {
		t.Errorf("%d jobs are left after the batch", len(h.jobs))
	}
}

func TestHashRate(t *testing.T) {
	dir := t.TempDir()
	h := newTestHasher(t, procfs(dir))
	now := time.Unix(1e9, 0)
	h.now = func() time.Time { return now }
	h.rate = rate{perSecond: 3}
	notes := func(n int) (refused int) {
		for i := range n {
			path := filepath.Join(dir, strconv.Itoa(i))
			writeFile(t, path, now.String()) // a new version each second
			if err := os.Chtimes(path, now, now); err != nil {
				t.Fatal(err)
			}
			if _, note := h.await(t, programAt(t, path, 7)); note == noteRate {
				refused++
			}
		}
		return refused
	}
	if got := notes(10); got != 7 {
		t.Errorf("refused %d of 10, want 7", got)
	}
	now = now.Add(time.Second)
	if got := notes(10); got != 7 {
		t.Errorf("a second later: refused %d of 10, want 7", got)
	}
	h.rate = rate{perSecond: -1}
	if sum, note, job := h.request(programAt(t, filepath.Join(dir, "9"), 7)); sum != "" || note != "" || job != nil {
		t.Errorf("switched off: %q, %q, %v", sum, note, job)
	}
}

// TestHashQueue: what does not fit the queue is refused at once, and a file system
// that hangs holds up only its own lane.
func TestHashQueue(t *testing.T) {
	dir := t.TempDir()
	h := newTestHasher(t, procfs(dir))
	release := make(chan struct{})
	h.read = func(r io.Reader, b []byte) (int, error) {
		if len(b) == len("remote") {
			<-release
		}
		return io.ReadFull(r, b)
	}
	remote, local := filepath.Join(dir, "remote"), filepath.Join(dir, "local")
	writeFile(t, remote, "remote")
	writeFile(t, local, "on a disk")
	var jobs []*hashJob
	refused := 0
	for i := range hashQueue + 10 {
		p := programAt(t, remote, 7)
		p.file.FSMagic = unix.NFS_SUPER_MAGIC
		p.file.CTime += int64(i) // each a job of its own
		_, note, job := h.request(p)
		if job != nil {
			jobs = append(jobs, job)
		} else if note == noteRate {
			refused++
		}
	}
	if refused < 9 || refused+len(jobs) != hashQueue+10 {
		t.Errorf("%d jobs, %d refused", len(jobs), refused)
	}
	if sum, note := h.await(t, programAt(t, local, 7)); sum != sha("on a disk") {
		t.Errorf("the local file: %q, %q", sum, note)
	}
	close(release)
	for _, job := range jobs {
		<-job.done
	}
}

func TestHashCacheIsBounded(t *testing.T) {
	h := newTestHasher(t, procfs(t.TempDir()))
	h.mu.Lock()
	for i := range hashCache {
		k := fileKey{ino: uint64(i + 1)}
		h.cache[k] = h.used.PushFront(&hashResult{k, "sum"})
	}
	h.mu.Unlock()
	if sum, _, _ := h.request(program{file: event.File{Ino: 1}}); sum != "sum" {
		t.Fatalf("sum = %q", sum)
	}
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	h.await(t, programAt(t, path, 7))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.cache) != hashCache || h.used.Len() != hashCache {
		t.Errorf("%d and %d results, bound %d", len(h.cache), h.used.Len(), hashCache)
	}
	if h.cache[fileKey{ino: 1}] == nil || h.cache[fileKey{ino: 2}] != nil {
		t.Error("evicted was not the least recently used")
	}
}

func TestHasherCloseWithAHangingRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prog")
	writeFile(t, path, "content")
	h := newHasher(1<<20, 10, procfs(t.TempDir()))
	reading, release := make(chan struct{}), make(chan struct{})
	h.read = func(io.Reader, []byte) (int, error) { close(reading); <-release; return 0, unix.EIO }
	h.request(programAt(t, path, 7))
	<-reading
	h.close() // must return
	close(release)
	h.done.Wait()
}

// TestHashRunning hashes real processes through their own links: a memfd, and a
// program that was deleted while it runs.
func TestHashRunning(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("no sleep:", err)
	}
	content, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	start := func(t *testing.T, path string) uint32 {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), path, "1000")
		cmd.Args[0] = "sleep" // busybox and coreutils look at it
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		want, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); ; runtime.Gosched() {
			got, err := os.Stat("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/exe")
			if err == nil && os.SameFile(got, want) {
				return uint32(cmd.Process.Pid)
			}
			if time.Now().After(deadline) {
				link, _ := os.Readlink("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/exe")
				t.Fatalf("%s runs %q: %v", path, link, err)
			}
		}
	}
	t.Run("deleted", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "prog")
		writeFile(t, path, string(content))
		pid := start(t, path)
		p := programAt(t, path, pid)
		if err := os.Remove(path); err != nil { // after the exec: the ctime moves
			t.Fatal(err)
		}
		h := newTestHasher(t, "/proc")
		h.max = 1 << 30
		if sum, note := h.await(t, p); sum != sha(string(content)) {
			t.Errorf("got %q, %q", sum, note)
		}
	})
	t.Run("memfd", func(t *testing.T) {
		fd, err := unix.MemfdCreate("prog", 0)
		if err != nil {
			t.Skip("memfd_create:", err)
		}
		file := os.NewFile(uintptr(fd), "memfd")
		if _, err := file.Write(content); err != nil {
			t.Fatal(err)
		}
		// Through a descriptor that may only read: one that may write denies exec.
		path := "/proc/self/fd/" + strconv.Itoa(fd)
		readOnly, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer readOnly.Close()
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		pid := start(t, "/proc/"+strconv.Itoa(os.Getpid())+"/fd/"+strconv.Itoa(int(readOnly.Fd())))
		p := programAt(t, "/proc/"+strconv.Itoa(int(pid))+"/exe", pid)
		p.path, p.flags = []byte("/memfd:prog"), event.FlagMemfd|event.FlagDeleted
		h := newTestHasher(t, "/proc")
		h.max = 1 << 30
		if sum, note := h.await(t, p); sum != sha(string(content)) {
			t.Errorf("got %q, %q", sum, note)
		}
	})
}

func BenchmarkHashKnown(b *testing.B) {
	path := filepath.Join(b.TempDir(), "prog")
	writeFile(b, path, "content")
	h := newHasher(1<<20, 10, "/proc")
	defer h.close()
	h.now = later
	p := programAt(b, path, 7)
	_, _, job := h.request(p)
	<-job.done
	b.ReportAllocs()
	for b.Loop() {
		h.request(p)
	}
}
