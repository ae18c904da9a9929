// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Protected is a file or a directory of the sensor itself: who changes it is reported,
// whatever is excluded or limited. It need not be there.
type Protected struct {
	Path string          // absolute
	Part event.FileFlags // one of event.FileOfSensor
	All  bool            // what lies directly in the directory as well
}

const (
	reachItself   = uint32(bpf.SensorReachREACH_ITSELF)
	reachChildren = uint32(bpf.SensorReachREACH_CHILDREN)
	reachNames    = uint32(bpf.SensorReachREACH_NAMES)
	reachAbove    = uint32(bpf.SensorReachREACH_ABOVE)
)

type (
	fileKey struct{ Ino, Dev uint64 } // struct file_key of bpf/tamper.bpf.h
	nameKey struct {
		Directory fileKey
		Name      [len(bpf.SensorNameKey{}.Name)]byte
	}
	protection struct{ Of, Reach uint32 }
)

// protections are what the programs look for, by inode and by name.
type protections struct {
	files map[fileKey]protection
	names map[nameKey]uint32
}

// protectionsOf looks up where the protected files are now.
func protectionsOf(list []Protected) protections {
	p := protections{map[fileKey]protection{}, map[nameKey]uint32{}}
	devices := mountDevices()
	for _, x := range list {
		path, of := filepath.Clean(x.Path), uint32(x.Part)
		p.name(fileKey{}, path, of)
		if real, err := filepath.EvalSymlinks(path); err == nil && real != path {
			p.add(real, of, x.All, devices) // the link itself is protected, too
			p.name(fileKey{}, real, of)
		}
		p.add(path, of, x.All, devices)
	}
	return p
}

// add protects what is at path, or the first of its parts that is not there, and what
// lies above.
func (p protections) add(path string, of uint32, all bool, devices map[uint64]uint64) {
	if key, directory, err := keyAt(path, devices); err == nil {
		reach := reachItself
		if directory && all {
			reach |= reachChildren
		}
		p.file(key, of, reach)
	}
	named := false
	for path != "/" && path != "." {
		folder, base := filepath.Split(path)
		path = filepath.Clean(folder)
		key, directory, err := keyAt(path, devices)
		if err != nil || !directory {
			continue
		}
		reach := reachAbove
		if !named {
			named = true
			reach |= reachNames
			p.name(key, base, of)
		}
		p.file(key, of, reach)
	}
}

func (p protections) file(key fileKey, of, reach uint32) {
	was := p.files[key]
	if was.Reach&reachItself != 0 && reach&reachItself == 0 {
		of = 0 // what it is itself counts for more
	} else if was.Reach&reachItself == 0 && reach&reachItself != 0 {
		was.Of = 0
	}
	p.files[key] = protection{was.Of | of, was.Reach | reach}
}

// name protects a name in a directory. One that is too long for the programs is left to
// its inode.
func (p protections) name(directory fileKey, name string, of uint32) {
	key := nameKey{Directory: directory}
	if len(name) < len(key.Name) {
		copy(key.Name[:], name)
		p.names[key] |= of
	}
}

// keyAt looks up an inode, and its device as the kernel has it: stat(2) gives subvolumes
// another one.
func keyAt(path string, devices map[uint64]uint64) (key fileKey, directory bool, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_INO|unix.STATX_TYPE|unix.STATX_MNT_ID, &st); err != nil {
		return key, false, err
	}
	dev, ok := devices[st.Mnt_id]
	if !ok || st.Mask&unix.STATX_MNT_ID == 0 {
		dev = uint64(st.Dev_major)<<20 | uint64(st.Dev_minor)
	}
	return fileKey{st.Ino, dev}, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// mountDevices are the devices of the mounts, by their ids.
func mountDevices() map[uint64]uint64 {
	list := map[uint64]uint64{}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return list // stat(2) is right on most file systems
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		id, err1 := strconv.ParseUint(f[0], 10, 64)
		a, err2 := strconv.ParseUint(major, 10, 32)
		b, err3 := strconv.ParseUint(minor, 10, 32)
		if errors.Join(err1, err2, err3) == nil {
			list[id] = a<<20 | b
		}
	}
	return list
}

// beSensor tells the programs whose process is to be left alone: this one, or in tests
// another.
func (k *kernel) beSensor(pid int) error { return introduce(k.maps["sensor_self"], pid) }

func introduce(m *ebpf.Map, pid int) error {
	if pid == 0 {
		pid = os.Getpid()
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return fmt.Errorf("own pid namespace: %w", err)
	}
	_, inode, _ := strings.Cut(strings.TrimSuffix(link, "]"), "[")
	ns, err := strconv.ParseUint(inode, 10, 32)
	if err != nil {
		return fmt.Errorf("own pid namespace %s: %w", link, err)
	}
	if err := m.Put(uint32(0), bpf.SensorSensorProcess{PidNs: uint32(ns), Tgid: uint32(pid)}); err != nil {
		return fmt.Errorf("name own process: %w", err)
	}
	return nil
}

// Protect changes which files are those of the sensor itself, and looks up where they are
// now. Safe for concurrent use before Close.
func (s *Sensor) Protect(list []Protected) error { return s.kernel.protect(list) }

// protect has the programs look for what is on the list, where it is now.
func (k *kernel) protect(list []Protected) error {
	p := protectionsOf(list)
	if err := errors.Join(replace(k.maps["protected_files"], p.files), replace(k.maps["protected_names"], p.names)); err != nil {
		return fmt.Errorf("protect %d files: %w", len(list), err)
	}
	k.protected.Store(uint32(len(p.files)))
	k.filtering.Lock()
	defer k.filtering.Unlock()
	var f fileFilter
	filter := k.maps["file_filter"]
	if err := filter.Lookup(uint32(0), &f); err != nil {
		return fmt.Errorf("protect %d files: %w", len(list), err)
	}
	if f.ProtectedFiles == uint32(len(p.files)) {
		return nil
	}
	f.ProtectedFiles = uint32(len(p.files))
	if err := filter.Put(uint32(0), f); err != nil {
		return fmt.Errorf("protect %d files: %w", len(list), err)
	}
	return nil
}

// replace makes a map hold what is wanted and nothing else. What stays is never missing.
func replace[K, V comparable](m *ebpf.Map, wanted map[K]V) error {
	had := map[K]V{}
	var key K
	var value V
	it := m.Iterate()
	for it.Next(&key, &value) {
		had[key] = value
	}
	errs := []error{it.Err()}
	for key, value := range wanted {
		if old, ok := had[key]; !ok || old != value {
			errs = append(errs, m.Put(key, value))
		}
	}
	for key := range maps.Keys(had) {
		if _, ok := wanted[key]; !ok {
			if err := m.Delete(key); !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
