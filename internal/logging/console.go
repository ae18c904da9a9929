// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.uber.org/zap/zapcore"
)

// console is a zapcore.Core that writes lines for people:
//
//	15:04:05.123 WARN  redis is away, buffering   component=transport attempt=3
//
// It is not built for speed; nothing logs per event.
type console struct {
	zapcore.LevelEnabler
	out     zapcore.WriteSyncer
	fields  []zapcore.Field
	colour  bool
	journal bool
}

const messageWidth = 36 // where fields start, so that they line up in most lines

func (c *console) With(fields []zapcore.Field) zapcore.Core {
	d := *c
	d.fields = slices.Concat(c.fields, fields)
	return &d
}

func (c *console) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *console) Sync() error { return c.out.Sync() }

func (c *console) Write(e zapcore.Entry, fields []zapcore.Field) error {
	var b bytes.Buffer
	if c.journal {
		b.WriteString("<" + priority(e.Level) + ">")
	}
	c.paint(&b, dim, e.Time.Format("15:04:05.000"))
	b.WriteByte(' ')
	c.paint(&b, levelColour(e.Level), fmt.Sprintf("%-5s", e.Level.CapitalString()))
	b.WriteByte(' ')
	c.body(&b, messageWidth, e, fields, c.fields)
	b.WriteByte('\n')
	_, err := c.out.Write(b.Bytes())
	if e.Level > zapcore.ErrorLevel {
		return errors.Join(err, c.out.Sync())
	}
	return err
}

// body writes the message, padded to width, and the fields. What this line adds
// comes first: bound keys are the same in every line.
func (c *console) body(b *bytes.Buffer, width int, e zapcore.Entry, fields, bound []zapcore.Field) {
	msg := e.Message
	if e.LoggerName != "" {
		msg = e.LoggerName + ": " + msg
	}
	msg = printable(msg) // one line stays one line
	b.WriteString(msg)
	if pad := width - utf8.RuneCountInString(msg); pad > 0 && len(fields)+len(bound) > 0 {
		b.WriteString(strings.Repeat(" ", pad))
	}
	for _, fs := range [][]zapcore.Field{fields, bound} {
		for _, f := range fs {
			c.field(b, f)
		}
	}
}

func (c *console) field(b *bytes.Buffer, f zapcore.Field) {
	m := zapcore.NewMapObjectEncoder()
	f.AddTo(m)
	for _, k := range sortedKeys(m.Fields) {
		b.WriteByte(' ')
		c.paint(b, dim, printable(k)+"=")
		s := fmt.Sprint(m.Fields[k])
		if s == "" || strings.ContainsAny(s, " =\"") || strconv.Quote(s) != `"`+s+`"` {
			s = strconv.Quote(s)
		}
		b.WriteString(s)
	}
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

const (
	dim    = "2"
	red    = "31"
	yellow = "33"
	blue   = "34"
	purple = "35"
)

func levelColour(l zapcore.Level) string {
	switch {
	case l >= zapcore.ErrorLevel:
		return red
	case l == zapcore.WarnLevel:
		return yellow
	case l == zapcore.InfoLevel:
		return blue
	default:
		return purple
	}
}

func (c *console) paint(b *bytes.Buffer, code, s string) {
	if !c.colour {
		b.WriteString(s)
		return
	}
	b.WriteString("\x1b[" + code + "m" + s + "\x1b[0m")
}
