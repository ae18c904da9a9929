// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"flag"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

var update = flag.Bool("update", false, "rewrite testdata/shards.txt and docs/compatibility.md")

// TestShards is T16: however the slots are split evenly over the masters, each has
// as many shards; and the table for other languages is what the code says.
func TestShards(t *testing.T) {
	var table bytes.Buffer
	table.WriteString("# shards shard tag slot: the stream of shard i of n is edr:{tag}:events, that of an agent i = xxhash64(agent id) mod n\n")
	for n := 1; n <= MaxShards; n *= 2 {
		slots := make([]int, n)
		for i := range n {
			tag := Tag(i, n)
			slots[i] = slot(tag)
			fmt.Fprintln(&table, n, i, tag, slot("x{"+tag+"}:y"))
		}
		for masters := 1; n > 1 && masters <= n; masters *= 2 {
			per := make([]int, masters)
			for _, s := range slots {
				per[s*masters/Slots]++
			}
			for m, got := range per {
				if got != n/masters {
					t.Errorf("%d shards on %d masters: master %d has %d", n, masters, m, got)
				}
			}
		}
	}
	const golden = "testdata/shards.txt"
	if *update {
		if err := os.WriteFile(golden, table.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), table.String()); d != "" {
		t.Errorf("%s (-want +got):\n%s", golden, d)
	}
	// Control: tags that only count.
	per := make([]int, 16)
	for i := range 64 {
		per[slot(fmt.Sprintf("s%03d", i))*16/Slots]++
	}
	if even := [16]int{}; [16]int(per) == even {
		t.Error("tags that count spread evenly: the test does not bite")
	} else {
		t.Logf("control: 64 tags that count on 16 masters: %v", per)
	}
	// The agents themselves.
	agents := make([]int, 16)
	for i := range 16000 {
		agents[Shard(fmt.Sprintf("agent-%d", i), 16)]++
	}
	for i, n := range agents {
		if n < 850 || n > 1150 {
			t.Errorf("shard %d has %d of 16000 agents", i, n)
		}
	}
}

func TestSlot(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"cluster-enabled": "yes", "cluster-port": fmt.Sprint(redistest.FreePort(t))}})
	c := srv.Client()
	defer c.Close()
	for _, key := range []string{"", "a", "123456789", "{a}b", "x{a}b{c}", "x{}y", "x{", "}{a}", "{a", "edr:{s000}:events", "\xff\x00{é}"} {
		want, err := c.ClusterKeySlot(t.Context(), key).Result()
		if got := slot(key); err != nil || int64(got) != want {
			t.Errorf("slot(%q) = %d, want %d (%v)", key, got, want, err)
		}
	}
}

// TestSlotRange: nothing that a server answers may upset the sensor.
func TestSlotRange(t *testing.T) {
	for _, tt := range []struct {
		v     any
		nodes []string
		bad   bool
	}{
		{v: []any{int64(0), int64(9), []any{"10.0.0.1", int64(7000), "id"}, []any{"h", "7001"}}, nodes: []string{"10.0.0.1:7000", "h:7001"}},
		{v: []any{int64(0), int64(9), []any{nil, int64(7000)}, []any{"?", int64(1)}, []any{"", int64(2)}}, nodes: []string{"seed:7000", "seed:1", "seed:2"}},
		{v: []any{int64(0), int64(9)}},
		{v: nil, bad: true},
		{v: "OK", bad: true},
		{v: []any{"0", "9"}, bad: true},
		{v: []any{int64(0), int64(9), "h:1"}, bad: true},
		{v: []any{int64(0), int64(9), []any{"h"}}, bad: true},
		{v: []any{int64(0), int64(9), []any{"h\r\nAUTH x", int64(1)}}, bad: true},
		{v: []any{int64(0), int64(9), []any{strings.Repeat("h", 400), int64(1)}}, bad: true},
	} {
		_, _, nodes, err := slotRange(tt.v, "seed:6379")
		if (err != nil) != tt.bad || (!tt.bad && !cmp.Equal(tt.nodes, nodes)) {
			t.Errorf("%v: %v, %v", tt.v, nodes, err)
		}
	}
}

// outage measures from outside how long nothing was delivered.
type outage struct{ killed, promoted, resumed time.Time }

func (o outage) String() string {
	return fmt.Sprintf("outage %v, resumed %v after the promotion", o.resumed.Sub(o.killed).Round(10*time.Millisecond), o.resumed.Sub(o.promoted).Round(10*time.Millisecond))
}

// failover kills the master of an agent whose replica is behind, while records
// come, and checks that the Sender delivers all of them to the new one, and that no server
// refused it anything. lag is how
// many records the replica lacks; 0: none.
func failover(t *testing.T, g *redistest.Group, o Options, master, replica *redistest.Server, key string, lag int) *running {
	t.Helper()
	q := newMemQueue()
	s := start(t, o, q)
	s.delivered(t, q.add(2000, buffer.Events, false))
	rc := replica.Client()
	defer rc.Close()
	if lag > 0 {
		g.Lose(master, replica)
		s.delivered(t, q.add(lag, buffer.Events, false))
	}
	var out outage
	master.Kill9()
	out.killed = time.Now()
	if lag > 0 {
		replica.Resume()
	}
	last := q.add(1000, buffer.Events, false)
	out.promoted = g.Promoted(replica)
	awaitLong(t, lazy(func() string { return fmt.Sprintf("seq %d, state %+v", last, s.State()) }), func() bool { return s.State().Acked >= last })
	out.resumed = time.Now()
	s.delivered(t, q.add(1, buffer.Events, true)) // a rewind that is still due happens now
	last = q.add(1, buffer.Events, true)
	s.delivered(t, last)
	a := auditKey(t, rc, key, last)
	if d := cmp.Diff(audit{}, a); d != "" {
		t.Errorf("stream of %d after the failover (-want +got):\n%s", last, d)
	}
	if got := q.forfeited(); got != nil {
		t.Errorf("forfeited %v", got)
	}
	rewinds := testutil.ToFloat64(s.m.rewinds)
	if lag > 0 && rewinds == 0 {
		t.Error("the new master had everything: the test does not bite")
	}
	if st := s.State(); st.Node != replica.Addr() {
		t.Errorf("delivers to %s, want %s", st.Node, replica.Addr())
	}
	nothingRefused(t, slices.Concat(g.Masters, g.Replicas, g.Sentinels)...)
	t.Logf("%v, %v rewinds", out, rewinds)
	return s
}

// plainFailover is the control: a client that knows the topology, and XADD.
func plainFailover(t *testing.T, c redis.UniversalClient, g *redistest.Group, master, replica *redistest.Server, key string, lag int) {
	t.Helper()
	add := func(first, n int) {
		for seq := first; seq < first+n; seq++ {
			awaitLong(t, text("an XADD"), func() bool {
				return c.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"seq", seq}}).Err() == nil
			})
		}
	}
	add(1, 100)
	rc := replica.Client()
	defer rc.Close()
	g.Lose(master, replica)
	add(101, lag)
	master.Kill9()
	replica.Resume()
	g.Promoted(replica)
	add(101+lag, 100)
	if n := rc.XLen(t.Context(), key).Val(); n >= int64(200+lag) {
		t.Errorf("control: plain XADD lost nothing of %d: the test does not bite", 200+lag)
	} else {
		t.Logf("control: plain XADD lost %d of %d confirmed entries", int64(200+lag)-n, 200+lag)
	}
}

// How long a master of the tests may be silent: of those where any may take over, and of
// those where none may but the one that the test kills. A node syncs its configuration
// before it goes on, all of them at the same time.
const (
	failTimeout   = time.Second
	steadyTimeout = 3 * time.Second
)

// TestClusterFailover is T4: once with a replica that is behind, which must cost a
// rewind, and once where nobody ever says MOVED.
func TestClusterFailover(t *testing.T) {
	t.Parallel()
	g := redistest.StartCluster(t, 3, steadyTimeout, limited(t))
	o := as(t, fast(g.Masters[0].Addr())) // one seed: it learns the others
	o.Topology, o.Shards = Cluster, 16
	o.FirstReconnect, o.BackoffCap = 100*time.Millisecond, 30*time.Second
	pick := func(master int) (agent, key string) {
		for i := 0; ; i++ {
			agent = fmt.Sprintf("agent-%d", i)
			if tag := Tag(Shard(agent, 16), 16); slot(tag)*3/Slots == master {
				return agent, "edr:{" + tag + "}:events"
			}
		}
	}
	var key string
	o.AgentID, key = pick(1)
	s := failover(t, g, o, g.Masters[1], g.Replicas[1], key, 3000)
	s.stop(t)
	if n := len(s.finder.nodes); n < 3 {
		t.Errorf("knows %d nodes", n)
	}

	g.Masters[1].Restart() // comes back as a replica
	o.AgentID, key = pick(2)
	o.Addr = g.Addr()
	s = failover(t, g, o, g.Masters[2], g.Replicas[2], key, 0)
	s.stop(t)

	g.Masters[2].Restart() // else too few masters could agree
	g.Linked(g.Masters[1])
	g.Linked(g.Masters[2])
	_, key = pick(0)
	c := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs: strings.Split(g.Addr(), ","), MaxRedirects: -1, ClusterStateReloadInterval: time.Second, DialTimeout: time.Second, ReadTimeout: time.Second, PoolSize: 1,
	})
	defer c.Close()
	plainFailover(t, c, g, g.Masters[0], g.Replicas[0], key, 300)
}

// TestSentinelFailover is T5.
func TestSentinelFailover(t *testing.T) {
	t.Parallel()
	for _, lag := range []int{3000, 0} {
		t.Run(fmt.Sprintf("lag %d", lag), func(t *testing.T) {
			t.Parallel()
			g := redistest.StartSentinel(t, steadyTimeout, limited(t))
			o := asToo(t, g, as(t, fast(g.Addr())))
			o.Topology, o.Master = Sentinel, redistest.MasterName
			o.FirstReconnect, o.BackoffCap = 100*time.Millisecond, 30*time.Second
			failover(t, g, o, g.Masters[0], g.Replicas[0], eventsKey, lag)
		})
	}
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartSentinel(t, steadyTimeout, redistest.Options{})
		c := redis.NewFailoverClient(&redis.FailoverOptions{
			MasterName: redistest.MasterName, SentinelAddrs: strings.Split(g.Addr(), ","), MaxRetries: -1, DialTimeout: time.Second, ReadTimeout: time.Second, PoolSize: 1,
		})
		defer c.Close()
		plainFailover(t, c, g, g.Masters[0], g.Replicas[0], eventsKey, 300)
	})
}

// fakeNode answers with reply what asks for the master, and with an error all else.
func fakeNode(t *testing.T, reply string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				buf := make([]byte, 4<<10)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if ask := bytes.ToLower(buf[:n]); bytes.Contains(ask, []byte("sentinel")) || bytes.Contains(ask, []byte("slots")) {
						fmt.Fprint(c, reply)
					} else {
						fmt.Fprint(c, "-ERR unknown command\r\n")
					}
				}
			})
		}
	})
	return ln.Addr().String()
}

// TestStaleSentinel: one that is cut off from the others, and tells an address where nobody
// takes anything, is not believed for as long as it answers.
func TestStaleSentinel(t *testing.T) {
	t.Parallel()
	live := redistest.Start(t, redistest.Options{TCP: true})
	c := live.Client()
	t.Cleanup(func() { c.Close() })
	_, port, _ := net.SplitHostPort(live.Addr())
	replica := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"replicaof": "127.0.0.1 " + port}})
	told := func(addr string) string {
		host, port, _ := net.SplitHostPort(addr)
		return fmt.Sprintf("*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(host), host, len(port), port)
	}
	good := fakeNode(t, told(live.Addr()))
	for name, addr := range map[string]string{
		"dead":    fmt.Sprintf("127.0.0.1:%d", redistest.FreePort(t)),
		"replica": replica.Addr(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stale := fakeNode(t, told(addr))
			o := fast(stale + "," + good)
			o.Topology, o.Master, o.Prefix = Sentinel, "edr", name
			q := newMemQueue()
			last := q.add(10, buffer.Events, false)
			s, err := New(o, q)
			if err != nil {
				t.Fatal(err)
			}
			s.finder.turn = 0 // the stale one is asked first
			r := startSender(t, s)
			await(t, text("who told the address that fails"), func() bool {
				return strings.Contains(r.State().Error, addr+", told by "+stale+": ")
			})
			r.delivered(t, last)
			if d := cmp.Diff(audit{}, auditKey(t, c, name+":{s000}:events", last)); d != "" {
				t.Errorf("stream of %d (-want +got):\n%s", last, d)
			}
		})
	}
}

// TestClusterMovedAway: when all nodes that are known have other addresses, the seeds are asked
// at once.
func TestClusterMovedAway(t *testing.T) {
	port := redistest.FreePort(t)
	o := fast(fakeNode(t, "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$4\r\nhost\r\n:7000\r\n"))
	o.Topology = Cluster
	o.setDefaults()
	f := newFinder(&o)
	defer f.close()
	for i := range 10 {
		f.nodes = append(f.nodes, fmt.Sprintf("127.0.0.%d:%d", i+1, port))
	}
	if addr, err := f.find(t.Context(), 0); err != nil || addr != "host:7000" {
		t.Errorf("found %q, %v", addr, err)
	}
}

// TestClusterMetaAway: the node that has what was written down about the fleet's keys is gone.
// Others take records meanwhile, and when it is back what it says counts.
func TestClusterMetaAway(t *testing.T) {
	t.Parallel()
	r := limited(t)
	r.Config["cluster-require-full-coverage"], r.Config["cluster-replica-no-failover"] = "no", "yes"
	g := redistest.StartCluster(t, 3, failTimeout, r)
	o := as(t, fast(g.Addr()))
	o.Topology, o.Shards, o.ProbeInterval = Cluster, 16, 20*time.Millisecond
	away := slot("edr:meta") * 3 / Slots
	for i := 0; ; i++ {
		o.AgentID = fmt.Sprintf("agent-%d", i)
		if slot(Tag(Shard(o.AgentID, o.Shards), o.Shards))*3/Slots != away {
			break
		}
	}
	g.Masters[away].Kill9()
	g.Replicas[away].Kill9()
	q := newMemQueue()
	s := start(t, o, q)
	s.eventually(t, q.add(10, buffer.Events, false))
	if st := s.reaches(t, Connected, ClassNone); st.Acked != 10 {
		t.Errorf("state %+v", st)
	}
	g.Masters[away].Restart()
	c := g.Masters[away].Client()
	defer c.Close()
	awaitLong(t, text("the node to take a value"), func() bool { return c.HSet(t.Context(), "edr:meta", "shards", "8").Err() == nil })
	awaitLong(t, lazy(func() string { return fmt.Sprintf("the refusal, state %+v", s.State()) }), func() bool {
		st := s.State()
		return st.Phase == Held && strings.Contains(st.Error, `edr:meta says shards "8", this sensor has 16`)
	})
}

// TestTopologyMismatch: a Sender that was told the wrong thing about the servers says
// so, keeps everything, and goes on when they are as it was told.
func TestTopologyMismatch(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{TCP: true})
	c := srv.Client()
	defer c.Close()
	for name, edit := range map[string]func(*Options){
		"no cluster":  func(o *Options) { o.Topology = Cluster },
		"no sentinel": func(o *Options) { o.Topology, o.Master = Sentinel, "edr" },
	} {
		t.Run(name, func(t *testing.T) {
			o := fast(srv.Addr())
			edit(&o)
			start(t, o, newMemQueue()).reaches(t, Held, ClassTopology)
		})
	}
	t.Run("unknown master", func(t *testing.T) {
		g := redistest.StartSentinel(t, failTimeout, redistest.Options{})
		o := fast(g.Addr())
		o.Topology, o.Master = Sentinel, "other"
		start(t, o, newMemQueue()).reaches(t, Held, ClassTopology)
	})
	t.Run("standalone on a node of a cluster", func(t *testing.T) {
		node := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"cluster-enabled": "yes", "cluster-port": fmt.Sprint(redistest.FreePort(t))}})
		s := start(t, fast(node.Addr()), newMemQueue())
		s.reaches(t, Retrying, ClassCluster)
		s.stop(t)
		o := fast(node.Addr())
		o.Topology = Cluster
		start(t, o, newMemQueue()).reaches(t, Retrying, ClassCluster) // it has no slots
	})
	t.Run("meta", func(t *testing.T) {
		if err := c.HSet(t.Context(), "edr:meta", "proto", "1", "shards", "8", "tagscheme", "v1").Err(); err != nil {
			t.Fatal(err)
		}
		q := newMemQueue()
		s := start(t, fast(srv.Addr()), q)
		last := q.add(3, buffer.Events, false)
		if st := s.reaches(t, Held, ClassTopology); !strings.Contains(st.Error, `edr:meta says shards "8", this sensor has 1`) {
			t.Errorf("error %s", st.Error)
		}
		if n := c.Exists(t.Context(), eventsKey).Val(); n != 0 {
			t.Error("it delivered nevertheless")
		}
		c.HSet(t.Context(), "edr:meta", "shards", "1")
		s.delivered(t, last)
		exactlyOnce(t, c, last)
	})
}

// TestClusterKeys: all keys of an agent are in one slot, on the node that has it.
func TestClusterKeys(t *testing.T) {
	t.Parallel()
	g := redistest.StartCluster(t, 3, 5*time.Second, limited(t))
	o := as(t, fast(g.Addr()))
	o.Topology, o.Shards = Cluster, 64
	c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: strings.Split(g.Addr(), ",")})
	defer c.Close()
	if err := c.HSet(t.Context(), "edr:meta", "proto", "1", "shards", "64").Err(); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		o.AgentID = fmt.Sprintf("agent-%d", i)
		tag := "{" + Tag(Shard(o.AgentID, 64), 64) + "}"
		q := newMemQueue()
		q.add(2, buffer.Events, false)
		q.add(2, buffer.DecisionsSystem, false)
		q.add(2, buffer.DecisionsAgents, false)
		last := q.add(2, buffer.DecisionsApprovals, false)
		s := start(t, o, q)
		s.delivered(t, last)
		s.stop(t)
		reader, err := Dial(t.Context(), o) // who reads finds the same node, and the same keys
		if err != nil {
			t.Fatal(err)
		}
		reader.Close()
		if got := reader.RemoteAddr().String(); got != s.State().Node {
			t.Errorf("a reader is sent to %s, the sender to %s", got, s.State().Node)
		}
		if shard, keys := o.Place(); "{"+shard+"}" != tag || keys[0] != "decisions:system:"+tag {
			t.Errorf("a reader looks at %s, %v", shard, keys)
		}
		for _, key := range []string{"edr:" + tag + ":events", "decisions:system:" + tag, "decisions:agents:" + tag, "decisions:approvals:" + tag} {
			if n := len(entries(t, c, key)); n != 2 {
				t.Errorf("%s has %d entries", key, n)
			}
		}
	}
	// The slot moves to another node while records come.
	o.AgentID = "mover"
	q := newMemQueue()
	s := start(t, o, q)
	s.delivered(t, q.add(100, buffer.Events, false))
	from := s.State().Node
	g.Move(s.slot, from)
	last := q.add(100, buffer.Events, false)
	s.delivered(t, last)
	// What follows a redirection is acknowledged before the state says who did that.
	if to := s.reaches(t, Connected, ClassNone).Node; to == from {
		t.Errorf("still delivers to %s", to)
	}
	if d := cmp.Diff(audit{}, auditKey(t, c, s.batch.keys[buffer.Events], last)); d != "" {
		t.Errorf("stream of %d after the move (-want +got):\n%s", last, d)
	}
	s.stop(t)
	nothingRefused(t, slices.Concat(g.Masters, g.Replicas)...)
}
