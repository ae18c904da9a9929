// SPDX-License-Identifier: Apache-2.0

// Package debian fetches kernels, root file systems and single programs of Debian's suites,
// for tests that boot, enter or run them. Everything comes by the machine's own apt, from the mirrors that it
// uses, and is checked against Debian's signatures.
package debian

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// fetch tries three times to get something, once where something old will do: mirrors of one
// name can be behind each other for a moment, so that a list names what another has no more.
func (c Cache) fetch(ctx context.Context, old bool, try func() error) error {
	for n := 1; ; n++ {
		err := try()
		if err == nil || old || n == 3 {
			return err
		}
		c.Logf("once more: %v", err)
		select {
		case <-time.After(c.Pause):
		case <-ctx.Done():
			return err
		}
	}
}

// keep is how long something is used before a newer one is asked for.
const keep = 30 * 24 * time.Hour

// Cache is a directory that keeps what was fetched. Several processes may use it at once.
type Cache struct {
	Dir string
	// Logf hears when something old has to do, since a newer one could not be fetched.
	Logf func(format string, args ...any)
	// Pause is between two attempts to fetch something.
	Pause time.Duration
}

// UserCache returns the cache of this user.
func UserCache(logf func(string, ...any)) (Cache, error) {
	user, err := os.UserCacheDir()
	return Cache{filepath.Join(user, "edr-sensor", "vmtest"), logf, 15 * time.Second}, err
}

// dirLock keeps two processes from filling the same directory (LOCK_EX), or one from
// filling it while others use it (LOCK_SH).
type dirLock struct{ f *os.File }

func lock(dir string, how int) (dirLock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return dirLock{}, err
	}
	l := dirLock{f}
	if err := l.change(how); err != nil {
		l.unlock()
		return dirLock{}, err
	}
	return l, nil
}

// change makes it the other kind of lock. For a moment there may be none.
func (l dirLock) change(how int) error {
	for {
		err := unix.Flock(int(l.f.Fd()), how)
		if err == nil || !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("lock "+l.f.Name(), err)
		}
	}
}

func (l dirLock) unlock() { l.f.Close() }

// young reports whether a file is there and not yet old.
func young(path string) bool {
	info, err := os.Stat(path)
	return err == nil && time.Since(info.ModTime()) < keep
}
