// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/cases"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/transport"
)

// Status is the answer of /status: what the sensor is, does, misses and holds.
type Status struct {
	Version   string            `json:"version"`
	AgentID   string            `json:"agent_id"`
	Mode      Mode              `json:"mode"`
	Reason    string            `json:"reason"`
	Since     time.Time         `json:"since"`
	Ready     bool              `json:"ready"`    // as /readyz
	Problems  []Problem         `json:"problems"` // worst first; the first one made the mode
	Scope     string            `json:"scope"`
	Context   map[string]string `json:"context,omitempty"` // the case the whole run belongs to
	Cases     []cases.Case      `json:"cases,omitempty"`   // on the control socket only
	Coverage  []Covered         `json:"coverage"`
	Sensor    sensor.Stats      `json:"sensor"`
	Rates     *Rates            `json:"rates,omitempty"` // none in the first moments
	Buffer    BufferStatus      `json:"buffer"`
	Transport TransportStatus   `json:"transport"`
	Warnings  []json.RawMessage `json:"warnings,omitempty"` // the newest lines of the log that are some, oldest first; on the control socket only
	Errors    []string          `json:"errors,omitempty"`   // what could not be read for this answer
}

// Covered says by what an event is seen on this host.
type Covered struct {
	Event    string   `json:"event"`
	Hook     string   `json:"hook"` // empty: not seen
	Required bool     `json:"required"`
	Blind    string   `json:"blind,omitempty"`  // by which way the event happens unseen in spite of the hook
	Errors   []string `json:"errors,omitempty"` // why better hooks were refused
}

// BufferStatus is the state of the disk buffer. Counts are records.
type BufferStatus struct {
	Epoch       string     `json:"epoch"`
	First       uint64     `json:"first"` // oldest seq that can be read
	Acked       uint64     `json:"acked"` // newest seq delivered
	Last        uint64     `json:"last"`  // newest seq durable
	Records     uint64     `json:"records"`
	Unsent      uint64     `json:"unsent"`
	Bytes       int64      `json:"bytes"`
	UnsentBytes int64      `json:"unsent_bytes"`
	Cap         int64      `json:"cap"`
	FullIn      *float64   `json:"full_in_seconds,omitempty"` // until undelivered records have to go; absent when they are sent as they come
	Truncated   uint64     `json:"truncated"`                 // as buffer_truncations_total
	Corrupt     uint64     `json:"corrupt"`
	Losses      int        `json:"losses"` // loss ranges that no delivered record names yet
	Oldest      *time.Time `json:"oldest_unsent,omitempty"`
	Hazards     []string   `json:"hazards,omitempty"`      // why its directory is a bad place
	ResizeError string     `json:"resize_error,omitempty"` // why Cap is not buffer.cap
	Error       string     `json:"error,omitempty"`        // why commits fail at the moment
	Salvaged    uint64     `json:"salvaged"`               // as buffer_salvaged_records_total

	Recovery    *evidence.Recovery `json:"recovery,omitempty"` // the last time that this run replaced a damaged file
	Quarantined int64              `json:"quarantined_bytes"`  // of damaged files and chunks beside the buffer
}

func bufferStatus(s buffer.Stats) BufferStatus {
	b := BufferStatus{
		Epoch: s.Epoch, First: s.First, Acked: s.Acked, Last: s.Last, Records: s.Records, Unsent: s.Unsent, Bytes: s.Bytes, UnsentBytes: s.UnsentBytes, Cap: s.Cap,
		Truncated: s.Truncated, Corrupt: s.Corrupt, Losses: s.Losses, Salvaged: s.Salvaged, Hazards: hazards(s),
		Recovery: evidence.NewRecovery(s.Recovery), Quarantined: s.Quarantined,
	}
	if s.Resized != nil && s.Resized.Err != nil {
		b.ResizeError = s.Resized.Err.Error()
	}
	if !s.OldestUnsent.IsZero() {
		b.Oldest = &s.OldestUnsent
	}
	if s.Err != nil {
		b.Error = s.Err.Error()
	}
	return b
}

// hazards are those of the buffer's place, in words.
func hazards(s buffer.Stats) []string {
	out := []string{}
	for _, h := range s.Hazards {
		out = append(out, h.String())
	}
	return out
}

// TransportStatus is the sender's state, or that there is none.
type TransportStatus struct {
	State      string     `json:"state"` // a transport phase, or "off" without Redis
	Address    string     `json:"address,omitempty"`
	Node       string     `json:"node,omitempty"` // the server dialled last
	Since      *time.Time `json:"since,omitempty"`
	ErrorClass string     `json:"error_class,omitempty"`
	Error      string     `json:"error,omitempty"`
	Hint       string     `json:"hint,omitempty"`
	Warning    string     `json:"warning,omitempty"` // the risks, see transport.Risk
	Acked      uint64     `json:"acked"`
	LastReply  *time.Time `json:"last_reply,omitempty"`
	Refused    uint64     `json:"refused"`                // as transport_refused_records_total
	Refusal    *Refusal   `json:"last_refused,omitempty"` // the last of them
}

// Refusal is a record that Redis does not take, see RECORD_REFUSED.
type Refusal struct {
	Seq   uint64 `json:"seq"`
	Bytes int    `json:"bytes"`
	Path  string `json:"path"` // of its copy
	Error string `json:"error"`
	Hint  string `json:"hint"`
}

func (a *Agent) status() Status {
	mode := a.mode.current.Load()
	stats, rates := a.queue.Stats(), a.pace.rates(time.Now())
	s := Status{
		Version: a.identity.Version, AgentID: a.place.Load().agent, Mode: mode.Mode, Reason: mode.Reason, Since: mode.Since, Ready: mode.ready(), Problems: mode.Problems,
		Scope:   a.cfg.Sensor.Scope.String(),
		Context: map[string]string{}, Coverage: []Covered{},
		Rates:     rates,
		Buffer:    bufferStatus(stats),
		Transport: TransportStatus{State: "off"},
	}
	for key, value := range map[string]string{
		logging.KeyCaseID: a.identity.CaseID, logging.KeyInvestigationID: a.identity.InvestigationID, logging.KeyUserID: a.identity.UserID,
	} {
		if value != "" {
			s.Context[key] = value
		}
	}
	for _, c := range a.sensor.Coverage() {
		s.Coverage = append(s.Coverage, Covered{Event: c.Event, Hook: c.Hook, Required: c.Required, Blind: c.Blind, Errors: c.Errs})
	}
	var err error
	if s.Sensor, err = a.sensor.Stats(); err != nil {
		s.Errors = append(s.Errors, err.Error())
	}
	if a.sender != nil {
		s.Transport = transportStatus(a.sender.State())
	}
	s.Buffer.FullIn = fullIn(stats, rates, time.Now(), s.Transport.State == string(transport.Connected))
	return s
}

func transportStatus(t transport.State) TransportStatus {
	s := TransportStatus{
		State: string(t.Phase), Address: t.Address, Since: &t.Since, ErrorClass: string(t.Class), Error: t.Error, Hint: t.Hint, Acked: t.Acked, Node: t.Node, Refused: t.Refusals,
	}
	if t.Refusals > 0 {
		r := Refusal(t.Refused)
		s.Refusal = &r
	}
	for i, r := range t.Risks {
		if i > 0 {
			s.Warning += "; "
		}
		s.Warning += r.Text
	}
	if !t.LastReply.IsZero() {
		s.LastReply = &t.LastReply
	}
	return s
}
