// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// A chunk is the unit on disk: a header and the frames of consecutive records.
// It is the value of the one key "d" in the chunk's own bucket, so that it has
// its own run of pages which is never rewritten.
//
//	 0  magic     "EDRc"
//	 4  crc32c    of everything behind it, padding excluded
//	 8  version   1
//	 9  codec     0 = as is, 1 = s2, 2 = zstd (codec.go)
//	10  reserved  0
//	12  count     records
//	16  first     seq of the first record
//	24  head      oldest seq in the queue when this was written; lets a salvage
//	              discard old chunks that still lie in free pages
//	32  time      when it was written, ns since the Unix epoch
//	40  rawLen    length of the frames before the codec
//	44  payLen    length of the frames as stored
//	48  frames
//
// A frame is a little-endian word, length in the low 24 bits, stream in the
// next 4, the urgent flag in the top bit; then the record. The length has a
// fixed width so that a record can be encoded behind it in place.
const (
	chunkMagic   = "EDRc"
	chunkVersion = 1
	chunkHeader  = 48
	frameHeader  = 4
	maxFrame     = 1<<24 - 1

	// A bucket whose content is below a quarter of a page is stored inside
	// its parent's page by bbolt; such a chunk would have no page of its own
	// to be read from.
	minChunk = pageSize/4 + 64

	// What a leaf page with one element and a key of one byte puts in front
	// of the value: page header, element, key.
	leafHeader = 16 + 16 + 1

	// No chunk is larger: the largest record alone, or CommitBytes of others.
	maxChunk      = chunkHeader + frameHeader + maxFrame
	maxChunkPages = (leafHeader + maxChunk + pageSize - 1) / pageSize
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errChunk is what a chunk that fails verification matches.
var errChunk = errors.New("damaged chunk")

// chunk is one chunk in memory: buf starts with room for the header.
type chunk struct {
	buf   []byte
	first uint64
	count uint32

	packed []byte // the same compressed, nil when it is stored as it is
	codec  byte   // of packed
}

// stored is what goes to disk, padding aside.
func (c *chunk) stored() []byte {
	if c.packed != nil {
		return c.packed
	}
	return c.buf
}

func (c *chunk) last() uint64 { return c.first + uint64(c.count) - 1 }

// pages is the number of pages that the chunk takes on disk.
func (c *chunk) pages() uint32 { return pagesFor(max(len(c.stored()), minChunk)) }

func pagesFor(value int) uint32 { return uint32((leafHeader + value + pageSize - 1) / pageSize) }

// seal completes the header and returns the value to store.
func (c *chunk) seal(head uint64, now time.Time) []byte {
	b := c.stored()
	raw, pay := uint32(len(c.buf)-chunkHeader), uint32(len(b)-chunkHeader)
	copy(b, chunkMagic)
	b[8], b[9], b[10], b[11] = chunkVersion, c.codec, 0, 0
	binary.LittleEndian.PutUint32(b[12:], c.count)
	binary.LittleEndian.PutUint64(b[16:], c.first)
	binary.LittleEndian.PutUint64(b[24:], head)
	binary.LittleEndian.PutUint64(b[32:], uint64(now.UnixNano()))
	binary.LittleEndian.PutUint32(b[40:], raw)
	binary.LittleEndian.PutUint32(b[44:], pay)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	return pad(b)
}

// restamp gives the chunk in v, padding excluded, another first seq and head, and returns
// the value to store.
func restamp(v []byte, first, head uint64) []byte {
	binary.LittleEndian.PutUint64(v[16:], first)
	binary.LittleEndian.PutUint64(v[24:], head)
	binary.LittleEndian.PutUint32(v[4:], crc32.Checksum(v[8:], castagnoli))
	return pad(v)
}

func pad(v []byte) []byte {
	if len(v) < minChunk {
		v = append(v, make([]byte, minChunk-len(v))...)
	}
	return v
}

// holds says whether v begins with the chunk of count records from first.
func holds(v []byte, first uint64, count uint32) error {
	if len(v) < chunkHeader || string(v[:4]) != chunkMagic {
		return fmt.Errorf("%w: no header", errChunk)
	}
	pay := binary.LittleEndian.Uint32(v[44:])
	if uint64(pay) > uint64(len(v)-chunkHeader) {
		return fmt.Errorf("%w: payload of %d bytes in %d", errChunk, pay, len(v))
	}
	if got, want := crc32.Checksum(v[8:chunkHeader+int(pay)], castagnoli), binary.LittleEndian.Uint32(v[4:]); got != want {
		return fmt.Errorf("%w: checksum %08x, want %08x", errChunk, got, want)
	}
	if f, n := binary.LittleEndian.Uint64(v[16:]), binary.LittleEndian.Uint32(v[12:]); f != first || n != count {
		return fmt.Errorf("%w: holds %d records from seq %d, want %d from %d", errChunk, n, f, count, first)
	}
	return nil
}

// frames verifies a stored chunk and returns its frames. The result aliases v, or is new
// where they are compressed.
func frames(v []byte, first uint64, count uint32) ([]byte, error) {
	return new(decoder).frames(nil, v, first, count)
}

// frames does the same with memory behind dst for what is compressed.
func (d *decoder) frames(dst, v []byte, first uint64, count uint32) ([]byte, error) {
	if err := holds(v, first, count); err != nil {
		return nil, err
	}
	v = v[:chunkHeader+int(binary.LittleEndian.Uint32(v[44:]))]
	if v[8] != chunkVersion {
		return nil, fmt.Errorf("%w: version %d", errChunk, v[8])
	}
	all := v[chunkHeader:]
	if v[9] != codecNone {
		var err error
		if all, err = d.unpack(dst, v); err != nil {
			return nil, err
		}
	}
	// The checksum says the bytes are ours; the walk says that the frames
	// add up, so that the reader needs no bounds checks of its own.
	b := all
	for range count {
		_, rest, ok := nextFrame(b)
		if !ok {
			return nil, fmt.Errorf("%w: frame out of bounds", errChunk)
		}
		b = rest
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%w: %d bytes behind the last frame", errChunk, len(b))
	}
	return all, nil
}

// nextFrame splits the first frame off b. The record's Seq is not set.
func nextFrame(b []byte) (r Record, rest []byte, ok bool) {
	if len(b) < frameHeader {
		return Record{}, nil, false
	}
	w := binary.LittleEndian.Uint32(b)
	n := int(w & maxFrame)
	if n > len(b)-frameHeader {
		return Record{}, nil, false
	}
	end := frameHeader + n
	return Record{Stream: Stream(w >> 24 & 0xf), Urgent: w>>31 != 0, Data: b[frameHeader:end:end]}, b[end:], true
}

func putFrame(b []byte, n int, s Stream, urgent bool) {
	w := uint32(n) | uint32(s&0xf)<<24
	if urgent {
		w |= 1 << 31
	}
	binary.LittleEndian.PutUint32(b, w)
}

// leafSize is the size of the value of chunk e, whose leaf page begins with p as bbolt lays
// it out: page header (id, flags, count, overflow), one element, key "d".
func leafSize(p []byte, e *entry) (int, error) {
	if len(p) < leafHeader {
		return 0, fmt.Errorf("%w: page of %d bytes", errChunk, len(p))
	}
	le := binary.LittleEndian
	if le.Uint64(p) != e.root || le.Uint16(p[8:]) != leafPage || le.Uint16(p[10:]) != 1 || le.Uint32(p[12:]) != e.pages-1 {
		return 0, fmt.Errorf("%w: page header", errChunk)
	}
	flags, pos, ksize, vsize := le.Uint32(p[16:]), le.Uint32(p[20:]), le.Uint32(p[24:]), le.Uint32(p[28:])
	if flags != 0 || pos != 16 || ksize != 1 || p[32] != chunkKey[0] || uint64(vsize) > uint64(e.pages)*pageSize-leafHeader {
		return 0, fmt.Errorf("%w: page element", errChunk)
	}
	return int(vsize), nil
}

// putLeaf writes to p what leafSize wants, for a value as large as the pages of e.
func putLeaf(p []byte, e *entry) {
	le := binary.LittleEndian
	le.PutUint64(p, e.root)
	le.PutUint16(p[8:], leafPage)
	le.PutUint16(p[10:], 1)
	le.PutUint32(p[12:], e.pages-1)
	le.PutUint32(p[16:], 0)
	le.PutUint32(p[20:], 16)
	le.PutUint32(p[24:], 1)
	le.PutUint32(p[28:], e.pages*pageSize-leafHeader)
	p[32] = chunkKey[0]
}
