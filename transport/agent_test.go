// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// agentSpec is what a process under test does: it appends events to a buffer and
// delivers them, as an agent, until it is killed. After a SIGTERM, or Total records,
// it appends no more, delivers the rest and says "last <seq>".
type agentSpec struct {
	Dir, Addr  string
	Encoding   Encoding
	Rate       int           // events a second; 0: as many as are delivered, and some
	Total      uint64        // 0: until SIGTERM
	Clock      time.Duration // how wrong the clock of the process is
	Retain     int64         // bytes of acknowledged records kept; 0: the default
	Cap        int64
	BatchLimit int
	Timeout    time.Duration
	Topology   Topology
	Master     string
	Shards     int
}

const agentEnv = "EDR_TEST_AGENT"

// agentMain is the process. Its parent kills it at any point.
func agentMain(spec string) int {
	var a agentSpec
	if err := json.Unmarshal([]byte(spec), &a); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	term, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("ready") // for a SIGTERM
	if err := a.run(term); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (a *agentSpec) run(term context.Context) error {
	ctx := logging.Into(context.Background(), zap.NewNop())
	q, err := buffer.Open(ctx, buffer.Options{Dir: a.Dir, Cap: a.Cap, RetainBytes: a.Retain, CommitInterval: 5 * time.Millisecond, MaxRecord: 64 << 10})
	if err != nil {
		return err
	}
	o := fast(a.Addr)
	o.Encoding, o.BatchRecords, o.Timeout, o.ProbeInterval = a.Encoding, a.BatchLimit, a.Timeout, time.Second
	o.Topology, o.Master, o.Shards = a.Topology, a.Master, a.Shards
	if a.Rate > 0 {
		o.Linger = 20 * time.Millisecond
	}
	s, err := New(o, q)
	if err != nil {
		return err
	}
	if a.Clock != 0 {
		s.process = fmt.Sprintf("%012x%08x", time.Now().Add(a.Clock).UnixMilli(), rand.Uint32())
	}
	sending, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(sending) }()
	if err := a.produce(term, ctx, q); err != nil {
		return err
	}
	if err := q.Flush(ctx); err != nil {
		return err
	}
	last := q.Next() - 1
	for deadline := time.Now().Add(2 * time.Minute); s.State().Acked < last && time.Now().Before(deadline); {
		sleep(ctx, 10*time.Millisecond)
		// A loss that is found while the rest is delivered is named, too.
		if err := a.name(ctx, q); err != nil {
			return err
		}
		last = q.Next() - 1
	}
	cancel()
	err = errors.Join(<-done, s.Drain(ctx))
	s.Close()
	if err != nil {
		return err
	}
	fmt.Printf("last %d\n", q.Next()-1)
	return q.Close(ctx)
}

// maxUnsent is how many records an agent without a rate lets wait: enough to be amid a batch
// at any time, and far from what overruns its buffer, whatever starts are slow.
const maxUnsent = 10_000

// produce appends events, each with its own seq in it, until term ends or the total
// is reached.
func (a *agentSpec) produce(term, ctx context.Context, q *buffer.Queue) error {
	began := time.Now()
	for made := 0; term.Err() == nil; {
		if err := a.name(ctx, q); err != nil {
			return err
		}
		n := 50
		if a.Rate > 0 {
			n = min(200, int(time.Since(began).Seconds()*float64(a.Rate))-made)
		} else if q.Stats().Unsent > maxUnsent {
			n = 0
		}
		if a.Total > 0 {
			if q.Next() > a.Total {
				return nil
			}
			n = int(min(uint64(n), a.Total-q.Next()+1))
		}
		if n <= 0 {
			sleep(term, 5*time.Millisecond)
			continue
		}
		b, first := q.NewBatch(), q.Next()
		for i := range n {
			if err := b.End(append(b.Begin(buffer.Events), payload(first+uint64(i))...), false); err != nil {
				return err
			}
		}
		if err := q.Append(ctx, b); err != nil {
			return err
		}
		made += n
	}
	return nil
}

// name writes the loss records that are due, as the sensor does.
func (a *agentSpec) name(ctx context.Context, q *buffer.Queue) error {
	losses := q.Unnamed(nil)
	if len(losses) == 0 {
		return nil
	}
	var ranges []string
	for _, l := range losses {
		ranges = append(ranges, fmt.Sprintf(`{"cause":%q,"first":%d,"last":%d,"count":%d}`, l.Cause, l.First, l.Last, l.Count))
	}
	b := q.NewBatch()
	rec := fmt.Sprintf(`{"metadata":{"uid":"loss-%d"},"time_dt":"t","status_code":"RECORDS_LOST","unmapped":{"lost":{"ranges":[%s]}}}`, q.Next(), strings.Join(ranges, ","))
	if err := b.End(append(b.Begin(buffer.DecisionsSystem), rec...), true); err != nil {
		return err
	}
	b.Name(losses)
	return q.Append(ctx, b)
}

// agentProcess is a running agentMain.
type agentProcess struct {
	cmd   *exec.Cmd
	ready chan struct{} // closed when a SIGTERM has it finish
	last  chan uint64   // what it said at its end; closed without when it was killed
	errs  *strings.Builder
}

// startAgent runs a process. It ends with the test at the latest, and does not
// outlive this one.
func startAgent(t testing.TB, a agentSpec) *agentProcess {
	t.Helper()
	spec, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	p := &agentProcess{cmd: exec.Command(os.Args[0], "-test.run=^$"), ready: make(chan struct{}), last: make(chan uint64, 1), errs: &strings.Builder{}}
	p.cmd.Env = append(os.Environ(), agentEnv+"="+string(spec))
	p.cmd.Stderr = p.errs
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { // the signal comes when the starting thread ends
		defer close(p.last)
		runtime.LockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if lines.Text() == "ready" {
				close(p.ready)
				continue
			}
			var last uint64
			if _, err := fmt.Sscanf(lines.Text(), "last %d", &last); err == nil {
				p.last <- last
			}
		}
		_ = p.cmd.Wait() // killed: the status says nothing
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	return p
}

// kill ends the process and waits until it is gone.
func (p *agentProcess) kill() {
	_ = p.cmd.Process.Kill() // gone already is as good
	for range p.last {       // closed when it was reaped
	}
}

// finish waits until the process has delivered everything and returns the last seq.
func (p *agentProcess) finish(t testing.TB, terminate bool) uint64 {
	t.Helper()
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()
	if terminate {
		select {
		case <-p.ready: // it may have been started just now
		case <-p.last:
			t.Fatalf("the agent ended: %s", p.errs)
		case <-deadline.C:
			t.Fatal("the agent does not begin")
		}
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case last, said := <-p.last:
		if !said {
			t.Fatalf("the agent ended: %s", p.errs)
		}
		for range p.last {
		}
		return last
	case <-deadline.C:
		t.Fatal("the agent does not end")
	}
	return 0
}

// stored is the seq in the agent's cursor. The session in it changes before a batch is
// stored.
func stored(t testing.TB, c *redis.Client) uint64 {
	t.Helper()
	cursor := c.HGet(t.Context(), cursorKey, testAgent).Val()
	if cursor == "" {
		return 0
	}
	_, rest, _ := strings.Cut(cursor, ":")
	seq, _, _ := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if err != nil {
		t.Fatalf("cursor %q: %v", cursor, err)
	}
	return n
}

// killLoop starts an agent again and again, kills it at random points, and lets the
// last one finish.
func killLoop(t *testing.T, srv *redistest.Server, a agentSpec, kills int, after func()) (last uint64) {
	t.Helper()
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	c := srv.Client()
	defer c.Close()
	early := 0
	for range kills {
		p := startAgent(t, a)
		// From before it has opened its buffer to the middle of sending: the first
		// reply, then a while.
		before := stored(t, c)
		if rng.IntN(10) > 0 {
			await(t, text("a batch of the agent"), func() bool { return stored(t, c) != before })
		} else {
			early++
		}
		sleep(t.Context(), rand.N(15*time.Millisecond))
		p.kill()
		after()
	}
	t.Logf("%d kills, %d of them before the first batch", kills, early)
	a.Total = 1 // no more than there are
	return startAgent(t, a).finish(t, false)
}

func TestT6KilledAgent(t *testing.T) {
	t.Parallel()
	for e, kills := range map[Encoding]int{JSON: 30, ZstdBatch: 20} {
		t.Run(string(e), func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			a := agentSpec{Dir: t.TempDir(), Addr: srv.Addr(), Encoding: e, Cap: 64 << 20, BatchLimit: 20, Timeout: 2 * time.Second}
			last := killLoop(t, srv, a, kills, func() {})
			exactlyOnce(t, c, last)
			t.Logf("%d records", last)
		})
	}
	t.Run("control", func(t *testing.T) {
		// An agent that goes on where it has noted to be, without asking.
		t.Parallel()
		srv := redistest.Start(t, redistest.Options{})
		c := srv.Client()
		defer c.Close()
		q := newMemQueue()
		q.add(1000, buffer.Events, false)
		plainFrom(t, c.Options(), q, 0, 100) // killed before it has noted the last batch
		plainFrom(t, c.Options(), q, 900, 100)
		if a := auditStream(t, c, 1000); a.Duplicate != 100 {
			t.Errorf("control: %+v", a)
		}
	})
}

func TestT7KilledAgentAndServer(t *testing.T) {
	t.Parallel()
	encodings(t, func(t *testing.T, e Encoding) {
		srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
		c := srv.Client()
		defer c.Close()
		a := agentSpec{Dir: t.TempDir(), Addr: srv.Addr(), Encoding: e, Cap: 64 << 20, BatchLimit: 50, Timeout: 2 * time.Second}
		n := int64(0)
		last := killLoop(t, srv, a, 10, func() {
			n++
			loseTail(t, srv, n%3*20<<10) // every third time it loses nothing
		})
		dropped := afterTheRule(t, c, last)
		t.Logf("%d records, %d dropped by the consumer's rule", last, dropped)
	})
}
