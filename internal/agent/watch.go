// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// clockSlack is how far the wall clock may move away from the time since boot
// between two looks before it counts as set: more than any adjustment by NTP.
const clockSlack = time.Second

// moment is what the watch looks at, all of one time.
type moment struct {
	stats buffer.Stats
	now   time.Time
	boot  time.Duration // since boot, suspended time included
}

func (a *Agent) moment(now time.Time) moment {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // known to every kernel since 2.6.39
	return moment{a.queue.Stats(), now, time.Duration(ts.Nano())}
}

// watch finds in what changed between two moments what has to be made known: that
// the buffer drops records, is damaged or cannot write, and that the clock was set.
type watch struct {
	last     moment
	episode  episode
	failing  string // the buffer's error, "" when it writes
	failedAt time.Time
}

// episode is a time in which the buffer drops its oldest records.
type episode struct {
	from, to    time.Time // from is zero when there is none
	first, last uint64    // seqs that enclose what was dropped
	before      uint64    // dropped before it began, over the life of the file
}

// begin is the first look; it returns what is to be said of the file as it was
// opened.
func (w *watch) begin(m moment) (out []event.SelfInfo) {
	w.last = m
	s := m.stats
	if s.Recovery != nil {
		out = append(out, setAside(s))
	}
	if s.Last == 0 || s.Recovery != nil && !s.Recovery.Exact {
		out = append(out, event.SelfInfo{
			Name: "Buffer New", Severity: 1, Code: "BUFFER_NEW", After: s.Epoch, Message: "the buffer begins with a new epoch",
			Attrs: map[string]any{"cap_bytes": s.Cap},
		})
	}
	if s.Resized != nil {
		out = append(out, resized(*s.Resized))
	}
	return out
}

// resized tells how a wish for another size ended.
func resized(r buffer.Resized) event.SelfInfo {
	i := event.SelfInfo{
		Before: config.FormatSize(r.From), After: config.FormatSize(r.To), Count: r.Dropped,
		Attrs: map[string]any{"from_bytes": r.From, "to_bytes": r.To},
	}
	if r.Err != nil {
		i.Name, i.Code, i.Severity, i.Failed, i.After = "Buffer Resize Refused", "BUFFER_RESIZE_REFUSED", 3, true, i.Before
		i.Message, i.Attrs["error"] = "the buffer keeps its size: "+r.Err.Error(), r.Err.Error()
		return i
	}
	i.Name, i.Code, i.Severity = "Buffer Resized", "BUFFER_RESIZED", 1
	i.Message = fmt.Sprintf("the buffer has another size; %d records that had not been delivered were dropped for it", r.Dropped)
	if r.Dropped > 0 {
		i.Severity = 4
	}
	return i
}

// setAside tells of a damaged file that was replaced.
func setAside(s buffer.Stats) event.SelfInfo {
	r := s.Recovery
	i := event.SelfInfo{
		Name: "Buffer Set Aside", Severity: 5, Failed: true, Code: "BUFFER_SET_ASIDE", Count: r.Lost,
		Attrs: map[string]any{"path": r.Aside, "error": r.Cause.Error(), "salvaged": r.Salvaged, "exact": r.Exact, "epoch": s.Epoch},
	}
	if r.Exact {
		i.Message = fmt.Sprintf("the buffer's file is damaged: %d records were salvaged, %d are lost, each of them named", r.Salvaged, r.Lost)
	} else {
		i.Message = fmt.Sprintf("the buffer's file is damaged: %d records were salvaged; how many are lost is unknown", r.Salvaged)
	}
	return i
}

// step compares m with the moment before.
func (w *watch) step(m moment) (out []event.SelfInfo) {
	before := w.last
	w.last = m
	out = append(out, w.truncation(before.stats, m)...)
	if e := m.stats.Epoch; e != before.stats.Epoch && before.stats.Epoch != "" {
		out = append(out, event.SelfInfo{
			Name: "Buffer New", Severity: 3, Code: "BUFFER_NEW", Before: before.stats.Epoch, After: e, Count: m.stats.Unsent,
			Message: fmt.Sprintf("%d records that had not been delivered go on in a new epoch", m.stats.Unsent),
		})
	}
	if r := m.stats.Recovery; r != nil && r != before.stats.Recovery {
		out = append(out, setAside(m.stats))
	}
	if r := m.stats.Resized; r != nil && r != before.stats.Resized {
		out = append(out, resized(*r))
	}
	if n := m.stats.Corrupt - before.stats.Corrupt; m.stats.Corrupt > before.stats.Corrupt {
		out = append(out, event.SelfInfo{
			Name: "Buffer Damaged", Severity: 4, Failed: true, Code: "BUFFER_DAMAGED", Count: n,
			Message: fmt.Sprintf("%d records are lost to damage of the buffer's file", n),
			Attrs:   map[string]any{"corrupt": m.stats.Corrupt, "epoch": m.stats.Epoch},
		})
	}
	out = append(out, w.writing(m)...)
	if jump := m.now.Sub(before.now.Round(0)) - (m.boot - before.boot); jump > clockSlack || jump < -clockSlack {
		out = append(out, event.SelfInfo{
			Name: "Clock Jump", Severity: 3, Code: "CLOCK_JUMP", Before: m.now.Add(-jump).UTC().Format(time.RFC3339Nano), After: m.now.UTC().Format(time.RFC3339Nano),
			Message: fmt.Sprintf("the wall clock was set by %s", jump.Round(time.Millisecond)), Attrs: map[string]any{"seconds": jump.Seconds()},
		})
	}
	return out
}

func (w *watch) truncation(before buffer.Stats, m moment) []event.SelfInfo {
	e, s := &w.episode, m.stats
	growing := s.Truncated > before.Truncated
	starts := growing && e.from.IsZero()
	if starts {
		*e = episode{from: m.now, first: max(before.First, before.Acked+1), before: before.Truncated}
	}
	if growing {
		e.to, e.last = m.now, max(e.first, s.First-1)
	}
	i := event.SelfInfo{
		Severity: 4, Failed: true, Count: s.Truncated - e.before, From: e.from, To: e.to,
		Attrs: map[string]any{"first": e.first, "last": e.last, "epoch": s.Epoch, "unsent": s.Unsent, "cap_bytes": s.Cap, "truncated": s.Truncated},
	}
	switch {
	case starts:
		i.Name, i.Code, i.Before, i.After = "Truncation Started", "TRUNCATION_STARTED", "keeping", "truncating"
		i.Message = fmt.Sprintf("the buffer is full and drops its oldest records: %d so far", i.Count)
	case !growing && !e.from.IsZero() && m.now.Sub(e.to) >= lossHold:
		i.Name, i.Code, i.Before, i.After = "Truncation Ended", "TRUNCATION_ENDED", "truncating", "keeping"
		i.Message = fmt.Sprintf("the buffer drops no records any more: it has dropped %d", i.Count)
		i.Severity = 2
		*e = episode{}
	default:
		return nil
	}
	return []event.SelfInfo{i}
}

// writing tells when the buffer fails to write, and when it does again.
func (w *watch) writing(m moment) []event.SelfInfo {
	now := ""
	if m.stats.Err != nil {
		now = m.stats.Err.Error()
	}
	switch {
	case now != "" && w.failing == "":
		w.failing, w.failedAt = now, m.now
		if !m.stats.ErrSince.IsZero() {
			w.failedAt = m.stats.ErrSince
		}
		return []event.SelfInfo{{
			Name: "Buffer Failed", Severity: 5, Failed: true, Code: "BUFFER_FAILED", Before: "writing", After: "failing", From: w.failedAt,
			Message: "the buffer cannot write: " + now, Attrs: map[string]any{"error": now, "pending_bytes": m.stats.Pending},
		}}
	case now == "" && w.failing != "":
		cause := w.failing
		w.failing = ""
		return []event.SelfInfo{{
			Name: "Buffer Recovered", Severity: 2, Code: "BUFFER_RECOVERED", Before: "failing", After: "writing", From: w.failedAt, To: m.now,
			Message: fmt.Sprintf("the buffer writes again after %s", m.now.Sub(w.failedAt).Round(time.Millisecond)), Attrs: map[string]any{"error": cause},
		}}
	}
	return nil
}
