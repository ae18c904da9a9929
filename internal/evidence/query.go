// SPDX-License-Identifier: Apache-2.0

// Package evidence gets records out of a buffer, one that is in use or a file: it
// selects them, writes them as they are delivered, and says what of the wanted ones is
// missing and why; and it examines whether all that should be there is there. It owns
// no goroutine and no file.
package evidence

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// Query says which records are wanted: those that meet each condition that is set.
type Query struct {
	First, Last  uint64    // seqs; 0: from the oldest, to the newest
	Since, Until time.Time // when the event was, the end not included; zero: any time
	Kinds        []string  // of any of these, see MatchKind
	Cases        []string  // collected for any of these
	Streams      []string  // on any of these, see StreamNames
	Envelope     bool      // epoch, seq, stream and state of delivery around each event
}

// The names of a query's parts in an URL.
const (
	keyFirst, keyLast, keySince, keyUntil = "first", "last", "since", "until"
	keyKind, keyCase, keyStream           = "kind", "case", "stream"
	keyEnvelope                           = "envelope"
)

// Values are the query as [ParseQuery] reads it.
func (q *Query) Values() url.Values {
	v := url.Values{}
	for key, n := range map[string]uint64{keyFirst: q.First, keyLast: q.Last} {
		if n > 0 {
			v.Set(key, strconv.FormatUint(n, 10))
		}
	}
	for key, t := range map[string]time.Time{keySince: q.Since, keyUntil: q.Until} {
		if !t.IsZero() {
			v.Set(key, t.UTC().Format(time.RFC3339Nano))
		}
	}
	for key, list := range map[string][]string{keyKind: q.Kinds, keyCase: q.Cases, keyStream: q.Streams} {
		for _, s := range list {
			v.Add(key, s)
		}
	}
	if q.Envelope {
		v.Set(keyEnvelope, "1")
	}
	return v
}

// ParseQuery reads what somebody asks for. What it does not know is an error: a
// condition that was not understood would select too much.
func ParseQuery(v url.Values) (q Query, err error) {
	for key, list := range v {
		if len(list) > 1 && key != keyKind && key != keyCase && key != keyStream {
			return q, fmt.Errorf("%s: is there %d times", key, len(list))
		}
		text := list[0]
		switch key {
		case keyFirst:
			q.First, err = strconv.ParseUint(text, 10, 64)
		case keyLast:
			q.Last, err = strconv.ParseUint(text, 10, 64)
		case keySince:
			q.Since, err = time.Parse(time.RFC3339Nano, text)
		case keyUntil:
			q.Until, err = time.Parse(time.RFC3339Nano, text)
		case keyKind:
			q.Kinds = list
		case keyCase:
			q.Cases = list
		case keyStream:
			q.Streams = list
		case keyEnvelope:
			q.Envelope, err = strconv.ParseBool(text)
		default:
			err = errors.New("is not known")
		}
		if err != nil {
			return q, fmt.Errorf("%.40s: %w", key, err)
		}
	}
	return q, q.Validate()
}

// Validate says what is wrong with q.
func (q *Query) Validate() error {
	if q.Last > 0 && q.Last < q.First {
		return fmt.Errorf("seq %d to %d: ends before it begins", q.First, q.Last)
	}
	if !q.Until.IsZero() && !q.Until.After(q.Since) {
		return fmt.Errorf("until %s: is not after the begin", q.Until.UTC().Format(time.RFC3339))
	}
	for _, k := range q.Kinds {
		if _, err := path.Match(k, ""); err != nil {
			return fmt.Errorf("kind %q: %w", k, err)
		}
	}
	for _, s := range q.Streams {
		if !slices.Contains(StreamNames(), s) {
			return fmt.Errorf("stream %q: must be one of %s", s, strings.Join(StreamNames(), ", "))
		}
	}
	return nil
}

const decisions = "decisions"

// StreamNames are the names that a query knows; decisions are all three streams of
// them.
func StreamNames() []string {
	names := []string{streamName(buffer.Events), decisions}
	for s := buffer.DecisionsSystem; s < buffer.Streams; s++ {
		names = append(names, streamName(s))
	}
	return names
}

func streamName(s buffer.Stream) string {
	switch s {
	case buffer.Events:
		return "events"
	case buffer.DecisionsSystem:
		return decisions + ":system"
	case buffer.DecisionsAgents:
		return decisions + ":agents"
	case buffer.DecisionsApprovals:
		return decisions + ":approvals"
	}
	return fmt.Sprintf("stream:%d", s)
}

// ofStream tells whether records of a stream are wanted.
func (q *Query) ofStream(s buffer.Stream) bool {
	return len(q.Streams) == 0 || slices.Contains(q.Streams, streamName(s)) || s != buffer.Events && slices.Contains(q.Streams, decisions)
}

// reads tells whether a record has to be looked into to be selected.
func (q *Query) reads() bool {
	return !q.Since.IsZero() || !q.Until.IsZero() || len(q.Kinds)+len(q.Cases) > 0
}

// match looks into a record; known is false when it is none that the sensor has written.
func (q *Query) match(rec []byte) (wanted, known bool) {
	h, ok := readHead(rec)
	if !ok {
		return false, false
	}
	if !q.Since.IsZero() || !q.Until.IsZero() {
		t, ok := h.time()
		switch {
		case !ok:
			return false, false
		case t.Before(q.Since), !q.Until.IsZero() && !t.Before(q.Until):
			return false, true
		}
	}
	kind := func(want string) bool { return MatchKind(want, h.code) }
	return (len(q.Kinds) == 0 || slices.ContainsFunc(q.Kinds, kind)) && (len(q.Cases) == 0 || h.tagged("case_id", q.Cases)), true
}

// MatchKind tells whether an event code is meant by a word of somebody: the code, its
// family, its last part, its short name, or a pattern of one of these.
func MatchKind(want, code string) bool {
	family, last, _ := strings.Cut(code, ".")
	for _, name := range []string{code, family, last, ShortKind(code)} {
		if ok, err := path.Match(want, name); err == nil && ok {
			return true
		}
	}
	return false
}

// ShortKind is the name of an event code where there is little room.
func ShortKind(code string) string {
	switch code {
	case "net.connect_failed":
		return "failed"
	case "sensor.lost_events":
		return "lost"
	case "sensor.mode_change":
		return "mode"
	case "sensor.suppressed":
		return "left out"
	case "file.timestomp":
		return "times"
	case "file.move_mount":
		return "move"
	case "file.open_write":
		return "open"
	}
	return code[strings.LastIndexByte(code, '.')+1:]
}

// String says in words what is wanted.
func (q *Query) String() string {
	text := "all records"
	switch {
	case q.First > 0 && q.Last > 0:
		text = fmt.Sprintf("seq %d to %d", q.First, q.Last)
	case q.First > 0:
		text = fmt.Sprintf("from seq %d on", q.First)
	case q.Last > 0:
		text = fmt.Sprintf("all records up to seq %d", q.Last)
	}
	for _, t := range []struct {
		word string
		at   time.Time
	}{{"since", q.Since}, {"until", q.Until}} {
		if !t.at.IsZero() {
			text += fmt.Sprintf(", %s %s", t.word, t.at.UTC().Format(time.RFC3339))
		}
	}
	for _, l := range []struct {
		word string
		list []string
	}{{"of kind", q.Kinds}, {"of case", q.Cases}, {"on stream", q.Streams}} {
		if len(l.list) > 0 {
			text += fmt.Sprintf(", %s %s", l.word, strings.Join(l.list, " or "))
		}
	}
	return text
}
