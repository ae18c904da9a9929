// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	cutLifeEnv   = "EDR_BUFFER_CUT_LIFE"
	cutReplayEnv = "EDR_BUFFER_CUT_REPLAY"
)

// childTB is what helpers of tests need in a process that is none.
type childTB struct{ testing.TB }

func (childTB) Helper()                  {}
func (childTB) Context() context.Context { return context.Background() }
func (c childTB) Fatal(a ...any)         { c.Fatalf("%s", fmt.Sprintln(a...)) }
func (childTB) Fatalf(format string, a ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", a...)
	os.Exit(1)
}

// cutLife is one life of a process whose writes are recorded.
type cutLife struct {
	Dir   string
	Seed  uint64
	Cap   int64
	Steps int
	Codec string
	Kill  bool // end without a close
	Rot   bool // damage chunks
	Renew bool // move to another epoch at the end
	Sizes []int64
	Taken map[uint64]uint64
	Last  uint64 // that the server has
}

// taken is one record that the server has taken.
type taken struct {
	Seq, Item uint64
	Lost      []Loss `json:",omitempty"`
}

// say writes one line into the trace: what was told to the world before, and after, the
// writes around it.
func say(format string, args ...any) {
	if _, err := fmt.Fprintf(os.Stdout, format+"\n", args...); err != nil {
		os.Exit(1)
	}
}

// cutLifeChild appends and delivers, and says what is durable and what was delivered.
func cutLifeChild(spec string) {
	var life cutLife
	s := &sim{t: childTB{}, led: newLedger(), gone: map[uint64]bool{}}
	s.must(json.Unmarshal([]byte(spec), &life))
	s.rng = rand.New(rand.NewPCG(life.Seed, 0))
	s.led.last = life.Last
	maps.Copy(s.led.items, life.Taken)
	s.led.told = func(recs []Record) {
		var all []taken
		lost := len(s.led.lost)
		for _, r := range recs {
			if _, ok := s.led.items[r.Seq]; ok {
				continue
			}
			s.led.apply(r)
			all = append(all, taken{r.Seq, s.led.items[r.Seq], s.led.lost[lost:]})
			lost = len(s.led.lost)
		}
		line, err := json.Marshal(all)
		s.must(err)
		say("T %s", line)
	}
	o := small(life.Dir)
	o.Cap, o.RetainBytes, o.Compression = life.Cap, 256*kib, life.Codec
	var q atomic.Pointer[Queue]
	o.Committed = func(mark []byte) {
		if q := q.Load(); q != nil {
			b := q.Bounds()
			say("D %d %d %d", b.Last, be64(mark), b.First)
		}
	}
	var die atomic.Bool
	o.BeforeCommit = func() error {
		if die.Load() { // between two transactions: those are cut where the trace is
			s.must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
		}
		return nil
	}
	var err error
	s.q, err = Open(s.t.Context(), o)
	s.must(err)
	q.Store(s.q)
	s.item = be64(s.q.Mark())
	say("O %s", s.q.Epoch())
	s.connect()
	away := false
	for step := range life.Steps {
		s.produce(1+s.rng.IntN(20), 1+s.rng.IntN(3000), s.rng.IntN(5) == 0)
		switch n := s.rng.IntN(20); {
		case n < 4:
			s.must(s.q.Flush(s.t.Context()))
		case n < 12 && !away:
			fate := max(0, s.rng.IntN(20)-17)
			if s.deliver(1+s.rng.IntN(100), 1+s.rng.IntN(64*kib), fate); fate > 0 {
				away = true
			}
		case n == 12 || step%50 == 49:
			if away = !away; !away {
				s.connect()
			}
		}
		if life.Rot && step%20 == 13 {
			s.rot()
		}
		if n := len(life.Sizes); n > 0 && step%10 == 9 {
			s.must(s.q.Resize(s.t.Context(), life.Sizes[step/10%n]))
		}
	}
	if s.must(s.q.Flush(s.t.Context())); life.Rot {
		s.connect()
		for range 3 { // so that there is a chunk for it at least once
			s.produce(5, 2000, false)
			s.must(s.q.Flush(s.t.Context()))
		}
		s.rot()
		for s.connect(); s.pos < s.q.Bounds().Last; { // so that it is found
			s.deliver(100, 1<<20, 0)
		}
	}
	if life.Renew {
		for s.connect(); s.pos < s.q.Bounds().Last; {
			s.deliver(100, 1<<20, 0)
		}
		for range 20 {
			s.produce(10, 2000, false)
		}
		s.must(s.q.Flush(s.t.Context()))
		say("W %d", s.q.Bounds().First)
		epoch, err := s.q.Renew(s.t.Context(), "")
		s.must(err)
		say("R %s", epoch)
	}
	if !life.Kill {
		s.must(s.q.Close(s.t.Context()))
		os.Exit(0)
	}
	die.Store(true)
	s.produce(3, 100, true)
	s.must(s.q.Flush(s.t.Context()))
}

// rot damages the header or the payload of a chunk that is not delivered, durably. It is
// none of the last transaction: of that, after a power cut, a chunk that was damaged looks
// like one that was not yet on the disk, and nothing can tell them apart.
func (s *sim) rot() {
	s.q.mu.Lock()
	defer s.q.mu.Unlock() // so that no transaction has its pages before they are written to
	l := s.q.index.live()
	n := len(l)
	for n > 0 && l[n-1].at == l[len(l)-1].at {
		n--
	}
	if l = l[min(s.q.index.above(s.q.ack), n):n]; len(l) == 0 {
		return
	}
	e := l[s.rng.IntN(len(l))]
	f, err := os.OpenFile(s.q.path, os.O_RDWR, 0)
	s.must(err)
	defer f.Close()
	// bbolt looks at its own page header, and at nothing behind.
	_, err = f.WriteAt([]byte{0xa5}, int64(e.root)*pageSize+leafHeader+int64(s.rng.IntN(chunkHeader+100)))
	s.must(errors.Join(err, f.Sync()))
}

// tracedLives records some lives of a buffer, with damage between some of them.
func tracedLives(t *testing.T, seed uint64) (dir string, calls []traced) {
	t.Helper()
	dir = filepath.Join(fastDir(t), "buffer")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	led := newLedger()
	path := filepath.Join(dir, fileName)
	live := func(l cutLife) {
		t.Helper()
		l.Dir, l.Seed, l.Taken, l.Last = dir, seed+uint64(len(calls)), led.items, led.last
		spec, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0])
		var errs bytes.Buffer
		cmd.Env, cmd.Stderr = append(os.Environ(), cutLifeEnv+"="+string(spec)), &errs
		part := trace(t, cmd, dir)
		if errs.Len() > 0 || len(part) < 100 {
			t.Fatalf("%d calls; %s", len(part), errs.Bytes())
		}
		for _, c := range part {
			if err := led.line(c.Line); err != nil {
				t.Fatal(err)
			}
		}
		calls = append(calls, part...)
	}
	// harm damages pages durably: of the tree, never a chunk.
	harm := func(pages ...uint64) {
		t.Helper()
		data := read(t, path)
		calls = append(calls, traced{Line: "H\n"})
		for _, p := range pages {
			at := p*pageSize + 20
			data[at] ^= 0x10
			calls = append(calls, traced{Call: "pwrite64", Path: path, Off: int64(at), Data: data[at : at+1]})
		}
		plant(t, dir, data)
		calls = append(calls, traced{Call: "fsync", Path: path})
	}
	root := func() uint64 {
		data := read(t, path)
		m, err := preflight(bytes.NewReader(data), int64(len(data)), 0)
		if err != nil {
			t.Fatal(err)
		}
		return m.root
	}
	live(cutLife{Cap: 2 * mib, Steps: 150, Kill: true})
	live(cutLife{Cap: 2 * mib, Steps: 60, Codec: "s2"})
	live(cutLife{Cap: 2 * mib, Steps: 60, Rot: true, Kill: true})
	live(cutLife{Cap: 2 * mib, Steps: 80, Sizes: []int64{3 * mib, 5 * mib / 2, 2 * mib}, Kill: true})
	harm(root())
	live(cutLife{Cap: 3 * mib, Steps: 40, Codec: "zstd", Kill: true})
	harm(0, 1)
	live(cutLife{Cap: 2 * mib, Steps: 40, Renew: true})
	for _, name := range []string{sidecarName, fileName + newSuffix, fileName + sizeSuffix, fileName + badSuffix, badChunk} {
		if !slices.ContainsFunc(calls, func(c traced) bool { return strings.Contains(c.Path+c.To, name) }) {
			t.Errorf("the lives had nothing to do with a file %s", name)
		}
	}
	return dir, calls
}

// line takes in what a line of the trace says to have been delivered.
func (l *ledger) line(line string) error {
	rest, ok := strings.CutPrefix(line, "T ")
	if !ok {
		return nil
	}
	var all []taken
	if err := json.Unmarshal([]byte(rest), &all); err != nil {
		return err
	}
	for _, x := range all {
		l.items[x.Seq], l.last = x.Item, max(l.last, x.Seq)
		l.lost = append(l.lost, x.Lost...)
	}
	return nil
}

// cutReplay asks a child to cut the power in N states, and to open what that leaves.
type cutReplay struct {
	Calls string // file with a cutTrace
	Dir   string // to open them in
	Seed  uint64
	N     int
	From  int // in the order in which they are done
	// Ignore is which share of the syncs a disk of lies ignores, of files and of names.
	IgnoreFiles, IgnoreNames int
}

type cutTrace struct {
	Dir   string
	Calls []traced
}

// cutResult is what became of one state.
type cutResult struct {
	N, At int
	Call  string
	Kind  string // opened, exact, new epoch
	Err   string
}

// told is what the world knows at a moment of the trace.
type told struct {
	epoch       string
	last, item  uint64 // durable
	first       uint64 // of what is live soon after
	led         *ledger
	harmed      bool
	anythingYet bool
	renewing    bool
	renewed     string // the other epoch, once it is in force
}

// cutReplayChild does that. It must not die; what it dies of is its last line.
func cutReplayChild(spec string) {
	tb := &sim{t: childTB{}}
	var r cutReplay
	tb.must(json.Unmarshal([]byte(spec), &r))
	f, err := os.Open(r.Calls)
	tb.must(err)
	var tr cutTrace
	tb.must(gob.NewDecoder(f).Decode(&tr))
	tb.must(f.Close())

	// Half of the cuts are anywhere, half near what is rare: changes of names, the start
	// and the end of a life or of an epoch.
	var near []int
	for i, c := range tr.Calls {
		if c.Path != "" && c.Call != "pwrite64" && c.Call != "fdatasync" || c.Line != "" && strings.Contains("OHWR", c.Line[:1]) {
			near = append(near, i)
		}
	}
	type state struct{ n, at int }
	states := make([]state, r.N)
	for n := range states {
		rng := rand.New(rand.NewPCG(r.Seed, uint64(n)))
		at := rng.IntN(len(tr.Calls))
		if rng.IntN(2) == 0 {
			at = min(max(near[rng.IntN(len(near))]+rng.IntN(20)-10, 0), len(tr.Calls)-1)
		}
		states[n] = state{n, at}
	}
	slices.SortFunc(states, func(a, b state) int { return a.at - b.at })

	d := newDisk(tr.Dir)
	lies := rand.New(rand.NewPCG(r.Seed, 1<<63))
	w := told{led: newLedger()}
	out := json.NewEncoder(os.Stdout)
	at := 0
	for k, s := range states {
		for ; at < s.at; at++ {
			c := tr.Calls[at]
			share := r.IgnoreFiles
			if c.Path == tr.Dir {
				share = r.IgnoreNames
			}
			if c.Line != "" {
				tb.must(w.line(c.Line))
			} else {
				tb.must(d.do(c, lies.IntN(4) < share))
			}
		}
		if k < r.From {
			continue
		}
		fmt.Fprintln(os.Stderr, "state", s.n, "at", at)
		for _, c := range tr.Calls[at:] {
			if w.renewing {
				break // there are other numbers from now on
			}
			if n, _ := fmt.Sscanf(c.Line, "D %d %d %d", new(uint64), new(uint64), &w.first); n == 3 {
				break
			}
		}
		rng := rand.New(rand.NewPCG(r.Seed, uint64(s.n)|1<<62))
		res := cutResult{N: s.n, At: at, Call: tr.Calls[at].Call}
		if res.Kind, err = w.open(filepath.Join(r.Dir, fmt.Sprint(s.n)), d.cut(rng), rng); err != nil {
			res.Err = err.Error()
		}
		tb.must(out.Encode(res))
	}
	os.Exit(0)
}

// line takes in a line of the trace.
func (w *told) line(line string) error {
	switch line[0] {
	case 'O':
		w.epoch, w.harmed, w.anythingYet = strings.TrimSpace(line[2:]), false, true
	case 'D':
		var last, item uint64
		if _, err := fmt.Sscanf(line, "D %d %d", &last, &item); err != nil {
			return err
		}
		w.last, w.item = max(w.last, last), max(w.item, item)
	case 'H':
		w.harmed = true
	case 'W':
		w.renewing = true
		if _, err := fmt.Sscanf(line, "W %d", &w.first); err != nil {
			return err
		}
	case 'R':
		w.renewed = strings.TrimSpace(line[2:])
	}
	return w.led.line(line)
}

// open opens the files that a power cut has left, goes on for a while, and holds the
// result to what was told to the world before.
func (w *told) open(dir string, files map[string][]byte, rng *rand.Rand) (kind string, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	o := small(dir)
	for name, data := range files {
		name = filepath.Base(name)
		switch n := int64(len(data)); {
		case name == sidecarName:
			anotherBoot(data)
		case name == fileName && n >= 3*mib/2 && n%pageSize == 0:
			o.Cap = n
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return "", err
		}
	}
	q, err := Open(context.Background(), o)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, q.Close(context.Background())) }()
	st := q.Stats()
	if err := invariant(st); err != nil {
		return "", err
	}
	for _, left := range []string{newSuffix, sizeSuffix} {
		if _, err := os.Stat(q.path + left); err == nil {
			return "", fmt.Errorf("%s was left behind", q.path+left)
		}
	}
	switch {
	case !w.anythingYet && w.last == 0 && st.Recovery == nil:
		return "new", nil
	case w.renewing && st.Recovery == nil && (w.renewed != "" || st.Epoch != w.epoch):
		if w.renewed != "" && st.Epoch != w.renewed || slices.Contains(q.Unnamed(nil), Loss{Cause: CauseCorrupt}) {
			return "", fmt.Errorf("epoch %s, moved to %s; losses %v", st.Epoch, w.renewed, q.Unnamed(nil))
		}
		return "renewed", w.fresh(q, st)
	case st.Recovery == nil:
		kind = "opened"
	case w.harmed && st.Recovery.Exact:
		kind = "exact"
	case w.harmed:
		if !slices.Contains(q.Unnamed(nil), Loss{Cause: CauseCorrupt}) {
			return "", fmt.Errorf("no loss of unknown size: %v", q.Unnamed(nil))
		}
		return "new epoch", w.fresh(q, st)
	default:
		return "", fmt.Errorf("set aside: %+v", *st.Recovery)
	}
	if st.Epoch != w.epoch || st.Last < w.last || be64(q.Mark()) < w.item || st.Last < w.led.last {
		return kind, fmt.Errorf("epoch %s, last %d, mark %d; were %s, %d, %d; the server is at %d",
			st.Epoch, st.Last, be64(q.Mark()), w.epoch, w.last, w.item, w.led.last)
	}
	led := *w.led
	led.items, led.lost, led.errs = maps.Clone(led.items), slices.Clone(led.lost), nil
	s := &sim{t: childTB{}, q: q, led: &led, rng: rng, item: be64(q.Mark()), gone: map[uint64]bool{}}
	for n := 0; n < 30 && (n < 2 || q.Stats().Losses > 0 || q.Stats().InDoubt > 0); n++ {
		s.settle()
	}
	return kind, errors.Join(s.verify(), invariant(q.Stats()))
}

// fresh looks at a new epoch: it sorts behind the old one, and what was live and
// undelivered is there, once, in order.
func (w *told) fresh(q *Queue, st Stats) error {
	if st.Epoch <= w.epoch {
		return fmt.Errorf("epoch %s, was %s", st.Epoch, w.epoch)
	}
	have := map[uint64]bool{}
	var at uint64
	var errs []error
	err := q.Scan(context.Background(), time.Time{}, func(r Record) bool {
		if len(r.Data) < 9 || r.Data[0] != kindItem {
			return true
		}
		item := be64(r.Data[1:9])
		if item <= at {
			errs = append(errs, fmt.Errorf("seq %d: item %d after %d", r.Seq, item, at))
		}
		at, have[item] = item, true
		return len(errs) < 5
	})
	// Items are numbered as they were appended, so the durable ones that the server has
	// not taken are those above the newest it has, as far as nothing was dropped.
	newest := uint64(0)
	for _, item := range w.led.items {
		newest = max(newest, item)
	}
	missing := uint64(0)
	for item := newest + 1; item <= w.item; item++ {
		if !have[item] {
			missing = item
		}
	}
	if missing > 0 && w.first <= w.led.last+1 {
		errs = append(errs, fmt.Errorf("item %d is missing, of %d to %d", missing, newest+1, w.item))
	}
	return errors.Join(append(errs, err)...)
}

// anotherBoot has the slots of a sidecar say that they were written in another boot.
func anotherBoot(data []byte) {
	for at := 0; at+sidecarHeader < len(data); at += sidecarSlot {
		slot := data[at:]
		if _, _, ok := parseSlot(slot[:min(sidecarSlot, len(slot))]); ok {
			slot[12] ^= 1
			n := binary.LittleEndian.Uint32(slot[8:])
			binary.LittleEndian.PutUint32(slot[4:], crc32.Checksum(slot[8:sidecarHeader+n], castagnoli))
		}
	}
}

// replay has children open n states. What kills a child is a bad state.
func replay(t *testing.T, r cutReplay) (bad []string, kinds map[string]int) {
	t.Helper()
	kinds = map[string]int{}
	for r.From < r.N {
		spec, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		var out, errs bytes.Buffer
		cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), cutReplayEnv+"="+string(spec)), &out, &errs
		died := cmd.Run()
		for dec := json.NewDecoder(&out); ; r.From++ {
			var res cutResult
			if dec.Decode(&res) != nil {
				break
			}
			if res.Err != "" {
				bad = append(bad, fmt.Sprintf("state %d at %d, before %s: %s", res.N, res.At, res.Call, res.Err))
				continue
			}
			kinds[res.Kind]++
		}
		if died != nil {
			text := errs.String()
			i := max(strings.LastIndex(text, "state "), 0)
			bad = append(bad, fmt.Sprintf("%v: %.1500s", died, text[i:]))
			kinds["died"]++
			r.From++
		}
	}
	return bad, kinds
}

// TestPowerCut records the writes of a buffer in several lives, and opens what a power
// cut would have left of them at any moment: sectors and names that were not synced are
// there or not, in any order. The control is a disk that lies about syncs.
func TestPowerCut(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	seed := testSeed(t)
	states, rounds := long(1000, 3000), long(1, 4)
	if raceDetector() {
		states /= 8 // it is that much slower
	}
	total := map[string]int{}
	for round := range rounds {
		seed := seed + uint64(round)
		dir, calls := tracedLives(t, seed)
		file := filepath.Join(t.TempDir(), "calls")
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(gob.NewEncoder(f).Encode(cutTrace{dir, calls}), f.Close()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		bad, kinds := replay(t, cutReplay{Calls: file, Dir: fastDir(t), Seed: seed, N: states})
		t.Logf("round %d: %d calls; %d states in %v: %v", round, len(calls), states, time.Since(start).Round(time.Second), kinds)
		for _, b := range bad[:min(len(bad), 5)] {
			t.Error(b)
		}
		for k, n := range kinds {
			total[k] += n
		}
		total["bad"] += len(bad)
		for name, r := range map[string]cutReplay{
			"three of four syncs of files ignored": {Calls: file, Dir: fastDir(t), Seed: seed, N: max(states/10, 40), IgnoreFiles: 3},
			"syncs of the directory ignored":       {Calls: file, Dir: fastDir(t), Seed: seed, N: max(states/10, 40), IgnoreNames: 4},
		} {
			bad, kinds := replay(t, r)
			if t.Logf("control, %s: %d of %d states are bad; %v", name, len(bad), r.N, kinds); len(bad) == 0 {
				t.Errorf("%s: not noticed", name)
			}
		}
	}
	t.Logf("%d states: %v", states*rounds, total)
}
