// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A running sensor changes the tree with every commit; a snapshot is taken in the gap
// between two, which this many tries at this distance find even under load.
const (
	inspectTries = 200
	inspectPause = 2 * time.Millisecond
)

// errReplaced is what a chunk matches whose pages a running sensor has used again.
var errReplaced = errors.New("has left the buffer since")

// Snapshot is what a buffer file held when [Inspect] looked. It is read with plain reads:
// nothing is changed, locked or mapped, bbolt takes no part, and no damage can harm the
// reader.
//
// A sensor may use the file meanwhile. The snapshot is then that of one transaction, and
// each chunk that Walk shows without an error is one of it, whole, as its checksum and
// seq prove; a chunk that the sensor has dropped since is marked as that. A transaction is
// seen as soon as it is written, a moment before it is durable. What acknowledgements are
// not yet stored, at most a second of them, and what waits in memory, only the sensor knows.
type Snapshot struct {
	Path string
	Size int64 // of the file
	Disk int64 // space that it takes; less than Size where it is sparse
	// Stats as [Queue.Stats] has them, of what is on disk. Cap is the size of the file.
	Stats

	InUse  bool   // a process has the buffer open
	Holder string // which, e.g. "pid 4711"; "" when unknown

	// Damage says why the tree is not to be used. The chunks were then found by their
	// checksums: they are what the next Open will salvage, and what it will not is
	// missing here. Exact is whether it will be able to name all of that and go on with
	// the epoch; otherwise counters may be too low, and records already delivered be
	// among the live ones.
	Damage error
	Exact  bool

	Missing []Loss  // seqs between First and Last that no chunk has; [Loss.Cause] is empty
	Lost    []Loss  // losses that no delivered record names yet, as far as is known
	Aside   []Aside // what was set aside beside it, oldest first

	f     *os.File
	base  uint64
	index index
	txid  uint64
	tree  bool // chunks come from the tree
}

// Aside is a damaged file, the pages of a damaged chunk, or a record that was given up,
// see [Queue.SetAside]. A file that is neither chunk nor record Inspect can read.
type Aside struct {
	Path   string
	At     time.Time
	Bytes  int64  // of disk
	Chunk  uint64 // first seq of the chunk; 0: it is none
	Record uint64 // seq of the record; 0: it is none
}

// Chunk is one chunk of a [Snapshot].
type Chunk struct {
	First, Last uint64    // of its records; 0 for one of an earlier epoch
	Count       uint32    // records
	Offset      int64     // of its first page in the file
	Bytes       int64     // of its pages
	Written     time.Time // zero when Err is not nil
	Delivered   bool      // all of it was acknowledged
	// Err says why the records cannot be had. Gone is whether that is no damage: a
	// running sensor has dropped the chunk since.
	Err  error
	Gone bool

	frames []byte
}

// Records iterates over the records, none when Err is not nil. Stored is when the chunk
// was written. Data is valid until the next chunk is visited.
func (c *Chunk) Records() iter.Seq[Record] {
	return func(yield func(Record) bool) {
		b := c.frames
		for left := uint64(c.Count); len(b) > 0; left-- {
			rec, rest, ok := nextFrame(b)
			if !ok {
				return // verified; cannot be
			}
			// Counted from the last one, as the first may be of an earlier epoch.
			rec.Seq, rec.Stored, b = max(c.Last+1, left)-left, c.Written.UnixNano(), rest
			if !yield(rec) {
				return
			}
		}
	}
}

// Inspect opens the buffer in a directory, or one file of it such as one that was set
// aside, for reading only. The error is that there is no such file, that it may not be read, or
// that a running sensor has changed it too fast to be caught. The caller closes the snapshot.
func Inspect(ctx context.Context, path string) (s *Snapshot, err error) {
	var w witness
	s = &Snapshot{Path: path}
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		s.Path = filepath.Join(path, fileName)
		w = readSidecar(path, bootID())
		s.InUse, s.Holder = holder(path)
	}
	if s.f, err = os.Open(s.Path); err != nil {
		return nil, fmt.Errorf("inspect: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("inspect %s: %w", s.Path, err), s.f.Close())
			s = nil
		}
	}()
	fi, err := s.f.Stat()
	if err != nil {
		return s, err
	}
	if !fi.Mode().IsRegular() {
		return s, fmt.Errorf("is no file but %s", fi.Mode())
	}
	s.Size, s.Disk = fi.Size(), blocks(s.Path)
	s.Aside, s.Quarantined = asides(s.Path)

	st, err := s.read(ctx, w)
	if err != nil {
		return s, err
	}
	s.index.ack(st.acked, time.Now())
	if e := s.index.oldestUnsent(); e != nil {
		e.at, _ = writtenAt(s.f, e.root)
	}
	q := s.Quarantined
	s.Stats = statsOf(st, &s.index, st.acked)
	s.Cap, s.Quarantined = s.Size, q
	s.base, s.Lost = st.base, st.unreported()
	at := s.First + s.base
	for _, e := range s.index.live() {
		if e.first > at {
			s.Missing = append(s.Missing, span{at, e.first - 1}.loss("").shift(-s.base))
		}
		at = max(at, e.last()+1)
	}
	return s, nil
}

// Close closes the file.
func (s *Snapshot) Close() error { return s.f.Close() }

// read finds the state and the chunks: by the tree, or else as a salvage would.
func (s *Snapshot) read(ctx context.Context, w witness) (*state, error) {
	for try := 0; ; try++ {
		st, err := s.readTree(w)
		moved := err != nil && s.moved()
		switch {
		case err == nil:
			s.tree = true
			if s.InUse || w.state == nil {
				return st, nil
			}
			if m, merr := metaInForce(s.f, s.Size); merr == nil {
				err = contradiction(st, m, w)
			}
			if err == nil {
				return st, nil
			}
		case moved && try < inspectTries:
			select {
			case <-time.After(inspectPause):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			continue
		case moved:
			return nil, errors.New("a running sensor changes it too fast; ask that one")
		}
		s.tree, s.Damage, s.index = false, err, index{}
		break
	}
	finds, err := scan(ctx, s.f, s.Size)
	if err != nil {
		return nil, err
	}
	st, exact := newest(s.f, s.Size, w)
	s.Exact = exact && st != nil
	if st == nil {
		st = &state{}
	}
	st = st.clone()
	for _, f := range current(st, s.Exact, finds) {
		s.index.push(f.entry())
	}
	return st, nil
}

// readTree reads what one transaction has left. An error is damage, or that another
// transaction was written meanwhile, which moved then tells.
func (s *Snapshot) readTree(w witness) (*state, error) {
	m, err := metaInForce(s.f, s.Size)
	if err != nil {
		return nil, err
	}
	s.txid = m.txid
	if s.InUse {
		if err := m.walk(s.f, nil); err != nil {
			return nil, err
		}
	} else {
		// Where the last transaction was cut off, it is the one before.
		if m, err = preflight(s.f, s.Size, w.closed); err != nil {
			return nil, err
		}
		if m.newer != nil {
			if st, err := stateAt(s.f, s.Size, m); err != nil || m.last(st, w) != nil {
				m = *m.newer
			}
		}
	}
	s.index = m.chunks
	st, err := m.load(s.f, s.Size)
	if err == nil {
		err = m.last(st, w)
	}
	if err == nil && s.moved() {
		err = errReplaced
	}
	return st, err
}

// moved says whether a transaction was written since. The pages of the one before stay
// as they are until then.
func (s *Snapshot) moved() bool {
	m, err := metaInForce(s.f, s.Size)
	return err == nil && m.txid != s.txid
}

// Walk calls visit for each live chunk with records in r, in order, delivered ones that
// are kept included, until visit returns false. The chunk is valid until visit returns,
// and has all its records, of which r may want only some. The error is that of ctx: what
// is wrong with a chunk is in it.
func (s *Snapshot) Walk(ctx context.Context, r Range, visit func(*Chunk) bool) error {
	var buf scratch
	l := s.index.live()
	first, last := r.of(s.base, s.Last)
	for i := s.index.above(first - 1); i < len(l) && l[i].first <= last; i++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("walk %s: %w", s.Path, err)
		}
		c := s.chunk(&l[i], r.Since, &buf)
		c.Delivered = i < s.index.acked
		if c.Err != nil && s.tree && s.moved() {
			c.Err, c.Gone = errReplaced, true
		}
		if !visit(&c) {
			return nil
		}
	}
	return nil
}

// chunk reads the chunk e into buf and verifies it.
func (s *Snapshot) chunk(e *entry, since time.Time, buf *scratch) Chunk {
	if s.tree {
		return readLeaf(s.f, e, s.base, since, buf)
	}
	// Its leaf may be damaged, and the file end behind its last byte.
	c := chunkOf(e, s.base)
	p := buf.room(c.Bytes)
	n, err := s.f.ReadAt(p, c.Offset)
	if err != nil && (!errors.Is(err, io.EOF) || n < leafHeader) {
		c.Err = err
		return c
	}
	c.open(e, p[leafHeader:n], since, buf)
	return c
}

// holder says whether a process has the buffer in dir, and which.
func holder(dir string) (bool, string) {
	d, err := os.Open(dir)
	if err != nil {
		return false, ""
	}
	defer d.Close()
	// Asked for a moment only: to hold the lock would keep a sensor from starting.
	if err := unix.Flock(int(d.Fd()), unix.LOCK_SH|unix.LOCK_NB); err == nil {
		_ = unix.Flock(int(d.Fd()), unix.LOCK_UN) // Close does it too
		return false, ""
	}
	return true, strings.Trim(lockOwner(d), " ()")
}

// asides lists what was set aside beside path, and its size on disk.
func asides(path string) (out []Aside, bytes int64) {
	all, _ := filepath.Glob(path + badSuffix + "*") // the pattern is sound
	slices.Sort(all)                                // by time, as the names are
	for _, f := range all {
		a := Aside{Path: f, Bytes: blocks(f)}
		stamp, seq, _ := strings.Cut(strings.TrimPrefix(f, path+badSuffix), badChunk)
		a.Chunk, _ = strconv.ParseUint(seq, 10, 64) // 0 when there is none
		if before, record, is := strings.Cut(stamp, badRecord); is {
			stamp = before
			a.Record, _ = strconv.ParseUint(record[strings.LastIndexByte(record, '-')+1:], 10, 64)
		}
		a.At, _ = time.Parse(badTime, stamp) // zero when the name is not ours
		out, bytes = append(out, a), bytes+a.Bytes
	}
	return out, bytes
}
