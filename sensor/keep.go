// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/json"
	"errors"
	"fmt"
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
