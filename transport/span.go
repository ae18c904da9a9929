// SPDX-License-Identifier: Apache-2.0

package transport

// span is a range of seqs, both ends included; last < first is empty.
type span struct{ first, last uint64 }

func (a span) len() uint64 {
	if a.last < a.first {
		return 0
	}
	return a.last - a.first + 1
}

// overlap returns how many seqs a and b share.
func (a span) overlap(b span) uint64 {
	return span{max(a.first, b.first), min(a.last, b.last)}.len()
}

// subtract returns the parts of a that are in none of the spans.
func subtract(a span, spans []span) []span {
	parts := []span{a}
	for _, b := range spans {
		var rest []span
		for _, p := range parts {
			if p.overlap(b) == 0 {
				rest = append(rest, p)
				continue
			}
			if p.first < b.first {
				rest = append(rest, span{p.first, b.first - 1})
			}
			if b.last < p.last {
				rest = append(rest, span{b.last + 1, p.last})
			}
		}
		parts = rest
	}
	if a.len() == 0 {
		return nil
	}
	return parts
}
