// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

// record is the part of an OCSF event that a line of output, or a filter, needs.
type record struct {
	Time   int64  `json:"time"`
	TimeDT string `json:"time_dt"`

	Metadata struct {
		EventCode string `json:"event_code"`
		Tags      []struct {
			Name  string `json:"name"`
			Value string `json:"value"`
		} `json:"tags"`
	} `json:"metadata"`
	ActivityName string `json:"activity_name"`
	SeverityID   int    `json:"severity_id"`
	StatusCode   string `json:"status_code"`
	Message      string `json:"message"`
	ExitCode     int    `json:"exit_code"`
	Duration     *int64 `json:"duration"` // milliseconds

	Process *process `json:"process"`
	Actor   struct {
		Process *process `json:"process"`
	} `json:"actor"`
	App struct {
		Name string `json:"name"`
	} `json:"app"`

	Src     *endpoint `json:"src_endpoint"`
	Dst     *endpoint `json:"dst_endpoint"`
	Traffic *struct {
		Out int64 `json:"bytes_out"`
		In  int64 `json:"bytes_in"`
	} `json:"cumulative_traffic"`

	File   *file `json:"file"`
	Result *file `json:"file_result"`

	Unmapped struct {
		Write struct {
			Bytes   int64 `json:"bytes"`
			Created bool  `json:"created"`
		} `json:"write"`
		Delete *struct {
			Left int `json:"nlink_left"`
		} `json:"delete"`
		Rename struct {
			Replaced  bool `json:"replaced"`
			Exchanged bool `json:"exchanged"`
		} `json:"rename"`
		Chattr struct {
			Old []string `json:"old_flags"`
			New []string `json:"new_flags"`
		} `json:"chattr"`
		Xattr struct {
			Name    string `json:"name"`
			Removed bool   `json:"removed"`
		} `json:"xattr"`
		Mount struct {
			FSType string   `json:"fstype"`
			Flags  []string `json:"flags"`
			From   string   `json:"from"`
		} `json:"mount"`
		Degraded struct {
			Reason string `json:"reason"`
		} `json:"degraded"`
		Signal struct {
			Name string `json:"name"`
		} `json:"signal"`
		SensorPart       string `json:"sensor_part"`
		SuppressedBefore int    `json:"suppressed_before"`
		Suppressed       struct {
			ByType map[string]uint64 `json:"by_type"`
		} `json:"suppressed"`
		Exec struct {
			Filename   string `json:"filename"`
			Script     bool   `json:"script"`
			Memfd      bool   `json:"memfd"`
			FDExec     bool   `json:"fd_exec"`
			SecureExec bool   `json:"secureexec"`
		} `json:"exec"`
		Exit struct {
			Signal     int    `json:"signal"`
			SignalName string `json:"signal_name"`
			CoreDumped bool   `json:"core_dumped"`
		} `json:"exit"`
		Sensor struct {
			Before string `json:"before"`
			After  string `json:"after"`
		} `json:"sensor"`
		Lost struct {
			ByType map[string]uint64 `json:"by_type"`
			Ranges []struct {
				Cause string `json:"cause"`
				First uint64 `json:"first"`
				Last  uint64 `json:"last"`
			} `json:"ranges"`
		} `json:"lost"`
		Backlog int `json:"backlog"`
	} `json:"unmapped"`
}

type process struct {
	PID     int    `json:"pid"`
	Name    string `json:"name"`
	Path    string `json:"path"`
	CmdLine string `json:"cmd_line"`
	User    struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"user"`
	File struct {
		Deleted bool `json:"is_deleted"`
	} `json:"file"`
	Container struct {
		UID string `json:"uid"`
	} `json:"container"`
	Parent *process `json:"parent_process"`
}

// file is what a file event is about.
type file struct {
	Name     string `json:"name"`
	Path     string `json:"path"`
	TypeID   int    `json:"type_id"`
	Size     *int64 `json:"size"`
	Modified *int64 `json:"modified_time"`
	Volume   string `json:"volume"`
	Owner    struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"owner"`
	X struct {
		Mode   string `json:"mode"`
		GID    string `json:"gid"`
		Target string `json:"link_target"`
	} `json:"xattributes"`
}

func (f *file) String() string {
	switch {
	case f == nil:
		return "?"
	case f.Path != "":
		return f.Path
	}
	return f.Name
}

type endpoint struct {
	IP   string `json:"ip"`
	Port int    `json:"port"`
}

func (e *endpoint) String() string {
	if e == nil || e.IP == "" {
		return "?"
	}
	return net.JoinHostPort(e.IP, strconv.Itoa(e.Port))
}

// parseRecord reads one event.
func parseRecord(data []byte) (*record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read event: %w", err)
	}
	return &r, nil
}

// subject is the process that the event is about.
func (r *record) subject() *process {
	switch {
	case r.Process != nil:
		return r.Process
	case r.Actor.Process != nil:
		return r.Actor.Process
	}
	return &process{}
}

// kind is the short name of the event code.
func (r *record) kind() string { return evidence.ShortKind(r.Metadata.EventCode) }

// filter selects events; what is empty selects all. Alternatives of one field
// are joined by or, fields by and.
type filter struct {
	kinds []string // event code, its last part or short name, its family, or a pattern of one
	pids  []int    // of the subject or the acting process
	exes  []string // pattern, path or end of a path of the subject's executable
}

func (f *filter) match(r *record) bool {
	subject := r.subject()
	return (len(f.kinds) == 0 || slices.ContainsFunc(f.kinds, func(k string) bool { return evidence.MatchKind(k, r.Metadata.EventCode) })) &&
		(len(f.pids) == 0 || slices.Contains(f.pids, subject.PID) || r.Actor.Process != nil && slices.Contains(f.pids, r.Actor.Process.PID)) &&
		(len(f.exes) == 0 || slices.ContainsFunc(f.exes, func(e string) bool { return matchExe(e, subject.Path) }))
}

// everything reports whether no event has to be parsed to be selected.
func (f *filter) everything() bool { return len(f.kinds)+len(f.pids)+len(f.exes) == 0 }

// matchExe compares whole path elements: "curl" and "bin/curl" match
// /usr/bin/curl, "url" does not. A pattern without a slash is for the base name.
func matchExe(want, exe string) bool {
	if exe == "" {
		return false
	}
	if strings.ContainsAny(want, "*?[") {
		if !strings.Contains(want, "/") {
			exe = path.Base(exe)
		}
		ok, err := path.Match(want, exe)
		return err == nil && ok
	}
	return exe == want || strings.HasSuffix(exe, "/"+strings.TrimPrefix(want, "/")) && !strings.HasPrefix(want, "/")
}

// compact writes events for people, one aligned line each:
//
//	15:04:05.123 exec      2310 www-data dash            sh -c id  ← php-fpm8.2[2001]
//
// Everything that came from a process is made safe for a terminal.
type compact struct {
	colour bool
	ascii  bool // no character beyond ASCII
	width  int  // columns; 0: lines are cut only at cutText
	zone   *time.Location
}

const (
	kindWidth    = 8
	pidWidth     = 7
	userWidth    = 8
	processWidth = 15
	cutText      = 400 // runes of what happened; -o json has all of it
)

const (
	plain  = ""
	dim    = "2"
	bold   = "1"
	red    = "31"
	green  = "32"
	yellow = "33"
	blue   = "34"
	purple = "35"
	cyan   = "36"
)

// line returns the event as one line without its newline.
func (c *compact) line(r *record) string {
	b := lineBuilder{colour: c.colour, ascii: c.ascii}
	p := r.subject()
	user, name, pid := p.User.Name, p.Name, ""
	if user == "" {
		user = p.User.UID
	}
	if name == "" {
		name = r.App.Name
	}
	if p.PID != 0 {
		pid = strconv.Itoa(p.PID)
	}
	b.add(dim, r.when(c.zone))
	b.add(plain, " ")
	b.add(r.colour(), pad(r.kind(), kindWidth))
	b.add(plain, fmt.Sprintf(" %*s ", pidWidth, orDash(pid)))
	b.add(plain, pad(orDash(user), userWidth)+" ")
	b.add(bold, pad(orDash(name), processWidth)+" ")

	room := cutText
	if c.width > 0 {
		room = max(c.width-b.columns, 20)
	}
	what, notes, after := r.what()
	used := 0
	if len(notes) > 0 {
		text := "[" + strings.Join(notes, " ") + "] "
		b.add(red, text)
		used = columns(text)
	}
	after = safe(after)
	what = safe(what)
	// What happened matters more than the trailer.
	if n := columns(after); n > 0 && used+columns(what)+n+2 <= room {
		b.add(plain, what)
		b.add(dim, "  "+after)
	} else {
		b.add(plain, cut(what, max(room-used, 1)))
	}
	return strings.TrimRight(b.String(), " ")
}

// what says what happened, which marks it bears, and where it belongs.
func (r *record) what() (what string, notes []string, after string) {
	p := r.subject()
	var trailer []string
	switch code := r.Metadata.EventCode; {
	case code == "process.exec", code == "process.snapshot":
		what = p.CmdLine
		if what == "" {
			what = p.Path
		}
		x := r.Unmapped.Exec
		for _, n := range []struct {
			on   bool
			name string
		}{{x.Memfd, "memfd"}, {p.File.Deleted, "deleted"}, {x.FDExec, "by descriptor"}, {x.SecureExec, "raised privileges"}} {
			if n.on {
				notes = append(notes, n.name)
			}
		}
		trailer = append(trailer, from(p.Parent)...)
		if x.Script {
			trailer = append(trailer, "script "+x.Filename)
		}
	case code == "process.fork":
		what = p.CmdLine
		trailer = append(trailer, from(r.Actor.Process)...)
	case code == "process.exit":
		x := r.Unmapped.Exit
		switch {
		case x.SignalName != "":
			what = "killed by " + x.SignalName
		case x.Signal != 0:
			what = fmt.Sprintf("killed by signal %d", x.Signal)
		default:
			what = fmt.Sprintf("exit %d", r.ExitCode)
		}
		if x.CoreDumped {
			what += " (core dumped)"
		}
		what += r.after()
	case code == "process.signal":
		what = r.Unmapped.Signal.Name + " to the sensor"
		trailer = append(trailer, from(r.Actor.Process)...)
	case code == "process.ptrace":
		what = "control of the sensor"
		trailer = append(trailer, from(r.Actor.Process)...)
	case code == "net.listen":
		what = "listens on " + r.Dst.String()
		if r.Unmapped.Backlog > 0 {
			what += fmt.Sprintf(" (backlog %d)", r.Unmapped.Backlog)
		}
	case strings.HasPrefix(code, "net."):
		what = r.Src.String() + " → " + r.Dst.String()
		if r.StatusCode != "" {
			what += " " + r.StatusCode
		}
		if t := r.Traffic; t != nil {
			what += fmt.Sprintf("  %s out, %s in", bytesText(t.Out), bytesText(t.In))
		}
		if code == "net.close" {
			what += r.after()
		}
	case strings.HasPrefix(code, "file.") && r.File != nil:
		what, notes = r.change()
		if part := r.Unmapped.SensorPart; part != "" {
			notes = append(notes, "the sensor's "+part)
		}
		if n := r.Unmapped.SuppressedBefore; n > 0 {
			trailer = append(trailer, fmt.Sprintf("%d before it left out", n))
		}
	case strings.HasPrefix(code, "sensor."):
		what = r.sensor()
	default:
		what = strings.TrimSpace(r.ActivityName + " " + r.Message)
	}
	if id := p.Container.UID; id != "" {
		trailer = append(trailer, "container "+cutTo(id, 12))
	}
	for _, t := range r.Metadata.Tags {
		if t.Name == "case_id" {
			trailer = append(trailer, "case "+t.Value)
		}
	}
	return what, notes, strings.Join(trailer, ", ")
}

// sensor says what the sensor decided or lost.
func (r *record) sensor() string {
	what := r.Message
	if s := r.Unmapped.Sensor; s.Before != "" && s.After != "" && !strings.Contains(what, s.After) {
		what = s.Before + " → " + s.After + ": " + what
	}
	if what == "" {
		what = r.ActivityName
	}
	var lost []string
	for _, byType := range []map[string]uint64{r.Unmapped.Lost.ByType, r.Unmapped.Suppressed.ByType} {
		for kind, n := range byType {
			lost = append(lost, fmt.Sprintf("%s %d", kind, n))
		}
	}
	slices.Sort(lost)
	for _, s := range r.Unmapped.Lost.Ranges {
		lost = append(lost, fmt.Sprintf("seq %d to %d %s", s.First, s.Last, s.Cause))
	}
	if len(lost) > 0 {
		what += " (" + strings.Join(lost, ", ") + ")"
	}
	return what
}

func from(parent *process) []string {
	if parent == nil || parent.PID == 0 {
		return nil
	}
	return []string{fmt.Sprintf("← %s[%d]", parent.Name, parent.PID)}
}

func (r *record) after() string {
	if r.Duration == nil {
		return ""
	}
	return " after " + (time.Duration(*r.Duration) * time.Millisecond).String()
}

func (r *record) when(zone *time.Location) string {
	t, err := time.Parse(time.RFC3339Nano, r.TimeDT)
	if err != nil {
		t = time.UnixMilli(r.Time)
	}
	return t.In(zone).Format("15:04:05.000")
}

func (r *record) colour() string {
	family, _, _ := strings.Cut(r.Metadata.EventCode, ".")
	switch kind := r.kind(); {
	case kind == "failed", family == "sensor" && r.SeverityID >= 4:
		return red
	case family == "sensor":
		return yellow
	case kind == "exec":
		return green
	case family == "net":
		return cyan
	case family == "file":
		return purple
	case kind == "exit" && (r.ExitCode != 0 || r.Unmapped.Exit.Signal != 0):
		return yellow
	}
	return blue
}

// lineBuilder builds a line and counts how many columns it takes.
type lineBuilder struct {
	strings.Builder
	colour  bool
	ascii   bool
	limit   int // columns; what does not fit is left out; 0: none
	columns int
}

// add appends text, which must be safe, in a colour.
func (b *lineBuilder) add(colour, text string) {
	if b.limit > 0 {
		text = cut(text, b.limit-b.columns)
	}
	b.columns += columns(text)
	if b.ascii {
		text = asciiText(text)
	}
	if colour == plain || !b.colour || text == "" {
		b.WriteString(text)
		return
	}
	b.WriteString("\x1b[" + colour + "m" + text + "\x1b[0m")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// pad makes s safe and exactly n columns wide.
func pad(s string, n int) string {
	s = cut(safe(s), n)
	return s + strings.Repeat(" ", n-columns(s))
}

// cut shortens s to n columns, the last of which then is "…".
func cut(s string, n int) string {
	switch {
	case columns(s) <= n:
		return s
	case n <= 0:
		return ""
	}
	return cutTo(s, n-1) + "…"
}

// cutTo is as much of s as fits into n columns.
func cutTo(s string, n int) string {
	for i, r := range s {
		if n -= runeColumns(r); n < 0 {
			return s[:i]
		}
	}
	return s
}

// safe replaces what is not printable by its escape: event content belongs to
// whoever started the process and must not drive the terminal or fake a line.
func safe(s string) string {
	s = strings.ToValidUTF8(s, "\ufffd") // a byte alone can begin a sequence, too
	if !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x100:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// bytesText is a number of bytes with three significant digits or so.
func bytesText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB"} {
		if f /= 1024; f < 1024 {
			return fmt.Sprintf("%.1f %s", f, unit)
		}
	}
	return fmt.Sprintf("%.1f TiB", f/1024)
}
