// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Recall reads a record about the sensor back: what [Encoder.Append] wrote, and when
// that was decided, in nanoseconds since the Unix epoch. Encoded again it is the same
// record; of From and To whole milliseconds are left, of evidence what JSON has of it,
// and of a process that did something what the evidence says.
func Recall(rec []byte) (i event.SelfInfo, at int64, err error) {
	var r struct {
		Metadata struct {
			LogName     string `json:"log_name"`
			Correlation string `json:"correlation_uid"`
			Tags        []struct{ Name, Value string }
		}
		Time     string `json:"time_dt"`
		Activity string `json:"activity_name"`
		Severity uint8  `json:"severity_id"`
		Status   int    `json:"status_id"`
		Code     string `json:"status_code"`
		Message  string
		Count    uint64
		Start    *int64 `json:"start_time"`
		End      *int64 `json:"end_time"`
		Actor    struct{ User struct{ UID string } }
		Unmapped struct {
			Lost, Suppressed *struct {
				ByType map[string]uint64 `json:"by_type"`
				Ranges []event.Loss
			}
			Sensor map[string]any
		}
	}
	d := json.NewDecoder(bytes.NewReader(rec))
	d.UseNumber() // seqs are exact
	if err := d.Decode(&r); err != nil {
		return i, 0, fmt.Errorf("recall a decision: %w", err)
	}
	stream, ok := strings.CutPrefix(r.Metadata.LogName, "decisions:")
	if !ok {
		return i, 0, fmt.Errorf("recall a decision: it is of log %.40q", r.Metadata.LogName)
	}
	i = event.SelfInfo{
		Name: r.Activity, Severity: r.Severity, Failed: r.Status == 2, Code: r.Code, Message: r.Message, Count: r.Count,
		InvestigationID: r.Metadata.Correlation, Attrs: r.Unmapped.Sensor,
	}
	for _, s := range []event.Decisions{event.DecisionsSystem, event.DecisionsAgents, event.DecisionsApprovals} {
		if s.String() == stream {
			i.Stream = s
		}
	}
	for a := event.ActivityStart; a <= event.ActivitySuppressed; a++ {
		if activityName(&event.SelfInfo{Activity: a}) == r.Activity {
			i.Activity, i.Name = a, ""
		}
	}
	for _, t := range r.Metadata.Tags {
		switch {
		case t.Name == "case_id":
			i.CaseID = t.Value
		case t.Name == "user_id" && t.Value == r.Actor.User.UID: // who decided, not who runs a process
			i.UserID = t.Value
		}
	}
	if r.Start != nil {
		i.From = time.UnixMilli(*r.Start)
	}
	if r.End != nil {
		i.To = time.UnixMilli(*r.End)
	}
	if l := r.Unmapped.Lost; l != nil {
		i.ByKind, i.Losses = l.ByType, l.Ranges
	}
	if l := r.Unmapped.Suppressed; l != nil {
		i.ByKind = l.ByType
	}
	i.Before, _ = i.Attrs["before"].(string)
	i.After, _ = i.Attrs["after"].(string)
	delete(i.Attrs, "before")
	delete(i.Attrs, "after")
	t, err := time.Parse(time.RFC3339Nano, r.Time)
	if err != nil {
		return i, 0, fmt.Errorf("recall a decision: time_dt: %w", err)
	}
	return i, t.UnixNano(), nil
}
