// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Components lists the values that [KeyComponent] may have. Each has a level.
func Components() []string { return []string{"agent", "sensor", "transport"} }

// Levels are the levels of all components. What is configured holds until it is
// overridden, for all components or for one; the override of one component goes
// before that of all. Safe for concurrent use; reading a level takes no lock.
type Levels struct {
	live       map[string]zap.AtomicLevel // by component, "" for lines of none; never changed
	mu         sync.Mutex
	configured map[string]zapcore.Level
	overrides  map[string]*override
}

type override struct {
	level zapcore.Level
	until time.Time // zero: no end
	timer *time.Timer
}

// Level is one row of [Levels.List].
type Level struct {
	Component  string     `json:"component"` // empty: all that are not named
	Level      string     `json:"level"`
	Configured string     `json:"configured"`
	Until      *time.Time `json:"until,omitempty"` // when Level goes back to Configured
}

// Change is what a change of levels did. An empty Component means all.
type Change struct {
	Component     string
	Before, After string
	Until         time.Time // zero: until it is changed again
}

func newLevels() *Levels {
	l := &Levels{live: map[string]zap.AtomicLevel{"": zap.NewAtomicLevel()}, configured: map[string]zapcore.Level{}, overrides: map[string]*override{}}
	for _, c := range Components() {
		l.live[c] = zap.NewAtomicLevel()
	}
	return l
}

// of is the level that lines of a component are held against.
func (l *Levels) of(component string) zap.AtomicLevel {
	if a, ok := l.live[component]; ok {
		return a
	}
	return l.live[""]
}

// Configure sets what holds without overrides. On an error nothing changes.
func (l *Levels) Configure(level string, components map[string]string) error {
	next := map[string]zapcore.Level{}
	var err error
	if next[""], err = parseLevel(level); err != nil {
		return err
	}
	for _, c := range slices.Sorted(maps.Keys(components)) {
		if err := known(c); err != nil {
			return err
		}
		if components[c] == "" {
			continue // as the others
		}
		if next[c], err = parseLevel(components[c]); err != nil {
			return fmt.Errorf("component %s: %w", c, err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.configured = next
	l.apply()
	return nil
}

func known(component string) error {
	if component != "" && !slices.Contains(Components(), component) {
		return fmt.Errorf("log component %q: must be one of %s", component, strings.Join(Components(), ", "))
	}
	return nil
}

// Override sets the level of a component, or of all when it is empty, for the
// given time or, when that is 0, until it is changed again. When the time is
// over, ended is told from another goroutine.
func (l *Levels) Override(component, level string, lasts time.Duration, ended func(Change)) (Change, error) {
	v, err := parseLevel(level)
	if err == nil {
		err = known(component)
	}
	if err != nil {
		return Change{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := Change{Component: component, Before: l.effective(component).String(), After: level}
	l.drop(component)
	o := &override{level: v}
	if lasts > 0 {
		o.until = time.Now().Add(lasts)
		c.Until = o.until
		o.timer = time.AfterFunc(lasts, func() {
			if back, ok := l.end(component, o); ok {
				ended(back)
			}
		})
	}
	l.overrides[component] = o
	l.apply()
	return c, nil
}

// Reset goes back to what is configured, for one component, or for all and
// everything when it is empty.
func (l *Levels) Reset(component string) (Change, error) {
	if err := known(component); err != nil {
		return Change{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := Change{Component: component, Before: l.effective(component).String()}
	l.drop(component)
	if component == "" {
		for name := range l.overrides {
			l.drop(name)
		}
	}
	l.apply()
	c.After = l.effective(component).String()
	return c, nil
}

// end takes an override back whose time is over, unless another replaced it.
func (l *Levels) end(component string, o *override) (Change, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.overrides[component] != o {
		return Change{}, false
	}
	c := Change{Component: component, Before: l.effective(component).String()}
	l.drop(component)
	l.apply()
	c.After = l.effective(component).String()
	return c, true
}

func (l *Levels) drop(component string) {
	if o := l.overrides[component]; o != nil && o.timer != nil {
		o.timer.Stop()
	}
	delete(l.overrides, component)
}

func (l *Levels) apply() {
	for c, a := range l.live {
		a.SetLevel(l.effective(c))
	}
}

func (l *Levels) effective(component string) zapcore.Level {
	for _, c := range []string{component, ""} {
		if o := l.overrides[c]; o != nil {
			return o.level
		}
	}
	return l.set(component)
}

func (l *Levels) set(component string) zapcore.Level {
	if v, ok := l.configured[component]; ok {
		return v
	}
	return l.configured[""]
}

// List tells the levels: first that of all, then each component's.
func (l *Levels) List() []Level {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Level
	for _, c := range append([]string{""}, Components()...) {
		row := Level{Component: c, Level: l.effective(c).String(), Configured: l.set(c).String()}
		o := l.overrides[c]
		if o == nil {
			o = l.overrides[""]
		}
		if o != nil && !o.until.IsZero() {
			row.Until = &o.until
		}
		out = append(out, row)
	}
	return out
}
