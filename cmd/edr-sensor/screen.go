// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// style is what the place that a screen is shown at can take.
type style struct {
	colour        bool
	ascii         bool // no character beyond ASCII
	width, height int  // of a terminal; 0: it is none, and lines are as long as they get
}

// style finds out about standard output.
func (a *app) style(when string) style {
	s := style{colour: a.colour(when), ascii: !a.utf8()}
	s.width, s.height = terminalSize(a.stdout)
	return s
}

// printable is text as the terminal can show it, if standard output is one.
func (a *app) printable(text string) string {
	if width, _ := terminalSize(a.stdout); width > 0 && !a.utf8() {
		return asciiText(text)
	}
	return text
}

// utf8 tells whether the locale's characters are UTF-8, as setlocale(3) decides. An
// environment that says nothing means C.
func (a *app) utf8() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := strings.ToLower(a.getenv(name)); v != "" {
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return false
}

// terminalSize is zero when w is no terminal. One that does not know its size, such as
// a serial line, gets the size that terminals had.
func terminalSize(w io.Writer) (width, height int) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	switch {
	case err != nil:
		return 0, 0
	case size.Col == 0 || size.Row == 0:
		return 80, 24
	}
	return int(size.Col), int(size.Row)
}

// labelWidth is where the text of a row begins.
const labelWidth = 10

// screen collects lines, none longer than the terminal is wide.
type screen struct {
	style
	lines []string
}

// build begins a line, in which what does not fit is left out.
func (s *screen) build() *lineBuilder {
	return &lineBuilder{colour: s.colour, ascii: s.ascii, limit: s.width}
}

func (s *screen) end(b *lineBuilder) { s.lines = append(s.lines, strings.TrimRight(b.String(), " ")) }

// row adds a line with a label.
func (s *screen) row(label, colour, format string, args ...any) {
	b := s.build()
	b.add(dim, fmt.Sprintf("%-*s", labelWidth, label))
	b.add(colour, fmt.Sprintf(format, args...))
	s.end(b)
}

// text adds somebody's words: made safe, and on at most so many lines.
func (s *screen) text(label, colour, words string, most int) {
	for _, part := range fold(strings.TrimSpace(safe(words)), s.width-labelWidth, most) {
		s.row(label, colour, "%s", part)
		label = ""
	}
}

func (s *screen) String() string { return strings.Join(s.lines, "\n") + "\n" }

// gauge draws shares of a whole: what is used, and of it what could be given up.
func (s *screen) gauge(b *lineBuilder, columns int, used, spare, whole int64) {
	colour := green
	switch {
	case used-spare > whole*9/10:
		colour = red
	case used-spare > whole/2:
		colour = yellow
	}
	cells := func(n int64) int {
		if whole <= 0 || n <= 0 {
			return 0
		}
		return min(columns, int((float64(n)/float64(whole))*float64(columns)+0.5))
	}
	all := cells(used)
	held := min(all, cells(used-spare))
	if used > spare && held == 0 {
		held, all = 1, max(all, 1) // something is not nothing
	}
	b.add(colour, strings.Repeat("█", held))
	b.add(dim, strings.Repeat("▒", all-held)+strings.Repeat("░", columns-all))
}

// fold breaks words into at most so many lines of a width, the last of which says by
// "…" that there was more. Without a width all of it is one line.
func fold(text string, width, most int) (lines []string) {
	if width <= 0 && text != "" {
		return []string{text}
	}
	for text != "" {
		if columns(text) <= width {
			return append(lines, text)
		}
		if len(lines) == most-1 {
			return append(lines, cut(text, width))
		}
		head := cutTo(text, width)
		if head == "" { // not even one character fits
			return append(lines, "…")
		}
		if i := strings.LastIndexByte(head, ' '); i > 0 && text[len(head)] != ' ' {
			head = head[:i]
		}
		lines = append(lines, strings.TrimRight(head, " "))
		text = strings.TrimLeft(text[len(head):], " ")
	}
	return lines
}

// columns is how many cells of a terminal a text takes, at most.
func columns(s string) (n int) {
	for _, r := range s {
		n += runeColumns(r)
	}
	return n
}

// runeColumns is 2 for characters that terminals show wide: the blocks that have some
// of East Asian width W or F in Unicode's UAX 11, and those to come. What takes no
// cell of its own, such as an accent, counts as one: a line may get shorter than the
// terminal is wide, never longer.
func runeColumns(r rune) int {
	switch {
	case r < 0x1100:
		return 1
	case r <= 0x115f, r >= 0xa960 && r <= 0xa97f, r >= 0xac00 && r <= 0xd7ff, // Hangul
		r >= 0x2300 && r <= 0x23ff, r >= 0x2600 && r <= 0x27bf, r >= 0x25fd && r <= 0x25fe, r >= 0x2b00 && r <= 0x2bff, // signs
		r >= 0x2e80 && r <= 0xa4cf, r >= 0xf900 && r <= 0xfaff, // Chinese, Japanese
		r >= 0xfe10 && r <= 0xfe1f, r >= 0xfe30 && r <= 0xfe6f, r >= 0xff00 && r <= 0xff60, r >= 0xffe0 && r <= 0xffef, // wide forms
		r >= 0x16fe0 && r <= 0x1b2ff, r >= 0x1d300 && r <= 0x1d37f, r >= 0x1f000 && r <= 0x1faff, r >= 0x20000: // pictures, later scripts
		return 2
	}
	return 1
}

// asciiText has one ASCII character for each character, so that what was laid out
// stays so. What only --json or -o json can show is a question mark, as ls has it.
func asciiText(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return s
	}
	return strings.Map(func(r rune) rune {
		switch r {
		case '→':
			return '>'
		case '←':
			return '<'
		case '↔':
			return '='
		case '…':
			return '~'
		case '█':
			return '#'
		case '▒':
			return '='
		case '░':
			return '.'
		}
		if r >= utf8.RuneSelf {
			return '?'
		}
		return r
	}, s)
}
