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
	"golang.org/x/sys/unix"
)

// rebuild makes a new file at path with state s and the finds, which it reads from
// src. The caller puts it in its place. Without blocks set aside it takes only the
// space of what it holds.
func rebuild(ctx context.Context, path string, o Options, s *state, src io.ReaderAt, finds []find, blocks bool) (err error) {
	if err := ignoreNotExist(os.Remove(path)); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreNotExist(os.Remove(path)))
		}
	}()
	db, err := openBolt(path, o.Cap)
	if err != nil {
		return err
	}
	db.NoSync = true // synced as a whole, before it gets its name
	err = db.Update(func(tx *bolt.Tx) error {
		m, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if err := m.Put(stateKey, s.encode(nil)); err != nil {
			return err
		}
		_, err = tx.CreateBucket(chunkBucket)
		return err
	})
	if err == nil {
		err = fill(ctx, db, s, src, finds)
	}
	if err == nil {
		err = db.Sync()
	}
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	if !blocks {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(preallocate(f, o.Cap), f.Close())
}

// fill copies the finds from src to db, each as it was written, save for its seq and head.
// One that is not intact any more is left out: whoever calls knows what has to be there.
func fill(ctx context.Context, db *bolt.DB, s *state, src io.ReaderAt, finds []find) error {
	for len(finds) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := db.Update(func(tx *bolt.Tx) error {
			c := tx.Bucket(chunkBucket)
			c.FillPercent = 1
			for size := 0; len(finds) > 0 && size < salvageStep; finds = finds[1:] {
				f := finds[0]
				buf := make([]byte, f.size, max(f.size, minChunk)) // bbolt keeps it until the commit
				if _, err := src.ReadAt(buf, f.at); err != nil {
					return fmt.Errorf("chunk at seq %d: %w", f.first, err)
				}
				if holds(buf, f.seq, f.count) != nil {
					continue
				}
				if err := put(c, f.first, f.count, restamp(buf, f.first, s.head)); err != nil {
					return err
				}
				size += f.size
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// put stores a chunk in its own bucket.
func put(c *bolt.Bucket, first uint64, count uint32, v []byte) error {
	var key [8]byte
	binary.BigEndian.PutUint64(key[:], first)
	b, err := c.CreateBucket(key[:])
	if err != nil {
		return err
	}
	if err := b.SetSequence(uint64(count) | uint64(pagesFor(len(v)))<<32); err != nil {
		return err
	}
	return b.Put(chunkKey, v)
}

// fit drops the oldest finds until the rest takes at most limit pages.
func fit(s *state, finds []find, limit uint64) []find {
	pages := uint64(0)
	of := func(f find) uint64 { return uint64(f.pages()) }
	for _, f := range finds {
		pages += of(f)
	}
	for len(finds) > 0 && pages > limit {
		f := finds[0]
		s.drop(span{f.first, f.last()})
		pages, finds = pages-of(f), finds[1:]
		if s.head = s.last + 1; len(finds) > 0 {
			s.head = finds[0].first
		}
	}
	return finds
}

// restore replaces the file by a new one with everything of the old that is intact,
// and sets the old one aside. src is the old file, nil when it is not there.
//
// At no moment is there no file under the name: a process that dies here does the
// same again.
func (q *Queue) restore(ctx context.Context, src *os.File, s *state, exact bool, cause error) error {
	var finds []find
	var in io.ReaderAt
	if src != nil {
		st, err := src.Stat()
		if err != nil {
			return err
		}
		in = q.o.reads(src)
		if finds, err = scan(ctx, in, st.Size()); err != nil {
			return err
		}
	}
	now := time.Now()
	before := s
	s, finds = account(s, exact, finds, now)
	finds = fit(s, finds, q.o.limit(0))
	aside, keep := "", true
	tmp := q.path + newSuffix
	err := rebuild(ctx, tmp, q.o, s, in, finds, true)
	if noSpace(err) {
		// Older evidence makes room for newer; failing that the damaged file
		// itself, and at last its oldest records.
		if err = prune(q.path, 0, 0); err == nil {
			err = rebuild(ctx, tmp, q.o, s, in, finds, true)
		}
		for keep = !noSpace(err); noSpace(err); {
			if err = rebuild(ctx, tmp, q.o, s, in, finds, false); noSpace(err) && len(finds) > 0 {
				half := uint64(0)
				for _, f := range finds[len(finds)-len(finds)/2:] {
					half += uint64(f.pages())
				}
				finds = fit(s, finds, half)
			} else {
				break
			}
		}
	}
	if err != nil {
		return fmt.Errorf("salvage into %s: %w", tmp, err)
	}
	if keep {
		if aside, err = quarantine(q.path, now, q.o.Cap); err != nil {
			return errors.Join(err, os.Remove(tmp))
		}
	}
	if err := os.Rename(tmp, q.path); err != nil {
		return err
	}
	q.mu.Lock()
	q.recovery = &Recovery{At: now, Cause: cause, Aside: aside, Exact: before != nil && s.epoch == before.epoch, Salvaged: s.salvaged}
	if before != nil {
		q.recovery.Salvaged -= before.salvaged
		if q.recovery.Exact {
			q.recovery.Lost = s.corrupt - before.corrupt
		}
	}
	q.mu.Unlock()
	return syncDir(filepath.Dir(q.path))
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
	s, known := q.state, q.state.epoch
	q.mu.Unlock()
	src := q.file.Load()
	if err := q.restore(ctx, src, s, true, cause); err != nil {
		return errors.Join(cause, err)
	}
	db, s, x, _, err := q.load(witness{})
	if err != nil {
		return errors.Join(cause, err)
	}
	if s.epoch != known {
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
	var err error
	if w.side == nil { // there was no space for it
		if w.side, err = openSidecar(w.q.o.Dir, witness{}, w.boot); err == nil {
			w.q.mu.Lock()
			w.q.hazards = slices.DeleteFunc(slices.Clone(w.q.hazards), func(h Hazard) bool { return h.What == noSidecar })
			w.q.mu.Unlock()
		}
	}
	if err == nil {
		if err = w.side.write(s, time.Now()); err != nil {
			_ = w.side.f.Truncate(0)
		}
	}
	if err != nil {
		w.q.metrics.errors.WithLabelValues(opNote).Inc()
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
	// What the failed sync has left dirty is written now; what it has lost, as a kernel
	// may, shows when the file is read from the disk.
	if err := unix.Fdatasync(int(q.file.Load().Fd())); err != nil {
		return false, err
	}
	if err := dropCache(q.file.Load()); err != nil {
		return false, err
	}
	q.mu.Lock()
	known := witness{state: q.state, exact: true} // the next may be of another epoch
	q.mu.Unlock()
	db, s, _, _, err := q.load(known)
	if errors.Is(err, syscall.EIO) {
		w.faults++
	} else {
		w.faults = 0
	}
	if errors.Is(err, os.ErrNotExist) || w.faults >= maxReadFaults {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
		w.faults = 0
	}
	if err != nil {
		return false, err
	}
	if s.epoch == known.epoch && s.gen+1 == c.next.gen {
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
