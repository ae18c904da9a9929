// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"context"
	"fmt"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// mostFindings bounds what a report names.
const mostFindings = 100

// Report says what an examination found.
type Report struct {
	Epoch    string   `json:"epoch"`
	Chunks   int      `json:"chunks"`  // that were read
	Records  uint64   `json:"records"` // in them
	Bytes    int64    `json:"bytes"`   // that they take
	Findings []string `json:"findings,omitempty"`
	More     int      `json:"findings_more,omitempty"` // beside those that are listed
	Notes    []string `json:"notes,omitempty"`         // what is known and counted already
}

// Clean tells whether nothing was found.
func (r *Report) Clean() bool { return len(r.Findings) == 0 }

// Find adds a finding.
func (r *Report) Find(format string, args ...any) {
	if len(r.Findings) >= mostFindings {
		r.More++
		return
	}
	r.Findings = append(r.Findings, fmt.Sprintf(format, args...))
}

func (r *Report) note(format string, args ...any) {
	if len(r.Notes) < mostFindings {
		r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
	}
}

// Verify reads every chunk of a buffer and holds it against its checksum, the seqs
// against each other, each record against its seq, and the counters against what
// there is. The error is that of the walk; what was found until then stands.
func Verify(ctx context.Context, src Source) (Report, error) {
	before := src.Info()
	r := Report{Epoch: before.Epoch}
	r.account(&before)
	// What was moved to another epoch still says the seq that it was written with.
	renumbered := before.Before > 0 || before.Salvaged > 0
	at, live := before.First, uint64(0)
	err := src.Walk(ctx, buffer.Range{Last: before.Last}, func(c *buffer.Chunk) bool {
		switch {
		case c.First > at:
			r.hole(src, at, c.First-1)
		case c.First < at && c.First > 0 && r.Chunks > 0: // one of an earlier epoch has no seqs
			r.Find("chunk of seq %d to %d: overlaps the one before it, which ends with %d", c.First, c.Last, at-1)
		}
		at = max(at, c.Last+1)
		r.Chunks++
		r.Bytes += c.Bytes
		live += uint64(c.Count)
		if c.Gone {
			r.note("seq %d to %d left the buffer meanwhile", c.First, c.Last)
			return true
		}
		if c.Err != nil {
			r.Find("chunk of seq %d to %d (%d records): %v", c.First, c.Last, c.Count, c.Err)
			return true
		}
		for rec := range c.Records() {
			r.Records++
			switch h, ok := readHead(rec.Data); {
			case !ok:
				r.Find("record %d: is no event of the sensor", rec.Seq)
			case h.seq != rec.Seq && !renumbered:
				r.Find("record %d: says that it is %d", rec.Seq, h.seq)
			}
		}
		return true
	})
	if err != nil {
		return r, err
	}
	if at <= before.Last {
		r.hole(src, at, before.Last)
	}
	after := src.Info()
	r.account(&after)
	if after.First == before.First && after.Corrupt == before.Corrupt && after.InDoubt == before.InDoubt && live != before.Records {
		r.Find("there are %d records, the counters say %d", live, before.Records)
	}
	return r, nil
}

// account holds the counters against each other: each seq is in exactly one place.
func (r *Report) account(i *buffer.Info) {
	sum := i.Truncated + i.Reclaimed + i.Corrupt + i.InDoubt + i.Records
	if sum != i.Last+i.Before {
		r.Find("the counters account for %d records of %d: %d truncated, %d reclaimed, %d corrupt, %d in doubt, %d there",
			sum, i.Last+i.Before, i.Truncated, i.Reclaimed, i.Corrupt, i.InDoubt, i.Records)
	}
	if i.Acked > i.Last || i.First > i.Last+1 {
		r.Find("the bounds contradict each other: first %d, acknowledged %d, last %d", i.First, i.Acked, i.Last)
	}
}

// hole notes seqs that are not there and are accounted for: what leaves at the front
// while this reads, and damaged chunks that were taken out before.
func (r *Report) hole(src Source, first, last uint64) {
	if i := src.Info(); first < i.First {
		r.note("seq %d to %d left the buffer meanwhile", first, min(last, i.First-1))
		first = i.First
	}
	if first <= last {
		r.note("seq %d to %d (%d records) were damaged, are counted as that, and were taken out before", first, last, last-first+1)
	}
}
