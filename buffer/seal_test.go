// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"
)

// lastTransaction returns a file before and after a transaction that drops, adds and
// overwrites, as a sync leaves it, and the state before.
func lastTransaction(t *testing.T, rng *rand.Rand, o Options) (before, after []byte, s *state) {
	t.Helper()
	var path string
	o.BeforeCommit = func() error {
		if path != "" {
			before, s = read(t, path), readSidecar(o.Dir, bootID()).state
		}
		return nil
	}
	o.afterCommit = func() error {
		if path != "" {
			after = read(t, path)
		}
		return nil
	}
	q := open(t, o)
	for n := range 300 + rng.IntN(20) {
		if n == 299 {
			path = q.path
		}
		records := make([]string, 1+rng.IntN(20))
		for i := range records {
			records[i] = fmt.Sprintf("%0*d", 1+rng.IntN(3000), n)
		}
		add(t, q, records...)
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if rng.IntN(3) == 0 {
			q.Ack(q.Bounds().Last - uint64(rng.IntN(200)))
		}
	}
	path = ""
	closeQueue(t, q)
	return before, after, s
}

// cutOff returns a file that has of a transaction those sectors that keep says.
func cutOff(before, after []byte, keep func(sector int, changed bool) bool) []byte {
	const sector = 512
	out := bytes.Clone(before)
	for at := 0; at < len(out); at += sector {
		changed := !bytes.Equal(before[at:at+sector], after[at:at+sector])
		if keep(at/sector, changed) {
			copy(out[at:], after[at:at+sector])
		}
	}
	return out
}

// TestSealTellsWhatWasCutOff writes any part of a transaction, and opens what that leaves:
// the state before it, or the state after it when everything is there. The control is the
// same file without seals, where a meta page speaks for what is not on disk.
func TestSealTellsWhatWasCutOff(t *testing.T) {
	rng := rand.New(rand.NewPCG(testSeed(t), 0))
	o := small(fastDir(t))
	before, after, known := lastTransaction(t, rng, o)
	gen := func(data []byte) (uint64, error) {
		m, err := preflight(bytes.NewReader(data), int64(len(data)), 0)
		if err != nil {
			return 0, err
		}
		s, err := stateAt(bytes.NewReader(data), int64(len(data)), m)
		if err != nil {
			return 0, err
		}
		return s.gen, nil
	}
	old, err := gen(before)
	if err != nil {
		t.Fatal(err)
	}
	if g, err := gen(after); err != nil || g != old+1 {
		t.Fatalf("transaction %d after %d: %v", g, old, err)
	}
	m, err := metaInForce(bytes.NewReader(after), int64(len(after)))
	if err != nil || m.seal == nil || m.other == nil {
		t.Fatalf("%+v: %v", m, err)
	}
	meta := int(m.txid%2) * pageSize / 512
	kept := map[uint64]int{}
	states := long(300, 3000)
	if raceDetector() {
		states /= 8 // it is that much slower
	}
	for n := range states {
		share := rng.IntN(5)
		data := cutOff(before, after, func(sector int, changed bool) bool {
			if sector == meta {
				return n%8 > 0 // else it is the state before anyway
			}
			// At times all but one sector of it, which is the hardest to tell.
			return changed && (share == 4 && rng.IntN(40) > 0 || share < 4 && rng.IntN(4) < share)
		})
		if n%3 == 0 { // bbolt clears the rest of its page before the seal is written
			clear(data[(meta+1)*512 : (meta+8)*512])
		}
		dir := filepath.Join(fastDir(t), fmt.Sprint(n))
		plant(t, dir, data)
		plantSidecar(t, dir, known, [16]byte{1})
		q := open(t, small(dir))
		st := q.Stats()
		if st.Recovery != nil || invariant(st) != nil {
			t.Fatalf("state %d: %v %+v", n, invariant(st), st.Recovery)
		}
		g := q.state.gen
		if g != old && g != old+1 {
			t.Errorf("state %d: opened transaction %d of %d", n, g, old+1)
		}
		kept[g-old]++
		records := uint64(0)
		if err := q.Scan(t.Context(), time.Time{}, func(Record) bool { records++; return true }); err != nil || records != st.Records {
			t.Errorf("state %d: %d records of %d can be read: %v", n, records, st.Records, err)
		}
		add(t, q, "works")
		closeQueue(t, q)
		if g, err := gen(read(t, q.path)); err != nil || g <= old {
			t.Errorf("state %d: goes on with transaction %d: %v", n, g, err)
		}
	}
	t.Logf("of %d states %d are those before", kept[0]+kept[1], kept[0])
	if kept[0] == 0 {
		t.Error("no transaction was cut off")
	}
	// The control.
	wrong := 0
	for range 100 {
		data := cutOff(before, after, func(sector int, changed bool) bool {
			return changed && (sector == meta || rng.IntN(2) > 0)
		})
		clear(data[sealAt:pageSize])
		clear(data[pageSize+sealAt : 2*pageSize])
		if g, err := gen(data); err != nil || g != old {
			wrong++
		}
	}
	if t.Logf("control: %d of 100 states without seals are wrong", wrong); wrong == 0 {
		t.Error("the control is not noticed")
	}
}

// TestSealIsRefused: what is not sound after the last transaction is given up only when
// the sidecar says that nobody knows of it.
func TestSealIsRefused(t *testing.T) {
	rng := rand.New(rand.NewPCG(testSeed(t), 1))
	before, after, known := lastTransaction(t, rng, small(fastDir(t)))
	m, err := metaInForce(bytes.NewReader(after), int64(len(after)))
	if err != nil {
		t.Fatal(err)
	}
	// A state in the place of another, as a page that was not written has it: both end
	// with their checksum, and a CRC of the page would be the same.
	data := bytes.Clone(after)
	s, err := stateAt(bytes.NewReader(after), int64(len(after)), m)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(data, s.encode(nil))
	s.truncated++
	copy(data[i:], s.encode(nil))
	if m.check(bytes.NewReader(after)) != nil || m.check(bytes.NewReader(data)) == nil {
		t.Fatal("the seal does not tell one state from another")
	}
	harmed := func(txid uint64) []byte {
		b := bytes.Clone(after)
		b[int(txid%2)*pageSize+pageHeader] ^= 1
		return b
	}
	at := func(gen uint64) *state {
		s := known.clone()
		s.gen = gen
		return s
	}
	for name, x := range map[string]struct {
		data  []byte
		known *state
		boot  [16]byte
		want  bool
	}{
		"known by nobody":            {data, known, [16]byte{1}, true},
		"the last second is missing": {data, at(known.gen - 5), [16]byte{1}, true},
		"known by the sidecar":       {data, at(known.gen + 1), [16]byte{1}, false},
		"no sidecar":                 {data, nil, [16]byte{}, false},
		"in this boot":               {data, known, bootID(), true},
		"in this boot, older":        {data, at(known.gen - 1), bootID(), false},
		"sound":                      {before, known, [16]byte{1}, true},
		"newer meta damaged":         {harmed(m.txid), known, [16]byte{1}, false},
		"that in this boot":          {harmed(m.txid), known, bootID(), true},
		"older meta damaged":         {harmed(m.txid + 1), at(known.gen + 1), [16]byte{1}, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := fastDir(t)
			plant(t, dir, x.data)
			if x.known != nil {
				plantSidecar(t, dir, x.known, x.boot)
			}
			q := open(t, small(dir))
			if st := q.Stats(); (st.Recovery == nil) != x.want || invariant(st) != nil {
				t.Errorf("%+v %+v", st, st.Recovery)
			}
		})
	}
}

// TestSealOverDamagedChunk cuts off a transaction after one whose chunk has been damaged
// since: it is given up as any other, and the chunk is found by the reader.
func TestSealOverDamagedChunk(t *testing.T) {
	o := small(fastDir(t))
	o.CommitInterval = time.Hour // each Flush is one transaction
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(8, 8))}
	s.q = open(t, o)
	for range 20 {
		s.produce(5, 2000, false)
		s.must(s.q.Flush(t.Context()))
	}
	s.q.mu.Lock()
	e := s.q.index.live()[len(s.q.index.live())-1]
	s.q.mu.Unlock()
	known := readSidecar(o.Dir, bootID()).state
	s.produce(5, 2000, false)
	s.must(s.q.Flush(t.Context()))
	data := read(t, s.q.path)
	data[int(e.root)*pageSize+leafHeader+chunkHeader] ^= 1
	m, err := metaInForce(bytes.NewReader(data), int64(len(data)))
	s.must(err)
	clear(data[int(m.txid%2)*pageSize+sealAt:][:sealSize])

	o.Dir = fastDir(t)
	plant(t, o.Dir, data)
	plantSidecar(t, o.Dir, known, [16]byte{1})
	s.q = open(t, o)
	if st := s.q.Stats(); st.Recovery != nil || st.Last != known.last {
		t.Fatalf("last %d, was %d: %+v", st.Last, known.last, st.Recovery)
	}
	s.item = be64(s.q.Mark())
	for range 20 {
		s.settle()
	}
	s.must(s.verify())
	if st := s.q.Stats(); st.Corrupt != uint64(e.count) {
		t.Errorf("%d records of %d are lost", st.Corrupt, e.count)
	}
	closeQueue(t, s.q)
	check(t, s.q.path)
}

func plantSidecar(t *testing.T, dir string, s *state, boot [16]byte) {
	t.Helper()
	c, err := openSidecar(dir, witness{}, boot)
	if err == nil {
		err = errors.Join(c.write(s, time.Now()), c.close())
	}
	if err != nil {
		t.Fatal(err)
	}
}
