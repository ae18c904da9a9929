// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func tr(first, last uint64) Loss { return span{first, last}.loss(CauseTruncated) }

func TestLosses(t *testing.T) {
	// report adds n losses that no neighbours are, each with a record that is delivered.
	report := func(l *losses, n uint64) {
		for i := range n {
			l.add(tr(10*i+1, 10*i+1))
			l.name(tr(10*i+1, 10*i+1), 10*i+5)
			l.delivered(10*i + 5)
		}
	}
	cases := []struct {
		name    string
		do      func(*losses)
		unnamed []Loss
		entries int
	}{
		{"adjacent of one cause join", func(l *losses) {
			l.add(tr(1, 3))
			l.add(tr(7, 9))
			l.add(tr(4, 6))
		}, []Loss{tr(1, 9)}, 1},
		{"causes do not", func(l *losses) {
			l.add(tr(1, 3))
			l.add(span{4, 6}.loss(CauseCorrupt))
		}, []Loss{span{4, 6}.loss(CauseCorrupt), tr(1, 3)}, 2},
		{"named is not unnamed", func(l *losses) {
			l.add(tr(1, 3))
			l.name(tr(1, 3), 10)
		}, nil, 1},
		{"what came after the naming stays", func(l *losses) {
			l.add(tr(1, 3))
			l.add(tr(4, 6))
			l.name(tr(1, 3), 10)
		}, []Loss{tr(4, 6)}, 2},
		{"named in the middle", func(l *losses) {
			l.add(tr(1, 9))
			l.name(tr(4, 6), 10)
		}, []Loss{tr(1, 3), tr(7, 9)}, 3},
		{"delivered is reported", func(l *losses) {
			l.add(tr(1, 3))
			l.name(tr(1, 3), 10)
			l.add(tr(5, 6))
			l.delivered(9)
			*l = l.unreported(9)
			l.delivered(10)
			*l = l.unreported(10)
		}, []Loss{tr(5, 6)}, 1},
		{"the naming record is lost after it was delivered", func(l *losses) {
			l.add(tr(1, 3))
			l.name(tr(1, 3), 10)
			l.delivered(20)
			l.unname(span{7, 12}, 20)
		}, []Loss{tr(1, 3)}, 1},
		{"of those reported the newest are kept", func(l *losses) {
			report(l, 3*maxReported)
			l.unname(span{30*maxReported - 8, 30 * maxReported}, 30*maxReported)
		}, []Loss{tr(30*maxReported-9, 30*maxReported-9)}, maxReported + 1},
		{"the older ones are named again as one", func(l *losses) {
			report(l, 3*maxReported)
			// Known is the newest record of those joined, and it is behind what is lost.
			l.unname(span{15, 15}, 30*maxReported)
			*l = (*l)[:1]
		}, []Loss{{CauseTruncated, 1, 20*maxReported - 9, 2 * maxReported}}, 1},
		{"but not for what was lost behind their records", func(l *losses) {
			report(l, 3*maxReported)
			l.unname(span{20*maxReported - 4, 20 * maxReported}, 30*maxReported)
			*l = (*l)[:1]
		}, nil, 1},
		{"all that one record named is kept", func(l *losses) {
			for i := range uint64(2 * maxReported) {
				l.add(tr(10*i+1, 10*i+1))
			}
			for _, x := range l.unnamed(nil) {
				l.name(x, 5000)
			}
			l.delivered(5000)
			l.add(tr(6000, 6000))
			l.name(tr(6000, 6000), 6001)
			l.delivered(6001)
		}, nil, 2*maxReported + 1},
		{"the naming record is lost", func(l *losses) {
			l.add(tr(1, 3))
			l.name(tr(1, 3), 10)
			l.add(tr(4, 12))
			l.unname(span{4, 12}, 0)
		}, []Loss{tr(1, 12)}, 1},
		{"the other naming record is lost", func(l *losses) {
			l.add(tr(1, 3))
			l.name(tr(1, 3), 10)
			l.unname(span{11, 12}, 0)
		}, nil, 1},
		{"unknown is named as a whole, and once", func(l *losses) {
			l.add(Loss{Cause: CauseCorrupt})
			l.add(Loss{Cause: CauseCorrupt})
			l.add(span{1, 2}.loss(CauseCorrupt))
			l.name(Loss{Cause: CauseCorrupt}, 5)
		}, []Loss{span{1, 2}.loss(CauseCorrupt)}, 2},
		{"naming what is not there", func(l *losses) {
			l.add(tr(5, 6))
			l.name(tr(1, 3), 10)
			l.name(span{5, 6}.loss(CauseCorrupt), 10)
		}, []Loss{tr(5, 6)}, 1},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var l losses
			c.do(&l)
			if d := cmp.Diff(c.unnamed, l.unnamed(nil)); d != "" {
				t.Errorf("unnamed (-want +got):\n%s", d)
			}
			if len(l) != c.entries {
				t.Errorf("%d entries, want %d: %+v", len(l), c.entries, l)
			}
		})
	}
}

func TestLossesAreBoundedAndHonest(t *testing.T) {
	count := func(l losses) (n uint64) {
		for _, e := range l {
			n += e.Count
		}
		return n
	}
	t.Run("holes", func(t *testing.T) {
		var l losses
		var want uint64
		for i := range uint64(2000) {
			l.add(tr(10*i+1, 10*i+3))
			want += 3
		}
		if len(l) > maxLosses || count(l) != want || l[0].First != 1 || l[len(l)-1].Last != 19993 {
			t.Errorf("%d entries, %d records of %d", len(l), count(l), want)
		}
		// The newest are still exact.
		if !l[len(l)-1].exact() || l[0].exact() {
			t.Errorf("first %+v, last %+v", l[0], l[len(l)-1])
		}
	})
	t.Run("names", func(t *testing.T) {
		var l losses
		for i := range uint64(2000) {
			l.add(tr(i+1, i+1))
			l.name(tr(i+1, i+1), 10_000+i)
		}
		if len(l) > maxLosses || count(l) != 2000 {
			t.Errorf("%d entries, %d records", len(l), count(l))
		}
		for _, e := range l {
			if !e.exact() {
				t.Errorf("%+v is not exact", e)
			}
		}
	})
}

// What is dropped is decided by what the server says, not by when.
func TestDoubt(t *testing.T) {
	cases := []struct {
		name                            string
		do                              func(*state)
		truncated, reclaimed, undecided uint64
	}{
		{"never sent", func(s *state) { s.drop(span{21, 30}) }, 10, 0, 0},
		{"acknowledged", func(s *state) { s.ack(20); s.drop(span{11, 20}) }, 0, 10, 0},
		{"under way", func(s *state) { s.drop(span{11, 20}) }, 0, 0, 10},
		{"across all three", func(s *state) { s.ack(14); s.drop(span{11, 30}) }, 10, 4, 6},
		{"delivered after all", func(s *state) { s.drop(span{11, 20}); s.ack(20) }, 0, 10, 0},
		{"half delivered", func(s *state) { s.drop(span{11, 20}); s.ack(15); s.resolve(15) }, 5, 5, 0},
		{"asked again from the start", func(s *state) { s.drop(span{11, 20}); s.resolve(10) }, 10, 0, 0},
		{"asked ahead of the reply", func(s *state) { s.drop(span{11, 20}); s.resolve(20) }, 0, 0, 10},
		{"resolved, then later ones acknowledged", func(s *state) { s.drop(span{11, 20}); s.resolve(10); s.ack(30) }, 10, 0, 0},
		{"naming record in doubt keeps its names until it is lost", func(s *state) {
			s.losses.add(tr(1, 2))
			s.losses.name(tr(1, 2), 15)
			s.drop(span{11, 20})
			if s.losses.unnamed(nil) != nil {
				s.truncated += 1000
			}
			s.resolve(10)
			if got := s.losses.unnamed(nil); len(got) != 2 {
				s.truncated += 2000
			}
		}, 10, 0, 0},
		{"naming record in doubt was delivered", func(s *state) {
			s.losses.add(tr(1, 2))
			s.losses.name(tr(1, 2), 15)
			s.drop(span{11, 20})
			s.ack(20)
			if len(s.losses.unreported(s.acked)) != 0 {
				s.truncated += 1000
			}
		}, 0, 10, 0},
		{"given up, then dropped", func(s *state) {
			s.given = []uint64{12, 15}
			s.losses.add(span{12, 12}.loss("refused"))
			s.drop(span{11, 14})
			s.resolve(10)
			if got := s.losses.unnamed(nil); len(got) != 3 {
				s.truncated += 1000
			}
		}, 3, 1, 0},
		{"given up in doubt", func(s *state) {
			s.given, s.head = []uint64{5, 12, 15, 21}, 20
			s.drop(span{11, 14})
			s.forget()
			if !slices.Equal(s.given, []uint64{12, 15, 21}) {
				s.truncated += 1000
			}
			s.ack(14)
			s.forget()
			if !slices.Equal(s.given, []uint64{21}) {
				s.truncated += 2000
			}
		}, 0, 4, 0},
		{"damage in what was sent", func(s *state) { s.ack(12); s.damage(span{11, 20}, 15) }, 0, 2, 3},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := &state{epoch: "01234567890123456789", last: 30, acked: 10, lease: 20}
			c.do(s)
			if s.truncated != c.truncated || s.reclaimed != c.reclaimed || s.inDoubt() != c.undecided {
				t.Errorf("truncated %d, reclaimed %d, in doubt %d; want %d, %d, %d",
					s.truncated, s.reclaimed, s.inDoubt(), c.truncated, c.reclaimed, c.undecided)
			}
			again, err := decodeState(s.encode(nil))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(s, again, cmp.AllowUnexported(state{}, doubt{}, span{}, loss{}), cmpopts.EquateEmpty()); d != "" {
				t.Errorf("encoding (-want +got):\n%s", d)
			}
		})
	}
}
