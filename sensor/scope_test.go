// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"testing"
)

func TestParseStat(t *testing.T) {
	// pid (comm) state ppid, 14 fields more, then the number of threads.
	line := func(comm, state string, ppid, threads int) string {
		return fmt.Sprintf("7 (%s) %s %d 1 1 0 -1 0 0 0 0 0 1 2 3 4 20 0 %d 0 999", comm, state, ppid, threads)
	}
	for _, tt := range []struct {
		name string
		stat string
		want process
		ok   bool
	}{
		{"plain", line("sh", "S", 3, 1), process{parent: 3}, true},
		{"name with spaces and parentheses", line("a) Z 9 (b", "R", 3, 1), process{parent: 3}, true},
		{"zombie", line("sh", "Z", 3, 1), process{parent: 3, dead: true}, true},
		{"dead leader of live threads", line("sh", "Z", 3, 4), process{parent: 3}, true},
		{"empty", "", process{}, false},
		{"cut", "7 (sh) S 3", process{}, false},
		{"no number", line("sh", "S", 3, 1)[:8] + " x 1 1 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 9", process{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseStat([]byte(tt.stat))
			if got != tt.want || ok != tt.ok {
				t.Errorf("got %+v, %t, want %+v, %t", got, ok, tt.want, tt.ok)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (sh) S 3 1 1 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 999"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, stat []byte) {
		if p, ok := parseStat(stat); !ok && p != (process{}) {
			t.Errorf("no process, and yet %+v", p)
		}
	})
}

func TestDescends(t *testing.T) {
	processes := map[uint32]process{1: {}, 2: {parent: 1}, 3: {parent: 2}, 4: {parent: 1}, 8: {parent: 9}, 9: {parent: 8}}
	for _, tt := range []struct {
		pid, root uint32
		want      bool
	}{
		{2, 2, true},
		{3, 2, true},
		{4, 2, false},
		{1, 2, false},
		{8, 2, false}, // a loop
		{77, 2, false},
	} {
		if got := descends(processes, tt.pid, tt.root); got != tt.want {
			t.Errorf("descends(%d, %d) = %t", tt.pid, tt.root, got)
		}
	}
}

// The scans of this test are a tree that changes while it is looked at.
func TestRootSeedTree(t *testing.T) {
	require(t, "root")
	k, _, err := loadKernel(kernelOptions{Scope: Scope{Mode: ScopeTree}, PriorityBytes: 4096, BulkBytes: 4096}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	pids := k.maps["scope_pids"]
	scans := []map[uint32]process{
		{10: {parent: 1}, 11: {parent: 10}, 12: {parent: 10}, 20: {parent: 1}, 30: {parent: 10, dead: true}},
		// 13 was forked by 11 before that was put in; 12 has died since.
		{10: {parent: 1}, 11: {parent: 10}, 12: {parent: 10, dead: true}, 13: {parent: 11}, 20: {parent: 1}},
		{10: {parent: 1}, 11: {parent: 10}, 13: {parent: 11}, 20: {parent: 1}},
	}
	next := 0
	err = seedTree(pids, 10, func() (map[uint32]process, error) {
		next++
		return scans[next-1], nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if next != len(scans) {
		t.Errorf("%d scans, want %d", next, len(scans))
	}
	got := map[uint32]bool{}
	var pid uint32
	var one uint8
	for it := pids.Iterate(); it.Next(&pid, &one); {
		got[pid] = true
	}
	if want := map[uint32]bool{10: true, 11: true, 13: true}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("in scope: %v, want %v", got, want)
	}

	err = seedTree(pids, 99, func() (map[uint32]process, error) { return scans[0], nil })
	if err == nil {
		t.Error("took a root that does not run")
	}
}
