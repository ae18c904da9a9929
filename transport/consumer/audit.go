// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"
)

// Audit finds what is wrong with streams: records that are missing, there twice or
// out of order, and which of the missing are named in loss records. Add it
// everything that the streams of an agent hold; it is not safe for concurrent use.
type Audit struct {
	agents  map[agentEpoch]*ledger
	last    map[source]Position
	trimmed map[string]bool
	ends    map[string]Position
	spans   int
	limit   int // of spans and agents
	full    bool
	foreign uint64
	bad     uint64
}

type agentEpoch struct{ agent, epoch string }

// ledger is what was seen of one agent and epoch.
type ledger struct {
	seen       spans
	named      spans
	first      map[string]uint64 // lowest seq seen, by stream
	last       map[string]uint64 // newest seq seen, by stream
	cut        map[string]bool   // streams of which nothing was seen since they were cut
	trimmed    spans             // what may have been in what was cut off
	records    uint64
	duplicates uint64
	disordered uint64
	unknown    bool // a loss record says that it does not know what was lost
}

// maxSpans bounds the memory of an Audit: so many holes are beyond repair anyway.
const maxSpans = 1 << 20

// Finding is what an [Audit] has to say about one agent and epoch. Seqs are of all
// streams together.
type Finding struct {
	Agent   string `json:"agent"`
	Epoch   string `json:"epoch"`
	Last    uint64 `json:"last"`    // highest seq known
	Records uint64 `json:"records"` // in the streams, each once
	// Missing are in no stream and in no loss record: a defect. MissingRanges are
	// the first of them.
	Missing       uint64  `json:"missing"`
	MissingRanges []Range `json:"missing_ranges,omitempty"`
	// Duplicates are there more than once, OutOfOrder after a higher one of the
	// same stream. A consumer that follows the rule drops both.
	Duplicates uint64 `json:"duplicates"`
	OutOfOrder uint64 `json:"out_of_order"`
	// NamedLost are missing, and a loss record says so. UnknownLost: a loss
	// record of this epoch cannot say what was lost of an earlier one.
	NamedLost   uint64 `json:"named_lost"`
	UnknownLost bool   `json:"unknown_lost,omitempty"`
	// Trimmed are missing where a stream has been trimmed, so nothing is known.
	Trimmed uint64 `json:"trimmed"`
}

// Clean reports whether there is nothing against the agent's streams: all is
// there once and in order, or named as lost, or was trimmed away.
func (f *Finding) Clean() bool { return f.Missing == 0 && f.Duplicates == 0 && f.OutOfOrder == 0 }

// Range is a range of seqs, both ends included.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// NewAudit returns an empty Audit.
func NewAudit() *Audit {
	return &Audit{
		agents: make(map[agentEpoch]*ledger), last: make(map[source]Position),
		trimmed: make(map[string]bool), ends: make(map[string]Position), limit: maxSpans,
	}
}

// Trimmed says that entries of a stream have been deleted.
func (a *Audit) Trimmed(stream string) { a.trimmed[stream] = true }

// Cut says that entries of a stream may have been deleted behind what was added of it, and
// before what will be.
func (a *Audit) Cut(stream string) {
	for _, l := range a.agents {
		l.cut[stream] = true
	}
}

// End says that the server had everything of an agent up to there, before the
// first Add.
func (a *Audit) End(agent string, at Position) { a.ends[agent] = at }

// Malformed counts an entry that could not be decoded.
func (a *Audit) Malformed() { a.bad++ }

// Add takes the next record, in the order of the entries of its stream. It keeps
// nothing of r's data.
func (a *Audit) Add(r *Record) {
	if r.Foreign() {
		a.foreign++
		return
	}
	l := a.ledger(agentEpoch{r.Agent, r.Epoch})
	if l == nil {
		return
	}
	s, now := source{r.Stream, r.Agent}, Position{r.Epoch, r.Seq}
	before := len(l.seen)
	isNew := l.seen.add(r.Seq, r.Seq)
	a.spans += len(l.seen) - before
	switch last := a.last[s]; {
	case !isNew:
		l.duplicates++
	case now.Before(last):
		l.disordered++
	default:
		a.last[s] = now
	}
	if l.cut[r.Stream] {
		delete(l.cut, r.Stream)
		a.spans += l.trim(r.Stream, r.Seq-1)
	}
	l.last[r.Stream] = max(l.last[r.Stream], r.Seq)
	if isNew {
		l.records++
		if first, found := l.first[r.Stream]; !found || r.Seq < first {
			l.first[r.Stream] = r.Seq
		}
	}
	if bytes.Contains(r.Data, []byte(`"RECORDS_LOST"`)) {
		a.name(l, r.Data)
	}
}

func (a *Audit) ledger(k agentEpoch) *ledger {
	l := a.agents[k]
	if l != nil && a.spans < a.limit {
		return l
	}
	if a.spans+len(a.agents) >= a.limit {
		a.full = true
		return nil
	}
	l = &ledger{first: make(map[string]uint64), last: make(map[string]uint64), cut: make(map[string]bool)}
	a.agents[k] = l
	return l
}

// trim notes that nothing is known of a stream behind what was seen of it, up to a seq,
// and returns by how many the spans have grown.
func (l *ledger) trim(stream string, to uint64) int {
	before := len(l.trimmed)
	if from := l.last[stream] + 1; from <= to {
		l.trimmed.add(from, to)
	}
	return len(l.trimmed) - before
}

// name takes what a loss record names.
func (a *Audit) name(l *ledger, data []byte) {
	var d struct {
		Code     string `json:"status_code"`
		Unmapped struct {
			Lost struct {
				Ranges []Range `json:"ranges"`
			} `json:"lost"`
		} `json:"unmapped"`
	}
	if json.Unmarshal(data, &d) != nil || d.Code != "RECORDS_LOST" {
		return
	}
	for _, r := range d.Unmapped.Lost.Ranges {
		if r.First == 0 || r.Last < r.First || r.Last > maxSeq {
			l.unknown = true
			continue
		}
		before := len(l.named)
		l.named.add(r.First, r.Last)
		a.spans += len(l.named) - before
	}
}

// Foreign is how many entries of other producers there were.
func (a *Audit) Foreign() uint64 { return a.foreign }

// Broken is how many entries could not be decoded.
func (a *Audit) Broken() uint64 { return a.bad }

// Incomplete reports that there was more to remember than an Audit does, so that
// its findings say nothing.
func (a *Audit) Incomplete() bool { return a.full }

// maxRanges is how many ranges a Finding shows.
const maxRanges = 20

// Findings returns what was found, by agent and epoch.
func (a *Audit) Findings() []Finding {
	for agent, end := range a.ends { // one of whom nothing is there any more
		if end.Seq > 0 {
			a.ledger(agentEpoch{agent, end.Epoch})
		}
	}
	out := make([]Finding, 0, len(a.agents))
	for k, l := range a.agents {
		out = append(out, a.finding(k, l))
	}
	slices.SortFunc(out, func(x, y Finding) int {
		return cmp.Or(cmp.Compare(x.Agent, y.Agent), cmp.Compare(x.Epoch, y.Epoch))
	})
	return out
}

func (a *Audit) finding(k agentEpoch, l *ledger) Finding {
	f := Finding{
		Agent: k.agent, Epoch: k.epoch, Records: l.records, Duplicates: l.duplicates, OutOfOrder: l.disordered, UnknownLost: l.unknown,
	}
	if n := len(l.seen); n > 0 {
		f.Last = l.seen[n-1].Last
	}
	if end := a.ends[k.agent]; end.Epoch == k.epoch {
		f.Last = max(f.Last, end.Seq)
	}
	// Below floor a missing record may have been one of those trimmed.
	floor := uint64(0)
	for stream := range a.trimmed {
		first, found := l.first[stream]
		if !found {
			first = maxSeq + 1
		}
		floor = max(floor, first)
	}
	for stream := range l.cut {
		l.trim(stream, maxSeq)
	}
	next := uint64(1)
	hole := func(first, last uint64) {
		for _, r := range l.named.without(first, last) {
			if n := min(r.Last+1, max(floor, r.First)) - r.First; n > 0 {
				f.Trimmed += n
				r.First += n
			}
			if r.Last < r.First {
				continue
			}
			f.Trimmed += r.Last - r.First + 1
			for _, r := range l.trimmed.without(r.First, r.Last) {
				n := r.Last - r.First + 1
				f.Trimmed, f.Missing = f.Trimmed-n, f.Missing+n
				if len(f.MissingRanges) < maxRanges {
					f.MissingRanges = append(f.MissingRanges, r)
				}
			}
		}
	}
	absent := uint64(0)
	for _, r := range l.seen {
		if next < r.First {
			absent += r.First - next
			hole(next, r.First-1)
		}
		next = r.Last + 1
	}
	if next <= f.Last {
		absent += f.Last - next + 1
		hole(next, f.Last)
	}
	f.NamedLost = absent - f.Missing - f.Trimmed
	return f
}

// spans is a set of seqs: ascending ranges that neither overlap nor touch.
type spans []Range

// add puts first..last into the set and reports whether any of it was not there.
func (s *spans) add(first, last uint64) bool {
	v := *s
	// i is the first range that ends at or after first-1, j the first that begins
	// behind last+1: those in between are joined.
	i, _ := slices.BinarySearchFunc(v, first, func(r Range, at uint64) int { return cmp.Compare(r.Last+1, at) })
	j := i
	for j < len(v) && v[j].First <= last+1 {
		j++
	}
	if i == j {
		*s = slices.Insert(v, i, Range{first, last})
		return true
	}
	if v[i].First <= first && last <= v[i].Last {
		return false
	}
	v[i] = Range{min(first, v[i].First), max(last, v[j-1].Last)}
	*s = slices.Delete(v, i+1, j)
	return true
}

// without returns the parts of first..last that are not in the set.
func (s spans) without(first, last uint64) []Range {
	i, _ := slices.BinarySearchFunc(s, first, func(r Range, at uint64) int { return cmp.Compare(r.Last, at) })
	var out []Range
	for ; i < len(s) && s[i].First <= last && first <= last; i++ {
		if first < s[i].First {
			out = append(out, Range{first, s[i].First - 1})
		}
		first = s[i].Last + 1
	}
	if first <= last {
		out = append(out, Range{first, last})
	}
	return out
}
