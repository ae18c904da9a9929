// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// LogOptions are what the configuration says about the log.
func LogOptions(c config.Log) logging.Options {
	return logging.Options{Format: logging.Format(c.Format), Level: c.Level, Components: logComponents(c)}
}

func logComponents(c config.Log) map[string]string {
	return map[string]string{"agent": c.Components.Agent, "sensor": c.Components.Sensor, "transport": c.Components.Transport}
}

// LogStatus is the answer of /log.
type LogStatus struct {
	Levels  []logging.Level `json:"levels"`
	Dropped uint64          `json:"dropped"` // lines that nobody read in time
}

// LogRequest asks for another level. Without a Level it asks for the configured
// one, without a Component for that of all.
type LogRequest struct {
	Level     string `json:"level,omitempty"`
	Component string `json:"component,omitempty"`
	Seconds   int64  `json:"seconds,omitempty"` // 0: until it is changed again
}

// maxLogSeconds bounds what is meant to be temporary.
const maxLogSeconds = 7 * 24 * 3600

func registerLog(ctx context.Context, reg prometheus.Registerer) {
	log := logging.Of(ctx)
	promauto.With(reg).NewCounterFunc(prometheus.CounterOpts{
		Name: "agent_log_lines_dropped_total", Help: "Log lines that could not be written, because the journal or whoever reads standard error did not read. If it grows, that reader hangs: see systemd-journald, or the container runtime; the decisions streams have what the log lacks.",
	}, func() float64 { return float64(log.Dropped()) })
}

func serveLog(w http.ResponseWriter, r *http.Request) {
	log := logging.Of(r.Context())
	writeJSON(w, LogStatus{log.Levels.List(), log.Dropped()})
}

// serveRecent answers with the newest lines of the log, one JSON document per line.
func serveRecent(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	for _, line := range logging.Of(r.Context()).Recent(false) {
		if _, err := io.WriteString(w, line+"\n"); err != nil {
			return
		}
	}
}

// warningsShown is how many lines of the log are part of /status.
const warningsShown = 5

func newestWarnings(ctx context.Context) (lines []json.RawMessage) {
	all := logging.Of(ctx).Recent(true)
	for _, line := range all[max(0, len(all)-warningsShown):] {
		lines = append(lines, json.RawMessage(line))
	}
	return lines
}

// changeLog changes levels. Each change is a decision, also the one back when its
// time is over.
func changeLog(decide func(context.Context, event.SelfInfo)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q LogRequest
		if !readJSON(w, r, &q) {
			return
		}
		if q.Seconds < 0 || q.Seconds > maxLogSeconds || q.Level == "" && q.Seconds > 0 {
			http.Error(w, fmt.Sprintf("seconds %d: must be from 0 to %d, and go with a level", q.Seconds, maxLogSeconds), http.StatusBadRequest)
			return
		}
		ctx := context.WithoutCancel(r.Context()) // the change outlives the request
		levels := logging.Of(ctx).Levels
		var change logging.Change
		var err error
		if q.Level == "" {
			change, err = levels.Reset(q.Component)
		} else {
			change, err = levels.Override(q.Component, q.Level, time.Duration(q.Seconds)*time.Second, func(back logging.Change) {
				decide(ctx, levelDecision(levels, back, "the time is over", nil))
			})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		attrs := map[string]any{}
		who := "somebody"
		if p, ok := peerFrom(ctx); ok {
			attrs, who = p.attrs(), p.String()
		}
		decide(ctx, levelDecision(levels, change, who+" asked for it", attrs))
		serveLog(w, r)
	}
}

func levelDecision(levels *logging.Levels, c logging.Change, why string, attrs map[string]any) event.SelfInfo {
	what := "of all components"
	if c.Component != "" {
		what = "of component " + c.Component
	}
	if attrs == nil {
		attrs = map[string]any{}
	}
	attrs["log_component"] = c.Component
	now := map[string]string{}
	for _, l := range levels.List() {
		if l.Component != "" {
			now[l.Component] = l.Level
		}
	}
	attrs["log_levels"] = now
	if !c.Until.IsZero() {
		attrs["until"] = c.Until.UTC().Format(time.RFC3339)
	}
	return event.SelfInfo{
		Name: "Log Level Changed", Severity: 1, Code: "LOG_LEVEL", Before: c.Before, After: c.After, Attrs: attrs,
		Message: fmt.Sprintf("the log level %s was changed: %s", what, why),
	}
}
