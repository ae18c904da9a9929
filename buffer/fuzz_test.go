// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/fnv"
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
	f.Add(s.encode(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
		s, err := decodeState(b)
		if err != nil {
			return
		}
		if again := s.encode(nil); b[0] == stateVersion && !bytes.Equal(again, b) {
			t.Errorf("decoded and encoded again: %x, was %x", again, b)
		}
	})
}

// FuzzPreflight damages a real file at up to three places, repairs the meta's
// checksums, and holds preflight to: no panic, no endless walk, and what it
// accepts bbolt opens without a panic.
func FuzzPreflight(f *testing.F) {
	var base [2][]byte
	base[0], base[1] = filled(f, true), filled(f, false)
	f.Add(uint8(0), uint32(0), []byte{1}, uint32(0), []byte{})
	f.Add(uint8(1), uint32(2*pageSize+8), []byte{4}, uint32(pageSize+40), []byte{255})
	f.Fuzz(func(t *testing.T, which uint8, at1 uint32, b1 []byte, at2 uint32, b2 []byte) {
		data := slices.Clone(base[which%2])
		for _, p := range []struct {
			at uint32
			b  []byte
		}{{at1, b1}, {at2, b2}} {
			copy(data[int(p.at)%len(data):], p.b)
		}
		for i := range 2 {
			m := data[i*pageSize+pageHeader:]
			h := fnv.New64a()
			h.Write(m[:56])
			binary.LittleEndian.PutUint64(m[56:], h.Sum64())
		}
		if _, err := preflight(bytes.NewReader(data), int64(len(data))); err != nil {
			return
		}
		dir := t.TempDir()
		plant(t, dir, data)
		q, err := Open(t.Context(), small(dir))
		if err != nil {
			return // refused with an error; a panic in bbolt's goroutine would end us
		}
		closeQueue(t, q)
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
