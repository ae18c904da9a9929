// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// rootPackages is what a root file system has beside Debian's essential packages: an init,
// the tools of both kinds of packages, and a server to deliver to.
func rootPackages() []string {
	return []string{"systemd", "systemd-sysv", "dbus", "passwd", "rpm", "redis-server"}
}

// Root returns a directory with a suite's root file system for this machine's processor,
// with systemd, dpkg, rpm and redis-server, and without manuals. Nobody may write into it: mount an overlay
// over it, or copy it. It stays as it is until release is called. Only root can have it
// made, which takes half a minute. Without the network an old one is as good.
func (c Cache) Root(ctx context.Context, suite string) (dir string, release func(), err error) {
	kept := filepath.Join(c.Dir, "root-"+suite)
	if err := os.MkdirAll(kept, 0o700); err != nil { // it has programs with the set-user-ID bit
		return "", nil, err
	}
	dir, made := filepath.Join(kept, "root"), filepath.Join(kept, "packages")
	want := []byte(strings.Join(rootPackages(), "\n"))
	complete := func() bool {
		got, _ := os.ReadFile(made) // what cannot be read is made again
		return bytes.Equal(got, want)
	}
	l, err := lock(kept, unix.LOCK_SH)
	if err != nil {
		return "", nil, err
	}
	if !complete() || !young(made) {
		err = l.change(unix.LOCK_EX)
		if err == nil && (!complete() || !young(made)) { // another may have made it meanwhile
			err = c.fetch(ctx, complete(), func() error { return bootstrap(ctx, kept, dir, suite) })
			switch {
			case err == nil:
				err = os.WriteFile(made, want, 0o644) // last: without it there is no root
			case complete():
				c.Logf("the old root file system of %s has to do: %v", suite, err)
				err = nil
			}
		}
		err = errors.Join(err, l.change(unix.LOCK_SH))
	}
	if err != nil {
		l.unlock()
		return "", nil, fmt.Errorf("make the root file system of Debian %s: %w", suite, err)
	}
	return dir, l.unlock, nil
}

// bootstrap makes a root file system, and only then removes the one that was there.
func bootstrap(ctx context.Context, kept, dir, suite string) error {
	if os.Geteuid() != 0 {
		return errors.New("only root can")
	}
	sources, err := sourcesFor(ctx, suite)
	if err != nil {
		return err
	}
	fresh := filepath.Join(kept, "new")
	if err := os.RemoveAll(fresh); err != nil { // of one that was killed
		return err
	}
	defer os.RemoveAll(fresh)
	args := []string{
		"--mode=root", "--variant=essential", "--include=" + strings.Join(rootPackages(), ","),
		"--aptopt=APT::Sandbox::User \"root\"", // its own user may not see the cache in a home directory
		"--dpkgopt=force-unsafe-io",
	}
	for _, d := range []string{"man", "locale", "doc", "info"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+d+"/*")
	}
	// It mounts in a namespace of its own: nothing of this machine can be in what is removed.
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, suite, fresh, "-")...)
	cmd.Stdin = strings.NewReader(sources)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap: %w: %s", err, lastLines(out, 10))
	}
	// What it told dpkg to leave out would be missing from the packages under test, too.
	if err := os.Remove(filepath.Join(fresh, "etc/dpkg/dpkg.cfg.d/99mmdebstrap")); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(fresh, dir)
}

func lastLines(out []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte("\n"))
}
