// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// tally counts operations by the kind of event that they are.
type tally [event.Kinds]uint64

// exerciseDir is the directory that an exercise makes, and removes again.
const exerciseDir = ".edr-sensor-exercise"

// exercise does once what each file hook is there to see, in a directory of its own, on
// a thread whose doings the programs count instead of reporting. It returns how often
// each kind was done, and how often a program saw it.
func (k *kernel) exercise(dir string) (done, seen tally, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := k.announce(announcedExercise, 0); err != nil {
		return done, seen, err
	}
	before, err := k.exercised()
	if err == nil {
		done, err = changeFiles(filepath.Join(dir, exerciseDir))
	}
	// Taken back by this very thread: its number is nobody else's until then.
	err = errors.Join(err, k.maps["announced_threads"].Put(announcedExercise, announcement{}))
	after, errAfter := k.exercised()
	for kind := range seen {
		seen[kind] = after[kind] - before[kind]
	}
	return done, seen, errors.Join(err, errAfter)
}

// exercised reads how often the programs met an exercise so far.
func (k *kernel) exercised() (t tally, err error) {
	m := k.maps["exercised"]
	for kind := range min(m.MaxEntries(), uint32(len(t))) {
		if err := m.Lookup(kind, &t[kind]); err != nil {
			return t, fmt.Errorf("read exercised of %s: %w", event.Kind(kind), err)
		}
	}
	return t, nil
}

// changeFiles makes a directory, does every operation on files in it, and removes it. It
// names files by the open directory, so that nobody can slip another one in between. What
// the file system does not take is not counted as done, and no error.
func changeFiles(dir string) (done tally, err error) {
	removeLeftovers(dir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return done, fmt.Errorf("exercise hooks: %w", err)
	}
	done[event.FileMkdir]++
	defer func() {
		if errRemove := unix.Rmdir(dir); errRemove == nil {
			done[event.FileDelete]++
		} else {
			err = errors.Join(err, fmt.Errorf("exercise hooks: rmdir %s: %w", dir, errRemove))
		}
	}()
	at, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return done, fmt.Errorf("exercise hooks: open %s: %w", dir, err)
	}
	defer unix.Close(at)

	count := func(err error, kinds ...event.Kind) {
		for _, kind := range kinds {
			if err == nil {
				done[kind]++
			}
		}
	}
	written := func(flags int) error {
		fd, err := unix.Openat(at, "a", flags|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		_, err = unix.Write(fd, []byte("edr"))
		return errors.Join(err, unix.Close(fd))
	}
	if err := written(unix.O_CREAT | unix.O_EXCL); err != nil {
		return done, fmt.Errorf("exercise hooks: make a file in %s: %w", dir, err)
	}
	count(nil, event.FileCreate, event.FileModify, event.FileOpenWrite)
	count(unix.Linkat(at, "a", at, "b", 0), event.FileLink)
	count(unix.Symlinkat("a", at, "c"), event.FileSymlink)
	count(unix.Fchmodat(at, "a", 0o640, 0), event.FileChmod)
	count(unix.Fchownat(at, "a", os.Geteuid(), os.Getegid(), 0), event.FileChown)
	past := []unix.Timespec{{Sec: 1_000_000_000}, {Sec: 1_000_000_000}}
	count(unix.UtimesNanoAt(at, "a", past, 0), event.FileTimes)
	if fd, err := unix.Openat(at, "a", unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err == nil {
		count(unix.Ftruncate(fd, 1), event.FileTruncate)
		changeXattrs(fd, count)
		if flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS); err == nil {
			count(unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags), event.FileChattr)
		}
		count(unix.Close(fd))
	}
	count(unix.Renameat(at, "b", at, "d"), event.FileRename)
	for _, name := range []string{"a", "c", "d"} {
		count(unix.Unlinkat(at, name, 0), event.FileDelete)
	}
	return done, nil
}

// removeLeftovers removes what the exercise of a sensor that was killed has made, and
// nothing else: whoever has put something there finds it again, and the exercise fails.
func removeLeftovers(dir string) {
	for _, name := range []string{"a", "b", "c", "d"} {
		_ = unix.Unlink(filepath.Join(dir, name)) // mostly there is none; Mkdir says what is in the way
	}
	_ = unix.Rmdir(dir)
}

// changeXattrs sets and removes an attribute and an ACL: newer kernels have hooks of
// their own for the latter. Which names a file system takes is up to it.
func changeXattrs(fd int, count func(error, ...event.Kind)) {
	acl := binary.LittleEndian.AppendUint32(nil, 2) // version
	for _, entry := range [][2]uint16{{0x01, 6}, {0x04, 4}, {0x20, 0}} {
		acl = binary.LittleEndian.AppendUint16(acl, entry[0])
		acl = binary.LittleEndian.AppendUint16(acl, entry[1])
		acl = binary.LittleEndian.AppendUint32(acl, ^uint32(0))
	}
	for _, attr := range []struct {
		name  string
		value []byte
	}{{"user.edr", []byte("edr")}, {"trusted.edr", []byte("edr")}, {"system.posix_acl_access", acl}} {
		if err := unix.Fsetxattr(fd, attr.name, attr.value, 0); err == nil {
			count(nil, event.FileXattr)
			count(unix.Fremovexattr(fd, attr.name), event.FileXattr)
		}
	}
}

// exerciseTries is how often a kind is tried that nothing saw: the kernel leaves out a
// program that was interrupted on its CPU.
const exerciseTries = 3

// examine finds out which attached hooks do not work: why, by their place in attached.
// Those of files are exercised, of the others the kernel is asked whether they are
// there. The error says why no exercise was possible; then it is asked for all.
func (k *kernel) examine(dir string) (lost map[int]error, err error) {
	var unseen map[event.Kind]error
	for range exerciseTries {
		done, seen, errTry := k.exercise(dir)
		if errTry != nil {
			unseen, err = nil, errTry
			break
		}
		var missed map[event.Kind]error
		for kind := range event.Kind(event.Kinds) {
			if seen[kind] >= done[kind] {
				continue
			}
			if missed == nil {
				missed = map[event.Kind]error{}
			}
			missed[kind] = fmt.Errorf("of %d %s that the sensor made to try its hooks, %d were seen", done[kind], kind, seen[kind])
		}
		unseen = missed
		if !k.covers(unseen) {
			break
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	lost = map[int]error{}
	for i := range k.attached {
		if why := k.attached[i].examine(unseen); why != nil {
			lost[i] = why
		}
	}
	return lost, err
}

// covers tells whether a hook is there to see one of the kinds.
func (k *kernel) covers(kinds map[event.Kind]error) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(k.attached, func(a attachment) bool {
		return a.section != "" && slices.ContainsFunc(a.kinds, func(kind event.Kind) bool { return kinds[kind] != nil })
	})
}

// examine says why the hook does not work, nil when nothing is known against it.
func (a *attachment) examine(unseen map[event.Kind]error) error {
	var errs []error
	switch {
	case a.section == "":
		return nil // never attached: the start has said so
	case a.missing():
		errs = append(errs, errors.New("its programs could not be attached again"))
	}
	programs := append(slices.Clip(a.programs), a.spares...)
	for i, l := range a.links {
		if err := alive(l, programs[i]); err != nil {
			errs = append(errs, err)
		}
	}
	for _, kind := range a.kinds {
		if err := unseen[kind]; err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// alive asks the kernel whether the link is there and runs the program. Some links of
// older kernels cannot be asked.
func alive(l link.Link, program *ebpf.Program) error {
	info, err := l.Info()
	if errors.Is(err, ebpf.ErrNotSupported) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the kernel no longer knows the link: %w", err)
	}
	p, err := program.Info()
	if err != nil {
		return fmt.Errorf("the kernel no longer knows the program: %w", err)
	}
	if id, ok := p.ID(); ok && id != info.Program {
		return fmt.Errorf("the link runs program %d in place of %d", info.Program, id)
	}
	return nil
}

// hookChange is what became of a hook between two examinations.
type hookChange struct {
	kinds         []event.Kind
	before, after string // sections; empty for none
	why           error  // it was lost; nil when it came back by itself
}

// mend examines the hooks and puts others in the place of those that are lost: the same
// form anew, then what is next in the chain, and system calls at last. A hook for which
// nothing works stays as it is, and is back when it is seen to work again.
func (k *kernel) mend(dir string) (changes []hookChange, err error) {
	lost, err := k.examine(dir)
	before := k.hooks()
	mended := false
	var refused []int // hooks of which no form works
	for i, why := range lost {
		switch {
		case before[i].lost != nil && !before[i].missing(), before[i].told():
			// Nothing worked when it was lost, or system calls tell, which are a hook
			// of their own.
		case k.reattach(i, why, dir):
			mended = true
		default:
			refused = append(refused, i)
		}
	}
	mended = k.settle(refused, before) || mended
	still := lost
	if mended {
		still, err = k.examine(dir)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.detached { // on purpose, meanwhile
		return nil, err
	}
	for i := range k.attached {
		a := &k.attached[i]
		a.lost = still[i]
		if i >= len(before) {
			continue // system calls: they are said to be what took another's place
		}
		c := hookChange{kinds: a.kinds, before: before[i].seenBy(), after: a.seenBy(), why: lost[i]}
		if before[i].lost == nil && lost[i] != nil || c.before == "" && c.after != "" {
			changes = append(changes, c)
		}
	}
	return changes, err
}

// hooks copies what is attached.
func (k *kernel) hooks() []attachment {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.attached)
}

// reattach replaces a lost hook and tells whether another one works. If none does, nothing
// is attached any more.
func (k *kernel) reattach(i int, why error, dir string) bool {
	k.mu.Lock()
	old := k.attached[i]
	if k.detached {
		k.mu.Unlock()
		return false
	}
	if n, err := old.missed(); err == nil {
		k.gone += n
	}
	// The link that is lost may be no more than deaf: two of a kind would report twice.
	errs := []error{fmt.Errorf("%s: %w", old.section, errors.Join(why, k.attached[i].detach()))}
	k.mu.Unlock()

	load := k.loader()
	for at := old.candidate; at < len(old.chain); at++ {
		a := attachment{hook: old.hook}
		err := a.take(at, load)
		if err == nil {
			err = k.works(&a, dir)
		}
		if err != nil {
			errs = append(errs, errors.Join(err, a.detach()))
			continue
		}
		a.errs = append(errs, a.errs...)
		return k.replace(i, a)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.attached[i].errs = errs
	return false
}

// settle has system calls tell what hooks saw of which no form works, all at once: each
// change of what they tell has the kernel patch the way out of every one of them. What
// they cannot tell is attached as it was, since it may work again.
func (k *kernel) settle(refused []int, before []attachment) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.detached || len(refused) == 0 {
		return false
	}
	load := k.loader()
	told := false
	if slices.ContainsFunc(refused, func(i int) bool { return len(k.attached[i].syscalls) > 0 }) {
		k.attachSyscalls(load)
		told = k.attached[len(k.attached)-1].section == sysExit
	}
	for _, i := range refused {
		if told && (len(k.attached[i].syscalls) > 0 || before[i].section == sysExit) {
			continue
		}
		a := attachment{hook: before[i].hook, errs: k.attached[i].errs}
		if err := a.take(before[i].candidate, load); err != nil {
			a.errs = append(a.errs, errors.Join(err, a.detach()))
			a.section = before[i].section
		}
		k.attached[i] = a
	}
	return true
}

// works tries what was just attached.
func (k *kernel) works(a *attachment, dir string) (err error) {
	for range exerciseTries {
		unseen := map[event.Kind]error{}
		if done, seen, errTry := k.exercise(dir); errTry == nil {
			for _, kind := range a.kinds {
				if seen[kind] < done[kind] {
					unseen[kind] = fmt.Errorf("%s was attached and saw %d of %d %s", a.section, seen[kind], done[kind], kind)
				}
			}
		}
		if err = a.examine(unseen); err == nil {
			return nil
		}
	}
	return err
}

// replace puts an attachment in place, unless all were detached meanwhile.
func (k *kernel) replace(i int, a attachment) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.detached {
		_ = a.detach() // nothing is left to be told of it
		return false
	}
	k.attached[i] = a
	return true
}

// told tells whether system calls are in the hook's place, which are one of their own.
func (a *attachment) told() bool { return a.section == sysExit && len(a.links) == 0 }

// missing tells whether nothing is attached of what should be.
func (a *attachment) missing() bool { return a.section != "" && len(a.links) == 0 && !a.told() }

// seenBy is the section of the programs that work, empty when none does.
func (a *attachment) seenBy() string {
	if a.lost != nil {
		return ""
	}
	return a.section
}
