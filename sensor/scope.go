// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
)

// ScopeMode says which processes a Scope covers.
type ScopeMode uint32

// The scopes, with the numbers of enum scope_mode in bpf/scope.bpf.h.
const (
	ScopeAll    ScopeMode = iota // every process
	ScopeTree                    // Scope.PID and what descends from it
	ScopeCgroup                  // the control group (v2) Scope.CgroupID and those below it
)

// Scope limits, in the kernel, whose events are reported. The zero value is
// everybody's. A connection belongs to the process that connected, or to the one
// that listened.
type Scope struct {
	Mode     ScopeMode
	PID      uint32 // ScopeTree: a running process, in the initial pid namespace
	CgroupID uint64 // ScopeCgroup: inode number of the group's directory
}

// process is what a scan of /proc tells of one.
type process struct {
	parent uint32
	dead   bool // a zombie: its exit was reported already
}

// seedTree puts the processes below root into pids. The fork program is attached
// already and adds the children of those in it, so this only has to repeat
// until a scan finds nobody new: a child is missing in pids only if it was forked
// before its parent was put in, and then the next scan sees it. What is orphaned
// between attaching and the first scan cannot be told from a stranger.
func seedTree(pids *ebpf.Map, root uint32, scan func() (map[uint32]process, error)) error {
	seeded := map[uint32]bool{}
	for {
		processes, err := scan()
		if err != nil {
			return err
		}
		if p, ok := processes[root]; (!ok || p.dead) && len(seeded) == 0 {
			return fmt.Errorf("process %d does not run: name one that does", root)
		}
		fresh := 0
		for pid, p := range processes {
			if seeded[pid] || p.dead || !descends(processes, pid, root) {
				continue
			}
			if err := pids.Put(pid, uint8(1)); err != nil {
				return fmt.Errorf("add process %d: %w", pid, err)
			}
			seeded[pid] = true
			fresh++
		}
		if fresh > 0 {
			continue
		}
		// One that died before it was put in has nobody to take it out again.
		for pid := range seeded {
			if p, ok := processes[pid]; ok && !p.dead {
				continue
			}
			if err := pids.Delete(pid); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("remove process %d: %w", pid, err)
			}
		}
		return nil
	}
}

// descends reports whether pid is root or below it.
func descends(processes map[uint32]process, pid, root uint32) bool {
	for range len(processes) { // a scan is no snapshot and might hold a loop
		if pid == root {
			return true
		}
		p, ok := processes[pid]
		if !ok {
			return false
		}
		pid = p.parent
	}
	return false
}

// scanProc lists the processes in /proc.
func scanProc() (map[uint32]process, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	processes := make(map[uint32]process, len(names))
	for _, name := range names {
		pid, err := strconv.ParseUint(name, 10, 32)
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue // it has ended
		}
		if p, ok := parseStat(stat); ok {
			processes[uint32(pid)] = p
		}
	}
	return processes, nil
}

// parseStat reads the parent and the state out of a /proc/PID/stat line. The name
// in parentheses may hold anything, so fields are counted from its end.
func parseStat(stat []byte) (process, bool) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 18 || len(fields[0]) != 1 {
		return process{}, false
	}
	parent, err := strconv.ParseUint(string(fields[1]), 10, 32)
	if err != nil {
		return process{}, false
	}
	// The leader of a process is a zombie too while its other threads live on.
	zombie := fields[0][0] == 'Z' || fields[0][0] == 'X'
	threads, err := strconv.ParseUint(string(fields[17]), 10, 32)
	if err != nil {
		return process{}, false
	}
	return process{parent: uint32(parent), dead: zombie && threads <= 1}, true
}
