// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	fileName  = "q.db"
	newSuffix = ".new"
	pageSize  = 4096
	epochLen  = 20

	lockWait  = time.Second
	lockRetry = 20 * time.Millisecond
)

// The names inside the file: bucket m holds the state under one key, bucket c
// one bucket per chunk, named by its first seq, with the chunk under one key.
var (
	metaBucket  = []byte("m")
	chunkBucket = []byte("c")
	stateKey    = []byte("state")
	chunkKey    = []byte("d")
)

var (
	// ErrLocked is returned by [Open] when another process has the buffer.
	ErrLocked = errors.New("in use by another process")

	// ErrUnsafe is returned by [Open] for a place where records would not be safe.
	ErrUnsafe = errors.New("unsafe place")

	// ErrDamaged is returned when the file turned out to be damaged while it was in
	// use, again and again. Open the buffer again: that salvages what is intact.
	ErrDamaged = errors.New("buffer file is damaged")
)

// lockDir takes the one lock that covers the file, its creation and its
// quarantine; it goes with the returned descriptor.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		select {
		case <-time.After(lockRetry):
			continue
		case <-ctx.Done():
		}
		err = fmt.Errorf("%w%s: stop that one, or give this one a directory of its own (buffer.dir)", ErrLocked, lockOwner(d))
		break
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", filepath.Join(dir, fileName), err), d.Close())
}

// lockOwner says who holds the lock on d, as far as /proc/locks knows.
func lockOwner(d *os.File) string {
	var st unix.Stat_t
	if unix.Fstat(int(d.Fd()), &st) != nil {
		return ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	inode := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for s := bufio.NewScanner(bytes.NewReader(locks)); s.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 1234 fd:00:5678 0 EOF
		if f := strings.Fields(s.Text()); len(f) > 5 && f[1] == "FLOCK" && f[5] == inode {
			if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
				return fmt.Sprintf(" (pid %d)", pid)
			}
		}
	}
	return ""
}

// create makes a new, empty file with the given state. The name appears only when
// the file is complete and durable.
func create(ctx context.Context, path string, o Options, s *state) error {
	if err := spaceFor(path, o.Cap); err != nil {
		return err
	}
	if err := rebuild(ctx, path+newSuffix, o, s, nil, nil, true); err != nil {
		return err
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// preallocate gives the file its full size with blocks behind it, so that no
// commit ever depends on free space. Where the file system cannot do that the
// file is sparse: then a full disk makes commits fail and be retried.
func preallocate(f *os.File, size int64) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, size)
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		var st os.FileInfo
		if st, err = f.Stat(); err == nil && st.Size() < size {
			err = f.Truncate(size)
		}
	}
	if err != nil {
		return fmt.Errorf("preallocate %d bytes: %w", size, err)
	}
	return f.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func ignoreNotExist(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// openBolt opens the database. A panic of bbolt over a damaged file becomes an
// error; what preflight has passed should not make it panic.
func openBolt(path string, size int64) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverDamage(&err)
	db, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout:         lockWait,
		NoGrowSync:      true, // the file has its size already
		NoFreelistSync:  true, // stored on a clean close only
		FreelistType:    bolt.FreelistArrayType,
		InitialMmapSize: int(size), // no remap, so a reader never stalls the writer
		MaxSize:         int(size),
		PageSize:        pageSize,
		NoStatistics:    true,
		Logger:          new(failure),
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w: another program has the file open", ErrLocked)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, berrors.ErrChecksum):
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	db.AllocSize = pageSize
	return db, nil
}

// recoverDamage turns a panic, a fault in the mapping included where the
// caller has set debug.SetPanicOnFault, into an error that matches ErrDamaged.
func recoverDamage(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %v", ErrDamaged, p)
	}
}

// guarded runs fn so that a panic of bbolt or a fault in its mapping is an
// error.
func guarded(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverDamage(&err)
	return fn()
}

// mintEpoch makes an identity that sorts after those made before it.
func mintEpoch(now time.Time) string {
	var r [4]byte
	rand.Read(r[:])
	return fmt.Sprintf("%012x%08x", now.UnixMilli()&(1<<48-1), r)
}

// dropCache forgets the cached pages of the file. After a failed fsync the
// kernel may hold pages as clean that never reached the disk; reading them
// back would prove nothing.
func dropCache(f *os.File) error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("drop cache: %w", err)
	}
	return nil
}
