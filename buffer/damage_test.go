// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	bolt "go.etcd.io/bbolt"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
)

// filled returns the bytes of a file that has wrapped, and with it what a kill
// leaves when clean is false.
func filled(t testing.TB, clean bool) []byte {
	t.Helper()
	dir := fastDir(t)
	var g gate
	o := small(dir)
	g.install(&o)
	q, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s := &sim{t: t, q: q, led: newLedger(), rng: rand.New(rand.NewPCG(7, 7))}
	for i := range 900 { // enough chunks for a tree of two levels
		s.produce(1+i%3, 2000, false)
		if i%4 > 0 {
			s.must(q.Flush(t.Context()))
		}
	}
	s.must(q.Flush(t.Context()))
	if s := q.Stats(); s.Truncated == 0 {
		t.Fatal("the file has not wrapped")
	}
	path := filepath.Join(dir, fileName)
	if clean {
		closeQueue(t, q)
	}
	g.mu.Lock()
	data, err := os.ReadFile(path)
	g.mu.Unlock()
	s.must(err)
	if !clean {
		closeQueue(t, q)
	}
	return data
}

// plant makes dir a buffer with the given file.
func plant(t testing.TB, dir string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, fileName), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedChunkIsCountedNamedAndSkipped(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	o := small(t.TempDir())
	o.Registerer = reg
	q := open(t, o)
	o.Registerer = nil // of the queue that is opened again below
	before := metricstest.Gather(t, reg)
	for i := range 30 {
		add(t, q, strings.Repeat(fmt.Sprint(i), 100), "second", "third")
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	q.mu.Lock()
	bad := q.index.live()[10]
	q.mu.Unlock()
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("rot"), int64(bad.root)*pageSize+leafHeader+chunkHeader+20); err != nil {
		t.Fatal(err)
	}
	f.Close()

	var got []uint64
	var recs []Record
	for after := uint64(0); after < 90; after = got[len(got)-1] {
		if recs, err = q.Read(t.Context(), after, recs[:0], 7, 1<<20); err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			got = append(got, r.Seq)
		}
	}
	var want []uint64
	for seq := uint64(1); seq <= 90; seq++ {
		if seq < bad.first || seq > bad.last() {
			want = append(want, seq)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("seqs (-want +got):\n%s", d)
	}
	check := func(q *Queue) {
		t.Helper()
		if d := cmp.Diff([]Loss{{CauseCorrupt, bad.first, bad.last(), 3}}, q.Unnamed(nil)); d != "" {
			t.Errorf("losses (-want +got):\n%s", d)
		}
		if s := q.Stats(); s.Corrupt != 3 || s.Truncated != 0 || invariant(s) != nil {
			t.Errorf("%+v", s)
		}
	}
	check(q)
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "buffer_corrupt_records_total", "buffer_corrupt_chunks_total", "buffer_quarantined_bytes")
	closeQueue(t, q)
	check(open(t, o))
}

// Without a sidecar a damaged file may not tell how far it had been delivered: then
// what it holds goes into a new epoch.
func TestDamagedFileIsSetAside(t *testing.T) {
	page := func(n int, fn func(p []byte)) func([]byte) []byte {
		return func(b []byte) []byte { fn(b[n*pageSize : (n+1)*pageSize]); return b }
	}
	cases := map[string]func([]byte) []byte{
		"empty":    func([]byte) []byte { return nil },
		"one page": func(b []byte) []byte { return b[:pageSize] },
		"half":     func(b []byte) []byte { return b[:len(b)/2] },
		"zeros":    func(b []byte) []byte { return make([]byte, len(b)) },
		"garbage":  func(b []byte) []byte { return bytes.Repeat([]byte("garbage!"), len(b)/8) },
		"text":     func([]byte) []byte { return []byte("I am somebody else's file\n") },
		"both metas": func(b []byte) []byte {
			b[20], b[pageSize+20] = b[20]^1, b[pageSize+20]^1
			return b
		},
		"root page": func(b []byte) []byte {
			m, err := preflight(bytes.NewReader(b), int64(len(b)), 0)
			if err != nil {
				t.Fatal(err)
			}
			return page(int(m.root), func(p []byte) { clear(p) })(b)
		},
		"another bbolt file": func([]byte) []byte {
			path := filepath.Join(t.TempDir(), "other")
			db, err := bolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return b
		},
		"chunk of 2^31 pages": func(b []byte) []byte { return enlarge(t, b) },
		"counter off by one":  func(b []byte) []byte { return tamper(t, b, func(s *state) { s.truncated++ }) },
		"lease behind acked":  func(b []byte) []byte { return tamper(t, b, func(s *state) { s.lease, s.acked = 1, 2 }) },
	}
	none := map[string]bool{"empty": true, "one page": true, "zeros": true, "garbage": true, "text": true, "another bbolt file": true}
	sound := prometheus.NewPedanticRegistry()
	o := small(t.TempDir())
	o.Registerer = sound
	open(t, o)
	for _, clean := range []bool{true, false} {
		data := filled(t, clean)
		for name, damage := range cases {
			t.Run(fmt.Sprintf("%s/clean=%v", name, clean), func(t *testing.T) {
				dir := t.TempDir()
				before := damage(bytes.Clone(data))
				plant(t, dir, before)
				reg := prometheus.NewPedanticRegistry()
				o := small(dir)
				o.Registerer = reg
				q := open(t, o)
				metricstest.Moved(t, metricstest.Gather(t, sound), metricstest.Gather(t, reg), "buffer_quarantined_files")
				if q.Stats().Salvaged > 0 {
					metricstest.Moved(t, metricstest.Gather(t, sound), metricstest.Gather(t, reg), "buffer_salvaged_records_total")
				}
				s := q.Stats()
				kept, err := os.ReadFile(aside(s))
				if err != nil || !bytes.Equal(kept, before) {
					t.Fatalf("not set aside as it was: %q, %v", aside(s), err)
				}
				if unknown := slices.Contains(q.Unnamed(nil), Loss{Cause: CauseCorrupt}); unknown == s.Recovery.Exact {
					t.Errorf("exact %v, losses %v", s.Recovery.Exact, q.Unnamed(nil))
				}
				if (s.Salvaged == 0) != none[name] || s.Salvaged != s.Recovery.Salvaged || invariant(s) != nil {
					t.Errorf("%+v %+v", s, s.Recovery)
				}
				if !s.Recovery.Exact && (s.Last != s.Salvaged || s.Truncated != 0) {
					t.Errorf("not a new epoch: %+v", s)
				}
				add(t, q, "works")
				if recs, err := q.Read(t.Context(), s.Last, nil, 1, 1); err != nil || string(recs[0].Data) != "works" {
					t.Errorf("%v, %v", recs, err)
				}
			})
		}
	}
}

// tamper changes the stored state with valid checksums all over.
func tamper(t *testing.T, data []byte, change func(*state)) []byte {
	return rewrite(t, data, func(b []byte) []byte {
		s, err := decodeState(b)
		if err != nil {
			t.Fatal(err)
		}
		change(s)
		return s.encode(nil)
	})
}

// rewrite replaces the stored state.
func rewrite(t *testing.T, data []byte, change func([]byte) []byte) []byte {
	t.Helper()
	path := filepath.Join(fastDir(t), "tampered")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := openBolt(path, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		m := tx.Bucket(metaBucket)
		return m.Put(stateKey, change(m.Get(stateKey)))
	})
	if err == nil {
		err = sealed(path, db)
	}
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	data, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// sealed seals the last transaction.
func sealed(path string, db *bolt.DB) error {
	s, err := newSealer(path, db)
	if err == nil {
		err = errors.Join(s.sync(^uint64(0)), s.close())
	}
	return err
}

// enlarge has the first chunk say that it has more pages than any memory holds.
func enlarge(t *testing.T, data []byte) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), fileName)
	plant(t, filepath.Dir(path), data)
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		c := tx.Bucket(chunkBucket)
		k, _ := c.Cursor().First()
		b := c.Bucket(k)
		return b.SetSequence(b.Sequence() | 1<<63)
	})
	if err == nil {
		err = sealed(path, db)
	}
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return read(t, path)
}

func TestQuarantineKeepsTwo(t *testing.T) {
	dir := t.TempDir()
	var newest string
	for range 4 {
		plant(t, dir, []byte("no buffer"))
		q := open(t, small(dir))
		newest = aside(q.Stats())
		closeQueue(t, q)
	}
	bad, err := filepath.Glob(filepath.Join(dir, fileName+badSuffix+"*"))
	if err != nil || len(bad) != maxBadFiles || bad[1] != newest {
		t.Errorf("%v, %v", bad, err)
	}
}

// aside is where the damaged file is.
func aside(s Stats) string {
	if s.Recovery == nil {
		return ""
	}
	return s.Recovery.Aside
}

// TestDamageAnywhere opens files with random damage. bbolt alone would end the
// process on some of them: that no test binary dies here is the point.
func TestDamageAnywhere(t *testing.T) {
	files := 150
	if testing.Short() {
		files = 20
	}
	seed := testSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	root := fastDir(t)
	var opened, aside, corrupt int
	for i := range files {
		data := filledOnce(t, i%2 == 0)
		used := int(binary.LittleEndian.Uint64(data[pageHeader+40:])) * pageSize
		switch at := rng.IntN(used); i % 5 {
		case 0, 1: // a bit
			data[at] ^= 1 << rng.IntN(8)
		case 2: // a page header or its first elements
			data[at/pageSize*pageSize+rng.IntN(64)] ^= 1 << rng.IntN(8)
		case 3: // a page
			clear(data[at/pageSize*pageSize:][:pageSize])
		case 4: // a page in the place of another
			copy(data[at/pageSize*pageSize:][:pageSize], data[rng.IntN(used/pageSize)*pageSize:])
		}
		dir := filepath.Join(root, fmt.Sprint(i))
		plant(t, dir, data)
		q, err := Open(t.Context(), small(dir))
		if err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		s := &sim{t: t, q: q, led: newLedger(), rng: rng}
		if q.Stats().Recovery != nil {
			aside++
		} else {
			opened++
		}
		s.pos = q.Bounds().First - 1
		s.led.last = s.pos
		add(t, q, string(appendItem(nil, 1, 1)))
		if err := q.Flush(t.Context()); err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		for s.pos < q.Bounds().Last {
			s.deliver(1000, 1<<20, 0)
		}
		if err := errors.Join(append(s.led.errs, invariant(q.Stats()))...); err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		if q.Stats().Corrupt > 0 {
			corrupt++
		}
		closeQueue(t, q)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d files: %d opened, of which %d had damaged chunks; %d set aside", files, opened, corrupt, aside)
}

func filledOnce(t *testing.T, clean bool) []byte {
	t.Helper()
	if filledCache[clean] == nil {
		filledCache[clean] = filled(t, clean)
	}
	return bytes.Clone(filledCache[clean])
}

var filledCache = map[bool][]byte{}

func TestSecondOpenerIsRefused(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	add(t, q, "mine")
	_, err := Open(t.Context(), o)
	if !errors.Is(err, ErrLocked) {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{o.Dir, fmt.Sprintf("pid %d", os.Getpid()), "buffer.dir"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, o); !errors.Is(err, ErrLocked) {
		t.Errorf("with a dead context: %v", err)
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Errorf("the first one suffers: %v", err)
	}
}

func TestForeignLockIsRefused(t *testing.T) {
	o := small(t.TempDir())
	closeQueue(t, open(t, o))
	db, err := bolt.Open(filepath.Join(o.Dir, fileName), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if bad, _ := filepath.Glob(filepath.Join(o.Dir, "*"+badSuffix+"*")); len(bad) > 0 {
		t.Errorf("set aside: %v", bad)
	}
}

// mount mounts a file system at a new directory, or skips the test.
func mount(t *testing.T, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		require(t, errors.New("mounting needs root"))
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		require(t, fmt.Errorf("mount %v: %w: %s", args, err, out))
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// mountImage makes a file system of the given size, and mounts it.
func mountImage(t *testing.T, size int64, mkfs ...string) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], "-q", img)...).CombinedOutput(); err != nil {
		require(t, fmt.Errorf("%v: %w: %s", mkfs, err, out))
	}
	return mount(t, "-o", "loop", img)
}

func mountExt4(t *testing.T, size int64) string { return mountImage(t, size, "mkfs.ext4") }

// TestFrozenFileSystem stalls the disk for real: every write blocks until the
// file system is thawed.
func TestFrozenFileSystem(t *testing.T) {
	dir := mountExt4(t, 12*mib)
	o := small(dir)
	q := open(t, o)
	s := &sim{t: t, q: q, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
	s.produce(1, 10, false)
	s.must(q.Flush(t.Context()))
	if out, err := exec.Command("fsfreeze", "-f", dir).CombinedOutput(); err != nil {
		t.Skipf("fsfreeze: %v: %s", err, out)
	}
	thaw := func() {
		if out, err := exec.Command("fsfreeze", "-u", dir).CombinedOutput(); err != nil {
			t.Fatalf("thaw: %v: %s", err, out)
		}
	}
	for q.Stats().Pending < o.CommitBytes*2 { // memory takes it, none of it gets durable
		s.produce(10, 500, false)
	}
	if st := q.Stats(); st.Last != 1 || st.Err != nil {
		t.Errorf("while frozen: %+v", st)
	}
	thaw()
	for range 5 {
		s.settle()
	}
	s.must(s.verify())
	if st := q.Stats(); st.Truncated != 0 || st.Err != nil {
		t.Errorf("after the thaw: %+v", st)
	}
}
