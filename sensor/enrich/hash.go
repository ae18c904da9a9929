// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"container/list"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// fileKey is one version of one file's content: any change moves the ctime.
type fileKey struct {
	ino, size    uint64
	mtime, ctime int64
	major, minor uint32
}

func keyOf(f *event.File) fileKey {
	return fileKey{f.Ino, f.Size, f.MTime, f.CTime, f.DevMajor, f.DevMinor}
}

// Why an executable has no hash; the values of event.Process.HashNote.
const (
	notePending = "pending" // not done within the wait; later events will have it
	noteRate    = "rate"    // too many new executables at once
	noteSize    = "size"    // larger than the limit
	noteGone    = "gone"    // the file that ran can no longer be reached
	noteChanged = "changed" // its content is not, or may not be, what ran
	noteError   = "error"   // reading failed
	noteShed    = "shed"    // the sensor was told to do less
)

const (
	hashCache = 8192 // results kept, about 200 bytes each
	hashQueue = 256  // jobs waiting in one lane
	hashChunk = 256 << 10

	// What a case with deep collection may have, whatever the limits are: bounds
	// all the same, since a host must stand it.
	deepHashMax  = 1 << 30
	deepHashRate = 1000

	// racy is how far a ctime must lie from the time of reading for the result to
	// be kept: within the granularity of a file system's clock (2 s for the
	// coarsest), a second change leaves the ctime as it is.
	racy = 3 * time.Second

	// closeWait bounds how long close waits for a read that hangs.
	closeWait = time.Second
)

// hasher computes the SHA-256 of executables in its own goroutines, each version
// of a file once. It is safe for concurrent use.
type hasher struct {
	max      int64
	shed     atomic.Bool // nothing is read, but for a case
	rate     rate
	deepRate rate
	proc     procfs
	now      func() time.Time
	read     func(io.Reader, []byte) (int, error)
	lanes    [2]chan *hashJob
	stop     chan struct{}
	done     sync.WaitGroup

	mu    sync.Mutex
	cache map[fileKey]*list.Element // of *hashResult
	used  list.List                 // most recently used first
	jobs  map[fileKey]*hashJob      // waiting, running, or failed in this batch
}

type hashResult struct {
	key fileKey
	sum string
}

// hashJob is one file to hash; sum and note may be read when done is closed.
type hashJob struct {
	key         fileKey
	pid, parent uint32 // a process that runs it, and that one's parent
	path        string // empty when no path leads to it
	magic       uint32 // of its file system
	done        chan struct{}
	sum, note   string
}

func newHasher(limit int64, perSecond float64, proc procfs) *hasher {
	h := &hasher{
		max: limit, rate: rate{perSecond: perSecond, tokens: perSecond}, deepRate: rate{perSecond: deepHashRate, tokens: deepHashRate}, proc: proc, now: time.Now, read: io.ReadFull,
		stop: make(chan struct{}), cache: map[fileKey]*list.Element{}, jobs: map[fileKey]*hashJob{},
	}
	for i := range h.lanes {
		h.lanes[i] = make(chan *hashJob, hashQueue)
		h.done.Go(func() { h.work(h.lanes[i]) })
	}
	return h
}

// close ends the goroutines. One that hangs in a read of a remote file system is
// left behind after closeWait.
func (h *hasher) close() {
	close(h.stop)
	ended := make(chan struct{})
	go func() { h.done.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(closeWait):
	}
}

// lane keeps file systems whose reads may hang, on a server or on a process, away
// from the local ones.
func lane(magic uint32) int {
	switch magic {
	case unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC,
		unix.CEPH_SUPER_MAGIC, unix.V9FS_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC:
		return 1
	}
	return 0
}

// program is what a process runs, and the ways to it.
type program struct {
	file        event.File
	flags       event.ProcessFlags
	path        []byte
	pid, parent uint32
	deep        bool // a case wants everything
}

// request returns the hash of a program, or a note that says why there is none,
// or the job that will tell.
func (h *hasher) request(p program) (sum, note string, job *hashJob) {
	limit, budget := h.max, &h.rate
	if p.deep {
		limit, budget = max(h.max, deepHashMax), &h.deepRate
	}
	if p.file.Ino == 0 && p.file.Size == 0 || budget.perSecond < 0 {
		return "", "", nil // a kernel thread has none
	}
	key := keyOf(&p.file)
	h.mu.Lock()
	defer h.mu.Unlock()
	if at := h.cache[key]; at != nil {
		h.used.MoveToFront(at)
		return at.Value.(*hashResult).sum, "", nil
	}
	if job := h.jobs[key]; job != nil && !job.failedFor(p.pid) {
		return "", "", job
	}
	if p.file.Size > uint64(limit) {
		return "", noteSize, nil
	}
	if h.shed.Load() && !p.deep {
		return "", noteShed, nil
	}
	if !budget.take(h.now()) {
		return "", noteRate, nil
	}
	job = &hashJob{key: key, pid: p.pid, parent: p.parent, magic: p.file.FSMagic, done: make(chan struct{})}
	if p.flags&(event.FlagMemfd|event.FlagDeleted|event.FlagExeTruncated) == 0 {
		job.path = string(p.path)
	}
	select {
	case h.lanes[lane(p.file.FSMagic)] <- job:
	default:
		return "", noteRate, nil
	}
	h.jobs[key] = job
	return "", "", job
}

func (j *hashJob) ended() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// failedFor tells whether the job is over without a hash, and was about another
// process than pid: that one may still lead to the file.
func (j *hashJob) failedFor(pid uint32) bool {
	return j.ended() && j.sum == "" && j.pid != pid
}

// endBatch forgets failures, so that the next process that runs the file counts.
func (h *hasher) endBatch() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, job := range h.jobs {
		if job.ended() {
			delete(h.jobs, key)
		}
	}
}

func (h *hasher) work(jobs <-chan *hashJob) {
	buf := make([]byte, hashChunk)
	for {
		select {
		case <-h.stop:
			return
		case job := <-jobs:
			h.run(job, buf)
		}
	}
}

func (h *hasher) run(job *hashJob, buf []byte) {
	keep := false
	job.sum, job.note, keep = h.hash(job, buf)
	h.mu.Lock()
	defer h.mu.Unlock()
	if keep {
		h.cache[job.key] = h.used.PushFront(&hashResult{job.key, job.sum})
		for h.used.Len() > hashCache {
			delete(h.cache, h.used.Remove(h.used.Back()).(*hashResult).key)
		}
		delete(h.jobs, job.key)
	}
	close(job.done)
}

// hash tries the ways to a file in turn: the process's own link leads to the
// right file even when it was deleted, but ends with the process; the parent's
// root sees what a container sees; the path is the last.
func (h *hasher) hash(job *hashJob, buf []byte) (sum, note string, keep bool) {
	note = noteGone
	for _, way := range [...]struct{ root, path string }{
		{"", h.proc.path(job.pid, "exe")},
		{h.proc.path(job.parent, "root"), job.path},
		{"/", job.path},
	} {
		if way.path == "" {
			continue
		}
		at, err := find(way.root, way.path)
		if err != nil {
			continue
		}
		sum, n, keep := h.hashFile(at, job, way.root == "", buf)
		unix.Close(at)
		switch n {
		case "":
			return sum, "", keep
		case noteGone:
		default:
			note = n
		}
	}
	return "", note, false
}

// leeway is what may differ between the file of an event and the one that is
// opened.
type leeway struct{ device, ctime bool }

// hashFile hashes what at, which was opened with O_PATH, is, if it is the file and
// version of job.key from the first byte to the last. Nothing else is opened: with some
// files of others, opening alone has effects.
//
// The ctime may have moved when a process's own link to its executable has led there:
// the kernel denies writing to that file for as long as a process runs it, so this is
// no change of content but of names. A program that unlinks itself is hashed all the
// same. When nothing runs it any more, its owner can write something else into it, or
// have its inode's number for another file, give that the size and mtime, and have the
// process run it before this looks: the result is then of what runs by now. No version
// of an inode, and no time of an exec, can be read that would tell.
//
// The device may differ where a file system shows another one than the kernel uses;
// then the inode, size and times, the ctime among them, must do. Two files of one such
// file system that were changed within one tick of its clock can have them in common.
func (h *hasher) hashFile(at int, job *hashJob, own bool, buf []byte) (sum, note string, keep bool) {
	key := job.key
	found, err := keyOfFD(at)
	if err != nil {
		return "", noteError, false
	}
	may := leeway{device: hidesDevice(job.magic) && isOn(at, job.magic), ctime: own}
	if !key.matches(found, may) {
		// Another file means that this way leads elsewhere by now; the same file
		// with other content means that what ran is lost.
		if found.ino == key.ino && (may.device || found.sameDevice(key)) {
			return "", noteChanged, false
		}
		return "", noteGone, false
	}
	fd, err := openQuietly("/proc/self/fd/" + strconv.Itoa(at))
	if err != nil {
		return "", noteError, false
	}
	defer unix.Close(fd)
	digest := sha256.New()
	for left := key.size; left > 0; {
		select {
		case <-h.stop:
			return "", noteError, false
		default:
		}
		n, err := h.read(fdReader(fd), buf[:min(uint64(len(buf)), left)])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return "", noteChanged, false
		}
		if err != nil {
			return "", noteError, false
		}
		digest.Write(buf[:n])
		left -= uint64(n)
	}
	now := h.now().UnixNano()
	after, err := keyOfFD(fd)
	if err != nil || !found.matches(after, may) {
		return "", noteChanged, false
	}
	age := now - key.ctime
	keep = after.ctime == key.ctime && (age < -int64(racy) || age > int64(racy))
	return hex.EncodeToString(digest.Sum(buf[:0])), "", keep
}

// matches tells whether k and found are one version of one file. Numbers of inodes
// are a file system's own, and size and mtime are anybody's choice: only on the same
// device is it the same file, and its ctime only goes forward.
func (k fileKey) matches(found fileKey, may leeway) bool {
	switch {
	case found.sameDevice(k):
		if may.ctime {
			found.ctime = min(found.ctime, k.ctime)
		}
	case may.device:
		found.major, found.minor = k.major, k.minor
	}
	return k == found
}

func (k fileKey) sameDevice(other fileKey) bool {
	return k.major == other.major && k.minor == other.minor
}

// hidesDevice tells the file systems on which stat(2) shows another device than
// the one in the kernel's inode: of a subvolume, or of the layer below.
func hidesDevice(magic uint32) bool {
	const bcachefs = 0xca451a4e
	return magic == unix.OVERLAYFS_SUPER_MAGIC || magic == unix.BTRFS_SUPER_MAGIC || magic == bcachefs
}

// isOn tells whether a file is on a file system of that kind.
func isOn(fd int, magic uint32) bool {
	var fs unix.Statfs_t
	return unix.Fstatfs(fd, &fs) == nil && uint32(fs.Type) == magic
}

// find opens, with O_PATH, what path leads to in the file system that has its root at
// root, or if that is empty, what the link at path leads to. A path from the kernel has
// no symlinks in it: what has become one since is not followed, out of a container or
// to a server that hangs.
func find(root, path string) (int, error) {
	if root == "" {
		return unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // seccomp filters from before it
		fd, err = unix.Openat(dir, "./"+path, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	}
	return fd, err
}

// openQuietly opens without waiting for the end of a lease, and without moving the
// file's access time.
func openQuietly(path string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK
	fd, err := unix.Open(path, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // neither owner nor CAP_FOWNER
		fd, err = unix.Open(path, flags, 0)
	}
	return fd, err
}

func keyOfFD(fd int) (fileKey, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileKey{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileKey{}, errors.New("mode " + strconv.FormatUint(uint64(st.Mode), 8) + " is no regular file")
	}
	f := fileOf(&st)
	return keyOf(&f), nil
}

type fdReader int

func (fd fdReader) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), b)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// rate lets perSecond jobs through a second, and as many at once.
type rate struct {
	perSecond, tokens float64
	last              time.Time
}

func (r *rate) take(now time.Time) bool {
	r.tokens = min(r.tokens+now.Sub(r.last).Seconds()*r.perSecond, max(r.perSecond, 1))
	r.last = now
	if r.tokens < 1 {
		return false
	}
	r.tokens--
	return true
}
