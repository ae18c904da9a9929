// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"sync/atomic"
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
	dropped   atomic.Uint64
}

const (
	tapLines   = 4096 // a viewer's backlog
	tapViewers = 16
)

// publish offers a copy of rec to every viewer who wants it.
func (t *tap) publish(rec []byte, decision bool) {
	if t.viewers.Load() == 0 {
		return
	}
	line := append(append(make([]byte, 0, len(rec)+1), rec...), '\n')
	t.mu.Lock()
	defer t.mu.Unlock()
	for v := range t.set {
		if v.decisions && !decision {
			continue
		}
		select {
		case v.lines <- line:
		default:
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
