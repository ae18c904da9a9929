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
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// salvageStep bounds what one transaction takes over, and with it memory.
const salvageStep = 4 * mib

// find is a chunk in a file whose tree is not trusted: what its own header says,
// which its checksum vouches for.
type find struct {
	first, head uint64
	time        int64
	at          int64 // offset of the chunk's value
	size        int   // of header and frames
	count       uint32
}

func (f *find) last() uint64 { return f.first + uint64(f.count) - 1 }

// scan returns every intact chunk of a file, free pages included, in no order that
// matters. A chunk starts at a known place of a page, whatever the page header says.
func scan(ctx context.Context, f io.ReaderAt, size int64) (out []find, err error) {
	const window = 1 * mib
	buf := make([]byte, window+pageSize)
	var chunk []byte
	for base := int64(0); base < size; base += window {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := readSome(f, buf, base, size)
		if err != nil {
			return nil, err
		}
		for at := leafHeader; at+chunkHeader <= n && at < window; at += pageSize {
			h := buf[at:]
			if string(h[:4]) != chunkMagic {
				continue
			}
			total := int64(chunkHeader) + int64(binary.LittleEndian.Uint32(h[44:]))
			off := base + int64(at)
			if total > size-off || total > chunkHeader+2*maxFrame {
				continue
			}
			chunk = slices.Grow(chunk[:0], int(total))[:total]
			if _, err := f.ReadAt(chunk, off); err != nil {
				continue // a bad sector costs what it holds, and no more
			}
			c := find{
				first: binary.LittleEndian.Uint64(chunk[16:]), head: binary.LittleEndian.Uint64(chunk[24:]),
				time: int64(binary.LittleEndian.Uint64(chunk[32:])), count: binary.LittleEndian.Uint32(chunk[12:]),
				at: off, size: int(total),
			}
			if _, err := frames(chunk, c.first, c.count); err != nil || c.first == 0 || c.count == 0 || c.last() < c.first {
				continue
			}
			out = append(out, c)
		}
	}
	return out, nil
}

// readSome fills buf from off, page by page where the disk refuses; what it does
// not yield is zero.
func readSome(f io.ReaderAt, buf []byte, off, size int64) (int, error) {
	n := int(min(int64(len(buf)), size-off))
	b := buf[:n]
	if _, err := f.ReadAt(b, off); err == nil {
		return n, nil
	}
	for i := 0; i < n; i += pageSize {
		p := b[i:min(i+pageSize, n)]
		if _, err := f.ReadAt(p, off+int64(i)); err != nil {
			clear(p)
		}
	}
	return n, nil
}

// treeState returns the state that the meta page i leads to.
func treeState(f io.ReaderAt, size int64, i int) (*state, meta, error) {
	p := make([]byte, pageSize)
	if _, err := f.ReadAt(p, int64(i)*pageSize); err != nil {
		return nil, meta{}, err
	}
	m, err := parseMeta(p)
	if err != nil {
		return nil, meta{}, err
	}
	v, bucket, err := lookup(f, size, m.root, metaBucket)
	if err != nil {
		return nil, m, err
	}
	if !bucket || len(v) < bucketSize {
		return nil, m, errors.New("no bucket")
	}
	if root := binary.LittleEndian.Uint64(v); root != 0 {
		v, bucket, err = lookup(f, size, root, stateKey)
	} else {
		v, bucket, err = element(v[bucketSize:], stateKey)
	}
	if err != nil || bucket {
		return nil, m, errors.Join(errors.New("no state"), err)
	}
	s, err := decodeState(v)
	return s, m, err
}

// lookup finds key in the leaf id. The two buckets and the state are so few that
// their trees are never deeper.
func lookup(f io.ReaderAt, size int64, id uint64, key []byte) ([]byte, bool, error) {
	if id < 2 || id >= uint64(size)/pageSize {
		return nil, false, fmt.Errorf("page %d: out of bounds", id)
	}
	p := make([]byte, pageSize)
	if _, err := f.ReadAt(p, int64(id)*pageSize); err != nil {
		return nil, false, err
	}
	if more := uint64(binary.LittleEndian.Uint32(p[12:])); more > 0 && more <= 4*sidecarSlot/pageSize {
		p = make([]byte, (more+1)*pageSize)
		if _, err := f.ReadAt(p, int64(id)*pageSize); err != nil {
			return nil, false, err
		}
	}
	return element(p, key)
}

// element finds key among the elements of a leaf page.
func element(p, key []byte) (v []byte, bucket bool, err error) {
	if len(p) < pageHeader {
		return nil, false, errors.New("no page")
	}
	le := binary.LittleEndian
	count := int(le.Uint16(p[10:]))
	if le.Uint16(p[8:]) != leafPage || pageHeader+count*elemSize > len(p) {
		return nil, false, errors.New("not a leaf")
	}
	for i := range count {
		at := pageHeader + i*elemSize
		e := p[at:]
		pos, ksize, vsize := uint64(at)+uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		k, ok := slice(p, pos, ksize)
		if !ok || string(k) != string(key) {
			continue
		}
		v, ok := slice(p, pos+ksize, vsize)
		if !ok {
			return nil, false, errors.New("value out of bounds")
		}
		return v, le.Uint32(e)&bucketFlag != 0, nil
	}
	return nil, false, fmt.Errorf("no key %q", key)
}

// newest chooses the state to go on from: that of the sidecar, or that of the file
// where it can still be reached and is as new. It is exact when nothing can have been
// handed out that it does not know.
func newest(f io.ReaderAt, size int64, w witness) (s *state, exact bool) {
	var metas int
	var last meta
	for i := range 2 {
		t, m, err := treeState(f, size, i)
		if m.pages == 0 {
			continue
		}
		metas++
		if m.txid > last.txid || metas == 1 {
			last = m
			if err != nil {
				s, exact = nil, false
				continue
			}
			s, exact = t, true
		} else if s == nil && err == nil {
			s = t
		}
	}
	exact = exact && metas == 2
	switch {
	case w.state == nil:
	case s == nil, w.epoch == s.epoch && w.gen >= s.gen:
		s, exact = w.state, w.exact || exact && w.gen == s.gen
	case w.epoch == s.epoch:
		exact = exact || w.exact // a transaction that nobody has learned of
	case w.epoch > s.epoch: // an older file was put here; what comes is to sort above both
		s, exact = s.clone(), false
		s.epoch = w.epoch
	}
	return s, exact
}

// account returns the state of the file that the finds go to, and those of them
// that are live in it, in order. Whatever s knew to be live and is not among them is
// lost, and becomes part of a loss. When s is not exact a server may know records
// that s does not; then a new epoch begins, in which every find is new.
func account(s *state, exact bool, finds []find, now time.Time) (*state, []find) {
	if s == nil {
		s, exact = new(state), false
	}
	s = s.clone()
	known := s.last
	if exact {
		finds = slices.DeleteFunc(finds, func(f find) bool { return f.last() > known })
	}
	for _, f := range finds {
		s.last, s.head = max(s.last, f.last()), max(s.head, f.head)
	}
	// A transaction that came to nothing has left chunks whose seqs were given
	// again: of two that overlap the one written later is the one that counts.
	slices.SortFunc(finds, func(a, b find) int {
		return cmp.Or(cmp.Compare(b.head, a.head), cmp.Compare(b.time, a.time), cmp.Compare(a.at, b.at))
	})
	var keep []find
	for _, f := range finds {
		i, _ := slices.BinarySearchFunc(keep, f.first, func(k find, first uint64) int { return cmp.Compare(k.first, first) })
		if f.first < s.head || i > 0 && keep[i-1].last() >= f.first || i < len(keep) && keep[i].first <= f.last() {
			continue
		}
		keep = slices.Insert(keep, i, f)
	}
	var records uint64
	for _, f := range keep {
		records += uint64(f.count)
	}
	if !exact {
		return restart(s, keep, now)
	}
	s.ack(s.acked)
	before := s.reclaimed
	at := s.head
	if at == 0 { // version 1 did not tell
		at = 1 + s.gone()
	}
	for _, f := range append(slices.Clone(keep), find{first: s.last + 1}) {
		if f.first > at {
			s.miss(span{at, f.first - 1})
		}
		at = f.last() + 1
	}
	// What was deleted from the middle before, as damaged, and has been delivered
	// as a loss since, was counted then.
	if sum := s.gone() + records; sum > s.last {
		s.reclaimed -= min(sum-s.last, s.reclaimed-before)
	}
	if s.gone()+records != s.last {
		return restart(s, keep, now) // the state contradicts the chunks
	}
	s.salvaged += records
	return s, keep
}

// miss accounts for live records that are gone: like damage that a reader finds
// who cannot say what is under way.
func (s *state) miss(r span) {
	known := make([]span, 0, len(s.doubt)+len(s.losses))
	for _, d := range s.doubt {
		known = append(known, d.span)
	}
	for _, l := range s.losses {
		if l.exact() {
			known = append(known, span{l.First, l.Last})
		}
	}
	slices.SortFunc(known, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	for _, k := range known {
		if k.last < r.first || k.first > r.last {
			continue
		}
		if k.first > r.first {
			s.missAll(span{r.first, k.first - 1})
		}
		if r.first = k.last + 1; r.empty() {
			return
		}
	}
	s.missAll(r)
}

func (s *state) missAll(r span) { s.damage(r, max(s.lease, s.acked)) }

// restart begins a new epoch with the finds numbered anew. What is missing among
// them cannot be named, as nobody knows the numbers it had.
func restart(old *state, keep []find, now time.Time) (*state, []find) {
	keep = slices.DeleteFunc(keep, func(f find) bool { return f.last() <= old.acked })
	s := &state{epoch: mintEpoch(now), mark: old.mark, salvaged: old.salvaged, head: 1}
	if s.epoch <= old.epoch { // the clock was set back
		s.epoch = nextEpoch(old.epoch)
	}
	for i := range keep {
		f := &keep[i]
		f.first, s.last = s.last+1, s.last+uint64(f.count)
	}
	s.salvaged += s.last
	s.losses.add(Loss{Cause: CauseCorrupt})
	return s, keep
}

// nextEpoch returns an epoch just above e, which the clock has fallen behind.
func nextEpoch(e string) string {
	b := []byte(e)
	for i := len(b) - 1; i >= 0; i-- {
		switch b[i] {
		case 'f':
			b[i] = '0'
			continue
		case '9':
			b[i] = 'a'
		default:
			b[i]++
		}
		break
	}
	return string(b)
}

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
	update := func(fn func(m, c *bolt.Bucket) error) error {
		return db.Update(func(tx *bolt.Tx) error {
			m, err := tx.CreateBucketIfNotExists(metaBucket)
			if err != nil {
				return err
			}
			c, err := tx.CreateBucketIfNotExists(chunkBucket)
			if err != nil {
				return err
			}
			c.FillPercent = 1
			return fn(m, c)
		})
	}
	err = update(func(m, _ *bolt.Bucket) error { return m.Put(stateKey, s.encode(nil)) })
	for len(finds) > 0 && err == nil {
		if err = ctx.Err(); err != nil {
			break
		}
		err = update(func(_, c *bolt.Bucket) error {
			for size := 0; len(finds) > 0 && size < salvageStep; finds = finds[1:] {
				f := finds[0]
				buf := make([]byte, f.size) // bbolt keeps it until the commit
				if _, err := src.ReadAt(buf, f.at); err != nil {
					return fmt.Errorf("chunk at seq %d: %w", f.first, err)
				}
				if err := put(c, &chunk{buf: buf, first: f.first, count: f.count}, s.head, time.Unix(0, f.time)); err != nil {
					return err
				}
				size += f.size
			}
			return nil
		})
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

// put stores a chunk in its own bucket.
func put(c *bolt.Bucket, ch *chunk, head uint64, now time.Time) error {
	var key [8]byte
	binary.BigEndian.PutUint64(key[:], ch.first)
	b, err := c.CreateBucket(key[:])
	if err != nil {
		return err
	}
	if err := b.SetSequence(uint64(ch.count) | uint64(ch.pages())<<32); err != nil {
		return err
	}
	return b.Put(chunkKey, ch.seal(head, now))
}

// fit drops the oldest finds until the rest takes at most limit pages.
func fit(s *state, finds []find, limit uint64) []find {
	pages := uint64(0)
	of := func(f find) uint64 { return uint64(pagesFor(max(f.size, minChunk))) }
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
		in = src
		if finds, err = scan(ctx, src, st.Size()); err != nil {
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
					half += uint64(pagesFor(max(f.size, minChunk)))
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
