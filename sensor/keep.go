// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"crypto/sha256"
	"encoding/hex"
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
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Keeper keeps descriptors while the process is restarted, as systemd does: what the
// kernel sees goes on to be seen, and waits in the rings for the next process.
type Keeper interface {
	// Keep takes in a copy of a descriptor under a name that no other one has.
	Keep(name string, fd int) error
	// Drop closes what is kept under these names.
	Drop(names ...string) error
	// Settle returns when all that was asked for before is done.
	Settle() error
}

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

// keptLink is one that is also kept elsewhere: it must not go on there when it ends here.
type keptLink struct {
	link.Link
	k    *kernel
	what string
}

func (l keptLink) Close() error {
	if l.k.leaving {
		return l.Link.Close()
	}
	return errors.Join(l.k.drop(l.what), l.Link.Close())
}

// descriptor returns the descriptor of a link, and what to close when it is of no more
// use.
func descriptor(l link.Link) (fd int, done func() error, err error) {
	switch l := l.(type) {
	case keptLink:
		return descriptor(l.Link)
	case *perfEvent:
		return int(l.file.Fd()), func() error { return nil }, nil
	case interface{ FD() int }:
		return l.FD(), func() error { return nil }, nil
	case link.PerfEvent:
		f, err := l.PerfEvent()
		if err != nil {
			return -1, nil, err
		}
		return int(f.Fd()), f.Close, nil
	}
	return -1, nil, fmt.Errorf("%T has no descriptor", l)
}

func programID(p *ebpf.Program) (string, error) {
	info, err := p.Info()
	if err != nil {
		return "", err
	}
	id, ok := info.ID()
	if !ok {
		return "", errors.New("the kernel gives no id")
	}
	return strconv.FormatUint(uint64(id), 10), nil
}

// setupOf sums up everything by which one kernel differs from another but for what is
// changed while it runs.
func setupOf(spec *ebpf.CollectionSpec, o kernelOptions) string {
	h := sha256.New()
	fmt.Fprintln(h, bpf.ObjectHash(), o.Scope, o.Copies, o.Files.On, hooks(o.Files.On, o.Copies))
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		fmt.Fprintln(h, name, spec.Maps[name].MaxEntries)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// wireOf sums up the layout of the records that the rings carry, by the number of their
// kind: its name, and the struct that it comes in. The error is about what all of them have
// in common.
func wireOf(types *btf.Spec) (map[uint32]string, error) {
	var numbers *btf.Enum
	if err := types.TypeByName("event_kind", &numbers); err != nil {
		return nil, fmt.Errorf("layout of records: %w", err)
	}
	header, err := layoutOf(types, "event_header")
	if err != nil {
		return nil, err
	}
	wire := map[uint32]string{}
	for _, v := range numbers.Values {
		name := strings.TrimPrefix(v.Name, "EVENT_KIND_")
		layout := header
		if s := structOf(name); s != "" {
			if layout, err = layoutOf(types, s); err != nil {
				return nil, err
			}
		}
		wire[uint32(v.Value)] = name + " " + layout
	}
	wire[^uint32(0)] = header
	return wire, nil
}

// structOf is the struct in which records of a kind come.
func structOf(kind string) string {
	switch {
	case kind == "EXEC", kind == "TASK":
		return "exec_event"
	case kind == "FORK":
		return "fork_event"
	case kind == "EXIT":
		return "exit_event"
	case strings.HasPrefix(kind, "TCP_"):
		return "tcp_event"
	case strings.HasPrefix(kind, "FILE_"), strings.Contains(kind, "MOUNT"):
		return "file_event"
	case kind == "SIGNAL", kind == "PTRACE":
		return "tamper_event"
	case kind == "HEARTBEAT":
		return "heartbeat"
	}
	return ""
}

func layoutOf(types *btf.Spec, name string) (string, error) {
	var s *btf.Struct
	if err := types.TypeByName(name, &s); err != nil {
		return "", fmt.Errorf("layout of %s: %w", name, err)
	}
	h := sha256.New()
	writeLayout(h, s)
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// stateOf sums up the layouts of the maps by which programs know what began before.
func stateOf(spec *ebpf.CollectionSpec) map[string]string {
	layouts := map[string]string{}
	for _, name := range [...]string{"sockets", "written_files", "scope_pids"} {
		h := sha256.New()
		m := spec.Maps[name]
		fmt.Fprintln(h, m.Type, m.KeySize, m.ValueSize)
		if s, ok := btf.UnderlyingType(m.Value).(*btf.Struct); ok {
			writeLayout(h, s)
		}
		layouts[name] = hex.EncodeToString(h.Sum(nil))
	}
	return layouts
}

func writeLayout(w io.Writer, s *btf.Struct) {
	fmt.Fprintln(w, s.Name, s.Size)
	for _, m := range s.Members {
		fmt.Fprintln(w, m.Name, m.Offset, btf.UnderlyingType(m.Type).TypeName())
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			writeLayout(w, inner)
		}
	}
}

// keep has the keeper keep all of the kernel: what it does not have yet is given to it,
// what is no more is dropped. It is called again after hooks were mended.
func (k *kernel) keep(bootID string) (err error) {
	if k.keeper == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep kernel programs for the next start: %w", err)
		}
	}()
	if k.detached {
		return nil
	}
	wire, err := wireOf(k.spec.Types)
	if err != nil {
		return err
	}
	m := manifest{Layout: manifestLayout, BootID: bootID, Setup: k.setup, Wire: wire, State: stateOf(k.spec), Mended: k.mended, Maps: slices.Sorted(maps.Keys(k.maps))}
	for _, name := range m.Maps {
		if err := k.give("map/"+name, k.maps[name].FD()); err != nil {
			return err
		}
	}
	for i := range k.attached {
		h, err := k.keepHook(&k.attached[i])
		if err != nil {
			return err
		}
		m.Hooks = append(m.Hooks, h)
	}
	if err := k.giveManifest(&m); err != nil {
		return err
	}
	if err := k.keeper.Settle(); err != nil {
		return err
	}
	wanted := append(m.names(), fmt.Sprintf("manifest/%d", k.manifests))
	for what := range k.kept {
		if !slices.Contains(wanted, what) {
			err = errors.Join(err, k.drop(what))
		}
	}
	return err
}

func (k *kernel) keepHook(a *attachment) (keptHook, error) {
	h := keptHook{First: a.chain[0][0], Kinds: a.kinds, Candidate: a.candidate, Section: a.section, Errs: sentences(a.errs)}
	for i, p := range append(slices.Clip(a.programs), a.spares...) {
		if i >= len(a.links) {
			return h, fmt.Errorf("%s: a program that nothing attaches", a.section)
		}
		id, err := programID(p)
		if err != nil {
			return h, fmt.Errorf("%s: %w", a.section, err)
		}
		fd, done, err := descriptor(a.links[i])
		if err != nil {
			return h, fmt.Errorf("%s: %w", a.section, err)
		}
		err = errors.Join(k.give("program/"+id, p.FD()), k.give("link/"+id, fd), done())
		if err != nil {
			return h, err
		}
		if i < len(a.programs) {
			h.Programs = append(h.Programs, id)
		} else {
			h.Spares = append(h.Spares, id)
		}
		a.links[i] = k.keptLink(a.links[i], id)
	}
	return h, nil
}

// keptLink has the link's end here be its end with the keeper, too. An iterator shows
// nothing by itself.
func (k *kernel) keptLink(l link.Link, id string) link.Link {
	switch l.(type) {
	case keptLink, *link.Iter:
		return l
	}
	return keptLink{l, k, "link/" + id}
}

// give has the keeper keep a descriptor, once.
func (k *kernel) give(what string, fd int) error {
	if k.kept[what] {
		return nil
	}
	if err := k.keeper.Keep(k.keptName(what), fd); err != nil {
		return err
	}
	k.kept[what] = true
	return nil
}

func (k *kernel) giveManifest(m *manifest) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("edr-sensor manifest", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make manifest: %w", err)
	}
	f := os.NewFile(uintptr(fd), "manifest")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	k.manifests++
	return k.give(fmt.Sprintf("manifest/%d", k.manifests), fd)
}

// drop has the keeper forget something, before it is gone here.
func (k *kernel) drop(what string) error {
	if !k.kept[what] {
		return nil
	}
	delete(k.kept, what)
	return errors.Join(k.keeper.Drop(k.keptName(what)), k.keeper.Settle())
}

func (k *kernel) keptName(what string) string { return keptPrefix + k.setID + "/" + what }

// adopt takes over what was kept instead of making it anew. With an error the kernel is as
// it was before.
func (k *kernel) adopt(s *keptSet, o kernelOptions) (err error) {
	adopted := make(map[string]*ebpf.Map)
	var attached []attachment
	defer func() {
		if err == nil {
			return
		}
		for _, m := range adopted {
			_ = m.Close()
		}
		for i := range attached {
			_ = attached[i].detach() // closes no more than copies
		}
	}()
	for name, spec := range k.spec.Maps {
		if strings.HasPrefix(name, ".") {
			continue
		}
		m, err := s.openMap(name)
		if err != nil {
			return err
		}
		adopted[name] = m
		if err := spec.Compatible(m); err != nil {
			return fmt.Errorf("map/%s: %w", name, err)
		}
	}
	table := hooks(o.Files.On, o.Copies)
	table = append(table, hook{chain: []candidate{{sysExitProgram}}, copies: table[0].copies})
	for _, h := range s.manifest.Hooks {
		i := slices.IndexFunc(table, func(t hook) bool { return t.chain[0][0] == h.First })
		if i < 0 || h.Candidate < 0 || h.Candidate >= len(table[i].chain) {
			return fmt.Errorf("hook %s, candidate %d: this version has none", h.First, h.Candidate)
		}
		attached = append(attached, attachment{hook: table[i]})
		if err := attached[len(attached)-1].adopt(s, h); err != nil {
			return err
		}
	}
	for _, a := range attached {
		if a.constant != "" && a.section != "" { // for what is to be mended
			if err := k.spec.Variables[a.constant].Set(uint32(1)); err != nil {
				return fmt.Errorf("set %s: %w", a.constant, err)
			}
		}
		for i, l := range a.links {
			id, err := programID(append(slices.Clip(a.programs), a.spares...)[i])
			if err != nil {
				return err
			}
			a.links[i] = k.keptLink(l, id)
		}
	}
	k.maps, k.attached = adopted, attached
	k.setID, k.manifests, k.mended, k.kept = s.id, s.number, s.manifest.Mended, map[string]bool{}
	for what := range s.files {
		k.kept[what] = true
	}
	return nil
}

func (a *attachment) adopt(s *keptSet, h keptHook) error {
	if slices.ContainsFunc(h.Kinds, func(kind event.Kind) bool { return int(kind) >= event.Kinds }) {
		return fmt.Errorf("hook %s tells of kinds that this version does not know", h.First)
	}
	a.kinds, a.candidate, a.section = h.Kinds, h.Candidate, h.Section
	for _, text := range h.Errs {
		a.errs = append(a.errs, errors.New(text))
	}
	ids := slices.Concat(h.Programs, h.Spares)
	if slices.ContainsFunc(ids, func(id string) bool { return s.files["program/"+id] == nil || s.files["link/"+id] == nil }) {
		return nil // without links, so that it is mended
	}
	for i, id := range ids {
		p, err := s.openProgram(id)
		if err != nil {
			return err
		}
		if i < len(h.Programs) {
			a.programs = append(a.programs, p)
		} else {
			a.spares = append(a.spares, p)
		}
		l, err := s.openLink(id)
		if err != nil {
			return err
		}
		a.links = append(a.links, l)
		if err := alive(l, p); err != nil {
			return fmt.Errorf("link/%s: %w", id, err)
		}
	}
	return nil
}
