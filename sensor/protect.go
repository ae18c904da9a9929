// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
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
	protection struct{ Of, Reach, Generation, GenerationKnown uint32 }
)

// found is what there is at a path.
type found struct {
	key             fileKey
	directory       bool
	generation      uint32 // by which it differs from what gets its number after it
	generationKnown bool
}

// protections are what the programs look for, by inode and by name.
type protections struct {
	files map[fileKey]protection
	names map[nameKey]uint32
}

// protectionsOf looks up where the protected files are now.
func protectionsOf(list []Protected) protections {
	p := protections{map[fileKey]protection{}, map[nameKey]uint32{}}
	mounts := mountTable()
	for _, x := range list {
		path, of := filepath.Clean(x.Path), uint32(x.Part)
		p.name(fileKey{}, path, of)
		if real, err := filepath.EvalSymlinks(path); err == nil && real != path {
			p.add(real, of, x.All, mounts) // the link itself is protected, too
			p.name(fileKey{}, real, of)
		}
		p.add(path, of, x.All, mounts)
	}
	return p
}

// add protects what is at path, or the first of its parts that is not there, and what
// lies above.
func (p protections) add(path string, of uint32, all bool, mounts map[uint64]mountPoint) {
	if at, err := look(path, mounts); err == nil {
		reach := reachItself
		if at.directory && all {
			reach |= reachChildren
		}
		p.file(at, of, reach)
	}
	named := false
	for path != "/" && path != "." {
		folder, base := filepath.Split(path)
		path = filepath.Clean(folder)
		at, err := look(path, mounts)
		if err != nil || !at.directory {
			continue
		}
		reach := reachAbove
		if !named {
			named = true
			reach |= reachNames
			p.name(at.key, base, of)
		}
		p.file(at, of, reach)
	}
}

func (p protections) file(at found, of, reach uint32) {
	now := protection{Of: of, Reach: reach, Generation: at.generation}
	if at.generationKnown {
		now.GenerationKnown = 1
	}
	if was, ok := p.files[at.key]; ok {
		now.Reach |= was.Reach
		switch { // what it is itself counts for more
		case was.Reach&reachItself == reach&reachItself:
			now.Of |= was.Of
		case was.Reach&reachItself != 0:
			now.Of = was.Of
		}
		if was.Generation != now.Generation || was.GenerationKnown != now.GenerationKnown {
			now.Generation, now.GenerationKnown = 0, 0 // replaced meanwhile: protect either
		}
	}
	p.files[at.key] = now
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

// look looks up an inode, and its device as the kernel has it: stat(2) gives subvolumes
// another one.
func look(path string, mounts map[uint64]mountPoint) (at found, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_INO|unix.STATX_TYPE|unix.STATX_MNT_ID, &st); err != nil {
		return at, err
	}
	on, ok := mounts[st.Mnt_id]
	if !ok || st.Mask&unix.STATX_MNT_ID == 0 {
		on = mountPoint{device: uint64(st.Dev_major)<<20 | uint64(st.Dev_minor)}
	}
	at.key = fileKey{st.Ino, on.device}
	at.directory = st.Mode&unix.S_IFMT == unix.S_IFDIR
	if on.generations() {
		at.generation, at.generationKnown = generationOf(path, &st)
	}
	return at, nil
}

// Types of file handles.
const (
	handleIno32 = 0x01 // FILEID_INO32_GEN
	handleIno64 = 0x81 // the same with XFS_FILEID_TYPE_64FLAG
)

// generationOf takes the generation of an inode out of its file handle. That opens nothing,
// and needs no permission to.
func generationOf(path string, st *unix.Statx_t) (generation uint32, known bool) {
	handle, id, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil || uint64(id) != st.Mnt_id {
		return 0, false
	}
	var ino uint64
	b := handle.Bytes()
	switch {
	case handle.Type() == handleIno32 && len(b) >= 8:
		ino, b = uint64(binary.NativeEndian.Uint32(b)), b[4:]
	case handle.Type() == handleIno64 && len(b) >= 12:
		ino, b = binary.NativeEndian.Uint64(b), b[8:]
	}
	if ino != st.Ino {
		return 0, false // of a kind that is not known, or replaced meanwhile
	}
	return binary.NativeEndian.Uint32(b), true
}

// mountPoint is where a file system is mounted.
type mountPoint struct {
	device uint64 // major << 20 | minor
	fs     string
}

// generations tells whether file handles have the generation that the programs see. Another
// one would leave the file unprotected: an overlay's own inodes have none, the files below it
// do. And of other file systems most never give a number away again.
func (m mountPoint) generations() bool {
	return m.fs == "ext4" || m.fs == "ext3" || m.fs == "ext2" || m.fs == "xfs"
}

// mountTable lists the mounts by their ids.
func mountTable() map[uint64]mountPoint {
	list := map[uint64]mountPoint{}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return list // stat(2) is right on most file systems
	}
	for line := range strings.Lines(string(data)) {
		line, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		fs, _, _ := strings.Cut(after, " ")
		major, minor, _ := strings.Cut(f[2], ":")
		id, err1 := strconv.ParseUint(f[0], 10, 64)
		a, err2 := strconv.ParseUint(major, 10, 32)
		b, err3 := strconv.ParseUint(minor, 10, 32)
		if errors.Join(err1, err2, err3) == nil {
			list[id] = mountPoint{a<<20 | b, fs}
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
	ns, err := namespaceOf(strconv.Itoa(pid), "pid")
	if err != nil {
		return fmt.Errorf("own pid namespace: %w", err)
	}
	if err := m.Put(uint32(0), bpf.SensorSensorProcess{PidNs: ns, Tgid: uint32(pid)}); err != nil {
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
