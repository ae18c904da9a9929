// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/transport"
)

// cell is one row of the table.
type cell struct {
	sensors  int
	encoding transport.Encoding
	linger   time.Duration
	tls      bool
}

// setup is what all cells share.
type setup struct {
	events  [][]byte
	rate    float64       // events per second and sensor
	spread  time.Duration // transport.reconnect_spread
	measure time.Duration
	servers int
	given   []string // addresses of servers that are there
	dir     string
}

// result is what was measured of a cell. What was not is NaN.
type result struct {
	cell
	offered, delivered float64 // events per second
	wire, memory       float64 // bytes per event
	perEvent, perCall  float64 // of the servers' CPU, seconds
	perConnection      float64 // bytes of the server
	perSensor          float64 // bytes of this process
	connections        float64 // most per sensor
	p50, p99           float64 // seconds from the event to the reply
	dials              float64 // per sensor, after the restart
	back               [3]float64
}

// fleet is the sensors of a cell and their servers.
type fleet struct {
	cell
	*setup
	load    *load
	servers []*server
	sources []*source
	stop    func()
}

// run measures one cell.
func (s *setup) run(ctx context.Context, c cell) (r result, err error) {
	f := &fleet{cell: c, setup: s, stop: func() {}, load: &load{
		events: s.events, every: time.Duration(float64(time.Second) / s.rate), commit: 50 * time.Millisecond, begin: make(chan struct{}),
	}}
	defer func() {
		f.stop()
		err = errors.Join(err, f.close())
	}()
	if err := f.open(ctx); err != nil {
		return r, err
	}
	empty := f.heap()
	before, err := sum(ctx, f.servers)
	if err != nil {
		return r, err
	}
	if err := f.join(ctx, before["connected_clients"]); err != nil {
		return r, err
	}
	r = result{cell: c, offered: float64(c.sensors) * s.rate, dials: math.NaN(), back: [3]float64{math.NaN(), math.NaN(), math.NaN()}}
	if err := f.deliver(ctx, &r); err != nil {
		return r, err
	}
	r.perSensor = (f.heap() - empty) / float64(c.sensors)
	if f.given == nil {
		err = f.storm(ctx, &r)
	}
	for _, src := range f.sources {
		if src.gone.Load() {
			err = errors.Join(err, errors.New("a sensor gave up events that it has"))
		}
	}
	return r, err
}

// open starts the servers, or takes those that are given.
func (f *fleet) open(ctx context.Context) error {
	for _, addr := range f.given {
		f.servers = append(f.servers, &server{plain: addr})
	}
	for range f.setup.servers {
		if f.given != nil {
			break
		}
		dir, err := os.MkdirTemp(f.dir, "fleet")
		if err != nil {
			return err
		}
		s, err := startServer(ctx, dir, 2*f.sensors, ecdsaKey)
		if err != nil {
			return errors.Join(err, os.RemoveAll(dir))
		}
		f.servers = append(f.servers, s)
	}
	return nil
}

func (f *fleet) close() (err error) {
	for _, s := range f.servers {
		if s.args != nil {
			s.kill()
			err = errors.Join(err, os.RemoveAll(s.dir))
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // also after an end by a signal
		defer cancel()
		_, gone := s.command(ctx, "UNLINK", streamKey, cursorKey)
		err = errors.Join(err, gone)
	}
	return err
}

// options are those of the sensor's configuration, but that the stream is trimmed: what
// consumers do to a real one.
func (f *fleet) options(i int) transport.Options {
	s := f.servers[i%len(f.servers)]
	o := transport.Options{
		Addr: s.plain, AgentID: fmt.Sprintf("agent-%05d", i), Encoding: f.encoding, Linger: f.linger,
		Prefix: prefix, FirstReconnect: f.spread, TrimLength: 20_000,
	}
	if f.tls {
		o.Addr, o.TLS = s.tls, s.config
	}
	return o
}

// join starts the sensors and waits until all are connected.
func (f *fleet) join(ctx context.Context, others float64) error {
	var wg sync.WaitGroup
	running, cancel := context.WithCancel(logging.Into(ctx, zap.NewNop()))
	f.stop = func() {
		cancel()
		wg.Wait()
	}
	for i := range f.sensors {
		src := newSource(f.load)
		s, err := transport.New(f.options(i), src)
		if err != nil {
			return err
		}
		f.sources = append(f.sources, src)
		wg.Go(func() {
			_ = s.Run(running) // ends with the queue's error, and ours has none
			s.Close()
		})
	}
	return f.poll(ctx, "all sensors are connected", func() (bool, error) {
		now, err := sum(ctx, f.servers)
		return now["connected_clients"]-others >= float64(f.sensors), err
	})
}

// poll waits for a condition. It looks the less often the more sensors there are, for each
// look costs by their number.
func (f *fleet) poll(ctx context.Context, what string, cond func() (bool, error)) error {
	every := 20*time.Millisecond + time.Duration(f.sensors)*50*time.Microsecond
	for {
		ok, err := cond()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, ctx.Err())
		case <-time.After(every):
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (f *fleet) acked() (n float64) {
	for _, s := range f.sources {
		n += float64(s.acked.Load())
	}
	return n
}

// deliver lets events come, and measures after a while of them.
func (f *fleet) deliver(ctx context.Context, r *result) error {
	f.load.begun = time.Now()
	close(f.load.begin)
	if err := pause(ctx, f.measure/4+f.linger+f.load.every); err != nil {
		return err
	}
	f.load.seen.reset()
	before, err := sum(ctx, f.servers)
	if err != nil {
		return err
	}
	// Within the servers' span: a look at them that takes long must not make events cheap.
	start, events := time.Now(), f.acked()
	if err := pause(ctx, f.measure); err != nil {
		return err
	}
	took, n := time.Since(start).Seconds(), f.acked()-events
	after, err := sum(ctx, f.servers)
	if err != nil {
		return err
	}
	calls := after["cmdstat_evalsha"] - before["cmdstat_evalsha"]
	cpu := after["cpu"] - before["cpu"]
	r.delivered, r.perEvent, r.perCall = n/took, cpu/n, cpu/calls
	r.wire = (after["total_net_input_bytes"] - before["total_net_input_bytes"]) / n
	r.perConnection = after["mem_clients_normal"] / after["connected_clients"]
	r.p50, r.p99 = f.load.seen.quantile(.5), f.load.seen.quantile(.99)
	if r.connections, err = f.connections(); err != nil {
		return err
	}

	bytes, kept := 0.0, 0.0
	for _, s := range f.servers {
		b, err := s.number(ctx, "MEMORY", "USAGE", streamKey, "SAMPLES", "0")
		if err != nil {
			return err
		}
		k, err := s.number(ctx, "XLEN", streamKey)
		if err != nil {
			return err
		}
		bytes, kept = bytes+b, kept+k
	}
	perEntry := 1.0
	if f.encoding == transport.ZstdBatch {
		perEntry = n / calls
	}
	r.memory = bytes / (kept * perEntry)
	return nil
}

// The keys are not a fleet's: a server that was given may have one.
const (
	prefix    = "edr:bench"
	streamKey = prefix + ":{s000}:events"
	cursorKey = prefix + ":{s000}:cursors"
)

// connections is how many a sensor has open, as this host's kernel knows them: a server
// that is short of time counts those it has not heard the end of, too.
func (f *fleet) connections() (float64, error) {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(table)) {
		const established = "01"
		w := strings.Fields(line)
		if len(w) < 4 || w[3] != established {
			continue
		}
		for _, s := range f.servers {
			addr := s.plain
			if f.tls {
				addr = s.tls
			}
			_, port, _ := net.SplitHostPort(addr)
			if p, _ := strconv.Atoi(port); strings.HasSuffix(w[2], fmt.Sprintf(":%04X", p)) {
				n++
			}
		}
	}
	return float64(n) / float64(f.sensors), nil
}

// storm kills the servers, starts them again, and watches the sensors come back.
func (f *fleet) storm(ctx context.Context, r *result) error {
	for _, s := range f.servers { // so that a long log is not what they wait for
		if _, err := s.command(ctx, "BGREWRITEAOF"); err != nil {
			return err
		}
	}
	if err := f.poll(ctx, "the log is rewritten", func() (bool, error) {
		now, err := sum(ctx, f.servers)
		return now["aof_rewrite_in_progress"]+now["aof_rewrite_scheduled"] == 0, err
	}); err != nil {
		return err
	}
	for _, s := range f.servers {
		s.kill()
	}
	f.load.lost.Store(time.Now().UnixNano())
	for _, s := range f.servers {
		if err := s.start(ctx); err != nil {
			return err
		}
	}
	up := time.Now().UnixNano()
	var last facts
	var back []int64
	if err := f.poll(ctx, "all sensors are back", func() (bool, error) {
		now, err := sum(ctx, f.servers)
		if err != nil {
			return false, err
		}
		open, err := f.connections()
		if err != nil {
			return false, err
		}
		last, r.connections = now, max(r.connections, open)
		back = back[:0]
		for _, s := range f.sources {
			if at := s.back.Load(); at != 0 {
				back = append(back, at)
			}
		}
		return len(back) == f.sensors, nil
	}); err != nil {
		return fmt.Errorf("%d of %d: %w", len(back), f.sensors, err)
	}
	slices.Sort(back)
	for i, q := range []float64{.5, .99, 1} {
		at := back[int(math.Ceil(q*float64(len(back))))-1]
		r.back[i] = max(0, float64(at-up)/1e9)
	}
	r.dials = (last["total_connections_received"] - last["asked"]) / float64(f.sensors)
	return nil
}

// heap is what this process holds, garbage aside.
func (f *fleet) heap() float64 {
	runtime.GC()
	runtime.GC() // the first may leave what has a finalizer
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// handshake is the server's CPU for a connection and one reply, in seconds.
func (s *setup) handshake(ctx context.Context, kind keyKind) (cost float64, err error) {
	dir, err := os.MkdirTemp(s.dir, "fleet")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	srv, err := startServer(ctx, dir, 10, kind)
	if err != nil {
		return 0, err
	}
	defer srv.kill()
	o := transport.Options{Addr: srv.plain}
	if kind != "" {
		o.Addr, o.TLS = srv.tls, srv.config
	}
	before, err := srv.facts(ctx)
	if err != nil {
		return 0, err
	}
	const n = 500
	for range n {
		c, err := transport.Dial(ctx, o)
		if err != nil {
			return 0, err
		}
		_, err = c.Write([]byte("PING\r\n"))
		if err == nil {
			_, err = c.Read(make([]byte, 64))
		}
		if err = errors.Join(err, c.Close()); err != nil {
			return 0, err
		}
	}
	after, err := srv.facts(ctx)
	return (after["cpu"] - before["cpu"]) / n, err
}
