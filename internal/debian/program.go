// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"golang.org/x/sys/unix"
)

// Program returns a program that runs /usr/bin/<pkg> of a suite's package pkg with the
// suite's own libraries, on this machine and without installing anything. It stays as it
// is until release is called. Without the network an old one is as good.
func (c Cache) Program(ctx context.Context, suite, pkg string) (path string, release func(), err error) {
	kept := filepath.Join(c.Dir, "program-"+suite+"-"+pkg)
	if err := os.MkdirAll(kept, 0o755); err != nil {
		return "", nil, err
	}
	dir := filepath.Join(kept, "root")
	path = filepath.Join(kept, pkg)
	l, err := lock(kept, unix.LOCK_SH)
	if err != nil {
		return "", nil, err
	}
	if !young(path) {
		err = l.change(unix.LOCK_EX)
		if err == nil && !young(path) { // another may have made it meanwhile
			_, missing := os.Stat(path)
			err = c.fetch(ctx, missing == nil, func() error { return unpackProgram(ctx, kept, dir, path, suite, pkg) })
			if err != nil && missing == nil {
				c.Logf("the old %s of %s has to do: %v", pkg, suite, err)
				err = nil
			}
		}
		err = errors.Join(err, l.change(unix.LOCK_SH))
	}
	if err != nil {
		l.unlock()
		return "", nil, fmt.Errorf("fetch %s of Debian %s: %w", pkg, suite, err)
	}
	return path, l.unlock, nil
}

// unpackProgram fetches a package with all that it depends on, and only then removes the
// one that was there.
func unpackProgram(ctx context.Context, kept, dir, path, suite, pkg string) error {
	fresh := filepath.Join(kept, "new")
	if err := os.RemoveAll(fresh); err != nil { // of one that was killed
		return err
	}
	defer os.RemoveAll(fresh)
	work := filepath.Join(fresh, "apt")
	a, err := newAPT(ctx, work, suite, runtime.GOARCH)
	if err != nil {
		return err
	}
	// No package counts as installed, so the libraries come too.
	if _, err := a.run(ctx, "apt-get", "install", "-y", "--no-install-recommends", "--download-only", pkg); err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(work, "cache", "archives", "*.deb"))
	if err != nil {
		return err
	}
	root := filepath.Join(fresh, "root")
	for _, archive := range archives {
		if _, err := a.run(ctx, "dpkg-deb", "-x", archive, root); err != nil {
			return err
		}
	}
	loader, err := find(root, regexp.MustCompile(`-linux-gnu/ld-linux-[^/]*\.so\.[0-9]+$`))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin", pkg)); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(dir), os.Rename(root, dir)); err != nil {
		return err
	}
	loader, err = filepath.Rel(root, loader)
	if err != nil {
		return err
	}
	libraries := filepath.Dir(loader)
	script := fmt.Sprintf("#!/bin/sh\nr='%s'\nexec \"$r/%s\" --library-path \"$r/%s:$r/usr/%s\" \"$r/usr/bin/%s\" \"$@\"\n", dir, loader, libraries, libraries, pkg)
	return os.WriteFile(path, []byte(script), 0o755) // last: without it there is no program
}
