// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"slices"
	"time"
)

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
	given   []uint64
	renew   string  // epoch to begin
	need    uint64  // pages
	room    *commit // the transaction that has to make room first
	now     time.Time
	durable time.Time // set by locate
	clean   bool      // last commit before a close: store the freelist
}

// take turns what is pending into a commit that is to be planned. Called with the lock held.
func (q *Queue) take(now time.Time, closing bool) *commit {
	p := q.pending
	q.pending, q.spare, q.inflight = q.spare, nil, p
	q.taken++
	q.force, q.dirtyAt = false, time.Time{}

	c := &commit{p: p, now: now, clean: closing, resolve: q.resolve, forfeit: q.forfeits, given: slices.Clone(q.given), renew: q.renew}
	q.forfeits, q.renew = nil, ""
	return c
}

// derive computes what c does to the state as it is. It is called again when the
// state has changed in between, which only a restored file does.
func (q *Queue) derive(c *commit) {
	p, s := c.p, q.state.clone()
	s.gen++
	s.given = slices.Clone(c.given)
	c.next, c.drop, c.damaged, c.need, c.room = s, 0, nil, 0, nil

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
		s.losses.unname(span{l.First, l.Last}, s.acked) // what these told is not told
		// What has been found damaged is told as that; the server's loss is the rest.
		for _, r := range (span{l.First, l.Last}).without(s.losses.spans()) {
			s.losses.add(r.loss(l.Cause))
		}
	}
	if c.renew != "" {
		s.renew(c.renew)
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
	c.next.forget()
}

// planDrops chooses the chunks that leave: acknowledged ones that retention no
// longer wants, then the oldest until the new ones fit.
func (q *Queue) planDrops(c *commit) {
	q.index.ack(q.ack, c.now)
	l, used := q.index.live(), q.index.pages
	tail := q.index.ackedPages
	o := q.o
	if q.target > 0 {
		o.Cap = min(o.Cap, q.target)
	}
	limit := o.limit(c.need)
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
