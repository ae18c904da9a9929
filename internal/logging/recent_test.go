// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"
)

func TestRecentLines(t *testing.T) {
	l, err := New(Options{Format: FormatJSON, Level: "info"}, brokenWriter{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := With(l.Into(t.Context()), zap.String(KeyAgentID, "a-1"), zap.String(KeyComponent, "agent"))
	log := From(ctx)
	log.Warn("the first", zap.String(KeyReason, "long"+strings.Repeat("x", 2*recentBytes)))
	log.Debug("not at this level")
	for i := range 2 * recentLines {
		log.Info(fmt.Sprint("line ", i))
	}
	all, warnings := l.Recent(false), l.Recent(true)
	if len(all) != recentLines || !strings.Contains(all[0], fmt.Sprintf(`"line %d"`, recentLines)) || !strings.Contains(all[recentLines-1], fmt.Sprintf(`"line %d"`, 2*recentLines-1)) {
		t.Errorf("%d lines from %s to %s", len(all), all[0], all[len(all)-1])
	}
	if len(warnings) != 1 {
		t.Fatalf("%d warnings, want one that no other line drove out: %q", len(warnings), warnings)
	}
	var w struct {
		Level, Msg, Component, Reason string
		AgentID                       string `json:"agent_id"`
	}
	if err := json.Unmarshal([]byte(warnings[0]), &w); err != nil || len(warnings[0]) > recentBytes || w.Level != "warn" || w.Msg != "the first" || w.AgentID != "a-1" || w.Component != "agent" {
		t.Errorf("%v: %s", err, warnings[0])
	}
	for range 2 * recentWarnings {
		log.Error("again")
	}
	if n := len(l.Recent(true)); n != recentWarnings {
		t.Errorf("%d warnings are kept, want %d", n, recentWarnings)
	}
	if got := Of(t.Context()).Recent(false); got != nil {
		t.Errorf("a context without a log remembers %q", got)
	}
}

// brokenWriter takes nothing: what nobody can read is remembered all the same.
type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken") }
