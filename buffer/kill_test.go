// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

var kills = flag.Int("kills", 30, "kills of TestKill")

const killEnv = "EDR_BUFFER_KILL_DIR"

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
	durable := make(chan uint64, 1)
	o.Committed = func(mark []byte) {
		select {
		case <-durable:
		default:
		}
		durable <- binary.BigEndian.Uint64(mark)
	}
	q, err := Open(ctx, o)
	if err != nil {
		die(err)
	}
	if r := q.Stats().Recovery; r != nil {
		die(fmt.Errorf("set aside: %w", r.Cause))
	}
	if err := invariant(q.Stats()); err != nil {
		die(err)
	}
	var item uint64
	if mark := q.Mark(); mark != nil {
		item = binary.BigEndian.Uint64(mark)
	}
	go func() { // what the test may rely on being durable
		for d := range durable {
			fmt.Println(d)
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
// batch, and is away for a while now and then.
func killServer(l net.Listener, led *ledger, rng *rand.Rand, done chan<- error) {
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
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	led := newLedger()
	done := make(chan error, 1)
	go killServer(l, led, rand.New(rand.NewPCG(seed, 1)), done)

	var durable uint64
	for i := range *kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Not before it has made something durable, and then at random.
		lines := bufio.NewScanner(out)
		n := 1 + rng.IntN(40)
		for ; n > 0 && lines.Scan(); n-- {
		}
		if n > 0 {
			t.Fatalf("kill %d: the child ended by itself: %v", i, cmd.Wait())
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		last := lines.Text()
		for lines.Scan() {
			last = lines.Text()
		}
		_ = cmd.Wait()
		var d uint64
		if _, err := fmt.Sscan(last, &d); err != nil {
			t.Fatalf("kill %d: %q: %v", i, last, err)
		}
		durable = max(durable, d)
		st, err := os.Stat(filepath.Join(dir, fileName))
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() > killOptions(dir).Cap {
			t.Fatalf("kill %d: the file has %d bytes", i, st.Size())
		}
		if i%5 == 0 {
			check(t, filepath.Join(dir, fileName))
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
	t.Logf("%d kills: %d records, %d truncated, %d taken, %d reclaimed, %d loss ranges",
		*kills, st.Last, st.Truncated, len(led.items), st.Reclaimed, len(led.lost))
	if st.Truncated == 0 || len(led.items) == 0 {
		t.Error("the run met no truncation, or no delivery")
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
