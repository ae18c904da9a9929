// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// collector is a Sink that keeps what it gets until Flush.
type collector struct {
	seqs    []uint64
	foreign int
	bad     []error
	flushes int
	refuse  error // of Flush
}

func (c *collector) Records(_ context.Context, recs []Record) error {
	for i := range recs {
		if recs[i].Foreign() {
			c.foreign++
			continue
		}
		c.seqs = append(c.seqs, recs[i].Seq)
	}
	return nil
}

func (c *collector) Malformed(_ context.Context, e *EntryError) error {
	c.bad = append(c.bad, e)
	return nil
}

func (c *collector) Flush(context.Context) error {
	c.flushes++
	return c.refuse
}

func put(t *testing.T, c *redis.Client, key string, values map[string]any) string {
	t.Helper()
	id, err := c.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: values}).Result()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func group(t *testing.T, c *redis.Client, name string) *Group {
	t.Helper()
	g, err := New(c, Options{
		Group: "soc", Name: name, Streams: []string{stream, "decisions:system"},
		Count: 4, Block: 5 * time.Millisecond, ClaimAfter: 200 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// drain reads until nothing comes any more.
func drain(t *testing.T, g *Group, sink *collector) {
	t.Helper()
	for {
		n := sink.flushes
		if err := g.Read(t.Context(), sink); err != nil {
			t.Fatal(err)
		}
		if sink.flushes == n {
			return
		}
	}
}

// stored is the seq of the position that the server has of agent a.
func stored(t *testing.T, c *redis.Client, group string) uint64 {
	t.Helper()
	text, err := c.HGet(t.Context(), PositionsKey(stream, group), "a").Result()
	if errors.Is(err, redis.Nil) {
		return 0
	}
	at, bad := ParsePosition(text)
	if err != nil || bad != nil {
		t.Fatal(err, bad)
	}
	return at.Seq
}

func upTo(first, last uint64) (out []uint64) {
	for seq := first; seq <= last; seq++ {
		out = append(out, seq)
	}
	return out
}

func TestGroup(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	put(t, c, stream, jsonEntry(1, "{}"))
	put(t, c, stream, packedEntry(t, 2, "{}", "{}", "{}"))
	put(t, c, stream, packedEntry(t, 3, "{}", "{}", "{}")) // 3 and 4 are there already
	put(t, c, stream, jsonEntry(5, "{}"))
	put(t, c, stream, jsonEntry(0, "{}")) // malformed
	put(t, c, stream, map[string]any{"data": "of another"})
	put(t, c, stream, jsonEntry(6, "{}"))
	sink := &collector{}
	g := group(t, c, "one")
	drain(t, g, sink)
	if d := cmp.Diff(upTo(1, 6), sink.seqs); d != "" {
		t.Errorf("seqs (-want +got):\n%s", d)
	}
	if sink.foreign != 1 || len(sink.bad) != 1 || !errors.Is(sink.bad[0], ErrField) || g.Dropped() != 3 {
		t.Errorf("%d foreign, bad %v, dropped %d", sink.foreign, sink.bad, g.Dropped())
	}
	if p, err := c.XPending(t.Context(), stream, "soc").Result(); err != nil || p.Count != 0 {
		t.Errorf("pending %+v, %v", p, err)
	}

	// The next start goes on where this one ended, and knows what was seen.
	put(t, c, stream, jsonEntry(6, "{}"))
	put(t, c, stream, jsonEntry(7, "{}"))
	put(t, c, "decisions:system", jsonEntry(8, "{}"))
	sink = &collector{}
	drain(t, group(t, c, "one"), sink)
	if d := cmp.Diff(upTo(7, 8), sink.seqs); d != "" {
		t.Errorf("after a restart (-want +got):\n%s", d)
	}
}

// TestGroupHasUnacknowledgedAgain ends members at each point at which something
// was read and not acknowledged.
func TestGroupHasUnacknowledgedAgain(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	for seq := range uint64(20) {
		put(t, c, stream, jsonEntry(seq+1, "{}"))
	}
	// A sink that fails: the same member again.
	broken := errors.New("disk full")
	if err := group(t, c, "one").Read(t.Context(), &collector{refuse: broken}); !errors.Is(err, broken) {
		t.Errorf("Read: %v", err)
	}
	sink := &collector{refuse: broken}
	g := group(t, c, "one")
	for range 3 { // or the same Group
		sink.seqs = nil
		if err := g.Read(t.Context(), sink); !errors.Is(err, broken) {
			t.Errorf("Read: %v", err)
		}
	}
	sink = &collector{}
	if err := g.Read(t.Context(), sink); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(upTo(1, 4), sink.seqs); d != "" || g.Dropped() != 0 {
		t.Errorf("again (-want +got):\n%s", d)
	}
	// A member that dies with entries, one of which is deleted meanwhile; another
	// one takes them over, and does so before it reads new ones.
	start := time.Now() // it was alive after that
	if err := group(t, c, "one").Read(t.Context(), &collector{refuse: broken}); err == nil {
		t.Error("no error")
	}
	other := group(t, c, "two")
	sink = &collector{}
	drain(t, other, sink)
	if d := cmp.Diff(upTo(5, 20), sink.seqs); d != "" {
		t.Errorf("taken over (-want +got):\n%s", d)
	}
	if waited := time.Since(start); waited < 100*time.Millisecond {
		t.Errorf("took entries over after %v, when the other one could be alive", waited)
	}
	// Entries that are gone when they are asked for again are named.
	put(t, c, stream, jsonEntry(21, "{}"))
	id := put(t, c, stream, jsonEntry(22, "{}"))
	if err := group(t, c, "two").Read(t.Context(), &collector{refuse: broken}); err == nil {
		t.Error("no error")
	}
	if err := c.XDel(t.Context(), stream, id).Err(); err != nil {
		t.Fatal(err)
	}
	sink = &collector{}
	drain(t, group(t, c, "two"), sink)
	if d := cmp.Diff(upTo(21, 21), sink.seqs); d != "" || len(sink.bad) != 1 || !errors.Is(sink.bad[0], ErrGone) {
		t.Errorf("bad %v, seqs (-want +got):\n%s", sink.bad, d)
	}
}

func TestGroupRefusesCompany(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	sink := &collector{}
	g := group(t, c, "one")
	drain(t, g, sink)
	for seq := range uint64(6) {
		put(t, c, stream, jsonEntry(seq+1, "{}"))
	}
	// Somebody reads as another member of the same group.
	if err := c.XReadGroup(t.Context(), &redis.XReadGroupArgs{Group: "soc", Consumer: "stranger", Streams: []string{stream, ">"}, Count: 2}).Err(); err != nil {
		t.Fatal(err)
	}
	if err := g.Read(t.Context(), sink); !errors.Is(err, ErrShared) {
		t.Errorf("Read: %v", err)
	}
	if sink.seqs != nil {
		t.Errorf("got %v out of order", sink.seqs)
	}
	// The stranger is gone: all of it, in order.
	drain(t, g, sink)
	if d := cmp.Diff(upTo(1, 6), sink.seqs); d != "" {
		t.Errorf("seqs (-want +got):\n%s", d)
	}
}

func TestGroupOutlivesTheServer(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{AOF: "always"})
	c := srv.Client()
	defer c.Close()
	sink := &collector{}
	g := group(t, c, "one")
	put(t, c, stream, jsonEntry(1, "{}"))
	drain(t, g, sink)
	srv.Kill9()
	if err := g.Read(t.Context(), sink); err == nil {
		t.Error("no error without a server")
	}
	srv.Restart()
	put(t, c, stream, jsonEntry(2, "{}"))
	drain(t, g, sink)
	// Emptied: the sensor sends what it has kept once more.
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	if err := g.Read(t.Context(), sink); !redis.HasErrorPrefix(err, "NOGROUP") {
		t.Errorf("Read: %v", err)
	}
	for seq := range uint64(3) {
		put(t, c, stream, jsonEntry(seq+1, "{}"))
	}
	drain(t, g, sink)
	if d := cmp.Diff(upTo(1, 3), sink.seqs); d != "" {
		t.Errorf("seqs (-want +got):\n%s", d)
	}
}

// TestGroupThroughLossyProxy loses replies to reads and acknowledgements: nothing
// may be missing or come twice.
func TestGroupThroughLossyProxy(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	const total = 800
	pipe := c.Pipeline()
	for seq := range uint64(total) {
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: stream, Values: jsonEntry(seq+1, "{}")})
	}
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{DropReply: 0.1, Reset: 0.05, Seed: 3})
	o := c.Options()
	o.Network, o.Addr, o.Dialer = "tcp", proxy.Addr(), nil
	for _, retries := range []int{-1, 3} { // by the client, unseen by the Group
		t.Run(fmt.Sprint(retries), func(t *testing.T) { groupThrough(t, c, *o, retries, total) })
	}
}

func groupThrough(t *testing.T, c *redis.Client, o redis.Options, retries, total int) {
	o.MaxRetries = retries
	lossy := redis.NewClient(&o)
	defer lossy.Close()
	g, err := New(lossy, Options{Group: fmt.Sprint("soc", retries), Name: "one", Streams: []string{stream}, Count: 10, Block: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	sink := &collector{}
	failures := 0
	for len(sink.seqs) < total && failures < 10*total {
		if err := g.Read(t.Context(), sink); err != nil {
			failures++
		} else if n := len(sink.seqs); n > 0 && stored(t, c, g.o.Group) != sink.seqs[n-1] {
			t.Fatalf("%d is stored after a Read without an error, %d was handed over last", stored(t, c, g.o.Group), sink.seqs[n-1])
		}
	}
	if d := cmp.Diff(upTo(1, uint64(total)), sink.seqs); d != "" {
		t.Errorf("seqs (-want +got):\n%s", d)
	}
	if failures < 10 {
		t.Errorf("%d failures: the proxy does not bite", failures)
	}
	t.Logf("%d failures, %d dropped by the rule", failures, g.Dropped())
}

// TestGroupStoresThePositionOfWhatItDrops has entries come again whose position is
// not stored: the next member must know it, for the server may show them once more.
func TestGroupStoresThePositionOfWhatItDrops(t *testing.T) {
	for name, again := range map[string]func(t *testing.T, c *redis.Client, p *redistest.Proxy, g *Group, sink *collector){
		"the transaction is lost": func(t *testing.T, _ *redis.Client, p *redistest.Proxy, g *Group, sink *collector) {
			p.SetFaults(redistest.Faults{Word: "xack"})
			if err := g.Read(t.Context(), sink); err == nil || p.Refused.Load() == 0 {
				t.Fatalf("Read: %v, %d requests lost", err, p.Refused.Load())
			}
			p.SetFaults(redistest.Faults{})
		},
		"the server went back": func(t *testing.T, c *redis.Client, _ *redistest.Proxy, g *Group, sink *collector) {
			drain(t, g, sink)
			c.Del(t.Context(), PositionsKey(stream, "soc"))
			if err := c.XGroupSetID(t.Context(), stream, "soc", "0").Err(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			put(t, c, stream, jsonEntry(1, "{}"))
			put(t, c, stream, jsonEntry(2, "{}"))
			lossy, proxy := throughProxy(t, srv)
			sink := &collector{}
			g := group(t, lossy, "one")
			again(t, c, proxy, g, sink)
			if d := cmp.Diff(upTo(1, 2), sink.seqs); d != "" || stored(t, c, "soc") != 0 {
				t.Fatalf("%d is stored, seqs (-want +got):\n%s", stored(t, c, "soc"), d)
			}
			drain(t, g, sink)
			if stored(t, c, "soc") != 2 {
				t.Errorf("%d is stored after what was dropped", stored(t, c, "soc"))
			}
			put(t, c, stream, jsonEntry(1, "{}"))
			put(t, c, stream, jsonEntry(2, "{}"))
			drain(t, group(t, c, "one"), sink)
			if d := cmp.Diff(upTo(1, 2), sink.seqs); d != "" {
				t.Errorf("after a restart (-want +got):\n%s", d)
			}
		})
	}
}

func maxmemory(t *testing.T, c *redis.Client, bytes string) {
	t.Helper()
	if err := c.ConfigSet(t.Context(), "maxmemory", bytes).Err(); err != nil {
		t.Fatal(err)
	}
}

// TestGroupDrainsAFullServer has everything to be read while the server takes
// nothing: what is acknowledged can be deleted, and only that ends it.
func TestGroupDrainsAFullServer(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	sink := &collector{}
	g := group(t, c, "one")
	g.positions = NewPositions(2) // others push a out
	put(t, c, stream, jsonEntry(1, "{}"))
	drain(t, g, sink)
	for i, seq := range []uint64{2, 3, 4, 5, 6, 7, 8, 9, 4, 5, 10, 11} {
		put(t, c, stream, with(jsonEntry(seq, "{}"), "agent", "aaaabcddaaab"[i:i+1]))
	}
	maxmemory(t, c, "1")
	drain(t, g, sink)
	if d := cmp.Diff(upTo(1, 11), sink.seqs); d != "" || stored(t, c, "soc") != 1 {
		t.Errorf("%d is stored, seqs (-want +got):\n%s", stored(t, c, "soc"), d)
	}
	if p, err := c.XPending(t.Context(), stream, "soc").Result(); err != nil || p.Count != 0 {
		t.Errorf("pending %+v, %v", p, err)
	}
	// Positions are stored when there is memory, also when nothing comes any more.
	maxmemory(t, c, "0")
	drain(t, g, sink)
	if stored(t, c, "soc") != 10 {
		t.Errorf("%d is stored", stored(t, c, "soc"))
	}

	// A member that is new joins a full server, too.
	put(t, c, stream, jsonEntry(12, "{}"))
	maxmemory(t, c, "1")
	g = group(t, c, "two")
	drain(t, g, sink)
	if d := cmp.Diff(upTo(1, 12), sink.seqs); d != "" || stored(t, c, "soc") != 10 {
		t.Errorf("%d is stored, seqs (-want +got):\n%s", stored(t, c, "soc"), d)
	}
	// What another agent's commit finds unsaved is stored after it.
	maxmemory(t, c, "0")
	put(t, c, "decisions:system", with(jsonEntry(13, "{}"), "agent", "b"))
	if err := g.Read(t.Context(), sink); err != nil || stored(t, c, "soc") != 12 {
		t.Errorf("Read: %v, %d is stored", err, stored(t, c, "soc"))
	}
	put(t, c, stream, jsonEntry(12, "{}"))
	put(t, c, stream, jsonEntry(14, "{}"))
	drain(t, group(t, c, "two"), sink)
	if d := cmp.Diff(upTo(1, 14), sink.seqs); d != "" {
		t.Errorf("after a restart (-want +got):\n%s", d)
	}
}

// flusher is a collector that does something before what it got is acknowledged.
type flusher struct {
	collector
	before func()
}

func (f *flusher) Flush(ctx context.Context) error {
	f.before()
	return f.collector.Flush(ctx)
}

// throughProxy is a client that reaches the server through a proxy, and retries nothing.
func throughProxy(t *testing.T, srv *redistest.Server) (*redis.Client, *redistest.Proxy) {
	t.Helper()
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{})
	direct := srv.Client()
	defer direct.Close()
	o := *direct.Options()
	o.Network, o.Addr, o.Dialer, o.MaxRetries = "tcp", proxy.Addr(), nil, -1
	lossy := redis.NewClient(&o)
	t.Cleanup(func() { _ = lossy.Close() })
	return lossy, proxy
}

// TestGroupStoresNoOlderPosition loses the reply to a commit while an older position
// waits to be stored.
func TestGroupStoresNoOlderPosition(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	put(t, c, stream, jsonEntry(1, "{}"))
	lossy, proxy := throughProxy(t, srv)
	g := group(t, lossy, "one")
	sink := &flusher{before: func() { maxmemory(t, c, "1") }}
	if err := g.Read(t.Context(), sink); err != nil || stored(t, c, "soc") != 0 {
		t.Fatalf("Read: %v, %d is stored", err, stored(t, c, "soc"))
	}
	maxmemory(t, c, "0")
	put(t, c, stream, jsonEntry(2, "{}"))
	sink.before = func() { proxy.SetFaults(redistest.Faults{DropReply: 1}) }
	if err := g.Read(t.Context(), sink); err == nil || stored(t, c, "soc") != 2 {
		t.Fatalf("Read: %v, %d is stored", err, stored(t, c, "soc"))
	}
	proxy.SetFaults(redistest.Faults{})
	drain(t, g, &sink.collector)
	if d := cmp.Diff(upTo(1, 2), sink.seqs); d != "" || stored(t, c, "soc") != 2 {
		t.Errorf("%d is stored, seqs (-want +got):\n%s", stored(t, c, "soc"), d)
	}
}

// TestGroupKeepsThePositionsOfARead: a read brings more agents than positions are asked to be
// kept of. Those that are known are not pushed out by those that are loaded beside them.
func TestGroupKeepsThePositionsOfARead(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	const agents = 16
	show := func(seq uint64) {
		for i := range agents {
			put(t, c, stream, with(jsonEntry(seq, "{}"), "agent", fmt.Sprint("agent-", i)))
		}
	}
	show(2)
	lossy, proxy := throughProxy(t, srv)
	g, err := New(lossy, Options{Group: "soc", Name: "one", Streams: []string{stream}, Count: agents, Block: 5 * time.Millisecond, Agents: 4})
	if err != nil {
		t.Fatal(err)
	}
	sink := &collector{}
	proxy.SetFaults(redistest.Faults{Word: "xack"})
	if err := g.Read(t.Context(), sink); err == nil || proxy.Refused.Load() == 0 || len(sink.seqs) != agents {
		t.Fatalf("Read: %v, %d requests lost, %d records", err, proxy.Refused.Load(), len(sink.seqs))
	}
	proxy.SetFaults(redistest.Faults{})
	for range 2 {
		drain(t, g, sink)
		if len(sink.seqs) != agents {
			t.Errorf("%d records of %d agents: %v", len(sink.seqs), agents, sink.seqs)
		}
		for agent, at := range c.HGetAll(t.Context(), PositionsKey(stream, "soc")).Val() {
			if p, err := ParsePosition(at); err != nil || p.Seq != 2 {
				t.Errorf("%s is at %s, %v", agent, at, err)
			}
		}
		show(1) // again, by a server that went back
	}
}

// TestGroupKeepsWhatIsKnown: an agent that was not seen for long comes with others whose
// positions are loaded.
func TestGroupKeepsWhatIsKnown(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	g, err := New(c, Options{Group: "soc", Name: "one", Streams: []string{stream}, Count: 4, Block: 5 * time.Millisecond, Agents: 2})
	if err != nil {
		t.Fatal(err)
	}
	sink := &collector{}
	for _, agents := range []string{"abcd", "efgh", "aijk"} {
		for _, agent := range agents {
			put(t, c, stream, with(jsonEntry(1, "{}"), "agent", string(agent)))
		}
		if err := g.Read(t.Context(), sink); err != nil {
			t.Fatal(err)
		}
		// A member before this one had these.
		key := PositionsKey(stream, "soc")
		at := c.HGet(t.Context(), key, "a").Val()
		if err := c.HSet(t.Context(), key, "i", at, "j", at, "k", at).Err(); err != nil {
			t.Fatal(err)
		}
	}
	if len(sink.seqs) != 8 || g.Dropped() != 4 {
		t.Errorf("%d records, %d dropped", len(sink.seqs), g.Dropped())
	}
}

func TestFull(t *testing.T) {
	const oom, abort = "OOM command not allowed when used memory > 'maxmemory'.", "EXECABORT Transaction discarded because of"
	for _, c := range []struct {
		name, err, cmd string
		want           bool
	}{
		{"while queuing", abort + " previous errors.", oom, true},
		{"while queuing, as a cluster's client says it", oom, oom, true},
		{"at EXEC", abort + ": " + oom, "", true},
		{"another cause", abort + " previous errors.", "NOPERM this user has no permissions to run the 'hset' command", false},
		{"no reply", "EOF", "EOF", false},
	} {
		cmd := redis.NewStatusCmd(t.Context())
		cmd.SetErr(errors.New(c.cmd))
		if got := full(errors.New(c.err), []redis.Cmder{cmd}); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestGroupRefusesSpoiltPosition(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	put(t, c, stream, jsonEntry(1, "{}"))
	c.HSet(t.Context(), PositionsKey(stream, "soc"), "a", "nonsense")
	if err := group(t, c, "one").Read(t.Context(), &collector{}); !errors.Is(err, ErrField) {
		t.Errorf("Read: %v", err)
	}
}

func TestPositionsKey(t *testing.T) {
	for key, want := range map[string]string{
		"edr:{s000}:events": "edr:{s000}:events:positions:g",
		"decisions:system":  "{decisions:system}:positions:g",
		"odd{}key":          "{odd{}key}:positions:g",
	} {
		if got := PositionsKey(key, "g"); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}

func TestNewRefusesBadOptions(t *testing.T) {
	for i, o := range []Options{{}, {Group: "g", Name: "n"}, {Group: "g", Name: "n", Streams: []string{"s"}, Limits: Limits{Bytes: -1}}} {
		if _, err := New(nil, o); err == nil {
			t.Errorf("options %d accepted: %v", i, fmt.Sprint(o))
		}
	}
}
