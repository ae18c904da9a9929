// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
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
	buf      []byte   // encoded state
	side     *sidecar
	restores int
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
		signal(q.room)
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

// end closes the file and says why to everybody who waits.
func (w *writer) end(err error) {
	q := w.q
	if w.db != nil {
		if cerr := w.db.Close(); cerr != nil && err == nil {
			err = fmt.Errorf("close %s: %w", q.path, cerr)
		}
	}
	if err == nil {
		err = ErrClosed
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.err = err
	// The descriptors go last: closing dir releases the lock.
	errs := []error{w.side.close(), q.file.Load().Close()}
	for _, f := range w.old {
		errs = append(errs, f.Close())
	}
	_ = errors.Join(append(errs, q.dir.Close())...)
}

// due says when the next commit is to start.
func (q *Queue) due() (time.Time, bool) {
	p := q.pending
	switch {
	case q.force, p.bytes >= q.o.CommitBytes:
		return time.Time{}, true
	case !p.empty():
		return p.due, true
	case !q.dirtyAt.IsZero():
		return q.dirtyAt.Add(idleInterval), true
	}
	return time.Time{}, false
}

// commit is one transaction in the making: a new state, the chunks that go and
// those that come. It is computed once and can be tried any number of times.
type commit struct {
	p       *pending
	next    *state
	drop    int      // leading chunks to delete
	damaged []uint64 // first seqs of damaged chunks to delete
	added   []entry
	resolve *uint64 // see Queue.resolve
	forfeit []Loss
	need    uint64 // pages
	now     time.Time
	durable time.Time // set by locate
	clean   bool      // last commit before a close: store the freelist
}

// take turns what is pending into a commit. Called with the lock held.
func (q *Queue) take(now time.Time, closing bool) *commit {
	p := q.pending
	q.pending, q.spare, q.inflight = q.spare, nil, p
	q.force, q.dirtyAt = false, time.Time{}

	c := &commit{p: p, now: now, clean: closing, resolve: q.resolve, forfeit: q.forfeits}
	q.forfeits = nil
	q.derive(c)
	return c
}

// derive computes what c does to the state as it is. It is called again when the
// state has changed in between, which only a restored file does.
func (q *Queue) derive(c *commit) {
	p, s := c.p, q.state.clone()
	s.gen++
	c.next, c.drop, c.damaged, c.need = s, 0, nil, 0

	// The order matters: what a reader has declared not to be under way is
	// decided before an acknowledgement of later records could cover it.
	if c.resolve != nil {
		s.resolve(*c.resolve)
	}
	for _, d := range q.damaged {
		if i, ok := q.index.find(d.first); ok {
			s.damage(q.index.live()[i].span(), d.after)
			c.damaged = append(c.damaged, d.first)
		}
	}
	s.ack(q.ack)
	for _, l := range c.forfeit {
		s.losses.add(l)
	}

	for i := range p.chunks {
		c.need += uint64(p.chunks[i].pages())
	}
	q.planDrops(c)
	for _, n := range p.names {
		for _, l := range n.losses {
			s.losses.name(l, n.seq)
		}
	}
	s.last += uint64(p.records)
	if p.mark != nil {
		s.mark = p.mark
	}
	q.planLease(c)
	q.planHead(c)
}

// planHead notes the oldest record that is live once c is durable.
func (q *Queue) planHead(c *commit) {
	c.next.head = c.next.last + 1 - uint64(c.p.records)
	if l := q.index.live(); c.drop < len(l) {
		c.next.head = l[c.drop].first
	}
}

// planDrops chooses the chunks that leave: acknowledged ones that retention no
// longer wants, then the oldest until the new ones fit.
func (q *Queue) planDrops(c *commit) {
	q.index.ack(q.ack, c.now)
	l, used := q.index.live(), q.index.pages
	tail := q.index.ackedPages
	limit := q.o.limit(c.need)
	expired := c.now.Add(-q.o.RetainAge).UnixNano()
	for c.drop < len(l) {
		e := &l[c.drop]
		fits := used+c.need <= limit
		retained := c.drop >= q.index.acked || e.at >= expired && int64(tail)*pageSize <= q.o.RetainBytes
		if fits && (retained || c.drop >= maxReclaim) {
			break
		}
		c.dropFront(e)
		used -= uint64(e.pages)
		tail -= min(tail, uint64(e.pages))
	}
}

// limit is the number of pages that chunks may take once need more are added.
func (o Options) limit(need uint64) uint64 {
	limit := int64(fillLimit*float64(o.Cap/pageSize)) - sparePages - 2*int64(need)
	return uint64(max(limit, int64(need)))
}

// dropFront adds the oldest chunk that is still there to the drops.
func (c *commit) dropFront(e *entry) {
	c.drop++
	if slices.Contains(c.damaged, e.first) {
		return // accounted for as damage, and deleted as that
	}
	c.next.drop(e.span())
}

// planLease lets the reader go on when it has been given all it may have. The
// step bounds the records whose fate is open when the process dies.
func (q *Queue) planLease(c *commit) {
	s := c.next
	if !q.waiting && q.handed < s.lease {
		return
	}
	step := uint64(min(max(q.o.Cap/16, 256*kib), 8*mib) / pageSize)
	extend := func(last uint64, pages uint32) bool {
		if last > s.lease {
			s.lease = last
			step -= min(step, uint64(pages))
		}
		return step > 0
	}
	l := q.index.live()
	for _, e := range l[max(c.drop, q.index.above(s.lease)):] {
		if !extend(e.last(), e.pages) {
			return
		}
	}
	for i := range c.p.chunks {
		if !extend(c.p.chunks[i].last(), c.p.chunks[i].pages()) {
			return
		}
	}
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
			if err := w.restore(ctx, c, err); err != nil {
				return err
			}
			continue
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

// try runs the transaction. After an error whose effect on the disk is unknown
// the file is reopened, which tells.
func (w *writer) try(c *commit) error {
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
	for extra := 1; errors.Is(err, berrors.ErrMaxSizeReached); extra *= 2 {
		// The ring is more fragmented than the limit provides for. Free
		// more first: pages are reusable one transaction later.
		if err = w.makeRoom(c, extra); err == nil {
			err = w.update(c)
		}
	}
	if err == nil && q.o.afterCommit != nil {
		err = q.o.afterCommit()
	}
	if err == nil {
		return nil
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

// present says whether the file is still there as it has to be, before the mapping
// is touched: to read in it behind the end of a file that was cut kills a process.
func (q *Queue) present() error {
	st, err := q.file.Load().Stat()
	if err != nil {
		return err
	}
	if st.Size() < q.o.Cap {
		return fmt.Errorf("%w: somebody cut %s to %d bytes", ErrDamaged, q.path, st.Size())
	}
	named, err := os.Stat(q.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: somebody removed %s", ErrDamaged, q.path)
	case err != nil:
		return err
	case !os.SameFile(st, named):
		return fmt.Errorf("%w: somebody replaced %s", ErrDamaged, q.path)
	}
	return nil
}

// restore replaces a file that was damaged in use, and plans c anew for the state
// that the new one is in. What is in memory says exactly what there was.
func (w *writer) restore(ctx context.Context, c *commit, cause error) error {
	q := w.q
	if w.restores++; w.restores > maxRestores {
		return cause
	}
	if w.db != nil {
		// Its descriptor is not the one that is read here, so an error is no matter.
		_ = guarded(w.db.Close)
		w.db = nil
	}
	q.mu.Lock()
	s := q.state
	q.mu.Unlock()
	src := q.file.Load()
	if err := q.restore(ctx, src, s, true, cause); err != nil {
		return errors.Join(cause, err)
	}
	db, s, x, _, err := q.load()
	if err != nil {
		return errors.Join(cause, err)
	}
	if s.epoch != c.next.epoch {
		// Whoever uses the queue knows one epoch only; the next start goes on.
		return errors.Join(cause, errors.New("the state contradicts the chunks"), db.Close())
	}
	f, err := os.Open(q.path)
	if err != nil {
		return errors.Join(cause, err, db.Close())
	}
	w.old = append(w.old, src)
	w.db = db
	w.note(s)
	q.mu.Lock()
	q.metrics.truncations.Add(float64(s.truncated - q.state.truncated))
	q.metrics.corrupt.Add(float64(s.corrupt - q.state.corrupt))
	q.metrics.salvaged.Add(float64(s.salvaged - q.state.salvaged))
	q.state, q.index, q.damaged = s, x, nil
	q.quarantined = quarantined(q.path)
	q.index.ack(q.ack, time.Now())
	q.file.Store(f)
	q.derive(c)
	q.mu.Unlock()
	q.dateOldest()
	return nil
}

// note copies the state to the sidecar. Where that fails the sidecar is made void: it
// must not be taken for newer than it is.
func (w *writer) note(s *state) {
	if err := w.side.write(s, time.Now()); err != nil {
		w.q.metrics.errors.WithLabelValues(opNote).Inc()
		_ = w.side.f.Truncate(0)
	}
}

// reopen finds out what is on disk after an error: done when c is. The old
// handle is not used again, as a failed fsync leaves it without meaning.
func (w *writer) reopen(c *commit) (done bool, err error) {
	q := w.q
	defer func() {
		if err != nil {
			q.metrics.errors.WithLabelValues(opReopen).Inc()
			err = fmt.Errorf("reopen: %w", err)
		}
	}()
	if w.db != nil {
		db := w.db
		w.db = nil
		if err := db.Close(); err != nil {
			return false, err
		}
	}
	if err := dropCache(q.file.Load()); err != nil {
		return false, err
	}
	db, s, _, _, err := q.load()
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return false, err
	}
	if s.epoch == c.next.epoch && s.gen+1 == c.next.gen {
		w.db = db
		return false, nil
	}
	if s.epoch == c.next.epoch && s.gen == c.next.gen {
		w.db = db
		return true, db.View(func(tx *bolt.Tx) error { return c.locate(tx.Bucket(chunkBucket)) })
	}
	return false, errors.Join(fmt.Errorf("%w: transaction %d of epoch %s on disk, expected %d of %s",
		ErrDamaged, s.gen, s.epoch, c.next.gen-1, c.next.epoch), db.Close())
}

// update is the transaction proper.
func (w *writer) update(c *commit) error {
	q := w.q
	return guarded(func() error {
		w.db.NoFreelistSync = !c.clean
		err := w.db.Update(func(tx *bolt.Tx) error { return w.apply(tx, c) })
		if c.clean && errors.Is(err, berrors.ErrMaxSizeReached) {
			// No run of pages for the freelist: do without.
			w.db.NoFreelistSync = true
			err = w.db.Update(func(tx *bolt.Tx) error { return w.apply(tx, c) })
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
		if err := b.DeleteBucket(key[:]); !errors.Is(err, berrors.ErrBucketNotFound) {
			return err
		}
		return nil
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
		binary.BigEndian.PutUint64(key[:], ch.first)
		nb, err := b.CreateBucket(key[:])
		if err != nil {
			return err
		}
		if err := nb.SetSequence(uint64(ch.count) | uint64(ch.pages())<<32); err != nil {
			return err
		}
		if err := nb.Put(chunkKey, ch.seal(c.next.head, c.now)); err != nil {
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

// makeRoom frees what c would free, and extra chunks more, in a transaction of
// its own.
func (w *writer) makeRoom(c *commit, extra int) error {
	q := w.q
	q.mu.Lock()
	live := q.index.live()
	if c.drop == len(live) && extra > 1 {
		q.mu.Unlock()
		return fmt.Errorf("commit to %s: no room for %d pages in an empty file", q.path, c.need)
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
	q.mu.Unlock()
	if err := w.update(room); err != nil {
		return err
	}
	w.publish(room)
	c.drop, c.damaged = 0, nil
	c.next.gen++
	return nil
}

func unnameAbove(l losses, seq uint64) losses {
	l.unname(span{seq + 1, ^uint64(0)})
	return l
}

// publish makes the committed state the one that everybody sees.
func (w *writer) publish(c *commit) {
	q := w.q
	w.note(c.next)
	q.mu.Lock()
	old := q.state
	q.state = c.next
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
		q.recyclePending(c.p)
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
		done := f.seq <= c.next.last && f.gen <= c.next.gen
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
	var p [leafHeader + chunkHeader]byte
	if _, err := q.file.Load().ReadAt(p[:], int64(root)*pageSize); err != nil {
		return // the reader will meet the error, and report it
	}
	at := int64(binary.LittleEndian.Uint64(p[leafHeader+32:]))
	q.mu.Lock()
	defer q.mu.Unlock()
	if i, ok := q.index.find(first); ok && q.index.live()[i].at == 0 {
		q.index.live()[i].at = at
	}
}

// signal puts a token into a channel of one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
