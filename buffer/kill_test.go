// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

const maxKillCap = 4 * mib

// overrunItems are more than a file of that size holds, even compressed: in a life in which
// the server is away the oldest of them go, however slow the disk is.
const overrunItems = 6000

const (
	killEnv     = "EDR_BUFFER_KILL_DIR"
	killHarmEnv = "EDR_BUFFER_KILL_HARMED"
	killAwayEnv = "EDR_BUFFER_KILL_AWAY"
)

func killOptions(dir string) Options {
	o := small(dir)
	o.RetainBytes = 512 * kib
	return o
}

// killChild produces and delivers as fast as it can until it is killed. The
// server is the test that started it, on a unix socket beside the directory.
func killChild(dir string) {
	die := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx := context.Background()
	o := killOptions(dir)
	o.Compression = anyCodec(rand.New(rand.NewPCG(uint64(os.Getpid()), 4)))
	durable := make(chan uint64, 1)
	o.Committed = func(mark []byte) {
		select {
		case <-durable:
		default:
		}
		durable <- be64(mark)
	}
	q, err := Open(ctx, o)
	if err != nil {
		die(err)
	}
	st := q.Stats()
	if r := st.Recovery; r != nil && (os.Getenv(killHarmEnv) == "" || !r.Exact) {
		die(fmt.Errorf("set aside, exact %v: %w", r.Exact, r.Cause))
	}
	if err := invariant(st); err != nil {
		die(err)
	}
	fmt.Println("open", st.Epoch, st.Last, st.Truncated, st.Reclaimed, st.Corrupt, st.Acked, be64(q.Mark()))
	var item uint64
	if mark := q.Mark(); mark != nil {
		item = binary.BigEndian.Uint64(mark)
	}
	go func() { // resizes as fast as it can, in every second life
		rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 3))
		for os.Getpid()%2 == 0 && os.Getenv(killAwayEnv) == "" {
			if err := q.Resize(ctx, int64(3+rng.IntN(maxKillCap/mib*2-2))*mib/2); err != nil {
				die(err)
			}
		}
	}()
	go func() { // what the test may rely on being durable
		for d := range durable {
			fmt.Println("durable", d)
		}
	}()
	go func() { // sender
		for {
			if err := killSend(ctx, q, dir+".sock"); ctx.Err() != nil {
				die(err)
			}
			<-time.After(time.Millisecond)
		}
	}()
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), item))
	var losses []Loss
	for {
		b := q.NewBatch()
		for range 1 + rng.IntN(30) {
			item++
			if err := b.End(appendItem(b.Begin(Events), item, rng.IntN(3000)), rng.IntN(50) == 0); err != nil {
				die(err)
			}
		}
		if rng.IntN(5) == 0 {
			if losses = q.Unnamed(losses[:0]); len(losses) > 0 {
				if err := b.End(appendLosses(b.Begin(DecisionsSystem), losses), true); err != nil {
					die(err)
				}
				b.Name(losses)
			}
		}
		b.SetMark(binary.BigEndian.AppendUint64(nil, item))
		if err := q.Append(ctx, b); err != nil {
			die(err)
		}
	}
}

// killSend is one connection: hello, then batches, each with its reply.
func killSend(ctx context.Context, q *Queue, addr string) error {
	c, err := net.Dial("unix", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	var reply [8]byte
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		return err
	}
	pos := binary.BigEndian.Uint64(reply[:])
	q.Ack(pos)
	var recs []Record
	var out []byte
	for {
		if recs, err = q.Read(ctx, pos, recs[:0], 256, 256*kib); err != nil {
			return err
		}
		out = binary.BigEndian.AppendUint32(out[:0], uint32(len(recs)))
		for _, r := range recs {
			out = binary.BigEndian.AppendUint64(out, r.Seq)
			out = binary.BigEndian.AppendUint32(out, uint32(len(r.Data)))
			out = append(out, r.Data...)
		}
		if _, err := c.Write(out); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, reply[:]); err != nil {
			return err
		}
		pos = binary.BigEndian.Uint64(reply[:])
		q.Ack(pos)
	}
}

// killServer answers batches; it cuts connections before or after applying a
// batch, and is away for a while now and then, and for as long as away says.
func killServer(l net.Listener, led *ledger, rng *rand.Rand, away *atomic.Bool, done chan<- error) {
	serve := func(c net.Conn) error {
		defer c.Close()
		r := bufio.NewReader(c)
		var b [12]byte
		for {
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, led.last)); err != nil {
				return nil
			}
			if _, err := io.ReadFull(r, b[:4]); err != nil {
				return nil
			}
			recs := make([]Record, binary.BigEndian.Uint32(b[:4]))
			for i := range recs {
				if _, err := io.ReadFull(r, b[:]); err != nil {
					return nil
				}
				recs[i] = Record{Seq: binary.BigEndian.Uint64(b[:]), Data: make([]byte, binary.BigEndian.Uint32(b[8:]))}
				if _, err := io.ReadFull(r, recs[i].Data); err != nil {
					return nil // the request did not arrive as a whole
				}
			}
			fate := rng.IntN(60)
			if fate == 0 {
				return nil // lost before it was applied
			}
			led.take(recs)
			if fate <= 2 {
				return nil // applied, reply lost
			}
		}
	}
	for {
		c, err := l.Accept()
		if err != nil {
			done <- nil
			return
		}
		if away.Load() {
			c.Close()
			continue
		}
		if err := serve(c); err != nil {
			done <- err
			return
		}
		if rng.IntN(3) == 0 {
			<-time.After(time.Duration(rng.IntN(100)) * time.Millisecond) // away
		}
	}
}

// TestKill kills a process that appends and delivers, over and over, and then
// asks for an account of every record.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	// On the disk that holds temporary files, as fsync is part of it.
	root := t.TempDir()
	dir := filepath.Join(root, "buffer")
	l, err := net.Listen("unix", dir+".sock")
	if err != nil {
		t.Fatal(err)
	}
	seed := testSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	led := newLedger()
	done := make(chan error, 1)
	var away atomic.Bool
	go killServer(l, led, rand.New(rand.NewPCG(seed, 1)), &away, done)

	kills := long(30, 1200)
	path := filepath.Join(dir, fileName)
	var durable uint64
	var counters, found [5]uint64 // last, truncated, reclaimed, corrupt, acked
	var resizing, grown, opening, salvaging, harmed int
	for i := range kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killEnv+"="+dir)
		if i > 0 && (i%8 == 0 || i%8 == 3) && harmTree(t, rng, path) {
			harmed++
		}
		if harmed > 0 {
			cmd.Env = append(cmd.Env, killHarmEnv+"=1")
		}
		cmd.Stderr = os.Stderr
		if away.Store(i%30 == 4); away.Load() {
			cmd.Env = append(cmd.Env, killAwayEnv+"=1")
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		first := ""
		if i%4 == 3 {
			// While it starts, opens, or has just begun.
			<-time.After(time.Duration(rng.IntN(30)) * time.Millisecond)
		} else {
			// Not before it has made something durable, and then at random.
			n := 2 + rng.IntN(40)
			var d uint64
			for ; n > 0 || away.Load() && d < durable+overrunItems; n-- {
				if !lines.Scan() {
					t.Fatalf("kill %d: the child ended by itself: %v", i, cmd.Wait())
				}
				if first == "" {
					first = lines.Text()
				}
				_, _ = fmt.Sscanf(lines.Text(), "durable %d", &d) // or it is the first line
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		last := lines.Text()
		for lines.Scan() {
			if last = lines.Text(); first == "" {
				first = last
			}
		}
		_ = cmd.Wait()
		if first == "" {
			opening++
		} else {
			var epoch string
			var item uint64
			if _, err := fmt.Sscanf(first, "open %s %d %d %d %d %d %d", &epoch, &found[0], &found[1], &found[2], &found[3], &found[4], &item); err != nil {
				t.Fatalf("kill %d: %q: %v", i, first, err)
			}
			for c := range counters {
				if found[c] < counters[c] {
					t.Fatalf("kill %d: the counters went back from %d to %d", i, counters, found)
				}
			}
			if counters = found; item < durable {
				t.Fatalf("kill %d: the mark is at item %d, item %d was durable", i, item, durable)
			}
			var d uint64
			if _, err := fmt.Sscanf(last, "durable %d", &d); err == nil {
				durable = max(durable, d)
			}
		}
		switch st, err := os.Stat(path); {
		case errors.Is(err, os.ErrNotExist) && durable == 0:
			continue // killed before there was a file
		case err != nil:
			t.Fatal(err)
		case st.Size() > maxKillCap:
			t.Fatalf("kill %d: the file has %d bytes", i, st.Size())
		case st.Size() > killOptions(dir).Cap:
			grown++
		}
		if _, err := os.Stat(path + sizeSuffix); err == nil {
			resizing++
		}
		if _, err := os.Stat(path + newSuffix); err == nil {
			salvaging++
		}
		if i%5 == 0 && first != "" { // else a damaged tree may still be
			check(t, path)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	q := open(t, killOptions(dir))
	s := &sim{t: t, q: q, led: led, rng: rng}
	s.item = be64(q.Mark())
	if s.item < durable {
		t.Fatalf("the mark is at item %d, item %d was durable", s.item, durable)
	}
	for range 30 {
		s.settle()
	}
	if err := s.verify(); err != nil {
		t.Error(err)
	}
	st := q.Stats()
	t.Logf("%d kills: %d records, %d truncated, %d corrupt, %d taken, %d reclaimed, %d loss ranges",
		kills, st.Last, st.Truncated, st.Corrupt, len(led.items), st.Reclaimed, len(led.lost))
	t.Logf("of them %d amid a resize, %d with a larger file, %d before the queue was open, %d amid a salvage; %d damaged trees",
		resizing, grown, opening, salvaging, harmed)
	if st.Truncated == 0 || len(led.items) == 0 {
		t.Error("the run met no truncation, or no delivery")
	}
	if st.Corrupt != 0 {
		t.Errorf("%d records are lost to damage, and no chunk was damaged", st.Corrupt)
	}
}

// check runs bbolt's own consistency check.
func check(t *testing.T, path string) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second, PreLoadFreelist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			t.Error(err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// harmTree damages a meta page or the root of the tree, as no kill does. It reports
// whether there was a file to damage.
func harmTree(t testing.TB, rng *rand.Rand, path string) bool {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	meta, err := preflight(f, st.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	at := int64(meta.root)
	if rng.IntN(2) == 0 {
		at = int64(rng.IntN(2)) // the other one leads to the state before
	}
	at = at*pageSize + pageHeader + int64(rng.IntN(48)) // the header of a meta page is of no use to anybody
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << rng.IntN(8)
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	return true
}
