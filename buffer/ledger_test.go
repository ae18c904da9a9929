// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// A payload is a kind, the number of the item it stands for (or, in a loss
// record, the losses named), and filler that can be recomputed.
const (
	kindItem = 'i'
	kindLoss = 'l'
)

func appendItem(b []byte, item uint64, size int) []byte {
	b = append(b, kindItem)
	b = binary.BigEndian.AppendUint64(b, item)
	next := filler(item)
	for range size {
		b = append(b, next())
	}
	return b
}

// filler yields what fills an item: every second one with what cannot be compressed.
func filler(item uint64) func() byte {
	x := item*0x9e3779b97f4a7c15 | 1
	if item%2 == 0 {
		return func() byte { x++; return byte(x) }
	}
	return func() byte {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		return byte(x)
	}
}

func appendLosses(b []byte, l []Loss) []byte {
	b = append(b, kindLoss)
	for _, x := range l {
		b = append(b, byte(len(x.Cause)))
		b = append(b, x.Cause...)
		for _, v := range []uint64{x.First, x.Last, x.Count} {
			b = binary.BigEndian.AppendUint64(b, v)
		}
	}
	return b
}

// ledger is the server and the judge: it takes batches as the real one does,
// and says at the end whether every record is accounted for exactly once.
type ledger struct {
	last  uint64            // highest seq taken
	items map[uint64]uint64 // seq to item, 0 for a loss record
	lost  []Loss            // named by loss records taken
	tells map[uint64][]Loss // by which
	errs  []error

	told func([]Record) // instead of take, where the server is elsewhere
}

func newLedger() *ledger { return &ledger{items: map[uint64]uint64{}, tells: map[uint64][]Loss{}} }

// take applies a batch in which a hole is legal: the queue has no more.
func (l *ledger) take(recs []Record) {
	if l.told != nil {
		l.told(recs)
		return
	}
	for _, r := range recs {
		l.apply(r)
	}
}

func (l *ledger) apply(r Record) {
	if r.Seq <= l.last {
		if _, ok := l.items[r.Seq]; !ok {
			l.fail("seq %d came after %d", r.Seq, l.last)
		}
		return // DUP
	}
	l.last = r.Seq
	l.items[r.Seq] = 0
	d := r.Data
	switch {
	case len(d) >= 9 && d[0] == kindItem:
		item := binary.BigEndian.Uint64(d[1:])
		l.items[r.Seq] = item
		next := filler(item)
		for i, c := range d[9:] {
			if c != next() {
				l.fail("seq %d: item %d is garbled at byte %d", r.Seq, item, i)
				break
			}
		}
	case len(d) > 0 && d[0] == kindLoss:
		c := cursor{b: d[1:]}
		for len(c.b) > 0 {
			x := Loss{Cause: string(c.bytes(int(c.byte())))}
			for _, p := range []*uint64{&x.First, &x.Last, &x.Count} {
				if b := c.bytes(8); b != nil {
					*p = binary.BigEndian.Uint64(b)
				}
			}
			l.lost = append(l.lost, x)
			l.tells[r.Seq] = append(l.tells[r.Seq], x)
		}
	default:
		l.fail("seq %d: payload %.20q", r.Seq, d)
	}
}

func (l *ledger) fail(format string, args ...any) {
	l.errs = append(l.errs, fmt.Errorf(format, args...))
}

// verify checks that every seq was taken or is named lost, not both; that the
// counters say the same; and that items are exactly as many as were produced,
// in order. Everything must be drained and acknowledged.
func (l *ledger) verify(s Stats, unnamed []Loss) error {
	errs := slices.Clone(l.errs)
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	lost := map[uint64]string{}
	count := map[string]uint64{}
	for _, x := range append(slices.Clone(l.lost), unnamed...) {
		if !x.exact() {
			fail("loss %+v is not exact", x)
			continue
		}
		for seq := x.First; seq <= x.Last; seq++ {
			if c, ok := lost[seq]; !ok {
				lost[seq] = x.Cause
				count[x.Cause]++
			} else if c != x.Cause {
				fail("seq %d lost as %s and as %s", seq, c, x.Cause)
			}
		}
	}
	var item uint64
	whole := true // no loss since item
	for seq := uint64(1); seq <= s.Last; seq++ {
		it, got := l.items[seq]
		_, gone := lost[seq]
		switch {
		case got == gone:
			fail("seq %d: taken %v, lost %v", seq, got, gone)
		case gone:
			whole = false
		case it == 0: // a loss record
		case it <= item || whole && it != item+1:
			fail("seq %d: item %d after %d", seq, it, item)
		default:
			item, whole = it, true
		}
		if len(errs) > 10 {
			break
		}
	}
	if n := uint64(len(l.items)) + uint64(len(lost)); n != s.Last {
		fail("%d taken and %d lost are not the %d produced", len(l.items), len(lost), s.Last)
	}
	if count[CauseTruncated] != s.Truncated || count[CauseCorrupt] != s.Corrupt {
		fail("%d truncated, %d corrupt by name; counters say %d, %d", count[CauseTruncated], count[CauseCorrupt], s.Truncated, s.Corrupt)
	}
	if s.Reclaimed+s.Records != uint64(len(l.items))+count[causeServer] || s.InDoubt != 0 {
		fail("%d reclaimed, %d live, %d in doubt; %d were taken, the server lost %d", s.Reclaimed, s.Records, s.InDoubt, len(l.items), count[causeServer])
	}
	return errors.Join(errs...)
}

// invariant is what must hold at any time.
func invariant(s Stats) error {
	gone := s.Truncated + s.Reclaimed + s.Corrupt + s.InDoubt
	if gone+s.Records != s.Last+s.Before {
		return fmt.Errorf("%d live of %d, yet %d truncated, %d reclaimed, %d corrupt, %d in doubt",
			s.Records, s.Last, s.Truncated, s.Reclaimed, s.Corrupt, s.InDoubt)
	}
	// Equal, but for what left as damaged from between live ones: see model.step.
	if s.First+s.Before > 1+gone && (s.Before == 0 || s.First > 1) {
		return fmt.Errorf("first live is %d, expected %d", s.First, 1+gone)
	}
	if s.First > s.Last+1 || s.Acked > s.Last || s.Bytes > s.Cap {
		return fmt.Errorf("bounds %+v, %d of %d bytes", s.Bounds, s.Bytes, s.Cap)
	}
	return nil
}

// causeServer is the cause of what a server lost that had it, as the sender tells it.
const causeServer = "server_lost"

// sim drives a queue the way worker and sender do, against a ledger.
type sim struct {
	t      testing.TB
	q      *Queue
	led    *ledger
	model  *model // nil where not everything was appended here
	rng    *rand.Rand
	item   uint64 // last item handed to the queue
	pos    uint64 // where the sender believes the server to be
	gone   map[uint64]bool
	recs   []Record
	losses []Loss
}

func (s *sim) mark() []byte { return binary.BigEndian.AppendUint64(nil, s.item) }

// produce appends one batch of n items, with a loss record when there is
// something to name.
func (s *sim) produce(n, maxSize int, urgent bool) {
	b := s.q.NewBatch()
	next := s.q.Next()
	end := func(rec []byte, item uint64, stream Stream, urgent bool) {
		s.must(b.End(rec, urgent))
		if s.model != nil {
			s.must(s.model.append(next+uint64(b.Len())-1, modelRecord{item, crc32.ChecksumIEEE(rec), stream, urgent}))
		}
	}
	for range n {
		s.item++
		size := s.rng.IntN(maxSize)
		if s.rng.IntN(200) == 0 {
			size *= 8
		}
		stream := Stream(s.rng.IntN(int(Streams)))
		end(appendItem(b.Begin(stream), s.item, size), s.item, stream, urgent)
	}
	if s.rng.IntN(4) == 0 {
		if s.losses = s.q.Unnamed(s.losses[:0]); len(s.losses) > 0 {
			end(appendLosses(b.Begin(DecisionsSystem), s.losses), 0, DecisionsSystem, false)
			b.Name(s.losses)
		}
	}
	b.SetMark(s.mark())
	s.must(s.q.Append(s.t.Context(), b))
}

// connect learns the server's position.
func (s *sim) connect() {
	s.pos = s.led.last
	if last := s.q.Bounds().Last; s.pos > last {
		s.t.Fatalf("the server has seq %d, of which the queue, at %d, knows nothing", s.pos, last)
	}
	s.q.Ack(s.pos)
}

// rollback is a server that loses what it took last, up to n records, with what they told.
func (s *sim) rollback(n int) {
	for ; n > 0 && s.led.last > 0; s.led.last-- {
		if _, ok := s.led.items[s.led.last]; ok {
			delete(s.led.items, s.led.last)
			for _, x := range s.led.tells[s.led.last] {
				i := slices.Index(s.led.lost, x)
				s.led.lost = slices.Delete(s.led.lost, i, i+1)
			}
			delete(s.led.tells, s.led.last)
			s.gone[s.led.last] = true
			n--
		}
	}
}

// forfeit tells the queue what the server had and cannot have again, as the records
// read pass over it. What was never acknowledged is the queue's own to tell.
func (s *sim) forfeit() bool {
	any, at, acked := false, s.pos, s.q.Bounds().Acked
	for _, r := range s.recs {
		for first := at + 1; first < r.Seq; {
			last := first
			for ; last < r.Seq && s.gone[last]; last++ {
				delete(s.gone, last)
			}
			if first < last && first <= acked {
				s.q.Forfeit(first, min(last-1, acked), causeServer)
				any = true
			}
			first = max(last, first+1)
		}
		at = r.Seq
	}
	return any
}

// deliver reads one batch and sends it; with fate 1 the request is lost, with 2
// the reply. There must be a record to come.
func (s *sim) deliver(maxRecords, maxBytes, fate int) {
	for again := true; again; again = s.forfeit() {
		var err error
		s.recs, err = s.q.Read(s.t.Context(), s.pos, s.recs[:0], maxRecords, maxBytes)
		s.must(err)
		if s.model != nil {
			s.must(s.model.read(s.q, s.pos, s.recs))
		}
	}
	if fate != 1 {
		s.led.take(s.recs)
		for _, r := range s.recs {
			delete(s.gone, r.Seq)
		}
	}
	if fate == 0 {
		s.pos = s.recs[len(s.recs)-1].Seq
		s.q.Ack(s.pos)
	}
}

// settle delivers everything and waits until that is on disk.
func (s *sim) settle() {
	s.connect()
	s.produce(1, 10, false)
	s.must(s.q.Flush(s.t.Context()))
	for s.pos < s.q.Bounds().Last {
		s.deliver(1000, 1<<20, 0)
	}
	s.q.mu.Lock()
	s.q.force = true
	s.q.mu.Unlock()
	s.must(s.q.Flush(s.t.Context()))
}

func (s *sim) verify() error { return s.led.verify(s.q.Stats(), s.q.Unnamed(nil)) }

func (s *sim) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestLedgerFindsFaults is the control for every test that trusts the ledger.
func TestLedgerFindsFaults(t *testing.T) {
	faults := map[string]func(*ledger, *Stats, []Loss) []Loss{
		"counter off by one": func(_ *ledger, s *Stats, u []Loss) []Loss { s.Truncated++; return u },
		"delivered and counted": func(l *ledger, _ *Stats, u []Loss) []Loss {
			l.items[l.lost[0].First] = 1
			return u
		},
		"vanished":  func(l *ledger, s *Stats, u []Loss) []Loss { delete(l.items, s.Last); return u },
		"not named": func(l *ledger, _ *Stats, u []Loss) []Loss { l.lost = l.lost[1:]; return u },
		"named too much": func(l *ledger, s *Stats, u []Loss) []Loss {
			l.lost = append(l.lost, span{s.Last, s.Last}.loss(CauseTruncated))
			return u
		},
		"wrong cause":   func(l *ledger, _ *Stats, u []Loss) []Loss { l.lost[0].Cause = CauseCorrupt; return u },
		"imprecise":     func(l *ledger, _ *Stats, u []Loss) []Loss { l.lost[0].Count--; return u },
		"left in doubt": func(_ *ledger, s *Stats, u []Loss) []Loss { s.InDoubt++; s.Reclaimed--; return u },
		"item skipped":  func(l *ledger, s *Stats, u []Loss) []Loss { l.items[s.Last]++; return u },
		"item repeated": func(l *ledger, s *Stats, u []Loss) []Loss { l.items[s.Last]--; return u },
		"reordered":     func(l *ledger, _ *Stats, u []Loss) []Loss { l.take([]Record{{Seq: l.lost[0].First}}); return u },
		"payload garbled": func(l *ledger, s *Stats, u []Loss) []Loss {
			l.take([]Record{{Seq: s.Last + 1, Data: []byte("?")}})
			return u
		},
		"unnamed invented": func(l *ledger, s *Stats, u []Loss) []Loss { return append(u, Loss{CauseTruncated, s.Last, s.Last, 1}) },
	}
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(1, 1))}
	s.q = open(t, small(t.TempDir()))
	for range 300 {
		s.produce(10, 2000, false)
	}
	s.must(s.q.Flush(t.Context()))
	s.settle()
	for range 20 { // until the losses are named, and delivered
		s.settle()
	}
	stats, unnamed := s.q.Stats(), s.q.Unnamed(nil)
	if err := s.led.verify(stats, unnamed); err != nil || len(s.led.lost) == 0 || stats.Truncated == 0 {
		t.Fatalf("without a fault: %v; %d losses, %d truncated", err, len(s.led.lost), stats.Truncated)
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			l, st := *s.led, stats
			l.items = map[uint64]uint64{}
			maps.Copy(l.items, s.led.items)
			l.lost = slices.Clone(s.led.lost)
			u := fault(&l, &st, slices.Clone(unnamed))
			if l.verify(st, u) == nil {
				t.Error("not found")
			}
		})
	}
}

func TestInvariantFindsFaults(t *testing.T) {
	good := Stats{Bounds: Bounds{First: 7, Acked: 8, Last: 10}, Records: 4, Truncated: 3, Reclaimed: 2, InDoubt: 1, Bytes: 1, Cap: 2}
	if err := invariant(good); err != nil {
		t.Fatal(err)
	}
	for i, fault := range []func(*Stats){
		func(s *Stats) { s.Truncated++ }, func(s *Stats) { s.Records-- }, func(s *Stats) { s.First++ },
		func(s *Stats) { s.Acked = 11 }, func(s *Stats) { s.Bytes = 3 },
	} {
		bad := good
		fault(&bad)
		if invariant(bad) == nil {
			t.Errorf("fault %d not found", i)
		}
	}
}
