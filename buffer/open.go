// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	boot := bootID()
	db, err := q.openFile(ctx, readSidecar(o.Dir, boot))
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	side, err := openSidecar(o.Dir, boot)
	if err == nil {
		if err = errors.Join(side.write(q.state, time.Now()), syncDir(o.Dir)); err != nil {
			err = fmt.Errorf("%s: %w", side.f.Name(), errors.Join(err, side.f.Close()))
		}
	}
	if err == nil {
		var file *os.File
		if file, err = os.Open(path); err != nil {
			err = errors.Join(err, side.close())
		}
		q.file.Store(file)
	}
	if err != nil {
		return nil, errors.Join(err, db.Close(), dir.Close())
	}
	q.next = q.state.last + 1
	q.ack = q.state.acked
	q.index.ack(q.ack, time.Now())
	q.dateOldest()
	q.quarantined = quarantined(path)
	q.metrics = newMetrics(o.Registerer, q.Stats)
	q.metrics.truncations.Add(float64(q.state.truncated))
	q.metrics.corrupt.Add(float64(q.state.corrupt))
	q.metrics.salvaged.Add(float64(q.state.salvaged))
	w := &writer{q: q, db: db, side: side}
	go w.run(context.WithoutCancel(ctx)) // outlives Open
	return q, nil
}

// openFile opens the existing file, or a new one when there is none or when it
// has to be set aside. w is what the sidecar says.
func (q *Queue) openFile(ctx context.Context, w witness) (*bolt.DB, error) {
	db, m, err := q.reload()
	if err == nil {
		if err = contradiction(q.state, m, w); err == nil {
			return db, nil
		}
		err = errors.Join(err, db.Close())
	}
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
	if db, _, err = q.reload(); err != nil {
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
	s, exact := newest(f, st.Size(), w)
	return q.restore(ctx, f, s, exact, cause)
}

// reload loads the file and takes over what it holds.
func (q *Queue) reload() (*bolt.DB, meta, error) {
	db, s, x, m, err := q.load()
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
	case m.alone && (w.state == nil || w.epoch != s.epoch || w.gen != s.gen):
		return fmt.Errorf("%w: one meta page is damaged, and with it the last transaction may be gone", ErrDamaged)
	}
	return nil
}

// load checks and opens the file, and reads what it holds. What is wrong with
// the content matches ErrDamaged, what is wrong around it does not.
func (q *Queue) load() (db *bolt.DB, s *state, x index, m meta, err error) {
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, x, m, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, x, m, err
	}
	m, err = preflight(f, st.Size())
	if err != nil {
		return nil, nil, x, m, err
	}
	if db, err = openBolt(q.path, q.o.Cap); err != nil {
		return nil, nil, x, m, err
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
		return nil, nil, x, m, errors.Join(err, db.Close())
	}
	return db, s, x, m, nil
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
		if e.first < at || e.first < s.head || e.count == 0 || e.last() > s.last {
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
