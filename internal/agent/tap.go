// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"sync/atomic"
	"time"
)

// tap copies encoded events to live viewers. Without viewers it costs one
// atomic load per event; a viewer that cannot follow loses lines, never the
// worker's time.
type tap struct {
	viewers atomic.Int32
	mu      sync.Mutex
	set     map[*viewer]struct{}
}

type viewer struct {
	decisions bool // sees nothing else
	lines     chan []byte
	bytes     atomic.Int64 // of lines
	dropped   atomic.Uint64
}

// took is told of each line out of lines.
func (v *viewer) took(line []byte) { v.bytes.Add(-int64(len(line))) }

const (
	tapLines   = 4096        // a viewer's backlog
	tapBytes   = 4 << 20     // of it, and the line that goes beyond
	tapTold    = time.Second // between two notes of what was dropped, to one who stays behind
	tapViewers = 16
)

// publish offers a copy of rec to every viewer who wants it.
func (t *tap) publish(rec []byte, decision bool) {
	if t.viewers.Load() == 0 {
		return
	}
	var line []byte
	t.mu.Lock()
	defer t.mu.Unlock()
	for v := range t.set {
		if v.decisions && !decision {
			continue
		}
		if v.bytes.Load() >= tapBytes {
			v.dropped.Add(1)
			continue
		}
		if line == nil {
			line = append(append(make([]byte, 0, len(rec)+1), rec...), '\n')
		}
		v.bytes.Add(int64(len(line)))
		select {
		case v.lines <- line:
		default:
			v.took(line)
			v.dropped.Add(1)
		}
	}
}

// open adds a viewer, or returns nil when there are too many.
func (t *tap) open(decisions bool) *viewer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.set) >= tapViewers {
		return nil
	}
	if t.set == nil {
		t.set = map[*viewer]struct{}{}
	}
	v := &viewer{decisions: decisions, lines: make(chan []byte, tapLines)}
	t.set[v] = struct{}{}
	t.viewers.Add(1)
	return v
}

func (t *tap) close(v *viewer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.set[v]; ok {
		delete(t.set, v)
		t.viewers.Add(-1)
	}
}
