// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
)

// memoryRing is a ring in plain memory with the kernel's side of it.
type memoryRing struct {
	consumer, producer, data []byte
}

func newMemoryRing(size int) *memoryRing {
	return &memoryRing{make([]byte, 8), make([]byte, 8), make([]byte, 2*size)}
}

func (m *memoryRing) open(t testing.TB) *ring {
	t.Helper()
	r, err := newRing(m.consumer, m.producer, m.data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (m *memoryRing) size() uint64     { return uint64(len(m.data) / 2) }
func (m *memoryRing) produced() uint64 { return binary.NativeEndian.Uint64(m.producer) }
func (m *memoryRing) consumed() uint64 { return binary.NativeEndian.Uint64(m.consumer) }

// store writes through both mappings.
func (m *memoryRing) store(pos uint64, b []byte) {
	for i, c := range b {
		at := (pos + uint64(i)) % m.size()
		m.data[at], m.data[at+m.size()] = c, c
	}
}

// put reserves a record, as bpf_ringbuf_reserve does; false when there is no room.
func (m *memoryRing) put(payload []byte, flags uint32) (pos uint64, ok bool) {
	pos = m.produced()
	whole := uint64(ringHeader + (len(payload)+7)&^7)
	if pos+whole-m.consumed() > m.size() {
		return 0, false
	}
	m.header(pos, uint32(len(payload))|flags)
	m.store(pos+ringHeader, payload)
	binary.NativeEndian.PutUint64(m.producer, pos+whole)
	return pos, true
}

func (m *memoryRing) header(pos uint64, value uint32) {
	m.store(pos, binary.NativeEndian.AppendUint32(nil, value))
}

func payload(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed + i*7)
	}
	return b
}

func mustNext(t *testing.T, r *ring) []byte {
	t.Helper()
	rec, ok, err := r.next()
	if err != nil || !ok {
		t.Fatalf("next = %v, %v; want a record", ok, err)
	}
	return rec
}

func mustBeEmpty(t *testing.T, r *ring) {
	t.Helper()
	if rec, ok, err := r.next(); ok || err != nil {
		t.Fatalf("next = %d bytes, %v, %v; want none", len(rec), ok, err)
	}
}

func TestRingSkipsDiscardedAndStopsAtBusy(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	m.put(payload(10, 1), 0)
	m.put(payload(20, 2), ringDiscard)
	busy, _ := m.put(payload(30, 3), ringBusy)
	m.put(payload(40, 4), 0)

	if diff := cmp.Diff(payload(10, 1), mustNext(t, r)); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	mustBeEmpty(t, r)
	if r.readable() || !r.unread() || r.position() != busy {
		t.Errorf("at a busy record: readable %v, unread %v, position %d; want false, true, %d", r.readable(), r.unread(), r.position(), busy)
	}
	m.header(busy, 30)
	if !r.readable() {
		t.Error("not readable after the commit")
	}
	for i, want := range [][]byte{payload(30, 3), payload(40, 4)} {
		if diff := cmp.Diff(want, mustNext(t, r)); diff != "" {
			t.Errorf("record %d (-want +got):\n%s", i, diff)
		}
	}
	mustBeEmpty(t, r)
	if r.unread() || !r.unreleased() {
		t.Errorf("at the end: unread %v, unreleased %v; want false, true", r.unread(), r.unreleased())
	}
	if r.used() != r.position() {
		t.Errorf("used = %d, want %d", r.used(), r.position())
	}
	r.release(r.position())
	if r.used() != 0 || r.unreleased() {
		t.Errorf("after release: used %d, unreleased %v", r.used(), r.unreleased())
	}
}

// TestRingWrapsAround writes and reads random sizes through many turns of a small
// ring, releasing in steps of its own, and compares every byte.
func TestRingWrapsAround(t *testing.T) {
	m := newMemoryRing(1024)
	r := m.open(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	type held struct{ rec, want []byte }
	var (
		queued  [][]byte // written, not yet read
		reading []held   // read, not yet released: must stay intact
		written int
	)
	for m.produced() < 200*m.size() {
		b := payload(rnd.IntN(300), written)
		flags := uint32(0)
		if rnd.IntN(5) == 0 {
			flags = ringDiscard
		}
		if _, ok := m.put(b, flags); ok {
			written++
			if flags == 0 {
				queued = append(queued, b)
			}
		}
		for range rnd.IntN(4) {
			rec, ok, err := r.next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			reading = append(reading, held{rec, queued[0]})
			queued = queued[1:]
		}
		if rnd.IntN(3) == 0 {
			for i, h := range reading {
				if diff := cmp.Diff(h.want, h.rec); diff != "" {
					t.Fatalf("record %d changed before its release (-want +got):\n%s", i, diff)
				}
			}
			r.release(r.position())
			reading = reading[:0]
		}
	}
	if written < 1000 {
		t.Errorf("only %d records", written)
	}
}

func TestRingSecondReaderFindsWhatWasNotReleased(t *testing.T) {
	m := newMemoryRing(1 << 16)
	first := m.open(t)
	for i := range 50 {
		m.put(payload(64, i), 0)
	}
	for range 50 {
		mustNext(t, first)
	}
	for i := range 20 {
		m.put(payload(64, 50+i), 0)
	}
	second := m.open(t)
	for i := range 70 {
		if diff := cmp.Diff(payload(64, i), mustNext(t, second)); diff != "" {
			t.Fatalf("record %d (-want +got):\n%s", i, diff)
		}
	}
	mustBeEmpty(t, second)
}

func TestRingSeek(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	m.put(payload(8, 1), 0)
	second, _ := m.put(payload(8, 2), 0)
	m.put(payload(8, 3), 0)
	r.release(second)
	end := m.produced()
	for _, tt := range []struct {
		name string
		pos  uint64
		ok   bool
	}{
		{"released", 0, false},
		{"consumer", second, true},
		{"inside", second + 16, true},
		{"producer", end, true},
		{"beyond", end + 8, false},
		{"unaligned", second + 1, false},
		{"far", 1 << 63, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := r.position()
			err := r.seek(tt.pos)
			if tt.ok != (err == nil) || err != nil && !errors.Is(err, errRing) {
				t.Fatalf("seek(%d) = %v", tt.pos, err)
			}
			if want := map[bool]uint64{true: tt.pos, false: before}[tt.ok]; r.position() != want {
				t.Errorf("position = %d, want %d", r.position(), want)
			}
		})
	}
	if err := r.seek(second); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(payload(8, 2), mustNext(t, r)); diff != "" {
		t.Errorf("after seek (-want +got):\n%s", diff)
	}
}

func TestRingReleaseIgnoresWhatCannotBe(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	first, _ := m.put(payload(8, 1), 0)
	second, _ := m.put(payload(8, 2), 0)
	r.release(second)
	for _, pos := range []uint64{first, m.produced() + 8, 1 << 63} {
		r.release(pos)
		if m.consumed() != second {
			t.Fatalf("release(%d) moved the consumer from %d to %d", pos, second, m.consumed())
		}
	}
}

func TestRingCorruptHeaders(t *testing.T) {
	for _, tt := range []struct {
		name     string
		header   uint32
		producer uint64
	}{
		{"longer than produced", 100, 16},
		{"one byte too long", 9, 16},
		{"longest", ringLength, 4096},
		{"longest discarded", ringLength | ringDiscard, 4096},
		{"producer a ring ahead", 8, 4096 + 8},
		{"producer unaligned", 8, 17},
		{"producer behind", 8, ^uint64(7)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemoryRing(4096)
			r := m.open(t)
			m.header(0, tt.header)
			binary.NativeEndian.PutUint64(m.producer, tt.producer)
			for range 2 { // it stays an error
				if _, ok, err := r.next(); ok || !errors.Is(err, errRing) {
					t.Fatalf("next = %v, %v; want errRing", ok, err)
				}
			}
			if r.position() != 0 {
				t.Errorf("position = %d, want 0", r.position())
			}
		})
	}
}

func TestNewRingRefusesOddMemory(t *testing.T) {
	for _, tt := range []struct {
		name     string
		consumer []byte
		producer []byte
		data     []byte
	}{
		{"no data", make([]byte, 8), make([]byte, 8), nil},
		{"no power of two", make([]byte, 8), make([]byte, 8), make([]byte, 48)},
		{"odd", make([]byte, 8), make([]byte, 8), make([]byte, 33)},
		{"short page", make([]byte, 8), make([]byte, 4), make([]byte, 32)},
		{"unaligned", make([]byte, 8), make([]byte, 8), make([]byte, 40)[1:33]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := newRing(tt.consumer, tt.producer, tt.data); !errors.Is(err, errRing) {
				t.Errorf("newRing = %v, want errRing", err)
			}
		})
	}
}

func TestRingAfterClose(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	m.put(payload(8, 1), 0)
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := r.next(); ok || !errors.Is(err, os.ErrClosed) {
		t.Errorf("next = %v, %v; want os.ErrClosed", ok, err)
	}
	r.release(16)
	if m.consumed() != 0 || r.used() != 0 || r.readable() {
		t.Errorf("closed ring: consumer %d, used %d, readable %v", m.consumed(), r.used(), r.readable())
	}
	if err := r.close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// FuzzRing lets next read arbitrary memory between arbitrary positions: it may
// return an error or records, but only what lies before the producer.
func FuzzRing(f *testing.F) {
	m := newMemoryRing(64)
	m.put(payload(5, 1), 0)
	m.put(payload(9, 1), ringDiscard)
	f.Add(m.data[:64], uint64(0), m.produced())
	f.Add(m.data[:64], uint64(1<<63), uint64(1<<63+64))
	f.Add([]byte{0xff, 0xff, 0xff, 0x3f}, uint64(8), uint64(16))
	f.Add([]byte{0, 0, 0, 0x40}, ^uint64(7), uint64(24))
	f.Fuzz(func(t *testing.T, b []byte, consumer, producer uint64) {
		m := newMemoryRing(512)
		m.store(0, b[:min(len(b), 512)])
		binary.NativeEndian.PutUint64(m.consumer, consumer)
		binary.NativeEndian.PutUint64(m.producer, producer)
		r, err := newRing(m.consumer, m.producer, m.data)
		if err != nil {
			return
		}
		for last := r.position(); ; last = r.position() {
			rec, ok, err := r.next()
			if err != nil || !ok {
				return
			}
			if r.position()-last > producer-last || r.position()-last < uint64(len(rec))+ringHeader {
				t.Fatalf("record of %d bytes moved the position from %d to %d, producer %d", len(rec), last, r.position(), producer)
			}
		}
	})
}

// TestWaiter proves on a ring in memory, which has no notifications, that wait
// ends by polling, by wake and by timeout.
func TestWaiter(t *testing.T) {
	m := newMemoryRing(4096)
	r := m.open(t)
	w, err := newWaiter(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("timeout", func(t *testing.T) {
		if err := w.wait(time.Millisecond); err != nil {
			t.Error(err)
		}
	})
	t.Run("past timeout", func(t *testing.T) {
		if err := w.wait(-time.Hour); err != nil {
			t.Error(err)
		}
	})
	t.Run("readable", func(t *testing.T) {
		m.put(payload(8, 1), 0)
		if err := w.wait(time.Hour); err != nil {
			t.Error(err)
		}
		mustNext(t, r)
	})
	t.Run("wake before", func(t *testing.T) {
		w.wake()
		if err := w.wait(time.Hour); err != nil {
			t.Error(err)
		}
	})
	t.Run("wake during", func(t *testing.T) {
		go w.wake()
		if err := w.wait(time.Hour); err != nil {
			t.Error(err)
		}
	})
	t.Run("committed during", func(t *testing.T) {
		busy, _ := m.put(payload(8, 2), ringBusy)
		go atomic.StoreUint32((*uint32)(unsafe.Pointer(&m.data[busy])), 8)
		if err := w.wait(time.Hour); err != nil {
			t.Error(err)
		}
		mustNext(t, r)
	})
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	w.wake() // after close: nothing happens
}

// kernelRing is a ring of the kernel and a program that fills it.
type kernelRing struct {
	m    *ebpf.Map
	prog *ebpf.Program
}

// newKernelRing loads a program that writes one record of 40 bytes each time it
// is run, or reserves and discards one when the packet is longer than 64 bytes.
func newKernelRing(t testing.TB, size int) *kernelRing {
	t.Helper()
	require(t, "root")
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(size)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	count, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { count.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:    ebpf.SocketFilter,
		License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			// r7 = ++count[0]
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, count.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.LoadMem(asm.R7, asm.R0, 0, asm.DWord),
			asm.Add.Imm(asm.R7, 1),
			asm.StoreMem(asm.R0, 0, asm.R7, asm.DWord),
			// a record of five words: the count
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Imm(asm.R2, 40),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnRingbufReserve.Call(),
			asm.JEq.Imm(asm.R0, 0, "lost"),
			asm.Mov.Reg(asm.R1, asm.R0),
			asm.StoreMem(asm.R1, 0, asm.R7, asm.DWord),
			asm.StoreMem(asm.R1, 8, asm.R7, asm.DWord),
			asm.StoreMem(asm.R1, 16, asm.R7, asm.DWord),
			asm.StoreMem(asm.R1, 24, asm.R7, asm.DWord),
			asm.StoreMem(asm.R1, 32, asm.R7, asm.DWord),
			asm.Mov.Imm(asm.R2, 0),
			asm.LoadMem(asm.R3, asm.R6, 0, asm.Word), // skb->len
			asm.JGT.Imm(asm.R3, 64, "discard"),
			asm.FnRingbufSubmit.Call(),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return(),
			asm.FnRingbufDiscard.Call().WithSymbol("discard"),
			asm.Mov.Imm(asm.R0, 2),
			asm.Return(),
			asm.Mov.Imm(asm.R0, 3).WithSymbol("lost"),
			asm.Return(),
			asm.Mov.Imm(asm.R0, 4).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return &kernelRing{m, prog}
}

// The results of a run.
const (
	submitted = 1
	discarded = 2
	lost      = 3
)

func (k *kernelRing) run(t testing.TB, discard bool) uint32 {
	t.Helper()
	n := 64 // with the 14 bytes of the Ethernet header, which do not count
	if discard {
		n = 128
	}
	ret, err := k.prog.Run(&ebpf.RunOptions{Data: make([]byte, n)})
	if err != nil {
		t.Fatal(err)
	}
	return ret
}

func (k *kernelRing) fill(t testing.TB, n int) {
	t.Helper()
	for range n {
		if ret := k.run(t, false); ret != submitted {
			t.Fatalf("program returned %d", ret)
		}
	}
}

func (k *kernelRing) open(t testing.TB) *ring {
	t.Helper()
	r, err := openRing(k.m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func wantCount(t *testing.T, rec []byte, want uint64) {
	t.Helper()
	for i := 0; i < 40; i += 8 {
		if len(rec) != 40 || binary.NativeEndian.Uint64(rec[i:]) != want {
			t.Fatalf("record is %x, want five times %d", rec, want)
		}
	}
}

func TestRootRing(t *testing.T) {
	const size = 1 << 16
	k := newKernelRing(t, size)
	r := k.open(t)
	if r.size() != size {
		t.Errorf("size = %d, want %d", r.size(), size)
	}
	mustBeEmpty(t, r)

	k.fill(t, 50)
	for i := range uint64(50) {
		wantCount(t, mustNext(t, r), i+1)
	}
	k.fill(t, 20)
	second := k.open(t)
	for i := range uint64(70) {
		wantCount(t, mustNext(t, second), i+1)
	}
	for i := range uint64(20) {
		wantCount(t, mustNext(t, r), i+51)
	}
	if want := uint64(70 * 48); r.used() != want || r.position() != want {
		t.Errorf("used = %d, position = %d; want %d", r.used(), r.position(), want)
	}
	if k.run(t, true) != discarded {
		t.Error("no discard")
	}
	mustBeEmpty(t, r)
	if want := uint64(71 * 48); r.position() != want {
		t.Errorf("position after a discarded record = %d, want %d", r.position(), want)
	}

	// Not released, the ring fills up; released, it has room again.
	records := uint64(70)
	for k.run(t, false) == submitted {
		records++
	}
	if full := records * 48; full < size-2*48 {
		t.Errorf("full at %d bytes of %d", full, size)
	}
	for range records - 70 {
		mustNext(t, r)
	}
	mustBeEmpty(t, r)
	if ret := k.run(t, false); ret != lost {
		t.Errorf("a full ring took a record: %d", ret)
	}
	r.release(r.position())
	k.fill(t, 1000)
	for range 1000 {
		mustNext(t, r)
	}
	if err := second.seek(0); !errors.Is(err, errRing) {
		t.Errorf("seek to released records = %v, want errRing", err)
	}
}

// TestRootWaiter shows both ways of waiting on a real ring: by notification when
// it is released, by polling while it is not.
func TestRootWaiter(t *testing.T) {
	k := newKernelRing(t, 1<<16)
	r := k.open(t)
	w, err := newWaiter(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	await := func(want uint64) {
		t.Helper()
		var producer sync.WaitGroup
		defer producer.Wait()
		producer.Go(func() {
			if _, err := k.prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)}); err != nil {
				t.Error(err)
			}
		})
		for r.position() < want*48 {
			if err := w.wait(time.Hour); err != nil {
				t.Fatal(err)
			}
			if rec, ok, err := r.next(); err != nil {
				t.Fatal(err)
			} else if ok {
				wantCount(t, rec, want)
			}
		}
	}
	await(1) // released: by notification
	if !r.unreleased() {
		t.Fatal("the record counts as released")
	}
	await(2) // unreleased: the kernel does not notify
	await(3)
	for range 100 { // on a slow machine one wait has no time for all the steps
		if err := w.wait(2 * pollMax); err != nil {
			t.Fatal(err)
		}
		if w.interval == pollMax {
			break
		}
	}
	if w.interval != pollMax {
		t.Errorf("with an unreleased record, the waiter polls every %v and not every %v", w.interval, pollMax)
	}
	r.release(r.position())
	await(4)
	r.release(r.position())
	// Everything is released: a wait must sleep. poll(2) would return at once if
	// the ring still counted as readable.
	if readable, lagging := w.look(); readable || lagging {
		t.Errorf("look = %v, %v at rest", readable, lagging)
	}
	if _, err := w.poll(w.fds, time.Millisecond); err != nil {
		t.Error(err)
	}
	if w.fds[1].Revents != 0 {
		t.Errorf("a released ring polls as %#x", w.fds[1].Revents)
	}
}

func BenchmarkRingNext(b *testing.B) {
	m := newMemoryRing(1 << 20)
	for {
		if _, ok := m.put(make([]byte, 248), 0); !ok {
			break
		}
	}
	r := m.open(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := r.next(); err != nil {
			b.Fatal(err)
		} else if !ok {
			if err := r.seek(0); err != nil {
				b.Fatal(err)
			}
		}
	}
}
