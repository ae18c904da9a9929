// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func rec(s string, seq uint64) *Record {
	return &Record{Stream: s, Agent: "a", Epoch: epoch1, Seq: seq, Data: []byte("{}")}
}

func loss(seq uint64, ranges string) *Record {
	r := rec("decisions", seq)
	r.Data = []byte(`{"status_code":"RECORDS_LOST","unmapped":{"lost":{"ranges":[` + ranges + `]}}}`)
	return r
}

func TestAudit(t *testing.T) {
	for _, tt := range []struct {
		name    string
		recs    []*Record
		end     uint64
		trimmed string
		want    Finding
	}{
		{"all there, over two streams", []*Record{rec("s", 1), rec("s", 2), rec("d", 3), rec("s", 4)}, 4, "", Finding{Last: 4, Records: 4}},
		{"one stream after the other", []*Record{rec("s", 1), rec("s", 3), rec("s", 5), rec("d", 2), rec("d", 4)}, 0, "", Finding{Last: 5, Records: 5}},
		{"missing", []*Record{rec("s", 3), rec("s", 6)}, 8, "", Finding{Last: 8, Records: 2, Missing: 6, MissingRanges: []Range{{1, 2}, {4, 5}, {7, 8}}}},
		{"twice", []*Record{rec("s", 1), rec("s", 2), rec("s", 1), rec("s", 2), rec("s", 3)}, 3, "", Finding{Last: 3, Records: 3, Duplicates: 2}},
		{"out of order", []*Record{rec("s", 2), rec("s", 1), rec("s", 3)}, 3, "", Finding{Last: 3, Records: 3, OutOfOrder: 1}},
		{"named", []*Record{rec("s", 1), loss(5, `{"first":2,"last":3}`)}, 5, "", Finding{Last: 5, Records: 2, NamedLost: 2, Missing: 1, MissingRanges: []Range{{4, 4}}}},
		{"named more than is missing", []*Record{rec("s", 1), rec("s", 2), loss(4, `{"first":2,"last":3}`)}, 4, "", Finding{Last: 4, Records: 3, NamedLost: 1}},
		{"named at the end", []*Record{loss(1, `{"first":2,"last":9}`)}, 9, "", Finding{Last: 9, Records: 1, NamedLost: 8}},
		{"a loss of unknown extent", []*Record{loss(1, `{"first":0,"last":0}`)}, 1, "", Finding{Last: 1, Records: 1, UnknownLost: true}},
		{"an absurd loss", []*Record{loss(1, `{"first":5,"last":2}`)}, 1, "", Finding{Last: 1, Records: 1, UnknownLost: true}},
		{"trimmed", []*Record{rec("s", 4), rec("s", 6)}, 6, "s", Finding{Last: 6, Records: 2, Trimmed: 3, Missing: 1, MissingRanges: []Range{{5, 5}}}},
		{"the other one trimmed", []*Record{rec("s", 1), rec("s", 3), rec("d", 4), rec("s", 6)}, 6, "d", Finding{Last: 6, Records: 4, Trimmed: 1, Missing: 1, MissingRanges: []Range{{5, 5}}}},
		{"trimmed of all", []*Record{rec("s", 1)}, 5, "d", Finding{Last: 5, Records: 1, Trimmed: 4}},
		{"nothing there", nil, 5, "", Finding{Last: 5, Missing: 5, MissingRanges: []Range{{1, 5}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := NewAudit()
			if tt.end > 0 {
				a.End("a", Position{epoch1, tt.end})
			}
			if tt.trimmed != "" {
				a.Trimmed(tt.trimmed)
			}
			for _, r := range tt.recs {
				a.Add(r)
			}
			tt.want.Agent, tt.want.Epoch = "a", epoch1
			if d := cmp.Diff([]Finding{tt.want}, a.Findings()); d != "" {
				t.Errorf("findings (-want +got):\n%s", d)
			}
			if got, want := tt.want.Clean(), tt.want.Missing+tt.want.Duplicates+tt.want.OutOfOrder == 0; got != want {
				t.Errorf("clean: %v", got)
			}
		})
	}
}

// TestAuditOfWhatIsTrimmedMeanwhile cuts streams between two reads.
func TestAuditOfWhatIsTrimmedMeanwhile(t *testing.T) {
	a := NewAudit()
	a.End("a", Position{epoch1, 20})
	for _, r := range []*Record{rec("s", 1), rec("d", 2), rec("s", 4)} { // 3 is missing
		a.Add(r)
	}
	a.Cut("s")
	a.Trimmed("s")
	for _, r := range []*Record{rec("d", 6), rec("s", 9), rec("s", 10), rec("d", 12)} { // 5, 7 and 8 may have been in s; 11 was nowhere
		a.Add(r)
	}
	want := Finding{Agent: "a", Epoch: epoch1, Last: 20, Records: 7, Trimmed: 3, Missing: 10, MissingRanges: []Range{{3, 3}, {11, 11}, {13, 20}}}
	if d := cmp.Diff([]Finding{want}, a.Findings()); d != "" {
		t.Errorf("findings (-want +got):\n%s", d)
	}
	a.Cut("s") // and nothing comes behind it
	want.Trimmed, want.Missing, want.MissingRanges = 12, 1, []Range{{3, 3}}
	if d := cmp.Diff([]Finding{want}, a.Findings()); d != "" {
		t.Errorf("findings (-want +got):\n%s", d)
	}
}

func TestAuditOfEpochs(t *testing.T) {
	a := NewAudit()
	second := rec("s", 1)
	second.Epoch = epoch2
	a.Add(rec("s", 1))
	a.Add(second)
	a.Add(rec("s", 2)) // the older epoch after the newer
	a.Add(&Record{Stream: "s", Data: []byte("foreign")})
	a.Malformed()
	want := []Finding{
		{Agent: "a", Epoch: epoch1, Last: 2, Records: 2, OutOfOrder: 1},
		{Agent: "a", Epoch: epoch2, Last: 1, Records: 1},
	}
	if d := cmp.Diff(want, a.Findings()); d != "" {
		t.Errorf("findings (-want +got):\n%s", d)
	}
	if a.Foreign() != 1 || a.Broken() != 1 || a.Incomplete() {
		t.Errorf("%d foreign, %d broken, incomplete %v", a.Foreign(), a.Broken(), a.Incomplete())
	}
}

func TestAuditIsBounded(t *testing.T) {
	a := NewAudit()
	a.limit = 1000
	for i := range uint64(1010) { // a hole after each
		a.Add(&Record{Stream: "s", Agent: "a", Epoch: epoch1, Seq: 2*i + 1})
	}
	if !a.Incomplete() || a.spans > 1000 {
		t.Errorf("incomplete %v with %d spans", a.Incomplete(), a.spans)
	}
	a = NewAudit()
	a.limit = 1000
	for i := range 1010 {
		a.Add(&Record{Stream: "s", Agent: fmt.Sprint(i), Epoch: epoch1, Seq: 1})
	}
	if !a.Incomplete() || len(a.agents) > 1000 {
		t.Errorf("incomplete %v with %d agents", a.Incomplete(), len(a.agents))
	}
}

// TestAuditAgainstModel shuffles, repeats and drops records, and counts them by hand.
func TestAuditAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for run := range 2000 {
		a := NewAudit()
		last := uint64(1 + rng.IntN(40))
		seen, named := make(map[uint64]int), make(map[uint64]bool)
		want := Finding{Agent: "a", Epoch: epoch1, Last: last}
		prev := uint64(0)
		var order []uint64
		for seq := uint64(1); seq <= last; seq++ {
			for range []int{0, 1, 1, 1, 1, 1, 2}[rng.IntN(7)] {
				order = append(order, seq)
			}
		}
		if rng.IntN(3) == 0 {
			rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		for _, seq := range order {
			a.Add(rec("s", seq))
			switch seen[seq]++; {
			case seen[seq] > 1:
				want.Duplicates++
				continue
			case seq < prev:
				want.OutOfOrder++
			default:
				prev = seq
			}
			want.Records++
		}
		for range rng.IntN(3) {
			first := 1 + rng.Uint64N(last)
			to := first + rng.Uint64N(6)
			for seq := first; seq <= to; seq++ {
				named[seq] = true
			}
			a.name(a.ledger(agentEpoch{"a", epoch1}), loss(1, fmt.Sprintf(`{"first":%d,"last":%d}`, first, to)).Data)
		}
		a.End("a", Position{epoch1, last})
		for seq := uint64(1); seq <= last; seq++ {
			switch {
			case seen[seq] > 0:
			case named[seq]:
				want.NamedLost++
			default:
				want.Missing++
			}
		}
		got := a.Findings()
		for i := range got {
			got[i].MissingRanges = nil
		}
		if d := cmp.Diff([]Finding{want}, got); d != "" {
			t.Fatalf("seed %d, run %d, order %v, named %v (-want +got):\n%s", seed, run, order, named, d)
		}
	}
}
