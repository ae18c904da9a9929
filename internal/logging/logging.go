// SPDX-License-Identifier: Apache-2.0

// Package logging carries a zap logger in the context. Keys are bound once, at
// the boundary that knows them, and everything called with that context
// inherits them; there is no global logger. A context nobody bound a logger to
// still logs, under the name "unbound", so that the missing bind is seen.
//
// Lines are readable on a terminal and JSON elsewhere. When standard error is
// connected to the journal, each line starts with its "<N>" priority.
package logging

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// Format says how lines look.
type Format string

// The formats. FormatAuto is FormatConsole on a terminal and FormatJSON
// elsewhere.
const (
	FormatAuto    Format = "auto"
	FormatConsole Format = "console"
	FormatJSON    Format = "json"
)

// Formats lists what [New] accepts.
func Formats() []string {
	return []string{string(FormatAuto), string(FormatConsole), string(FormatJSON)}
}

// Levels lists the names [New] accepts, most verbose first.
func Levels() []string { return []string{"debug", "info", "warn", "error"} }

// New makes a logger that writes lines of at least the given level to w, which
// it locks. The returned level can be changed while the logger is in use.
// Colour is used only when w is a terminal and NO_COLOR is not set; the journal
// prefix only when w is the file that JOURNAL_STREAM names.
func New(format Format, level string, w io.Writer) (*zap.Logger, zap.AtomicLevel, error) {
	lvl, err := parseLevel(level)
	if err != nil {
		return nil, zap.AtomicLevel{}, err
	}
	tty := isTerminal(w)
	if format == FormatAuto {
		format = FormatJSON
		if tty {
			format = FormatConsole
		}
	}
	out := zapcore.Lock(zapcore.AddSync(w))
	journal := isJournal(w, os.Getenv("JOURNAL_STREAM"))
	switch format {
	case FormatConsole:
		return zap.New(&console{lvl, out, nil, tty && os.Getenv("NO_COLOR") == "", journal}), lvl, nil
	case FormatJSON:
		return zap.New(zapcore.NewCore(jsonEncoder(journal), out, lvl)), lvl, nil
	default:
		return nil, zap.AtomicLevel{}, fmt.Errorf("log format %q: must be one of %s", format, strings.Join(Formats(), ", "))
	}
}

func parseLevel(s string) (zap.AtomicLevel, error) {
	for i, name := range Levels() {
		if s == name {
			return zap.NewAtomicLevelAt(zapcore.DebugLevel + zapcore.Level(i)), nil
		}
	}
	return zap.AtomicLevel{}, fmt.Errorf("log level %q: must be one of %s", s, strings.Join(Levels(), ", "))
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
	text := priority(e.Level) + line.String()
	line.Reset()
	line.AppendString(text)
	return line, nil
}

// priority is the sd-daemon(3) prefix of a level.
func priority(l zapcore.Level) string {
	switch {
	case l >= zapcore.DPanicLevel:
		return "<2>"
	case l == zapcore.ErrorLevel:
		return "<3>"
	case l == zapcore.WarnLevel:
		return "<4>"
	case l == zapcore.InfoLevel:
		return "<6>"
	default:
		return "<7>"
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
