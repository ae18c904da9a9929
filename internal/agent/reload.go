// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Loaded is a configuration and where each of its values comes from.
type Loaded struct {
	Config   config.Config
	Settings []config.Setting
}

// adopt returns l with what needs no restart taken from next.
func (l *Loaded) adopt(next Loaded) *Loaded {
	stays := map[string]config.Setting{}
	for _, s := range l.Settings {
		if !s.Live {
			stays[s.Key] = s
		}
	}
	settings := slices.Clone(next.Settings)
	for i, s := range settings {
		if was, ok := stays[s.Key]; ok {
			settings[i] = was
		}
	}
	return &Loaded{l.Config.Adopt(next.Config), settings}
}

// ReloadResult is the answer to a request to reload.
type ReloadResult struct {
	Accepted     bool            `json:"accepted"`
	Problems     []string        `json:"problems,omitempty"` // why not
	Applied      []config.Change `json:"applied"`            // in effect from now on
	NeedsRestart []config.Change `json:"needs_restart"`      // accepted, and without effect until a restart
	Missing      []string        `json:"not_found"`          // exclusions of what is not there
	Hash         string          `json:"config_sha256"`      // of what is in effect
}

// ConfigStatus is the answer of /config: the configuration in force. It has no
// secrets, because a configuration names the files that hold them.
type ConfigStatus struct {
	Hash     string           `json:"config_sha256"`
	Settings []config.Setting `json:"settings"`
}

func (a *Agent) serveConfig(w http.ResponseWriter, _ *http.Request) {
	l := a.running.Load()
	writeJSON(w, ConfigStatus{l.Config.Hash(), l.Settings})
}

// decideLoaded makes the configuration of the start known.
func (a *Agent) decideLoaded(ctx context.Context) {
	l := a.running.Load()
	a.decide(ctx, event.SelfInfo{
		Name: "Configuration Loaded", Severity: 1, Code: "CONFIG_LOADED", After: l.Config.Hash(), Message: "the configuration was loaded",
		Attrs: map[string]any{"sources": sources(l.Settings), "settings": changed(l.Settings)},
	})
}

// sources names the files and variables that the settings come from.
func sources(settings []config.Setting) []string {
	out := []string{}
	for _, s := range settings {
		source := s.Source
		if i := strings.Index(source, ":"); i >= 0 && strings.HasPrefix(source, "/") {
			source = source[:i] // without line and column
		}
		if source != "default" && !slices.Contains(out, source) {
			out = append(out, source)
		}
	}
	return out
}

// changed are the settings that somebody has set. None is a secret: a
// configuration names the files that hold those.
func changed(settings []config.Setting) map[string]string {
	out := map[string]string{}
	for _, s := range settings {
		if s.Source != "default" {
			out[s.Key] = s.Value
		}
	}
	return out
}

// reload reads the configuration again. It is checked whole before any of it is
// applied, and applied in steps that are undone when a later one fails.
func (a *Agent) reload(ctx context.Context, asked map[string]any) ReloadResult {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	old := a.running.Load()
	next, err := a.load()
	if err != nil {
		var problems []string
		for _, p := range config.Problems(err) {
			problems = append(problems, p.Error())
		}
		return a.reject(ctx, old, asked, problems)
	}
	r := ReloadResult{Accepted: true, Applied: []config.Change{}, NeedsRestart: []config.Change{}, Missing: []string{}}
	for _, c := range config.Diff(old.Config, next.Config) {
		if c.Live {
			r.Applied = append(r.Applied, c)
		} else {
			r.NeedsRestart = append(r.NeedsRestart, c)
		}
	}
	effective := old.adopt(next)
	before, after := old.Config.Sensor.File, effective.Config.Sensor.File
	// An exclusion is looked up again even if it is spelled as before: what it names may
	// be another file by now, as after an upgrade of a package.
	if effective.Config.Sensor.File.Enabled {
		missing, err := a.sensor.Filter(a.shedFiles(after))
		if err != nil {
			return a.reject(ctx, old, asked, []string{err.Error() + ": restart the sensor to use this configuration"})
		}
		for _, m := range missing {
			r.Missing = append(r.Missing, m.Error())
		}
	}
	// What "edr-sensor log" has set stays until it is reset or its time is over.
	if err := logging.Of(ctx).Levels.Configure(effective.Config.Log.Level, logComponents(effective.Config.Log)); err != nil {
		_, undo := a.sensor.Filter(a.shedFiles(before))
		return a.reject(ctx, old, asked, []string{errors.Join(err, undo).Error()})
	}
	if err := a.resize(ctx, effective.Config.Buffer); err != nil {
		_, undo := a.sensor.Filter(a.shedFiles(before))
		undo = errors.Join(undo, logging.Of(ctx).Levels.Configure(old.Config.Log.Level, logComponents(old.Config.Log)))
		return a.reject(ctx, old, asked, []string{errors.Join(fmt.Errorf("buffer.cap: %w", err), undo).Error()})
	}
	// Drop-ins may be there by now that were not.
	if err := a.sensor.Protect(a.protected()); err != nil {
		logging.From(ctx).Warn("watch own files", zap.Error(err))
	}
	a.running.Store(effective)
	r.Hash = effective.Config.Hash()
	a.metrics.configured(r.Hash)

	attrs := map[string]any{"applied": r.Applied, "needs_restart": r.NeedsRestart, "sources": sources(next.Settings), "file_sha256": next.Config.Hash(), "not_found": r.Missing}
	maps.Copy(attrs, asked)
	a.decide(ctx, event.SelfInfo{
		Name: "Configuration Reloaded", Severity: 1, Code: "CONFIG_RELOADED", Before: old.Config.Hash(), After: r.Hash, Count: uint64(len(r.Applied)),
		Message: fmt.Sprintf("the configuration was read again: %d settings changed, %d wait for a restart", len(r.Applied), len(r.NeedsRestart)), Attrs: attrs,
	})
	if b, n := filterText(before), filterText(after); b != n {
		attrs := map[string]any{"not_found": r.Missing}
		maps.Copy(attrs, asked)
		a.decide(ctx, event.SelfInfo{
			Name: "Filter Changed", Severity: 2, Code: "FILTER_CHANGED", Before: b, After: n,
			Message: "what the kernel programs leave out has changed", Attrs: attrs,
		})
	}
	return r
}

// resize gives the buffer its bounds. To shrink it copies what it keeps, which takes as
// long as the disk does: that goes on without the reload, and a decision says how it ended.
func (a *Agent) resize(ctx context.Context, b config.Buffer) error {
	size := a.queue.Stats().Cap
	if err := a.queue.Resizable(b.Cap); err != nil && b.Cap != size {
		return err
	}
	switch to := a.shrinking.Load(); {
	case to == b.Cap:
	case to != 0:
		return fmt.Errorf("the buffer is being shrunk to %d bytes: reload again when that is done", to)
	case b.Cap < size:
		a.shrinking.Store(b.Cap)
		go func() {
			_ = a.queue.Resize(context.WithoutCancel(ctx), b.Cap) // the buffer's state says how it ended, and Close waits for it
			a.shrinking.Store(0)
		}()
	default:
		if err := a.queue.Resize(ctx, b.Cap); err != nil {
			return err
		}
	}
	a.queue.Retain(b.RetainAge, b.RetainBytes) // last: of what is refused nothing is applied
	return nil
}

func (a *Agent) reject(ctx context.Context, old *Loaded, asked map[string]any, problems []string) ReloadResult {
	attrs := map[string]any{"problems": problems}
	maps.Copy(attrs, asked)
	hash := old.Config.Hash()
	a.decide(ctx, event.SelfInfo{
		Name: "Configuration Rejected", Severity: 3, Failed: true, Code: "CONFIG_REJECTED", Before: hash, After: hash, Count: uint64(len(problems)),
		Message: fmt.Sprintf("the configuration was read again and has %d problems; nothing of it was applied", len(problems)), Attrs: attrs,
	})
	return ReloadResult{Problems: problems, Applied: []config.Change{}, NeedsRestart: []config.Change{}, Hash: hash}
}

// filterText is what file events leave out, in one line.
func filterText(f config.File) string {
	return fmt.Sprintf("per_process=%d exclude_paths=%q exclude_executables=%q", f.PerProcess, f.ExcludePaths, f.ExcludeExecutables)
}

// reloads serves the requests that come as signals until ctx ends, and tells
// systemd of each as Type=notify-reload wants it.
func (a *Agent) reloads(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.hangup:
		}
		var ts unix.Timespec
		if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) == nil {
			notifySystemd(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, ts.Nano()/int64(time.Microsecond)))
		}
		a.reload(ctx, map[string]any{"asked_by": "SIGHUP"})
		notifySystemd(daemon.SdNotifyReady)
	}
}

// serveReload answers the control socket.
func (a *Agent) serveReload(w http.ResponseWriter, r *http.Request) {
	asked := map[string]any{"asked_by": "control socket"}
	if p, ok := peerFrom(r.Context()); ok {
		maps.Copy(asked, p.attrs())
	}
	// A client that goes away does not stop half of it.
	writeJSON(w, a.reload(context.WithoutCancel(r.Context()), asked))
}
