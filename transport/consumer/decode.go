// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"github.com/klauspost/compress/zstd"
	"github.com/redis/go-redis/v9"
)

// Record is one event or decision of a sensor.
type Record struct {
	Stream string // key
	Entry  string // id of the entry in the stream; records of one batch share it
	// Agent, Epoch and Seq are who stored it and its place in what that agent
	// stores: together they name the record for ever. They are empty in an entry
	// of another producer, which is one with data and without agent.
	Agent, Epoch string
	Seq          uint64
	Data         []byte // JSON; valid until the next Decode
}

// Foreign reports whether the record is not a sensor's.
func (r *Record) Foreign() bool { return r.Agent == "" }

// Limits bound what one entry may cost. Zero values mean the defaults.
type Limits struct {
	Bytes   int // of an entry's data, unpacked; default 16 MiB
	Records int // in an entry; default 65536
}

// EntryError is an entry that is not one of a sensor, and not of a producer that
// has nothing to do with it either.
type EntryError struct {
	Stream, Entry string
	Err           error
}

func (e *EntryError) Error() string {
	return fmt.Sprintf("entry %s of %q: %v", e.Entry, e.Stream, e.Err)
}

func (e *EntryError) Unwrap() error { return e.Err }

// The defects of an entry.
var (
	// ErrField is returned when a field is missing or is not what it must be.
	ErrField = errors.New("malformed field")
	// ErrTooLarge is returned when an entry exceeds the [Limits].
	ErrTooLarge = errors.New("entry too large")
	// ErrPayload is returned when the data cannot be unpacked, or does not hold
	// as many records as the entry says.
	ErrPayload = errors.New("malformed payload")
	// ErrGone is returned for an entry that had been delivered to the group, was
	// not acknowledged, and has been deleted since.
	ErrGone = errors.New("deleted before it was acknowledged")
)

const (
	epochLen = 20
	maxSeq   = 1 << 53 // the server's script counts in doubles
	maxAgent = 256     // bytes
)

// Decoder decodes entries of both encodings. It is not safe for concurrent use.
type Decoder struct {
	limits Limits
	zstd   *zstd.Decoder
	plain  []byte
	json   []byte // the data of a json entry
}

// NewDecoder returns a Decoder that keeps to l.
func NewDecoder(l Limits) (*Decoder, error) {
	if l.Bytes == 0 {
		l.Bytes = 16 << 20
	}
	if l.Records == 0 {
		l.Records = 1 << 16
	}
	if l.Bytes < 1 || l.Records < 1 {
		return nil, fmt.Errorf("limits of %d bytes and %d records: both must be positive", l.Bytes, l.Records)
	}
	// One at a time and without read-ahead: no goroutines, nothing to close.
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(l.Bytes)), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	return &Decoder{limits: l, zstd: z}, nil
}

// Decode appends the records of an entry to dst, in the order of their seqs. The
// error is an [*EntryError], and then dst is returned as it was.
func (d *Decoder) Decode(stream string, m redis.XMessage, dst []Record) ([]Record, error) {
	out, err := d.decode(stream, m, dst)
	if err != nil {
		return dst, &EntryError{stream, m.ID, err}
	}
	return out, nil
}

func (d *Decoder) decode(stream string, m redis.XMessage, dst []Record) ([]Record, error) {
	data, found := m.Values["data"].(string)
	if !found {
		return nil, field("data", "is missing")
	}
	r := Record{Stream: stream, Entry: m.ID}
	codec, packed := m.Values["codec"].(string)
	if _, ours := m.Values["agent"]; !ours && !packed {
		r.Data = d.text(data)
		return append(dst, r), d.fits(len(data))
	}
	if err := d.identify(m.Values, &r); err != nil {
		return nil, err
	}
	if !packed {
		r.Data = d.text(data)
		return append(dst, r), d.fits(len(data))
	}
	if codec != "z" {
		return nil, field("codec", "is not one of edr/1")
	}
	return d.unpack(m.Values, data, r, dst)
}

func (d *Decoder) fits(n int) error {
	if n > d.limits.Bytes {
		return fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, n, d.limits.Bytes)
	}
	return nil
}

func (d *Decoder) text(s string) []byte {
	if len(s) > d.limits.Bytes {
		return nil // refused by fits
	}
	d.json = append(d.json[:0], s...)
	return d.json
}

// identify reads agent, epoch and seq.
func (d *Decoder) identify(v map[string]any, r *Record) error {
	r.Agent, _ = v["agent"].(string)
	if r.Agent == "" || len(r.Agent) > maxAgent {
		return field("agent", "is empty or longer than 256 bytes")
	}
	r.Epoch, _ = v["epoch"].(string)
	if !isEpoch(r.Epoch) {
		return field("epoch", "is not 20 hex digits")
	}
	text, _ := v["seq"].(string)
	seq, good := number(text, maxSeq)
	if !good || seq == 0 {
		return field("seq", "is not a number from 1 to 2^53")
	}
	r.Seq = seq
	return nil
}

// unpack appends the records of a batch whose first is r.
func (d *Decoder) unpack(v map[string]any, data string, r Record, dst []Record) ([]Record, error) {
	text, _ := v["n"].(string)
	n, good := number(text, maxSeq)
	if !good || n == 0 || n > maxSeq-r.Seq+1 {
		return nil, field("n", "is not a number of records")
	}
	if n > uint64(d.limits.Records) {
		return nil, fmt.Errorf("%w: %d records, the limit is %d", ErrTooLarge, n, d.limits.Records)
	}
	if err := d.fits(len(data)); err != nil { // packed, it is never larger than what it holds may be
		return nil, err
	}
	plain, err := d.zstd.DecodeAll([]byte(data), d.plain[:0])
	switch {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded), errors.Is(err, zstd.ErrWindowSizeExceeded):
		return nil, fmt.Errorf("%w: %w", ErrTooLarge, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrPayload, err)
	}
	d.plain = plain
	if n == 1 { // the only one may hold line breaks
		r.Data = plain
		return append(dst, r), nil
	}
	if lines := uint64(bytes.Count(plain, []byte{'\n'})) + 1; lines != n {
		return nil, fmt.Errorf("%w: %d records instead of %d", ErrPayload, lines, n)
	}
	for line := range bytes.SplitSeq(plain, []byte{'\n'}) {
		r.Data = line
		dst = append(dst, r)
		r.Seq++
	}
	return dst, nil
}

// field says what is wrong with a field, without repeating what is in it.
func field(name, what string) error { return fmt.Errorf("%w: %s %s", ErrField, name, what) }

// number parses a decimal number in its one spelling.
func number(s string, limit uint64) (uint64, bool) {
	if s == "" || s[0] < '0' || s[0] > '9' || (s[0] == '0' && len(s) > 1) {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && n <= limit
}

func isEpoch(s string) bool {
	if len(s) != epochLen {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
