// SPDX-License-Identifier: Apache-2.0

package ptytest

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// screen is what a terminal shows.
type screen struct {
	width, height  int
	normal, other  grid
	x, y           int
	alternate      bool
	savedX, savedY int
	hidden, noWrap bool
	painted        bool
	rest           []byte // of a sequence that is not complete
	findings       []string
	ended, marked  bool // the program has; and all of its output is here
}

func newScreen(width, height int) screen {
	return screen{width: width, height: height, normal: newGrid(width, height), other: newGrid(width, height)}
}

func (s *screen) cells() grid {
	if s.alternate {
		return s.other
	}
	return s.normal
}

func (s *screen) state() State {
	st := State{Alternate: s.alternate, Hidden: s.hidden, NoWrap: s.noWrap, Painted: s.painted, Findings: slices.Clone(s.findings), marked: s.marked}
	for _, row := range s.cells() {
		text := strings.ReplaceAll(string(row), "\x00", "")
		st.Rows = append(st.Rows, strings.TrimRight(text, " "))
	}
	return st
}

func (s *screen) resize(width, height int) {
	for _, g := range []*grid{&s.normal, &s.other} {
		next := newGrid(width, height)
		for y := range min(height, len(*g)) {
			copy(next[y], (*g)[y])
		}
		*g = next
	}
	s.width, s.height = width, height
	s.x, s.y = min(s.x, width), min(s.y, height-1)
}

func (s *screen) found(format string, args ...any) {
	if len(s.findings) < 100 {
		s.findings = append(s.findings, fmt.Sprintf(format, args...))
	}
}

func (s *screen) write(p []byte) {
	p = append(s.rest, p...)
	for len(p) > 0 {
		n := s.one(p)
		if n == 0 {
			break
		}
		p = p[n:]
	}
	s.rest = slices.Clone(p)
}

// one takes one character or sequence, and tells how long it was; 0: it is not
// complete.
func (s *screen) one(p []byte) int {
	switch c := p[0]; {
	case c == '\r':
		s.x = 0
	case c == '\n':
		s.down()
	case c == mark[0] && s.ended:
		s.marked = true
	case c == 0x1b:
		return s.sequence(p)
	case c < ' ' || c == 0x7f:
		s.found("control character %#02x in row %d", c, s.y)
	default:
		if !utf8.FullRune(p) {
			return 0
		}
		r, n := utf8.DecodeRune(p)
		if r == utf8.RuneError && n == 1 || r >= 0x80 && r < 0xa0 {
			s.found("byte %#02x, which is no character", c)
		}
		s.put(r)
		return n
	}
	return 1
}

func (s *screen) down() {
	if s.y < s.height-1 {
		s.y++
		return
	}
	g := s.cells()
	copy(g, g[1:])
	g[s.height-1] = blankRow(s.width)
}

func (s *screen) put(r rune) {
	cells := 1
	if r >= 0x2e80 {
		cells = 2
	}
	if s.x+cells > s.width {
		s.found("row %d is longer than %d columns: %q", s.y, s.width, string(s.cells()[s.y]))
		if s.noWrap {
			s.x = s.width - cells
		} else {
			s.x = 0
			s.down()
		}
	}
	row := s.cells()[s.y]
	row[s.x] = r
	for i := 1; i < cells; i++ {
		row[s.x+i] = 0
	}
	s.x += cells
}

// sequence takes one that begins with ESC.
func (s *screen) sequence(p []byte) int {
	if len(p) < 2 {
		return 0
	}
	if p[1] != '[' {
		s.found("sequence ESC %q", p[1])
		return 2
	}
	end := slices.IndexFunc(p[2:], func(b byte) bool { return b >= 0x40 })
	if end < 0 {
		return 0
	}
	args, final := string(p[2:2+end]), p[2+end]
	g := s.cells()
	clear := func(row []rune) { copy(row, blankRow(len(row))) }
	switch what := args + string(final); {
	case what == "H":
		s.x, s.y = 0, 0
	case what == "K":
		clear(g[s.y][min(s.x, s.width):])
	case what == "2K":
		clear(g[s.y])
	case what == "J":
		clear(g[s.y][min(s.x, s.width):])
		for _, row := range g[s.y+1:] {
			clear(row)
		}
	case what == "2J":
		for _, row := range g {
			clear(row)
		}
	case what == "?1049h":
		s.alternate, s.savedX, s.savedY = true, s.x, s.y
		s.other = newGrid(s.width, s.height)
	case what == "?1049l":
		s.alternate, s.x, s.y = false, s.savedX, s.savedY
	case what == "?25h", what == "?25l":
		s.hidden = final == 'l'
	case what == "?7h", what == "?7l":
		s.noWrap = final == 'l'
	case final == 'm' && strings.Trim(args, "0123456789;") == "":
		s.painted = s.painted || args != "0" && args != ""
	default:
		s.found("sequence ESC [ %s", what)
	}
	return 3 + end
}
