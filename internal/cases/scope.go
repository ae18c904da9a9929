// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Scope is what a case covers, as it is written in requests and in the file. What the
// kinds mean is said at event.CaseScopeKind.
type Scope struct {
	Kind  string `json:"kind"`  // one of Kinds
	Value string `json:"value"` // process id, container id, absolute path, uid
	// StartTicks and BootID bind a process id to the one process that had it: set by
	// Resolve.
	StartTicks uint64 `json:"start_ticks,omitempty"`
	BootID     string `json:"boot_id,omitempty"`
}

// Kinds are the kinds of scope.
func Kinds() []string { return []string{"pid", "subtree", "container", "cgroup", "uid", "path"} }

// String returns the scope as "subtree 4711".
func (s Scope) String() string { return s.Kind + " " + s.Value }

// process tells whether the scope begins with a process of this boot.
func (s Scope) process() bool { return s.Kind == "pid" || s.Kind == "subtree" }

const maxValue = 4096 // bytes of a path

// event checks the scope and turns it into what the worker compares.
func (s Scope) event() (event.CaseScope, error) {
	e := event.CaseScope{Kind: event.CaseScopeKind(slices.Index(Kinds(), s.Kind) + 1), Text: s.Value}
	wrong := func(remedy string) (event.CaseScope, error) {
		return event.CaseScope{}, fmt.Errorf("scope %s %.100q: %s", s.Kind, s.Value, remedy)
	}
	if len(s.Value) > maxValue {
		return wrong(fmt.Sprintf("it has more than %d bytes", maxValue))
	}
	switch e.Kind {
	case event.CaseProcess, event.CaseSubtree:
		n, err := strconv.ParseUint(s.Value, 10, 31)
		if err != nil || n == 0 {
			return wrong("write the id of a process")
		}
		e.PID, e.StartTicks, e.Text = uint32(n), s.StartTicks, ""
	case event.CaseUser:
		n, err := strconv.ParseUint(s.Value, 10, 32)
		if err != nil || n == uint64(event.Unset) {
			return wrong("write the name or the number of a user")
		}
		e.UID, e.Text = uint32(n), ""
	case event.CaseContainer:
		if s.Value == "" || config.Identifier(s.Value) != nil {
			return wrong("write a container's id, or at least the first 12 characters of it")
		}
	case event.CaseCgroup, event.CasePath:
		if !filepath.IsAbs(s.Value) || filepath.Clean(s.Value) != s.Value || strings.ContainsRune(s.Value, 0) {
			return wrong("write an absolute path")
		}
	default:
		return event.CaseScope{}, fmt.Errorf("scope of kind %.20q: write one of %s", s.Kind, strings.Join(Kinds(), ", "))
	}
	return e, nil
}

// Resolver turns what people write into a Scope.
type Resolver struct {
	Proc   string // where processes are found: /proc
	Cgroup string // the root of the unified hierarchy: /sys/fs/cgroup
	BootID string
}

// Resolve finds what value means on this host now: the process that has the id, the
// control group with the path or number, the user of the name. It does not exist is
// an error where that can be known.
func (r Resolver) Resolve(kind, value string) (Scope, error) {
	s := Scope{Kind: kind, Value: value}
	switch kind {
	case "pid", "subtree":
		if _, err := s.event(); err != nil {
			return Scope{}, err
		}
		ticks, err := startTicks(filepath.Join(r.Proc, value, "stat"))
		if err != nil {
			return Scope{}, fmt.Errorf("scope %s: %w: name a process that runs", s, err)
		}
		if leader := threadOf(filepath.Join(r.Proc, value, "status")); leader != "" && leader != value {
			return Scope{}, fmt.Errorf("scope %s: that is a thread of process %s: name the process", s, leader)
		}
		s.StartTicks, s.BootID = ticks, r.BootID
	case "uid":
		if u, err := user.Lookup(value); err == nil {
			s.Value = u.Uid
		}
	case "cgroup":
		path, err := r.cgroup(value)
		if err != nil {
			return Scope{}, fmt.Errorf("scope %.200s: %w: name a directory below %s, or its inode number", s, err, r.Cgroup)
		}
		s.Value = path
	case "path":
		if filepath.IsAbs(value) {
			s.Value = filepath.Clean(value)
		}
	}
	_, err := s.event()
	return s, err
}

// threadOf reads of which process a thread is, out of its /proc/TID/status, which is
// there under its own id as well. Empty when that cannot be read.
func threadOf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if id, ok := strings.CutPrefix(line, "Tgid:"); ok {
			return strings.TrimSpace(id)
		}
	}
	return ""
}

// startTicks reads when a process started out of its /proc/PID/stat. The name in
// parentheses may hold anything, so fields are counted from its end.
func startTicks(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, errors.New("no such process")
	}
	if err != nil {
		return 0, err
	}
	stat := string(b)
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("%s: cannot be understood", path)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// cgroup finds the path, below the hierarchy's root, of a control group that is given
// by its path below the root or below /, or by its id.
func (r Resolver) cgroup(value string) (string, error) {
	if id, err := strconv.ParseUint(value, 10, 64); err == nil {
		return r.cgroupByID(id)
	}
	if !filepath.IsAbs(value) {
		value = "/" + value
	}
	path := filepath.Clean(value)
	if rest, ok := strings.CutPrefix(path+"/", r.Cgroup+"/"); ok {
		path = filepath.Clean("/" + rest)
	}
	fi, err := os.Stat(filepath.Join(r.Cgroup, path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", errors.New("no such control group")
	case err != nil:
		return "", err
	case !fi.IsDir():
		return "", errors.New("is no directory")
	}
	return path, nil
}

func (r Resolver) cgroupByID(id uint64) (path string, err error) {
	err = filepath.WalkDir(r.Cgroup, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil //nolint:nilerr // a group that is removed meanwhile
		}
		fi, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // likewise
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Ino == id {
			path = filepath.Clean("/" + strings.TrimPrefix(p, r.Cgroup))
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && path == "" {
		err = errors.New("no such control group")
	}
	return path, err
}
