// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf/ocsftest"
)

// TestServiceStorm lets a storm of execs, connections and files loose on the installed service
// while Redis is down and up in turns, and longer down than the buffer holds. The memory of the
// unit's control group stays below its limit, nobody is killed, nothing restarts, and each
// event is delivered or named. EDR_LONG=1 has it last 20 minutes, with a buffer of the
// size that is shipped.
func TestServiceStorm(t *testing.T) {
	// Not compressed, so that what comes while Redis is down has no room in the buffer.
	storm, up, down, buffer := 70*time.Second, 10*time.Second, 20*time.Second, "buffer: {cap: 32MiB, compression: none}\n"
	if os.Getenv("EDR_LONG") != "" {
		storm, up, down, buffer = 20*time.Minute, time.Minute, 3*time.Minute, "buffer: {compression: none}\n"
	}
	m, debs := startService(t, buffer+`
sensor: {scope: "cgroup:/storm.slice"}
transport: {address: "127.0.0.1:6379"}
`)
	// First, so that there is the group that the scope names.
	server, client := m.startWorkload("server", "storm.slice"), m.startWorkload("client", "storm.slice")
	shells, files := m.startWorkload("shells", "storm.slice"), m.startWorkload("files", "storm.slice")
	addr := server.do(order{Op: "listen"}).Addr
	m.run("mkdir", "/srv/storm")
	m.install(debs[firstVersion])
	m.online("")
	m.delivered(time.Minute)
	c := startConsumer(t, m)
	usage := newUsage(m)

	// Four times a second or, for five of each twenty seconds, as fast as it goes.
	start, made := time.Now(), map[string]int{}
	var over atomic.Bool
	var mu sync.Mutex
	var wg sync.WaitGroup
	blow := func(kind string, n int, do func(from, n int)) {
		wg.Go(func() {
			for total := 0; !over.Load(); total += n {
				began := time.Now()
				do(total, n)
				mu.Lock()
				made[kind] += n
				mu.Unlock()
				if time.Since(start)%(20*time.Second) > 5*time.Second {
					<-time.After(time.Until(began.Add(250 * time.Millisecond)))
				}
			}
		})
	}
	blow("process.exec", 50, func(from, n int) { shells.do(order{Op: "exec", From: 1 + from, N: n}) })
	blow("net.connect", 50, func(from, n int) { client.do(order{Op: "connect", Addr: addr, From: from % 1000, N: n}) })
	blow("file.create", 100, func(_, n int) {
		files.do(order{Op: "create", Dir: "/srv/storm", N: n})
		m.run("sh", "-c", "rm -f /srv/storm/*") // by somebody who is not watched
	})
	outages, overflowed := 0, false
	for on := true; time.Since(start) < storm; on = !on {
		until := time.Now().Add(min(map[bool]time.Duration{true: up, false: down}[on], time.Until(start.Add(storm))))
		if !on {
			m.run("systemctl", "stop", "redis-server")
			outages++
		}
		// A slow storm takes longer to fill the buffer, which is what the outage is for.
		for time.Now().Before(until) || !on && !overflowed && time.Since(until) < 3*time.Minute {
			<-time.After(time.Second)
			usage.look()
			if !on && !overflowed {
				s, err := m.status()
				overflowed = err == nil && s.Buffer.Truncated > 0
			}
		}
		if !on {
			m.run("systemctl", "start", "redis-server")
		}
		t.Logf("%4.0f s, Redis was %s: %s", time.Since(start).Seconds(), map[bool]string{true: "up", false: "down"}[on], usage.String())
	}
	over.Store(true)
	wg.Wait()
	s := m.delivered(5 * time.Minute)
	usage.look()
	c.end()
	if pid := m.unit("MainPID"); m.unit("NRestarts") != "0" || pid != usage.pid {
		t.Errorf("the service was restarted: process %s, was %s", pid, usage.pid)
	}
	usage.check()
	later, err := m.status()
	if err != nil {
		t.Fatal(err)
	}
	c.check(s, later.Sensor.Events, made)
	t.Logf("made %v; %d records of %d received, %d named lost, by kind %v; %d in the ring had no room; left out %v; %d outages",
		made, c.records, s.Buffer.Last, s.Buffer.Truncated, c.kinds, sum(s.Sensor.Lost), s.Sensor.Suppressed, outages)
	t.Logf("the whole storm: %s", usage.String())
}

func sum(by map[string]uint64) (n uint64) {
	for v := range maps.Values(by) {
		n += v
	}
	return n
}

// consumer reads the streams as one would, and trims what it has read.
type consumer struct {
	t       *testing.T
	m       *machine
	client  *redis.Client
	stop    chan struct{}
	done    chan struct{}
	from    map[string]string
	valid   func([]byte) error
	records int
	kinds   map[string]uint64 // records by event code
	epochs  map[string]bool
	seen    []uint64 // a bit for each seq
	named   []uint64
	ring    map[string]uint64 // named lost by kind
	errs    []string
}

func startConsumer(t *testing.T, m *machine) *consumer {
	c := &consumer{
		t: t, m: m, client: m.redis(), stop: make(chan struct{}), done: make(chan struct{}), valid: ocsftest.Validator(t),
		from: map[string]string{}, kinds: map[string]uint64{}, epochs: map[string]bool{}, ring: map[string]uint64{},
	}
	go func() {
		defer close(c.done)
		ended := false
		for {
			n, all := 0, true // that an answer failed is not that there is nothing
			for _, key := range []string{eventsKey, decisionsKey, agentsKey, approvalsKey} {
				got, ok := c.read(key)
				n, all = n+got, all && ok
			}
			if n > 0 {
				continue
			}
			if ended && all {
				return
			}
			select {
			case <-c.stop:
				ended = true // and once more: what came before that is there
			case <-c.t.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return c
}

func (c *consumer) end() {
	close(c.stop)
	<-c.done
}

// read takes what has come, and tells whether the server has answered. It is not asked while
// it is down, which the client would log.
func (c *consumer) read(key string) (n int, ok bool) {
	if _, err := os.Stat(c.m.path(redisSocket)); err != nil {
		return 0, false
	}
	from := "-"
	if last := c.from[key]; last != "" {
		from = "(" + last
	}
	entries, err := c.client.XRangeN(c.t.Context(), key, from, "+", 1000).Result()
	if err != nil || len(entries) == 0 {
		return 0, err == nil
	}
	for _, e := range entries {
		c.take(e)
	}
	last := entries[len(entries)-1].ID
	c.from[key] = last
	if key == eventsKey {
		_ = c.client.XTrimMinID(c.t.Context(), key, last).Err() // the next one does it
	}
	return len(entries), true
}

func (c *consumer) take(e redis.XMessage) {
	str := func(k string) string { s, _ := e.Values[k].(string); return s }
	seq, err := strconv.ParseUint(str("seq"), 10, 64)
	data := str("data")
	if err != nil {
		c.errs = append(c.errs, "seq of "+data)
		return
	}
	c.epochs[str("epoch")] = true
	c.records++
	if !set(&c.seen, seq) {
		c.errs = append(c.errs, fmt.Sprintf("seq %d is there again", seq))
	}
	_, rest, _ := strings.Cut(data, `"event_code":"`)
	kind, _, _ := strings.Cut(rest, `"`)
	c.kinds[kind]++
	if c.records%1000 == 0 || strings.HasPrefix(kind, "sensor.") {
		if err := c.valid([]byte(data)); err != nil {
			c.errs = append(c.errs, fmt.Sprintf("seq %d is not valid OCSF: %v", seq, err))
		}
	}
	if !strings.HasPrefix(kind, "sensor.") {
		return
	}
	var ev ocsfEvent
	if err := json.Unmarshal([]byte(data), &ev); err != nil {
		c.errs = append(c.errs, err.Error())
	}
	for _, l := range ev.Unmapped.Lost.Ranges {
		for s := l.First; s != 0 && s <= l.Last; s++ {
			set(&c.named, s)
		}
	}
	if ev.StatusCode == "RINGBUF_FULL" {
		for kind, n := range ev.Unmapped.Lost.ByType {
			c.ring[kind] += n
		}
	}
}

// set sets a bit and tells whether it was not.
func set(bits *[]uint64, n uint64) bool {
	for uint64(len(*bits)) <= n/64 {
		*bits = append(*bits, 0)
	}
	fresh := (*bits)[n/64]&(1<<(n%64)) == 0
	(*bits)[n/64] |= 1 << (n % 64)
	return fresh
}

func isSet(bits []uint64, n uint64) bool {
	return n/64 < uint64(len(bits)) && bits[n/64]&(1<<(n%64)) != 0
}

// check wants everything accounted for: what was made was seen, what was seen became a
// record, had no room in a ring, or was left out, and each record came or is named lost. s is
// of when all that was made had been delivered, later of when the last record had been read:
// what others do to files of the sensor may have come in between.
func (c *consumer) check(s agent.Status, later map[string]uint64, made map[string]int) {
	c.t.Helper()
	if len(c.errs) > 0 {
		c.t.Errorf("%d errors, the first: %s", len(c.errs), c.errs[0])
	}
	if left, err := c.client.XLen(c.t.Context(), eventsKey).Result(); err != nil || left > 1 {
		c.t.Fatalf("%d entries of the stream were not read: %v", left, err)
	}
	if len(c.epochs) != 1 {
		c.t.Errorf("epochs %v, want one", slices.Collect(maps.Keys(c.epochs)))
	}
	var silent, wrong, named uint64
	for seq := uint64(1); seq <= s.Buffer.Last; seq++ {
		switch seen, lost := isSet(c.seen, seq), isSet(c.named, seq); {
		case seen && lost:
			wrong++
		case lost:
			named++
		case !seen:
			silent++
		}
	}
	if silent+wrong != 0 {
		c.t.Errorf("of %d records %d are missing and not named, %d are there and named lost", s.Buffer.Last, silent, wrong)
	}
	if named != s.Buffer.Truncated || named == 0 {
		c.t.Errorf("%d records are named lost, the sensor counted %d, want as many, and some", named, s.Buffer.Truncated)
	}
	missing := uint64(0) // records of kinds that the storm makes
	for kind, n := range s.Sensor.Events {
		if kind == "process.fork" {
			continue // not reported
		}
		if want := uint64(made[kind]); want > 0 && n+s.Sensor.Suppressed[kind] != want {
			c.t.Errorf("%s: %d were made, the programs saw %d and left out %d", kind, want, n, s.Sensor.Suppressed[kind])
		}
		got := c.kinds[kind] + s.Sensor.Lost[kind]
		if got > later[kind] {
			c.t.Errorf("%s: %d seen, but %d received and %d had no room", kind, later[kind], c.kinds[kind], s.Sensor.Lost[kind])
		}
		missing += n - min(got, n)
	}
	// Decisions are records, too, and the oldest of them go with the others.
	if missing > named || named-missing > 1000 {
		c.t.Errorf("%d events are missing, but %d records are named lost", missing, named)
	}
	for kind, n := range s.Sensor.Lost {
		if c.ring[kind] > n {
			c.t.Errorf("%s: loss records name %d without room, the kernel counted %d", kind, c.ring[kind], n)
		}
	}
}

// usage is what the service takes, as its control group and its process say.
type usage struct {
	m                        *machine
	dir                      string
	v1                       bool
	pid                      string // as the machine numbers it
	host                     int    // as this host does
	began                    time.Time
	cpu                      time.Duration
	limit, peak, full        int64
	current, anon, file, rss int64
	anonMost, fileMost       int64
	rssMost, kept            int64 // kept: the most that could not be given back
	oom                      int64
}

func newUsage(m *machine) *usage {
	m.t.Helper()
	u := &usage{m: m, dir: m.group["memory"], v1: true, pid: m.unit("MainPID"), began: time.Now()}
	if u.dir == "" {
		u.dir, u.v1 = m.group[""], false
	}
	u.dir = filepath.Join(u.dir, "system.slice", "edr-sensor.service")
	procs, err := os.ReadFile(filepath.Join(u.dir, "cgroup.procs"))
	if err != nil {
		m.t.Fatal(err)
	}
	if u.host, err = strconv.Atoi(strings.TrimSpace(string(procs))); err != nil {
		m.t.Fatal(err)
	}
	u.cpu = cpuTime(m.t, u.host)
	u.look()
	if want := m.unit("MemoryMax"); strconv.FormatInt(u.limit, 10) != want {
		m.t.Fatalf("the limit of the control group is %d, the unit says %s", u.limit, want)
	}
	return u
}

func (u *usage) number(name string) int64 {
	u.m.t.Helper()
	b, err := os.ReadFile(filepath.Join(u.dir, name))
	if err != nil {
		u.m.t.Fatal(err)
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		u.m.t.Fatal(err)
	}
	return n
}

func (u *usage) table(name string) map[string]int64 {
	u.m.t.Helper()
	b, err := os.ReadFile(filepath.Join(u.dir, name))
	if err != nil {
		u.m.t.Fatal(err)
	}
	all := map[string]int64{}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		all[key], _ = strconv.ParseInt(value, 10, 64)
	}
	return all
}

func (u *usage) look() {
	u.m.t.Helper()
	stat := u.table("memory.stat")
	if u.v1 {
		u.limit, u.peak, u.current = u.number("memory.limit_in_bytes"), u.number("memory.max_usage_in_bytes"), u.number("memory.usage_in_bytes")
		u.full, u.oom = u.number("memory.failcnt"), u.table("memory.oom_control")["oom_kill"]
		u.anon, u.file = stat["total_rss"], stat["total_cache"]
	} else {
		events := u.table("memory.events")
		u.limit, u.peak, u.current = u.number("memory.max"), u.number("memory.peak"), u.number("memory.current")
		u.full, u.oom = events["max"], events["oom_kill"]
		u.anon, u.file = stat["anon"], stat["file"]
	}
	rss, _ := memory(u.m.t, u.host)
	u.rss = int64(rss * (1 << 20))
	u.anonMost, u.fileMost = max(u.anonMost, u.anon), max(u.fileMost, u.file)
	u.rssMost, u.kept = max(u.rssMost, u.rss), max(u.kept, u.current-u.file)
}

func (u *usage) String() string {
	mib := func(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }
	return fmt.Sprintf("memory %s of %s MiB, at most %s, of it at most %s without the page cache; anonymous %s (%s), page cache %s (%s), resident %s (%s); limit met %d times; CPU %.1f %% of one",
		mib(u.current), mib(u.limit), mib(u.peak), mib(u.kept), mib(u.anon), mib(u.anonMost), mib(u.file), mib(u.fileMost), mib(u.rss), mib(u.rssMost), u.full,
		100*(cpuTime(u.m.t, u.host)-u.cpu).Seconds()/time.Since(u.began).Seconds())
}

func (u *usage) check() {
	u.m.t.Helper()
	if u.oom != 0 {
		u.m.t.Errorf("%d processes were killed for want of memory", u.oom)
	}
	if u.peak >= u.limit || u.full != 0 {
		u.m.t.Errorf("the control group has met its limit %d times: %s", u.full, u)
	}
	if u.kept > u.limit/4 {
		u.m.t.Errorf("more than a quarter of the limit cannot be given back: %s", u)
	}
}
