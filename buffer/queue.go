// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	bolt "go.etcd.io/bbolt"
)

// Stream says which stream a record goes to; at most 16 are possible.
type Stream = uint8

// The streams. Their numbers are on disk, so they never change.
const (
	Events Stream = iota
	DecisionsSystem
	DecisionsAgents
	DecisionsApprovals
	Streams // the number of streams
)

// Record is one durable record. Data is valid until the next [Queue.Read].
type Record struct {
	Seq    uint64
	Stream Stream
	Urgent bool
	// Stored is when the record became durable, in nanoseconds since the Unix
	// epoch; 0 when that was in an earlier run, or when it was acknowledged before.
	Stored int64
	Data   []byte
}

// ErrClosed is returned by operations on a closed [Queue].
var ErrClosed = errors.New("buffer is closed")

// Options configure [Open]. Zero values mean the defaults named here.
type Options struct {
	// Dir is the directory of the file; it is made when missing and locked
	// while the queue is open.
	Dir string

	// Cap is the size of the file in bytes, default 512 MiB. The file has
	// this size from the start and never another.
	Cap int64

	// CommitBytes and CommitInterval end a group commit: that much is
	// pending, default 256 KiB, or that long has passed since the first
	// pending record, default 50 ms. CommitBytes also bounds a chunk.
	CommitBytes    int
	CommitInterval time.Duration

	// RetainAge and RetainBytes bound what is kept of acknowledged records,
	// whichever is reached first: default 5 min and 64 MiB, negative for
	// none. They make room for new records before anything else does.
	RetainAge   time.Duration
	RetainBytes int64

	// MaxRecord is the largest record accepted, default 4 MiB.
	MaxRecord int

	// Committed is called by the writer after each durable commit with the
	// mark that is now on disk, nil when there is none. It must not block
	// nor modify the mark.
	Committed func(mark []byte)

	Registerer prometheus.Registerer

	// BeforeCommit is a seam for tests: the writer calls it before each
	// transaction. It may block, as a stalled disk does; an error counts as
	// that of the transaction.
	BeforeCommit func() error

	// afterCommit is called after each transaction; an error counts as that
	// of an fsync which did its work nevertheless.
	afterCommit func() error
}

const (
	kib = 1 << 10
	mib = 1 << 20

	// Pages that the logical limit leaves alone for the tree, and the share
	// of the file that it never fills: what a first-fit ring of runs of
	// different lengths needs so that a fitting run is always free.
	sparePages = 64
	fillLimit  = 0.92

	urgentInterval = 10 * time.Millisecond // first urgent record until its commit
	idleInterval   = time.Second           // acknowledgement until it is persisted when nothing else is
	maxRecycle     = 1 * mib               // larger memory is not kept for reuse
)

func (o Options) withDefaults() (Options, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
		*v = max(*v, 0)
	}
	def(&o.Cap, 512*mib)
	o.Cap -= o.Cap % pageSize
	if o.CommitBytes == 0 {
		o.CommitBytes = 256 * kib
	}
	if o.CommitInterval == 0 {
		o.CommitInterval = 50 * time.Millisecond
	}
	age := int64(o.RetainAge)
	def(&age, int64(5*time.Minute))
	o.RetainAge = time.Duration(age)
	def(&o.RetainBytes, 64*mib)
	if o.MaxRecord == 0 {
		o.MaxRecord = 4 * mib
	}
	if o.CommitBytes < minChunk || o.MaxRecord < 1 || o.MaxRecord > maxFrame {
		return o, fmt.Errorf("commit bytes %d, max record %d: out of range", o.CommitBytes, o.MaxRecord)
	}
	if need := max(o.maxPending(), o.MaxRecord+frameHeader); o.maxBatch() < need {
		return o, fmt.Errorf("cap of %d bytes is too small for commits of %d bytes: about %d are needed",
			o.Cap, need, 7*int64(need)/2+2*sparePages*pageSize)
	}
	return o, nil
}

// maxCommit is the most that one transaction may add: what the logical limit
// leaves when it keeps room for two more of the same size.
func (o Options) maxCommit() int {
	return int((fillLimit*float64(o.Cap) - sparePages*pageSize) / 3)
}

// maxBatch leaves room for what chunks and pages add to the frames.
func (o Options) maxBatch() int { return o.maxCommit() / 32 * 31 }

// maxPending is how much may wait for the writer, one batch of any size aside.
func (o Options) maxPending() int { return 4 * o.CommitBytes }

// chunkBytes is the largest value of a chunk of more than one record.
func (o Options) chunkBytes() int { return o.CommitBytes/pageSize*pageSize - leafHeader }

// Queue is the durable, bounded queue: one appender, one reader, any number of
// callers of the other methods, all at the same time.
type Queue struct {
	o       Options
	path    string
	dir     *os.File // holds the lock
	file    *os.File // for the reader's pread
	metrics *metrics

	aside string // where Open has put a damaged file

	kick     chan struct{} // wakes the writer
	room     chan struct{} // wakes the appender
	readable chan struct{} // wakes the reader
	stop     chan struct{} // closed by Close
	done     chan struct{} // closed by the writer at its end

	reader reader // used by Read only

	mu       sync.Mutex
	state    *state // as on disk; replaced, never changed
	index    index
	next     uint64 // seq of the next record appended
	pending  *pending
	inflight *pending // being committed
	spare    *pending
	batches  []*Batch // free list
	chunks   [][]byte // free list

	// What the next transaction has to take in, besides pending.
	ack      uint64
	forfeits []Loss
	lossGen  uint64 // the transaction that holds the last Forfeit
	damaged  []damage
	resolve  *uint64   // a Read waits until doubt about what is above is decided
	handed   uint64    // newest record handed out
	waiting  bool      // a Read waits for records
	dirtyAt  time.Time // of the first change that is not on disk
	force    bool      // commit at once

	flushes  []flush
	closing  bool
	err      error // terminal
	commitAt commitError
}

// commitError is the last error of the writer, while it lasts.
type commitError struct {
	err   error
	since time.Time
}

type damage struct{ first, after uint64 }

// flush waits for a record and for a transaction, as a mark may come alone.
type flush struct {
	seq, gen uint64
	done     chan struct{}
}

// pending is what the next transaction will store: whole batches only, so
// that a mark is never durable before the records it stands for, nor after.
type pending struct {
	chunks  []chunk
	bytes   int
	records int
	names   []naming
	mark    []byte
	since   time.Time // of the first batch
	due     time.Time
}

func (p *pending) empty() bool { return p.since.IsZero() }

// Bounds says what the queue holds. With nothing to read First is Last+1.
type Bounds struct {
	First uint64 // oldest record that can be read, delivered ones included
	Acked uint64 // everything up to here is acknowledged
	Last  uint64 // newest durable record
}

// Stats is a snapshot of the queue.
type Stats struct {
	Bounds
	Epoch       string
	Records     uint64 // live, acknowledged ones included
	Unsent      uint64 // live and not acknowledged
	Bytes       int64  // of the pages that hold live chunks
	UnsentBytes int64  // of those with a record that is not acknowledged
	Cap         int64
	Truncated   uint64 // dropped undelivered, over the life of the file
	Reclaimed   uint64 // dropped after delivery
	Corrupt     uint64 // lost to damage
	InDoubt     uint64 // dropped while possibly under way; Truncated or Reclaimed once the server has said
	Losses      int    // entries in the list of losses not yet reported

	OldestUnsent time.Time // when the oldest unacknowledged record was written; zero when there is none
	Pending      int       // bytes that wait to be durable

	Err      error     // why commits fail at the moment
	ErrSince time.Time // since when

	Quarantined string // where Open has put a damaged file, "" when there was none
}

// Open opens the queue in o.Dir, or makes a new one. A file that is damaged
// beyond use is set aside (see Stats.Quarantined) and replaced by a new one with
// a new epoch; a loss of unknown size is then to be reported, as
// [Queue.Unnamed] says. Waits at most a second for the lock: [ErrLocked].
func Open(ctx context.Context, o Options) (q *Queue, err error) {
	path := filepath.Join(o.Dir, fileName)
	defer func() {
		if err != nil {
			err = fmt.Errorf("open buffer: %w", err)
		}
	}()
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := lockDir(ctx, o.Dir)
	if err != nil {
		return nil, err
	}
	q = &Queue{
		o: o, path: path, dir: dir,
		kick: make(chan struct{}, 1), room: make(chan struct{}, 1), readable: make(chan struct{}, 1),
		stop: make(chan struct{}), done: make(chan struct{}),
		pending: new(pending), spare: new(pending),
	}
	db, err := q.openFile()
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if q.file, err = os.Open(path); err != nil {
		return nil, errors.Join(err, db.Close(), dir.Close())
	}
	q.next = q.state.last + 1
	q.ack = q.state.acked
	q.index.ack(q.ack, time.Now())
	q.dateOldest()
	q.metrics = newMetrics(o.Registerer, q.Stats)
	q.metrics.truncations.Add(float64(q.state.truncated))
	q.metrics.corrupt.Add(float64(q.state.corrupt))
	w := &writer{q: q, db: db}
	go w.run()
	return q, nil
}

// openFile opens the existing file, or a new one when there is none or when it
// has to be set aside.
func (q *Queue) openFile() (*bolt.DB, error) {
	s := &state{epoch: mintEpoch(time.Now())}
	_, err := os.Stat(q.path)
	if err == nil {
		var db *bolt.DB
		if db, q.state, q.index, err = q.load(); err == nil {
			return db, nil
		}
		if !errors.Is(err, ErrDamaged) {
			return nil, fmt.Errorf("%s: %w", q.path, err)
		}
		cause := err
		if q.aside, err = quarantine(q.path, time.Now()); err != nil {
			return nil, fmt.Errorf("set aside %s (%w): %w", q.path, cause, err)
		}
		s.losses.add(Loss{Cause: CauseCorrupt})
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := create(q.path, q.o.Cap, s); err != nil {
		return nil, fmt.Errorf("create %s: %w", q.path, err)
	}
	var db *bolt.DB
	if db, q.state, q.index, err = q.load(); err != nil {
		return nil, fmt.Errorf("%s: %w", q.path, err)
	}
	return db, nil
}

// load checks and opens the file, and reads what it holds. What is wrong with
// the content matches ErrDamaged, what is wrong around it does not.
func (q *Queue) load() (db *bolt.DB, s *state, x index, err error) {
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, x, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, x, err
	}
	m, err := preflight(f, st.Size())
	if err != nil {
		return nil, nil, x, err
	}
	if db, err = openBolt(q.path, q.o.Cap); err != nil {
		return nil, nil, x, err
	}
	err = guarded(func() error {
		return db.View(func(tx *bolt.Tx) (err error) {
			s, x, err = loadTx(tx)
			return err
		})
	})
	switch used := int64(m.pages) * pageSize; {
	case err != nil:
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	case used > q.o.Cap:
		err = fmt.Errorf("%d bytes of the file have been used, more than the cap of %d: set buffer.cap to at least that, or move the file away", used, q.o.Cap)
	case st.Size() > q.o.Cap:
		err = f.Truncate(q.o.Cap)
	case st.Size() < q.o.Cap:
		err = preallocate(f, q.o.Cap)
	}
	if err != nil {
		return nil, nil, x, errors.Join(err, db.Close())
	}
	return db, s, x, nil
}

// loadTx reads the state and the chunks, checking one against the other.
func loadTx(tx *bolt.Tx) (s *state, x index, err error) {
	m, c := tx.Bucket(metaBucket), tx.Bucket(chunkBucket)
	if m == nil || c == nil {
		return nil, x, errors.New("not a buffer file")
	}
	if s, err = decodeState(m.Get(stateKey)); err != nil {
		return nil, x, err
	}
	at := uint64(1)
	err = c.ForEachBucket(func(k []byte) error {
		if len(k) != 8 {
			return fmt.Errorf("chunk key of %d bytes", len(k))
		}
		e, err := entryOf(c.Bucket(k), k)
		if err != nil {
			return err
		}
		if e.first < at || e.count == 0 || e.last() > s.last {
			return fmt.Errorf("chunk of %d records at seq %d, expected at least %d and at most %d", e.count, e.first, at, s.last)
		}
		at = e.last() + 1
		x.push(e)
		return nil
	})
	if err != nil {
		return nil, x, err
	}
	if got := s.gone() + x.records; got != s.last || s.acked > s.last || s.lease > s.last || s.lease < s.acked {
		return nil, x, fmt.Errorf("accounts for %d records of %d: %d live, %d truncated, %d reclaimed, %d corrupt, %d in doubt; acked %d, lease %d",
			got, s.last, x.records, s.truncated, s.reclaimed, s.corrupt, s.inDoubt(), s.acked, s.lease)
	}
	return s, x, nil
}

func entryOf(b *bolt.Bucket, k []byte) (entry, error) {
	seq := b.Sequence()
	e := entry{first: binary.BigEndian.Uint64(k), count: uint32(seq), pages: uint32(seq >> 32), root: uint64(b.Root())}
	if e.root == 0 || e.pages == 0 {
		return entry{}, fmt.Errorf("chunk at seq %d has no page", e.first)
	}
	return e, nil
}

// Epoch returns the identity of this sequence of records: 12 hex digits of a
// millisecond timestamp, then 8 random ones. It lives as long as the file.
func (q *Queue) Epoch() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state.epoch
}

// Next returns the seq that the first record of the next batch gets.
func (q *Queue) Next() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.next
}

// Mark returns the mark of the last durable commit, nil when none was set.
func (q *Queue) Mark() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.state.mark)
}

// NewBatch returns an empty batch, a used one where possible.
func (q *Queue) NewBatch() *Batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(q.batches); n > 0 {
		b := q.batches[n-1]
		q.batches = q.batches[:n-1]
		return b
	}
	return &Batch{maxRecord: q.o.MaxRecord, maxBytes: q.o.maxBatch()}
}

// Append hands b over to the next commit. The batch becomes durable as a
// whole, in order, after those appended before. Append blocks while enough
// batches wait; on an error b is still the caller's. One goroutine appends.
func (q *Queue) Append(ctx context.Context, b *Batch) error {
	for {
		q.mu.Lock()
		if err := q.usable(); err != nil {
			q.mu.Unlock()
			return fmt.Errorf("append: %w", err)
		}
		if q.pending.empty() || q.pending.bytes+len(b.buf) <= q.o.maxPending() {
			break
		}
		q.mu.Unlock()
		select {
		case <-q.room:
		case <-ctx.Done():
			return fmt.Errorf("append: %w", ctx.Err())
		case <-q.done:
		}
	}
	defer q.mu.Unlock()
	if b.count > 0 || b.marked {
		q.add(b, time.Now())
	}
	q.recycle(b)
	return nil
}

// add copies b into pending and wakes the writer when its plan changes.
func (q *Queue) add(b *Batch, now time.Time) {
	p := q.pending
	due := now.Add(q.o.CommitInterval)
	if b.urgent {
		due = now.Add(min(urgentInterval, q.o.CommitInterval))
	}
	wake := false
	if p.empty() {
		p.since, p.due = now, due
		wake = true
	} else if due.Before(p.due) {
		p.due = due
		wake = true
	}
	full := p.bytes >= q.o.CommitBytes
	for _, n := range b.names {
		n.seq = q.next + uint64(n.index)
		p.names = append(p.names, n)
	}
	if b.marked {
		p.mark = append([]byte{}, b.mark...)
	}
	q.addFrames(p, b.buf, b.count)
	p.bytes += len(b.buf)
	p.records += b.count
	if wake || !full && p.bytes >= q.o.CommitBytes {
		q.wake()
	}
}

// addFrames distributes n frames over chunks: one copy as long as they fit.
func (q *Queue) addFrames(p *pending, b []byte, n int) {
	limit := q.o.chunkBytes()
	for n > 0 {
		if len(p.chunks) == 0 {
			q.addChunk(p)
		}
		c := &p.chunks[len(p.chunks)-1]
		fit, count := b, n
		if len(c.buf)+len(b) > limit {
			fit, count = nil, 0
			for rest := b; len(rest) > 0; {
				_, r, _ := nextFrame(rest)
				if end := len(b) - len(r); len(c.buf)+end <= limit || c.count == 0 && count == 0 {
					fit, count = b[:end], count+1
					rest = r
					continue
				}
				break
			}
			if count == 0 {
				q.addChunk(p)
				continue
			}
		}
		c.buf = append(c.buf, fit...)
		c.count += uint32(count)
		q.next += uint64(count)
		b, n = b[len(fit):], n-count
	}
}

func (q *Queue) addChunk(p *pending) {
	var buf []byte
	if n := len(q.chunks); n > 0 {
		buf = q.chunks[n-1]
		q.chunks = q.chunks[:n-1]
	} else {
		buf = make([]byte, 0, max(minChunk, q.o.CommitBytes))
	}
	p.chunks = append(p.chunks, chunk{buf: buf[:chunkHeader], first: q.next})
}

// recyclePending takes back a committed one.
func (q *Queue) recyclePending(p *pending) {
	for _, c := range p.chunks {
		if cap(c.buf) <= maxRecycle && len(q.chunks) < 2*q.o.maxPending()/q.o.CommitBytes {
			q.chunks = append(q.chunks, c.buf)
		}
	}
	clear(p.chunks)
	clear(p.names)
	*p = pending{chunks: p.chunks[:0], names: p.names[:0]}
	q.spare = p
}

// usable says why the queue takes no more work.
func (q *Queue) usable() error {
	if q.err != nil {
		return q.err
	}
	if q.closing {
		return ErrClosed
	}
	return nil
}

func (q *Queue) recycle(b *Batch) {
	b.reset()
	if len(q.batches) < 4 {
		q.batches = append(q.batches, b)
	}
}

// wake makes the writer look at its plan again.
func (q *Queue) wake() {
	signal(q.kick)
}

// Ack says that everything up to seq was delivered. It is persisted with the
// next commit, or within a second; until then a restart delivers again. The
// watermark never goes back, and never beyond what is durable.
func (q *Queue) Ack(seq uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if seq = min(seq, q.state.last); seq > q.ack {
		q.ack = seq
		q.dirty()
	}
}

// Forfeit reports a loss of delivered records that was found elsewhere: the
// server has gone back further than the queue reaches. It joins the losses to
// be named. cause is one of a small closed set, at most 255 bytes. The next Read
// returns only when that is durable: whoever sends what it returns passes over
// the range for good.
func (q *Queue) Forfeit(first, last uint64, cause string) {
	if first == 0 || last < first {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forfeits = append(q.forfeits, span{first, last}.loss(cause[:min(len(cause), 255)]))
	q.lossGen = q.state.gen + 1
	if q.inflight != nil {
		q.lossGen++
	}
	q.force = true
	q.dirty()
	q.wake()
}

// dirty plans a commit for what came in besides records.
func (q *Queue) dirty() {
	if q.dirtyAt.IsZero() {
		q.dirtyAt = time.Now()
		q.wake()
	}
}

// Bounds returns what the queue holds.
func (q *Queue) Bounds() Bounds {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bounds()
}

func (q *Queue) bounds() Bounds {
	b := Bounds{First: q.state.last + 1, Acked: q.ack, Last: q.state.last}
	if l := q.index.live(); len(l) > 0 {
		b.First = l[0].first
	}
	return b
}

// Unnamed appends to dst the losses that no live or delivered record names, nor
// one that waits to be durable.
func (q *Queue) Unnamed(dst []Loss) []Loss {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := slices.Clone(q.state.losses)
	for _, p := range []*pending{q.inflight, q.pending} {
		if p == nil {
			continue
		}
		for _, n := range p.names {
			for _, x := range n.losses {
				l.name(x, n.seq)
			}
		}
	}
	return l.unnamed(dst)
}

// Stats returns a snapshot.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := Stats{
		Bounds: q.bounds(), Epoch: q.state.epoch,
		Records: q.index.records, Bytes: int64(q.index.pages) * pageSize, UnsentBytes: int64(q.index.pages-q.index.ackedPages) * pageSize, Cap: q.o.Cap,
		Truncated: q.state.truncated, Reclaimed: q.state.reclaimed, Corrupt: q.state.corrupt,
		InDoubt: q.state.inDoubt(), Losses: len(q.state.losses),
		Err: q.commitAt.err, ErrSince: q.commitAt.since, Quarantined: q.aside,
	}
	for _, p := range []*pending{q.inflight, q.pending} {
		if p != nil {
			s.Pending += p.bytes
		}
	}
	if q.err != nil {
		s.Err = q.err
	}
	if e := q.index.oldestUnsent(); e != nil {
		if e.at != 0 {
			s.OldestUnsent = time.Unix(0, e.at)
		}
		s.Unsent = s.Records - q.index.ackedRecords
		if e.first <= s.Acked {
			s.Unsent -= s.Acked - e.first + 1
		}
	}
	return s
}

// Flush waits until what was appended, acknowledged and forfeited so far is
// durable.
func (q *Queue) Flush(ctx context.Context) error {
	q.mu.Lock()
	if err := q.usable(); err != nil {
		q.mu.Unlock()
		return fmt.Errorf("flush: %w", err)
	}
	if q.pending.empty() && q.inflight == nil && q.dirtyAt.IsZero() {
		q.mu.Unlock()
		return nil
	}
	f := flush{seq: q.next - 1, gen: q.state.gen + 1, done: make(chan struct{})}
	if q.inflight != nil {
		f.gen++
	}
	q.flushes = append(q.flushes, f)
	q.force = true
	q.wake()
	q.mu.Unlock()
	select {
	case <-f.done:
		return nil
	case <-q.done:
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.state.last >= f.seq {
			return nil
		}
		return fmt.Errorf("flush: %w", q.err)
	case <-ctx.Done():
		return fmt.Errorf("flush: %w", ctx.Err())
	}
}

// Close makes durable what was appended and closes the file in a form that
// opens fast. When ctx ends first the writer is left to end on its own as soon
// as the disk answers; everything durable is safe at any time.
func (q *Queue) Close(ctx context.Context) error {
	q.mu.Lock()
	if !q.closing {
		q.closing = true
		close(q.stop)
	}
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-ctx.Done():
		return fmt.Errorf("close buffer: %w", ctx.Err())
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil && !errors.Is(q.err, ErrClosed) {
		return fmt.Errorf("close buffer: %w", q.err)
	}
	return nil
}
