// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Kept is a descriptor that was kept. It belongs to whoever it is given to.
type Kept struct {
	Name string
	File *os.File
}

/*
 * What is kept is a set: all maps, programs and links of one kernel, and a manifest of
 * them in memory. Their names are edr/<set>/<what>, with the id of the priority ring's map
 * for the set and these for what:
 *
 *	map/<name>          a map
 *	program/<id>        a program
 *	link/<id>           what attaches the program of that id
 *	manifest/<number>   a manifest; the one with the highest number that is complete counts
 *
 * The buffer's mark names the rings that hold what follows it, and by that the one set
 * that counts. Any other is what a process left behind that died before it got that far:
 * it is dropped unread. So whenever a process dies, nothing is seen twice or not at all.
 */
const keptPrefix = "edr/"

const manifestLayout = 1

// manifest says what a set consists of. It comes from another process, perhaps of another
// version.
type manifest struct {
	Layout int
	BootID string
	Setup  string            // by which a kernel of the same setup is known
	Wire   map[uint32]string // the layout of its records, by the number of their kind
	State  map[string]string // that of the maps which another kernel can go on with
	Mended bool              // since it was attached: others may be better by now
	Maps   []string
	Hooks  []keptHook
}

// keptHook is an attachment. Programs and links are named by the programs' ids.
type keptHook struct {
	First            string // program of the hook's first candidate, by which it is known
	Kinds            []event.Kind
	Candidate        int
	Section          string
	Programs, Spares []string
	Errs             []string
}

// keptSet is what was kept of one kernel.
type keptSet struct {
	id       string
	files    map[string]*os.File // by what they are
	manifest *manifest
	number   int   // of the manifest
	replace  bool  // its programs are not to go on
	broken   error // why it is of no use
}

// readKept sorts what was kept into sets. What is in none is closed, and named.
func readKept(list []Kept) (sets []*keptSet, foreign []string) {
	byID := map[string]*keptSet{}
	for _, k := range list {
		id, what, ok := strings.Cut(strings.TrimPrefix(k.Name, keptPrefix), "/")
		if !ok || !strings.HasPrefix(k.Name, keptPrefix) {
			_ = k.File.Close() // it was never ours
			foreign = append(foreign, k.Name)
			continue
		}
		if byID[id] == nil {
			byID[id] = &keptSet{id: id, files: map[string]*os.File{}}
		}
		byID[id].files[what] = k.File
	}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		byID[id].broken = byID[id].read()
		sets = append(sets, byID[id])
	}
	return sets, foreign
}

// read finds the newest manifest of which everything is there.
func (s *keptSet) read() error {
	err := errors.New("no manifest was kept")
	for what, f := range s.files {
		text, ok := strings.CutPrefix(what, "manifest/")
		number, errNumber := strconv.Atoi(text)
		if !ok || errNumber != nil || s.manifest != nil && number < s.number {
			continue
		}
		m, errRead := readManifest(f)
		if errRead == nil {
			errRead = s.complete(m)
		}
		if errRead != nil {
			err = fmt.Errorf("%s: %w", what, errRead)
			continue
		}
		s.manifest, s.number = m, number
	}
	if s.manifest != nil {
		return nil
	}
	return err
}

// maxManifest is many times what one needs.
const maxManifest = 1 << 20

func readManifest(f *os.File) (*manifest, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxManifest))
	if err != nil {
		return nil, err
	}
	m := &manifest{}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, err
	}
	if m.Layout != manifestLayout {
		return nil, fmt.Errorf("a manifest of layout %d, this version knows %d", m.Layout, manifestLayout)
	}
	return m, nil
}

// complete tells whether nothing is missing without which the set is of no use. A hook
// whose link is missing was just being mended, and will be.
func (s *keptSet) complete(m *manifest) error {
	for _, name := range m.Maps {
		if s.files["map/"+name] == nil {
			return fmt.Errorf("map/%s was not kept", name)
		}
	}
	return nil
}

// fresh tells whether a new start could do no better than these hooks: nothing was lost
// since they were attached, and none was refused.
func (m *manifest) fresh() bool {
	return !m.Mended && !slices.ContainsFunc(m.Hooks, func(h keptHook) bool { return h.Section == "" || h.Section == sysExit || h.Candidate > 0 })
}

func (m *manifest) names() (list []string) {
	for _, name := range m.Maps {
		list = append(list, "map/"+name)
	}
	for _, h := range m.Hooks {
		for _, id := range slices.Concat(h.Programs, h.Spares) {
			list = append(list, "program/"+id, "link/"+id)
		}
	}
	return list
}

// names are those that everything of the set is kept under.
func (s *keptSet) names() []string {
	var list []string
	for _, what := range slices.Sorted(maps.Keys(s.files)) {
		list = append(list, s.name(what))
	}
	return list
}

func (s *keptSet) name(what string) string { return keptPrefix + s.id + "/" + what }

// close gives up this process's descriptors; what is kept stays kept.
func (s *keptSet) close() {
	for _, f := range s.files {
		_ = f.Close()
	}
}

// dup returns a descriptor that the caller owns.
func (s *keptSet) dup(what string) (int, error) {
	f := s.files[what]
	if f == nil {
		return -1, fmt.Errorf("%s was not kept", what)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", what, err)
	}
	return fd, nil
}

func (s *keptSet) openMap(name string) (*ebpf.Map, error) {
	fd, err := s.dup("map/" + name)
	if err != nil {
		return nil, err
	}
	m, err := ebpf.NewMapFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("map/%s: %w", name, err)
	}
	return m, nil
}

func (s *keptSet) openProgram(id string) (*ebpf.Program, error) {
	fd, err := s.dup("program/" + id)
	if err != nil {
		return nil, err
	}
	p, err := ebpf.NewProgramFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("program/%s: %w", id, err)
	}
	if now, err := programID(p); err != nil || now != id {
		return nil, errors.Join(fmt.Errorf("program/%s is program %s", id, now), err, p.Close())
	}
	return p, nil
}

// missed is kernel.missed of what was kept.
func (s *keptSet) missed() (sum uint64, err error) {
	for _, h := range s.manifest.Hooks {
		var a attachment
		for i, id := range slices.Concat(h.Programs, h.Spares) {
			p, err := s.openProgram(id)
			if err != nil {
				return sum, err
			}
			defer p.Close()
			if i < len(h.Programs) {
				a.programs = append(a.programs, p)
			} else {
				a.spares = append(a.spares, p)
			}
		}
		n, err := a.missed()
		if err != nil {
			return sum, err
		}
		sum += n
	}
	return sum, nil
}

// openLink returns what attaches a program: before 5.15 the event of a kprobe, which is
// no link.
func (s *keptSet) openLink(id string) (link.Link, error) {
	fd, err := s.dup("link/" + id)
	if err != nil {
		return nil, err
	}
	if is, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && is == "anon_inode:[perf_event]" {
		return &perfEvent{file: os.NewFile(uintptr(fd), "perf_event")}, nil
	}
	l, err := link.NewFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("link/%s: %w", id, err)
	}
	return l, nil
}

// perfEvent is a kprobe's event of a kernel that has no links for them.
type perfEvent struct {
	link.Link // none: for the methods that nobody calls
	file      *os.File
}

func (p *perfEvent) Close() error              { return p.file.Close() }
func (p *perfEvent) Info() (*link.Info, error) { return nil, link.ErrNotSupported }
