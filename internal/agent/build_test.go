// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

// TestScopeOfCgroup takes a scope only where the kernel compares with its number: on a mixed
// host /sys/fs/cgroup itself is a directory of another file system, and the whole hierarchy
// is cgroup:/.
func TestScopeOfCgroup(t *testing.T) {
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			root = dir
		}
	}
	if root == "" {
		t.Skip("no hierarchy of control groups of version 2 is mounted")
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/", root} {
		scope, err := scopeOf(config.Scope{Kind: config.ScopeCgroup, Cgroup: path})
		if err != nil || scope.CgroupID != st.Ino {
			t.Errorf("cgroup:%s is group %d: %v; want %d", path, scope.CgroupID, err, st.Ino)
		}
	}
	file := filepath.Join(root, "cgroup.procs")
	if _, err := os.Stat(file); err != nil {
		t.Fatal(err)
	}
	for path, wrong := range map[string]bool{root + "/..": true, file: true, "/no/such/group": false} {
		scope, err := scopeOf(config.Scope{Kind: config.ScopeCgroup, Cgroup: path})
		if problem := (*config.Problem)(nil); err == nil || errors.As(err, &problem) != wrong {
			t.Errorf("cgroup:%s is group %d: %v; want an error, of the configuration: %t", path, scope.CgroupID, err, wrong)
		}
	}
}
