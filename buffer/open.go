// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Open opens the queue in o.Dir, or makes a new one. A file with a damaged tree is
// set aside and replaced by a new one, with every record that is intact and a loss for
// every one that is not (see Stats.Recovery). The epoch goes on where it is certain
// what has been handed out; otherwise a new one begins, and with it a loss of unknown
// size, as [Queue.Unnamed] says. Waits at most a second for the lock: [ErrLocked].
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
	encoder, err := newEncoder(o.Compression)
	if err != nil {
		return nil, err
	}
	hazards, err := Hazards(o.Dir)
	if err != nil {
		return nil, err
	}
	for _, h := range hazards {
		if h.Unsafe && !o.AllowUnsafe {
			return nil, fmt.Errorf("%w: %s", ErrUnsafe, h)
		}
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := lockDir(ctx, o.Dir)
	if err != nil {
		return nil, err
	}
	q = &Queue{
		o: o, path: path, dir: dir, hazards: hazards,
		kick: make(chan struct{}, 1), room: make(chan struct{}, 1), readable: make(chan struct{}, 1),
		stop: make(chan struct{}), done: make(chan struct{}),
		pending: new(pending), spare: new(pending),
	}
	// What a process that died had not finished.
	for _, suffix := range []string{newSuffix, sizeSuffix} {
		if err := ignoreNotExist(os.Remove(path + suffix)); err != nil {
			return nil, errors.Join(err, dir.Close())
		}
	}
	boot := bootID()
	known := readSidecar(o.Dir, boot)
	if known.closed != 0 && withdraw(o.Dir) != nil {
		known.closed = 0
	}
	db, err := q.openFile(ctx, known)
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if known.state != nil && (known.epoch != q.state.epoch || known.gen != q.state.gen) {
		known.closed = 0
	}
	side, err := openSidecar(o.Dir, known, boot)
	if noSpace(err) {
		err = nil
		q.hazards = append(q.hazards, Hazard{Dir: o.Dir, FS: "a full disk", What: noSidecar, Remedy: "make room"})
	}
	if err == nil && known.state == nil {
		err = syncDir(o.Dir) // it is new
	}
	var file *os.File
	if err == nil {
		file, err = os.Open(path)
	}
	if err != nil {
		return nil, errors.Join(err, side.close(), db.Close(), dir.Close())
	}
	q.file.Store(file)
	q.next = q.state.last + 1
	q.given = slices.Clone(q.state.given)
	q.ack = q.state.acked
	q.index.ack(q.ack, time.Now())
	q.dateOldest()
	q.quarantined = quarantined(path)
	q.metrics = newMetrics(o.Registerer, q.Stats)
	q.metrics.truncations.Add(float64(q.state.truncated))
	q.metrics.corrupt.Add(float64(q.state.corrupt))
	q.metrics.salvaged.Add(float64(q.state.salvaged))
	w := &writer{q: q, db: db, side: side, boot: boot, encoder: encoder}
	w.note(q.state)
	go w.run(context.WithoutCancel(ctx)) // outlives Open
	if err := q.Resize(ctx, o.Cap); err != nil && ctx.Err() != nil {
		return nil, errors.Join(err, q.Close(context.WithoutCancel(ctx)))
	}
	return q, nil // where the size was refused, Stats says so
}

// adopt has the queue use the file in the size that it has, until it is resized.
func (q *Queue) adopt() {
	f, err := os.Open(q.path)
	if err != nil {
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return
	}
	m, err := metaInForce(f, st.Size())
	if err != nil {
		return
	}
	o, used := q.o, int64(m.pages)*pageSize
	switch {
	case used > o.Cap:
		o.Cap = used
	case st.Size() < o.Cap:
		o.Cap = st.Size() - st.Size()%pageSize
	}
	if o.check() == nil {
		q.o = o
	}
}

// openFile opens the existing file, or a new one when there is none or when it
// has to be set aside. w is what the sidecar says.
func (q *Queue) openFile(ctx context.Context, w witness) (*bolt.DB, error) {
	wanted := q.o
	q.adopt()
	db, m, err := q.reload(w)
	for try := 1; errors.Is(err, syscall.EIO) && !errors.Is(err, ErrDamaged); try++ {
		if try == maxReadFaults {
			// Not to start would leave the host without a sensor for good: what the
			// disk still yields goes on in another place of it.
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
			break
		}
		select {
		case <-time.After(faultPause):
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
		db, m, err = q.reload(w)
	}
	if err == nil {
		if err = contradiction(q.state, m, w); err == nil {
			return db, nil
		}
		err = errors.Join(err, db.Close())
	}
	q.o = wanted
	missing := errors.Is(err, os.ErrNotExist)
	switch {
	case missing && w.state == nil:
		err = create(ctx, q.path, q.o, &state{epoch: mintEpoch(time.Now()), head: 1})
		if err != nil {
			err = fmt.Errorf("create %s: %w", q.path, err)
		}
	case missing:
		err = q.restore(ctx, nil, w.state, w.exact, errors.New("the file is missing"))
	case !errors.Is(err, ErrDamaged):
		return nil, fmt.Errorf("%s: %w", q.path, err)
	default:
		err = q.salvage(ctx, w, err)
	}
	if err != nil {
		return nil, err
	}
	if db, _, err = q.reload(w); err != nil {
		return nil, fmt.Errorf("%s: %w", q.path, err)
	}
	return db, nil
}

// salvage restores the file by what it and the sidecar say.
func (q *Queue) salvage(ctx context.Context, w witness, cause error) error {
	f, err := os.Open(q.path)
	if err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("salvage: %w", err)
	}
	s, exact := newest(q.o.reads(f), st.Size(), w)
	return q.restore(ctx, f, s, exact, cause)
}

// reload loads the file and takes over what it holds.
func (q *Queue) reload(w witness) (*bolt.DB, meta, error) {
	db, s, x, m, err := q.load(w)
	if err != nil {
		return nil, meta{}, err
	}
	q.state, q.index = s, x
	return db, m, nil
}

// contradiction says why a sound file is not the one that was left here.
func contradiction(s *state, m meta, w witness) error {
	switch {
	case w.state != nil && w.epoch > s.epoch:
		return fmt.Errorf("%w: it is of epoch %s, the last one here was %s: an older file was put in its place", ErrDamaged, s.epoch, w.epoch)
	case w.state != nil && w.epoch == s.epoch && w.gen > s.gen:
		return fmt.Errorf("%w: it ends with transaction %d, the last one here was %d", ErrDamaged, s.gen, w.gen)
	// A sidecar of another boot may be older than what was told last.
	case m.alone && (w.state == nil || w.epoch != s.epoch || w.gen != s.gen || m.missing && !w.exact):
		return fmt.Errorf("%w: one meta page is damaged, and with it the last transaction may be gone", ErrDamaged)
	}
	return nil
}

// load checks and opens the file, and reads what it holds. What is wrong with
// the content matches ErrDamaged, what is wrong around it does not. A transaction that
// was cut off by a power failure is given up, unless w knows that it was durable.
func (q *Queue) load(w witness) (db *bolt.DB, s *state, x index, m meta, err error) {
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, x, m, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, x, m, err
	}
	m, err = preflight(q.o.reads(f), st.Size(), w.closed)
	if err == nil && m.cut != nil {
		m, err = giveUp(f, st.Size(), m, w)
	}
	if err != nil {
		return nil, nil, x, m, err
	}
	if db, err = openBolt(q.path, q.o.Cap); err != nil {
		return nil, nil, x, m, err
	}
	s, err = m.load(q.o.reads(f), st.Size())
	x = m.chunks
	switch used := int64(m.pages) * pageSize; {
	case errors.Is(err, syscall.EIO):
	case err != nil:
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	case used > q.o.Cap:
		err = fmt.Errorf("%d bytes of the file have been used, more than the cap of %d", used, q.o.Cap)
	case st.Size() > q.o.Cap && contradiction(s, m, w) == nil: // else a transaction that m knows nothing of may be there
		err = f.Truncate(q.o.Cap)
	case st.Size() < q.o.Cap:
		err = preallocate(f, q.o.Cap)
	}
	if err != nil {
		return nil, nil, x, m, errors.Join(err, db.Close())
	}
	return db, s, x, m, nil
}

// giveUp has m be the last transaction of the file, or the newer one where somebody may
// know of that and only a chunk of it is damaged.
func giveUp(f *os.File, size int64, m meta, w witness) (meta, error) {
	s, err := stateAt(f, size, m)
	if err == nil {
		if err = m.last(s, w); err == nil {
			return m, m.giveUp(f)
		}
	}
	if m.newer != nil {
		return *m.newer, nil
	}
	return m, fmt.Errorf("%w: preflight: %w", ErrDamaged, err)
}

// last says whether m, with state s, is the last transaction that anybody has learned of,
// where the one after it is not sound: that may as well be damage. So the sidecar has to
// know of none after m. In its own boot it knows each that was told, otherwise all but those
// of a last second.
func (m meta) last(s *state, w witness) error {
	if m.cut != nil && (w.state == nil || w.epoch != s.epoch || w.gen > s.gen || w.exact && w.gen != s.gen) {
		return m.cut
	}
	return nil
}

// load reads the state that m leads to, and checks it against the chunks that were found.
func (m meta) load(f io.ReaderAt, size int64) (*state, error) {
	if _, bucket, err := lookup(f, size, m.root, chunkBucket); err != nil || !bucket {
		return nil, errors.Join(errors.New("not a buffer file"), err)
	}
	s, err := stateAt(f, size, m)
	if err != nil {
		return nil, err
	}
	return s, balance(s, &m.chunks)
}

// balance checks the chunks against the state: in order, in bounds, and every record
// up to the last in exactly one place.
func balance(s *state, x *index) error {
	at := max(s.head, 1)
	for _, e := range x.live() {
		if e.first < at || e.count == 0 || e.last() > s.last {
			return fmt.Errorf("chunk of %d records at seq %d, expected at least %d and at most %d", e.count, e.first, at, s.last)
		}
		at = e.last() + 1
	}
	if got := s.gone() + x.records; got != s.last || s.acked > s.last || s.lease > s.last || s.lease < s.acked {
		return fmt.Errorf("accounts for %d records of %d: %d live, %d truncated, %d reclaimed, %d corrupt, %d in doubt; acked %d, lease %d",
			got, s.last, x.records, s.truncated, s.reclaimed, s.corrupt, s.inDoubt(), s.acked, s.lease)
	}
	return nil
}

func entryOf(b *bolt.Bucket, k []byte) (entry, error) {
	return entryFrom(k, uint64(b.Root()), b.Sequence())
}

// entryFrom reads a chunk's place from its key and its bucket's header.
func entryFrom(k []byte, root, seq uint64) (entry, error) {
	e := entry{first: binary.BigEndian.Uint64(k), count: uint32(seq), pages: uint32(seq >> 32), root: root}
	if e.root == 0 || e.pages == 0 || e.pages > maxChunkPages {
		return entry{}, fmt.Errorf("chunk at seq %d has %d pages at page %d", e.first, e.pages, e.root)
	}
	return e, nil
}
