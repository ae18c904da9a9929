// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// long is the amount of a test whose claim rests on many: a share of it in every run,
// the whole with EDR_LONG=1.
func long(share, whole int) int {
	if os.Getenv("EDR_LONG") == "1" {
		return whole
	}
	return share
}

// testSeed is where a test of chance begins: with EDR_SEED it is the same again, as
// far as goroutines and disks allow.
func testSeed(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("EDR_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("EDR_SEED: %v", err)
		}
	}
	t.Logf("EDR_SEED=%d", seed)
	return seed
}

func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// fastDir is a directory in memory where there is one: what is tested with it
// does not depend on the disk, and needs tens of thousands of commits.
func fastDir(t testing.TB) string {
	const tmpfs = 0x01021994
	var fs unix.Statfs_t
	if unix.Statfs("/dev/shm", &fs) != nil || fs.Type != tmpfs || fs.Bavail*uint64(fs.Bsize) < 256*mib {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "edr-buffer-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// gate lets a test hold the writer between transactions, and fail them.
type gate struct {
	mu         sync.Mutex // held from before until after a transaction
	failBefore int        // transactions to fail before they start
	failAfter  int        // transactions to fail after they are durable
	held       bool       // by the writer, whose transaction may fail in between
}

var errInjected = errors.New("injected")

func (g *gate) before() error {
	if !g.held {
		g.mu.Lock()
	}
	g.held = true
	if g.failBefore > 0 {
		g.failBefore--
		g.held = false
		g.mu.Unlock()
		return errInjected
	}
	return nil
}

func (g *gate) after() error {
	defer g.mu.Unlock()
	g.held = false
	if g.failAfter > 0 {
		g.failAfter--
		return errInjected
	}
	return nil
}

func (g *gate) install(o *Options) { o.BeforeCommit, o.afterCommit = g.before, g.after }

// copyFile copies the file while no transaction runs: what a kill would leave.
func copyFile(t testing.TB, dst, src string) {
	t.Helper()
	in, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// model is the queue in memory that the real one is held to: what was appended.
type model struct {
	recs []modelRecord // of seq 1 and up
}

type modelRecord struct {
	item   uint64 // 0 for a record that names losses
	sum    uint32 // of the payload
	stream Stream
	urgent bool
}

func (m *model) append(seq uint64, r modelRecord) error {
	if m.recs = append(m.recs, r); uint64(len(m.recs)) != seq {
		return fmt.Errorf("record %d of the model has seq %d", len(m.recs), seq)
	}
	return nil
}

// read checks what Read returned behind after: each record is the one appended, they
// ascend, and what is passed over is not there any more.
func (m *model) read(q *Queue, after uint64, recs []Record) error {
	if len(recs) == 0 {
		return errors.New("read nothing")
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range recs {
		if err := m.is(r); err != nil {
			return err
		}
		if r.Seq <= after {
			return fmt.Errorf("seq %d read behind %d", r.Seq, after)
		}
		if i := q.index.above(after); i < len(q.index.live()) && q.index.live()[i].first < r.Seq && after+1 < r.Seq {
			return fmt.Errorf("seq %d read behind %d, while the chunk at %d is live", r.Seq, after, q.index.live()[i].first)
		}
		after = r.Seq
	}
	return nil
}

// is checks that r is the record that was appended.
func (m *model) is(r Record) error {
	if r.Seq == 0 || r.Seq > uint64(len(m.recs)) {
		return fmt.Errorf("seq %d of %d appended", r.Seq, len(m.recs))
	}
	want := m.recs[r.Seq-1]
	if got := (modelRecord{want.item, crc32.ChecksumIEEE(r.Data), r.Stream, r.Urgent}); got != want {
		return fmt.Errorf("seq %d: read %+v, appended %+v", r.Seq, got, want)
	}
	return nil
}

// reopened forgets what was not durable when the process died. All of what a Flush
// has waited for must be there, and the mark be that of the last record.
func (m *model) reopened(q *Queue, flushed uint64, item uint64) error {
	last := q.Next() - 1
	if last < flushed || last > uint64(len(m.recs)) {
		return fmt.Errorf("%d records; %d were flushed, %d appended", last, flushed, len(m.recs))
	}
	m.recs = m.recs[:last]
	for _, r := range slices.Backward(m.recs) {
		if r.item == 0 {
			continue
		}
		if r.item != item {
			return fmt.Errorf("the mark is at item %d, the last record is item %d", item, r.item)
		}
		break
	}
	return nil
}

// step checks what must hold at any time: the sum, and that the chunks in the index
// are in order, apart, and what the sums say.
func (m *model) step(q *Queue) error {
	if err := invariant(q.Stats()); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	var sum index
	at, holes := uint64(0), uint64(0)
	live := q.index.live()
	for i, e := range live {
		if e.count == 0 || e.first <= at || e.last() > q.state.last || e.first < q.state.head {
			return fmt.Errorf("chunk of %d at seq %d behind %d; head %d, last %d", e.count, e.first, at, q.state.head, q.state.last)
		}
		if i > 0 {
			holes += e.first - at - 1
		}
		at = e.last()
		sum.push(e)
		if i < q.index.acked {
			sum.ackedPages += uint64(e.pages)
			sum.ackedRecords += uint64(e.count)
		}
	}
	x := &q.index
	if sum.pages != x.pages || sum.records != x.records || sum.ackedPages != x.ackedPages || sum.ackedRecords != x.ackedRecords {
		return fmt.Errorf("sums of the index: %+v, counted %+v", *x, sum)
	}
	if len(live) > 0 && live[0].first != 1+q.state.gone()-holes-(q.state.last-at) {
		return fmt.Errorf("first live is %d; %d are gone, of them %d behind it", live[0].first, q.state.gone(), holes+q.state.last-at)
	}
	if q.state.last > uint64(len(m.recs)) || q.state.acked > q.ack || q.ack > q.state.last || q.state.lease > q.state.last {
		return fmt.Errorf("last %d of %d, acked %d of %d, lease %d", q.state.last, len(m.recs), q.state.acked, q.ack, q.state.lease)
	}
	return nil
}

// whole looks at every record there ever was: each is in one place, and what is no
// more is with the server, or told as lost, once.
func (m *model) whole(q *Queue, led *ledger) error {
	const live, doubt, lost = 1, 2, 4
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.state
	place := make([]byte, s.last+1)
	put := func(r span, p byte) error {
		for seq := r.first; seq <= r.last; seq++ {
			if place[seq]&^p != 0 || place[seq]&p != 0 && p != lost {
				return fmt.Errorf("seq %d is in %d and %d", seq, place[seq], p)
			}
			place[seq] |= p
		}
		return nil
	}
	var errs []error
	for _, e := range q.index.live() {
		errs = append(errs, put(e.span(), live))
	}
	for _, d := range s.doubt {
		errs = append(errs, put(d.span, doubt))
	}
	var all losses
	for _, l := range s.losses {
		if _, told := led.items[l.by]; !told {
			all = append(all, l)
		}
	}
	for _, l := range led.lost {
		all = append(slices.Clone(all), loss{Loss: l})
	}
	count := map[string]uint64{}
	for _, l := range all {
		if !l.exact() {
			return nil // so many that they had to be joined
		}
		for seq := l.First; seq <= l.Last; seq++ {
			if place[seq] != lost {
				count[l.Cause]++
			}
			errs = append(errs, put(span{seq, seq}, lost))
		}
	}
	for seq, p := range place[1:] {
		seq++
		_, taken := led.items[uint64(seq)]
		switch {
		case p == lost && taken:
			errs = append(errs, fmt.Errorf("seq %d is lost, and the server has it", seq))
		case p == 0 && uint64(seq) > s.acked:
			errs = append(errs, fmt.Errorf("seq %d is nowhere; acked %d", seq, s.acked))
		}
	}
	if count[CauseTruncated] != s.truncated || count[CauseCorrupt] != s.corrupt {
		errs = append(errs, fmt.Errorf("%v by name; counters say %d truncated, %d corrupt", count, s.truncated, s.corrupt))
	}
	return errors.Join(errs...)
}

// TestModelFindsFaults is the control for TestModel: whatever a queue may do wrong, one
// of its checks fails.
func TestModelFindsFaults(t *testing.T) {
	s := &sim{t: t, led: newLedger(), model: new(model), rng: rand.New(rand.NewPCG(1, 1)), gone: map[uint64]bool{}}
	s.q = open(t, small(fastDir(t)))
	for range 300 {
		s.produce(10, 2000, false)
	}
	s.must(s.q.Flush(t.Context()))
	for range 5 {
		s.settle()
	}
	s.produce(10, 2000, false)
	s.must(s.q.Flush(t.Context()))
	recs, err := s.q.Read(t.Context(), s.pos, nil, 10, 1<<20)
	s.must(err)
	// A queue and a ledger of its own for each, so that nothing else sees the fault.
	judge := func(fault func(q *Queue, m *model, l *ledger, r []Record) uint64) error {
		s.q.mu.Lock()
		q := &Queue{o: s.q.o, state: s.q.state.clone(), index: s.q.index, ack: s.q.ack, pending: new(pending)}
		q.index.entries = slices.Clone(q.index.entries)
		s.q.mu.Unlock()
		m, l := &model{slices.Clone(s.model.recs)}, *s.led
		l.items, l.lost = maps.Clone(l.items), slices.Clone(l.lost)
		r := slices.Clone(recs)
		after := fault(q, m, &l, r)
		return errors.Join(m.step(q), m.whole(q, &l), m.read(q, after, r))
	}
	if err := judge(func(*Queue, *model, *ledger, []Record) uint64 { return s.pos }); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	for name, fault := range map[string]func(q *Queue, m *model, l *ledger, r []Record){
		"record garbled":      func(_ *Queue, _ *model, _ *ledger, r []Record) { r[3].Data = append([]byte("x"), r[3].Data...) },
		"another stream":      func(_ *Queue, _ *model, _ *ledger, r []Record) { r[3].Stream ^= 1 },
		"not urgent":          func(_ *Queue, _ *model, _ *ledger, r []Record) { r[3].Urgent = !r[3].Urgent },
		"out of order":        func(_ *Queue, _ *model, _ *ledger, r []Record) { r[3], r[4] = r[4], r[3] },
		"twice":               func(_ *Queue, _ *model, _ *ledger, r []Record) { r[4] = r[3] },
		"passed over":         func(_ *Queue, _ *model, _ *ledger, r []Record) { copy(r[3:], r[4:]); r[len(r)-1].Seq += 100 },
		"chunk forgotten":     func(q *Queue, _ *model, _ *ledger, _ []Record) { q.index.remove(q.index.live()[2].first) },
		"chunk out of order":  func(q *Queue, _ *model, _ *ledger, _ []Record) { l := q.index.live(); l[1], l[2] = l[2], l[1] },
		"sum of pages":        func(q *Queue, _ *model, _ *ledger, _ []Record) { q.index.pages++ },
		"sum of acknowledged": func(q *Queue, _ *model, _ *ledger, _ []Record) { q.index.ackedRecords++ },
		"counter":             func(q *Queue, _ *model, _ *ledger, _ []Record) { q.state.truncated++; q.state.reclaimed-- },
		"loss not told":       func(_ *Queue, _ *model, l *ledger, _ []Record) { l.lost = l.lost[1:] },
		"lost and delivered":  func(_ *Queue, _ *model, l *ledger, _ []Record) { l.items[l.lost[0].First] = 1 },
		"in doubt and live": func(q *Queue, _ *model, _ *ledger, _ []Record) {
			q.state.doubt = append(q.state.doubt, doubt{span: q.index.live()[0].span()})
		},
		"more than appended":  func(_ *Queue, m *model, _ *ledger, _ []Record) { m.recs = m.recs[:len(m.recs)-1] },
		"acked ahead of disk": func(q *Queue, _ *model, _ *ledger, _ []Record) { q.ack = q.state.last + 1 },
	} {
		err := judge(func(q *Queue, m *model, l *ledger, r []Record) uint64 { fault(q, m, l, r); return s.pos })
		if err == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

// TestModel runs random operations of worker, sender, server, disk and fate against a
// queue and a model of it. It holds one to the other after each operation, looks at
// every record every hundred operations, and has the ledger drawn up at the end of
// each life of the file.
func TestModel(t *testing.T) {
	const perLife = 5000
	ops := long(50_000, 1_000_000)
	if raceDetector() {
		ops /= 4 // it is that much slower
	}
	seed := testSeed(t)
	start := time.Now()
	var total Stats
	done := map[string]int{}
	for life := range max(ops/perLife, 1) {
		rng := rand.New(rand.NewPCG(seed+uint64(life), 0))
		root := fastDir(t)
		m := &modelRun{
			sim:  sim{t: t, led: newLedger(), model: new(model), rng: rng, gone: map[uint64]bool{}},
			root: root, dir: filepath.Join(root, "0"), done: done,
		}
		m.open(false)
		for op := range perLife {
			name := m.op()
			done[name]++
			err := m.model.step(m.q)
			if op%100 == 0 {
				err = errors.Join(err, m.model.whole(m.q, m.led))
			}
			if err = errors.Join(append(m.led.errs, err)...); err != nil {
				t.Fatalf("life %d op %d, %s: %v\nEDR_SEED=%d begins with this life", life, op, name, err, seed+uint64(life))
			}
		}
		for range 30 { // names of losses are themselves delivered
			m.settle()
		}
		if err := errors.Join(m.verify(), m.model.whole(m.q, m.led)); err != nil {
			t.Fatalf("life %d: %v\nEDR_SEED=%d begins with this life", life, err, seed+uint64(life))
		}
		s := m.q.Stats()
		total.Last += s.Last
		total.Truncated += s.Truncated
		total.Corrupt += s.Corrupt
		total.Reclaimed += s.Reclaimed
		total.Salvaged += s.Salvaged
		closeQueue(t, m.q)
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d operations in %v: %v", ops, time.Since(start).Round(time.Second), done)
	t.Logf("%d records: %d truncated, %d corrupt, %d reclaimed, %d salvaged",
		total.Last, total.Truncated, total.Corrupt, total.Reclaimed, total.Salvaged)
	if total.Truncated == 0 || total.Corrupt == 0 || total.Reclaimed == 0 || total.Salvaged == 0 || done[causeServer] == 0 || done["resize"] == 0 {
		t.Error("the run did not meet everything it is meant to")
	}
}

type modelRun struct {
	sim
	gate      gate
	root, dir string
	dirs      int
	flushed   uint64 // seq that a Flush has waited for
	outage    bool
	done      map[string]int
}

// open opens the queue; harmed says that something was done to its file.
func (m *modelRun) open(harmed bool) {
	o := small(m.dir)
	o.RetainBytes = 256 * kib
	o.Cap = m.size()
	o.Compression = anyCodec(m.rng)
	m.gate.install(&o)
	q, err := Open(m.t.Context(), o)
	m.must(err)
	if r := q.Stats().Recovery; r != nil && (!harmed || !r.Exact) {
		m.t.Fatalf("set aside, harmed %v: %+v", harmed, r)
	}
	m.q = q
	m.item = 0
	if mark := q.Mark(); mark != nil {
		m.item = be64(mark)
	}
	m.must(m.model.reopened(q, m.flushed, m.item))
	if !m.outage {
		m.connect()
	}
}

// anyCodec is any compression, or none: a file may have chunks of all.
func anyCodec(rng *rand.Rand) string { return []string{"none", "none", "s2", "zstd"}[rng.IntN(4)] }

// size is any that the file may have.
func (m *modelRun) size() int64 { return int64(3+m.rng.IntN(6)) * mib / 2 }

// op does one operation and names it.
func (m *modelRun) op() string {
	switch n := m.rng.IntN(1000); {
	case n < 500:
		m.produce(m.rng.IntN(20), 1+m.rng.IntN(3000), m.rng.IntN(10) == 0)
		return "append"
	case n < 560:
		m.must(m.q.Flush(m.t.Context()))
		m.flushed = m.q.Next() - 1
		return "flush"
	case n < 950:
		if m.outage {
			m.produce(1, 500, false)
			return "append"
		}
		m.produce(1, 50, false) // so that there is something to read
		fate := 0
		if m.rng.IntN(60) == 0 {
			fate = 1 + m.rng.IntN(2)
		}
		m.deliver(1+m.rng.IntN(300), 1+m.rng.IntN(128*kib), fate)
		if fate != 0 {
			if m.rng.IntN(2) == 0 {
				m.outage = true // the server has it or not, and is gone
			} else {
				m.connect()
			}
		}
		return "read"
	case n < 956:
		m.scan()
		return "scan"
	case n < 962:
		m.rollback(1 + m.rng.IntN(300))
		if !m.outage {
			m.connect()
		}
		return causeServer
	case n < 972:
		// An outage lasts long enough to overrun the file.
		if m.outage = !m.outage || m.rng.IntN(2) > 0; !m.outage {
			m.connect()
		}
		return "outage"
	case n < 980:
		return m.crash()
	case n < 984:
		closeQueue(m.t, m.q)
		m.flushed = m.q.Next() - 1
		m.open(false)
		return "reopen"
	case n < 990:
		m.gate.mu.Lock()
		defer m.gate.mu.Unlock()
		if m.rng.IntN(2) == 0 {
			m.gate.failBefore = 1 + m.rng.IntN(2)
		} else {
			m.gate.failAfter = 1 + m.rng.IntN(2)
		}
		return "failed commit"
	case n < 994:
		m.flip()
		return "damaged chunk"
	case n < 995:
		return m.cut()
	case n < 997:
		m.must(m.q.Resize(m.t.Context(), m.size()))
		return "resize"
	default:
		m.q.wake() // for nothing
		return "wake"
	}
}

// scan looks at what there is, which changes nothing.
func (m *modelRun) scan() {
	n, at := m.rng.IntN(2000), uint64(0)
	m.must(m.q.Scan(m.t.Context(), time.Time{}, func(r Record) bool {
		if r.Seq <= at {
			m.t.Fatalf("scan: seq %d behind %d", r.Seq, at)
		}
		m.must(m.model.is(r))
		at = r.Seq
		n--
		return n > 0
	}))
}

// crash goes on with a copy of the files as they are on disk now: what a kill leaves.
// Now and then the sidecar is missing, or a part of the tree is damaged.
func (m *modelRun) crash() string {
	name := "crash"
	m.dirs++
	next := filepath.Join(m.root, fmt.Sprint(m.dirs))
	m.must(os.Mkdir(next, 0o700))
	side := m.rng.IntN(3) > 0
	m.gate.mu.Lock()
	// The sidecar first: it may be older than the file, and never is newer.
	if side {
		copyFile(m.t, filepath.Join(next, sidecarName), filepath.Join(m.dir, sidecarName))
	}
	copyFile(m.t, filepath.Join(next, fileName), filepath.Join(m.dir, fileName))
	m.gate.failBefore, m.gate.failAfter = 0, 0
	m.gate.mu.Unlock()
	if side && m.rng.IntN(3) == 0 {
		name = "crash and damaged tree"
		harmTree(m.t, m.rng, filepath.Join(next, fileName))
	}
	closeQueue(m.t, m.q)
	m.must(os.RemoveAll(m.dir))
	m.dir = next
	m.open(name != "crash")
	if name != "crash" {
		// The next transaction makes a damaged meta page good; to lose the sidecar
		// before would be too much at once.
		m.produce(1, 10, false)
		m.must(m.q.Flush(m.t.Context()))
	}
	return name
}

// flip damages one byte of a live chunk, header and payload alike.
func (m *modelRun) flip() {
	m.gate.mu.Lock()
	defer m.gate.mu.Unlock()
	m.q.mu.Lock()
	l := m.q.index.live()
	var e entry
	if len(l) > 0 {
		e = l[m.rng.IntN(len(l))]
	}
	m.q.mu.Unlock()
	if e.root == 0 {
		return
	}
	f, err := os.OpenFile(filepath.Join(m.dir, fileName), os.O_RDWR, 0)
	m.must(err)
	defer f.Close()
	at := int64(e.root)*pageSize + leafHeader
	if m.rng.IntN(2) == 0 {
		at += int64(m.rng.IntN(chunkHeader))
	} else {
		at += int64(m.rng.IntN(int(e.pages)*pageSize - leafHeader))
	}
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	m.must(err)
	b[0] ^= 1 << m.rng.IntN(8)
	_, err = f.WriteAt(b[:], at)
	m.must(err)
}

// cut shortens or removes the file under the open queue, which replaces it.
func (m *modelRun) cut() string {
	if m.q.Stats().Recovery != nil {
		return "wake" // it does that a few times only
	}
	name, path := "cut file", filepath.Join(m.dir, fileName)
	// Not while a failed commit has the file opened again: bbolt then reads its mapping in
	// a goroutine of its own, where a fault ends the process.
	m.gate.mu.Lock()
	m.gate.failBefore, m.gate.failAfter = 0, 0
	m.gate.mu.Unlock()
	m.must(m.q.Flush(m.t.Context()))
	m.gate.mu.Lock()
	if m.rng.IntN(2) == 0 {
		name = "removed file"
		m.must(os.Remove(path))
	} else {
		m.must(os.Truncate(path, m.rng.Int64N(m.q.Stats().Cap)))
	}
	m.gate.mu.Unlock()
	m.produce(1, 10, false)
	m.must(m.q.Flush(m.t.Context()))
	// Without a recovery what was cut off had never been used.
	if r := m.q.Stats().Recovery; r != nil && !r.Exact || r == nil && name != "cut file" {
		m.t.Fatalf("%s: %+v", name, r)
	}
	return name
}

func be64(b []byte) (v uint64) {
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v
}
