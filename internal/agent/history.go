// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// decisionsWithin is how long what waits to be durable may take, and scanWithin how
// long the buffer may be read for one answer.
const (
	decisionsWithin = time.Second
	scanWithin      = 30 * time.Second
)

// serveDecisions answers with the decisions that the buffer still has, delivered or
// not, from ?since= on (RFC 3339; without it none), and with ?follow=1 goes on with
// those to come: one JSON document per line, in order. An answer without an end is not
// complete.
func (a *Agent) serveDecisions(w http.ResponseWriter, r *http.Request) {
	var since time.Time
	text := r.URL.Query().Get("since")
	if text != "" {
		var err error
		if since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			http.Error(w, fmt.Sprintf("since %.40q: must be a time such as 2026-01-31T15:04:05Z", text), http.StatusBadRequest)
			return
		}
	}
	v := a.tap.open(true) // before the scan, so that nothing is missed in between
	if v == nil {
		http.Error(w, fmt.Sprintf("all %d live views are taken", tapViewers), http.StatusServiceUnavailable)
		return
	}
	defer a.tap.close(v)
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	last, epoch := uint64(0), a.queue.Epoch()
	if text != "" {
		flush, cancelFlush := context.WithTimeout(r.Context(), decisionsWithin)
		_ = a.queue.Flush(flush) // what is not durable by then comes by the live view
		cancelFlush()
		scan, cancel := context.WithTimeout(r.Context(), scanWithin)
		defer cancel()
		err := a.queue.Scan(scan, since, func(rec buffer.Record) bool {
			last = rec.Seq
			if rec.Stream == buffer.Events {
				return true
			}
			answerBy(w)
			_, err := w.Write(append(rec.Data, '\n'))
			return err == nil
		})
		if err != nil {
			logging.From(r.Context()).Warn("read decisions from the buffer", zap.Error(err))
			_ = rc.Flush()
			panic(http.ErrAbortHandler) // an answer with an end would look complete
		}
	}
	answerBy(w)
	if _, err := w.Write(nil); err == nil && rc.Flush() == nil && r.URL.Query().Get("follow") != "" {
		a.follow(w, r, v, last, epoch)
	}
}

// recall has the sensor remember the decisions of earlier runs that Redis has not
// confirmed: up to where the buffer was at the start, which b says.
func (a *Agent) recall(ctx context.Context, b buffer.Bounds) {
	if b.Acked == b.Last {
		return
	}
	err := a.queue.Scan(ctx, time.Unix(0, 0), func(rec buffer.Record) bool {
		if rec.Stream != buffer.Events && rec.Seq > b.Acked && rec.Seq <= b.Last {
			if err := a.sensor.Recall(rec.Seq, rec.Data); err != nil {
				logging.From(ctx).Warn("a decision of an earlier run cannot be written again if it is lost", zap.Uint64(logging.KeySeq, rec.Seq), zap.Error(err))
			}
		}
		return rec.Seq < b.Last
	})
	if err != nil && ctx.Err() == nil {
		logging.From(ctx).Warn("read the decisions of earlier runs", zap.Error(err))
	}
}

// seqOf reads the sequence number out of a record, 0 when there is none.
func seqOf(rec []byte) uint64 {
	var e struct {
		Metadata struct {
			Sequence uint64 `json:"sequence"`
		} `json:"metadata"`
	}
	_ = json.Unmarshal(rec, &e) // zero then
	return e.Metadata.Sequence
}
