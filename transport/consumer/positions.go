// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"fmt"
	"strings"
)

// Position is the place of a record in what its agent stores. The zero Position
// is before all.
type Position struct {
	Epoch string
	Seq   uint64
}

// Before reports whether p is before q: an older epoch, or a lower seq of the same.
func (p Position) Before(q Position) bool {
	if p.Epoch != q.Epoch {
		return p.Epoch < q.Epoch
	}
	return p.Seq < q.Seq
}

func (p Position) String() string { return fmt.Sprintf("%s:%d", p.Epoch, p.Seq) }

// ParsePosition reads what [Position.String] writes.
func ParsePosition(s string) (Position, error) {
	epoch, text, _ := strings.Cut(s, ":")
	seq, good := number(text, maxSeq)
	if !good || !isEpoch(epoch) {
		return Position{}, fmt.Errorf("%w: position is not <epoch>:<seq>", ErrField)
	}
	return Position{epoch, seq}, nil
}

// Positions are the last records seen, by stream and agent: the consumer's rule.
// It remembers about as many as it was made for and forgets the ones not seen for
// longest. It is not safe for concurrent use.
type Positions struct {
	half      int
	cur, prev map[source]Position // prev is replaced by cur when that is half full
}

type source struct{ stream, agent string }

// NewPositions returns Positions for up to limit agents, streams counted singly;
// at least 2.
func NewPositions(limit int) *Positions {
	return &Positions{half: max(limit/2, 1), cur: make(map[source]Position)}
}

// Fresh reports whether r is above the last record seen of its agent on its
// stream, and remembers it. Records must come in the order of their entries. A
// foreign record is always fresh.
func (p *Positions) Fresh(r *Record) bool {
	if r.Foreign() {
		return true
	}
	s := source{r.Stream, r.Agent}
	last, _ := p.get(s)
	now := Position{r.Epoch, r.Seq}
	if !last.Before(now) {
		return false
	}
	p.set(s, now)
	return true
}

func (p *Positions) get(s source) (Position, bool) {
	if last, found := p.cur[s]; found {
		return last, true
	}
	last, found := p.prev[s]
	return last, found
}

func (p *Positions) set(s source, at Position) {
	if _, found := p.cur[s]; !found && len(p.cur) >= p.half {
		p.prev, p.cur = p.cur, make(map[source]Position)
	}
	p.cur[s] = at
}
