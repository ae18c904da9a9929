// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// sensorStatus is the part of /status that a screen shows. It is kept apart from
// the server's type, because the two may be of different versions.
type sensorStatus struct {
	Version  string            `json:"version"`
	AgentID  string            `json:"agent_id"`
	Mode     string            `json:"mode"`
	Since    time.Time         `json:"since"`
	Reason   string            `json:"reason"`
	Scope    string            `json:"scope"`
	Context  map[string]string `json:"context"`
	Errors   []string          `json:"errors"`
	Cases    []sensorCase      `json:"cases"`
	Coverage []struct {
		Event    string   `json:"event"`
		Hook     string   `json:"hook"`
		Required bool     `json:"required"`
		Errors   []string `json:"errors"`
	} `json:"coverage"`
	Sensor struct {
		Events map[string]uint64 `json:"events"`
		Lost   map[string]uint64 `json:"lost"`

		Suppressed map[string]uint64 `json:"suppressed"`
		Rings      map[string]struct {
			Used uint64 `json:"used"`
			Size uint64 `json:"size"`
		} `json:"rings"`
	} `json:"sensor"`
	Buffer struct {
		Records   uint64 `json:"records"`
		Unsent    uint64 `json:"unsent"`
		Last      uint64 `json:"last"`
		Bytes     int64  `json:"bytes"`
		Cap       int64  `json:"cap"`
		Truncated uint64 `json:"truncated"`
		Corrupt   uint64 `json:"corrupt"`
	} `json:"buffer"`
	Transport struct {
		State      string    `json:"state"`
		Address    string    `json:"address"`
		Since      time.Time `json:"since"`
		ErrorClass string    `json:"error_class"`
		Error      string    `json:"error"`
		Hint       string    `json:"hint"`
		Warning    string    `json:"warning"`
		Acked      uint64    `json:"acked"`
		LastReply  time.Time `json:"last_reply"`
	} `json:"transport"`
}

func (a *app) statusCommand() *cobra.Command {
	var socket, when string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the running sensor sees, keeps, sends and misses",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.control(socket)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			body, err := c.get(ctx, "/status")
			if err != nil {
				return err
			}
			defer body.Close()
			answer, err := io.ReadAll(io.LimitReader(body, 1<<20))
			if err != nil {
				return fmt.Errorf("read status: %w", err)
			}
			if asJSON {
				_, err := a.stdout.Write(append(bytes.TrimSpace(answer), '\n'))
				return err
			}
			var s sensorStatus
			if err := json.Unmarshal(answer, &s); err != nil {
				return fmt.Errorf("read status: %w", err)
			}
			_, err = io.WriteString(a.stdout, s.screen(time.Now(), a.colour(when)))
			return err
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control socket of the sensor (default: control.socket)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	addColourFlag(cmd, &when)
	return cmd
}

// screen lays the status out for a terminal of 80 columns and 24 lines.
func (s *sensorStatus) screen(now time.Time, colour bool) string {
	var b lineBuilder
	b.colour = colour
	modeColour := yellow
	switch s.Mode {
	case "online":
		modeColour = green
	case "degraded", "truncating":
		modeColour = red
	}
	row := func(name, format string, args ...any) {
		b.add(dim, fmt.Sprintf("%-10s", name))
		b.add(plain, fmt.Sprintf(format, args...)+"\n")
	}
	b.add(bold, "edr-sensor "+safe(s.Version))
	b.add(plain, "  "+safe(s.AgentID)+"  ")
	b.add(modeColour, safe(s.Mode))
	b.add(plain, " for "+ago(now, s.Since)+"\n")
	if s.Reason != "" {
		row("", "%s", safe(s.Reason))
	}
	row("scope", "%s", safe(s.Scope))
	for _, key := range sorted(s.Context) {
		row(key, "%s", safe(s.Context[key]))
	}
	for _, c := range s.Cases {
		text := fmt.Sprintf("%s on %s %s for %s, %s events", c.ID, c.Scope.Kind, c.Scope.Value, left(now, c.Until), thousands(c.Tagged))
		if c.Collect == "deep" {
			text += ", deep"
		}
		row("case", "%s", cut(safe(text), 200))
	}

	var missing []string
	covered, degraded := 0, 0
	for _, c := range s.Coverage {
		if c.Hook != "" {
			covered++
			if strings.HasSuffix(c.Hook, syscallHook) {
				degraded++
			}
			continue
		}
		why := ""
		if len(c.Errors) > 0 {
			why = ": " + c.Errors[len(c.Errors)-1]
		}
		missing = append(missing, c.Event+why)
	}
	coverage := fmt.Sprintf("%d of %d kinds of events", covered, len(s.Coverage))
	if degraded > 0 {
		coverage += fmt.Sprintf(", %d degraded: by system calls, not io_uring", degraded)
	}
	row("coverage", "%s", coverage)
	for _, m := range missing {
		b.add(yellow, fmt.Sprintf("%10s%s\n", "", cut("missing "+safe(m), 200)))
	}

	counts, all := s.counts()
	text := fmt.Sprintf("%s events; %s lost in the kernel", thousands(all.seen), thousands(all.lost))
	if all.suppressed > 0 {
		text += fmt.Sprintf(", %s left out as configured", thousands(all.suppressed))
	}
	row("seen", "%s", text)
	for _, kind := range sorted(counts) {
		n := counts[kind]
		if n == (count{}) {
			continue
		}
		text := fmt.Sprintf("%-20s %12s", safe(kind), thousands(n.seen))
		if n.lost > 0 {
			text += fmt.Sprintf("  lost %s", thousands(n.lost))
		}
		if n.suppressed > 0 {
			text += fmt.Sprintf("  left out %s", thousands(n.suppressed))
		}
		row("", "%s", text)
	}
	var rings []string
	for _, name := range sorted(s.Sensor.Rings) {
		r := s.Sensor.Rings[name]
		rings = append(rings, fmt.Sprintf("%s %s of %s", safe(name), percent(int64(r.Used), int64(r.Size)), bytesText(int64(r.Size))))
	}
	if len(rings) > 0 {
		row("rings", "%s", strings.Join(rings, ", "))
	}

	f := s.Buffer
	row("buffer", "%s records, %s of %s (%s), %s not sent", thousands(f.Records), bytesText(f.Bytes), bytesText(f.Cap), percent(f.Bytes, f.Cap), thousands(f.Unsent))
	if f.Truncated > 0 || f.Corrupt > 0 {
		b.add(red, fmt.Sprintf("%10s%s records dropped unsent, %s damaged\n", "", thousands(f.Truncated), thousands(f.Corrupt)))
	}

	t := s.Transport
	switch t.State {
	case "off", "":
		row("redis", "not configured: events stay in the buffer")
	case "connected":
		text := fmt.Sprintf("connected to %s for %s, %s behind", safe(t.Address), ago(now, t.Since), thousands(f.Last-min(f.Last, t.Acked)))
		if !t.LastReply.IsZero() {
			text += ", last reply " + ago(now, t.LastReply) + " ago"
		}
		row("redis", "%s", text)
	default:
		row("redis", "%s, %s for %s, %s behind", safe(t.Address), safe(t.State), ago(now, t.Since), thousands(f.Last-min(f.Last, t.Acked)))
	}
	if t.Error != "" {
		b.add(yellow, fmt.Sprintf("%10s%s: %s\n", "", safe(t.ErrorClass), safe(t.Error)))
	}
	if t.Hint != "" && t.Error != "" {
		row("", "%s", safe(t.Hint))
	}
	if t.Warning != "" {
		b.add(red, fmt.Sprintf("%10s%s\n", "", safe(t.Warning)))
	}
	for _, e := range s.Errors {
		b.add(yellow, fmt.Sprintf("%-10s%s\n", "error", safe(e)))
	}
	return b.String()
}

// syscallHook ends the name of the hook that sees only system calls.
const syscallHook = "/sys_exit"

// count is how many events of a kind there were, and were not.
type count struct{ seen, lost, suppressed uint64 }

// counts are by event code, with files in one: their many kinds would fill the
// screen, and --json has them.
func (s *sensorStatus) counts() (kinds map[string]count, all count) {
	kinds = map[string]count{}
	add := func(code string, n count) {
		if strings.HasPrefix(code, "file.") {
			code = "file.*"
		}
		k := kinds[code]
		kinds[code] = count{k.seen + n.seen, k.lost + n.lost, k.suppressed + n.suppressed}
		all = count{all.seen + n.seen, all.lost + n.lost, all.suppressed + n.suppressed}
	}
	for code, n := range s.Sensor.Events {
		add(code, count{seen: n})
	}
	for code, n := range s.Sensor.Lost {
		add(code, count{lost: n})
	}
	for code, n := range s.Sensor.Suppressed {
		add(code, count{suppressed: n})
	}
	return kinds, all
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func ago(now, then time.Time) string {
	if then.IsZero() {
		return "an unknown time"
	}
	d := max(now.Sub(then), 0)
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func percent(part, whole int64) string {
	if whole <= 0 {
		return "0 %"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

// thousands writes 1234567 as 1,234,567.
func thousands(n uint64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
