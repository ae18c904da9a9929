// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// corpus returns the records that tests of the encoder hold: what the buffer stores.
func corpus(t testing.TB) (out [][]byte) {
	t.Helper()
	files, err := filepath.Glob("../sensor/ocsf/testdata/*.json")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d records, %v", len(files), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, bytes.TrimSpace(b))
	}
	return out
}

// TestCompression writes with each codec in turn into one file, and reads all of it by
// every way there is.
func TestCompression(t *testing.T) {
	recs := corpus(t)
	o := small(fastDir(t))
	var want []walked
	var bytesOf []int64
	for _, codec := range []string{"none", "s2", "zstd", ""} {
		o.Compression = codec
		q := open(t, o)
		before := q.Stats().Bytes
		b := q.NewBatch()
		noise := make([]byte, 5000) // does not shrink, and is stored as it is
		for i := range noise {
			noise[i] = byte(rand.Uint32()) //nolint:gosec // G115: noise
		}
		for i, rec := range append([][]byte{noise, nil}, recs...) {
			err := b.End(append(b.Begin(Stream(i%4)), rec...), i%3 == 0)
			if errors.Is(err, ErrBatchFull) {
				if err = q.Append(t.Context(), b); err == nil {
					b = q.NewBatch()
					err = b.End(append(b.Begin(Stream(i%4)), rec...), i%3 == 0)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, walked{uint64(len(want)) + 1, Stream(i % 4), i%3 == 0, string(rec)})
		}
		if err := errors.Join(q.Append(t.Context(), b), q.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		bytesOf = append(bytesOf, q.Stats().Bytes-before)
		name := codec
		if name == "" {
			name = "none"
		}
		if i := q.Info(); i.Compression != name || i.OldestCompression != "none" || i.NewestCompression != name {
			t.Errorf("with %q: %q, oldest %q, newest %q", codec, i.Compression, i.OldestCompression, i.NewestCompression)
		}
		closeQueue(t, q)
	}
	if bytesOf[1] >= bytesOf[0]*3/4 || bytesOf[2] >= bytesOf[1] {
		t.Errorf("none, s2 and zstd take %v bytes", bytesOf)
	}
	compare := func(by string, got []walked) {
		t.Helper()
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(walked{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", by, diff)
		}
	}
	q := open(t, o)
	compare("scan", scanned(t, q))
	for _, n := range []int{7, 1000} { // amid chunks, and many at once
		var got []walked
		var dst []Record
		for seq := uint64(0); seq < uint64(len(want)); {
			var err error
			if dst, err = q.Read(t.Context(), seq, dst[:0], n, n*kib); err != nil {
				t.Fatal(err)
			}
			for _, r := range dst {
				got = append(got, walked{r.Seq, r.Stream, r.Urgent, string(r.Data)})
				seq = r.Seq
			}
		}
		compare("read", got)
	}
	if err := q.Resize(t.Context(), 3*mib/2); err != nil { // copies what is stored
		t.Fatal(err)
	}
	compare("scan of a smaller file", scanned(t, q))
	closeQueue(t, q)
	check(t, q.path)
	_, got, bad := walk(t, o.Dir)
	compare("snapshot", got)
	if len(bad) > 0 {
		t.Errorf("%+v", bad)
	}
	data := read(t, q.path)
	m, err := metaInForce(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	clear(data[m.root*pageSize:][:pageSize])
	plant(t, o.Dir, data)
	_, got, _ = walk(t, o.Dir)
	compare("snapshot of a damaged file", got)
	o.Cap = 3 * mib / 2
	q = open(t, o)
	if r := q.Stats().Recovery; r == nil || !r.Exact || r.Salvaged != uint64(len(want)) {
		t.Errorf("%+v", r)
	}
	compare("salvage", scanned(t, q))
}

func TestCompressionIsChecked(t *testing.T) {
	o := small(t.TempDir())
	o.Compression = "lz4"
	if _, err := Open(t.Context(), o); err == nil {
		t.Error("accepted")
	}
}

// packed makes a chunk of one record that a codec has compressed, whose header says that
// it is raw bytes long.
func packed(codec byte, pay []byte, raw int) []byte {
	v := append(make([]byte, chunkHeader), pay...)
	copy(v, chunkMagic)
	v[8], v[9] = chunkVersion, codec
	binary.LittleEndian.PutUint32(v[12:], 1)
	binary.LittleEndian.PutUint64(v[16:], 1)
	binary.LittleEndian.PutUint64(v[32:], uint64(time.Now().UnixNano()))
	binary.LittleEndian.PutUint32(v[40:], uint32(raw))
	binary.LittleEndian.PutUint32(v[44:], uint32(len(pay)))
	binary.LittleEndian.PutUint32(v[4:], crc32.Checksum(v[8:], castagnoli))
	return v
}

// TestDecompressionIsBounded: no chunk, with whatever right checksum, makes the reader take
// more memory than the largest chunk, or panics it.
func TestDecompressionIsBounded(t *testing.T) {
	const bomb = 256 * mib
	zeros := make([]byte, bomb)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 100)
	putFrame(frame, 96, Events, false)
	for name, v := range map[string][]byte{
		"s2 bomb":                  packed(codecS2, s2.Encode(nil, zeros), bomb),
		"s2 bomb that says less":   packed(codecS2, s2.Encode(nil, zeros), 100),
		"zstd bomb":                packed(codecZstd, z.EncodeAll(zeros, nil), bomb),
		"zstd bomb that says less": packed(codecZstd, z.EncodeAll(zeros, nil), 100),
		"zstd of less":             packed(codecZstd, z.EncodeAll(frame, nil), 200),
		"s2 of less":               packed(codecS2, s2.Encode(nil, frame), 200),
		"nothing":                  packed(codecZstd, nil, 100),
		"unknown codec":            packed(9, frame, 100),
	} {
		b, err := frames(v, 1, 1)
		if !errors.Is(err, errChunk) || len(b) > 0 || cap(b) > maxChunk {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
	for _, v := range [][]byte{packed(codecS2, s2.Encode(nil, frame), 100), packed(codecZstd, z.EncodeAll(frame, nil), 100)} {
		if b, err := frames(v, 1, 1); err != nil || !bytes.Equal(b, frame) {
			t.Errorf("%v, %v", b, err)
		}
	}
}

// BenchmarkCompression packs chunks of the records that the encoder makes.
func BenchmarkCompression(b *testing.B) {
	recs := corpus(b)
	c := chunk{buf: make([]byte, chunkHeader), first: 1}
	rng := rand.New(rand.NewPCG(1, 1))
	for len(c.buf) < 200*kib {
		rec := bytes.Clone(recs[rng.IntN(len(recs))])
		for i, x := range rec { // no two events have the same pids, hashes and times
			if x >= '1' && x <= '9' && rng.IntN(2) == 0 {
				rec[i] = '1' + byte(rng.IntN(9))
			}
		}
		n := len(c.buf)
		c.buf = append(append(c.buf, make([]byte, frameHeader)...), rec...)
		putFrame(c.buf[n:], len(rec), Events, false)
		c.count++
	}
	for _, codec := range []string{"s2", "zstd"} {
		e, err := newEncoder(codec)
		if err != nil {
			b.Fatal(err)
		}
		p := &pending{chunks: []chunk{c}}
		e.pack(p)
		v := bytes.Clone(p.chunks[0].seal(1, time.Now()))
		b.Run("pack/"+codec, func(b *testing.B) {
			b.SetBytes(int64(len(c.buf)))
			for b.Loop() {
				e.release(p)
				e.pack(p)
			}
			b.ReportMetric(float64(len(c.buf))/float64(len(v)), "x")
		})
		b.Run("unpack/"+codec, func(b *testing.B) {
			var d decoder
			dst := make([]byte, 0, maxChunk)
			b.SetBytes(int64(len(c.buf)))
			for b.Loop() {
				if _, err := d.frames(dst, v, c.first, c.count); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
