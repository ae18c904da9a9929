// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

func (a *app) bufferCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "buffer",
		Short: "Look into the buffer on disk, get evidence out of it, and verify it",
		Long: `Look into the buffer on disk, get evidence out of it, and verify it.

The buffer has what Redis does not have yet, and keeps the newest of what it has.
The running sensor is asked; where none runs, its files are read. A path names a
buffer's directory, a copy of its file, or a damaged one that was set aside: that is
read as it is, and nothing of it is changed.`,
		Args: a.unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.bufferInfoCommand(), a.bufferExportCommand(), a.bufferVerifyCommand())
	return cmd
}

// place is where a buffer is looked for.
type place struct {
	socket string // of the sensor; empty: the configured one
	path   string // of a directory or file; empty: the sensor's
}

func (p *place) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.socket, "socket", "", "control socket of the sensor (default: control.socket)")
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault // files
	}
}

// args takes the one path that there may be.
func (p *place) args(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) > 1:
		return usage(cmd, "unexpected argument %q", args[1])
	case len(args) == 1 && p.socket != "":
		return usage(cmd, "a path and --socket exclude each other")
	case len(args) == 1:
		p.path = args[0]
	}
	return nil
}

// withBuffer calls one of two: with a running sensor, or with the files of one that
// does not run.
func (a *app) withBuffer(ctx context.Context, p *place, live func(*control) error, files func(*buffer.Snapshot) error) error {
	path := p.path
	if path == "" {
		c, err := a.control(p.socket)
		if err != nil {
			return err
		}
		err = live(c)
		if !errors.Is(err, errNoSensor) || p.socket != "" {
			return err
		}
		conf, cerr := config.Load(a.configFile(), a.environ)
		if cerr != nil {
			return err
		}
		if _, serr := os.Stat(conf.Buffer.Dir); serr != nil && !errors.Is(serr, fs.ErrPermission) {
			return err
		}
		path = conf.Buffer.Dir
		fmt.Fprintf(a.stderr, "no sensor answers on %s; reading %s\n", c.socket, path)
	}
	s, err := buffer.Inspect(ctx, path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return &exit{exitPrivilege, err, "sudo edr-sensor buffer"}
	case err != nil:
		return err
	}
	defer s.Close()
	if s.InUse {
		fmt.Fprintf(a.stderr, "%s has the buffer open: what it holds in memory is not shown; without the path the sensor itself is asked\n", orSomebody(s.Holder))
	}
	return files(s)
}

func orSomebody(holder string) string {
	if holder == "" {
		return "somebody"
	}
	return holder
}

// fileInfo is what a file says about itself, and what is only known of a file.
type fileInfo struct {
	evidence.Info
	Live   bool   `json:"live"` // a sensor has said it
	Size   int64  `json:"size,omitempty"`
	Disk   int64  `json:"disk,omitempty"` // space that it takes
	InUse  bool   `json:"in_use,omitempty"`
	Holder string `json:"holder,omitempty"`
	Damage string `json:"damage,omitempty"` // why its tree is not to be used
	Exact  bool   `json:"exact,omitempty"`  // and whether what is lost by it can be named nevertheless
}

func newFileInfo(s *buffer.Snapshot) *fileInfo {
	i := s.Info()
	f := &fileInfo{Info: evidence.NewInfo(&i), Size: s.Size, Disk: s.Disk, InUse: s.InUse, Holder: s.Holder}
	if s.Damage != nil {
		f.Damage, f.Exact = s.Damage.Error(), s.Exact
	}
	return f
}

func (a *app) bufferInfoCommand() *cobra.Command {
	var p place
	var asJSON bool
	var when string
	cmd := &cobra.Command{
		Use:   "info [PATH]",
		Short: "Show what the buffer holds, since when, and what it has lost",
		Long: `Show what the buffer holds: how much of its space is used, which records wait for
delivery and which are kept after it, how old they are, what has left it and how,
losses that no delivered record names yet, and what was set aside, as damaged or as refused by Redis.`,
		Example: `  edr-sensor buffer info
  edr-sensor buffer info /var/lib/edr-sensor/buffer/q.db.bad-20261129T080000.000000000Z
  edr-sensor buffer info --json | jq .truncated`,
		Args: p.args,
		RunE: func(cmd *cobra.Command, _ []string) error {
			show := func(f *fileInfo) error {
				if asJSON {
					return a.writeJSON(f)
				}
				_, err := io.WriteString(a.stdout, f.screen(time.Now(), time.Local, a.style(when)).String())
				return err
			}
			return a.withBuffer(cmd.Context(), &p, func(c *control) error {
				f := &fileInfo{Live: true}
				if err := c.read(cmd.Context(), "/buffer", 10*time.Second, &f.Info); err != nil {
					return err
				}
				return show(f)
			}, func(s *buffer.Snapshot) error { return show(newFileInfo(s)) })
		},
	}
	p.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	addColourFlag(cmd, &when)
	return cmd
}

func (a *app) writeJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (a *app) bufferVerifyCommand() *cobra.Command {
	var p place
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify [PATH]",
		Short: "Read every record in the buffer, and say what is damaged",
		Long: `Read the whole buffer and hold it against itself: each chunk of records against its
checksum, the sequence numbers against each other, each record against its own, and
the counters against what there is; of a file also the tree that leads to them.

The exit code is 0 when nothing is wrong, 1 when something is. The running sensor
reads no faster than 64 MiB a second, so that the disk stays free for events.`,
		Args: p.args,
		RunE: func(cmd *cobra.Command, _ []string) error {
			show := func(r *evidence.Report) error { return a.showReport(r, asJSON) }
			return a.withBuffer(cmd.Context(), &p, func(c *control) error {
				var r evidence.Report
				if err := c.read(cmd.Context(), "/buffer/verify", 0, &r); err != nil {
					return err
				}
				return show(&r)
			}, func(s *buffer.Snapshot) error {
				r, err := evidence.Verify(cmd.Context(), s)
				if err != nil {
					return err
				}
				if s.Damage != nil {
					r.Findings = append([]string{treeDamage(s)}, r.Findings...)
				}
				return show(&r)
			})
		},
	}
	p.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return cmd
}

// treeDamage says what a damaged tree means.
func treeDamage(s *buffer.Snapshot) string {
	text := fmt.Sprintf("the file is damaged: %v; records were found by their checksums", s.Damage)
	if !s.Exact {
		text += "; which are missing cannot be told, nor which were delivered"
	}
	return text
}

// showReport writes what was found, and is an error when that is something.
func (a *app) showReport(r *evidence.Report, asJSON bool) error {
	n := len(r.Findings) + r.More
	if asJSON {
		if err := a.writeJSON(r); err != nil {
			return err
		}
	} else {
		var b strings.Builder
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "damaged: %s\n", safe(f))
		}
		if r.More > 0 {
			fmt.Fprintf(&b, "damaged: and %d more\n", r.More)
		}
		for _, note := range r.Notes {
			fmt.Fprintf(&b, "note: %s\n", safe(note))
		}
		verdict := "nothing is wrong"
		if n > 0 {
			verdict = plural(n, "finding")
		}
		fmt.Fprintf(&b, "verified %s in %s (%s) of epoch %s: %s\n", plural64(r.Records, "record"), plural(r.Chunks, "chunk"), bytesText(r.Bytes), orDash(safe(r.Epoch)), verdict)
		if _, err := io.WriteString(a.stdout, a.printable(b.String())); err != nil {
			return err
		}
	}
	if n > 0 {
		return &exit{exitFailure, errors.New("the buffer is damaged"), "edr-sensor buffer export gets out what is intact; docs/operations.md says what to do about the rest"}
	}
	return nil
}

func plural64(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return thousands(n) + " " + noun + "s"
}

// screen lays it out.
func (f *fileInfo) screen(now time.Time, zone *time.Location, st style) *screen {
	to := &screen{style: st}
	where := f.Path
	switch {
	case f.Live:
	case f.InUse:
		where += ", open in " + orSomebody(f.Holder)
	default:
		where += ", no sensor has it open"
	}
	to.text("buffer", plain, where, 2)
	to.text("epoch", plain, orDash(f.Epoch), 1)
	if f.Damage != "" {
		to.text("damage", red, f.Damage, 3)
		text := "records were found by their checksums; "
		if f.Exact {
			text += "what is missing can be named"
		} else {
			text += "what is missing cannot be named, and counts may be too low"
		}
		to.text("", red, text, 2)
	}
	b := to.build()
	b.add(dim, fmt.Sprintf("%-*s", labelWidth, "space"))
	to.gauge(b, gaugeWidth, f.Bytes, f.Bytes-f.UnsentBytes, f.Cap)
	b.add(plain, fmt.Sprintf(" %s of %s, in %s", percent(f.Bytes, f.Cap), bytesText(f.Cap), plural64(uint64(max(f.Chunks, 0)), "chunk")))
	to.end(b)
	var codecs []string
	if f.Compression != "" {
		codecs = append(codecs, f.Compression+" for new chunks")
	}
	if f.OldestCompression != "" && f.NewestCompression != "" {
		codecs = append(codecs, fmt.Sprintf("%s in the oldest, %s in the newest", f.OldestCompression, f.NewestCompression))
	}
	if len(codecs) > 0 {
		to.row("codec", plain, "%s", strings.Join(codecs, "; "))
	}
	f.records(to, now, zone)
	f.losses(to, now)
	if f.Resize != "" {
		to.text("error", red, "cannot be resized: "+f.Resize, 2)
	}
	if f.Error != "" {
		to.text("error", red, "cannot write: "+f.Error, 2)
	}
	return to
}

// records says which records there are.
func (f *fileInfo) records(to *screen, now time.Time, zone *time.Location) {
	if f.Records == 0 {
		to.row("records", plain, "none")
		return
	}
	to.row("records", plain, "%s: seq %s to %s", thousands(f.Records), thousands(f.First), thousands(f.Last))
	if !f.Oldest.IsZero() && !f.Newest.IsZero() {
		const layout = "2006-01-02 15:04:05"
		to.row("", plain, "%s of them: %s to %s", span(max(f.Newest.Sub(f.Oldest), 0)), f.Oldest.In(zone).Format(layout), f.Newest.In(zone).Format(layout))
	}
	text := "all are delivered"
	if f.Unsent > 0 {
		text = fmt.Sprintf("%s to deliver (%s), from seq %s on", thousands(f.Unsent), bytesText(f.UnsentBytes), thousands(max(f.Acked+1, f.First)))
		if !f.OldestUnsent.IsZero() {
			text += ", the oldest waits for " + ago(now, f.OldestUnsent)
		}
	}
	to.text("", plain, text, 2)
	if kept := f.Records - min(f.Records, f.Unsent); kept > 0 {
		to.row("", plain, "%s kept after delivery, up to seq %s", thousands(kept), thousands(f.Acked))
	}
}

// losses says what has left, and what of that nobody knows of.
func (f *fileInfo) losses(to *screen, now time.Time) {
	colour := plain
	if f.Truncated+f.Corrupt > 0 {
		colour = red
	}
	to.row("left", colour, "%s after delivery, %s undelivered, %s by damage", thousands(f.Reclaimed), thousands(f.Truncated), thousands(f.Corrupt))
	if f.InDoubt > 0 {
		to.row("", yellow, "%s of which the server will say whether they were delivered", thousands(f.InDoubt))
	}
	if f.Salvaged > 0 {
		to.row("", plain, "%s were salvaged from damaged files", thousands(f.Salvaged))
	}
	label := "losses"
	for i, l := range f.Losses {
		if i == mostLosses {
			to.row("", red, "and %d more ranges: edr-sensor buffer info --json", len(f.Losses)-i)
			break
		}
		to.text(label, red, lossText(l)+", not yet named in a delivered record", 2)
		label = ""
	}
	if f.Recovery != nil {
		to.text("recovery", red, recoveryText(f.Recovery, now), 3)
	}
	label = "aside"
	for _, s := range f.Aside {
		what := "a damaged file"
		switch {
		case s.Record > 0:
			what = fmt.Sprintf("record %s, which Redis did not take", thousands(s.Record))
		case s.Chunk > 0:
			what = fmt.Sprintf("a damaged chunk, from seq %s on", thousands(s.Chunk))
		}
		text := fmt.Sprintf("%s: %s, %s", s.Path, what, bytesText(s.Bytes))
		if !s.At.IsZero() {
			text += ", set aside " + ago(now, s.At) + " ago"
		}
		to.text(label, yellow, text, 2)
		label = ""
	}
}

// mostLosses is how many ranges a screen names.
const mostLosses = 8

func lossText(l evidence.Loss) string {
	if l.First == 0 {
		return l.Cause + ": an unknown number of records"
	}
	return fmt.Sprintf("%s: %s, seq %s to %s", l.Cause, plural64(l.Count, "record"), thousands(l.First), thousands(l.Last))
}
