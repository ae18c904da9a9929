// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"
)

// Position is a place that gives a value: in a file, or in the environment.
type Position struct {
	Source       string // file, or "environment NAME"
	Line, Column int    // from 1; 0 when Source is not a file
}

// String returns "file:line:column", or the source alone.
func (p Position) String() string {
	if p.Line == 0 {
		return p.Source
	}
	return fmt.Sprintf("%s:%d:%d", p.Source, p.Line, p.Column)
}

// Problem is one defect of the configuration.
type Problem struct {
	Position Position
	Key      string // as typed, e.g. "buffer.cap"; empty when the file cannot be parsed
	Value    string // as typed; empty for a missing or secret one
	What     string // what is wrong
	Remedy   string // what to do, may be empty
}

// Error returns position, key, value, defect and remedy in one line.
func (p *Problem) Error() string {
	var b strings.Builder
	if s := p.Position.String(); s != "" {
		b.WriteString(s + ": ")
	}
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	if p.Value != "" {
		b.WriteString(quote(p.Value) + " ")
	}
	b.WriteString(p.What)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return b.String()
}

// Problems lists the problems that the error of [Load] joins.
func Problems(err error) []*Problem {
	switch e := err.(type) { //nolint:errorlint // this walks the tree itself
	case nil:
		return nil
	case *Problem:
		return []*Problem{e}
	case interface{ Unwrap() []error }:
		var out []*Problem
		for _, sub := range e.Unwrap() {
			out = append(out, Problems(sub)...)
		}
		return out
	default:
		return []*Problem{{What: err.Error()}}
	}
}

// quote makes a value safe and short enough for one line.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "…"
	}
	return fmt.Sprintf("%q", s)
}
