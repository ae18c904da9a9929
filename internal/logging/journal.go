// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"crypto/sha1" // what a UUID of version 5 is made of
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// journalSocket is where journald takes entries, by its native protocol
// (systemd.io/JOURNAL_NATIVE_PROTOCOL). The client in go-systemd keeps its socket
// in a package variable and waits without limit for a journal that hangs.
const journalSocket = "/run/systemd/journal/socket"

// messageIDs is the name space of our MESSAGE_IDs. It never changes.
const messageIDs = "\x5c\x0e\x8f\x3d\x92\xb1\x4a\x67\xa4\x1f\x6e\xd2\x80\xc3\x59\x7b"

// MessageID is the MESSAGE_ID, 32 hex digits, under which the journal finds the
// lines of a code such as MODE: the UUID of version 5 for that name. So it stays
// what it is for ever, and a new code needs no table.
func MessageID(code string) string {
	sum := sha1.Sum([]byte(messageIDs + code))
	sum[6] = sum[6]&0x0f | 0x50
	sum[8] = sum[8]&0x3f | 0x80
	return hex.EncodeToString(sum[:16])
}

// journalCore sends each line as one entry of the journal: the text with what
// the line adds as MESSAGE, every key in capitals as a field of its own, and a
// MESSAGE_ID where the line has a code.
type journalCore struct {
	out        *journalWriter
	identifier string
	fields     []zapcore.Field // bound
	fallback   zapcore.Core    // where lines go while there is no journal
}

func (c *journalCore) Enabled(zapcore.Level) bool { return true }
func (c *journalCore) Sync() error                { return nil }

func (c *journalCore) With(fields []zapcore.Field) zapcore.Core {
	d := *c
	d.fields = slices.Concat(c.fields, fields)
	d.fallback = c.fallback.With(fields)
	return &d
}

func (c *journalCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return ce.AddCore(e, c)
}

func (c *journalCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if c.out.send(appendEntry(nil, e, c.identifier, c.fields, fields)) == nil {
		return nil
	}
	return c.fallback.Write(e, fields)
}

// appendEntry appends a log line in journald's native format.
func appendEntry(b []byte, e zapcore.Entry, identifier string, bound, fields []zapcore.Field) []byte {
	var line bytes.Buffer
	(&console{}).body(&line, 0, e, scalars(fields), nil)
	b = appendField(b, "MESSAGE", line.String())
	b = appendField(b, "PRIORITY", priority(e.Level))
	b = appendField(b, "SYSLOG_IDENTIFIER", identifier)
	if e.LoggerName != "" {
		b = appendField(b, "LOGGER", e.LoggerName)
	}
	for _, fs := range [][]zapcore.Field{bound, fields} {
		for i := range fs {
			f := &fs[i]
			if f.Key == KeyCode && f.Type == zapcore.StringType && f.String != "" {
				b = appendField(b, "MESSAGE_ID", MessageID(f.String))
			}
			m := zapcore.NewMapObjectEncoder()
			f.AddTo(m)
			for _, k := range sortedKeys(m.Fields) {
				b = appendField(b, fieldName(k), fieldText(m.Fields[k]))
			}
		}
	}
	return b
}

// scalars leaves out what has parts: it has a field of its own to be read in.
func scalars(fields []zapcore.Field) []zapcore.Field {
	var out []zapcore.Field
	for _, f := range fields {
		switch f.Type {
		case zapcore.ReflectType, zapcore.ArrayMarshalerType, zapcore.ObjectMarshalerType, zapcore.InlineMarshalerType:
		default:
			out = append(out, f)
		}
	}
	return out
}

// fieldText is a value as one would search for it; what has parts is JSON.
func fieldText(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case time.Time:
		return v.Format(time.RFC3339Nano)
	case fmt.Stringer: // durations too
		return v.String()
	}
	if b, err := json.Marshal(v); err == nil {
		return string(b)
	}
	return fmt.Sprint(v)
}

// fieldName turns a key into what journald accepts: capitals, digits and
// underscores, no underscore or digit in front, 64 at most. Names that journald
// or the entry itself gives a meaning get a prefix.
func fieldName(key string) string {
	const most = 64
	b := make([]byte, 0, len(key))
	for i := range len(key) {
		switch c := key[i]; {
		case c >= 'a' && c <= 'z':
			b = append(b, c-'a'+'A')
		case c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
			b = append(b, c)
		default:
			b = append(b, '_')
		}
	}
	name := string(b)
	switch {
	case name == "", name[0] == '_', name[0] >= '0' && name[0] <= '9',
		name == "MESSAGE", name == "MESSAGE_ID", name == "PRIORITY", name == "SYSLOG_IDENTIFIER", name == "LOGGER":
		name = "EDR_" + name
	}
	return name[:min(len(name), most)]
}

// appendField appends one field. A value of several lines carries its length.
func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	if !strings.Contains(value, "\n") {
		b = append(b, '=')
		return append(append(b, value...), '\n')
	}
	b = append(b, '\n')
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	return append(append(b, value...), '\n')
}

// journalWriter sends entries to journald and never waits for it longer than
// patience. It connects when it has to: journald may come later, or again.
type journalWriter struct {
	path  string
	mu    sync.Mutex
	fd    int // open when ready
	ready bool
	waits time.Time
}

func (w *journalWriter) send(entry []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.try(entry)
	if err != nil && !errors.Is(err, errStalled) {
		w.close()
		err = w.try(entry) // a journald that was replaced takes it at the second try
	}
	if err != nil && !errors.Is(err, errStalled) {
		w.close()
	}
	return err
}

func (w *journalWriter) try(entry []byte) error {
	if !w.ready {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: w.path}); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		w.fd, w.ready = fd, true
	}
	for {
		err := unix.Sendto(w.fd, entry, unix.MSG_NOSIGNAL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if !await(w.fd, &w.waits) {
				return errStalled
			}
		case errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.ENOBUFS):
			return w.sendFile(entry)
		default:
			return err
		}
	}
}

// sendFile passes an entry that is too large for a datagram as a sealed file in
// memory.
func (w *journalWriter) sendFile(entry []byte) error {
	fd, err := unix.MemfdCreate("log-line", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for rest := entry; len(rest) > 0; {
		n, err := unix.Write(fd, rest)
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	if err := unix.Sendmsg(w.fd, nil, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL); errors.Is(err, unix.EAGAIN) {
		return errStalled
	} else if err != nil {
		return err
	}
	return nil
}

func (w *journalWriter) close() {
	if w.ready {
		_ = unix.Close(w.fd)
		w.ready = false
	}
}

// printable replaces what would move a terminal's cursor, end the line, or make
// the journal show a blob.
func printable(s string) string {
	clean := true
	for _, r := range s {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == utf8.RuneError {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	q := fmt.Sprintf("%q", s)
	return q[1 : len(q)-1]
}
