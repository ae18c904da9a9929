// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const lifecycleClass = `"category_uid":6,"category_name":"Application Activity","class_uid":6002,"class_name":"Application Lifecycle",`

// self is what a record about the sensor says; one with nothing in it says that.
func (e *Encoder) self(ev *event.Event) *event.SelfInfo {
	if ev.Kind == event.Lifecycle && ev.Self != nil {
		return ev.Self
	}
	return &e.unknown
}

func activityName(s *event.SelfInfo) string {
	switch s.Activity {
	case event.ActivityStart:
		return "Start"
	case event.ActivityStop:
		return "Stop"
	case event.ActivityDegraded:
		return "Degraded"
	case event.ActivityLost:
		return "Lost Events"
	case event.ActivityMode:
		return "Mode Change"
	case event.ActivitySuppressed:
		return "Suppressed"
	}
	return or(s.Name, "Other")
}

// appendCode appends an activity's name as part of an event code: lower-case
// letters and digits, other characters as one underscore.
func appendCode(dst []byte, name string) []byte {
	gap := false
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if ('a' > c || c > 'z') && ('0' > c || c > '9') {
			gap = true
			continue
		}
		if gap {
			dst = append(dst, '_')
		}
		dst, gap = append(dst, c), false
	}
	return dst
}

// lifecycle writes what the sensor says about itself. It is rare, so it may
// allocate.
func (e *Encoder) lifecycle(w *writer, ev *event.Event, s *event.SelfInfo) {
	w.raw(lifecycleClass)
	switch s.Activity {
	case event.ActivityStart:
		w.raw(`"activity_id":3,"activity_name":"Start","type_uid":600203,"type_name":"Application Lifecycle: Start",`)
	case event.ActivityStop:
		w.raw(`"activity_id":4,"activity_name":"Stop","type_uid":600204,"type_name":"Application Lifecycle: Stop",`)
	default:
		w.raw(`"activity_id":99,`)
		w.str(`"activity_name":`, activityName(s))
		w.raw(`"type_uid":600299,"type_name":"Application Lifecycle: Other",`)
	}
	w.raw(severity(s.Severity))
	if s.Failed {
		w.raw(failure)
	} else {
		w.raw(success)
	}
	w.opt(`"status_code":`, s.Code)
	w.opt(`"message":`, s.Message)
	if s.Count > 0 {
		w.uint(`"count":`, s.Count)
	}
	if !s.From.IsZero() {
		w.int(`"start_time":`, s.From.UnixMilli())
	}
	if !s.To.IsZero() {
		w.int(`"end_time":`, s.To.UnixMilli())
	}
	w.raw(e.device)
	w.raw(e.app)
	if ev.Subject != nil {
		w.actor(ev.Subject, ev.Actor, 0)
	} else if s.UserID != "" {
		w.open(`"actor":{"user":{`)
		w.str(`"uid":`, s.UserID)
		w.close('}')
		w.close('}')
	}
	w.open(`"unmapped":{`)
	w.losses(s)
	w.sensor(s)
	w.close('}')
}

func severity(id uint8) string {
	switch id {
	case 0, 1:
		return informational
	case 2:
		return `"severity_id":2,"severity":"Low",`
	case 3:
		return `"severity_id":3,"severity":"Medium",`
	case 4:
		return `"severity_id":4,"severity":"High",`
	case 5:
		return `"severity_id":5,"severity":"Critical",`
	case 6:
		return `"severity_id":6,"severity":"Fatal",`
	}
	return `"severity_id":99,"severity":"Other",`
}

// losses names what will not be delivered: seq ranges of the buffer, or events
// that the kernel had no room for or was told to leave out, by event code.
func (w *writer) losses(s *event.SelfInfo) {
	if s.Activity != event.ActivityLost && len(s.Losses) == 0 && len(s.ByKind) == 0 {
		return
	}
	if s.Activity == event.ActivitySuppressed {
		w.open(`"suppressed":{`)
	} else {
		w.open(`"lost":{`)
	}
	w.uint(`"events":`, s.Count)
	if len(s.ByKind) > 0 {
		w.open(`"by_type":{`)
		for _, code := range slices.Sorted(maps.Keys(s.ByKind)) {
			w.b = append(appendQuoted(w.b, code), ':')
			w.uint(``, s.ByKind[code])
		}
		w.close('}')
	}
	if len(s.Losses) > 0 {
		w.open(`"ranges":[`)
		for _, l := range s.Losses {
			w.open(`{`)
			w.str(`"cause":`, l.Cause)
			w.uint(`"first":`, l.First)
			w.uint(`"last":`, l.Last)
			w.uint(`"count":`, l.Count)
			w.close('}')
		}
		w.close(']')
	}
	w.close('}')
}

// sensor writes the evidence that only this product knows how to read.
func (w *writer) sensor(s *event.SelfInfo) {
	if s.Before == "" && s.After == "" && len(s.Attrs) == 0 {
		return
	}
	w.open(`"sensor":{`)
	w.opt(`"before":`, s.Before)
	w.opt(`"after":`, s.After)
	for _, name := range slices.Sorted(maps.Keys(s.Attrs)) {
		if name == "before" || name == "after" {
			continue
		}
		w.b = append(appendQuoted(w.b, name), ':')
		w.b = append(appendAny(w.b, s.Attrs[name]), ',')
	}
	w.close('}')
}

// appendAny appends v as JSON, or the reason why it has none.
func appendAny(dst []byte, v any) []byte {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return appendQuoted(dst, "not encodable: "+err.Error())
	}
	return append(dst, bytes.TrimSuffix(buf.Bytes(), []byte{'\n'})...)
}
