// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	// maxSlots bounds the memory for execs being put together, 280 KiB each. More
	// CPUs than that share them.
	maxSlots = 64
	// snapshotBuffer holds the largest record of the task iterator.
	snapshotBuffer = 64 << 10
)

// kernelOptions are what the kernel side needs.
type kernelOptions struct {
	Scope         Scope
	PriorityBytes int // a power of two and a multiple of the page size
	BulkBytes     int
	Files         FileOptions
	Protected     []Protected
	Process       int        // whose files these are, and to whom nothing must happen; 0 is this one
	Copies        int        // of programs on tracepoints; 0 means as many as the running kernel needs
	Types         *btf.Cache // of the running kernel; nil means to read them, and to drop them after attaching
	Keeper        Keeper     // nil: nothing outlives the process
}

// kernel is the sensor's part that lives in the kernel: maps, programs, links. After
// attach, one goroutine may mend the hooks while others read counters and coverage, and
// detach.
type kernel struct {
	scope Scope
	spec  *ebpf.CollectionSpec
	maps  map[string]*ebpf.Map
	lsm   func() error // whether the kernel runs LSM programs, found out once
	types *btf.Cache   // given, or nil

	filtering sync.Mutex    // of changes of file_filter
	protected atomic.Uint32 // entries of protected_files

	mu       sync.Mutex // of what follows
	attached []attachment
	detached bool   // and nothing is to be attached again
	gone     uint64 // what programs that were replaced have missed

	priority, bulk *ebpf.Map // the rings; owned by the kernel value

	setup     string // as in a manifest
	keeper    Keeper // nil without
	setID     string
	kept      map[string]bool // what the keeper has of the set
	manifests int             // the newest one's number
	leaving   bool            // what is kept is to go on
	mended    bool            // as in a manifest

	// Processes of which a case wanted everything in an earlier process of the sensor,
	// until it is known which of them one wants still.
	deepBefore map[uint32]bool
}

// KindCounter is what the kernel counted for one kind of event. Attempts is
// what was to be reported, Lost those of them that no record could be written for.
// Suppressed are those that were not to be: excluded, or more than a process may have.
type KindCounter struct {
	Attempts, Lost, Suppressed uint64
}

// loadKernel makes the maps, or takes over a set that was kept of a kernel of the same
// setup; set may be nil, or one that is to be replaced in any case. Nothing is attached
// before attach. The caller must close the result.
func loadKernel(o kernelOptions, set *keptSet) (k *kernel, adopted bool, err error) {
	spec, err := bpf.LoadSensor()
	if err != nil {
		return nil, false, fmt.Errorf("read kernel programs: %w", err)
	}
	if o.Copies == 0 {
		o.Copies = copiesFor(release())
	}
	if err := configure(spec, o); err != nil {
		return nil, false, err
	}
	k = &kernel{scope: o.Scope, spec: spec, types: o.Types, maps: make(map[string]*ebpf.Map), setup: setupOf(spec, o), keeper: o.Keeper, kept: map[string]bool{}}
	if set != nil && !set.replace && set.manifest.Setup == k.setup {
		if err := k.adopt(set, o); err != nil {
			set.broken = err
		} else {
			adopted = true
		}
	}
	if !adopted {
		err = k.make(o)
	}
	if err != nil {
		return nil, false, errors.Join(err, k.close())
	}
	k.priority, k.bulk = k.maps["priority_ring"], k.maps["bulk_ring"]
	err = k.beSensor(o.Process)
	if err == nil {
		err = k.protect(o.Protected)
	}
	var missing []error
	if err == nil {
		missing, err = k.filter(o.Files)
	}
	if err == nil && adopted {
		err = k.settleIn()
	}
	if err == nil && k.setID == "" {
		var id uint32
		id, err = mapID(k.priority)
		k.setID = strconv.FormatUint(uint64(id), 10)
	}
	if err != nil {
		k.leaving = adopted
		return nil, false, errors.Join(err, k.close())
	}
	if a := k.find(event.FileModify); a != nil { // nil without file events
		a.errs = append(a.errs, missing...)
	}
	return k, adopted, nil
}

// make makes the maps, and what is to be attached.
func (k *kernel) make(o kernelOptions) (err error) {
	for _, h := range hooks(o.Files.On, o.Copies) {
		k.attached = append(k.attached, attachment{hook: h})
	}
	for name, m := range k.spec.Maps {
		if strings.HasPrefix(name, ".") {
			continue // constants: each program gets its own
		}
		if k.maps[name], err = newMap(m); err != nil {
			return fmt.Errorf("create map %s: %w", name, err)
		}
	}
	return nil
}

// settleIn has what was taken over know nothing any more of the process before: none of
// its threads is announced, and who was in its cases is found out anew.
func (k *kernel) settleIn() error {
	for what := range k.maps["announced_threads"].MaxEntries() {
		if err := k.maps["announced_threads"].Put(what, announcement{}); err != nil {
			return fmt.Errorf("take over announced_threads: %w", err)
		}
	}
	k.deepBefore = map[uint32]bool{}
	var pid uint32
	var deep uint8
	it := k.maps["deep_pids"].Iterate()
	for it.Next(&pid, &deep) {
		k.deepBefore[pid] = true
	}
	return nil // an iteration that was cut short has missed processes that ended
}

// configure puts the options into the maps' sizes and the programs' constants.
func configure(spec *ebpf.CollectionSpec, o kernelOptions) error {
	for name, size := range map[string]int{"priority_ring": o.PriorityBytes, "bulk_ring": o.BulkBytes} {
		page := os.Getpagesize()
		if size < page || size&(size-1) != 0 {
			return fmt.Errorf("%s of %d bytes: the size must be a power of two of at least %d", name, size, page)
		}
		spec.Maps[name].MaxEntries = uint32(size)
	}
	if o.Scope.Mode != ScopeTree {
		spec.Maps["scope_pids"].MaxEntries = 1
	}
	cpus, err := onlineCPUs()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	cpus = min(cpus, maxSlots)
	slots := min(cpus*uint32(o.Copies), maxSlots)
	spec.Maps["exec_slots"].MaxEntries = slots + 1
	if o.Copies > 1 {
		// Each event has an entry, which its other copies have to find. A CPU may hold
		// back as many as a hundred free ones.
		spec.Maps["reported"].MaxEntries = 8192 + cpus*256
	}
	configureFiles(spec, o.Files, cpus)
	constants := map[string]any{"scope_mode": uint32(o.Scope.Mode), "scope_cgroup_id": o.Scope.CgroupID, "slot_count": slots, "file_slot_cpus": cpus}
	constants["lsm_probe_pid"] = uint32(os.Getpid())
	constants["copies"] = uint32(o.Copies)
	for name, value := range constants {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// newMap creates a map, or says why the host refuses it.
func newMap(spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := makeMap(spec)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOMEM) {
		return nil, NewPreflight().mapRefused(fmt.Sprintf("map %s of %d entries", spec.Name, spec.MaxEntries), err)
	}
	return m, err
}

// makeMap creates a map. Kernels before 5.11 count maps as locked memory, whose limit is
// raised when it is in the way; newer ones have EPERM mean what it says.
func makeMap(spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if errors.Is(err, unix.EPERM) {
		infinity := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &infinity) == nil {
			m, err = ebpf.NewMap(spec)
		}
	}
	return m, err
}

// attach puts the programs in place, the best that the kernel accepts for each
// hook. The error names the required events that no program sees; all others are in
// coverage. It then finds the processes and the sockets that are in scope already.
func (k *kernel) attach() error { return k.attachBy(k.loader()) }

func (k *kernel) attachBy(load loader) error {
	k.lsm = sync.OnceValue(func() error { return k.probeLSM(load) })
	var refused []string
	for i, a := range k.attached {
		before := a.errs
		a = a.attach(load)
		a.errs = append(before, a.errs...)
		k.attached[i] = a
		if a.constant != "" && a.section != "" {
			if err := k.spec.Variables[a.constant].Set(uint32(1)); err != nil {
				return fmt.Errorf("set %s: %w", a.constant, err)
			}
		}
		if a.required && a.section == "" {
			refused = append(refused, fmt.Sprintf("%s: no hook: %s", a.kinds[0], strings.Join(sentences(a.errs), "; ")))
		}
	}
	k.settleAccept()
	k.attachSyscalls(load)
	if len(refused) > 0 {
		return &Refusal{
			CheckHooks, "the kernel refuses the programs that the sensor cannot do without: " + strings.Join(refused, "; "),
			"boot 5.10 or newer with CONFIG_DEBUG_INFO_BTF and CONFIG_BPF_EVENTS, or allow them in the policy that refuses them",
		}
	}
	if k.scope.Mode == ScopeTree {
		if err := seedTree(k.maps["scope_pids"], k.scope.PID, scanProc); err != nil {
			return fmt.Errorf("scope: %w", err)
		}
	}
	modify := k.find(event.FileModify)
	if err := k.seed(load, modify != nil && len(modify.programs) > 0); err != nil {
		for _, kind := range kinds(event.TCPClose, event.FileModify) {
			if a := k.find(kind); a != nil {
				a.errs = append(a.errs, fmt.Errorf("what was open before the start is not known: %w", err))
			}
		}
	}
	return nil
}

// settleAccept has the changes of a socket's state tell what is accepted, where accept(2)
// cannot be seen itself.
func (k *kernel) settleAccept() {
	at := slices.IndexFunc(k.attached, func(a attachment) bool { return a.constant == acceptsSeen })
	accept := k.attached[at]
	if accept.section != "" {
		return
	}
	k.attached = slices.Delete(k.attached, at, at+1)
	tcp := k.find(event.TCPClose)
	tcp.kinds = append(tcp.kinds, accept.kinds...)
	if n := len(accept.errs); n > 0 {
		tcp.errs = append(tcp.errs, fmt.Errorf("who listens is named as who accepts, since accept(2) cannot be seen: %w", accept.errs[n-1]))
	}
}

// seed runs the program that takes in the sockets that are open and, where their close
// is seen, the files. Those that follow them are attached already, so that none is
// missed in between.
func (k *kernel) seed(load loader, files bool) error {
	var early uint32
	if files {
		early = 1
	}
	if err := k.spec.Variables["early_files"].Set(early); err != nil {
		return err
	}
	program, _, err := load(hook{}, "on_task_file")
	if err != nil {
		return err
	}
	defer program.Close()
	iter, err := link.AttachIter(link.IterOptions{Program: program})
	if err != nil {
		return err
	}
	defer iter.Close()
	f, err := iter.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f) // the program runs while its file is read
	return err
}

// loader loads programs. The kernel's types take longer to parse than all the rest, and
// megabytes of memory, which go with it unless they were given.
func (k *kernel) loader() loader {
	cache := k.types
	if cache == nil {
		cache = btf.NewCache()
	}
	return func(h hook, name string) (*ebpf.Program, *ebpf.ProgramSpec, error) {
		return k.load(h, name, cache)
	}
}

// load loads one program with only the maps it uses: what a kernel cannot do must
// fail the program that asks for it and no other.
func (k *kernel) load(h hook, name string, cache *btf.Cache) (*ebpf.Program, *ebpf.ProgramSpec, error) {
	name, optional := strings.CutPrefix(name, "?")
	program, ok := k.spec.Programs[name]
	if !ok {
		return nil, nil, errors.New("not in the object")
	}
	if program.Type == ebpf.LSM && name != "lsm_probe" {
		if err := k.lsm(); err != nil {
			return nil, nil, err
		}
	}
	if err := k.spec.Variables["copy"].Set(uint32(h.copy)); err != nil {
		return nil, nil, err
	}
	if len(h.arguments) > 0 || optional {
		types, err := cache.Kernel()
		if err != nil {
			return nil, nil, err
		}
		shift, err := argumentShift(types, kernelFunction(program), h.arguments)
		if optional && errors.Is(err, btf.ErrNotFound) {
			return nil, nil, nil
		}
		if err == nil {
			err = k.spec.Variables["argument_shift"].Set(shift)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	spec := &ebpf.CollectionSpec{
		Maps:      make(map[string]*ebpf.MapSpec),
		Programs:  map[string]*ebpf.ProgramSpec{name: program},
		Types:     k.spec.Types,
		ByteOrder: k.spec.ByteOrder,
	}
	shared := make(map[string]*ebpf.Map)
	for _, ins := range program.Instructions {
		if !ins.IsLoadFromMap() {
			continue
		}
		ref := ins.Reference()
		spec.Maps[ref] = k.spec.Maps[ref]
		if strings.HasPrefix(ref, ".rodata") {
			spec.Variables = k.spec.Variables // which are all in there
		}
		if m, ok := k.maps[ref]; ok {
			shared[ref] = m
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared, Cache: cache})
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	return c.DetachProgram(name), program, nil
}

// counters sums the counters of all CPUs. Attempts equals the records written plus
// Lost whenever no event is under way.
func (k *kernel) counters() (sums [event.Kinds]KindCounter, err error) {
	return readCounters(k.maps["kind_counters"])
}

func readCounters(m *ebpf.Map) (sums [event.Kinds]KindCounter, err error) {
	for kind := range min(m.MaxEntries(), uint32(len(sums))) {
		var perCPU []bpf.SensorKindCounter
		if err := m.Lookup(kind, &perCPU); err != nil {
			return sums, fmt.Errorf("read kind_counters of %s: %w", event.Kind(kind), err)
		}
		for _, c := range perCPU {
			sums[kind].Attempts += c.Attempts
			sums[kind].Lost += c.Lost
			sums[kind].Suppressed += c.Suppressed
		}
	}
	return sums, nil
}

// missed is how often at most the kernel left an event out, because all programs that
// see it were interrupted on that CPU; no counter of ours saw it. Zero before kernel
// 5.12, which does not tell.
func (k *kernel) missed() (uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	sum := k.gone
	for i := range k.attached {
		n, err := k.attached[i].missed()
		if err != nil {
			return sum, err
		}
		sum += n
	}
	return sum, nil
}

// copiesFor is how many copies of a tracepoint's program a kernel release needs. Since
// 7.0 tasks are preempted inside of tracepoints, and even the spare copy of one task
// while it does its only work in a thousand runs.
func copiesFor(release string) int {
	major, _, _ := strings.Cut(release, ".")
	if n, err := strconv.Atoi(major); err == nil && n >= 7 {
		return 3
	}
	return 1
}

// release is what uname -r says.
func release() string {
	var u unix.Utsname
	_ = unix.Uname(&u) // its only error is a bad address
	return unix.ByteSliceToString(u.Release[:])
}

// snapshot calls visit with a record for each process in scope that exists now: a
// struct exec_event of kind TASK, valid until visit returns.
func (k *kernel) snapshot(visit func(rec []byte) error) error {
	f, err := k.openIterator()
	if err != nil {
		return err
	}
	return errors.Join(readRecords(f, visit), f.Close())
}

func (k *kernel) openIterator() (io.ReadCloser, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	a := k.find(event.Task)
	if len(a.links) == 0 {
		return nil, errors.New("snapshot: no task iterator is attached")
	}
	iter, ok := a.links[0].(*link.Iter)
	if !ok {
		return nil, fmt.Errorf("snapshot: %s is no iterator", a.section)
	}
	f, err := iter.Open()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", a.section, err)
	}
	return f, nil
}

// readRecords splits a stream of records, each of which starts with its size.
func readRecords(r io.Reader, visit func(rec []byte) error) error {
	b := bufio.NewReaderSize(r, snapshotBuffer)
	for {
		head, err := b.Peek(4)
		if errors.Is(err, io.EOF) && len(head) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read process records: %w", err)
		}
		rec, err := b.Peek(int(min(binary.NativeEndian.Uint32(head), snapshotBuffer+1)))
		if err != nil {
			return fmt.Errorf("read process records: %w", err)
		}
		if len(rec) == 0 {
			return errors.New("read process records: a record of no bytes")
		}
		if err := visit(rec); err != nil {
			return err
		}
		if _, err := b.Discard(len(rec)); err != nil {
			return fmt.Errorf("read process records: %w", err)
		}
	}
}

// detach removes the programs; the maps stay, so that the rings can be drained and
// the counters read. Coverage still tells what was attached.
func (k *kernel) detach() error {
	var errs []error
	k.mu.Lock()
	defer k.mu.Unlock()
	k.detached = true
	for i := range k.attached {
		errs = append(errs, k.attached[i].detach())
	}
	return errors.Join(errs...)
}

// close detaches and frees everything, but for what is kept when leaving. It is safe to
// call more than once.
func (k *kernel) close() error {
	errs := []error{k.detach()}
	for _, m := range k.maps {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	clear(k.maps)
	return errors.Join(errs...)
}

// onlineCPUs counts the CPUs in a list like "0-3,8". Possible CPUs would be the
// safe number, but hypervisors announce hundreds that never come.
func onlineCPUs() (uint32, error) {
	list, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return 0, err
	}
	return countCPUs(string(bytes.TrimSpace(list)))
}

func countCPUs(list string) (uint32, error) {
	var n uint32
	for span := range strings.SplitSeq(list, ",") {
		low, high, ok := strings.Cut(span, "-")
		if !ok {
			high = low
		}
		first, err1 := strconv.ParseUint(low, 10, 16)
		last, err2 := strconv.ParseUint(high, 10, 16)
		if err := errors.Join(err1, err2); err != nil {
			return 0, fmt.Errorf("parse %q: %w", list, err)
		}
		if last < first {
			return 0, fmt.Errorf("parse %q: %d is less than %d", list, last, first)
		}
		n += uint32(last - first + 1)
	}
	return n, nil
}
