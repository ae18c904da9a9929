// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	fileClass         = `"category_uid":1,"category_name":"System Activity","class_uid":1001,"class_name":"File System Activity",`
	fileCreate        = `"activity_id":1,"activity_name":"Create","type_uid":100101,"type_name":"File System Activity: Create",`
	fileUpdate        = `"activity_id":3,"activity_name":"Update","type_uid":100103,"type_name":"File System Activity: Update",`
	fileDelete        = `"activity_id":4,"activity_name":"Delete","type_uid":100104,"type_name":"File System Activity: Delete",`
	fileRename        = `"activity_id":5,"activity_name":"Rename","type_uid":100105,"type_name":"File System Activity: Rename",`
	fileSetAttributes = `"activity_id":6,"activity_name":"Set Attributes","type_uid":100106,"type_name":"File System Activity: Set Attributes",`
	fileSetSecurity   = `"activity_id":7,"activity_name":"Set Security","type_uid":100107,"type_name":"File System Activity: Set Security",`
	fileMount         = `"activity_id":12,"activity_name":"Mount","type_uid":100112,"type_name":"File System Activity: Mount",`
	fileUnmount       = `"activity_id":13,"activity_name":"Unmount","type_uid":100113,"type_name":"File System Activity: Unmount",`
	fileOpen          = `"activity_id":14,"activity_name":"Open","type_uid":100114,"type_name":"File System Activity: Open",`

	undecided = `"status_id":0,"status":"Unknown",`
)

func isFile(k event.Kind) bool { return k >= event.FileCreate && k <= event.FileChattr }

func fileActivity(ev *event.Event) string {
	switch ev.Kind {
	case event.FileModify, event.FileTruncate:
		return fileUpdate
	case event.FileDelete:
		return fileDelete
	case event.FileRename:
		return fileRename
	case event.FileChmod, event.FileChown:
		return fileSetSecurity
	case event.FileXattr:
		// Capabilities, labels and access control lists.
		if bytes.HasPrefix(ev.File.Name, []byte("security.")) || bytes.HasPrefix(ev.File.Name, []byte("system.")) {
			return fileSetSecurity
		}
		return fileSetAttributes
	case event.FileTimes, event.FileChattr:
		return fileSetAttributes
	case event.Mount, event.MountMove: // newer tools mount by moving a mount into place
		return fileMount
	case event.Umount:
		return fileUnmount
	case event.FileOpenWrite:
		return fileOpen
	}
	return fileCreate
}

func (e *Encoder) file(w *writer, ev *event.Event) {
	f := &ev.File
	w.raw(fileClass)
	w.raw(fileActivity(ev))
	w.raw(severity(ev.Severity))
	switch {
	case ev.Kind == event.FileModify, f.Flags&event.FileDegraded != 0:
		w.raw(success)
	default: // the hook runs before the kernel acts
		w.raw(undecided)
	}
	w.raw(e.device)
	w.actingProcess(ev)
	switch ev.Kind {
	case event.FileRename:
		w.object(`"file":{`, ev, f.Path, previous)
		w.object(`"file_result":{`, ev, f.Path2, result)
	case event.FileLink, event.MountMove:
		w.object(`"file":{`, ev, f.Path2, previous)
	case event.FileChmod, event.FileChown, event.FileTruncate, event.FileTimes, event.FileChattr:
		w.object(`"file":{`, ev, f.Path, previous)
		w.object(`"file_result":{`, ev, f.Path, result)
	case event.FileCreate, event.FileMkdir:
		w.object(`"file":{`, ev, f.Path, result)
	default:
		w.object(`"file":{`, ev, f.Path, previous)
	}
	if isOpened(ev) {
		w.uint(`"access_mask":`, uint64(f.OpenFlags))
	}

	w.open(`"unmapped":{`)
	w.opt(`"sensor_part":`, f.Flags.Part())
	w.change(ev)
	if f.MntNS != 0 {
		w.uint(`"mnt_ns":`, uint64(f.MntNS))
	}
	w.uid(`"cgroup_id":`, f.CgroupID)
	if f.Suppressed != 0 {
		w.uint(`"suppressed_before":`, uint64(f.Suppressed))
	}
	w.degraded(ev)
	w.close('}')
}

// isOpened tells whether the event has the flags that the file is open with.
func isOpened(ev *event.Event) bool {
	switch ev.Kind {
	case event.FileModify, event.FileOpenWrite:
		return true
	case event.FileCreate:
		return ev.File.OpenFlags != 0
	}
	return false
}

// degraded labels what was taken from a system call: whoever made it may have
// changed the arguments since, and io_uring makes none.
func (w *writer) degraded(ev *event.Event) {
	f := &ev.File
	if f.Flags&(event.FileDegraded|event.FileArgument) == 0 {
		return
	}
	w.open(`"degraded":{`)
	if f.Flags&event.FileDegraded == 0 {
		w.raw(`"reason":"ioctl_argument",`)
	} else if f.Flags&event.FileWalked != 0 {
		w.raw(`"reason":"syscall_descriptor",`)
	} else {
		w.raw(`"reason":"syscall_argument",`)
	}
	relative := f.Flags&event.FileRelative != 0
	if ev.Kind == event.FileRename || ev.Kind == event.FileLink || ev.Kind == event.MountMove {
		relative = relative || len(f.Path2) > 0 && f.Path2[0] != '/'
	}
	w.flag(`"relative":`, relative)
	w.close('}')
}

// change writes what the files before and after do not show.
func (w *writer) change(ev *event.Event) {
	f := &ev.File
	switch ev.Kind {
	case event.FileModify:
		at := w.begin(`"write":{`)
		if f.Written != 0 {
			w.uint(`"bytes":`, f.Written)
		}
		w.flag(`"created":`, f.Flags&event.FileCreatedHere != 0)
		w.flag(`"opened_before_start":`, f.Flags&event.FileEarly != 0)
		w.end(at, '}')
	case event.FileDelete:
		if f.File.Ino != 0 && !isFolder(ev) {
			w.open(`"delete":{`)
			w.uint(`"nlink_left":`, uint64(max(f.File.Nlink, 1)-1))
			w.close('}')
		}
	case event.FileRename:
		w.rename(f)
	case event.FileChmod:
		w.open(`"chmod":{`)
		if unchanged(f, event.FileNewMode) {
			w.mode(`"old_mode":`, f.File.Mode)
		}
		if f.Flags&event.FileNewMode != 0 {
			w.mode(`"new_mode":`, f.NewMode)
		}
		w.close('}')
	case event.FileXattr:
		w.open(`"xattr":{`)
		w.text(`"name":`, `"name_base64":`, f.Name)
		w.flag(`"removed":`, f.Flags&event.FileXattrRemoved != 0)
		w.close('}')
	case event.FileTimes:
		w.open(`"utimes":{`)
		if unchanged(f, event.FileNewMTime) {
			w.ns(`"old_mtime_ns":`, f.File.MTime)
		}
		if f.Flags&event.FileNewMTime != 0 {
			w.ns(`"mtime_ns":`, f.NewMTime)
		}
		if f.Flags&event.FileNewATime != 0 {
			w.ns(`"atime_ns":`, f.NewATime)
		}
		w.close('}')
	case event.FileChattr:
		w.open(`"chattr":{`)
		if unchanged(f, ^event.FileFlags(0)) {
			w.attributes(`"old_flags":[`, f.Attributes)
		}
		w.attributes(`"new_flags":[`, f.NewAttributes)
		w.close('}')
	case event.Mount, event.Umount, event.MountMove:
		w.mount(ev)
	}
	if isOpened(ev) {
		at := w.begin(`"open":{`)
		w.openFlags(f.OpenFlags)
		w.end(at, '}')
	}
}

func (w *writer) rename(f *event.FileInfo) {
	const flags = event.FileReplaced | event.FileExchanged | event.FileWhiteout
	if f.Flags&flags == 0 {
		return
	}
	w.open(`"rename":{`)
	w.flag(`"replaced":`, f.Flags&event.FileReplaced != 0)
	w.flag(`"exchanged":`, f.Flags&event.FileExchanged != 0)
	w.flag(`"whiteout":`, f.Flags&event.FileWhiteout != 0)
	if f.TargetIno != 0 { // on the same file system
		w.inode(`"target_uid":`, &f.File, f.TargetIno)
	}
	w.close('}')
}

func (w *writer) mount(ev *event.Event) {
	f := &ev.File
	at := w.begin(`"mount":{`)
	if len(f.Name) > 0 {
		w.text(`"fstype":`, `"fstype_base64":`, f.Name)
	}
	switch ev.Kind {
	case event.Mount:
		base64IfInvalid(w, `"source_base64":`, f.Path2)
		w.mountFlags(f.OpenFlags)
	case event.Umount:
		w.umountFlags(f.OpenFlags)
	default:
		if len(f.Path) > 0 {
			w.text(`"from":`, `"from_base64":`, f.Path)
		}
	}
	w.end(at, '}')
}

// version is one of the two states that a change has.
type version uint8

const (
	previous version = iota
	result
)

// object writes the thing in the file system that the event is about.
func (w *writer) object(open string, ev *event.Event, path []byte, v version) {
	f := &ev.File
	folder, name := split(path)
	w.open(open)
	if len(name) == 0 {
		w.raw(`"name":"unknown",`)
	} else {
		w.bytes(`"name":`, name)
		w.bytes(`"path":`, path)
		if len(folder) > 0 {
			w.bytes(`"parent_folder":`, folder)
		}
	}
	w.raw(fileType(ev))
	known := f.File.Ino != 0
	if known {
		w.inode(`"uid":`, &f.File, f.File.Ino)
	}
	if ev.Kind == event.Mount && len(f.Path2) > 0 {
		w.bytes(`"volume":`, f.Path2)
	}
	w.flag(`"is_deleted":`, ev.Kind == event.FileDelete && known && (f.File.Nlink <= 1 || isFolder(ev)))
	changed := func(flag event.FileFlags) bool { return v == result && f.Flags&flag != 0 }

	switch {
	case changed(event.FileNewSize):
		w.uint(`"size":`, f.NewSize)
	case unchanged(f, event.FileNewSize) && !isFolder(ev):
		w.uint(`"size":`, f.File.Size)
	}
	switch {
	case changed(event.FileNewMTime):
		w.ms(`"modified_time":`, f.NewMTime)
	case unchanged(f, event.FileNewMTime) && !changed(event.FileNewSize): // which sets it to now
		w.ms(`"modified_time":`, f.File.MTime)
	}
	if changed(event.FileNewATime) {
		w.ms(`"accessed_time":`, f.NewATime)
	}
	switch {
	case changed(event.FileNewUID):
		w.ownedBy(f.NewUID, f.NewOwner)
	case unchanged(f, event.FileNewUID):
		w.ownedBy(f.File.UID, f.Owner)
	}
	if ev.Kind == event.FileChattr && v == result {
		w.uint(`"attributes":`, uint64(f.NewAttributes))
	}
	at := w.begin(`"xattributes":{`)
	switch {
	case changed(event.FileNewMode):
		w.mode(`"mode":`, f.NewMode)
	case unchanged(f, event.FileNewMode):
		w.mode(`"mode":`, f.File.Mode)
	}
	switch {
	case changed(event.FileNewGID):
		w.uid(`"gid":`, uint64(f.NewGID))
	case unchanged(f, event.FileNewGID):
		w.uid(`"gid":`, uint64(f.File.GID))
	}
	if known {
		if ev.Kind == event.FileLink {
			w.uint(`"hard_link_count":`, uint64(f.File.Nlink)+1)
		} else {
			w.uint(`"nlink":`, uint64(f.File.Nlink))
		}
		if v == previous {
			w.ms(`"changed_time":`, f.File.CTime)
		}
		w.fsMagic(f.File.FSMagic)
	}
	switch {
	case ev.Kind == event.FileLink && len(f.Path) > 0:
		w.text(`"link_target":`, `"link_target_base64":`, f.Path)
	case ev.Kind == event.FileSymlink && len(f.Path2) > 0:
		w.text(`"link_target":`, `"link_target_base64":`, f.Path2)
	}
	base64IfInvalid(w, `"path_base64":`, path)
	w.end(at, '}')
	w.close('}')
}

// unchanged tells whether it is known how an attribute was before. What a system call
// tells of is described when the call is over.
func unchanged(f *event.FileInfo, flag event.FileFlags) bool {
	return f.File.Ino != 0 && (f.Flags&event.FileDegraded == 0 || f.Flags&flag == 0)
}

// split returns the folder and the name of a path; "/" is its own name.
func split(path []byte) (folder, name []byte) {
	for len(path) > 1 && path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	slash := bytes.LastIndexByte(path, '/')
	if slash < 0 || len(path) == 1 {
		return nil, path
	}
	return path[:max(slash, 1)], path[slash+1:]
}

func isFolder(ev *event.Event) bool {
	return ev.File.Flags&event.FileDirectory != 0 || ev.Kind == event.FileMkdir || ev.File.File.Mode&unix.S_IFMT == unix.S_IFDIR
}

func fileType(ev *event.Event) string {
	if isFolder(ev) {
		return `"type_id":2,"type":"Folder",`
	}
	mode := ev.File.File.Mode & unix.S_IFMT
	if mode == 0 && ev.File.Flags&event.FileNewMode != 0 {
		mode = ev.File.NewMode & unix.S_IFMT
	}
	if mode == 0 {
		switch ev.Kind {
		case event.FileSymlink:
			mode = unix.S_IFLNK
		case event.FileCreate, event.FileModify, event.FileTruncate, event.FileOpenWrite: // mknod(2) takes none for this
			mode = unix.S_IFREG
		}
	}
	switch mode {
	case unix.S_IFREG:
		return `"type_id":1,"type":"Regular File",`
	case unix.S_IFCHR:
		return `"type_id":3,"type":"Character Device",`
	case unix.S_IFBLK:
		return `"type_id":4,"type":"Block Device",`
	case unix.S_IFSOCK:
		return `"type_id":5,"type":"Local Socket",`
	case unix.S_IFIFO:
		return `"type_id":6,"type":"Named Pipe",`
	case unix.S_IFLNK:
		return `"type_id":7,"type":"Symbolic Link",`
	}
	return `"type_id":0,"type":"Unknown",`
}

// inode writes device and inode as one identifier.
func (w *writer) inode(key string, f *event.File, ino uint64) {
	w.raw(key)
	w.b = append(w.b, '"')
	w.b = append(strconv.AppendUint(w.b, uint64(f.DevMajor), 10), ':')
	w.b = append(strconv.AppendUint(w.b, uint64(f.DevMinor), 10), ':')
	w.b = append(strconv.AppendUint(w.b, ino, 10), '"', ',')
}

// mode writes permissions as chmod(1) takes them.
func (w *writer) mode(key string, mode uint32) {
	w.raw(key)
	w.b = append(w.b, '"', '0'+byte(mode>>9&7), '0'+byte(mode>>6&7), '0'+byte(mode>>3&7), '0'+byte(mode&7), '"', ',')
}

func (w *writer) ownedBy(uid uint32, name string) {
	w.open(`"owner":{`)
	w.uid(`"uid":`, uint64(uid))
	w.opt(`"name":`, name)
	w.close('}')
}

func (w *writer) fsMagic(magic uint32) {
	w.raw(`"fs_magic":"0x`)
	w.b = append(strconv.AppendUint(w.b, uint64(magic), 16), '"', ',')
}

// text writes a string and, when it is not UTF-8, its bytes.
func (w *writer) text(key, base64Key string, s []byte) {
	w.bytes(key, s)
	base64IfInvalid(w, base64Key, s)
}

// ns writes nanoseconds as a string: they exceed what JSON readers keep.
func (w *writer) ns(key string, n int64) {
	b := append(append(w.b, key...), '"')
	w.b = append(strconv.AppendInt(b, n, 10), '"', ',')
}

type flagName struct {
	bits uint32
	name string
}

// flags writes the names of the flags that are set.
func (w *writer) flags(set uint32, names []flagName) {
	for _, n := range names {
		if set&n.bits == n.bits {
			w.str(``, n.name)
		}
	}
}

// openFlags leaves out what only concerned the open itself, which the kernel forgets.
func (w *writer) openFlags(set uint32) {
	at := w.begin(`"flags":[`)
	switch set & unix.O_ACCMODE {
	case unix.O_WRONLY:
		w.raw(`"O_WRONLY",`)
	case unix.O_RDWR:
		w.raw(`"O_RDWR",`)
	}
	w.flags(set, []flagName{{unix.O_APPEND, "O_APPEND"}, {unix.O_TMPFILE, "O_TMPFILE"}, {unix.O_DIRECT, "O_DIRECT"}, {unix.O_SYNC, "O_SYNC"}})
	w.end(at, ']')
}

// attributes writes file flags, FS_*_FL in <linux/fs.h>, by the names of chattr(1).
func (w *writer) attributes(key string, set uint32) {
	w.open(key)
	w.flags(set, []flagName{
		{0x10, "immutable"},
		{0x20, "append_only"},
		{0x8, "synchronous"},
		{0x80, "no_atime"},
		{0x40, "no_dump"},
		{0x1, "secure_deletion"},
		{0x2, "undeletable"},
		{0x4, "compressed"},
		{0x100000, "verity"},
		{0x800000, "no_copy_on_write"},
		{0x40000000, "casefold"},
	})
	w.close(']')
}

func (w *writer) mountFlags(set uint32) {
	at := w.begin(`"flags":[`)
	w.flags(set, []flagName{
		{unix.MS_RDONLY, "MS_RDONLY"},
		{unix.MS_NOSUID, "MS_NOSUID"},
		{unix.MS_NODEV, "MS_NODEV"},
		{unix.MS_NOEXEC, "MS_NOEXEC"},
		{unix.MS_REMOUNT, "MS_REMOUNT"},
		{unix.MS_NOSYMFOLLOW, "MS_NOSYMFOLLOW"},
		{unix.MS_BIND, "MS_BIND"},
		{unix.MS_MOVE, "MS_MOVE"},
		{unix.MS_REC, "MS_REC"},
		{unix.MS_UNBINDABLE, "MS_UNBINDABLE"},
		{unix.MS_PRIVATE, "MS_PRIVATE"},
		{unix.MS_SLAVE, "MS_SLAVE"},
		{unix.MS_SHARED, "MS_SHARED"},
	})
	w.end(at, ']')
}

func (w *writer) umountFlags(set uint32) {
	at := w.begin(`"flags":[`)
	w.flags(set, []flagName{{unix.MNT_FORCE, "MNT_FORCE"}, {unix.MNT_DETACH, "MNT_DETACH"}, {unix.MNT_EXPIRE, "MNT_EXPIRE"}, {unix.UMOUNT_NOFOLLOW, "UMOUNT_NOFOLLOW"}})
	w.end(at, ']')
}

// cutPaths returns the attributes of which the upper part is missing.
func cutPaths(ev *event.Event) (cut [2]string) {
	if !isFile(ev.Kind) {
		return cut
	}
	first, second := `"file.path`, ""
	switch ev.Kind {
	case event.FileRename:
		second = `"file_result.path`
	case event.FileLink:
		first, second = `"file.xattributes.link_target`, `"file.path`
	case event.MountMove:
		first, second = `"unmapped.mount.from`, `"file.path`
	}
	if ev.File.Flags&event.FilePathTruncated != 0 {
		cut[0] = first
	}
	if ev.File.Flags&event.FilePath2Truncated != 0 {
		cut[1] = second
	}
	return cut
}
