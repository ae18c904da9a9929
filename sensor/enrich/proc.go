// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// argvMax bounds what is read of a running process's arguments, as ARGV_MAX in
// bpf/events.h bounds those of an exec.
const argvMax = 256 << 10

// procfs reads what the kernel programs did not see of a running process. Every
// read is confirmed by the process's start time, looked at afterwards: as long as
// it is the expected one, the pid has not been given to another process.
type procfs string

func (f procfs) path(pid uint32, name string) string {
	return string(f) + "/" + strconv.FormatUint(uint64(pid), 10) + "/" + name
}

// stat is what /proc/PID/stat has that we need.
type stat struct {
	comm   string
	parent uint32
	ticks  uint64 // start time since boot, in units of tick
}

func (f procfs) stat(pid uint32) (s stat, ok bool) {
	data, err := os.ReadFile(f.path(pid, "stat"))
	if err != nil {
		return s, false
	}
	// The name is in parentheses and may contain any byte.
	open, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 0 || end < open {
		return s, false
	}
	fields := strings.Fields(string(data[end+1:]))
	if len(fields) < 20 { // the state is field 3 of proc_pid_stat(5), starttime 22
		return s, false
	}
	parent, err := strconv.ParseUint(fields[1], 10, 32)
	ticks, err2 := strconv.ParseUint(fields[19], 10, 64)
	if err != nil || err2 != nil {
		return s, false
	}
	return stat{comm: string(data[open+1 : end]), parent: uint32(parent), ticks: ticks}, true
}

// is tells whether the pid belongs to the process now.
func (f procfs) is(key event.ProcessKey) bool {
	s, ok := f.stat(key.PID)
	return ok && s.ticks == key.StartTime/tick
}

// cmdline appends the arguments of a process to dst, NUL-terminated; nothing when
// it is gone. A process that wrote a title over its arguments pads it with
// zeroes, so trailing empty arguments are left out.
func (f procfs) cmdline(key event.ProcessKey, dst []byte) []byte {
	file, err := os.Open(f.path(key.PID, "cmdline"))
	if err != nil {
		return dst
	}
	defer file.Close()
	start := len(dst)
	for len(dst)-start < argvMax {
		if cap(dst)-len(dst) < 4096 {
			dst = append(dst, make([]byte, 4096)...)[:len(dst)]
		}
		n, err := file.Read(dst[len(dst):min(cap(dst), start+argvMax)])
		dst = dst[:len(dst)+n]
		if err != nil {
			break
		}
	}
	if !f.is(key) {
		return dst[:start]
	}
	argv := bytes.TrimRight(dst[start:], "\x00")
	if len(argv) == 0 {
		return dst[:start]
	}
	return append(dst[:start+len(argv)], 0)
}

// fill sets what /proc knows of the process p.Key. parent finds the key of its
// parent. It returns false, and p is then unchanged, when the process is gone.
// Its arguments are read only on request.
func (f procfs) fill(p *event.Process, arguments bool, parent func(pid uint32, ticks uint64) event.ProcessKey) bool {
	s, ok := f.stat(p.Key.PID)
	if !ok || s.ticks != p.Key.StartTime/tick {
		return false
	}
	q := event.Process{Key: p.Key, Comm: s.comm, LoginUID: event.Unset, SessionID: event.Unset, Partial: true}
	f.fillExecutable(&q)
	q.CWD, _ = os.Readlink(f.path(p.Key.PID, "cwd"))
	f.fillStatus(&q)
	q.NS = event.Namespaces{
		Mnt: f.namespace(p.Key.PID, "mnt"), PID: f.namespace(p.Key.PID, "pid"), Net: f.namespace(p.Key.PID, "net"),
		User: f.namespace(p.Key.PID, "user"), UTS: f.namespace(p.Key.PID, "uts"), IPC: f.namespace(p.Key.PID, "ipc"),
		Cgroup: f.namespace(p.Key.PID, "cgroup"), Time: f.namespace(p.Key.PID, "time"),
	}
	q.LoginUID = f.number(p.Key.PID, "loginuid", event.Unset)
	q.SessionID = f.number(p.Key.PID, "sessionid", event.Unset)
	q.CgroupPath = f.cgroup(p.Key.PID)
	if s.parent != 0 {
		if ps, ok := f.stat(s.parent); ok {
			q.Parent = parent(s.parent, ps.ticks)
		}
	}
	if arguments {
		q.CmdLine = cmdLine(nil, f.cmdline(p.Key, nil))
	}
	if !f.is(p.Key) {
		return false
	}
	*p = q
	return true
}

// gone tells whether a process has ended. That /proc cannot be read is no sign of it.
func (f procfs) gone(key event.ProcessKey) bool {
	if s, ok := f.stat(key.PID); ok {
		return s.ticks != key.StartTime/tick
	}
	_, err := os.Stat(f.path(key.PID, ""))
	return errors.Is(err, fs.ErrNotExist)
}

func (f procfs) fillExecutable(p *event.Process) {
	exe := f.path(p.Key.PID, "exe")
	path, err := os.Readlink(exe)
	if err != nil {
		return // a kernel thread
	}
	var deleted bool
	if p.Path, deleted = strings.CutSuffix(path, " (deleted)"); deleted {
		p.Flags |= event.FlagDeleted
	}
	if deleted && strings.HasPrefix(p.Path, "/memfd:") {
		p.Flags |= event.FlagMemfd
	}
	var st unix.Stat_t
	if unix.Stat(exe, &st) == nil {
		p.File = fileOf(&st)
	}
	var fs unix.Statfs_t
	if unix.Statfs(exe, &fs) == nil {
		p.File.FSMagic = uint32(fs.Type)
	}
}

func fileOf(st *unix.Stat_t) event.File {
	return event.File{
		Ino: st.Ino, Size: uint64(st.Size), MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano(),
		DevMajor: unix.Major(st.Dev), DevMinor: unix.Minor(st.Dev), Mode: st.Mode, Nlink: uint32(st.Nlink),
		UID: st.Uid, GID: st.Gid,
	}
}

func (f procfs) fillStatus(p *event.Process) {
	data, err := os.ReadFile(f.path(p.Key.PID, "status"))
	if err != nil {
		return
	}
	c := &p.Cred
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		v := strings.Fields(value)
		switch name {
		case "NSpid":
			if len(v) > 0 {
				p.NSPID = number(v[len(v)-1])
			}
		case "Uid":
			if len(v) == 4 {
				c.UID, c.EUID, c.SUID, c.FSUID = number(v[0]), number(v[1]), number(v[2]), number(v[3])
			}
		case "Gid":
			if len(v) == 4 {
				c.GID, c.EGID, c.SGID, c.FSGID = number(v[0]), number(v[1]), number(v[2]), number(v[3])
			}
		case "CapInh":
			c.CapInheritable = capabilities(v)
		case "CapPrm":
			c.CapPermitted = capabilities(v)
		case "CapEff":
			c.CapEffective = capabilities(v)
		case "CapBnd":
			c.CapBounding = capabilities(v)
		case "CapAmb":
			c.CapAmbient = capabilities(v)
		case "Seccomp":
			if len(v) == 1 {
				c.SeccompMode = number(v[0])
			}
		}
	}
}

func number(s string) uint32 {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

func capabilities(v []string) uint64 {
	if len(v) != 1 {
		return 0
	}
	n, err := strconv.ParseUint(v[0], 16, 64)
	if err != nil {
		return 0
	}
	return n
}

func (f procfs) number(pid uint32, name string, otherwise uint32) uint32 {
	data, err := os.ReadFile(f.path(pid, name))
	if err != nil {
		return otherwise
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 32)
	if err != nil {
		return otherwise
	}
	return uint32(n)
}

// namespace returns the inode number in "pid:[4026531836]", 0 when unknown.
func (f procfs) namespace(pid uint32, name string) uint32 {
	link, err := os.Readlink(f.path(pid, filepath.Join("ns", name)))
	if err != nil {
		return 0
	}
	_, inode, _ := strings.Cut(strings.TrimSuffix(link, "]"), "[")
	return number(inode)
}

// cgroup returns the path in the unified hierarchy or, where that is the root and
// a version 1 hierarchy says more, the path there.
func (f procfs) cgroup(pid uint32) string {
	data, err := os.ReadFile(f.path(pid, "cgroup"))
	if err != nil {
		return ""
	}
	path := ""
	for line := range strings.Lines(string(data)) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, p, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		if controllers == "" && p != "/" {
			return p
		}
		if path == "" || path == "/" {
			path = p
		}
	}
	return path
}
