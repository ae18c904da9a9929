// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"cmp"
	"slices"
)

// The causes of losses that the buffer itself finds.
const (
	CauseTruncated = "truncated" // dropped, oldest first, to stay within the cap
	CauseCorrupt   = "corrupt"   // damaged on disk
)

// Loss is a range of records that will never be delivered. Count is the number
// of records; it is Last-First+1 except where ranges had to be joined to keep
// the list bounded. First and Last are zero where the records are of an earlier epoch,
// Count too when it is unknown whether and how many there are.
type Loss struct {
	Cause              string
	First, Last, Count uint64
}

func (l Loss) exact() bool { return l.First != 0 && l.Count == l.Last-l.First+1 }

// maxLosses bounds the list. It is stored with every commit, so it must stay
// small; 512 ranges are about 20 KiB.
const maxLosses = 512

// loss is a Loss and the seq of the record that names it, 0 when unnamed.
type loss struct {
	Loss
	by uint64
}

// losses is the list of losses, of those too that are reported: ordered by cause, then
// seq; neighbours that are both unnamed are joined.
type losses []loss

// maxReported is how many of those that are reported are kept as they are; older ones are
// joined. They matter only for a server that goes back to between such a loss and the
// record that names it: when it is further back, all that it lacks is named anyway.
const maxReported = 64

// add records a new, unnamed loss.
func (s *losses) add(l Loss) {
	*s = append(*s, loss{Loss: l})
	s.normalize()
}

// name marks what l covers as named by the record by. What has been added to a
// range since l was taken stays unnamed, and so does a range whose members are
// no longer known exactly: naming twice is harmless, never is not.
func (s *losses) name(l Loss, by uint64) {
	var out losses
	for _, e := range *s {
		switch {
		case e.by != 0 || e.Cause != l.Cause:
			out = append(out, e)
		case e.Loss == l:
			out = append(out, loss{e.Loss, by})
		case !e.exact() || !l.exact() || l.Last < e.First || l.First > e.Last:
			out = append(out, e)
		default:
			first, last := max(e.First, l.First), min(e.Last, l.Last)
			if e.First < first {
				out = append(out, loss{Loss: span{e.First, first - 1}.loss(e.Cause)})
			}
			out = append(out, loss{span{first, last}.loss(e.Cause), by})
			if last < e.Last {
				out = append(out, loss{Loss: span{last + 1, e.Last}.loss(e.Cause)})
			}
		}
	}
	*s = out
	s.normalize()
}

// unname reverts what was named by records in r: they are lost themselves. Of delivered
// losses, which are those named up to acked, that were joined only the newest record is
// known: it may be behind r where others are in it.
func (s *losses) unname(r span, acked uint64) {
	changed := false
	for i := range *s {
		if e := &(*s)[i]; e.by >= max(r.first, 1) && (e.by <= r.last || e.reported(acked)) {
			e.by = 0
			changed = true
		}
	}
	if changed {
		s.normalize()
	}
}

// delivered joins what is named by records up to seq, but for the newest, and what else the
// oldest record of those names. The count stays right, the range becomes an envelope.
func (s *losses) delivered(seq uint64) {
	var by []uint64
	for _, e := range *s {
		if e.reported(seq) {
			by = append(by, e.by)
		}
	}
	if n := len(by) - maxReported; n > 0 {
		slices.Sort(by)
		s.join(func(a, b loss, _ bool) bool { return a.reported(by[n]-1) && b.reported(by[n]-1) })
	}
}

// reported reports whether a record up to seq names it.
func (e loss) reported(seq uint64) bool { return e.by != 0 && e.by <= seq }

// unreported returns the losses that no record up to seq names.
func (s losses) unreported(seq uint64) (out losses) {
	for _, e := range s {
		if !e.reported(seq) {
			out = append(out, e)
		}
	}
	return out
}

// unnamed appends the losses that no record names to dst.
func (s losses) unnamed(dst []Loss) []Loss {
	for _, e := range s {
		if e.by == 0 {
			dst = append(dst, e.Loss)
		}
	}
	return dst
}

// spans returns the ranges of which every record is known to be lost.
func (s losses) spans() (out []span) {
	for _, e := range s {
		if e.exact() {
			out = append(out, span{e.First, e.Last})
		}
	}
	return out
}

// normalize joins what can be joined without loss of precision, and more than
// that only when the list outgrows its bound.
func (s *losses) normalize() {
	adjacent := func(a, b loss, _ bool) bool {
		return a.by == 0 && b.by == 0 && (a.First == 0 || a.exact() && b.exact() && a.Last+1 == b.First)
	}
	s.join(adjacent)
	if len(*s) <= maxLosses {
		return
	}
	// Forget the names of the older half, which makes neighbours of ranges
	// that different records named.
	for i := range len(*s) / 2 {
		(*s)[i].by = 0
	}
	s.join(adjacent)
	// Still too many holes: join the oldest ranges across them. The count
	// stays right, the range becomes an envelope.
	s.join(func(a, b loss, excess bool) bool { return a.by == 0 && b.by == 0 && excess })
}

// join sorts the list and joins neighbours of one kind where ok, which is told whether the
// list is still too long.
func (s *losses) join(ok func(a, b loss, excess bool) bool) {
	if len(*s) < 2 {
		return
	}
	slices.SortStableFunc(*s, func(a, b loss) int {
		c := cmp.Or(cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
		if c == 0 && a.First == 0 {
			c = cmp.Compare(min(a.Count, 1), min(b.Count, 1))
		}
		return c
	})
	all := *s
	out := all[:1]
	for i, e := range all[1:] {
		excess := len(out)+len(all)-1-i > maxLosses
		p := &out[len(out)-1]
		if !p.like(e.Loss) || !ok(*p, e, excess) {
			out = append(out, e)
			continue
		}
		p.Last, p.Count, p.by = max(p.Last, e.Last), p.Count+e.Count, max(p.by, e.by)
	}
	*s = out
}

// like reports whether two losses can be told as one: unknown twice says no more than
// once, but what is unknown is not told by what is known.
func (l Loss) like(m Loss) bool {
	return l.Cause == m.Cause && (l.First == 0) == (m.First == 0) && (l.First != 0 || (l.Count == 0) == (m.Count == 0))
}

// shift moves the seqs of l from or to those of the epoch.
func (l Loss) shift(by uint64) Loss {
	if l.First != 0 {
		l.First, l.Last = l.First+by, l.Last+by
	}
	return l
}

// span is a range of consecutive seqs, both ends included; empty when last is
// before first.
type span struct{ first, last uint64 }

func (r span) empty() bool { return r.last < r.first }

func (r span) count() uint64 {
	if r.empty() {
		return 0
	}
	return r.last - r.first + 1
}

func (r span) loss(cause string) Loss { return Loss{cause, r.first, r.last, r.count()} }

// split divides r into what is up to seq and what is above.
func (r span) split(seq uint64) (upTo, above span) {
	return span{r.first, min(r.last, seq)}, span{max(r.first, seq+1), r.last}
}

// without returns the parts of r that are in none of known, whose order it changes.
func (r span) without(known []span) (out []span) {
	slices.SortFunc(known, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	for _, k := range known {
		if k.last < r.first || k.first > r.last {
			continue
		}
		if k.first > r.first {
			out = append(out, span{r.first, k.first - 1})
		}
		if k.last >= r.last {
			return out
		}
		r.first = k.last + 1
	}
	if !r.empty() {
		out = append(out, r)
	}
	return out
}
