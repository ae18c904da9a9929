// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// decisionsFlags are those of the decisions command.
type decisionsFlags struct {
	follow  bool
	since   string
	codes   []string
	cases   []string
	json    bool
	explain string
	tap     bool
	socket  string
	colour  string
}

func (a *app) decisionsCommand() *cobra.Command {
	var f decisionsFlags
	cmd := &cobra.Command{
		Use:   "decisions",
		Short: "Show what the sensor decided, and why",
		Long: `Show what the sensor decided, and why, one decision per line: when, on which
stream, its code, what changed, the reason, counts, and the ids of case and user.

They come from the Redis streams of the configuration. When Redis is away, without
one, or with --tap, they come from the running sensor, whose buffer keeps the
newest ones. Without --since it shows those of the last day, with --follow only
new ones.

  edr-sensor decisions --code 'CONFIG_*'          what became of configurations
  edr-sensor decisions --case C-17 --since 48h    what was decided about a case
  edr-sensor decisions --explain FENCED           what a code means, and what to do`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.explain != "" {
				return a.explainDecision(cmd, f.explain)
			}
			since, err := f.start(time.Now())
			if err != nil {
				return usage(cmd, "%w", err)
			}
			return a.decisions(cmd.Context(), &f, since)
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&f.follow, "follow", "f", false, "go on with new decisions")
	fl.StringVar(&f.since, "since", "", "start this long ago (10m), or at this time (2026-01-31T15:04:05Z)")
	fl.StringSliceVar(&f.codes, "code", nil, "only these codes: MODE, 'CASE_*' …")
	fl.StringSliceVar(&f.cases, "case", nil, "only those about these cases")
	fl.BoolVar(&f.json, "json", false, "the records as they are stored")
	fl.StringVar(&f.explain, "explain", "", "say what a code means and what to do, and end")
	fl.BoolVar(&f.tap, "tap", false, "read from the sensor instead of Redis")
	fl.StringVar(&f.socket, "socket", "", "control socket for --tap (default: control.socket)")
	addColourFlag(cmd, &f.colour)
	var codes []string
	for _, d := range event.DecisionTable() {
		codes = append(codes, d.Code)
	}
	for _, name := range []string{"code", "explain"} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(codes, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

// start is when to begin; nil means with what comes next.
func (f *decisionsFlags) start(now time.Time) (*time.Time, error) {
	for _, pattern := range f.codes {
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, fmt.Errorf("pattern %q: %w", pattern, err)
		}
	}
	switch {
	case f.since == "" && f.follow:
		return nil, nil //nolint:nilnil // documented
	case f.since == "":
		t := now.Add(-24 * time.Hour)
		return &t, nil
	}
	since, err := (&eventsFlags{since: f.since}).start(now)
	if err != nil {
		return nil, fmt.Errorf("--since %s: write a duration such as 10m, or a time such as 2026-01-31T15:04:05Z", f.since)
	}
	return since, nil
}

// explainDecision prints the paragraph of docs/decisions.md.
func (a *app) explainDecision(cmd *cobra.Command, code string) error {
	d, ok := event.Explain(strings.ToUpper(code))
	if !ok {
		return usage(cmd, "--explain %s: there is no such code; docs/decisions.md lists all", code)
	}
	_, err := fmt.Fprintf(a.stdout, "%s: %s, on the stream decisions:%s\n\n%s\n\nWhat to do: %s\n", d.Code, d.Name, d.Stream, wrap(d.Meaning, 80), wrap(d.Remedy, 80))
	return err
}

// wrap breaks text into lines of at most width bytes, where it has spaces.
func wrap(text string, width int) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case column+1+len(word) > width:
			b.WriteByte('\n')
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}

func (a *app) decisions(ctx context.Context, f *decisionsFlags, since *time.Time) error {
	st := a.style(f.colour)
	tty := st.width > 0
	p := &decisionPrinter{out: bufio.NewWriter(a.stdout), flags: f, colour: st.colour, ascii: tty && st.ascii, zone: time.Local}
	say := func(format string, args ...any) {
		if tty {
			fmt.Fprintf(a.stderr, format+"\n", args...)
		}
	}
	if f.tap || f.socket != "" {
		return a.tapDecisions(ctx, f, since, p, say)
	}
	c, err := a.load()
	if err != nil {
		return err
	}
	f.socket = c.Control.Socket
	if c.Transport.Address == "" {
		return a.tapDecisions(ctx, f, since, p, say)
	}
	err = a.redisDecisions(ctx, agent.Placed(c), since, f.follow, p, say)
	var e *exit
	if !errors.As(err, &e) || e.code != exitUnavailable || p.shown > 0 {
		return err
	}
	fmt.Fprintf(a.stderr, "%v; what follows is what the sensor's buffer still has\n", err)
	if terr := a.tapDecisions(ctx, f, since, p, say); terr != nil {
		return &exit{exitUnavailable, fmt.Errorf("%w; %w", err, terr), e.try}
	}
	return nil
}

func (a *app) redisDecisions(ctx context.Context, t config.Transport, since *time.Time, follow bool, p *decisionPrinter, say func(string, ...any)) error {
	var keys []string
	for _, k := range t.DecisionKeys() {
		if !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return a.redisView(ctx, t, keys, since, follow, p, say)
}

// tapDecisions shows what the sensor's buffer has, and what comes.
func (a *app) tapDecisions(ctx context.Context, f *decisionsFlags, since *time.Time, p *decisionPrinter, say func(string, ...any)) error {
	c, err := a.control(f.socket)
	if err != nil {
		return err
	}
	q := url.Values{}
	if since != nil {
		q.Set("since", since.UTC().Format(time.RFC3339Nano))
	}
	if f.follow {
		q.Set("follow", "1")
		say("live from the sensor on %s; Ctrl-C ends", c.socket)
	}
	body, err := c.get(ctx, "/decisions?"+q.Encode())
	if err != nil {
		return err
	}
	defer body.Close()
	return a.tapView(ctx, c, body, p, f.follow)
}

// decisionPrinter writes the decisions that the flags select.
type decisionPrinter struct {
	out    *bufio.Writer
	flags  *decisionsFlags
	colour bool
	ascii  bool
	zone   *time.Location
	shown  int
}

func (p *decisionPrinter) done() bool   { return false }
func (p *decisionPrinter) flush() error { return p.out.Flush() }

// decision is the part of a record that a line needs.
type decision struct {
	record
	Metadata struct {
		LogName string `json:"log_name"`
		Tags    []struct {
			Name  string `json:"name"`
			Value string `json:"value"`
		} `json:"tags"`
	} `json:"metadata"`
	Count    uint64 `json:"count"`
	Unmapped struct {
		Sensor map[string]any `json:"sensor"`
		Lost   struct {
			ByType map[string]uint64 `json:"by_type"`
			Ranges []struct {
				Cause string `json:"cause"`
				First uint64 `json:"first"`
				Last  uint64 `json:"last"`
			} `json:"ranges"`
		} `json:"lost"`
		Suppressed struct {
			ByType map[string]uint64 `json:"by_type"`
		} `json:"suppressed"`
	} `json:"unmapped"`
}

func (d *decision) tag(name string) string {
	for _, t := range d.Metadata.Tags {
		if t.Name == name {
			return t.Value
		}
	}
	return ""
}

func (d *decision) state(name string) string {
	s, _ := d.Unmapped.Sensor[name].(string)
	if len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" {
		s = s[:12] + "…" // a hash
	}
	return s
}

// show writes one record if it is wanted.
func (p *decisionPrinter) show(line []byte) error {
	var d decision
	if err := json.Unmarshal(line, &d); err != nil {
		return nil //nolint:nilerr // somebody else's entry
	}
	stream, ok := strings.CutPrefix(d.Metadata.LogName, "decisions:")
	if !ok {
		return nil // of another producer, which says other things
	}
	if !p.wanted(&d) {
		return nil
	}
	p.shown++
	if p.flags.json {
		_, err := p.out.Write(append(line, '\n'))
		return err
	}
	_, err := p.out.WriteString(p.line(&d, stream) + "\n")
	return err
}

func (p *decisionPrinter) wanted(d *decision) bool {
	code := func(pattern string) bool {
		ok, err := path.Match(strings.ToUpper(pattern), d.StatusCode)
		return ok && err == nil
	}
	return (len(p.flags.codes) == 0 || slices.ContainsFunc(p.flags.codes, code)) &&
		(len(p.flags.cases) == 0 || slices.Contains(p.flags.cases, d.tag("case_id")))
}

const (
	codeWidth   = 20
	streamWidth = 9
)

func (p *decisionPrinter) line(d *decision, stream string) string {
	b := lineBuilder{colour: p.colour, ascii: p.ascii}
	t, err := time.Parse(time.RFC3339Nano, d.TimeDT)
	if err != nil {
		t = time.UnixMilli(d.Time)
	}
	b.add(dim, t.In(p.zone).Format("2006-01-02 15:04:05.000")+" ")
	b.add(plain, pad(stream, streamWidth)+" ")
	colour := green
	switch {
	case d.SeverityID >= 4:
		colour = red
	case d.SeverityID >= 2:
		colour = yellow
	}
	b.add(colour, pad(d.StatusCode, codeWidth)+" ")
	if before, after := d.state("before"), d.state("after"); before != "" || after != "" {
		text := orDash(before) + " → " + orDash(after)
		if before == after {
			text = after
		}
		b.add(bold, cut(safe(text), cutText)+"  ")
	}
	b.add(plain, cut(safe(d.Message), cutText))
	if notes := d.notes(); notes != "" {
		b.add(plain, "  "+cut(safe(notes), cutText))
	}
	if ids := d.ids(); ids != "" {
		b.add(dim, "  ["+cut(safe(ids), cutText)+"]")
	}
	return strings.TrimRight(b.String(), " ")
}

// notes are the counts and the scalars among the evidence.
func (d *decision) notes() string {
	var out []string
	if d.Count > 0 {
		out = append(out, fmt.Sprintf("count=%d", d.Count))
	}
	for _, r := range d.Unmapped.Lost.Ranges {
		out = append(out, fmt.Sprintf("%s=%d-%d", r.Cause, r.First, r.Last))
	}
	for _, by := range []map[string]uint64{d.Unmapped.Lost.ByType, d.Unmapped.Suppressed.ByType} {
		for _, kind := range slices.Sorted(maps.Keys(by)) {
			out = append(out, fmt.Sprintf("%s=%d", kind, by[kind]))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(d.Unmapped.Sensor)) {
		if key == "before" || key == "after" {
			continue
		}
		switch v := d.Unmapped.Sensor[key].(type) {
		case string:
			if v == "" || strings.Contains(d.Message, v) {
				continue
			}
			if text := d.state(key); !strings.ContainsAny(text, " =") {
				out = append(out, key+"="+text)
			} else {
				out = append(out, fmt.Sprintf("%s=%q", key, text))
			}
		case float64:
			out = append(out, fmt.Sprintf("%s=%s", key, number(v)))
		case bool:
			out = append(out, fmt.Sprintf("%s=%t", key, v))
		case []any:
			for _, item := range v {
				if text := evidenceText(item); text != "" {
					out = append(out, key+": "+text)
				}
			}
		case map[string]any:
			if len(v) > 0 {
				out = append(out, fmt.Sprintf("%s=%d", key, len(v)))
			}
		}
	}
	return strings.Join(out, " ")
}

// evidenceText is an element of a list: a text, or a change of a setting. Others need
// --json.
func evidenceText(v any) string {
	m, ok := v.(map[string]any)
	switch {
	case !ok:
		return fmt.Sprint(v)
	case m["key"] == nil:
		return ""
	}
	return fmt.Sprintf("%v %v → %v", m["key"], m["before"], m["after"])
}

func number(v float64) string {
	if v == float64(int64(v)) {
		return fmt.Sprint(int64(v))
	}
	return fmt.Sprintf("%.3g", v)
}

// ids are those of the case, and of who decided.
func (d *decision) ids() string {
	var out []string
	for _, name := range []string{"case_id", "investigation_id", "user_id"} {
		if v := d.tag(name); v != "" {
			out = append(out, strings.TrimSuffix(name, "_id")+" "+v)
		}
	}
	return strings.Join(out, ", ")
}
