// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestDroppedLinesAreAMetric(t *testing.T) {
	r, w, err := os.Pipe() // that nobody reads
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	logs, err := logging.New(LogOptions(config.Default().Log), w)
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewPedanticRegistry()
	ctx := logs.Into(t.Context())
	registerLog(ctx, reg)
	before := metricstest.Gather(t, reg)
	for range 2000 {
		logging.From(ctx).Info(strings.Repeat("x", 100))
	}
	metricstest.Moved(t, before, metricstest.Gather(t, reg), "agent_log_lines_dropped_total")
}

func TestChangeLog(t *testing.T) {
	logs, err := logging.New(LogOptions(config.Default().Log), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx := withPeer(logs.Into(t.Context()), peer{PID: 7, UID: 1000, GID: 1000, User: "mara"})
	var decisions []event.SelfInfo
	h := changeLog(func(_ context.Context, i event.SelfInfo) { decisions = append(decisions, i) })
	post := func(body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h(w, httptest.NewRequest(http.MethodPost, "/log", strings.NewReader(body)).WithContext(ctx))
		return w
	}
	for _, c := range []struct{ body, want string }{
		{`{"level":"loud"}`, `log level "loud": must be one of debug, info, warn, error`},
		{`{"level":"info","component":"x"}`, `log component "x": must be one of agent, sensor, transport`},
		{`{"component":"x"}`, `log component "x": must be one of agent, sensor, transport`},
		{`{"level":"info","seconds":-1}`, `seconds -1: must be from 0 to 604800, and go with a level`},
		{`{"level":"info","seconds":99999999}`, `seconds 99999999: must be from 0 to 604800, and go with a level`},
		{`{"seconds":1}`, `seconds 1: must be from 0 to 604800, and go with a level`},
		{`{"levl":"info"}`, `unknown field "levl"`},
		{`{`, `unexpected EOF`},
	} {
		if w := post(c.body); w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("%s: %d %s, want 400 %s", c.body, w.Code, w.Body, c.want)
		}
	}
	if len(decisions) > 0 {
		t.Fatalf("a refused change was decided: %+v", decisions)
	}
	if w := post(`{"level":"debug","component":"sensor"}`); w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"level": "debug"`) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	want := []event.SelfInfo{{
		Name: "Log Level Changed", Severity: 1, Code: "LOG_LEVEL", Before: "info", After: "debug",
		Message: "the log level of component sensor was changed: uid 1000, gid 1000, pid 7 asked for it",
		Attrs: map[string]any{
			"peer_pid": int32(7), "peer_uid": uint32(1000), "peer_gid": uint32(1000), "peer_user": "mara",
			"log_component": "sensor", "log_levels": map[string]string{"agent": "info", "sensor": "debug", "transport": "info"},
		},
	}}
	if d := cmp.Diff(want, decisions); d != "" {
		t.Errorf("decisions (-want +got):\n%s", d)
	}
}

// TestEachComponentIsConfigurable keeps the keys of log.components and the
// components that have a level the same.
func TestEachComponentIsConfigurable(t *testing.T) {
	var keys []string
	for _, k := range config.Keys() {
		if c, ok := strings.CutPrefix(k, "log.components."); ok {
			keys = append(keys, c)
		}
	}
	if d := cmp.Diff(logging.Components(), keys); d != "" {
		t.Errorf("keys of log.components (-components +keys):\n%s", d)
	}
	for c := range logComponents(config.Log{}) {
		if !strings.Contains(strings.Join(keys, " "), c) {
			t.Errorf("%s is no component", c)
		}
	}
}
