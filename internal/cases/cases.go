// SPDX-License-Identifier: Apache-2.0

// Package cases keeps the open cases: which there are, what each covers, for whom
// and until when. It keeps them in a file, so that they outlive the sensor's process,
// and ends them in time. What is done with an open case (ids on events, deep
// collection) is the worker's part, and making a decision known the caller's.
package cases

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// How long a case may be open.
const (
	MinTTL     = time.Minute
	DefaultTTL = 4 * time.Hour
	MaxTTL     = 30 * 24 * time.Hour
)

// Why a case cannot be opened or closed.
var (
	// ErrOpen is returned for an id that an open case has.
	ErrOpen = errors.New("is open already: close it first, or use another id")
	// ErrFull is returned when there are event.MaxCases open.
	ErrFull = fmt.Errorf("not opened: %d cases are open, which is the most there can be: close one", event.MaxCases)
	// ErrFile is returned when the file of the cases cannot be written.
	ErrFile = errors.New("the open cases cannot be kept")
	// ErrNotOpen is returned for an id that no open case has.
	ErrNotOpen = errors.New("is not open: edr-sensor case list shows those that are")
)

// Collect says how much a case has collected of its scope.
type Collect string

// The ways to collect.
const (
	Normal Collect = "normal" // as for everybody
	Deep   Collect = "deep"   // everything that the sensor can see
)

// Case is one case. Times are UTC.
type Case struct {
	ID              string    `json:"case_id"`
	InvestigationID string    `json:"investigation_id,omitempty"`
	UserID          string    `json:"user_id,omitempty"` // who opened it
	Scope           Scope     `json:"scope"`
	Collect         Collect   `json:"collect"`
	Opened          time.Time `json:"opened"`
	Until           time.Time `json:"until"`
	// Tagged is how many events carry its ids; at least so many, if AtLeast is set: a
	// sensor that was killed knew of more than it had written down, and a worker that
	// does not answer goes on tagging.
	Tagged  uint64 `json:"tagged"`
	AtLeast bool   `json:"tagged_at_least,omitempty"`

	// Roots are what is left of a subtree where parents have ended.
	Roots []Root `json:"roots,omitempty"`

	live *event.Case // what the worker has
}

// Root is a process by which a part of a subtree is found again.
type Root struct {
	PID       uint32 `json:"pid"`
	StartTime uint64 `json:"start_time"` // nanoseconds since boot
}

const maxRoots = 1024 // of a case

// String names the case for people.
func (c *Case) String() string { return fmt.Sprintf("case %s on %s", c.ID, c.Scope) }

// check finds what is wrong with a case.
func (c *Case) check() error {
	for _, f := range [...]struct{ name, id string }{{"case_id", c.ID}, {"investigation_id", c.InvestigationID}, {"user_id", c.UserID}} {
		if err := config.Identifier(f.id); err != nil {
			return fmt.Errorf("%s %w", f.name, err)
		}
	}
	if c.ID == "" {
		return errors.New("case_id is missing: name the case")
	}
	if c.Collect != Normal && c.Collect != Deep {
		return fmt.Errorf("collect %.20q: write %s or %s", c.Collect, Normal, Deep)
	}
	if ttl := c.Until.Sub(c.Opened); ttl < MinTTL || ttl > MaxTTL {
		return fmt.Errorf("ttl %v: write one from %v to %v", ttl, MinTTL, MaxTTL)
	}
	if len(c.Roots) > maxRoots {
		return fmt.Errorf("%d roots, at most %d are kept", len(c.Roots), maxRoots)
	}
	_, err := c.Scope.event()
	return err
}

// Set is the open cases, the oldest first, and their file. Not safe for concurrent use.
type Set struct {
	path   string
	bootID string
	open   []*Case
	stale  bool
}

// Stale reports whether the file has to be written again, with Save or End.
func (s *Set) Stale() bool { return s.stale }

// Open adds a case that begins now, once it is in the file. Its Opened and Until must
// be set; nothing is changed on an error.
func (s *Set) Open(c Case) error {
	if err := c.check(); err != nil {
		return err
	}
	if s.find(c.ID) >= 0 {
		return fmt.Errorf("case %s %w", c.ID, ErrOpen)
	}
	if len(s.open) >= event.MaxCases {
		return fmt.Errorf("case %s %w", c.ID, ErrFull)
	}
	added := c.start()
	s.open = append(s.open, added)
	if err := s.Save(); err != nil {
		s.open = s.open[:len(s.open)-1]
		return fmt.Errorf("case %s not opened: %w", c.ID, err)
	}
	return nil
}

// start makes what the worker needs of a case that check found good.
func (c Case) start() *Case {
	scope, _ := c.Scope.event()
	c.live = &event.Case{
		ID: c.ID, InvestigationID: c.InvestigationID, UserID: c.UserID, Opened: c.Opened, Deep: c.Collect == Deep, Scope: scope,
	}
	c.live.Tagged.Store(c.Tagged)
	for _, r := range c.Roots {
		c.live.Roots = append(c.live.Roots, event.ProcessKey{PID: r.PID, StartTime: r.StartTime})
	}
	return &c
}

// Close takes a case out; Recount when the worker knows. It is closed even when the error
// tells that the file could not be written, in which case a restart would open it again.
func (s *Set) Close(id string) (Case, error) {
	i := s.find(id)
	if i < 0 {
		return Case{}, fmt.Errorf("case %.128s %w", id, ErrNotOpen)
	}
	c := s.open[i].view()
	s.open = slices.Delete(slices.Clone(s.open), i, i+1)
	return c, s.Save()
}

// Expire takes out the cases whose time is over; Recount when the worker knows. It
// leaves the file stale.
func (s *Set) Expire(now time.Time) (over []Case) {
	if !slices.ContainsFunc(s.open, func(c *Case) bool { return c.over(now) }) {
		return nil
	}
	var left []*Case
	for _, c := range s.open {
		if c.over(now) {
			over = append(over, c.view())
		} else {
			left = append(left, c)
		}
	}
	s.open, s.stale = left, true
	return over
}

func (c *Case) over(now time.Time) bool { return !now.Before(c.Until) }

// SetRoots keeps by which processes the cases of subtrees are found again in the next
// run. It leaves the file stale when something changed.
func (s *Set) SetRoots(all map[*event.Case][]event.ProcessKey) {
	for _, c := range s.open {
		keys, ok := all[c.live]
		if !ok {
			continue
		}
		roots := make([]Root, 0, len(keys))
		for _, k := range keys[:min(len(keys), maxRoots)] {
			roots = append(roots, Root{k.PID, k.StartTime})
		}
		if !slices.Equal(roots, c.Roots) {
			c.Roots, s.stale = roots, true
		}
	}
}

// List returns the open cases, the oldest first.
func (s *Set) List() []Case {
	list := make([]Case, len(s.open))
	for i, c := range s.open {
		list[i] = c.view()
		list[i].Roots = nil // the sensor's own business
	}
	return list
}

// view is a case as it is now, to keep.
func (c *Case) view() Case {
	v := *c
	v.Tagged = c.live.Tagged.Load()
	return v
}

// Recount brings Tagged of a case that was taken out up to date: the worker tags for it
// until it knows. Last says that it does.
func (c *Case) Recount(last bool) {
	c.Tagged, c.AtLeast = c.live.Tagged.Load(), c.AtLeast || !last
}

// Events returns the open cases for the worker, the oldest first. What it points to
// stays the same for as long as the case is open.
func (s *Set) Events() []*event.Case {
	list := make([]*event.Case, len(s.open))
	for i, c := range s.open {
		list[i] = c.live
	}
	return list
}

// Len is how many cases are open.
func (s *Set) Len() int { return len(s.open) }

func (s *Set) find(id string) int {
	return slices.IndexFunc(s.open, func(c *Case) bool { return c.ID == id })
}
