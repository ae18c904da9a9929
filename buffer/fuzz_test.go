// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// FuzzFrames holds the chunk decoder to: no panic, no read out of bounds, and
// what it accepts is exactly the records that the header announces. The fuzzer
// cannot guess checksums, so they are set right before.
func FuzzFrames(f *testing.F) {
	c := chunk{buf: make([]byte, chunkHeader), first: 7}
	for _, r := range []string{"one", "", "three"} {
		c.buf = append(c.buf, 0, 0, 0, 0)
		putFrame(c.buf[len(c.buf)-frameHeader:], len(r), DecisionsSystem, true)
		c.buf = append(c.buf, r...)
		c.count++
	}
	f.Add(c.seal(3, time.Unix(0, 0)), uint64(7), uint32(3))
	f.Add([]byte(chunkMagic), uint64(0), uint32(0))
	c.buf = append(c.buf, make([]byte, 3*pageSize)...)
	putFrame(c.buf[len(c.buf)-3*pageSize:], 3*pageSize-frameHeader, Events, false)
	c.count++
	for _, codec := range []string{"s2", "zstd"} {
		e, err := newEncoder(codec)
		if err != nil {
			f.Fatal(err)
		}
		p := &pending{chunks: []chunk{c}}
		if e.pack(p); p.chunks[0].packed == nil {
			f.Fatal("not compressed")
		}
		f.Add(p.chunks[0].seal(3, time.Unix(0, 0)), uint64(7), uint32(4))
	}
	f.Fuzz(func(t *testing.T, v []byte, first uint64, count uint32) {
		if _, err := frames(v, first, count); err != nil && !errors.Is(err, errChunk) {
			t.Errorf("error of another kind: %v", err)
		}
		v = bytes.Clone(v)
		if len(v) >= chunkHeader {
			if end := uint64(chunkHeader) + uint64(binary.LittleEndian.Uint32(v[44:])); end <= uint64(len(v)) {
				binary.LittleEndian.PutUint32(v[4:], crc32.Checksum(v[8:end], castagnoli))
			}
		}
		b, err := frames(v, first, count)
		if err != nil {
			return
		}
		var n uint32
		for len(b) > 0 {
			r, rest, ok := nextFrame(b)
			if !ok {
				t.Fatalf("frame %d is out of bounds in an accepted chunk", n)
			}
			if len(r.Data)+len(rest)+frameHeader != len(b) {
				t.Fatalf("frame %d does not add up", n)
			}
			b = rest
			n++
		}
		if n != count {
			t.Errorf("%d records, header says %d", n, count)
		}
	})
}

func FuzzState(f *testing.F) {
	s := &state{epoch: "0123456789abcdef0123", last: 9, doubt: []doubt{{span{1, 2}, true}}, mark: []byte("m")}
	s.losses.add(tr(3, 4))
	for _, given := range [][]uint64{nil, nil, {7, 8}} {
		s.given = given
		b := s.encode(nil)
		f.Add(b[:len(b)-4])
		s.base = 5 // written as another version, and so is given
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
		s, err := decodeState(b)
		if err != nil {
			return
		}
		if again := s.encode(nil); b[0] > 1 && !bytes.Equal(again, b) {
			t.Errorf("decoded and encoded again: %x, was %x", again, b)
		}
	})
}

// structure returns the offsets in data of what preflight and salvage read: the first
// bytes of every page that looks like one, the whole of those with many elements. The
// payload of chunks, nearly all of a file, is of no interest to them.
func structure(data []byte) (at []int) {
	for p := 0; p < len(data); p += pageSize {
		n := leafHeader + chunkHeader + 2*frameHeader
		if binary.LittleEndian.Uint16(data[p+10:]) > 1 {
			n = pageSize
		}
		if binary.LittleEndian.Uint16(data[p+8:]) == 0 {
			continue
		}
		for i := range n {
			at = append(at, p+i)
		}
	}
	return at
}

// fuzzed is a file with damage in two places, and its checksums right again, which
// the fuzzer cannot guess.
type fuzzed struct {
	base [2][]byte
	at   [2][]int
}

func newFuzzed(f *testing.F) *fuzzed {
	z := &fuzzed{base: [2][]byte{filled(f, true), filled(f, false)}}
	for i := range z.at {
		z.at[i] = structure(z.base[i])
	}
	return z
}

func (z *fuzzed) file(which uint8, at1 uint32, b1 []byte, at2 uint32, b2 []byte) []byte {
	data := slices.Clone(z.base[which%2])
	for _, p := range []struct {
		at uint32
		b  []byte
	}{{at1, b1}, {at2, b2}} {
		at := z.at[which%2][int(p.at)%len(z.at[which%2])]
		copy(data[at:], p.b)
		if c := data[at/pageSize*pageSize+leafHeader:]; string(c[:4]) == chunkMagic {
			if end := uint64(chunkHeader) + uint64(binary.LittleEndian.Uint32(c[44:])); end <= uint64(len(c)) {
				binary.LittleEndian.PutUint32(c[4:], crc32.Checksum(c[8:end], castagnoli))
			}
		}
	}
	for i := range 2 {
		m := data[i*pageSize+pageHeader:]
		h := fnv.New64a()
		h.Write(m[:56])
		binary.LittleEndian.PutUint64(m[56:], h.Sum64())
	}
	return data
}

// FuzzPreflight holds preflight to: no panic, no endless walk, and what it accepts
// bbolt opens without a panic. What either refuses is salvaged: there is a queue that
// works and accounts for itself whatever the file was.
func FuzzPreflight(f *testing.F) {
	z := newFuzzed(f)
	f.Add(uint8(0), uint32(0), []byte{1}, uint32(0), []byte{})
	f.Add(uint8(1), uint32(2*pageSize+8), []byte{4}, uint32(pageSize+40), []byte{255})
	f.Fuzz(func(t *testing.T, which uint8, at1 uint32, b1 []byte, at2 uint32, b2 []byte) {
		data := z.file(which, at1, b1, at2, b2)
		_, refused := preflight(bytes.NewReader(data), int64(len(data)), 0)
		dir := fastDir(t)
		plant(t, dir, data)
		q, err := Open(t.Context(), small(dir)) // a panic in bbolt's goroutine would end us
		if err != nil {
			t.Fatal(err)
		}
		if st := q.Stats(); invariant(st) != nil || refused != nil && st.Recovery == nil {
			t.Errorf("%v: %+v", refused, st)
		}
		add(t, q, "works")
		closeQueue(t, q)
	})
}

// FuzzSalvage holds what is done with a file that preflight refuses to: no panic, and
// whatever it and the sidecar say, the state that comes out accounts for the chunks
// that are taken over, which are in order and each there once.
func FuzzSalvage(f *testing.F) {
	z := newFuzzed(f)
	var states [2][]byte
	for i, b := range z.base {
		s, _, err := treeState(bytes.NewReader(b), int64(len(b)), 0)
		if err != nil {
			f.Fatal(err)
		}
		states[i] = s.encode(nil)
		states[i] = states[i][:len(states[i])-4]
		f.Add(uint8(i), uint32(17), []byte{1}, uint32(3000), []byte{0, 0}, uint32(0), states[i], true)
		f.Add(uint8(i), uint32(leafHeader+30), []byte{9}, uint32(3000), []byte{}, uint32(len(b)/2), states[i], false)
	}
	f.Fuzz(func(t *testing.T, which uint8, at1 uint32, b1 []byte, at2 uint32, b2 []byte, cut uint32, side []byte, exact bool) {
		data := z.file(which, at1, b1, at2, b2)
		data = data[:len(data)-int(cut)%len(data)]
		var w witness
		if s, err := decodeState(binary.LittleEndian.AppendUint32(side, crc32.Checksum(side, castagnoli))); err == nil {
			w = witness{state: s, exact: exact}
		}
		in, size := bytes.NewReader(data), int64(len(data))
		finds, err := scan(t.Context(), in, size)
		if err != nil {
			t.Fatal(err)
		}
		s, known := newest(in, size, w)
		s, keep := account(s, known, finds, time.Unix(0, 1))
		for _, limit := range []uint64{1 << 40, 100, 0} {
			keep = fit(s, keep, limit)
			at, records := s.head, uint64(0)
			for _, k := range keep {
				if k.first < at || k.last() > s.last {
					t.Fatalf("chunk of %d at %d is out of order, or outside %d to %d", k.count, k.first, s.head, s.last)
				}
				at, records = k.last()+1, records+uint64(k.count)
			}
			if s.gone()+records != s.last {
				t.Fatalf("accounts for %d and %d live of %d", s.gone(), records, s.last)
			}
		}
	})
}

// FuzzSidecar holds the reader of the sidecar to: no panic, and what it accepts is
// what was written, in either slot.
func FuzzSidecar(f *testing.F) {
	s := &state{epoch: "0123456789abcdef0123", gen: 3, last: 9, lease: 7, doubt: []doubt{{span{1, 2}, true}}, mark: []byte("m")}
	s.losses.add(tr(3, 4))
	b := append([]byte(sidecarMagic), make([]byte, sidecarHeader-4)...)
	f.Add(s.encode(b), uint32(0), uint32(0))
	f.Add([]byte(sidecarMagic), uint32(1<<31), uint32(2))
	f.Fuzz(func(t *testing.T, b []byte, length, at uint32) {
		parseSlot(b)
		if b = bytes.Clone(b); len(b) >= sidecarHeader+4 {
			n := uint32(len(b) - sidecarHeader)
			if length != 0 { // of the fuzzer's own
				n = length
			}
			binary.LittleEndian.PutUint32(b[8:], n)
			if end := sidecarHeader + uint64(n); n >= 4 && end <= uint64(len(b)) {
				binary.LittleEndian.PutUint32(b[end-4:], crc32.Checksum(b[sidecarHeader:end-4], castagnoli))
				binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:end], castagnoli))
			}
		}
		got, boot, ok := parseSlot(b)
		if !ok {
			return
		}
		dir := fastDir(t)
		file := make([]byte, sidecarSlot*int(at%4)) // the fourth slot is none
		if err := os.WriteFile(filepath.Join(dir, sidecarName), append(file, b...), 0o600); err != nil {
			t.Fatal(err)
		}
		w := readSidecar(dir, boot)
		if len(b) > sidecarSlot {
			return // runs into the other slot
		}
		if (w.state == nil) != (at%4 == sidecarSlots) {
			t.Fatalf("slot %d: read %v", at%4, w.state)
		}
		if w.state != nil && (w.exact == (boot == [16]byte{}) || !bytes.Equal(w.encode(nil), got.encode(nil))) {
			t.Errorf("read %+v, exact %v; written %+v in boot %x", w.state, w.exact, got, boot)
		}
	})
}

// TestFramesOfOlderVersions pins what is on disk: frames of the version that knew
// two streams, and where those of later ones go.
func TestFramesOfOlderVersions(t *testing.T) {
	for raw, want := range map[string]Record{
		"\x02\x00\x00\x00ab": {Stream: Events, Data: []byte("ab")},
		"\x02\x00\x00\x81ab": {Stream: DecisionsSystem, Urgent: true, Data: []byte("ab")},
		"\x00\x00\x00\x02":   {Stream: DecisionsAgents, Data: []byte{}},
		"\x01\x00\x00\x83c":  {Stream: DecisionsApprovals, Urgent: true, Data: []byte("c")},
		"\x01\x00\x00\x0fd":  {Stream: 15, Data: []byte("d")},
	} {
		got, rest, ok := nextFrame([]byte(raw))
		if d := cmp.Diff(want, got); d != "" || len(rest) > 0 || !ok {
			t.Errorf("%q: %v, rest %q (-want +got):\n%s", raw, ok, rest, d)
		}
		b := make([]byte, frameHeader)
		putFrame(b, len(want.Data), want.Stream, want.Urgent)
		if string(b) != raw[:frameHeader] {
			t.Errorf("%q is written as %q", raw[:frameHeader], b)
		}
	}
}

// FuzzClosed holds what is trusted of a file that was closed to: no panic, and a queue that
// works until nothing of the file is left.
func FuzzClosed(f *testing.F) {
	z := newFuzzed(f)
	m, err := metaInForce(bytes.NewReader(z.base[0]), int64(len(z.base[0])))
	if err == nil {
		err = m.walk(bytes.NewReader(z.base[0]), nil)
	}
	if err != nil {
		f.Fatal(err)
	}
	known, err := stateAt(bytes.NewReader(z.base[0]), int64(len(z.base[0])), m)
	if err != nil {
		f.Fatal(err)
	}
	// The places in front of the chunks, where damage is not looked for.
	z.at[0] = z.at[0][:0]
	for _, e := range m.chunks.live() {
		for i := range leafHeader {
			z.at[0] = append(z.at[0], int(e.root)*pageSize+i)
		}
	}
	f.Add(uint32(0), []byte{1}, uint32(8), []byte{0, 0, 0, 0})
	f.Add(uint32(12), []byte{255, 255, 255, 127}, uint32(leafHeader+16), []byte{1})
	f.Fuzz(func(t *testing.T, at1 uint32, b1 []byte, at2 uint32, b2 []byte) {
		data := z.file(0, at1, b1[:min(len(b1), 64)], at2, b2[:min(len(b2), 64)])
		dir := fastDir(t)
		plant(t, dir, data)
		c, err := openSidecar(dir, witness{}, bootID())
		if err == nil {
			err = c.write(known, time.Now())
			c.vouch(m.txid)
			err = errors.Join(err, c.close())
		}
		if err != nil {
			t.Fatal(err)
		}
		q, err := Open(t.Context(), small(dir)) // a panic in bbolt's goroutine would end us
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(invariant(q.Stats()), overrun(t.Context(), q)); err != nil {
			t.Error(err)
		}
		closeQueue(t, q)
		check(t, q.path)
	})
}
