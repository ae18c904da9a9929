// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// salvageStep bounds what one transaction takes over, and with it memory.
const salvageStep = 4 * mib

// find is a chunk in a file whose tree is not trusted: what its own header says,
// which its checksum vouches for.
type find struct {
	seq         uint64 // first, as the header has it; a new epoch gives another
	first, head uint64
	time        int64
	at          int64 // offset of the chunk's value
	size        int   // of header and frames
	count       uint32
}

func (f *find) last() uint64 { return f.first + uint64(f.count) - 1 }

func (f *find) pages() uint32 { return pagesFor(max(f.size, minChunk)) }

func (f *find) entry() entry {
	return entry{first: f.first, count: f.count, pages: f.pages(), root: uint64(f.at-leafHeader) / pageSize}
}

// scan returns every intact chunk of a file, free pages included, in no order that
// matters. A chunk starts at a known place of a page, whatever the page header says.
func scan(ctx context.Context, f io.ReaderAt, size int64) (out []find, err error) {
	const window = 1 * mib
	buf := make([]byte, window+pageSize)
	var chunk, raw []byte
	var codec decoder
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
			if total > size-off || total > maxChunk {
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
			c.seq = c.first
			b, err := codec.frames(raw[:0], chunk, c.first, c.count)
			if err == nil && chunk[9] != codecNone {
				raw = b
			}
			if err != nil || c.first == 0 || c.count == 0 || c.last() < c.first {
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
	s, err := stateAt(f, size, m)
	return s, m, err
}

// stateAt returns the state that m leads to.
func stateAt(f io.ReaderAt, size int64, m meta) (*state, error) {
	v, bucket, err := lookup(f, size, m.root, metaBucket)
	if err != nil {
		return nil, err
	}
	if !bucket || len(v) < bucketSize {
		return nil, errors.New("no bucket")
	}
	if root := binary.LittleEndian.Uint64(v); root != 0 {
		v, bucket, err = lookup(f, size, root, stateKey)
	} else {
		v, bucket, err = element(v[bucketSize:], stateKey)
	}
	if err != nil || bucket {
		return nil, errors.Join(errors.New("no state"), err)
	}
	return decodeState(v)
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
	if more := uint64(binary.LittleEndian.Uint32(p[12:])); more > 0 && more < maxChunkPages {
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
	if m, err := metaInForce(f, size); err == nil && m.other != nil && m.check(f) != nil {
		exact = false // what its transaction has left may be of an older one
	}
	switch {
	case w.state == nil:
	case s == nil, w.epoch == s.epoch && w.gen >= s.gen:
		s, exact = w.state, w.exact || exact && w.gen == s.gen
	case w.epoch == s.epoch && w.exact && s.gen == w.gen+1:
		// Nobody has learned of that transaction, and it may not be whole: the one that was
		// being written takes pages of a tree that an older meta page leads to.
		s, exact = w.state, true
	case w.epoch == s.epoch:
		exact = exact || w.exact
	case w.epoch > s.epoch: // an older file was put here; what comes is to sort above both
		s, exact = s.clone(), false
		s.epoch = w.epoch
	}
	return s, exact
}

// current returns those finds that are live by what s and they themselves say, in
// order, and has s reach as far as they do.
func current(s *state, exact bool, finds []find) (keep []find) {
	known := s.last
	if exact {
		finds = slices.DeleteFunc(finds, func(f find) bool { return f.last() > known })
	}
	for _, f := range finds {
		s.last = max(s.last, f.last())
		// An exact state knows better: a transaction that came to nothing may have
		// meant to drop more than the next one did.
		if !exact || s.head == 0 {
			s.head = max(s.head, f.head)
		}
	}
	// It has also left chunks whose seqs were given again: of two that overlap the
	// one written later is the one that counts.
	slices.SortFunc(finds, func(a, b find) int {
		return cmp.Or(cmp.Compare(b.time, a.time), cmp.Compare(b.head, a.head), cmp.Compare(a.at, b.at))
	})
	for _, f := range finds {
		i, _ := slices.BinarySearchFunc(keep, f.first, func(k find, first uint64) int { return cmp.Compare(k.first, first) })
		if f.first < s.head || i > 0 && keep[i-1].last() >= f.first || i < len(keep) && keep[i].first <= f.last() {
			continue
		}
		keep = slices.Insert(keep, i, f)
	}
	return keep
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
	keep := current(s, exact, finds)
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
	var known []span
	for _, l := range s.losses.spans() {
		known = append(known, l.without(s.givenUp())...) // which are live nevertheless
	}
	for _, d := range s.doubt {
		known = append(known, d.span)
	}
	for _, rest := range r.without(known) {
		s.damage(rest, max(s.lease, s.acked))
	}
}

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
