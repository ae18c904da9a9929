// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	backoffMin = 10 * time.Millisecond
	backoffMax = time.Second

	// Chunks that leave in one transaction without need, so that a backlog
	// acknowledged at once does not stall a commit.
	maxReclaim = 128

	// Deleted chunks between two calls of forget.
	forgetAfter = 32

	// How often a transaction is tried once the queue is being closed.
	maxCloseTries = 6

	// How often a damaged file is replaced while the queue is open.
	maxRestores = 3
)

// writer is the one goroutine that changes the file.
type writer struct {
	q        *Queue
	db       *bolt.DB // nil after a failed reopen
	seal     *sealer  // of db, or of one before it
	buf      []byte   // encoded state
	side     *sidecar // nil while there is no space for it
	boot     [16]byte
	encoder  *encoder
	restores int
	faults   int        // times in a row that the disk has refused to read the file back
	old      []*os.File // of files that were replaced; a read may still use them
	touched  int        // chunks deleted since the mapping was last forgotten
}

// run commits what is due until the queue is closed.
func (w *writer) run(ctx context.Context) {
	q := w.q
	defer close(q.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		q.mu.Lock()
		now := time.Now()
		if r := q.resize; r != nil && !q.closing {
			q.resize = nil
			q.mu.Unlock()
			if err := w.resize(ctx, r); err != nil {
				w.end(err)
				return
			}
			continue
		}
		due, ok := q.due()
		closing := q.closing
		if !closing && (!ok || due.After(now)) {
			q.mu.Unlock()
			var expired <-chan time.Time
			if ok {
				timer.Reset(due.Sub(now))
				expired = timer.C
			}
			select {
			case <-q.kick:
			case <-expired:
			case <-q.stop:
			}
			continue
		}
		c := q.take(now, closing)
		q.mu.Unlock()
		w.plan(c)
		if err := w.commit(ctx, c); err != nil {
			w.end(err)
			return
		}
		w.forget(c)
		if closing {
			w.end(nil)
			return
		}
	}
}

// plan completes c by what takes long, without the lock, and by what it does to the state.
func (w *writer) plan(c *commit) {
	q := w.q
	signal(q.room)
	w.encoder.pack(c.p)
	q.mu.Lock()
	q.derive(c)
	q.mu.Unlock()
}

// end closes the file and says why to everybody who waits.
func (w *writer) end(err error) {
	q := w.q
	if w.db != nil {
		if cerr := w.db.Close(); cerr != nil && err == nil {
			err = fmt.Errorf("close %s: %w", q.path, cerr)
		}
	}
	if err == nil && w.side != nil {
		if m, err := w.seal.meta(); err == nil {
			w.side.vouch(m.txid)
		}
	}
	if err == nil {
		err = ErrClosed
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.err = err
	// The descriptors go last: closing dir releases the lock.
	errs := []error{w.side.close(), w.seal.close(), q.file.Load().Close()}
	for _, f := range w.old {
		errs = append(errs, f.Close())
	}
	_ = errors.Join(append(errs, q.dir.Close())...)
}

// commit makes c durable, however often that has to be tried. The error is
// terminal: the file is damaged, or the queue is closing and the disk refuses.
func (w *writer) commit(ctx context.Context, c *commit) error {
	q := w.q
	backoff, closeTries := backoffMin, 0
	for {
		start := time.Now()
		err := w.try(c)
		if err == nil {
			q.metrics.commits.Inc()
			q.metrics.commitSeconds.Observe(time.Since(start).Seconds())
			if c.p.records > 0 {
				q.metrics.appendSeconds.Observe(time.Since(c.p.since).Seconds())
			}
			w.publish(c)
			return nil
		}
		q.metrics.errors.WithLabelValues(opCommit).Inc()
		q.mu.Lock()
		if q.commitAt.err == nil {
			q.commitAt.since = time.Now()
		}
		q.commitAt.err = err
		stop := q.stop
		if q.closing {
			stop = nil
			closeTries++
		}
		q.mu.Unlock()
		if errors.Is(err, ErrDamaged) {
			if err = w.restore(ctx, c, err); err == nil {
				continue
			}
			if !noSpace(err) {
				return err
			}
			w.restores-- // there may be space later, and what is in memory can wait
			q.mu.Lock()
			q.commitAt.err = err
			q.mu.Unlock()
		}
		if closeTries == maxCloseTries {
			return err
		}
		select {
		case <-time.After(backoff):
		case <-stop:
		}
		backoff = min(2*backoff, backoffMax)
	}
}

// try runs the transaction of c, and before it one that makes room where there is none.
func (w *writer) try(c *commit) error {
	for extra := 1; ; {
		tx := cmp.Or(c.room, c)
		err := w.attempt(tx)
		switch {
		case errors.Is(err, berrors.ErrMaxSizeReached):
			// The ring is more fragmented than the limit provides for. Free
			// more first: pages are reusable one transaction later.
			if c.room = w.planRoom(c, extra); c.room == nil {
				return fmt.Errorf("commit to %s: no room for %d pages in an empty file", w.q.path, c.need)
			}
			extra *= 2
		case err != nil || tx == c:
			return err
		default:
			w.publish(tx)
			c.drop, c.damaged, c.room = 0, nil, nil
			c.next.gen++ // c is the transaction after it
		}
	}
}

// attempt runs one transaction. After an error whose effect on the disk is unknown the file
// is reopened, which tells.
func (w *writer) attempt(c *commit) error {
	q := w.q
	if w.db == nil {
		done, err := w.reopen(c)
		if done || err != nil {
			return err
		}
	}
	if q.o.BeforeCommit != nil {
		if err := q.o.BeforeCommit(); err != nil {
			return err
		}
	}
	if err := q.present(); err != nil {
		return err
	}
	err := w.update(c)
	if err == nil && q.o.afterCommit != nil {
		err = q.o.afterCommit()
	}
	if err == nil || errors.Is(err, berrors.ErrMaxSizeReached) {
		return err
	}
	if errors.Is(err, ErrDamaged) {
		// bbolt panicked; its locks may be held, so it cannot even be closed.
		w.db = nil
		return err
	}
	done, rerr := w.reopen(c)
	if done && rerr == nil {
		q.metrics.errors.WithLabelValues(opCommit).Inc()
		return nil
	}
	return errors.Join(err, rerr)
}

// update is the transaction proper.
func (w *writer) update(c *commit) error {
	q := w.q
	if w.seal == nil || w.seal.db != w.db {
		s, err := newSealer(q.path, w.db)
		if err != nil {
			return fmt.Errorf("commit to %s: %w", q.path, err)
		}
		_ = w.seal.close() // it has nothing to write
		w.seal = s
	}
	return guarded(func() error {
		w.db.NoSync, w.db.NoFreelistSync = w.seal.sealed, !c.clean
		err := w.transact(func(tx *bolt.Tx) error { return w.apply(tx, c) })
		if c.clean && errors.Is(err, berrors.ErrMaxSizeReached) {
			// No run of pages for the freelist: do without.
			w.db.NoFreelistSync = true
			err = w.transact(func(tx *bolt.Tx) error { return w.apply(tx, c) })
		}
		if err == nil {
			err = w.seal.sync(c.next.last + 1 - uint64(c.p.records))
		}
		if err != nil {
			return fmt.Errorf("commit to %s: %w", q.path, err)
		}
		return w.db.View(func(tx *bolt.Tx) error { return c.locate(tx.Bucket(chunkBucket)) })
	})
}

// apply deletes what goes, stores what comes, and the state.
func (w *writer) apply(tx *bolt.Tx, c *commit) error {
	m, b := tx.Bucket(metaBucket), tx.Bucket(chunkBucket)
	b.FillPercent = 1 // keys only ever ascend
	live := w.q.index.live()
	var key [8]byte
	remove := func(first uint64) error {
		binary.BigEndian.PutUint64(key[:], first)
		chunk := b.Bucket(key[:])
		if chunk == nil {
			return nil
		}
		e, err := entryOf(chunk, key[:]) // as the tree has it, and no page of it was looked at
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if err := w.mend(&e, true); err != nil {
			return err
		}
		return b.DeleteBucket(key[:])
	}
	for i := range live[:c.drop] {
		if err := remove(live[i].first); err != nil {
			return err
		}
	}
	for _, first := range c.damaged {
		if err := remove(first); err != nil {
			return err
		}
	}
	for i := range c.p.chunks {
		ch := &c.p.chunks[i]
		if err := put(b, ch.first, ch.count, ch.seal(c.next.head, c.now)); err != nil {
			return err
		}
	}
	w.buf = c.next.encode(w.buf[:0])
	return m.Put(stateKey, w.buf)
}

// locate notes where the new chunks are.
func (c *commit) locate(b *bolt.Bucket) error {
	c.added, c.durable = c.added[:0], time.Now()
	var key [8]byte
	for i := range c.p.chunks {
		binary.BigEndian.PutUint64(key[:], c.p.chunks[i].first)
		nb := b.Bucket(key[:])
		if nb == nil {
			return fmt.Errorf("%w: chunk at seq %d is not there after its commit", ErrDamaged, c.p.chunks[i].first)
		}
		e, err := entryOf(nb, key[:])
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		e.at = c.durable.UnixNano()
		c.added = append(c.added, e)
	}
	return nil
}

// forget gives back the pages that bbolt's mapping has drawn in. Deleting a
// chunk looks at its first page there, and the kernel maps a whole folio for
// it: over time the process would seem to use as much memory as the file has.
func (w *writer) forget(c *commit) {
	if w.touched += c.drop; w.touched < forgetAfter || w.db == nil {
		return
	}
	w.touched = 0
	// Advice; a kernel that refuses it changes nothing but a number.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, w.db.Info().Data, uintptr(w.q.o.Cap), unix.MADV_DONTNEED)
}

// planRoom plans a transaction of its own that frees what c would free, and extra chunks
// more; nil when there are none.
func (w *writer) planRoom(c *commit, extra int) *commit {
	q := w.q
	q.mu.Lock()
	defer q.mu.Unlock()
	live := q.index.live()
	if c.drop == len(live) && extra > 1 {
		return nil
	}
	// The same state, less the records, leases and marks that come with them.
	records := uint64(c.p.records)
	for range extra {
		if c.drop < len(live) {
			c.dropFront(&live[c.drop])
		}
	}
	s := c.next.clone()
	s.last -= records
	s.mark = q.state.mark
	s.lease = min(s.lease, s.last)
	s.losses = unnameAbove(s.losses, s.last)
	room := &commit{p: new(pending), next: s, drop: c.drop, damaged: c.damaged, now: c.now}
	q.planHead(room)
	c.next.head = s.head
	return room
}

func unnameAbove(l losses, seq uint64) losses {
	l.unname(span{seq + 1, ^uint64(0)}, 0)
	return l
}

// publish makes the committed state the one that everybody sees.
func (w *writer) publish(c *commit) {
	q := w.q
	w.note(c.next)
	q.mu.Lock()
	old := q.state
	q.state = c.next
	q.given = slices.DeleteFunc(q.given, func(seq uint64) bool { return !slices.Contains(c.next.given, seq) && slices.Contains(c.given, seq) })
	q.index.popFront(c.drop)
	for _, first := range c.damaged {
		q.index.remove(first)
	}
	for _, e := range c.added {
		q.index.push(e)
	}
	q.damaged = slices.DeleteFunc(q.damaged, func(d damage) bool {
		_, live := q.index.find(d.first)
		return !live
	})
	q.commitAt = commitError{}
	q.metrics.truncations.Add(float64(c.next.truncated - old.truncated))
	q.metrics.corrupt.Add(float64(c.next.corrupt - old.corrupt))
	if c.p == q.inflight {
		q.inflight = nil
		w.encoder.release(c.p)
		q.recyclePending(c.p)
	}
	if c.next.epoch != old.epoch {
		q.handed = c.next.base
	}
	mark := c.next.mark
	q.mu.Unlock()
	q.dateOldest()
	signal(q.readable)
	if q.o.Committed != nil {
		q.o.Committed(mark)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.flushes = slices.DeleteFunc(q.flushes, func(f flush) bool {
		done := f.seq <= c.next.last && f.commit <= q.committed()
		if done {
			close(f.done)
		}
		return done
	})
}

// dateOldest learns from the disk how old the oldest unsent chunk is, where
// this process has not written it itself.
func (q *Queue) dateOldest() {
	q.mu.Lock()
	e := q.index.oldestUnsent()
	if e == nil || e.at != 0 {
		q.mu.Unlock()
		return
	}
	first, root := e.first, e.root
	q.mu.Unlock()
	at, _ := writtenAt(q.file.Load(), root)
	if at == 0 {
		return // the reader will meet the error, and report it
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i, ok := q.index.find(first); ok && q.index.live()[i].at == 0 {
		q.index.live()[i].at = at
	}
}

// writtenAt is when the chunk at page root was written, 0 when that cannot be read, and
// how it is compressed.
func writtenAt(f io.ReaderAt, root uint64) (at int64, codec byte) {
	var p [leafHeader + chunkHeader]byte
	if _, err := f.ReadAt(p[:], int64(root)*pageSize); err != nil {
		return 0, 0
	}
	return int64(binary.LittleEndian.Uint64(p[leafHeader+32:])), p[leafHeader+9]
}

// signal puts a token into a channel of one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
