// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/debian"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestAckReplica: what no replica has is delivered and not acknowledged, and is
// acknowledged without being sent again once one has it.
func TestAckReplica(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"repl-diskless-sync-delay": "0"}})
	_, port, _ := net.SplitHostPort(master.Addr())
	replica := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"replicaof": "127.0.0.1 " + port}})
	c := master.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(master.Addr())
	o.Ack = AckReplica
	s := start(t, o, q)
	s.delivered(t, q.add(100, buffer.Events, false))

	replica.Stall()
	last := q.add(600, buffer.Events, false)
	await(t, text("the master to have all"), func() bool { return c.XLen(t.Context(), eventsKey).Val() == int64(last) })
	if st := s.State(); st.Phase != Connected || st.Acked != 100 {
		t.Errorf("with the replica stopped: %+v", st)
	}
	s.stop(t)
	if got := q.Bounds().Acked; got != 100 {
		t.Errorf("acknowledged %d", got)
	}
	s = start(t, o, q) // another connection confirms what this one's predecessor wrote
	await(t, text("a connection"), func() bool { return s.State().Phase == Connected })
	replica.Resume()
	s.delivered(t, last)
	exactlyOnce(t, c, last)
	if n := testutil.ToFloat64(s.m.batches[ok]); n != 0 {
		t.Errorf("%v batches sent again", n)
	}
}

// TestAckFsyncNeedsTheServer: a server that cannot confirm is named, and used as
// soon as it can.
func TestAckFsyncNeedsTheServer(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{TCP: true})
	o := fast(srv.Addr())
	o.Ack = AckFsync
	q := newMemQueue()
	last := q.add(10, buffer.Events, false)
	s := start(t, o, q)
	s.reaches(t, Held, ClassDurability) // 7.0 does not know the command, later ones lack the file
	if st := s.State(); st.Acked != 0 {
		t.Errorf("acknowledged %d", st.Acked)
	}
	s.stop(t)

	// A server whose disk the test is.
	disk := &fakeDisk{upstream: srv.Addr()}
	o.Addr = disk.start(t)
	s = start(t, o, q)
	c := srv.Client()
	defer c.Close()
	await(t, text("the server to have all"), func() bool { return c.XLen(t.Context(), eventsKey).Val() == int64(last) })
	await(t, text("unanswered waits"), func() bool { return disk.asked.Load() > 2 })
	if got := q.Bounds().Acked; got != 0 {
		t.Errorf("acknowledged %d before the disk had it", got)
	}
	disk.synced.Store(true)
	s.delivered(t, last)
	exactlyOnce(t, c, last)
	if got := c.HGet(t.Context(), "edr:{s000}:beats", testAgent).Val(); got != fmt.Sprint(last) {
		t.Errorf("heartbeat %q", got)
	}
	if n := disk.connections(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// TestAckFsyncDrain: a stop is confirmed as what came before it, on the connections of Run.
func TestAckFsyncDrain(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{TCP: true})
	disk := &fakeDisk{upstream: srv.Addr()}
	disk.synced.Store(true)
	o := fast(disk.start(t))
	o.Ack = AckFsync
	q := newMemQueue()
	s := start(t, o, q)
	s.delivered(t, q.add(10, buffer.Events, false))
	s.cancel()
	s.cancel = nil
	if err := <-s.done; err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	last := q.add(1, buffer.Events, false)
	ctx, cancel := context.WithTimeout(quiet(t), time.Minute)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		t.Error(err)
	}
	if got := q.Bounds().Acked; got != last {
		t.Errorf("acknowledged %d of %d", got, last)
	}
	if n := disk.connections(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// TestAckFsync runs against the servers that can say what is on their disk. What is not
// there is delivered and not acknowledged; what was acknowledged, and so forgotten by the
// queue, outlives a kill.
func TestAckFsync(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches servers from Debian's mirrors")
	}
	t.Parallel()
	cache, err := debian.UserCache(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range []string{"redis-server", "valkey-server"} {
		t.Run(pkg, func(t *testing.T) {
			path, release, err := cache.Program(t.Context(), "trixie", pkg)
			if err != nil {
				if os.Getenv("EDR_REQUIRE_ALL") == "1" {
					t.Fatal(err)
				}
				t.Skipf("needs a mirror of Debian: %v", err)
			}
			t.Cleanup(release)
			t.Run("rewind", func(t *testing.T) { syncAcrossRewind(t, path) })
			encodings(t, func(t *testing.T, e Encoding) {
				srv := redistest.Start(t, redistest.Options{TCP: true, AOF: "everysec", Program: path})
				c := srv.Client()
				defer c.Close()
				o := fast(srv.Addr())
				o.Ack, o.Encoding = AckFsync, e
				q := newMemQueue()
				s := start(t, o, q)
				s.eventually(t, q.add(1000, buffer.Events, false))

				// Control: a server that takes all and syncs nothing.
				set := func(policy string) {
					t.Helper()
					if err := c.ConfigSet(t.Context(), "appendfsync", policy).Err(); err != nil {
						t.Fatal(err)
					}
				}
				waits := func() int { return calls(t, c, "waitaof") }
				set("no")
				before := waits()
				last := q.add(1000, buffer.Events, false)
				await(t, text("the server to have all"), func() bool { return len(entries(t, c, eventsKey)) == int(last) })
				await(t, text("unconfirmed waits"), func() bool { return waits() >= before+2 })
				if st := s.State(); st.Phase != Connected || st.Acked != 1000 || q.Bounds().Acked != 1000 {
					t.Errorf("acknowledged what is not on disk: %+v", st)
				}
				set("everysec")
				s.eventually(t, last)
				if n := testutil.ToFloat64(s.m.delivered[buffer.Events]); n != float64(last) {
					t.Errorf("%v records delivered, want %d: none twice", n, last)
				}

				q.drop(1, q.Bounds().Acked) // nothing can be sent again
				srv.Kill9()
				srv.Restart()
				last = q.add(10, buffer.Events, false)
				s.eventually(t, last)
				exactlyOnce(t, c, last)
				if got := q.forfeited(); got != nil {
					t.Errorf("forfeited %v", got)
				}
			})
		})
	}
}

// syncAcrossRewind has the server go back while a heartbeat that was written before is on
// its way to the disk: what is sent again is not there with it.
func syncAcrossRewind(t *testing.T, program string) {
	srv := redistest.Start(t, redistest.Options{TCP: true, AOF: "everysec", Program: program, Config: map[string]string{"appendfsync": "no"}})
	c := srv.Client()
	defer c.Close()
	o := fast(srv.Addr())
	o.setDefaults()
	conn, err := dial(t.Context(), &o, srv.Addr(), login{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.close()
	y := &syncer{conn: conn}
	y.reach(100)
	done := make(chan error, 1)
	sync := func() { done <- y.sync(t.Context(), "beats", "a") }
	go sync()
	await(t, text("the wait for the disk"), func() bool {
		select {
		case err := <-done: // it gave up waiting, and nobody had looked meanwhile
			if err != nil {
				t.Fatal(err)
			}
			go sync()
		default:
		}
		return parseInfo(c.Info(t.Context(), "clients").Val())["blocked_clients"] == "1"
	})
	y.rewind(0)
	y.reach(95)
	if err := c.ConfigSet(t.Context(), "appendfsync", "always").Err(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint64{0, 95} {
		if i > 0 {
			go sync()
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := y.reach(95); got != want {
			t.Errorf("sync %d: on disk up to %d, want %d", i+1, got, want)
		}
	}
}

// calls is how often a server has run a command since it was started.
func calls(t *testing.T, c *redis.Client, cmd string) (n int) {
	t.Helper()
	for key, value := range parseInfo(c.Info(t.Context(), "commandstats").Val()) {
		if key == "cmdstat_"+cmd {
			if _, err := fmt.Sscanf(value, "calls=%d", &n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}

// TestRiskReplica: with ack: replica, a replica that stays away is named while the master
// takes everything, and a master that may not write without one refuses.
func TestRiskReplica(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}})
	_, port, _ := net.SplitHostPort(master.Addr())
	replica := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"replicaof": "127.0.0.1 " + port}})
	c := master.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(master.Addr())
	o.Ack, o.ProbeInterval = AckReplica, 20*time.Millisecond
	// A replica that takes long for its copy is a risk, too.
	await(t, text("the replica"), func() bool { return strings.Contains(c.Info(t.Context(), "replication").Val(), "state=online") })
	s := start(t, o, q)
	s.delivered(t, q.add(10, buffer.Events, false))
	risk := func() bool {
		return slices.ContainsFunc(s.State().Risks, func(r Risk) bool { return r.Kind == RiskReplica && strings.Contains(r.Text, "ack: reply") })
	}
	if risk() {
		t.Errorf("at risk with a replica that confirms: %+v", s.State())
	}
	replica.Stall()
	last := q.add(10, buffer.Events, false)
	awaitLong(t, lazy(func() string { return fmt.Sprintf("the risk, state %+v", s.State()) }), func() bool {
		return risk() && testutil.ToFloat64(s.m.risks[RiskReplica]) == 1
	})
	if st := s.State(); st.Phase != Connected || st.Acked != 10 || c.XLen(t.Context(), eventsKey).Val() != int64(last) {
		t.Errorf("state %+v", st)
	}
	replica.Resume()
	s.delivered(t, last)
	await(t, text("the end of the risk"), func() bool { return !risk() && testutil.ToFloat64(s.m.risks[RiskReplica]) == 0 })

	for key, value := range map[string]string{"min-replicas-to-write": "1", "min-replicas-max-lag": "2"} {
		if err := c.ConfigSet(t.Context(), key, value).Err(); err != nil {
			t.Fatal(err)
		}
	}
	last = q.add(10, buffer.Events, false)
	s.delivered(t, last) // there is one
	replica.Stall()
	awaitLong(t, text("the master to miss its replica"), func() bool {
		return strings.Contains(c.Info(t.Context(), "replication").Val(), "min_slaves_good_slaves:0")
	})
	last = q.add(10, buffer.Events, false)
	s.reaches(t, Retrying, ClassReplicas)
	replica.Resume()
	s.eventually(t, last)
	exactlyOnce(t, c, last)
}

// fakeDisk passes connections on and answers WAITAOF itself.
type fakeDisk struct {
	upstream string
	synced   atomic.Bool
	asked    atomic.Int64

	mu   sync.Mutex
	open map[net.Conn]chan struct{} // closed when the server's side is
}

func (d *fakeDisk) start(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.open = make(map[net.Conn]chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			d.forget()
			done := make(chan struct{})
			d.mu.Lock()
			d.open[client] = done
			d.mu.Unlock()
			wg.Go(func() { d.serve(client, done) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		d.mu.Lock()
		for c := range d.open {
			c.Close()
		}
		d.mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String()
}

func (d *fakeDisk) connections() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)
}

// forget waits until the server's side is closed of each connection that the client has
// closed: the server would have it beside the one that follows it.
func (d *fakeDisk) forget() {
	var going []chan struct{}
	d.mu.Lock()
	for c, done := range d.open {
		if left(c) {
			going = append(going, done)
		}
	}
	d.mu.Unlock()
	for _, done := range going {
		<-done
	}
}

// left reports whether the other side has closed, whether or not that was read.
func left(c net.Conn) bool {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return true
	}
	const established = 1 // TCP_ESTABLISHED
	var info *unix.TCPInfo
	return raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }) != nil ||
		err != nil || info.State != established
}

func (d *fakeDisk) serve(client net.Conn, done chan struct{}) {
	var passing sync.WaitGroup
	defer func() {
		client.Close()
		passing.Wait()
		d.mu.Lock()
		delete(d.open, client)
		d.mu.Unlock()
		close(done)
	}()
	server, err := net.Dial("tcp", d.upstream)
	if err != nil {
		return
	}
	defer server.Close()
	passing.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			if err != nil {
				client.Close()
				return
			}
			if _, err := client.Write(buf[:n]); err != nil {
				return
			}
		}
	})
	buf := make([]byte, 256<<10)
	for {
		n, err := client.Read(buf)
		if err != nil {
			return
		}
		if bytes.Contains(bytes.ToLower(buf[:n]), []byte("waitaof")) {
			d.asked.Add(1)
			local := 0
			if d.synced.Load() {
				local = 1
			}
			fmt.Fprintf(client, "*2\r\n:%d\r\n:0\r\n", local)
			continue
		}
		if _, err := server.Write(buf[:n]); err != nil {
			return
		}
	}
}

// TestRisks makes each of what a server can be warned of, and takes it away.
func TestRisks(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{Password: "good", Config: map[string]string{"requirepass": "good"}})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.ProbeInterval = 20 * time.Millisecond
	o.DecisionsLimit = 100
	o.PasswordFile = writePassword(t, "", "good")
	reg := prometheus.NewPedanticRegistry()
	o.Registerer = reg
	changes := make(chan State, 256)
	o.OnChange = func(st State) { changes <- st }
	s := start(t, o, q)
	s.delivered(t, q.add(90, buffer.DecisionsSystem, false))
	calm := metricstest.Gather(t, reg)
	set := func(key, value string) {
		t.Helper()
		if err := c.ConfigSet(t.Context(), key, value).Err(); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		kind         RiskKind
		says         string
		spoil, clear func()
	}{
		{RiskMemory, "% of maxmemory; group", func() {
			used := parseInfo(c.Info(t.Context(), "memory").Val()).number("used_memory")
			set("maxmemory", fmt.Sprintf("%.0f", used*1.15))
		}, func() { set("maxmemory", "0") }},
		{RiskUnread, `group "siem" has 90 entries of decisions:system unread, which keeps about 100`, func() {}, func() {
			c.XGroupSetID(t.Context(), "decisions:system", "siem", "$")
		}},
		{RiskPassword, "refuses the password", func() { writePassword(t, o.PasswordFile, "wr0ng-secret") }, func() { writePassword(t, o.PasswordFile, "good") }},
	} {
		if tt.kind == RiskMemory { // so that the warning can name who is behind
			if err := c.XGroupCreate(t.Context(), "decisions:system", "siem", "0").Err(); err != nil {
				t.Fatal(err)
			}
		}
		risk := func() string {
			for _, r := range s.State().Risks {
				if r.Kind == tt.kind {
					return r.Text
				}
			}
			return ""
		}
		tt.spoil()
		await(t, lazy(func() string { return fmt.Sprintf("%s, state %+v", tt.kind, s.State()) }), func() bool { return strings.Contains(risk(), tt.says) })
		metricstest.Moved(t, calm, metricstest.Gather(t, reg), "transport_risk")
		tt.clear()
		await(t, text("the end of "+string(tt.kind)), func() bool { return risk() == "" && testutil.ToFloat64(s.m.risks[tt.kind]) == 0 })
	}
	metricstest.Moved(t, calm, metricstest.Gather(t, reg), "transport_redis_memory_ratio")
	if err := c.XGroupSetID(t.Context(), "decisions:system", "siem", "0").Err(); err != nil {
		t.Fatal(err)
	}
	await(t, text("unread entries"), func() bool { return testutil.ToFloat64(s.m.unread[buffer.DecisionsSystem]) > 0 })
	metricstest.Moved(t, calm, metricstest.Gather(t, reg), "transport_unread_entries")

	// A good password is taken up on the connection that is there.
	dials := s.State().Since
	set("requirepass", "better")
	writePassword(t, o.PasswordFile, "better")
	await(t, text("the rotation"), func() bool { return s.State().Rotations == 1 })
	if st := s.State(); st.Phase != Connected || !st.Since.Equal(dials) {
		t.Errorf("connected anew for a password: %+v", st)
	}
	s.stop(t)
	close(changes)
	for st := range changes {
		if strings.Contains(fmt.Sprintf("%+v", st), "wr0ng-secret") {
			t.Errorf("the password shows in %+v", st)
		}
	}
}

// TestTrim: the events stream keeps about what it may, by count and by the server's
// clock; the control keeps all.
func TestTrim(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		edit func(*Options)
		most int64
	}{
		"none":   {func(*Options) {}, 2002},
		"maxlen": {func(o *Options) { o.TrimLength = 300 }, 500},
		"minid":  {func(o *Options) { o.TrimAge = 50 * time.Millisecond }, 500},
	} {
		t.Run(name, func(t *testing.T) {
			srv := redistest.Start(t, redistest.Options{})
			c := srv.Client()
			defer c.Close()
			q := newMemQueue()
			o := fast(srv.Addr())
			tt.edit(&o)
			s := start(t, o, q)
			s.delivered(t, q.add(2000, buffer.Events, false))
			begun, err := c.Time(t.Context()).Result()
			if err != nil {
				t.Fatal(err)
			}
			await(t, text("what is delivered to age"), func() bool { return c.Time(t.Context()).Val().Sub(begun) > 100*time.Millisecond })
			s.delivered(t, q.add(2, buffer.Events, false))
			n := c.XLen(t.Context(), eventsKey).Val()
			if n > tt.most || n < 2 || name == "none" && n != tt.most {
				t.Errorf("keeps %d entries", n)
			}
			if name == "maxlen" && n < 300 {
				t.Errorf("keeps %d entries, fewer than it may", n)
			}
		})
	}
}
