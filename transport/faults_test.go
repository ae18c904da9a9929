// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestSenderHoldsAndRecovers makes a real server refuse delivery in every way
// that is quick to make. Each time the Sender must name the class, lose nothing
// and go on by itself when the cause is gone.
func TestSenderHoldsAndRecovers(t *testing.T) {
	t.Parallel()
	config := func(kv ...string) func(*testing.T, *redistest.Server, *redis.Client) {
		return func(t *testing.T, _ *redistest.Server, c *redis.Client) {
			t.Helper()
			for i := 0; i < len(kv); i += 2 {
				if err := c.ConfigSet(t.Context(), kv[i], kv[i+1]).Err(); err != nil {
					t.Fatalf("config set %s %s: %v", kv[i], kv[i+1], err)
				}
			}
		}
	}
	do := func(cmds ...string) func(*testing.T, *redistest.Server, *redis.Client) {
		return func(t *testing.T, _ *redistest.Server, c *redis.Client) {
			t.Helper()
			for _, cmd := range cmds {
				var args []any
				for a := range strings.FieldsSeq(cmd) {
					args = append(args, a)
				}
				if err := c.Do(t.Context(), args...).Err(); err != nil {
					t.Fatalf("%s: %v", cmd, err)
				}
			}
		}
	}
	type step = func(*testing.T, *redistest.Server, *redis.Client)
	for _, tt := range []struct {
		name   string
		class  Class
		phase  Phase
		spoil  step
		repair step
		says   string // what the server's reply begins with; empty: not looked at
	}{
		{"out of memory", ClassOOM, Held, config("maxmemory-policy", "noeviction", "maxmemory", "1"), config("maxmemory", "0"), "OOM"},
		{"password required", ClassAuth, Held, do("CONFIG SET requirepass x", "CLIENT KILL TYPE normal SKIPME yes"), do("ACL SETUSER default nopass"), ""},
		{"command not permitted", ClassPermission, Held, do("ACL SETUSER default -evalsha"), do("ACL SETUSER default +evalsha"), "NOPERM"},
		{"xadd not permitted", ClassPermission, Held, do("ACL SETUSER default -xadd"), do("ACL SETUSER default +xadd"), ""},
		{"key not permitted", ClassPermission, Held, do("ACL SETUSER default resetkeys ~other:*"), do("ACL SETUSER default ~*"), "NOPERM"},
		{"stream is a string", ClassWrongType, Held, do("RENAME "+eventsKey+" away", "SET "+eventsKey+" mine"), do("RENAME away " + eventsKey), "WRONGTYPE"},
		{"cursors is a string", ClassWrongType, Held, do("RENAME "+cursorKey+" away", "SET "+cursorKey+" mine"), do("RENAME away " + cursorKey), "WRONGTYPE"},
		{"cursor spoilt", ClassCursor, Held, do("HSET " + cursorKey + " " + testAgent + " nonsense"), do("DEL "+eventsKey, "HDEL "+cursorKey+" "+testAgent), "EDRCURSOR"}, // in this order: without the cursor all is sent again at once
		{"read-only replica", ClassReadOnly, Retrying, do("REPLICAOF 127.0.0.1 1"), do("REPLICAOF NO ONE"), "READONLY"},
		{
			"replica without its master", ClassReplicas, Retrying, // one that takes writes: others say READONLY first
			func(t *testing.T, s *redistest.Server, c *redis.Client) {
				config("replica-serve-stale-data", "no", "replica-read-only", "no")(t, s, c)
				do("REPLICAOF 127.0.0.1 1")(t, s, c)
			},
			do("REPLICAOF NO ONE"), "MASTERDOWN",
		},
		{"too few replicas", ClassReplicas, Retrying, config("min-replicas-to-write", "1"), config("min-replicas-to-write", "0"), "NOREPLICAS"},
		{
			"cannot persist", ClassMisconf, Held,
			func(t *testing.T, s *redistest.Server, c *redis.Client) {
				// Renaming the snapshot over a directory fails, even for root.
				if err := os.Mkdir(filepath.Join(s.Dir(), "dump.rdb"), 0o700); err != nil {
					t.Fatal(err)
				}
				config("save", "3600 1")(t, s, c)
				c.BgSave(t.Context())
				await(t, text("the failed snapshot"), func() bool {
					return strings.Contains(c.Info(t.Context(), "persistence").Val(), "rdb_last_bgsave_status:err")
				})
			},
			config("save", "", "stop-writes-on-bgsave-error", "no"), "MISCONF",
		},
		{
			"server busy", ClassBusy, Retrying,
			func(t *testing.T, s *redistest.Server, c *redis.Client) {
				config("lua-time-limit", "1")(t, s, c) // busy-reply-threshold by its older name
				other := s.Client()
				done := make(chan struct{})
				go func() {
					defer close(done)
					other.Eval(t.Context(), "while true do end", nil) // ends with SCRIPT KILL
				}()
				t.Cleanup(func() { <-done; other.Close() })
				await(t, text("the script to run"), func() bool {
					err := c.Ping(t.Context()).Err()
					return err != nil && strings.HasPrefix(err.Error(), "BUSY")
				})
			},
			do("SCRIPT KILL"), "BUSY",
		},
		{
			"no free client slot", ClassMaxClients, Retrying,
			func(t *testing.T, s *redistest.Server, c *redis.Client) {
				config("maxclients", "1")(t, s, c)
				do("CLIENT KILL TYPE normal SKIPME yes")(t, s, c)
			},
			config("maxclients", "100"), "",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			old := strings.Contains(c.Info(t.Context(), "server").Val(), "redis_version:6.")
			if old && tt.says == "NOREPLICAS" {
				return // a script may write all the same there
			}
			q := newMemQueue()
			s := start(t, fast(srv.Addr()), q)
			s.delivered(t, q.add(10, buffer.Events, false))

			tt.spoil(t, srv, c)
			last := q.add(10, buffer.Events, false)
			before := testutil.ToFloat64(s.m.errors[tt.class])
			s.reaches(t, tt.phase, tt.class)
			await(t, text("further attempts"), func() bool { return testutil.ToFloat64(s.m.errors[tt.class]) >= before+2 })
			st := s.reaches(t, tt.phase, tt.class)
			said := strings.Contains(st.Error, ": "+tt.says) || old && strings.Contains(st.Error, ": -"+tt.says)
			if st.Acked != 10 || !said || st.Hint == "" {
				t.Errorf("state %+v", st)
			}
			if got := testutil.ToFloat64(s.m.connected); got != 0 {
				t.Errorf("connected = %v", got)
			}

			tt.repair(t, srv, c)
			s.delivered(t, last)
			s.reaches(t, Connected, ClassNone)
			exactlyOnce(t, c, last)
			if got := q.forfeited(); got != nil {
				t.Errorf("forfeited %v", got)
			}
		})
	}
}

// TestSenderSurvivesStalledServer stops the server with requests in its sockets:
// when it goes on it meets them beside those of newer connections.
func TestSenderSurvivesStalledServer(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{TCP: true})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.Timeout = 200 * time.Millisecond // for a server that runs; a dial takes a dozen replies in a row
	o.BatchRecords = 32
	s := start(t, o, q)
	var last uint64
	for range 8 {
		last = q.add(3000, buffer.Events, false)
		s.delivered(t, last-2000)
		srv.Stall()
		last = q.add(1, buffer.Events, true) // it may have been quick with all of them
		timeouts := testutil.ToFloat64(s.m.errors[ClassTimeout])
		await(t, text("several timeouts"), func() bool { return testutil.ToFloat64(s.m.errors[ClassTimeout]) >= timeouts+3 })
		srv.Resume()
	}
	s.delivered(t, last)
	exactlyOnce(t, c, last)
}

func TestSenderLoadsScriptAgain(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	s := start(t, fast(srv.Addr()), q)
	s.delivered(t, q.add(10, buffer.Events, false))
	if err := c.ScriptFlush(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, q.add(10, buffer.Events, false))
	exactlyOnce(t, c, 20)
	for class, n := range s.m.errors {
		if got := testutil.ToFloat64(n); got != 0 {
			t.Errorf("%v errors of class %s", got, class)
		}
	}
}

func TestSenderWithoutScripting(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"rename-command": "EVALSHA NOPE"}})
	s := start(t, fast(srv.Addr()), newMemQueue())
	s.reaches(t, Held, ClassScripting)
}

// TestSenderWaitsWhileServerLoads: it asks again and again, on one connection.
func TestSenderWaitsWhileServerLoads(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{AOF: "always", Config: map[string]string{"rdbcompression": "no"}})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	var told []State
	o.OnChange = func(st State) { told = append(told, st) }
	s := start(t, o, q)
	s.delivered(t, q.add(1000, buffer.Events, false))
	// With a look at the clients four times in each key.
	if _, err := c.Pipelined(t.Context(), func(p redis.Pipeliner) error {
		for i := range 200 {
			p.Set(t.Context(), fmt.Sprintf("ballast-%d", i), strings.Repeat("x", 4096), 0)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// A base file in RDB form, which loads as slowly as we want.
	if err := c.BgRewriteAOF(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	await(t, text("the rewritten log"), func() bool {
		info := c.Info(t.Context(), "persistence").Val()
		return strings.Contains(info, "aof_rewrite_in_progress:0") && strings.Contains(info, "aof_rewrite_scheduled:0")
	})
	srv.Kill9()
	srv.SetConfig("key-load-delay", "100000") // microseconds, so that it loads until it is told not to wait
	srv.SetConfig("loading-process-events-interval-bytes", "1024")
	srv.Launch()
	last := q.add(10, buffer.Events, false)
	await(t, text("several attempts"), func() bool { return testutil.ToFloat64(s.m.errors[ClassLoading]) >= 3 })
	if err := c.ConfigSet(t.Context(), "key-load-delay", "0").Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, last)
	exactlyOnce(t, c, last)
	asked := testutil.ToFloat64(s.m.errors[ClassLoading])
	var made float64
	for line := range strings.Lines(c.Info(t.Context(), "stats").Val()) {
		if n, found := strings.CutPrefix(line, "total_connections_received:"); found {
			made, _ = strconv.ParseFloat(strings.TrimSpace(n), 64)
		}
	}
	if asked < 3 || made == 0 || made > 1+2 {
		t.Errorf("asked %v times while it loaded, on %v connections, of which at most two are the test's", asked, made)
	}
	s.stop(t)
	if !slices.ContainsFunc(told, func(st State) bool { return st.Phase == Retrying && st.Class == ClassLoading }) {
		t.Errorf("told %+v", told)
	}
}

// TestSenderAccountsForEverything mixes all accidents: a lossy network, a server
// that is emptied and killed, a queue that drops what is old. At the end every
// record is in the stream exactly once, or in a forfeited range, or the queue
// has dropped it undelivered.
func TestSenderAccountsForEverything(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := srv.Client()
	defer c.Close()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{
		DropReply: 0.10, Reset: 0.05, Stall: 0.01, StallFor: 1200 * time.Millisecond, Seed: seed,
	})
	q := newMemQueue()
	o := fast(proxy.Addr())
	o.Timeout = time.Second
	o.BatchRecords = 16
	s := start(t, o, q)
	dropped := make(map[uint64]bool) // by the queue, never delivered
	for range 40 {
		last := q.add(20+rng.IntN(100), buffer.Events, rng.IntN(2) == 0)
		switch rng.IntN(6) {
		case 0:
			if err := c.FlushAll(t.Context()).Err(); err != nil {
				t.Fatal(err)
			}
		case 1:
			srv.Kill9()
			srv.Restart()
		case 2: // the retained tail shrinks
			acked := q.Bounds().Acked
			q.drop(1, acked-min(acked, uint64(rng.IntN(200))))
		case 3: // overflow: the oldest go, delivered or not
			q.mu.Lock()
			upto := q.acked + min(30, q.last-q.acked)
			for seq := q.acked + 1; seq <= upto; seq++ {
				dropped[seq] = true
			}
			q.mu.Unlock()
			q.drop(1, upto)
		default:
			s.delivered(t, last-uint64(rng.IntN(20)))
		}
	}
	proxy.SetFaults(redistest.Faults{})
	s.delivered(t, q.add(1, buffer.Events, true))
	last := q.add(1, buffer.Events, true) // a rewind that is still due happens now
	s.delivered(t, last)

	seen := make(map[uint64]int)
	prev := uint64(0)
	for _, e := range fresh(entries(t, c, eventsKey)) { // a killed server may show one twice, see T3b
		seen[e.Seq]++
		if e.Seq <= prev {
			t.Errorf("seq %d after %d", e.Seq, prev)
		}
		prev = e.Seq
	}
	named := make(map[uint64]bool) // as often as the server went back; the buffer knows what that means
	for _, f := range q.forfeited() {
		for seq := f.first; seq <= f.last; seq++ {
			named[seq] = true
		}
	}
	var lost, twice []uint64
	for seq := uint64(1); seq <= last; seq++ {
		if seen[seq] == 0 && !named[seq] && !dropped[seq] {
			lost = append(lost, seq)
		}
		if seen[seq] > 1 {
			twice = append(twice, seq)
		}
	}
	if lost != nil || twice != nil {
		t.Errorf("of %d: lost %v, stored twice %v", last, lost, twice)
	}
	t.Logf("%d records, %d stored, %d forfeited, %d dropped undelivered, %v rewinds, faults %d/%d/%d", last, len(seen), len(named), len(dropped),
		testutil.ToFloat64(s.m.rewinds), proxy.Dropped.Load(), proxy.Resets.Load(), proxy.Stalls.Load())
}

func TestSenderReadsPasswordAtEachConnect(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{Password: "good", Config: map[string]string{"requirepass": "good"}})
	c := srv.Client()
	defer c.Close()
	o := fast(srv.Addr())
	o.PasswordFile = filepath.Join(t.TempDir(), "password")
	q := newMemQueue()
	last := q.add(5, buffer.Events, false)
	s := start(t, o, q)
	s.reaches(t, Held, ClassCredentials)
	write := func(p string) {
		if err := os.WriteFile(o.PasswordFile, []byte(p+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("wr0ng-secret")
	s.reaches(t, Held, ClassAuth)
	if st := fmt.Sprintf("%+v", s.State()); strings.Contains(st, "wr0ng-secret") {
		t.Errorf("the password shows in %s", st)
	}
	write("good")
	s.delivered(t, last)
	exactlyOnce(t, c, last)

	// Another password that is good is a rotation; the same again is none.
	for n, p := range []string{"good", "better", "better", "good"} {
		if err := c.ConfigSet(t.Context(), "requirepass", p).Err(); err != nil {
			t.Fatal(err)
		}
		write(p)
		if err := c.Do(t.Context(), "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes").Err(); err != nil {
			t.Fatal(err)
		}
		last = q.add(1, buffer.Events, false)
		s.delivered(t, last)
		if got, want := s.State().Rotations, uint64([]int{0, 1, 1, 2}[n]); got != want {
			t.Errorf("after password %d: %d rotations, want %d", n, got, want)
		}
	}
	exactlyOnce(t, c, last)
}

// TestACLFile proves that a server takes the ACL file that is shipped, that it is enough,
// and that nothing in it can be left out.
func TestACLFile(t *testing.T) {
	path, err := filepath.Abs("../packaging/redis/edr-sensor.acl")
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rules []string
	for line := range strings.Lines(string(file)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "user" {
			rules = f[2:]
		}
	}
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"aclfile": path}})
	c := srv.Client()
	defer c.Close()
	setUser := func(rules []string) {
		t.Helper()
		args := []any{"ACL", "SETUSER", "edr-sensor", "reset"}
		for _, r := range rules {
			args = append(args, r)
		}
		if err := c.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	o := fast(srv.Addr())
	o.Username = "edr-sensor"
	o.PasswordFile = filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(o.PasswordFile, []byte("CHANGE-ME"), 0o600); err != nil {
		t.Fatal(err)
	}
	q := newMemQueue() // with the user as the file has it
	q.add(5, buffer.Events, false)
	q.add(5, buffer.DecisionsSystem, false)
	q.add(5, buffer.DecisionsAgents, false)
	last := q.add(5, buffer.DecisionsApprovals, false)
	s := start(t, o, q)
	s.delivered(t, last)
	if st := s.State(); st.Phase != Connected {
		t.Errorf("state %+v", st)
	}
	s.stop(t)
	for _, r := range rules {
		optional := r == "+info" || r == "+xinfo|groups" || r == "+cluster|slots" || r == "+hello" // go-redis falls back to AUTH
		if !strings.HasPrefix(r, "+") && !strings.HasPrefix(r, "~") || optional {
			continue
		}
		var fewer []string
		for _, other := range rules {
			if other != r {
				fewer = append(fewer, other)
			}
		}
		setUser(fewer)
		c.FlushAll(t.Context())
		c.ScriptFlush(t.Context())
		q := newMemQueue()
		q.add(1, buffer.Events, false)
		q.add(1, buffer.DecisionsSystem, false)
		q.add(1, buffer.DecisionsAgents, false)
		q.add(1, buffer.DecisionsApprovals, false)
		s := start(t, o, q)
		s.reaches(t, Held, ClassPermission)
		s.stop(t)
	}
}

func TestSubtract(t *testing.T) {
	for _, tt := range []struct {
		a     span
		spans []span
		want  []span
	}{
		{span{1, 9}, nil, []span{{1, 9}}},
		{span{5, 4}, nil, nil},
		{span{1, 9}, []span{{1, 9}}, nil},
		{span{1, 9}, []span{{3, 4}}, []span{{1, 2}, {5, 9}}},
		{span{3, 9}, []span{{1, 3}, {9, 12}, {20, 30}}, []span{{4, 8}}},
		{span{1, 9}, []span{{1, 2}, {8, 9}, {5, 5}}, []span{{3, 4}, {6, 7}}},
	} {
		if d := cmp.Diff(tt.want, subtract(tt.a, tt.spans), cmp.AllowUnexported(span{})); d != "" {
			t.Errorf("%v minus %v (-want +got):\n%s", tt.a, tt.spans, d)
		}
	}
}

func TestBackoff(t *testing.T) {
	limit := func(b backoff, up time.Duration, slow bool) (top time.Duration) {
		for range 2000 {
			b := b
			top = max(top, b.next(up, slow, false))
		}
		return top
	}
	b := backoff{first: 500 * time.Millisecond, base: 250 * time.Millisecond, cap: 30 * time.Second, healthy: time.Minute}
	near := func(what string, got, want time.Duration) {
		t.Helper()
		if got > want || got < want*9/10 {
			t.Errorf("%s: longest wait %v, want just below %v", what, got, want)
		}
	}
	near("first dial", limit(b, 0, false), b.base)
	near("first reconnect", limit(b, time.Hour, false), b.first)
	for _, want := range []time.Duration{250, 250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000} {
		near(fmt.Sprintf("failure %d", b.failures), limit(b, 0, false), want*time.Millisecond)
		b.next(0, false, false)
	}
	near("slow class", limit(b, 0, true), 60*time.Second)
	near("a connect alone proves nothing", limit(b, 59*time.Second, false), b.cap)
	near("healthy traffic does", limit(b, time.Minute, false), b.first)

	for range (b.failures - 1) * forgiving {
		b.delivered()
	}
	near("batches do, but for the last failure", limit(b, time.Second, false), b.base)
	for range forgiving {
		b.delivered()
	}
	near("batches do", limit(b, time.Second, false), b.first)
	for range 100 { // a server that flaps
		b.next(time.Second, false, false)
		b.delivered()
	}
	near("a batch for each failure does not", limit(b, time.Second, false), b.cap)

	longest, failures := time.Duration(0), b.failures
	b.last = time.Now().Add(time.Hour) // just now, however long this takes
	for range 2000 {
		longest = max(longest, b.next(0, false, true))
	}
	near("attempts that are reset just after a batch", longest, b.first)
	b.last = time.Now().Add(-grace)
	b.next(0, false, true)
	if b.failures != failures+1 {
		t.Errorf("%d failures, want %d and one that was reset long after a batch", b.failures, failures)
	}
}

// TestSenderKnowsLastWords: what a server answered to something earlier is not why a
// connection breaks later.
func TestSenderKnowsLastWords(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	var classes []Class
	o := fast(srv.Addr())
	o.OnChange = func(st State) { classes = append(classes, st.Class) }
	s := start(t, o, q)
	s.reaches(t, Connected, ClassNone) // and has asked for the groups of streams that are not there
	if err := c.ClientKillByFilter(t.Context(), "TYPE", "normal").Err(); err != nil {
		t.Fatal(err)
	}
	s.delivered(t, q.add(1, buffer.Events, false))
	s.stop(t)
	if d := cmp.Diff([]Class{ClassNone, ClassNetwork, ClassNone}, classes); d != "" {
		t.Errorf("classes (-want +got):\n%s", d)
	}
}
