// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// mendEnv names, for a child, the file in which it has a transaction of bbolt fail.
const mendEnv = "EDR_BUFFER_MEND"

// mendChild does without what TestRollbackOverDamagedPages does.
func mendChild(path string) {
	db, err := openBolt(path, 2*mib)
	for n := 0; err == nil; n++ {
		err = guarded(func() error { return db.Update(oversize(n)) })
	}
	fmt.Println("survived:", err)
	os.Exit(0)
}

// oversize is a transaction that finds no room, but for the first.
func oversize(n int) func(tx *bolt.Tx) error {
	return func(tx *bolt.Tx) error {
		return tx.Bucket(metaBucket).Put([]byte("x"), make([]byte, 1+n*2*mib))
	}
}

// closedFile is a directory with a queue that was closed, and its chunks.
func closedFile(t *testing.T) (Options, []entry) {
	t.Helper()
	o := small(fastDir(t))
	q := open(t, o)
	s := &sim{t: t, q: q, led: newLedger(), rng: rand.New(rand.NewPCG(9, 9))}
	for range 200 {
		s.produce(10, 2000, false)
		s.must(q.Flush(t.Context()))
	}
	chunks := append([]entry(nil), q.index.live()...)
	closeQueue(t, q)
	return o, chunks
}

// harmHead damages what is in front of the value of the chunk e.
func harmHead(t *testing.T, path string, e *entry, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(p, int64(e.root)*pageSize)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestRollbackOverDamagedPages has a commit fail over a file whose chunks have damaged pages.
// bbolt then reads all pages, in a goroutine; that it dies of them is the control.
func TestRollbackOverDamagedPages(t *testing.T) {
	o, chunks := closedFile(t)
	path := filepath.Join(o.Dir, fileName)
	for i := range chunks {
		if i%3 == 0 {
			harmHead(t, path, &chunks[i], bytes.Repeat([]byte{0xee}, leafHeader))
		}
	}
	control := filepath.Join(fastDir(t), fileName)
	copyFile(t, control, path)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), mendEnv+"="+control)
	if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("assertion failed: Page expected to be")) {
		t.Errorf("the control has not died: %v: %.300s", err, out)
	}

	q := &Queue{o: o, path: path, metrics: newMetrics(nil, func() Stats { return Stats{} })}
	db, err := openBolt(path, o.Cap)
	if err != nil {
		t.Fatal(err)
	}
	seal, err := newSealer(path, db)
	if err != nil {
		t.Fatal(err)
	}
	q.file.Store(seal.f)
	w := &writer{q: q, db: db, seal: seal}
	for n, want := range []error{nil, berrors.ErrMaxSizeReached, berrors.ErrMaxSizeReached, nil} {
		err := guarded(func() error { return w.transact(oversize(n % 3)) })
		if !errors.Is(err, want) {
			t.Errorf("transaction %d: %v, want %v", n, err, want)
		}
	}
	if got, want := testutil.ToFloat64(q.metrics.corruptChunks), float64((len(chunks)+2)/3); got != want {
		t.Errorf("%v chunks were mended, want %v", got, want)
	}
	if err := errors.Join(seal.close(), db.Close()); err != nil {
		t.Fatal(err)
	}
	check(t, path)

	// What is wrong with the tree is not mended: the handle is given up before bbolt reads it.
	o, _ = closedFile(t)
	path = filepath.Join(o.Dir, fileName)
	if db, err = openBolt(path, o.Cap); err != nil {
		t.Fatal(err)
	}
	if w.seal, err = newSealer(path, db); err != nil {
		t.Fatal(err)
	}
	w.db = db
	if err := w.transact(oversize(0)); err != nil {
		t.Fatal(err)
	}
	m, err := w.seal.meta()
	if err == nil {
		err = m.walk(w.seal.f, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	err = guarded(func() error {
		return w.transact(func(tx *bolt.Tx) error {
			b := tx.Bucket(chunkBucket)
			harmHead(t, path, &entry{root: uint64(b.Root())}, []byte{0xee})
			return oversize(1)(tx)
		})
	})
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged tree: %v", err)
	}
}

// TestDamagedPagesAtRest: what is in front of the chunks of a file that was closed is damaged.
// Nothing looks at it when it is opened, the records are all read, and bbolt survives to
// delete each of the chunks.
func TestDamagedPagesAtRest(t *testing.T) {
	for name, p := range map[string][]byte{
		"zeroed":   make([]byte, leafHeader),
		"garbage":  bytes.Repeat([]byte{0xee}, leafHeader),
		"overflow": {12: 0xff, 13: 0xff, 14: 0xff, 15: 0x7f},
	} {
		t.Run(name, func(t *testing.T) {
			o, chunks := closedFile(t)
			for i := range chunks {
				if i%2 == 0 {
					if name == "overflow" {
						p := make([]byte, leafHeader)
						putLeaf(p, &chunks[i])
						p[13] ^= 1
						harmHead(t, filepath.Join(o.Dir, fileName), &chunks[i], p)
						continue
					}
					harmHead(t, filepath.Join(o.Dir, fileName), &chunks[i], p)
				}
			}
			before := len(chunks)
			q := open(t, o)
			st := q.Stats()
			if st.Recovery != nil || len(q.index.live()) != before {
				t.Fatalf("%+v", st)
			}
			records := uint64(0)
			var recs []Record
			for after := st.First - 1; after < st.Last; {
				var err error
				if recs, err = q.Read(t.Context(), after, recs[:0], 1000, 1<<20); err != nil {
					t.Fatal(err)
				}
				after, records = recs[len(recs)-1].Seq, records+uint64(len(recs))
			}
			if records != st.Records {
				t.Errorf("%d records of %d are read", records, st.Records)
			}
			if err := overrun(t.Context(), q); err != nil {
				t.Fatal(err)
			}
			st = q.Stats()
			if got, want := testutil.ToFloat64(q.metrics.corruptChunks), float64((before+1)/2); got != want || st.Corrupt != 0 || st.Recovery != nil || st.Quarantined == 0 {
				t.Errorf("%v damaged chunks, want %v: %+v", got, want, st)
			}
			closeQueue(t, q)
			check(t, q.path)
		})
	}
}

// TestUnreadablePageIsDeleted: the disk refuses the first page of a chunk that is to leave.
func TestUnreadablePageIsDeleted(t *testing.T) {
	o, chunks := closedFile(t)
	bad := int64(chunks[3].root) * pageSize
	o.badSector = func(off, n int64) error {
		if off <= bad && bad < off+n {
			return syscall.EIO
		}
		return nil
	}
	q := open(t, o)
	if err := overrun(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	if st := q.Stats(); testutil.ToFloat64(q.metrics.corruptChunks) != 1 || st.Err != nil || st.Recovery != nil {
		t.Errorf("%+v", st)
	}
	closeQueue(t, q)
	check(t, q.path)
}

// TestOpenTrustsWhatWasClosed: only a file that was closed is opened without a look at every
// chunk, and only once: who died of it leaves the next to look.
func TestOpenTrustsWhatWasClosed(t *testing.T) {
	looks := 0
	o, chunks := closedFile(t)
	roots := map[int64]bool{}
	for _, e := range chunks {
		roots[int64(e.root)*pageSize] = true
	}
	o.badSector = func(off, n int64) error {
		if roots[off] && n == leafHeader {
			looks++
		}
		return nil
	}
	copied := func(dir string) string {
		to := fastDir(t)
		for _, name := range []string{fileName, sidecarName} {
			copyFile(t, filepath.Join(to, name), filepath.Join(dir, name))
		}
		return to
	}
	opened := func(name, dir string, want int) *Queue {
		t.Helper()
		o := o
		o.Dir = dir
		looks = 0
		q := open(t, o)
		if st := q.Stats(); looks != want || st.Recovery != nil || len(q.index.live()) != len(chunks) {
			t.Errorf("%s: looked at %d chunks, want %d: %+v", name, looks, want, st)
		}
		return q
	}
	dir := o.Dir
	closeQueue(t, opened("closed", copied(dir), 0))
	other := copied(dir)
	if err := os.Remove(filepath.Join(other, sidecarName)); err != nil {
		t.Fatal(err)
	}
	closeQueue(t, opened("without a sidecar", other, len(chunks)))
	q := opened("closed", copied(dir), 0)
	died := copied(q.o.Dir)
	closeQueue(t, opened("died when it was open", died, len(chunks)))
	closeQueue(t, q)

	// A damaged tree is not trusted whatever is said of it.
	data := read(t, filepath.Join(dir, fileName))
	m, err := metaInForce(bytes.NewReader(data), int64(len(data)))
	if err == nil {
		err = m.walk(bytes.NewReader(data), nil)
	}
	if err != nil || m.freelist == noFreelist {
		t.Fatalf("%+v: %v", m, err)
	}
	for name, at := range map[string]uint64{"root": m.root, "list of free pages": m.freelist} {
		other := copied(dir)
		harmHead(t, filepath.Join(other, fileName), &entry{root: at}, []byte(strings.Repeat("x", 64)))
		o := o
		o.Dir = other
		q := open(t, o)
		if st := q.Stats(); st.Recovery == nil || !st.Recovery.Exact || st.Recovery.Lost != 0 {
			t.Errorf("%s: %+v", name, st)
		}
	}
}
