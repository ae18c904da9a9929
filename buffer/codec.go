// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// The codecs of a chunk's frames. Their numbers are on disk, so they never change.
const (
	codecNone = 0
	codecS2   = 1
	codecZstd = 2
)

// codecNames are those of Options.Compression.
var codecNames = [...]string{codecNone: "none", codecS2: "s2", codecZstd: "zstd"}

// zstdWindow bounds the memory of an encoder; a chunk is rarely larger.
const zstdWindow = 256 * kib

// codecOf returns the number of Options.Compression.
func codecOf(name string) (byte, error) {
	if name == "" {
		return codecNone, nil
	}
	for i, n := range codecNames {
		if n == name {
			return byte(i), nil
		}
	}
	return 0, fmt.Errorf("compression %q: must be none, s2 or zstd", name)
}

// encoder compresses chunks; it belongs to the writer.
type encoder struct {
	codec byte
	zstd  *zstd.Encoder
	free  [][]byte
}

func newEncoder(name string) (*encoder, error) {
	codec, err := codecOf(name)
	if err != nil {
		return nil, err
	}
	e := &encoder{codec: codec}
	if codec == codecZstd {
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(zstdWindow)) // a chunk has a checksum
	}
	return e, err
}

// pack compresses what p holds. A chunk that would take as many pages as before stays as
// it is.
func (e *encoder) pack(p *pending) {
	if e.codec == codecNone {
		return
	}
	for i := range p.chunks {
		c := &p.chunks[i]
		raw := c.buf[chunkHeader:]
		var out []byte
		if n := len(e.free); n > 0 {
			out, e.free = e.free[n-1], e.free[:n-1]
		}
		out = append(out[:0], c.buf[:chunkHeader]...)
		if e.codec == codecS2 {
			if n := chunkHeader + s2.MaxEncodedLen(len(raw)); cap(out) < n {
				out = append(make([]byte, 0, n), out...)
			}
			out = out[:chunkHeader+len(s2.Encode(out[chunkHeader:cap(out)], raw))]
		} else {
			out = e.zstd.EncodeAll(raw, out)
		}
		if pagesFor(max(len(out), minChunk)) < c.pages() {
			c.packed, c.codec = out, e.codec
		} else {
			e.reuse(out)
		}
	}
}

// release takes back the memory of a committed p.
func (e *encoder) release(p *pending) {
	for i := range p.chunks {
		if c := &p.chunks[i]; c.packed != nil {
			e.reuse(c.packed)
			c.packed, c.codec = nil, codecNone
		}
	}
}

func (e *encoder) reuse(b []byte) {
	if cap(b) <= maxRecycle && len(e.free) < 4 {
		e.free = append(e.free, b)
	}
}

// decoder restores frames. Its zero value is ready, and any number of goroutines may use it.
type decoder struct {
	once sync.Once
	zstd *zstd.Decoder
	err  error
}

// unpack appends to dst the frames of the chunk v, whose checksum is right. However little
// it is that says so, no more than maxChunk comes out of it.
func (d *decoder) unpack(dst, v []byte) ([]byte, error) {
	pay, raw := v[chunkHeader:], int(binary.LittleEndian.Uint32(v[40:]))
	if raw > maxChunk {
		return nil, fmt.Errorf("%w: frames of %d bytes", errChunk, raw)
	}
	n := len(dst)
	if cap(dst)-n < raw {
		dst = append(make([]byte, 0, n+raw), dst...)
	}
	switch v[9] {
	case codecS2:
		if got, err := s2.DecodedLen(pay); err != nil || got != raw {
			return nil, fmt.Errorf("%w: s2 of %d bytes, want %d", errChunk, got, raw)
		}
		if _, err := s2.Decode(dst[n:n+raw], pay); err != nil {
			return nil, fmt.Errorf("%w: %w", errChunk, err)
		}
		return dst[n : n+raw], nil
	case codecZstd:
		d.once.Do(func() {
			d.zstd, d.err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxChunk),
				zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true))
		})
		if d.err != nil {
			return nil, d.err
		}
		out, err := d.zstd.DecodeAll(pay, dst[n:n:n+raw])
		if err != nil || len(out) != raw {
			return nil, fmt.Errorf("%w: zstd of %d bytes, want %d: %v", errChunk, len(out), raw, err) //nolint:errorlint // one identity is enough
		}
		return out, nil
	}
	return nil, fmt.Errorf("%w: codec %d", errChunk, v[9])
}
