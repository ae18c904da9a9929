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
//	 9  codec     0 = as is
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
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errChunk is what a chunk that fails verification matches.
var errChunk = errors.New("damaged chunk")

// chunk is one chunk in memory: buf starts with room for the header.
type chunk struct {
	buf   []byte
	first uint64
	count uint32
}

func (c *chunk) last() uint64 { return c.first + uint64(c.count) - 1 }

// pages is the number of pages that the chunk takes on disk.
func (c *chunk) pages() uint32 { return pagesFor(max(len(c.buf), minChunk)) }

func pagesFor(value int) uint32 { return uint32((leafHeader + value + pageSize - 1) / pageSize) }

// seal completes the header and returns the value to store.
func (c *chunk) seal(head uint64, now time.Time) []byte {
	b := c.buf
	pay := uint32(len(b) - chunkHeader)
	copy(b, chunkMagic)
	b[8], b[9], b[10], b[11] = chunkVersion, 0, 0, 0
	binary.LittleEndian.PutUint32(b[12:], c.count)
	binary.LittleEndian.PutUint64(b[16:], c.first)
	binary.LittleEndian.PutUint64(b[24:], head)
	binary.LittleEndian.PutUint64(b[32:], uint64(now.UnixNano()))
	binary.LittleEndian.PutUint32(b[40:], pay)
	binary.LittleEndian.PutUint32(b[44:], pay)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	if len(b) < minChunk {
		b = append(b, make([]byte, minChunk-len(b))...)
	}
	return b
}

// frames verifies a stored chunk and returns its frames. The result aliases v.
func frames(v []byte, first uint64, count uint32) ([]byte, error) {
	if len(v) < chunkHeader || string(v[:4]) != chunkMagic {
		return nil, fmt.Errorf("%w: no header", errChunk)
	}
	pay := binary.LittleEndian.Uint32(v[44:])
	if uint64(pay) > uint64(len(v)-chunkHeader) {
		return nil, fmt.Errorf("%w: payload of %d bytes in %d", errChunk, pay, len(v))
	}
	v = v[:chunkHeader+int(pay)]
	if got, want := crc32.Checksum(v[8:], castagnoli), binary.LittleEndian.Uint32(v[4:]); got != want {
		return nil, fmt.Errorf("%w: checksum %08x, want %08x", errChunk, got, want)
	}
	if v[8] != chunkVersion || v[9] != 0 {
		return nil, fmt.Errorf("%w: version %d codec %d", errChunk, v[8], v[9])
	}
	if f, n := binary.LittleEndian.Uint64(v[16:]), binary.LittleEndian.Uint32(v[12:]); f != first || n != count {
		return nil, fmt.Errorf("%w: holds %d records from seq %d, want %d from %d", errChunk, n, f, count, first)
	}
	// The checksum says the bytes are ours; the walk says that the frames
	// add up, so that the reader needs no bounds checks of its own.
	b := v[chunkHeader:]
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
	return v[chunkHeader:], nil
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

// leafValue finds the value in the first page of a chunk's leaf, as bbolt lays
// it out: page header (id, flags, count, overflow), one element, key "d".
func leafValue(p []byte, root uint64, pages uint32) ([]byte, error) {
	if len(p) < leafHeader {
		return nil, fmt.Errorf("%w: page of %d bytes", errChunk, len(p))
	}
	le := binary.LittleEndian
	if le.Uint64(p) != root || le.Uint16(p[8:]) != leafPage || le.Uint16(p[10:]) != 1 || le.Uint32(p[12:]) != pages-1 {
		return nil, fmt.Errorf("%w: page header", errChunk)
	}
	flags, pos, ksize, vsize := le.Uint32(p[16:]), le.Uint32(p[20:]), le.Uint32(p[24:]), le.Uint32(p[28:])
	if flags != 0 || pos != 16 || ksize != 1 || p[32] != chunkKey[0] || uint64(vsize) > uint64(len(p)-leafHeader) {
		return nil, fmt.Errorf("%w: page element", errChunk)
	}
	return p[leafHeader : leafHeader+int(vsize)], nil
}
