// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// shop is a keeper in this process.
type shop struct {
	t testing.TB

	mu    sync.Mutex
	files map[string]*os.File
	fail  error
}

func newShop(t testing.TB) *shop {
	s := &shop{t: t, files: map[string]*os.File{}}
	t.Cleanup(func() {
		for _, f := range s.files {
			_ = f.Close()
		}
	})
	return s
}

func (s *shop) Keep(name string, fd int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	if s.files[name] != nil {
		s.t.Errorf("%s is kept twice", name)
	}
	if strings.Contains(name, ":") || len(name) > 255 {
		s.t.Errorf("%q is no name for systemd", name)
	}
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		s.files[name] = os.NewFile(uintptr(copied), name)
	}
	return err
}

func (s *shop) Drop(names ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if s.files[name] == nil {
			s.t.Errorf("%s is dropped and was not kept", name)
			continue
		}
		_ = s.files[name].Close()
		delete(s.files, name)
	}
	return nil
}

func (s *shop) Settle() error { return nil }

// hand gives copies of all that is kept, as a new process gets them.
func (s *shop) hand() (list []Kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(s.files)) {
		fd, err := unix.FcntlInt(s.files[name].Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			s.t.Fatal(err)
		}
		list = append(list, Kept{name, os.NewFile(uintptr(fd), name)})
	}
	return list
}

func (s *shop) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files))
}

const testBoot = "11111111-2222-3333-4444-555555555555"

// TestRootAdopt closes everything that a kernel has in this process, as a kill does, and
// takes it over: every hook is as it was, and what happened in between is in the ring.
func TestRootAdopt(t *testing.T) {
	for _, form := range []string{"", "kprobe_"} { // which are no links before 5.15
		t.Run("best "+form, func(t *testing.T) {
			a := startActor(t)
			s := newShop(t)
			o := kernelOptions{
				Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: testRing, BulkBytes: testRing, Types: kernelTypes,
				Files: FileOptions{On: true}, Keeper: s,
			}
			k := prepare(t, o)
			prefer(t, k, form)
			if err := k.attach(); err != nil {
				t.Fatal(err)
			}
			if err := k.keep(testBoot); err != nil {
				t.Fatal(err)
			}
			if err := k.keep(testBoot); err != nil { // again, as after hooks were mended
				t.Fatal(err)
			}
			before := k.coverage()
			kept := s.names()
			t.Logf("%d descriptors are kept", len(kept))
			k.leaving = true
			if err := k.close(); err != nil {
				t.Fatal(err)
			}
			pid := a.must(request{Op: "run", Path: "/bin/true"}).PID

			sets, foreign := readKept(s.hand())
			if len(sets) != 1 || sets[0].broken != nil || len(foreign) != 0 {
				t.Fatalf("%d sets, foreign %v", len(sets), foreign)
			}
			next, took, err := loadKernel(o, sets[0])
			if err != nil || !took {
				t.Fatalf("taken over %t, %v: %v", took, err, sets[0].broken)
			}
			defer next.close()
			sets[0].close()
			if diff := cmp.Diff(before, next.coverage()); diff != "" {
				t.Errorf("coverage (-before +after):\n%s", diff)
			}
			pid2 := a.must(request{Op: "run", Path: "/bin/true"}).PID
			records := newTap(t, next.priority).until("the second", exited(pid2))
			one(t, records, event.Exec, pid)
			one(t, records, event.Exit, pid)
			one(t, records, event.Exec, pid2)
			n := 0
			if err := next.snapshot(func([]byte) error { n++; return nil }); err != nil || n == 0 {
				t.Errorf("snapshot of %d processes, %v", n, err)
			}
			if changes, err := next.mend(t.TempDir()); err != nil || len(changes) > 0 {
				t.Errorf("nothing was lost, and yet %+v, %v", changes, err)
			}
			if diff := cmp.Diff(kept, s.names()); diff != "" {
				t.Errorf("kept (-before +after):\n%s", diff)
			}
			// What ends here must end there.
			if err := next.detach(); err != nil {
				t.Fatal(err)
			}
			for _, name := range s.names() {
				if strings.Contains(name, "/link/") && !strings.HasSuffix(name, "/link/"+taskProgram(t, sets[0])) {
					t.Errorf("%s is still kept", name)
				}
			}
			a.must(request{Op: "run", Path: "/bin/true"})
			if sums, err := next.counters(); err != nil || sums[event.Exec].Attempts != 2 {
				t.Errorf("afterwards counted %+v, %v", sums[event.Exec], err)
			}
		})
	}
}

// prefer leaves only one form of the file hooks, where there is it.
func prefer(t *testing.T, k *kernel, form string) {
	t.Helper()
	if form == "" {
		return
	}
	for i := range k.attached {
		h := &k.attached[i].hook
		if len(h.syscalls) == 0 {
			continue
		}
		var only []candidate
		for _, c := range h.chain {
			if strings.HasPrefix(c[0], form) {
				only = append(only, c)
			}
		}
		if len(only) > 0 {
			// The place in the chain is what is kept.
			chain := slices.Clone(h.chain)
			for at := range chain {
				if !strings.HasPrefix(chain[at][0], form) && at > 0 {
					chain[at] = candidate{"left out by the test"}
				}
			}
			if !strings.HasPrefix(chain[0][0], form) {
				chain[0] = candidate{chain[0][0], "left out by the test"}
			}
			h.chain = chain
		}
	}
}

// taskProgram is the id of the iterator, which shows nothing by itself.
func taskProgram(t *testing.T, s *keptSet) string {
	t.Helper()
	for _, h := range s.manifest.Hooks {
		if slices.Contains(h.Kinds, event.Task) && len(h.Programs) == 1 {
			return h.Programs[0]
		}
	}
	return "none"
}

// TestRootAdoptWhileMending takes over from a process that died between the end of a hook
// and its replacement: the hook is mended.
func TestRootAdoptWhileMending(t *testing.T) {
	a := startActor(t)
	s := newShop(t)
	o := kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: testRing, BulkBytes: testRing, Types: kernelTypes, Keeper: s}
	k := prepare(t, o)
	if err := errors.Join(k.attach(), k.keep(testBoot)); err != nil {
		t.Fatal(err)
	}
	if err := k.find(event.Exec).links[0].Close(); err != nil {
		t.Fatal(err)
	}
	k.leaving = true
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	sets, _ := readKept(s.hand())
	next, took, err := loadKernel(o, sets[0])
	if err != nil || !took {
		t.Fatalf("taken over %t, %v: %v", took, err, sets[0].broken)
	}
	defer next.close()
	changes, err := next.mend(t.TempDir())
	if err != nil || len(changes) != 1 || !slices.Equal(changes[0].kinds, kinds(event.Exec)) || changes[0].after == "" {
		t.Fatalf("changes %+v, %v; want that exec is seen again", changes, err)
	}
	if err := next.keep(testBoot); err != nil {
		t.Fatal(err)
	}
	a.must(request{Op: "run", Path: "/bin/true"})
	if sums, err := next.counters(); err != nil || sums[event.Exec].Attempts != 1 {
		t.Errorf("afterwards counted %+v, %v", sums[event.Exec], err)
	}
	again, _ := readKept(s.hand())
	if len(again) != 1 || again[0].broken != nil || len(again[0].manifest.Hooks) == 0 {
		t.Errorf("kept afterwards: %+v", again)
	}
}

// TestRootAdoptRefuses holds what a set must not be taken for.
func TestRootAdoptRefuses(t *testing.T) {
	a := startActor(t)
	s := newShop(t)
	o := kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: testRing, BulkBytes: testRing, Types: kernelTypes, Keeper: s}
	k := prepare(t, o)
	if err := errors.Join(k.attach(), k.keep(testBoot)); err != nil {
		t.Fatal(err)
	}
	k.leaving = true
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*kernelOptions, *keptSet){
		"another scope":     func(o *kernelOptions, _ *keptSet) { o.Scope = Scope{Mode: ScopeCgroup, CgroupID: 1 << 40} },
		"another ring":      func(o *kernelOptions, _ *keptSet) { o.BulkBytes *= 2 },
		"file events":       func(o *kernelOptions, _ *keptSet) { o.Files.On = true },
		"a map for another": func(_ *kernelOptions, s *keptSet) { s.files["map/sockets"] = s.files["map/priority_ring"] },
		"a program for another": func(_ *kernelOptions, s *keptSet) {
			h := s.manifest.Hooks
			s.files["program/"+h[0].Programs[0]] = s.files["program/"+h[1].Programs[0]]
		},
		"a map for a program": func(_ *kernelOptions, s *keptSet) {
			s.files["program/"+s.manifest.Hooks[0].Programs[0]] = s.files["map/sockets"]
		},
		"a program for a link": func(_ *kernelOptions, s *keptSet) {
			id := s.manifest.Hooks[0].Programs[0]
			s.files["link/"+id] = s.files["program/"+id]
		},
		"a hook that is not":      func(_ *kernelOptions, s *keptSet) { s.manifest.Hooks[0].First = "on_something" },
		"a kind that is not":      func(_ *kernelOptions, s *keptSet) { s.manifest.Hooks[0].Kinds = []event.Kind{200} },
		"a candidate that is not": func(_ *kernelOptions, s *keptSet) { s.manifest.Hooks[0].Candidate = 7 },
	} {
		t.Run(name, func(t *testing.T) {
			sets, _ := readKept(s.hand())
			o := o
			change(&o, sets[0])
			next, took, err := loadKernel(o, sets[0])
			if err != nil {
				t.Fatal(err)
			}
			defer next.close()
			if took {
				t.Error("it was taken over")
			}
			for _, a := range next.attached {
				if len(a.links) > 0 {
					t.Errorf("%s is attached", a.kinds[0])
				}
			}
		})
	}
}

func manifestFile(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "manifest")
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestReadKept(t *testing.T) {
	const good = `{"Layout":1,"BootID":"b","Maps":["priority_ring"]}`
	for _, tt := range []struct {
		name    string
		kept    map[string]string
		foreign int
		broken  []string // of each set
	}{
		{name: "nothing"},
		{name: "a set", kept: map[string]string{"edr/7/manifest/1": good, "edr/7/map/priority_ring": ""}, broken: []string{""}},
		{name: "two sets", kept: map[string]string{
			"edr/7/manifest/1": good, "edr/7/map/priority_ring": "", "edr/9/manifest/1": good, "edr/9/map/priority_ring": "",
		}, broken: []string{"", ""}},
		{name: "not ours", kept: map[string]string{"stored": "", "edr": "", "edr/7": "", "http.socket": ""}, foreign: 4},
		{name: "no manifest", kept: map[string]string{"edr/7/map/priority_ring": ""}, broken: []string{"no manifest"}},
		{name: "a map is missing", kept: map[string]string{"edr/7/manifest/1": good}, broken: []string{"map/priority_ring was not kept"}},
		{name: "cut off", kept: map[string]string{"edr/7/manifest/1": good[:20], "edr/7/map/priority_ring": ""}, broken: []string{"unexpected end"}},
		{name: "another layout", kept: map[string]string{"edr/7/manifest/1": `{"Layout":2}`}, broken: []string{"layout 2"}},
		{name: "the newest is not whole", kept: map[string]string{
			"edr/7/manifest/1": good, "edr/7/manifest/2": `{"Layout":1,"Maps":["gone"]}`, "edr/7/manifest/x": good, "edr/7/map/priority_ring": "",
		}, broken: []string{""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var list []Kept
			for name, text := range tt.kept {
				list = append(list, Kept{name, manifestFile(t, text)})
			}
			sets, foreign := readKept(list)
			if len(foreign) != tt.foreign || len(sets) != len(tt.broken) {
				t.Fatalf("%d sets, foreign %v; want %d and %d", len(sets), foreign, len(tt.broken), tt.foreign)
			}
			for i, s := range sets {
				if want := tt.broken[i]; (s.broken == nil) != (want == "") || s.broken != nil && !strings.Contains(s.broken.Error(), want) {
					t.Errorf("set %s: %v, want %q", s.id, s.broken, want)
				}
				s.close()
			}
		})
	}
}

// TestChoose has the mark decide which of the sets counts.
func TestChoose(t *testing.T) {
	set := func(boot string) string { return fmt.Sprintf(`{"Layout":1,"BootID":"%s"}`, boot) }
	marked := func(id uint32, boot string) []byte {
		m := mark{bootID: parseBootID(boot), priority: ringMark{id: id}}
		return m.append(nil)
	}
	const otherBoot = "99999999-2222-3333-4444-555555555555"
	for _, tt := range []struct {
		name  string
		kept  map[string]string
		mark  []byte
		alone bool // no keeper
		want  string
		drop  []string
		why   string
	}{
		{name: "first start"},
		{name: "no manager", alone: true, mark: marked(7, testBoot), why: "no service manager"},
		{name: "stopped", mark: marked(7, testBoot), why: "nothing was kept"},
		{name: "named", kept: map[string]string{"edr/7/manifest/1": set(testBoot)}, mark: marked(7, testBoot), want: "7"},
		{name: "no mark", kept: map[string]string{"edr/7/manifest/1": set(testBoot)}, want: "7"},
		{name: "unreadable mark", kept: map[string]string{"edr/7/manifest/1": set(testBoot)}, mark: []byte("?"), want: "7"},
		{
			name: "died before its first commit", kept: map[string]string{"edr/7/manifest/1": set(testBoot), "edr/9/manifest/1": set(testBoot)},
			mark: marked(7, testBoot), want: "7", drop: []string{"edr/9/manifest/1"},
		},
		{
			name: "died before it let go", kept: map[string]string{"edr/7/manifest/1": set(testBoot), "edr/9/manifest/1": set(testBoot)},
			mark: marked(9, testBoot), want: "9", drop: []string{"edr/7/manifest/1"},
		},
		{
			name: "died while it was kept", kept: map[string]string{"edr/7/manifest/1": set(testBoot), "edr/9/map/sockets": ""},
			mark: marked(7, testBoot), want: "7", drop: []string{"edr/9/map/sockets"},
		},
		{
			name: "two without a mark", kept: map[string]string{"edr/7/manifest/1": set(testBoot), "edr/9/manifest/1": set(testBoot)},
			drop: []string{"edr/7/manifest/1", "edr/9/manifest/1"}, why: "does not name it",
		},
		{name: "another one's", kept: map[string]string{"edr/7/manifest/1": set(testBoot)}, mark: marked(8, testBoot), drop: []string{"edr/7/manifest/1"}, why: "does not name it"},
		{name: "set of another boot", kept: map[string]string{"edr/7/manifest/1": set(otherBoot)}, mark: marked(7, testBoot), drop: []string{"edr/7/manifest/1"}, why: "another boot"},
		{name: "mark of another boot", kept: map[string]string{"edr/7/manifest/1": set(testBoot)}, mark: marked(7, otherBoot), drop: []string{"edr/7/manifest/1"}, why: "another boot"},
		{name: "broken", kept: map[string]string{"edr/7/map/sockets": ""}, mark: marked(7, testBoot), drop: []string{"edr/7/map/sockets"}, why: "no manifest"},
		{name: "foreign", kept: map[string]string{"tcp.socket": ""}, mark: marked(7, testBoot), drop: []string{"tcp.socket"}, why: "nothing was kept"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Options{Mark: tt.mark, Host: event.Host{BootID: testBoot}}
			if !tt.alone {
				o.Keeper = newShop(t)
			}
			for name, text := range tt.kept {
				o.Kept = append(o.Kept, Kept{name, manifestFile(t, text)})
			}
			var tk takeover
			s, drop := tk.choose(o)
			got := ""
			if s != nil {
				got = s.id
				s.close()
			}
			slices.Sort(drop)
			if diff := cmp.Diff(tt.drop, drop); len(drop)+len(tt.drop) > 0 && diff != "" {
				t.Errorf("dropped (-want +got):\n%s", diff)
			}
			if got != tt.want || !strings.Contains(tk.why, tt.why) || (s != nil) != (tk.why == "") {
				t.Errorf("set %q, why %q; want %q, %q", got, tk.why, tt.want, tt.why)
			}
		})
	}
}

func TestMark(t *testing.T) {
	m := mark{
		bootID: parseBootID(testBoot), priority: ringMark{7, 1 << 40}, bulk: ringMark{8, 24}, serial: 9, ktime: 10, wall: -11, clean: true, since: 12, missed: 13,
	}
	for kind := range m.lost {
		m.lost[kind], m.suppressed[kind] = uint64(kind), uint64(100+kind)
	}
	b := m.append(nil)
	got, err := parseMark(b)
	if err != nil || got != m {
		t.Errorf("%+v, %v; want %+v", got, err, m)
	}
	more := append(slices.Clone(b), make([]byte, 32)...)
	more[markSize-1] += 2
	if got, err := parseMark(more); err != nil || got != m {
		t.Errorf("of a version that knows two kinds more: %+v, %v", got, err)
	}
	fewer := slices.Clone(b[:markSize+16*3])
	fewer[markSize-1] = 3
	if got, err := parseMark(fewer); err != nil || got.lost[2] != 2 || got.lost[3] != 0 {
		t.Errorf("of a version that knows three kinds: %+v, %v", got, err)
	}
	for n := range b {
		if _, err := parseMark(b[:n]); !errors.Is(err, errMark) {
			t.Fatalf("%d bytes of a mark: %v", n, err)
		}
	}
}

func FuzzMark(f *testing.F) {
	m := mark{}
	f.Add(m.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseMark(b); err == nil && len(m.append(nil)) < markSize {
			t.Error("a mark that cannot be written")
		}
	})
}

// seen makes up what two sets of programs saw of the same events: every so many
// nanoseconds an event of another process, the second set lag later.
func seen(n int, every, lag uint64) (old, own []witness) {
	for i := range n {
		at := 1_000_000_000 + uint64(i)*every
		key := witnessKey{kind: 1, pid: uint32(i), tid: uint32(i), start: uint64(i)}
		old, own = append(old, witness{key, at}), append(own, witness{key, at + lag})
	}
	return old, own
}

// split counts the events that a cut has read twice and not at all.
func split(old, own []witness, at uint64) (twice, missed int) {
	first := map[witnessKey]bool{}
	for _, w := range old {
		first[w.key] = w.ktime < at
	}
	for _, w := range own {
		switch second := w.ktime >= at; {
		case first[w.key] && second:
			twice++
		case !first[w.key] && !second:
			missed++
		}
	}
	return twice, missed
}

func TestCut(t *testing.T) {
	const ms = uint64(time.Millisecond)
	from, to := uint64(1_000_000_000), uint64(1_000_000_000+100*ms)
	t.Run("quiet", func(t *testing.T) {
		if c := cutBetween(nil, nil, from, to, false); !c.proven || c.at <= from || c.at >= to {
			t.Errorf("%+v", c)
		}
	})
	for name, tt := range map[string]struct{ every, lag uint64 }{
		"apart by microseconds":    {ms, 5000},
		"second set first":         {ms, ^uint64(4999)},
		"busy":                     {20_000, 3000},
		"apart by almost all":      {ms, 900_000},
		"apart by more than spans": {ms, 3_100_000},
	} {
		t.Run(name, func(t *testing.T) {
			old, own := seen(int(100*ms/tt.every), tt.every, tt.lag)
			c := cutBetween(old, own, from, to, false)
			twice, missed := split(old, own, c.at)
			if c.proven && twice+missed > 0 {
				t.Errorf("%+v is said to be proven: %d twice, %d missed", c, twice, missed)
			}
			if !c.proven && tt.lag < tt.every/2 {
				t.Errorf("%+v: the sets agree, and it is not found", c)
			}
		})
	}
	t.Run("one was held up", func(t *testing.T) {
		// A CPU was away for 5 ms between the two programs, right across the widest gap.
		old, own := seen(20, 2*ms, 1000)
		own = slices.DeleteFunc(own, func(w witness) bool { return w.key.pid == 19 })
		old = slices.DeleteFunc(old, func(w witness) bool { return w.key.pid == 19 })
		key := witnessKey{kind: 1, pid: 99}
		old, own = append(old, witness{key, from + 39*ms}), append(own, witness{key, from + 75*ms})
		c := cutBetween(old, own, from, to, false)
		if twice, missed := split(old, own, c.at); c.proven || twice+missed == 0 {
			t.Errorf("%+v, %d twice, %d missed: this is the case that must not pass", c, twice, missed)
		}
	})
	t.Run("settings differ", func(t *testing.T) {
		old, own := seen(100, ms, 1000)
		own = slices.DeleteFunc(own, func(w witness) bool { return w.key.pid%2 == 0 }) // not in the new scope
		if c := cutBetween(old, own, from, to, false); !c.proven || c.agreed == 0 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("limits differ", func(t *testing.T) {
		old, own := seen(50, ms, 1000)
		for i := range 200 {
			at := from + uint64(i)*ms/2 + 100
			key := witnessKey{kind: 11, pid: 7, bulk: true}
			old = append(old, witness{key, at})
			if i%3 == 0 {
				own = append(own, witness{key, at + 50})
			}
		}
		if c := cutBetween(old, own, from, to, false); c.proven {
			t.Errorf("strict: %+v", c)
		}
		if c := cutBetween(old, own, from, to, true); !c.proven {
			t.Errorf("lenient: %+v", c)
		}
	})
}

func TestRingScanLeavesTheReadingAlone(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	for i := range 5 {
		m.put(payload(10+i, i), 0)
	}
	mustNext(t, r)
	pos, n := r.position(), 0
	end, err := r.scan(func([]byte) { n++ })
	if err != nil || n != 4 || end != m.produced() || r.position() != pos {
		t.Errorf("%d records to %d, %v, position %d; want 4 to %d, position %d", n, end, err, r.position(), m.produced(), pos)
	}
}

// TestEndBeforeCut reads old rings: first not beyond what comes after the cut, though something
// from before it lies behind.
func TestEndBeforeCut(t *testing.T) {
	record := func(ktime uint64) []byte {
		rec := payload(32, 0)
		binary.NativeEndian.PutUint64(rec[8:], ktime)
		return rec
	}
	fill := func(times ...uint64) *ring {
		m := newMemoryRing(4096)
		r := m.open(t)
		for _, at := range times {
			m.put(record(at), 0)
		}
		return r
	}
	read := func(r *ring, limit uint64) (times []uint64) {
		for r.position() < limit {
			rec, ok, err := r.next()
			if err != nil || !ok {
				break
			}
			times = append(times, ktimeOf(rec))
		}
		return times
	}
	in := rings{priority: fill(10, 20, 31, 25, 40), bulk: fill(11, 12), until: 30}
	all := [...]uint64{in.priority.producer(), in.bulk.producer()}
	if err := in.endBeforeCut(); err != nil {
		t.Fatal(err)
	}
	if in.reached(in.ends) || in.reached(all) {
		t.Error("reached before it was read")
	}
	p, b := in.limits()
	if got := read(in.priority, p); !slices.Equal(got, []uint64{10, 20}) {
		t.Errorf("before the cut the priority ring has %d, want 10 and 20", got)
	}
	if got := read(in.bulk, b); !slices.Equal(got, []uint64{11, 12}) {
		t.Errorf("before the cut the bulk ring has %d, want 11 and 12", got)
	}
	if !in.reached(in.ends) || in.reached(all) {
		t.Error("what is behind the cut is not told from what is before it")
	}
	in.ended = false
	p, _ = in.limits()
	if got := read(in.priority, p); !slices.Equal(got, []uint64{31, 25, 40}) || !in.reached(all) {
		t.Errorf("then it has %d, want the rest", got)
	}
	// A stop: there is no cut.
	in = rings{priority: fill(10, 31), bulk: fill()}
	if err := in.endBeforeCut(); err != nil || in.ends[0] != in.priority.producer() {
		t.Errorf("without a cut it ends at %d: %v", in.ends[0], err)
	}
}

// TestRootDeepIsForgotten has a case closed while no sensor ran.
func TestRootDeepIsForgotten(t *testing.T) {
	a := startActor(t)
	s := newShop(t)
	o := kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: testRing, BulkBytes: testRing, Types: kernelTypes, Keeper: s}
	k := prepare(t, o)
	if err := errors.Join(k.attach(), k.keep(testBoot)); err != nil {
		t.Fatal(err)
	}
	k.deepen(uint32(a.pid), enrich.DeepSubtree)
	k.deepen(1<<30, enrich.DeepProcess)
	if err := k.announce(announcedExercise, 5); err != nil {
		t.Fatal(err)
	}
	k.leaving = true
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	sets, _ := readKept(s.hand())
	next, took, err := loadKernel(o, sets[0])
	if err != nil || !took {
		t.Fatalf("taken over %t, %v", took, err)
	}
	defer next.close()
	var left announcement
	if err := next.maps["announced_threads"].Lookup(announcedExercise, &left); err != nil || left.Tid != 0 {
		t.Errorf("a thread of the process before is announced: %+v, %v", left, err)
	}
	if len(next.deepBefore) != 2 {
		t.Fatalf("processes of cases %v", next.deepBefore)
	}
	next.deepen(uint32(a.pid), enrich.DeepSubtree) // its case is open
	sensor := &Sensor{kernel: next}
	sensor.seedCases()
	var deep uint8
	if err := next.maps["deep_pids"].Lookup(uint32(a.pid), &deep); err != nil {
		t.Errorf("of the open case: %v", err)
	}
	if err := next.maps["deep_pids"].Lookup(uint32(1<<30), &deep); err == nil {
		t.Error("of the closed case: it is still there")
	}
}

// TestRootCarryOn attaches a second set of programs beside the first, which was there
// before a connection, a file and a process: the second knows of them what the first does.
func TestRootCarryOn(t *testing.T) {
	a := startActor(t)
	server := a.spawn()
	s := newShop(t)
	o := kernelOptions{
		Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, PriorityBytes: testRing, BulkBytes: testRing, Types: kernelTypes,
		Files: FileOptions{On: true}, Keeper: s,
	}
	old := openKernel(t, o)
	if err := old.keep(testBoot); err != nil {
		t.Fatal(err)
	}
	old.leaving = true
	address := server.must(request{Op: "listen", Network: "tcp4"}).Local
	a.must(request{Op: "dial", Network: "tcp4", Addr: address})
	server.must(request{Op: "accept"})
	a.must(request{Op: "hold", Path: real(t, t.TempDir()) + "/held", Up: 100})
	// What was orphaned before the second set cannot be told from a stranger by it.
	orphan, dead := uint32(os.Getpid()), uint32(1<<30)
	for _, pid := range []uint32{orphan, dead} {
		if err := old.maps["scope_pids"].Put(pid, uint8(1)); err != nil {
			t.Fatal(err)
		}
	}

	sets, _ := readKept(s.hand())
	defer sets[0].close()
	o.Keeper = nil
	k := openKernel(t, o)
	sensor := &Sensor{o: Options{Scope: o.Scope}, kernel: k}
	if err := sensor.carryOn(sets[0]); err != nil {
		t.Fatal(err)
	}
	entries := func(k *kernel, name string) map[string]string {
		all, m := map[string]string{}, k.maps[name]
		key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
		it := m.Iterate()
		for it.Next(&key, &value) {
			all[string(key)] = string(value)
		}
		return all
	}
	for _, name := range []string{"sockets", "written_files"} {
		want := entries(old, name)
		if diff := cmp.Diff(want, entries(k, name)); diff != "" {
			t.Errorf("%s (-old +new):\n%s", name, diff)
		}
		t.Logf("%d %s", len(want), name)
	}
	if n := len(entries(old, "sockets")); n < 2 && coverageOf(k, event.TCPConnect) != "" {
		t.Errorf("%d sockets are known", n)
	}
	var in uint8
	if err := k.maps["scope_pids"].Lookup(orphan, &in); err != nil {
		t.Errorf("the orphan: %v", err)
	}
	if err := k.maps["scope_pids"].Lookup(dead, &in); err == nil {
		t.Error("one that is dead is in the tree")
	}
	server.must(request{Op: "drop"})
	a.must(request{Op: "drop"})
}

func coverageOf(k *kernel, kind event.Kind) string {
	for _, c := range k.coverage() {
		if c.Kind == kind {
			return c.Hook
		}
	}
	return ""
}

// TestRootTakeOver has one sensor follow another, of the same setup and of another one,
// while others ask it how it is: what happens before, between and after is read once.
func TestRootTakeOver(t *testing.T) {
	for _, tt := range []struct {
		name, how string
		change    func(*testing.T, *Options)
		between   int // execs
		lost      int // decisions about those that cannot be read
	}{
		{"same", howAdopted, func(*testing.T, *Options) {}, 1, 0},
		{"another ring", howReplaced, func(_ *testing.T, o *Options) { o.BulkBytes = 2 * testRing }, 1, 0},
		{"another layout", howReplaced, func(t *testing.T, o *Options) {
			o.BulkBytes = 2 * testRing
			changeManifest(t, o.Kept, func(m *manifest) {
				m.Wire[uint32(event.Exec)] = "EXEC another"
				m.Wire[uint32(event.Exit)] = "HEARTBEAT another" // which was its number
			})
		}, 0, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			how, change := tt.how, tt.change
			a := startActor(t)
			s := newShop(t)
			o := Options{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Keeper: s}
			var mu sync.Mutex
			count := map[string]int{}
			seen := func(rec []byte) {
				mu.Lock()
				defer mu.Unlock()
				for _, word := range []string{"edr-before", "edr-between", "edr-after"} {
					if bytes.Contains(rec, []byte(`"process.exec"`)) && bytes.Contains(rec, []byte(word)) {
						count[word]++
					}
				}
				if bytes.Contains(rec, []byte(`"TAKEN_OVER"`)) && bytes.Contains(rec, []byte(how)) {
					count["TAKEN_OVER"]++
				}
				if bytes.Contains(rec, []byte(`"UNDECODABLE"`)) {
					count["UNDECODABLE"]++
				}
			}
			counted := func(word string) func() bool {
				return func() bool { mu.Lock(); defer mu.Unlock(); return count[word] > 0 }
			}
			run := func(word string) { a.must(request{Op: "run", Path: "/bin/true", Args: []string{word}}) }
			t.Run("first", func(t *testing.T) {
				sensor, sink := openSensor(t, o, true)
				sink.seen = seen
				stop := runWorker(t, sensor)
				run("edr-before")
				await(t, "the first", counted("edr-before"))
				stop()
				m, err := parseMark(sink.mark)
				if err != nil || !m.clean {
					t.Fatalf("mark of an orderly stop: %+v, %v", m, err)
				}
				m.clean = false // as of a kill: after a stop hooks are tried anew that were refused
				o.Mark = m.append(nil)
			})
			run("edr-between")
			o.Kept = s.hand()
			change(t, &o)
			first := s.names()
			sensor, sink := openSensor(t, o, true)
			sink.seen = seen
			ctx, cancel := context.WithCancel(t.Context())
			var watching sync.WaitGroup
			watching.Go(func() { sensor.Watch(ctx) })
			watching.Go(func() {
				for ctx.Err() == nil {
					sensor.Stuck(time.Now())
					if _, err := sensor.Stats(); err != nil {
						t.Error(err)
					}
				}
			})
			// As each transaction of the buffer does until there is a mark of ours in one: it
			// must not pass for that.
			sensor.Release(o.Mark)
			if n := sensor.committed.Load(); n > sensor.mark.serial {
				t.Errorf("commit %d is durable, and this process has made %d", n, sensor.mark.serial)
			}
			stop := runWorker(t, sensor)
			await(t, "taken over", counted("TAKEN_OVER"))
			run("edr-after")
			await(t, "the last", counted("edr-after"))
			await(t, "no more is kept than before", func() bool {
				names := s.names()
				return len(names) == len(first) && (how == howAdopted) == slices.Contains(names, first[0])
			})
			cancel()
			watching.Wait()
			stop()
			want := map[string]int{"edr-before": 1, "edr-between": tt.between, "edr-after": 1, "TAKEN_OVER": 1, "UNDECODABLE": tt.lost}
			maps.DeleteFunc(want, func(_ string, n int) bool { return n == 0 })
			if diff := cmp.Diff(want, count); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
}

// changeManifest has what was kept be of another version.
func changeManifest(t *testing.T, kept []Kept, change func(*manifest)) {
	t.Helper()
	for i, k := range kept {
		if !strings.Contains(k.Name, "/manifest/") {
			continue
		}
		m, err := readManifest(k.File)
		if err != nil {
			t.Fatal(err)
		}
		change(m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		kept[i].File = manifestFile(t, string(b))
	}
}

func TestForeignKinds(t *testing.T) {
	const begin = ^uint32(0)
	ours := map[uint32]string{begin: "h", 1: "EXEC a", 2: "FORK b", 27: "SIGNAL c", 29: "HEARTBEAT d"}
	if got, err := foreignKinds(ours, ours); err != nil || len(got) != 0 {
		t.Errorf("the same: %v, %v", got, err)
	}
	got, err := foreignKinds(map[uint32]string{begin: "h", 1: "EXEC a", 2: "FORK x", 27: "HEARTBEAT d", 40: "NEW e"}, ours)
	if diff := cmp.Diff(map[uint32]foreign{2: lostRecord, 27: noEvent, 40: lostRecord}, got); err != nil || diff != "" {
		t.Errorf("%v, another version (-want +got):\n%s", err, diff)
	}
	for _, theirs := range []map[uint32]string{nil, {begin: "x", 1: "EXEC a"}} {
		if _, err := foreignKinds(theirs, ours); err == nil {
			t.Errorf("%v can be read", theirs)
		}
	}
}
