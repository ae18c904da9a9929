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
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// sizeSuffix names the smaller file while it is made.
const sizeSuffix = ".size"

// errResizing is returned when the file is already being resized.
var errResizing = errors.New("it is being resized already")

// Resized says how the last wish for another size ended.
type Resized struct {
	At       time.Time
	From, To int64  // bytes; To is what was asked for
	Dropped  uint64 // records that had to go undelivered, those in doubt included
	Err      error  // why the size is still From; nil when it is To
}

// resize is a wish for another size on its way to the writer.
type resize struct {
	to   int64
	path string // of the smaller file, "" to grow
	done chan error

	dropped uint64 // set before done has the answer
}

// Resize changes the size of the file while it is in use, to a multiple of the page size.
//
// To grow only sets space aside. To shrink copies the newest chunks that fit into a smaller
// file, during which appends and reads go on; then the oldest records that do not fit are
// dropped, as when the buffer is full, what came meanwhile is copied, and the smaller file
// takes the name of the other. At no moment is there less than one whole file with exact
// accounts under the name. An error says why the old size is kept. When ctx ends while the
// writer is at work, it goes on without the caller.
func (q *Queue) Resize(ctx context.Context, to int64) (err error) {
	if !q.resizing.TryLock() {
		return fmt.Errorf("resize buffer: %w", errResizing)
	}
	defer q.resizing.Unlock()
	to -= to % pageSize
	q.mu.Lock()
	o, err := q.o, q.usable()
	q.mu.Unlock()
	if err != nil {
		return fmt.Errorf("resize buffer: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-q.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	from, r := o.Cap, &resize{to: to, done: make(chan error, 1)}
	if from == to {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("resize buffer from %d to %d bytes: %w", from, to, err)
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		q.resized = &Resized{At: time.Now(), From: from, To: to, Dropped: r.dropped, Err: err}
	}()
	o.Cap = to
	if err := o.check(); err != nil {
		return err
	}
	if to < from {
		r.path = q.path + sizeSuffix
		if err := q.copyNewest(ctx, r.path, o); err != nil {
			return err
		}
	}
	q.mu.Lock()
	q.resize = r
	q.wake()
	q.mu.Unlock()
	select {
	case err = <-r.done:
		return err
	case <-q.done:
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.resize == r { // nobody has begun with it
		q.resize = nil
		if r.path != "" {
			err = ignoreNotExist(os.Remove(r.path))
		}
	}
	if q.err != nil {
		return errors.Join(q.err, err)
	}
	return errors.Join(ctx.Err(), err)
}

// Resizable says why Resize would refuse a size at once, nil when it would try.
func (q *Queue) Resizable(to int64) error {
	q.mu.Lock()
	o := q.o
	q.mu.Unlock()
	grows := to > o.Cap
	o.Cap = to - to%pageSize
	if err := o.check(); err != nil || !grows {
		return err
	}
	return spaceFor(q.path, o.Cap)
}

// Retain changes what is kept of acknowledged records, as Options do.
func (q *Queue) Retain(age time.Duration, bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.o.RetainAge, q.o.RetainBytes = max(age, 0), max(bytes, 0)
}

// copyNewest makes a file at path of the size in o with the newest chunks that fit, as far
// as they can be read. What leaves meanwhile, or comes, is the writer's business at the end.
func (q *Queue) copyNewest(ctx context.Context, path string, o Options) error {
	q.mu.Lock()
	live, s := slices.Clone(q.index.live()), q.state
	src := q.file.Load()
	q.mu.Unlock()
	room := o.limit(0)
	from := len(live)
	for ; from > 0 && uint64(live[from-1].pages) <= room; from-- {
		room -= uint64(live[from-1].pages)
	}
	var finds []find
	for _, e := range live[from:] {
		if f, err := findAt(src, e); err == nil {
			finds = append(finds, f)
		}
	}
	err := rebuild(ctx, path, o, s, src, finds, true)
	if noSpace(err) {
		// Both do not fit, but the data may: the space is set aside when the larger
		// one has gone.
		err = rebuild(ctx, path, o, s, src, finds, false)
	}
	return err
}

// findAt describes the chunk at e.
func findAt(f *os.File, e entry) (find, error) {
	var h [chunkHeader]byte
	at := int64(e.root)*pageSize + leafHeader
	if _, err := f.ReadAt(h[:], at); err != nil {
		return find{}, err
	}
	size := chunkHeader + int(binary.LittleEndian.Uint32(h[44:]))
	if size > int(e.pages)*pageSize {
		return find{}, errChunk
	}
	return find{seq: e.first, first: e.first, count: e.count, at: at, size: size}, nil
}

// resize does what is asked. An error that is returned is terminal; one that only means
// that the size stays goes to who has asked.
func (w *writer) resize(ctx context.Context, r *resize) error {
	if r.path == "" {
		r.done <- w.grow(r.to)
		return nil
	}
	refused, err := w.shrink(ctx, r)
	if refused != nil || err != nil {
		refused = errors.Join(refused, err, ignoreNotExist(os.Remove(r.path)))
	}
	r.done <- refused
	return err
}

// grow sets space aside behind the end of the file, and opens it again, as bbolt must
// never map less than it uses. A process that dies between leaves a file that is larger
// than it was, and that the next Open uses as that.
func (w *writer) grow(to int64) error {
	q := w.q
	if err := q.present(); err != nil {
		return err
	}
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := spaceFor(q.path, to); err != nil {
		return err
	}
	if err := preallocate(f, to); err != nil {
		return errors.Join(err, f.Truncate(q.o.Cap))
	}
	q.mu.Lock()
	q.o.Cap = to
	q.mu.Unlock()
	if w.db != nil {
		// The next transaction opens it. Should closing fail, that finds out more.
		_ = guarded(w.db.Close)
		w.db = nil
	}
	return nil
}

// shrink completes the smaller file and puts it in its place.
func (w *writer) shrink(ctx context.Context, r *resize) (refused, err error) {
	q := w.q
	dropped := uint64(0)
	defer func() {
		q.mu.Lock()
		q.target, r.dropped = 0, dropped
		q.mu.Unlock()
	}()
	var db *bolt.DB
	var roots []uint64
	for try := 0; db == nil; try++ {
		// What does not fit, or is damaged, leaves the old file first, as ever.
		q.mu.Lock()
		q.target = r.to
		lost := q.state.truncated + q.state.inDoubt()
		c := q.take(time.Now(), false)
		q.mu.Unlock()
		w.plan(c)
		if err := w.commit(ctx, c); err != nil {
			return nil, err
		}
		dropped += max(c.next.truncated+c.next.inDoubt(), lost) - lost
		w.forget(c)
		var bad []entry
		if db, roots, bad, refused = w.complete(ctx, r); refused != nil || try == maxRestores {
			return refused, nil
		}
		for _, e := range bad {
			q.mu.Lock()
			q.damagedChunk(&e, max(q.state.lease, q.ack)) // who may have it is not known here
			q.mu.Unlock()
		}
	}
	f, refused := os.Open(r.path)
	if refused == nil {
		refused = os.Rename(r.path, q.path)
	}
	if refused != nil {
		return errors.Join(refused, db.Close()), nil
	}
	old, oldFile := w.db, q.file.Load()
	w.db = db
	q.mu.Lock()
	q.o.Cap = r.to
	for i, root := range roots {
		q.index.live()[i].root = root
	}
	q.file.Store(f)
	q.mu.Unlock()
	if old != nil {
		_ = guarded(old.Close) // nothing is in it that is not in the new one
	}
	_ = oldFile.Close() // a read that is using it plans again
	if st, err := f.Stat(); err == nil && st.Size() < r.to {
		if w, err := os.OpenFile(q.path, os.O_RDWR, 0); err == nil {
			refused = errors.Join(preallocate(w, r.to), w.Close())
		}
	}
	return errors.Join(refused, syncDir(filepath.Dir(q.path))), nil
}

// complete makes the smaller file hold exactly what the queue holds, and returns where
// the chunks are in it, or those that cannot be copied because they are damaged.
func (w *writer) complete(ctx context.Context, r *resize) (db *bolt.DB, roots []uint64, bad []entry, err error) {
	q := w.q
	q.mu.Lock()
	live, s, src := slices.Clone(q.index.live()), q.state, q.file.Load()
	q.mu.Unlock()
	if db, err = openBolt(r.path, r.to); err != nil {
		return nil, nil, nil, err
	}
	db.NoSync = true // synced as a whole
	missing := make(map[uint64]entry, len(live))
	for _, e := range live {
		missing[e.first] = e
	}
	err = guarded(func() error {
		err := db.Update(func(tx *bolt.Tx) error {
			c := tx.Bucket(chunkBucket)
			var stale [][]byte
			err := c.ForEachBucket(func(k []byte) error {
				first := binary.BigEndian.Uint64(k)
				if _, ok := missing[first]; !ok {
					stale = append(stale, slices.Clone(k))
				}
				delete(missing, first)
				return nil
			})
			for _, k := range stale {
				err = errors.Join(err, c.DeleteBucket(k))
			}
			return errors.Join(err, tx.Bucket(metaBucket).Put(stateKey, s.encode(nil)))
		})
		if err != nil {
			return err
		}
		var finds []find
		for _, e := range live {
			if _, ok := missing[e.first]; !ok {
				continue
			}
			f, err := findAt(src, e)
			if err != nil && !errors.Is(err, errChunk) {
				return err
			}
			if err == nil {
				finds = append(finds, f)
			}
		}
		if err := fill(ctx, db, s, src, finds); err != nil {
			return err
		}
		return db.View(func(tx *bolt.Tx) error {
			c := tx.Bucket(chunkBucket)
			var key [8]byte
			for _, e := range live {
				binary.BigEndian.PutUint64(key[:], e.first)
				if b := c.Bucket(key[:]); b != nil {
					roots = append(roots, uint64(b.Root()))
				} else {
					bad = append(bad, e)
				}
			}
			return nil
		})
	})
	if err == nil && len(bad) == 0 {
		err = holdsChunks(r.path, len(live))
	}
	if err == nil {
		err = db.Sync()
	}
	if err != nil || len(bad) > 0 {
		return nil, nil, bad, errors.Join(err, guarded(db.Close))
	}
	db.NoSync = false
	return db, roots, nil, nil
}

// holdsChunks says whether the file at path accounts for what it holds, and that is n chunks.
func holdsChunks(path string, n int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := metaInForce(f, st.Size())
	if err == nil {
		err = m.walk(f, nil)
	}
	if err == nil {
		_, err = m.load(f, st.Size())
	}
	if found := len(m.chunks.live()); err == nil && found != n {
		err = fmt.Errorf("%d chunks of %d", found, n)
	}
	return err
}

// spaceFor says whether a file at path can have size bytes.
func spaceFor(path string, size int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &fs); err != nil {
		return fmt.Errorf("space of %s: %w", filepath.Dir(path), err)
	}
	if free, need := int64(fs.Bavail)*fs.Bsize, size-blocks(path); need > free {
		return fmt.Errorf("%s has %d bytes free and %d are needed: make room, or set a smaller buffer.cap", filepath.Dir(path), free, need)
	}
	return nil
}
