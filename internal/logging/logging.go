// SPDX-License-Identifier: Apache-2.0

// Package logging carries a zap logger in the context. Keys are bound once, at
// the boundary that knows them, and everything called with that context
// inherits them; there is no global logger. A context nobody bound a logger to
// still logs, under the name "unbound", so that the missing bind is seen.
//
// Lines are readable on a terminal, entries with fields of their own in the
// journal, and JSON elsewhere. Each component has a level that can be changed
// while the sensor runs. Writing a line never waits for who reads it for longer
// than a moment: what cannot be written is counted and said later.
package logging

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// Format says how lines look.
type Format string

// The formats. FormatAuto is FormatConsole on a terminal, FormatJournal when
// standard error is connected to the journal, and FormatJSON elsewhere.
const (
	FormatAuto    Format = "auto"
	FormatConsole Format = "console"
	FormatJSON    Format = "json"
	FormatJournal Format = "journal"
)

// Formats lists what [New] accepts.
func Formats() []string {
	return []string{string(FormatAuto), string(FormatConsole), string(FormatJSON), string(FormatJournal)}
}

// LevelNames lists the levels, most verbose first.
func LevelNames() []string { return []string{"debug", "info", "warn", "error"} }

// Options say what is written, and how.
type Options struct {
	Format     Format
	Level      string            // one of LevelNames
	Components map[string]string // levels of components that differ
	// Identifier is what the journal calls the program; empty: its file name.
	Identifier string
}

// Log is where the lines of one program go. Safe for concurrent use.
type Log struct {
	Levels     *Levels
	logger     *zap.Logger
	memory     *memory // nil: nothing is remembered
	dropped    atomic.Uint64
	unreported atomic.Uint64 // of them, not yet said in a line
}

// New makes a Log that writes to w and closes nothing. Colour is used only when
// w is a terminal and neither NO_COLOR is set nor TERM is dumb; priorities and
// the journal only when w is the file that JOURNAL_STREAM names, or when
// FormatJournal is asked for.
func New(o Options, w io.Writer) (*Log, error) {
	return newLog(o, w, journalSocket)
}

func newLog(o Options, w io.Writer, journalPath string) (*Log, error) {
	l := &Log{Levels: newLevels(), memory: newMemory()}
	if err := l.Levels.Configure(o.Level, o.Components); err != nil {
		return nil, err
	}
	if !slices.Contains(Formats(), string(o.Format)) {
		return nil, fmt.Errorf("log format %q: must be one of %s", o.Format, strings.Join(Formats(), ", "))
	}
	tty, journal := isTerminal(w), isJournal(w, os.Getenv("JOURNAL_STREAM"))
	if o.Format == FormatAuto {
		switch {
		case tty:
			o.Format = FormatConsole
		case journal:
			o.Format = FormatJournal
		default:
			o.Format = FormatJSON
		}
	}
	out := zapcore.Lock(newOutlet(w))
	var core zapcore.Core
	switch o.Format {
	case FormatConsole:
		colour := tty && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
		core = &console{zapcore.DebugLevel, out, nil, colour, journal}
	case FormatJournal:
		if o.Identifier == "" {
			o.Identifier = "edr-sensor"
		}
		core = &journalCore{
			out: &journalWriter{path: journalPath}, identifier: o.Identifier,
			fallback: zapcore.NewCore(jsonEncoder(journal), out, zapcore.DebugLevel),
		}
	default:
		core = zapcore.NewCore(jsonEncoder(journal), out, zapcore.DebugLevel)
	}
	l.logger = zap.New(&filter{core, l, l.Levels.of(""), l.memory}, zap.ErrorOutput(zapcore.AddSync(io.Discard)))
	return l, nil
}

// Into returns a context that logs to l.
func (l *Log) Into(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, &bound{log: l, base: l.logger, logger: l.logger})
}

// Dropped is how many lines could not be written, because who reads them did not.
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// filter is the outermost core: it lets through what the level of the bound
// component allows, and counts what cannot be written.
type filter struct {
	zapcore.Core
	log    *Log
	level  zap.AtomicLevel
	memory *memory
}

func (f *filter) Enabled(l zapcore.Level) bool { return f.level.Enabled(l) }

func (f *filter) With(fields []zapcore.Field) zapcore.Core {
	d := *f
	d.Core, d.memory = f.Core.With(fields), f.memory.with(fields)
	for i := range fields {
		if fields[i].Key == KeyComponent && fields[i].Type == zapcore.StringType {
			d.level = f.log.Levels.of(fields[i].String)
		}
	}
	return &d
}

func (f *filter) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if f.Enabled(e.Level) {
		return ce.AddCore(e, f)
	}
	return ce
}

func (f *filter) Write(e zapcore.Entry, fields []zapcore.Field) error {
	f.memory.write(e, fields)
	if n := f.log.unreported.Swap(0); n > 0 {
		gap := zapcore.Entry{Level: zapcore.WarnLevel, Time: e.Time, LoggerName: e.LoggerName, Message: "log lines dropped"}
		err := f.Core.Write(gap, []zapcore.Field{zap.String(KeyCode, "LOG_DROPPED"), zap.Uint64(KeyCount, n)})
		if err != nil {
			f.log.dropped.Add(1)
			f.log.unreported.Add(n + 1)
			return nil
		}
	}
	if f.Core.Write(e, fields) != nil {
		f.log.dropped.Add(1)
		f.log.unreported.Add(1)
	}
	return nil
}

func parseLevel(s string) (zapcore.Level, error) {
	if i := slices.Index(LevelNames(), s); i >= 0 {
		return zapcore.DebugLevel + zapcore.Level(i), nil
	}
	return 0, fmt.Errorf("log level %q: must be one of %s", s, strings.Join(LevelNames(), ", "))
}

func jsonEncoder(journal bool) zapcore.Encoder {
	enc := zapcore.NewJSONEncoder(zapcore.EncoderConfig{
		TimeKey: "time", LevelKey: "level", NameKey: "logger", MessageKey: "msg",
		EncodeTime:     zapcore.RFC3339NanoTimeEncoder,
		EncodeLevel:    zapcore.LowercaseLevelEncoder,
		EncodeDuration: zapcore.StringDurationEncoder,
		EncodeName:     zapcore.FullNameEncoder,
	})
	if journal {
		return prefixed{enc}
	}
	return enc
}

// prefixed puts the journal's priority in front of each line.
type prefixed struct{ zapcore.Encoder }

func (p prefixed) Clone() zapcore.Encoder { return prefixed{p.Encoder.Clone()} }

func (p prefixed) EncodeEntry(e zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	line, err := p.Encoder.EncodeEntry(e, fields)
	if err != nil {
		return nil, err
	}
	// The prefix is three bytes; moving one line beats a second buffer pool.
	text := "<" + priority(e.Level) + ">" + line.String()
	line.Reset()
	line.AppendString(text)
	return line, nil
}

// priority is the syslog(3) priority of a level.
func priority(l zapcore.Level) string {
	switch {
	case l >= zapcore.DPanicLevel:
		return "2"
	case l == zapcore.ErrorLevel:
		return "3"
	case l == zapcore.WarnLevel:
		return "4"
	case l == zapcore.InfoLevel:
		return "6"
	default:
		return "7"
	}
}

// isJournal reports whether w is the file whose "device:inode" JOURNAL_STREAM
// gives. The comparison is systemd's advice: a child of a service inherits the
// variable even when its own standard error goes elsewhere.
func isJournal(w io.Writer, env string) bool {
	f, ok := w.(*os.File)
	if !ok || env == "" {
		return false
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return env == strconv.FormatUint(st.Dev, 10)+":"+strconv.FormatUint(st.Ino, 10)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
