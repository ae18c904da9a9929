// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// topViews are what events can be counted by. The first letter chooses one, but for
// the executable.
const (
	byProcess = iota
	byExecutable
	byContainer
	byKind
)

func topViews() []struct {
	name string
	key  byte
} {
	return []struct {
		name string
		key  byte
	}{{"process", 'p'}, {"executable", 'x'}, {"container", 'c'}, {"kind", 'k'}}
}

// topText bounds what is remembered of a name, in bytes.
const topText = 512

func (a *app) topCommand() *cobra.Command {
	var socket, by, when string
	var every time.Duration
	var number int
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show live which processes, executables, containers or kinds make the most events",
		Long: `Show live who makes events: the busiest processes, executables or containers, or
the events by kind.

Keys: p, x, c and k choose what is counted by, space pauses, q or Ctrl-C ends.
Where standard output is no terminal, one table after the other is written.

The events come from the running sensor as they are seen. On a host busier than this
view can follow, some are left out here (nowhere else), and their number is said; the
table by kind has the sensor's own counters and is always complete.`,
		Example: `  edr-sensor top
  edr-sensor top --by container
  edr-sensor top --by executable --every 10s --number 1 | head`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t := &top{view: -1, now: time.Now}
			for i, v := range topViews() {
				if v.name == by {
					t.view = i
				}
			}
			switch {
			case t.view < 0:
				return usage(cmd, "--by %s: write process, executable, container or kind", by)
			case every < 100*time.Millisecond:
				return usage(cmd, "--every %s: write 100ms or more", every)
			case number < 0:
				return usage(cmd, "--number %d: write a positive number", number)
			}
			c, err := a.control(socket)
			if err != nil {
				return err
			}
			return a.top(cmd.Context(), c, t, a.style(when), every, number)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&by, "by", "process", "process, executable, container or kind")
	fl.DurationVar(&every, "every", 2*time.Second, "draw it anew after this time")
	fl.IntVarP(&number, "number", "n", 0, "end after this many tables")
	fl.StringVar(&socket, "socket", "", "control socket of the sensor (default: control.socket)")
	addColourFlag(cmd, &when)
	_ = cmd.RegisterFlagCompletionFunc("by", cobra.FixedCompletions([]string{"process", "executable", "container", "kind"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) top(ctx context.Context, c *control, t *top, st style, every time.Duration, number int) error {
	t.reset()
	yieldCPU()
	first, err := c.get(ctx, "/tap")
	if err != nil {
		return err
	}
	return a.live(ctx, liveView{
		every: every, number: number, settle: true, draw: t.draw, key: t.press,
		beside: func(ctx context.Context) { t.follow(ctx, c, first) },
		look: func() error {
			_, s, err := readStatus(ctx, c)
			if err == nil {
				t.pass(s)
			}
			return err
		},
	}, st)
}

// yieldCPU has all others go first: reading a storm of events takes time, which is not
// to be that of the host. The kernel has a priority for each thread, and hands it on to
// those to come. Where it may not be changed it stays.
func yieldCPU() {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, 19)
		}
	}
}

// top counts who makes events.
type top struct {
	view   int
	paused []string // what is shown meanwhile
	pause  bool
	now    func() time.Time

	mu      sync.Mutex // for what follow counts
	tallies [byKind]*tally
	missed  uint64 // events that this view was too slow for

	last   time.Time
	status *sensorStatus
}

func (t *top) reset() {
	for i := range t.tallies {
		t.tallies[i] = newTally()
	}
	t.last = t.now()
}

// pass is called once per screen.
func (t *top) pass(s *sensorStatus) {
	now := t.now()
	t.mu.Lock()
	for _, y := range t.tallies {
		y.pass(now.Sub(t.last))
	}
	t.mu.Unlock()
	t.last, t.status = now, s
}

func (t *top) press(key byte) {
	for i, v := range topViews() {
		if v.key == key {
			t.view, t.paused = i, nil
		}
	}
	if key == ' ' {
		t.pause, t.paused = !t.pause, nil
	}
}

// follow counts what the sensor sees until ctx ends, also that of a sensor which is
// started again.
func (t *top) follow(ctx context.Context, c *control, body io.ReadCloser) {
	for {
		if body != nil {
			stop := context.AfterFunc(ctx, func() { _ = body.Close() }) // ends the read
			t.read(body)
			stop()
			_ = body.Close()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		var err error
		if body, err = c.get(ctx, "/tap"); err != nil {
			body = nil // the status says why
		}
	}
}

func (t *top) read(body io.Reader) {
	r := bufio.NewReaderSize(body, 256<<10)
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			// A record has at most a megabyte; one that large counts as any other.
			rest, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			line = append(bytes.Clone(line), rest...)
		case err != nil:
			return
		}
		t.count(line)
	}
}

// topRecord is the part of an event that is counted by.
type topRecord struct {
	Metadata struct {
		EventCode string `json:"event_code"`
	} `json:"metadata"`
	Process *topProcess `json:"process"`
	Actor   struct {
		Process *topProcess `json:"process"`
	} `json:"actor"`
}

type topProcess struct {
	PID     int    `json:"pid"`
	UID     string `json:"uid"`
	Name    string `json:"name"`
	Path    string `json:"path"`
	CmdLine string `json:"cmd_line"`
	User    struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"user"`
	Container struct {
		UID     string `json:"uid"`
		Runtime string `json:"runtime"`
	} `json:"container"`
}

// count takes one line of the tap.
func (t *top) count(line []byte) {
	if n := dropped(line); n > 0 {
		t.mu.Lock()
		t.missed += uint64(n)
		t.mu.Unlock()
		return
	}
	var r topRecord
	if json.Unmarshal(line, &r) != nil {
		return
	}
	code := r.Metadata.EventCode
	f := familyOf(code)
	// Who acts is counted. A process that becomes another program has done that itself.
	p := r.Actor.Process
	became := code == "process.exec" || code == "process.snapshot"
	if became || p == nil {
		p = r.Process
	}
	if p == nil || strings.HasPrefix(code, "sensor.") {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	process := p.UID
	if process == "" {
		process = strconv.Itoa(p.PID)
	}
	if c, fresh := t.tallies[byProcess].add(process, f); fresh || became || c.thin {
		image := p
		if code == "process.fork" && r.Process != nil { // tells little of who forks, but a child is its image
			image = r.Process
		}
		c.pid, c.thin = p.PID, image.CmdLine == ""
		c.user = bounded(cmp.Or(image.User.Name, image.User.UID))
		c.text = bounded(cmp.Or(image.CmdLine, p.Path, p.Name))
	}
	exe := bounded(cmp.Or(p.Path, p.Name, "?"))
	if c, fresh := t.tallies[byExecutable].add(exe, f); fresh {
		c.text = exe
	}
	id := bounded(p.Container.UID)
	if c, fresh := t.tallies[byContainer].add(id, f); fresh {
		c.text = "(host)"
		if id != "" {
			c.text = bounded(strings.TrimSpace(id + " " + p.Container.Runtime))
		}
	}
}

// bounded copies at most topText bytes, so that no record is held by a part of it.
func bounded(s string) string {
	if len(s) > topText {
		s = s[:topText]
	}
	return strings.Clone(s)
}

func (t *top) draw(st style) []string {
	s := &screen{style: st}
	t.head(s)
	if t.pause && t.paused == nil || !t.pause {
		t.paused = t.table(st)
	}
	room := len(t.paused)
	if st.height > 0 {
		room = max(st.height-len(s.lines)-1, 0)
	}
	s.lines = append(s.lines, t.paused[:min(room, len(t.paused))]...)
	if st.height > 0 {
		for len(s.lines) < st.height-1 {
			s.lines = append(s.lines, "")
		}
		t.foot(s)
	}
	return s.lines
}

func (t *top) head(to *screen) {
	s := t.status
	b := to.build()
	b.add(bold, "edr-sensor top")
	b.add(plain, "  "+safe(s.AgentID)+"  ")
	colour := yellow
	switch s.Mode {
	case "online":
		colour = green
	case "degraded", "truncating":
		colour = red
	}
	b.add(colour, safe(s.Mode))
	b.add(plain, " for "+ago(t.now(), s.Since))
	if t.pause {
		b.add(yellow, "  paused")
	}
	to.end(b)

	var sum count
	for _, n := range s.counts() {
		sum = sum.plus(n)
	}
	b = to.build()
	b.add(plain, s.perSecond(sum.rate)+" events a second, ")
	colour = plain
	if sum.lost > 0 {
		colour = red
	}
	b.add(colour, thousands(sum.lost)+" lost")
	b.add(plain, "; buffer ")
	to.gauge(b, gaugeWidth/2, s.Buffer.Bytes, s.Buffer.Bytes-s.Buffer.UnsentBytes, s.Buffer.Cap)
	b.add(plain, fmt.Sprintf(" %s; %s behind", percent(s.Buffer.Bytes, s.Buffer.Cap), thousands(s.Buffer.Last-min(s.Buffer.Last, s.Transport.Acked))))
	to.end(b)

	t.mu.Lock()
	missed := t.missed
	t.mu.Unlock()
	b = to.build()
	if missed > 0 && t.view != byKind {
		b.add(yellow, thousands(missed)+" events are not counted here: this view is slower than the sensor")
	}
	to.end(b)
}

func (t *top) foot(to *screen) {
	b := to.build()
	for i, v := range topViews() {
		colour := dim
		if i == t.view {
			colour = bold
		}
		at := strings.IndexByte(v.name, v.key)
		b.add(colour, v.name[:at]+"["+string(v.key)+"]"+v.name[at+1:]+"  ")
	}
	b.add(dim, "[space] pause  [q]uit")
	to.end(b)
}

// table has the busiest first, as many as there is room for on the highest terminal
// that is likely; draw leaves out the rest.
func (t *top) table(st style) []string {
	s := &screen{style: st}
	if t.view == byKind {
		t.kinds(s)
		return s.lines
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	y := t.tallies[t.view]
	head := fmt.Sprintf("%8s %8s %6s %6s %6s ", "A SECOND", "EVENTS", "PROC", "NET", "FILE")
	if t.view == byProcess {
		head += fmt.Sprintf("%7s %-8s ", "PID", "USER")
	}
	b := s.build()
	b.add(dim, head+map[int]string{byProcess: "COMMAND", byExecutable: "EXECUTABLE", byContainer: "CONTAINER"}[t.view])
	s.end(b)
	names := y.hottest()
	if room := cmp.Or(max(st.height-len(s.lines), 0), topPlain); len(names) > room {
		names = names[:room]
	}
	for _, name := range names {
		c := y.names[name]
		b := s.build()
		b.add(plain, fmt.Sprintf("%8s %8s %6s %6s %6s ", rateText(y.rate(c)), short(c.total), short(c.by[ofProcess]), short(c.by[ofNet]), short(c.by[ofFile])))
		if t.view == byProcess {
			b.add(plain, fmt.Sprintf("%7d ", c.pid)+pad(orDash(c.user), userWidth)+" ")
		}
		b.add(bold, safe(c.text))
		s.end(b)
	}
	return s.lines
}

// topPlain is how many rows a table has where there is no terminal.
const topPlain = 20

func (t *top) kinds(to *screen) {
	all := t.status.counts()
	names := slices.SortedFunc(func(yield func(string) bool) {
		for kind, n := range all {
			if n != (count{}) && !yield(kind) {
				return
			}
		}
	}, func(a, b string) int {
		return cmp.Or(cmp.Compare(all[b].rate, all[a].rate), cmp.Compare(all[b].seen, all[a].seen), cmp.Compare(a, b))
	})
	b := to.build()
	b.add(dim, fmt.Sprintf("%8s %12s %10s %10s KIND", "A SECOND", "SEEN", "LOST", "LEFT OUT"))
	to.end(b)
	for _, kind := range names {
		n := all[kind]
		b := to.build()
		b.add(plain, fmt.Sprintf("%8s %12s ", t.status.perSecond(n.rate), thousands(n.seen)))
		colour := plain
		if n.lost > 0 {
			colour = red
		}
		b.add(colour, fmt.Sprintf("%10s", thousands(n.lost)))
		b.add(plain, fmt.Sprintf(" %10s ", thousands(n.suppressed)))
		b.add(bold, safe(kind))
		to.end(b)
	}
}

// short is a number in at most five characters.
func short(n uint64) string {
	f := float64(n)
	for i, unit := range []string{"", "k", "M", "G", "T"} {
		switch {
		case i == 0 && n < 10000:
			return strconv.FormatUint(n, 10)
		case f < 9.95 && i > 0:
			return fmt.Sprintf("%.1f%s", f, unit)
		case f < 999.5 && i > 0:
			return fmt.Sprintf("%.0f%s", f, unit)
		}
		f /= 1000
	}
	return "many"
}
