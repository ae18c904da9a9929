// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/transport/consumer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// soakSink is the consumer of a soak: it audits what the rule lets pass.
type soakSink struct {
	audit  *consumer.Audit
	events string            // the stream of events
	newest map[string]string // id of the last entry, by stream
	at     atomic.Uint64     // highest seq seen
	idle   atomic.Int64      // reads in a row that brought nothing
	rule   atomic.Uint64     // what the rule has dropped
	held   atomic.Int64      // until when it does not read, in nanoseconds since the Unix epoch
	broken []string
	failed atomic.Pointer[error] // the last read that did
}

func (s *soakSink) Records(_ context.Context, recs []consumer.Record) error {
	for i := range recs {
		r := &recs[i]
		s.audit.Add(r)
		s.newest[r.Stream] = r.Entry
		s.at.Store(max(s.at.Load(), r.Seq))
		if r.Stream == s.events && string(r.Data) != payload(r.Seq) && len(s.broken) < 10 {
			s.broken = append(s.broken, fmt.Sprintf("seq %d: %.200s", r.Seq, r.Data))
		}
	}
	return nil
}

func (s *soakSink) Malformed(_ context.Context, e *consumer.EntryError) error {
	// Trimming takes only what was acknowledged, but a server that goes back in
	// time forgets the acknowledgement.
	if !errors.Is(e, consumer.ErrGone) && len(s.broken) < 10 {
		s.broken = append(s.broken, e.Error())
	}
	return nil
}

func (s *soakSink) Flush(context.Context) error {
	s.idle.Store(-1)
	return nil
}

// soakConsumer reads as a consumer does, over all that happens to the server, and
// trims what it has read.
func soakConsumer(ctx context.Context, c redis.UniversalClient, decisions string, sink *soakSink) error {
	g, err := consumer.New(c, consumer.Options{Group: "soak", Name: "one", Streams: []string{sink.events, decisions}, Block: 100 * time.Millisecond})
	if err != nil {
		return err
	}
	for n := 0; ctx.Err() == nil; n++ {
		sleep(ctx, time.Until(time.Unix(0, sink.held.Load())))
		err := g.Read(ctx, sink)
		sink.rule.Store(g.Dropped())
		if err != nil {
			if errors.Is(err, consumer.ErrShared) || errors.Is(err, consumer.ErrField) {
				return err
			}
			sink.failed.Store(&err)
			sleep(ctx, 20*time.Millisecond)
			continue
		}
		sink.idle.Add(1)
		if id := sink.newest[sink.events]; n%50 == 0 && id != "" {
			c.XTrimMinIDApprox(ctx, sink.events, id, 0)
		}
	}
	return nil
}

// soak is an agent in a process of its own that delivers events from a real buffer, a
// consumer that follows the rule, and what befalls them.
type soak struct {
	t         *testing.T
	rng       *rand.Rand
	spec      agentSpec
	agent     *agentProcess
	client    redis.UniversalClient
	sink      *soakSink
	events    string
	decisions string
}

// befalls is something that happens to servers or agent.
type befalls struct {
	name string
	do   func()
}

// newSoak starts the agent. What is kept of the acknowledged is some three seconds, and the
// whole buffer some eight: a server that is emptied or away for long costs records, which
// must be named.
func newSoak(t *testing.T, c redis.UniversalClient, spec agentSpec) *soak {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	spec.Dir, spec.Encoding, spec.Rate = t.TempDir(), JSON, 5000
	spec.Cap, spec.Retain, spec.BatchLimit, spec.Timeout = 16<<20, 6<<20, 256, 500*time.Millisecond
	s := &soak{t: t, rng: rand.New(rand.NewPCG(seed, 0)), spec: spec, client: c, events: eventsKey, decisions: "decisions:system"}
	if spec.Topology == Cluster {
		tag := Tag(Shard(testAgent, spec.Shards), spec.Shards)
		s.events, s.decisions = "edr:{"+tag+"}:events", "decisions:system:{"+tag+"}"
	}
	s.sink = &soakSink{audit: consumer.NewAudit(), events: s.events, newest: make(map[string]string)}
	s.agent = startAgent(t, spec)
	return s
}

// again kills the agent and starts it with another encoding and another clock.
func (s *soak) again() {
	s.agent.kill()
	s.spec.Encoding = []Encoding{JSON, ZstdBatch}[s.rng.IntN(2)]
	s.spec.Clock = []time.Duration{0, time.Hour, -time.Hour, 365 * 24 * time.Hour, -365 * 24 * time.Hour}[s.rng.IntN(5)]
	s.agent = startAgent(s.t, s.spec)
}

// hold keeps the consumer from reading for longer than the buffer keeps what was
// acknowledged: what a server loses meanwhile nobody has seen.
func (s *soak) hold() {
	s.sink.held.Store(time.Now().Add(5*time.Second + rand.N(15*time.Second)).UnixNano())
}

func (s *soak) pause(least, most time.Duration) { sleep(s.t.Context(), least+rand.N(most-least)) }

// run has one after the other happen for so long, each chosen by pick, then calm, and
// wants each record once and in order, or named as lost. It goes on for up to three times
// as long until the rule had to drop something that was shown again.
func (s *soak) run(long time.Duration, pick func(n int) befalls, calm func()) {
	t, sink := s.t, s.sink
	ctx, cancel := context.WithCancel(t.Context())
	consumed := make(chan error, 1)
	go func() {
		consumed <- soakConsumer(ctx, s.client, s.decisions, sink)
		close(consumed)
	}()
	defer func() {
		cancel()
		for range consumed { // it does not outlive a test that has failed
		}
	}()
	counts := make(map[string]int)
	start := time.Now()
	for n := 0; time.Since(start) < long || sink.rule.Load() == 0 && time.Since(start) < 3*long; n++ {
		s.pause(time.Second, 4*time.Second)
		f := pick(n)
		counts[f.name]++
		f.do()
	}
	calm()
	last := s.agent.finish(t, true)
	took := time.Since(start)
	// The last record may be on one stream while the other one is still being read.
	deadline := time.Now().Add(3 * time.Minute)
	for (sink.at.Load() < last || sink.idle.Load() < 3) && time.Now().Before(deadline) {
		sleep(t.Context(), 20*time.Millisecond)
	}
	if sink.at.Load() < last {
		why := errors.New("none")
		if err := sink.failed.Load(); err != nil {
			why = *err
		}
		t.Errorf("the consumer has read up to %d of %d; its last error: %v", sink.at.Load(), last, why)
	}
	cancel()
	if err := <-consumed; err != nil {
		t.Errorf("consumer: %v", err)
	}
	fs := sink.audit.Findings()
	if len(fs) != 1 || fs[0].Last != last || !fs[0].Clean() || sink.broken != nil || sink.audit.Incomplete() {
		t.Errorf("of %d records: %+v\nbroken: %s", last, fs, strings.Join(sink.broken, "\n"))
	}
	if len(fs) == 0 || fs[0].Records == 0 {
		t.Fatal("nothing was delivered")
	}
	t.Logf("%v, %d records (%.0f a second): %d delivered, %d lost and named, %d missing, %d twice; %d that the server showed again dropped by the rule",
		took.Round(time.Second), last, float64(last)/took.Seconds(), fs[0].Records, fs[0].NamedLost, fs[0].Missing, fs[0].Duplicates, sink.rule.Load())
	t.Logf("what befell them: %v", counts)
	if sink.rule.Load() == 0 {
		t.Error("the faults do not bite")
	}
}

// soakFor is how long a soak lasts: 30 minutes with EDR_LONG=1, any time with EDR_SOAK.
func soakFor(t *testing.T, short time.Duration) time.Duration {
	t.Helper()
	if testing.Short() {
		t.Skip("takes minutes")
	}
	if v := os.Getenv("EDR_SOAK"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if os.Getenv("EDR_LONG") == "1" {
		return 30 * time.Minute
	}
	return short
}

// TestSoak delivers 5,000 events a second while everything happens to the network, the
// server and the process.
func TestSoak(t *testing.T) {
	long := soakFor(t, 3*time.Minute)
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{DropReply: 0.02, Reset: 0.01, Stall: 0.003, StallFor: 700 * time.Millisecond, Seed: rand.Uint64()})
	c := srv.Client()
	defer c.Close()
	s := newSoak(t, c, agentSpec{Addr: proxy.Addr()})
	faults := []befalls{
		{"server killed", func() { srv.Kill9(); s.pause(0, time.Second); srv.Restart() }},
		{"log cut", func() { loseTail(t, srv, s.rng.Int64N(500<<10)) }},
		{"agent killed, clock and encoding changed", s.again},
		{"both killed", func() { srv.Kill9(); s.again(); srv.Restart() }},
		{"emptied", func() { c.FlushAll(t.Context()) }},
		{"full", func() {
			if err := c.ConfigSet(t.Context(), "maxmemory", "1").Err(); err != nil {
				t.Logf("full: %v", err)
			}
			s.pause(time.Second, 2*time.Second)
			await(t, text("the limit to be lifted"), func() bool { return c.ConfigSet(t.Context(), "maxmemory", "0").Err() == nil })
		}},
		{"stalled", func() { srv.Stall(); s.pause(500*time.Millisecond, 1500*time.Millisecond); srv.Resume() }},
		{"script forgotten", func() { c.ScriptFlush(t.Context()) }},
		{"consumer held up", s.hold},
		{"away for long", func() { srv.Kill9(); s.pause(10*time.Second, 12*time.Second); srv.Restart() }},
	}
	s.run(long, func(n int) befalls {
		switch n % 20 {
		case 2:
			return faults[4] // emptied: what was kept comes again, for the rule to drop
		case 10:
			return faults[len(faults)-1]
		}
		return faults[s.rng.IntN(len(faults)-1)]
	}, func() { proxy.SetFaults(redistest.Faults{}) })
	t.Logf("proxy: %d replies dropped, %d resets, %d stalls", proxy.Dropped.Load(), proxy.Resets.Load(), proxy.Stalls.Load())
	if proxy.Dropped.Load() == 0 || proxy.Resets.Load() == 0 {
		t.Error("the faults do not bite")
	}
}

// TestSoakFailover is TestSoak over servers that take over from each other, again and again,
// every second time with a replica that lacks what was confirmed in the last second.
func TestSoakFailover(t *testing.T) {
	long := soakFor(t, time.Minute)
	t.Parallel()
	t.Run("sentinel", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartSentinel(t, failTimeout, redistest.Options{AOF: "everysec"})
		c := redis.NewFailoverClient(&redis.FailoverOptions{
			MasterName: redistest.MasterName, SentinelAddrs: strings.Split(g.Addr(), ","), MaxRetries: -1, DialTimeout: time.Second, ReadTimeout: time.Second,
		})
		defer c.Close()
		soakFailover(t, long, g, 0, newSoak(t, c, agentSpec{Addr: g.Addr(), Topology: Sentinel, Master: redistest.MasterName}))
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartCluster(t, 3, failTimeout, redistest.Options{AOF: "everysec"})
		c := redis.NewClusterClient(&redis.ClusterOptions{
			Addrs: strings.Split(g.Addr(), ","), MaxRedirects: -1, ClusterStateReloadInterval: time.Second, DialTimeout: time.Second, ReadTimeout: time.Second,
		})
		defer c.Close()
		const shards = 16
		at := slot(Tag(Shard(testAgent, shards), shards)) * 3 / Slots
		soakFailover(t, long, g, at, newSoak(t, c, agentSpec{Addr: g.Addr(), Topology: Cluster, Shards: shards}))
	})
}

// soakFailover lets the pair of servers fail that has the agent's shard.
func soakFailover(t *testing.T, long time.Duration, g *redistest.Group, pair int, s *soak) {
	// A server that was killed comes back as the replica of the other.
	fail := func(lag bool, meanwhile func()) {
		master, replica := g.Pair(pair)
		if lag {
			g.Lose(master, replica)
			s.pause(500*time.Millisecond, time.Second)
		}
		master.Kill9()
		if lag {
			replica.Resume()
		}
		meanwhile()
		g.Promoted(replica)
		master.Restart()
	}
	master := func() *redis.Client {
		m, _ := g.Pair(pair)
		return m.Client()
	}
	faults := []befalls{
		{"failover", func() { fail(false, func() {}) }},
		{"failover to one that is behind", func() { fail(true, func() {}) }},
		{"failover, agent killed", func() { fail(s.rng.IntN(2) == 0, s.again) }},
		{"agent killed, clock and encoding changed", s.again},
		{"emptied", func() { c := master(); defer c.Close(); c.FlushAll(t.Context()) }},
		{"script forgotten", func() { c := master(); defer c.Close(); c.ScriptFlush(t.Context()) }},
		{"consumer held up", s.hold},
	}
	s.run(long, func(n int) befalls {
		if n%2 == 0 {
			return faults[1-n/2%2]
		}
		return faults[2+s.rng.IntN(len(faults)-2)]
	}, func() {
		// A server that was killed comes back as a master until it is told otherwise, seconds
		// later. An agent that ended while it delivered to that one would have been the last
		// to know what is lost then.
		g.Pair(pair)
	})
}
