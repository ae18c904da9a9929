// SPDX-License-Identifier: Apache-2.0

// Package agent wires the stages together and owns their lifecycle: it builds
// everything, then attaches, then starts, and stops in the reverse order, so
// that what was seen is kept and what is kept is sent as far as time allows.
// It also answers for the sensor as a whole: its mode, /metrics, /status, the
// control socket and systemd.
//
// It is imported by cmd/edr-sensor only, because it depends on every stage.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/cases"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
	"github.com/aurorasoc/edr-sensor/transport"
)

// How long each part of a stop may take; together they stay below the 20 s
// that the systemd unit allows.
const (
	drainWithin    = 5 * time.Second // rings to buffer
	deliverWithin  = 5 * time.Second // buffer to Redis
	concludeWithin = time.Second
	closeWithin    = 5 * time.Second
	monitorEvery   = time.Second
)

// Agent is one running sensor.
type Agent struct {
	cfg     config.Config // of the start
	file    string        // it was read from, if any
	running atomic.Pointer[Loaded]
	load    func() (Loaded, error)
	hangup  <-chan os.Signal

	reloading sync.Mutex
	shrinking atomic.Int64 // the buffer, to so many bytes; 0: it is not
	files     int          // what the guard divides the limit of file events by, 0: nothing; as reloading
	heap      int64

	identity event.Agent
	place    atomic.Pointer[place] // where the identity has moved to since the start
	lineage  lineage
	moved    *event.SelfInfo // by the start itself; nil: it did not
	registry *prometheus.Registry
	metrics  *metrics
	gauge    *gauge
	queue    *buffer.Queue
	sensor   *sensor.Sensor
	enricher *enrich.Enricher
	sender   *transport.Sender // nil without Redis
	mode     *modeMachine
	stepping sync.Mutex // while the mode is decided and told
	pace     pace
	thinned  []*logging.Limiter // whose last counts the monitor makes known
	tap      *tap
	cases    *caseKeeper
	resume   func(context.Context)  // tells what became of the cases of the run before
	http     net.Listener           // nil: there is none from the start on
	unserved atomic.Pointer[string] // why http.listen is not served at present; nil: it is, or is to be nowhere
	control  net.Listener
	started  atomic.Bool
	stopping atomic.Bool
	ending   chan struct{} // closed when live views must go
	cleanups []cleanup     // in order of building; undone in reverse
}

// Options are what an Agent is made of.
type Options struct {
	Loaded
	Version string
	// Load reads the configuration again and checks all of it, as it was done for
	// Loaded. Its error joins one *config.Problem per defect. Nil: there is none to read.
	Load func() (Loaded, error)
	// Reload asks for that, as SIGHUP does.
	Reload <-chan os.Signal
	// ConfigFile is what Load reads, with the drop-ins beside it; empty: none.
	ConfigFile string
}

type cleanup struct {
	name string
	undo func(context.Context) error
}

// Run builds the sensor, runs it until ctx ends, and stops it in order. Errors
// name the stage, what it worked on and the remedy; the log has said them already.
func Run(ctx context.Context, o Options) error {
	a, err := New(ctx, o)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// New builds every stage and attaches the programs; nothing is read yet. On an
// error everything built so far is undone, and the log says what is wrong.
func New(ctx context.Context, o Options) (*Agent, error) {
	if o.Load == nil {
		o.Load = func() (Loaded, error) { return o.Loaded, nil }
	}
	a := &Agent{cfg: o.Config, file: o.ConfigFile, load: o.Load, hangup: o.Reload, registry: prometheus.NewRegistry(), tap: &tap{}, ending: make(chan struct{})}
	a.running.Store(&o.Loaded)
	if err := a.build(ctx, o.Version); err != nil {
		ctx = a.bind(ctx)
		err = errors.Join(err, a.undo(ctx))
		logNotStarted(ctx, err)
		return nil, err
	}
	return a, nil
}

func (a *Agent) defers(name string, undo func(context.Context) error) {
	a.cleanups = append(a.cleanups, cleanup{name, undo})
}

// undo runs the cleanups in reverse, each with the same deadline.
func (a *Agent) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWithin)
	defer cancel()
	var errs []error
	for _, c := range slices.Backward(a.cleanups) {
		if err := c.undo(ctx); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", c.name, err))
		}
	}
	a.cleanups = nil
	return errors.Join(errs...)
}

func (a *Agent) build(ctx context.Context, version string) error {
	if refusals := sensor.NewPreflight().Refusals(); len(refusals) > 0 {
		return refusals[0] // before anything is made
	}
	if err := os.MkdirAll(a.cfg.Agent.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w: set agent.state_dir to a directory that can be made", err)
	}
	id, err := agentID(a.cfg.Agent.ID, a.cfg.Agent.StateDir)
	if err != nil {
		return err
	}
	a.identity = event.Agent{
		ID: id, Version: version, Tenant: a.cfg.Agent.Tenant,
		CaseID: a.cfg.Context.CaseID, InvestigationID: a.cfg.Context.InvestigationID, UserID: a.cfg.Context.UserID,
	}
	ctx = a.bind(ctx)
	registerLog(ctx, a.registry)

	host, err := enrich.LoadHost()
	if err != nil {
		return fmt.Errorf("read host facts: %w", err)
	}
	a.metrics = newMetrics(a.registry, version, host.KernelRelease)
	a.metrics.configured(a.cfg.Hash())
	a.gauge = newGauge("/proc", "/sys/fs/cgroup")
	_, limit := a.gauge.memoryUse()
	a.heap = limitHeap(limit, a.cfg.Sensor.PriorityRing+a.cfg.Sensor.BulkRing)
	var current atomic.Pointer[sensor.Sensor] // set before the first commit of this run
	a.queue, err = buffer.Open(ctx, buffer.Options{
		Dir: a.bufferDir(), Cap: a.cfg.Buffer.Cap, CommitBytes: a.cfg.Buffer.CommitBytes, CommitInterval: a.cfg.Buffer.CommitInterval,
		RetainAge: a.cfg.Buffer.RetainAge, RetainBytes: a.cfg.Buffer.RetainBytes, Compression: a.cfg.Buffer.Compression, AllowUnsafe: a.cfg.Buffer.AllowUnsafe,
		Registerer: a.registry,
		Committed: func(mark []byte) {
			if s := current.Load(); s != nil {
				s.Release(mark)
			}
		},
	})
	if err != nil {
		return err
	}
	a.defers("buffer", a.queue.Close)
	stats := a.queue.Stats()
	for _, h := range stats.Hazards {
		logging.From(ctx).Warn("the buffer is not in a good place", zap.Stringer("hazard", h))
	}
	a.mode = newModeMachine(a.registry, facts{truncated: stats.Truncated, corrupt: stats.Corrupt}, time.Now())

	if err := a.settle(ctx, "/"); err != nil {
		return err
	}
	ctx = a.bind(ctx) // the id may be another now
	encoder := ocsf.New(host, a.identity)
	encoder.Bind(a.queue.Epoch())
	rate := float64(a.cfg.Sensor.Hash.PerSecond)
	if !a.cfg.Sensor.Hash.Enabled {
		rate = -1
	}
	a.enricher = enrich.New(enrich.Options{
		Host: host, TableSize: a.cfg.Sensor.ProcessTable,
		HashMaxBytes: a.cfg.Sensor.Hash.MaxSize, HashPerSecond: rate, HashWait: a.cfg.Sensor.Hash.Wait,
		Scoped:     a.cfg.Sensor.Scope.Kind != config.ScopeAll,
		Registerer: a.registry,
	})
	a.defers("enricher", func(context.Context) error { a.enricher.Close(); return nil })

	scope, err := scopeOf(a.cfg.Sensor.Scope)
	if err != nil {
		return err
	}
	keeper, kept := a.kept(ctx)
	a.sensor, err = sensor.Open(sensor.Options{
		Keeper: keeper, Kept: kept,
		Scope: scope, PriorityBytes: int(a.cfg.Sensor.PriorityRing), BulkBytes: int(a.cfg.Sensor.BulkRing), ForkEvents: a.cfg.Sensor.ForkEvents,
		Files: filesOf(a.cfg.Sensor.File), Protected: a.protected(), ExerciseDir: a.exerciseDir(),
		Host: host, Encoder: encoder, Enricher: a.enricher, Sink: newSink(a.queue, a.tap, encoder, &a.place), Mark: a.queue.Mark(), Registerer: a.registry,
		CaseRoots: func(all map[*event.Case][]event.ProcessKey) { a.cases.setRoots(all) },
	})
	if err != nil {
		return err
	}
	a.defers("sensor", func(context.Context) error { return a.sensor.Close() })
	current.Store(a.sensor)
	a.openCases(host.BootID)

	if a.cfg.Transport.Address != "" {
		if a.sender, err = a.newSender(ctx); err != nil {
			return err
		}
	}
	if err := a.listen(ctx); err != nil {
		return err
	}
	return a.sensor.Attach()
}

// openCases opens the cases of the run before again.
func (a *Agent) openCases(bootID string) {
	set, ended, damage := cases.Load(a.cfg.Agent.StateDir, bootID, time.Now())
	r := cases.Resolver{Proc: "/proc", Cgroup: "/sys/fs/cgroup", BootID: bootID}
	a.cases = newCaseKeeper(a.registry, set, r, a.sensor.SetCases, a.decide)
	a.resume = func(ctx context.Context) { a.cases.resumed(ctx, ended, damage) }
	a.defers("cases", a.cases.save)
}

// bind puts the run's identity on every log line below.
func (a *Agent) bind(ctx context.Context) context.Context {
	var fields []zap.Field
	for key, value := range map[string]string{
		logging.KeyAgentID: a.identity.ID, // empty when the start failed before it was known
		logging.KeyCaseID:  a.identity.CaseID, logging.KeyInvestigationID: a.identity.InvestigationID, logging.KeyUserID: a.identity.UserID,
	} {
		if value != "" {
			fields = append(fields, zap.String(key, value))
		}
	}
	return logging.With(ctx, append(fields, zap.String(logging.KeyComponent, "agent"))...)
}

func (a *Agent) bufferDir() string {
	if a.cfg.Buffer.Dir != "" {
		return a.cfg.Buffer.Dir
	}
	return filepath.Join(a.cfg.Agent.StateDir, "buffer")
}

// listen opens the sockets that people and Prometheus ask.
func (a *Agent) listen(ctx context.Context) (err error) {
	if a.http = a.listenHTTP(ctx); a.http != nil {
		a.defers("http listener", func(context.Context) error { return ignoreClosed(a.http.Close()) })
	}
	if path := a.cfg.Control.Socket; path != "" {
		if a.control, err = listenControl(ctx, path, a.cfg.Control.Group); err != nil {
			return fmt.Errorf("control.socket: %w", err)
		}
		a.defers("control socket", func(context.Context) error { return ignoreClosed(a.control.Close()) })
	}
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Addr is where /metrics is served from the start on; nil when it is not.
func (a *Agent) Addr() net.Addr {
	if a.http == nil {
		return nil
	}
	return a.http.Addr()
}

// Run starts the stages of an Agent made by New and returns after the staged
// stop, when ctx ended or a stage gave up.
func (a *Agent) Run(ctx context.Context) error {
	ctx = a.bind(ctx)
	serve, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	var servers errgroup.Group // one that fails does not end the other
	lost := make(chan error, 1)
	start(serve, &servers, a.http, a.handler(), lost)
	control := a.controlHandler(serve)
	a.thinned = []*logging.Limiter{control.refuse, a.cases.rejects, a.cases.lines}
	start(serve, &servers, a.control, control, nil)

	stats := a.queue.Stats()
	before := summary{seen: stats.Before + stats.Last, sent: stats.Before + stats.Acked, lost: stats.Truncated}
	send, stopSending := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSending()
	sent := make(chan error, 1)
	if a.sender != nil {
		var giveUp context.CancelFunc
		ctx, giveUp = context.WithCancel(ctx)
		defer giveUp()
		go func() {
			err := a.sender.Run(logging.With(send, zap.String(logging.KeyComponent, "transport")))
			if err != nil {
				giveUp() // the buffer cannot be read: a new start sets it aside
			}
			sent <- err
		}()
	} else {
		sent <- nil
	}

	a.notifyStart(ctx)
	if a.moved != nil {
		a.decide(ctx, *a.moved)
	}
	a.resume(ctx)
	watch, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	monitored := make(chan struct{})
	go func() { defer close(monitored); a.monitor(watch) }()
	guarded := make(chan struct{})
	go func() { defer close(guarded); a.guard(watch) }()
	reloaded := make(chan struct{})
	go func() { defer close(reloaded); a.reloads(watch) }()
	recalled := make(chan struct{})
	go func() { defer close(recalled); a.recall(watch, stats.Bounds) }()
	served := make(chan struct{})
	go func() {
		defer close(served)
		a.serveLater(watch, lost, func(l net.Listener) { start(serve, &servers, l, a.handler(), lost) })
	}()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		a.sensor.Watch(watch)
	}()
	a.started.Store(true)
	notifySystemd(daemon.SdNotifyReady)

	// The worker ends only when the record of the stop is queued: it drains once.
	work, stopWorker := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWorker()
	stop := context.AfterFunc(ctx, func() {
		a.beginStop(ctx)
		stopWorker()
	})
	defer stop()
	err := a.sensor.Run(work, drainWithin)
	a.beginStop(ctx)
	stopWatching()
	<-monitored
	<-guarded
	<-reloaded
	<-recalled
	<-served
	<-watched

	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), deliverWithin)
	defer cancel()
	err = errors.Join(err, a.queue.Flush(end))
	stopSending()
	err = errors.Join(err, <-sent)
	a.deliver(end)
	close(a.ending)
	stopServing()
	err = errors.Join(err, servers.Wait(), a.conclude(ctx))
	sum := a.summarise(before)
	err = errors.Join(err, a.undo(ctx))
	a.logEnd(ctx, sum, err)
	return err
}

// beginStop says that a stop was asked for, once. The record is written before
// the rings are drained, so that it has its place among the last events.
func (a *Agent) beginStop(ctx context.Context) {
	if a.stopping.Swap(true) {
		return
	}
	notifySystemd(daemon.SdNotifyStopping)
	for _, l := range a.thinned {
		l.Flush()
	}
	a.stepMode(facts{stopping: true}, func(before, now modeState) {
		logging.From(ctx).Info("stopping", zap.String(logging.KeyMode, string(now.Mode)))
		a.decide(ctx, event.SelfInfo{
			Activity: event.ActivityStop, Severity: 1, Code: "STOP", Message: "the sensor was asked to stop",
			Before: string(before.Mode), After: string(now.Mode),
		})
	})
}

// deliver sends what became durable after the sender was stopped. What it cannot
// send waits in the buffer for the next start, which is no error.
func (a *Agent) deliver(ctx context.Context) {
	if a.sender == nil {
		return
	}
	defer a.sender.Close()
	if err := a.sender.Drain(logging.With(ctx, zap.String(logging.KeyComponent, "transport"))); err != nil {
		logging.From(ctx).Warn("records stay in the buffer for the next start", zap.Error(err))
	}
}

// conclude keeps what was decided meanwhile for the next start to deliver: that Redis lacked
// something, say, or who has got evidence.
func (a *Agent) conclude(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), concludeWithin)
	defer cancel()
	return a.sensor.Conclude(ctx)
}

// start serves h on l, if there is one, until ctx ends. Why it ended before goes to lost,
// or without that to g.
func start(ctx context.Context, g *errgroup.Group, l net.Listener, h http.Handler, lost chan<- error) {
	if l == nil {
		return
	}
	s := newServer(ctx, h)
	g.Go(func() error {
		err := s.Serve(l)
		switch {
		case errors.Is(err, http.ErrServerClosed), errors.Is(err, net.ErrClosed):
			return nil
		case lost != nil:
			lost <- err
			return nil
		}
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	})
	g.Go(func() error {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if s.Shutdown(end) != nil {
			return s.Close() // live views are cut
		}
		return nil
	})
}

func notifySystemd(state string) {
	_, _ = daemon.SdNotify(false, state) // no systemd, nothing to tell
}
