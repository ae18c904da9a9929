// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Hazard is why a directory is a bad place for the buffer.
type Hazard struct {
	Dir, FS string // FS is the type of its file system, e.g. "tmpfs"
	What    string // what may happen there
	Remedy  string
	// Unsafe means that [Open] refuses it without Options.AllowUnsafe; what is not is
	// worth knowing.
	Unsafe bool
}

func (h Hazard) String() string {
	return fmt.Sprintf("%s is on %s: %s: %s", h.Dir, h.FS, h.What, h.Remedy)
}

const (
	inMemory  = "its content is gone when the host goes down"
	elsewhere = "a network that fails would stop the sensor, and locks and synced pages are not what they are on a disk"

	useDisk = "set buffer.dir to a directory on a local disk, or buffer.allow_unsafe to true"
)

// hazardous are the file systems that lose what was synced, or for which that means
// something else than here. Numbers as statfs(2) has them.
var hazardous = map[uint32]struct{ fs, what string }{
	unix.TMPFS_MAGIC:      {"tmpfs", inMemory},
	unix.RAMFS_MAGIC:      {"ramfs", inMemory},
	unix.NFS_SUPER_MAGIC:  {"nfs", elsewhere},
	unix.CIFS_SUPER_MAGIC: {"cifs", elsewhere},
	unix.SMB2_SUPER_MAGIC: {"smb3", elsewhere},
	unix.SMB_SUPER_MAGIC:  {"smbfs", elsewhere},
	unix.CEPH_SUPER_MAGIC: {"ceph", elsewhere},
	unix.AFS_SUPER_MAGIC:  {"afs", elsewhere},
	unix.V9FS_MAGIC:       {"9p", elsewhere},
	unix.FUSE_SUPER_MAGIC: {"fuse", "what it does when told to sync is known to its program alone, and the sensor would hang when that hangs"},
}

// Hazards looks at the place that dir has, or will have once it is made. The error is that
// it cannot be looked at.
func Hazards(dir string) ([]Hazard, error) {
	at := dir
	for {
		if _, err := os.Stat(at); err == nil || filepath.Dir(at) == at {
			break
		}
		at = filepath.Dir(at)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return nil, fmt.Errorf("file system of %s: %w", at, err)
	}
	magic := uint32(fs.Type) //nolint:gosec // G115: that is how the numbers are defined
	if h, ok := hazardous[magic]; ok {
		return []Hazard{{Dir: dir, FS: h.fs, What: h.what, Remedy: useDisk, Unsafe: true}}, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(at, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", at, err)
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	switch magic {
	case unix.OVERLAYFS_SUPER_MAGIC:
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return nil, err
		}
		return overlayHazards(dir, dev, mounts), nil
	case unix.EXT4_SUPER_MAGIC:
		link, err := os.Readlink("/sys/dev/block/" + dev)
		if err != nil {
			return nil, nil // nothing to know
		}
		info, err := os.ReadFile(filepath.Join("/proc/fs/ext4", filepath.Base(link), "fc_info"))
		if err != nil {
			return nil, nil
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return nil, err
		}
		return ext4Hazards(dir, unix.ByteSliceToString(u.Release[:]), info), nil
	}
	return nil, nil
}

// overlayHazards: a layer syncs as the file system below it does, unless it was mounted to
// do without, and goes with its container.
func overlayHazards(dir, dev string, mountinfo []byte) []Hazard {
	for s := bufio.NewScanner(bytes.NewReader(mountinfo)); s.Scan(); {
		// 36 35 98:0 /root /mount options fields - type source superoptions
		before, after, _ := strings.Cut(s.Text(), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if len(f) < 3 || len(g) < 3 || f[2] != dev || g[0] != "overlay" {
			continue
		}
		for o := range strings.SplitSeq(g[2], ",") {
			if o == "volatile" || o == "fsync=volatile" {
				return []Hazard{{Dir: dir, FS: "overlay", What: "it is mounted as volatile and syncs nothing", Remedy: useDisk, Unsafe: true}}
			}
		}
	}
	return []Hazard{{Dir: dir, FS: "overlay", What: "a layer of a container is removed with it, and with it what was not delivered", Remedy: "mount a volume there"}}
}

// ext4Hazards: until Linux 5.17 fast commits could lose what was synced.
func ext4Hazards(dir, release string, fcInfo []byte) []Hazard {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 || major > 5 || major == 5 && minor >= 17 {
		return nil
	}
	for line := range strings.Lines(string(fcInfo)) {
		f := strings.Fields(line)
		if len(f) != 2 || f[1] != "commits" {
			continue
		}
		if n, err := strconv.ParseUint(f[0], 10, 64); err != nil || n == 0 {
			return nil
		}
		return []Hazard{{
			Dir: dir, FS: "ext4", What: "it uses fast commits, which in Linux " + release + " may lose what was synced when the power fails",
			Remedy: "update to Linux 5.17, or switch the feature fast_commit off with tune2fs",
		}}
	}
	return nil
}
