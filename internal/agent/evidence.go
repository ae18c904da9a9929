// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Bounds of what getting evidence out of the buffer may cost the sensor.
const (
	evidenceMost = 2        // walks over the buffer at a time
	evidenceRate = 64 << 20 // bytes a second that one reads: the disk is for the commits
	evidenceStep = 64 << 10 // bytes that a client has controlWrite for
)

// ExportTrailer is the trailer of an export's answer, an evidence.Summary as JSON. An
// answer without it was cut.
const ExportTrailer = "Edr-Export"

// errStopping ends a walk when the sensor is asked to stop.
var errStopping = errors.New("the sensor is stopping")

// evidenceDesk gets evidence out of the buffer for those who may.
type evidenceDesk struct {
	source   evidence.Source
	flush    func(context.Context) error
	decide   func(context.Context, event.SelfInfo)
	stopping func() bool
	busy     chan struct{}
	rate     int64
}

func (a *Agent) newDesk() *evidenceDesk {
	return &evidenceDesk{
		source: a.queue, flush: a.queue.Flush, decide: a.decide, stopping: a.stopping.Load,
		busy: make(chan struct{}, evidenceMost), rate: evidenceRate,
	}
}

func (d *evidenceDesk) mount(c *control) {
	c.handle("GET /buffer", rightStatus, d.serveInfo)
	c.handle("GET /buffer/verify", rightContent, d.serveVerify)
	c.handle("GET /buffer/export", rightContent, d.serveExport)
}

// enter takes one of the places, or answers that there is none.
func (d *evidenceDesk) enter(w http.ResponseWriter) (leave func(), ok bool) {
	if d.stopping() {
		http.Error(w, errStopping.Error(), http.StatusServiceUnavailable)
		return nil, false
	}
	select {
	case d.busy <- struct{}{}:
		return func() { <-d.busy }, true
	default:
		http.Error(w, fmt.Sprintf("%d others read the buffer: wait until one has ended", evidenceMost), http.StatusServiceUnavailable)
		return nil, false
	}
}

// serveInfo says what the buffer holds.
func (d *evidenceDesk) serveInfo(w http.ResponseWriter, _ *http.Request) {
	i := d.source.Info()
	writeJSON(w, evidence.NewInfo(&i))
}

// serveVerify reads the whole buffer and says what is wrong with it.
func (d *evidenceDesk) serveVerify(w http.ResponseWriter, r *http.Request) {
	leave, ok := d.enter(w)
	if !ok {
		return
	}
	defer leave()
	report, err := evidence.Verify(r.Context(), &paced{Source: d.source, desk: d, each: func() { answerBy(w) }})
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	writeJSON(w, report)
}

// serveExport writes the records that the query selects, one JSON document per line,
// and a summary as the trailer. Who gets them is on record before the first of them
// leaves, and again when the last one has.
//
// The client sets the pace, and none of it is the sensor's: nothing is pinned while
// one waits, and what leaves the buffer meanwhile is named as missing. One that takes
// nothing for half a minute is dropped.
func (d *evidenceDesk) serveExport(w http.ResponseWriter, r *http.Request) {
	q, err := evidence.ParseQuery(r.URL.Query())
	if err != nil {
		http.Error(w, "export: "+err.Error(), http.StatusBadRequest)
		return
	}
	leave, ok := d.enter(w)
	if !ok {
		return
	}
	defer leave()
	ctx := r.Context()
	flush, cancel := context.WithTimeout(ctx, decisionsWithin)
	_ = d.flush(flush) // what is not durable by then is not part of it
	cancel()
	p, _ := peerFrom(ctx)
	i := exportDecision(p, &q)
	i.Code, i.Name, i.Message = "EXPORT_STARTED", "Evidence Export Started", p.String()+" gets evidence out of the buffer: "+q.String()
	d.decide(ctx, i)

	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Trailer", ExportTrailer)
	out := bufio.NewWriterSize(timed{w}, evidenceStep)
	s, err := evidence.Export(ctx, &paced{Source: d.source, desk: d, each: func() {}}, q, out)
	if err == nil {
		if err = out.Flush(); err != nil {
			s.Error = err.Error()
		}
	}
	d.decide(context.WithoutCancel(ctx), exported(p, &q, &s))
	if text, merr := json.Marshal(s); merr == nil {
		_ = out.Flush() // what was written until then
		w.Header().Set(ExportTrailer, string(text))
	}
}

func exportDecision(p peer, q *evidence.Query) event.SelfInfo {
	attrs := p.attrs()
	attrs["query"] = q.Values().Encode()
	i := event.SelfInfo{Stream: event.DecisionsApprovals, Severity: 2, UserID: userID(p, ""), Attrs: attrs}
	if len(q.Cases) == 1 && config.Identifier(q.Cases[0]) == nil {
		i.CaseID = q.Cases[0]
	}
	return i
}

// exported is the decision about an export that has ended.
func exported(p peer, q *evidence.Query, s *evidence.Summary) event.SelfInfo {
	i := exportDecision(p, q)
	i.Code, i.Name, i.Count = "EVIDENCE_EXPORTED", "Evidence Exported", s.Records
	i.Message = fmt.Sprintf("%s got %d records out of the buffer: %s", p, s.Records, q)
	i.Attrs["first"], i.Attrs["last"], i.Attrs["bytes"], i.Attrs["sha256"], i.Attrs["epoch"] = s.First, s.Last, s.Bytes, s.SHA256, s.Epoch
	missing := s.More
	for n := range s.Missing {
		missing += s.Missing[n].Count()
	}
	i.Attrs["missing"] = missing
	if s.Error != "" {
		i.Failed, i.Attrs["error"] = true, s.Error
		i.Message += "; it ended early: " + s.Error
	}
	return i
}

// timed gives the client time for each write.
type timed struct{ w http.ResponseWriter }

func (t timed) Write(p []byte) (int, error) {
	answerBy(t.w)
	return t.w.Write(p)
}

// paced is a source that is read no faster than the sensor can spare, and until it is
// asked to stop.
type paced struct {
	evidence.Source
	desk *evidenceDesk
	each func() // per chunk
}

func (p *paced) Walk(ctx context.Context, r buffer.Range, visit func(*buffer.Chunk) bool) error {
	var due time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	var err error
	werr := p.Source.Walk(ctx, r, func(c *buffer.Chunk) bool {
		if p.each(); !visit(c) {
			return false
		}
		// What was not used of the rate is not saved up.
		due = later(due, time.Now()).Add(time.Duration(float64(c.Bytes) / float64(p.desk.rate) * float64(time.Second)))
		timer.Reset(time.Until(due))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		if p.desk.stopping() {
			err = errStopping
		}
		return err == nil
	})
	return errors.Join(err, werr)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
