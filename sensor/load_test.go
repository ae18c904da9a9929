// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const testRing = 4 << 20

// kernelTypes are read once for all tests, not for each as by the sensor.
var kernelTypes = btf.NewCache()

// prepare loads what can be attached.
func prepare(t testing.TB, o kernelOptions) *kernel {
	t.Helper()
	require(t, "root")
	require(t, "btf")
	o.Types = kernelTypes
	if o.PriorityBytes == 0 {
		o.PriorityBytes = testRing
	}
	if o.BulkBytes == 0 {
		o.BulkBytes = testRing
	}
	k, _, err := loadKernel(o, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// openKernel loads and attaches within the scope.
func openKernel(t testing.TB, o kernelOptions) *kernel {
	t.Helper()
	k := prepare(t, o)
	if err := k.attach(); err != nil {
		t.Fatal(err)
	}
	return k
}

// watch is openKernel for the tree of an actor.
func watch(t testing.TB, a *actor) *kernel {
	t.Helper()
	return openKernel(t, kernelOptions{Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}})
}

// record is a decoded record; by kind, one of the pointers is set.
type record struct {
	bpf.SensorEventHeader
	exec *execRecord
	fork *bpf.SensorForkEvent
	exit *bpf.SensorExitEvent
	tcp  *bpf.SensorTcpEvent
	file *fileRecord

	tamper *bpf.SensorTamperEvent
}

type fileRecord struct {
	bpf.SensorFileEvent
	path, path2, name string
}

type execRecord struct {
	bpf.SensorExecEvent
	filename, interp, exe, cwd, cgroup string
	argv                               []byte
}

func kindOf(h bpf.SensorEventHeader) event.Kind { return event.Kind(h.Kind) }

// parse reads a record with encoding/binary: slow, and not the code under test.
func parse(t testing.TB, raw []byte) record {
	t.Helper()
	var r record
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &r.SensorEventHeader); err != nil {
		t.Fatal(err)
	}
	if int(r.Size) != len(raw) {
		t.Fatalf("record of %d bytes says it has %d", len(raw), r.Size)
	}
	var fixed any
	switch kindOf(r.SensorEventHeader) {
	case event.Exec, event.Task:
		r.exec = new(execRecord)
		fixed = &r.exec.SensorExecEvent
	case event.Fork:
		r.fork = new(bpf.SensorForkEvent)
		fixed = r.fork
	case event.Exit:
		r.exit = new(bpf.SensorExitEvent)
		fixed = r.exit
	case event.TCPConnect, event.TCPConnectFailed, event.TCPAccept, event.TCPListen, event.TCPClose:
		r.tcp = new(bpf.SensorTcpEvent)
		fixed = r.tcp
	case event.Signal, event.Ptrace:
		r.tamper = new(bpf.SensorTamperEvent)
		fixed = r.tamper
	default:
		r.file = new(fileRecord)
		fixed = &r.file.SensorFileEvent
	}
	in := bytes.NewReader(raw)
	if err := binary.Read(in, binary.NativeEndian, fixed); err != nil {
		t.Fatal(err)
	}
	rest := raw[len(raw)-in.Len():]
	take := func(n uint32) []byte {
		if int(n) > len(rest) {
			t.Fatalf("a string of %d bytes in the last %d", n, len(rest))
		}
		s := rest[:n]
		rest = rest[n:]
		return s
	}
	if e := r.exec; e != nil {
		e.filename, e.interp = string(take(e.FilenameLen)), string(take(e.InterpLen))
		e.exe, e.cwd, e.cgroup = slashes(take(e.ExeLen)), slashes(take(e.CwdLen)), slashes(take(e.CgroupLen))
		e.argv = slices.Clone(take(e.ArgvLen))
	}
	if e := r.file; e != nil {
		path, path2 := take(e.PathLen), take(e.Path2Len)
		e.path, e.path2, e.name = string(path), string(path2), string(take(e.NameLen))
		degraded := e.Flags&uint32(event.FileDegraded) != 0
		if !degraded || e.Flags&uint32(event.FileWalked) != 0 {
			e.path = slashes(path)
		}
		if walked := kinds(event.FileRename, event.FileLink, event.MountMove); !degraded && slices.Contains(walked, kindOf(r.SensorEventHeader)) {
			e.path2 = slashes(path2)
		}
	}
	if len(rest) != 0 {
		t.Fatalf("%d bytes behind the strings", len(rest))
	}
	return r
}

// slashes turns "leaf\0dir\0" into "/dir/leaf".
func slashes(path []byte) string {
	if len(path) == 0 {
		return "/"
	}
	names := strings.Split(strings.TrimSuffix(string(path), "\x00"), "\x00")
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

func text(c []int8) string {
	var b []byte
	for _, v := range c {
		if v == 0 {
			break
		}
		b = append(b, byte(v))
	}
	return string(b)
}

// tap reads a ring.
type tap struct {
	t testing.TB
	r *ringbuf.Reader
}

func newTap(t testing.TB, m *ebpf.Map) *tap {
	t.Helper()
	r, err := ringbuf.NewReader(m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return &tap{t, r}
}

// until returns the records up to the first for which done holds.
func (p *tap) until(what string, done func(record) bool) []record {
	p.t.Helper()
	p.r.SetDeadline(time.Now().Add(patience))
	var records []record
	for {
		raw, err := p.r.Read()
		if err != nil {
			p.t.Fatalf("%s: not among %d records: %v", what, len(records), err)
		}
		r := parse(p.t, raw.RawSample)
		records = append(records, r)
		if done(r) {
			return records
		}
	}
}

// exited is the end of a process.
func exited(pid int) func(record) bool {
	return func(r record) bool { return r.exit != nil && int(r.Pid) == pid }
}

// rest returns the records that are in the ring.
func (p *tap) rest() []record {
	p.t.Helper()
	p.r.SetDeadline(time.Now())
	var records []record
	for {
		raw, err := p.r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return records
		}
		if err != nil {
			p.t.Fatal(err)
		}
		records = append(records, parse(p.t, raw.RawSample))
	}
}

// one returns the only record of a kind about a process.
func one(t testing.TB, records []record, kind event.Kind, pid int) record {
	t.Helper()
	var found []record
	for _, r := range records {
		if kindOf(r.SensorEventHeader) == kind && int(r.Pid) == pid {
			found = append(found, r)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d records of %s for process %d, want 1", len(found), kind, pid)
	}
	return found[0]
}

// Tasks of a CPU that are preempted inside of all copies of a program have a slot each.
func TestSlots(t *testing.T) {
	online, err := onlineCPUs()
	if err != nil {
		t.Fatal(err)
	}
	for copies, want := range map[int]uint32{1: min(online, maxSlots), 3: min(3*online, maxSlots)} {
		spec, err := bpf.LoadSensor()
		if err != nil {
			t.Fatal(err)
		}
		if err := configure(spec, kernelOptions{PriorityBytes: 1 << 20, BulkBytes: 1 << 20, Copies: copies}); err != nil {
			t.Fatal(err)
		}
		var count uint32
		if err := spec.Variables["slot_count"].Get(&count); err != nil {
			t.Fatal(err)
		}
		if n := spec.Maps["exec_slots"].MaxEntries; count != want || n != want+1 {
			t.Errorf("%d copies on %d CPUs: %d slots of %d, want %d and the iterator's", copies, online, count, n, want)
		}
	}
}

func TestRootCoverage(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	seen := map[event.Kind]bool{}
	for _, c := range k.coverage() {
		if c.Event != c.Kind.String() {
			t.Errorf("%s is called %q", c.Kind, c.Event)
		}
		if c.Hook == "" {
			t.Errorf("%s has no hook: %s", c.Event, strings.Join(c.Errs, "; "))
		}
		if required := c.Kind == event.Exec || c.Kind == event.Fork || c.Kind == event.Exit; c.Required != required {
			t.Errorf("%s: required %t", c.Event, c.Required)
		}
		seen[c.Kind] = true
	}
	for kind := event.Exec; kind <= event.TCPClose; kind++ {
		if !seen[kind] {
			t.Errorf("%s is not in the table", kind)
		}
	}
	if n, err := k.missed(); err != nil || n != 0 {
		t.Errorf("missed %d runs, %v", n, err)
	}
	if err := k.detach(); err != nil {
		t.Error(err)
	}
	if _, err := k.counters(); err != nil {
		t.Errorf("counters after detach: %v", err)
	}
	if c := k.coverage(); c[0].Hook == "" {
		t.Error("detach forgot the coverage")
	}
}

// The scope is a constant to the verifier, which then sees another program. This
// loads all that every kernel has and attaches none: a test does not watch the whole
// host. The others, and a tree's, are in TestRootEveryWay.
func TestRootEveryProgramLoadsInEveryScope(t *testing.T) {
	for _, mode := range []ScopeMode{ScopeAll, ScopeCgroup} {
		k := prepare(t, kernelOptions{Scope: Scope{Mode: mode, PID: 1, CgroupID: 1}})
		for name, spec := range k.spec.Programs {
			if family, _, _ := strings.Cut(spec.SectionName, "/"); !slices.Contains([]string{"tp_btf", "raw_tp", "iter"}, family) {
				continue
			}
			program, _, err := k.load(hook{}, name, kernelTypes)
			if err != nil {
				t.Errorf("scope %d: %s: %v", mode, name, err)
				continue
			}
			if err := program.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestRootRequiredHook(t *testing.T) {
	require(t, "root")
	require(t, "btf")
	k, _, err := loadKernel(kernelOptions{PriorityBytes: 4096, BulkBytes: 4096}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	for i := range k.attached {
		k.attached[i].chain = []candidate{{"not_there"}} // so that nothing attaches to the host
	}
	err = k.attach()
	if err == nil {
		t.Fatal("attached without any program")
	}
	for _, want := range []string{"process.exec: no hook: load not_there: not in the object", "process.fork", "process.exit", "CONFIG_DEBUG_INFO_BTF"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "net.") {
		t.Errorf("error %q is about events that are not required", err)
	}
}

func TestLoadKernelRejectsRingSizes(t *testing.T) {
	for _, size := range []int{0, 1, 1000, 4096 * 3, -4096} {
		if k, _, err := loadKernel(kernelOptions{PriorityBytes: size, BulkBytes: testRing}, nil); err == nil {
			t.Errorf("took a ring of %d bytes", size)
			k.close()
		}
	}
}

func TestCountCPUs(t *testing.T) {
	for _, tt := range []struct {
		list string
		want uint32
		bad  bool
	}{
		{"0", 1, false},
		{"0-1", 2, false},
		{"0-3,8,10-11", 7, false},
		{"", 0, true},
		{"3-1", 0, true},
		{"a", 0, true},
		{"0-", 0, true},
		{"99999", 0, true},
	} {
		got, err := countCPUs(tt.list)
		if got != tt.want || (err != nil) != tt.bad {
			t.Errorf("countCPUs(%q) = %d, %v", tt.list, got, err)
		}
	}
}

func TestReadRecords(t *testing.T) {
	sized := func(n uint32) []byte {
		rec := make([]byte, n)
		binary.NativeEndian.PutUint32(rec, n)
		return rec
	}
	stop := errors.New("stop")
	for _, tt := range []struct {
		name  string
		data  []byte
		sizes []int
		want  string
		visit error
	}{
		{name: "none"},
		{name: "two", data: append(sized(8), sized(4000)...), sizes: []int{8, 4000}},
		{name: "largest", data: sized(snapshotBuffer), sizes: []int{snapshotBuffer}},
		{name: "too large", data: sized(snapshotBuffer + 1), want: "buffer full"},
		{name: "cut size", data: []byte{1, 2}, want: "EOF"},
		{name: "cut record", data: sized(100)[:50], want: "EOF"},
		{name: "no bytes", data: make([]byte, 4), want: "no bytes"},
		{name: "visit fails", data: sized(8), sizes: []int{8}, visit: stop, want: "stop"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var sizes []int
			err := readRecords(bufio.NewReaderSize(bytes.NewReader(tt.data), 16), func(rec []byte) error {
				sizes = append(sizes, len(rec))
				return tt.visit
			})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if !slices.Equal(sizes, tt.sizes) {
				t.Errorf("records of %v bytes, want %v", sizes, tt.sizes)
			}
		})
	}
}

// cgroup2Mount finds where version 2 control groups are mounted.
func cgroup2Mount() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("no cgroup2 in /proc/self/mounts")
}
