// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
)

// awayGrace is how long Redis may be away before the sensor says that it buffers.
const awayGrace = 3 * time.Second

// monitor decides the mode once a second until ctx ends, and feeds systemd's
// watchdog as long as the stages move.
func (a *Agent) monitor(ctx context.Context) {
	tick := time.NewTicker(monitorEvery)
	defer tick.Stop()
	status := ""
	var w watch
	binary := watchInstalled()
	for _, i := range w.begin(a.moment(time.Now())) {
		a.decide(ctx, i)
	}
	for {
		for _, i := range w.step(a.moment(time.Now())) {
			a.decide(ctx, i)
		}
		for _, i := range binary.step() {
			a.decide(ctx, i)
		}
		f := a.facts(time.Now())
		a.stepMode(f, func(before, now modeState) { a.reportMode(ctx, before, now) })
		now := a.mode.current.Load()
		if s := "STATUS=" + string(now.Mode) + ": " + now.Reason; s != status {
			status = s
			notifySystemd(s)
		}
		a.cases.expire(ctx)
		for _, l := range a.thinned {
			l.Settle()
		}
		if seen, err := a.sensor.Stats(); err == nil { // else /status says why not
			a.pace.add(time.Now(), seen, a.queue.Stats())
		}
		if !f.restart {
			notifySystemd(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// stepMode has the mode decided and a change told before anybody else can change it: a stop
// comes at any time, and its record is to follow that of the mode that it ends.
func (a *Agent) stepMode(f facts, tell func(before, now modeState)) {
	a.stepping.Lock()
	defer a.stepping.Unlock()
	if before, changed := a.mode.step(f, time.Now()); changed {
		tell(before, *a.mode.current.Load())
	}
}

// facts reads every stage once.
func (a *Agent) facts(now time.Time) facts {
	stats := a.queue.Stats()
	f := facts{
		started: a.started.Load(), stopping: a.stopping.Load(),
		truncated: stats.Truncated, corrupt: stats.Corrupt, kernelLost: a.sensor.Lost(), discarded: a.sensor.Discarded(),
		transportReason: "no Redis is configured (transport.address): events stay in the buffer",
	}
	if stats.Err != nil {
		f.bufferError = stats.Err.Error()
	}
	if why := a.unserved.Load(); why != nil {
		f.unserved = *why
	}
	f.missing = unseen(a.sensor.Coverage())
	if s := a.sensor.Stuck(now); s.Stage != "" && f.started {
		f.stuck = s.Stage + ": " + s.Reason
		// What waits for a disk or for room is not cured by a new start.
		f.restart = s.Stage != sensor.StageRing && f.bufferError == ""
	}
	if a.sender != nil {
		t := a.sender.State()
		// A reconnect that takes a moment is no change of mode, and before the
		// first connection none is known.
		moment := (t.Phase == transport.Connecting || t.Phase == transport.Retrying) && now.Sub(t.Since) < awayGrace
		f.delivering = t.Phase == transport.Connected || moment
		f.started = f.started && (t.Phase == transport.Connected || !moment || !t.LastReply.IsZero())
		// Every exchange has a deadline, so that one who delivers has an answer by now.
		if f.stuck == "" && t.Phase == transport.Connected {
			f.stuck = silent(now, t, stats)
			f.restart = f.stuck != ""
		}
		f.transportReason = fmt.Sprintf("Redis at %s does not take events: %s: %s (%s)", t.Address, t.Phase, t.Error, t.Hint)
	}
	return f
}

// senderQuiet is longer than any exchange with Redis may take.
const senderQuiet = time.Minute

// silent says how it shows that a connected sender does not move, if it does not.
func silent(now time.Time, t transport.State, b buffer.Stats) string {
	for _, since := range []time.Time{t.Since, t.LastReply, b.OldestUnsent} {
		if since.IsZero() || now.Sub(since) < senderQuiet {
			return ""
		}
	}
	return fmt.Sprintf("sender: %d records wait and no answer of Redis at %s came for %s", b.Unsent, t.Address, now.Sub(t.LastReply).Round(time.Second))
}

// unseen lists the events that nothing on this host tells of. Where it cannot be seen
// that a file is written, it is seen that one is opened for it.
func unseen(coverage []sensor.Coverage) (events []string) {
	opens := slices.ContainsFunc(coverage, func(c sensor.Coverage) bool { return c.Kind == event.FileOpenWrite && c.Hook != "" })
	for _, c := range coverage {
		if c.Hook == "" && (c.Kind != event.FileModify || !opens) {
			events = append(events, c.Event)
		}
	}
	return events
}

func (a *Agent) reportMode(ctx context.Context, before, now modeState) {
	i := event.SelfInfo{
		Activity: event.ActivityMode, Severity: 1, Code: "MODE", Before: string(before.Mode), After: string(now.Mode),
		Message: now.Reason,
	}
	switch now.Mode {
	case Truncating, Degraded:
		i.Severity, i.Failed = 4, true
	case Buffering:
		i.Severity = 2
	}
	a.decide(logging.With(ctx, zap.String(logging.KeyMode, string(now.Mode))), i)
}

// notifyStart writes the start record: what runs, with which configuration, and
// what it can see on this host.
func (a *Agent) notifyStart(ctx context.Context) {
	hooks, missing := map[string]string{}, []string{}
	for _, c := range a.sensor.Coverage() {
		hooks[c.Event] = c.Hook
		if c.Hook == "" {
			missing = append(missing, c.Event)
		}
	}
	sum, err := binarySum()
	if err != nil {
		logging.From(ctx).Warn("hash own binary", zap.Error(err))
	}
	a.decide(ctx, event.SelfInfo{
		Activity: event.ActivityStart, Severity: 1, Code: "START", Message: "the sensor was started",
		Attrs: map[string]any{
			"coverage": hooks, "missing": missing, "scope": a.cfg.Sensor.Scope.String(), "config_sha256": a.cfg.Hash(),
			"binary_sha256": sum, "go_memory_limit_bytes": a.heap, "files_sha256": a.sums(), "epoch": a.queue.Epoch(), "buffer_cap_bytes": a.queue.Stats().Cap, "buffer_hazards": hazards(a.queue.Stats()), "pid": os.Getpid(),
		},
	})
	a.decideLoaded(ctx)
	fields := []zap.Field{zap.String(logging.KeyVersion, a.identity.Version), zap.Stringer(logging.KeyScope, a.cfg.Sensor.Scope)}
	if addr := a.Addr(); addr != nil {
		fields = append(fields, zap.Stringer("http", addr))
	}
	logging.From(ctx).Info("started", fields...)
}

// binarySum is the SHA-256 of the running binary.
func binarySum() (string, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
