// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

// exportFlags are those of buffer export.
type exportFlags struct {
	place
	query             evidence.Query
	seq, since, until string
	to                string
}

func (a *app) bufferExportCommand() *cobra.Command {
	var f exportFlags
	cmd := &cobra.Command{
		Use:   "export [PATH]",
		Short: "Write records out of the buffer as lines of JSON",
		Long: `Write records out of the buffer, one line of JSON each, in order and byte for byte as
they are delivered: what waits for Redis, and what is kept after delivery. Conditions
select what meets all of them; times are those of the events.

Standard error says what was written, with a SHA-256 of it, and what of the wanted
records is missing and why; then the exit code is 1. An export from the running
sensor is itself a decision that auditors see: EVIDENCE_EXPORTED. The sensor waits
for nobody: a reader that takes nothing for 30 seconds is dropped, so write to a file
before you read at leisure.

  edr-sensor buffer export --to evidence.ndjson
  edr-sensor buffer export --since 2h --kind exec | jq -r .process.cmd_line
  edr-sensor buffer export --case C-17 --envelope --to C-17.ndjson
  edr-sensor buffer export --seq 1000-1999 q.db.bad-20261129T080000.000000000Z`,
		Args: f.args,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.parse(time.Now()); err != nil {
				return usage(cmd, "%w", err)
			}
			return a.export(cmd.Context(), &f)
		},
	}
	f.flags(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.since, "since", "", "events from this long ago (10m), or this time (2026-01-31T15:04:05Z) on")
	fl.StringVar(&f.until, "until", "", "events before this long ago, or this time")
	fl.StringVar(&f.seq, "seq", "", "sequence numbers: 17, 100-199, 100- or -199")
	fl.StringSliceVar(&f.query.Kinds, "kind", nil, "only these kinds: exec, net.close, file, 'conn*' …")
	fl.StringSliceVar(&f.query.Cases, "case", nil, "only what was collected for these cases")
	fl.StringSliceVar(&f.query.Streams, "stream", nil, "only these streams: "+strings.Join(evidence.StreamNames(), ", "))
	fl.BoolVar(&f.query.Envelope, "envelope", false, "put epoch, seq, stream and whether it was delivered around each event")
	fl.StringVar(&f.to, "to", "", "write to this new file, for its owner only, instead of standard output")
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(eventKinds(), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("stream", cobra.FixedCompletions(evidence.StreamNames(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// parse makes the query of the flags.
func (f *exportFlags) parse(now time.Time) error {
	var err error
	if f.query.First, f.query.Last, err = parseSeqs(f.seq); err != nil {
		return fmt.Errorf("--seq %s: write a sequence number such as 17, or a range such as 100-199, 100- or -199", f.seq)
	}
	for name, t := range map[string]struct {
		text string
		to   *time.Time
	}{"since": {f.since, &f.query.Since}, "until": {f.until, &f.query.Until}} {
		at, err := (&eventsFlags{since: t.text}).start(now)
		if err != nil {
			return fmt.Errorf("--%s %s: write a duration such as 10m, or a time such as 2026-01-31T15:04:05Z", name, t.text)
		}
		if at != nil {
			*t.to = *at
		}
	}
	return f.query.Validate()
}

// parseSeqs reads a range of sequence numbers; 0 is an open end.
func parseSeqs(text string) (first, last uint64, err error) {
	if text == "" {
		return 0, 0, nil
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	for _, s := range []struct {
		text string
		n    *uint64
	}{{from, &first}, {to, &last}} {
		if s.text == "" {
			continue
		}
		if *s.n, err = strconv.ParseUint(s.text, 10, 64); err == nil && *s.n == 0 {
			err = errors.New("they begin with 1")
		}
		if err != nil {
			return 0, 0, err
		}
	}
	if from == "" && to == "" {
		return 0, 0, errors.New("no number")
	}
	return first, last, nil
}

func (a *app) export(ctx context.Context, f *exportFlags) (err error) {
	out := &exportOutput{w: interruptible(ctx, a.stdout), hash: sha256.New()}
	if f.to != "" {
		file, oerr := os.OpenFile(f.to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(oerr, fs.ErrExist) {
			return &exit{exitFailure, fmt.Errorf("%s is there already: evidence is not overwritten", f.to), "another name for --to"}
		}
		if oerr != nil {
			return oerr
		}
		out.w = file
		defer func() {
			err = errors.Join(err, file.Sync(), file.Close())
			if err != nil && out.bytes == 0 {
				err = errors.Join(err, os.Remove(f.to)) // nothing came
			}
		}()
	}
	return a.withBuffer(ctx, &f.place, func(c *control) error {
		return a.exportLive(ctx, c, f, out)
	}, func(s *buffer.Snapshot) error {
		w := bufio.NewWriterSize(out, 1<<20)
		sum, err := evidence.Export(ctx, s, f.query, w)
		err = errors.Join(err, w.Flush())
		if ctx.Err() != nil {
			sum.Error, err = "interrupted", nil
		}
		if err != nil {
			return err
		}
		damage := ""
		if s.Damage != nil {
			damage = treeDamage(s)
		}
		return a.exported(f, &sum, damage)
	})
}

// interruptible is w, of which a write ends with ctx even if it is a pipe or a terminal
// that nobody takes anything from.
func interruptible(ctx context.Context, w io.Writer) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return w
	}
	if st, err := f.Stat(); err != nil || st.Mode().IsRegular() {
		return w
	}
	return &pollWriter{ctx.Err, f}
}

type pollWriter struct {
	ended func() error // of the context that it is for
	f     *os.File
}

func (w *pollWriter) Write(p []byte) (n int, err error) {
	const atomic = 4096 // what a pipe that can be written to takes without waiting
	for n < len(p) {
		if err := w.ended(); err != nil {
			return n, err
		}
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(w.f.Fd()), Events: unix.POLLOUT}}, 200)
		if errors.Is(err, unix.EINTR) || err == nil && ready == 0 {
			continue
		}
		m, err := w.f.Write(p[n:min(len(p), n+atomic)])
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// exportOutput counts and hashes what is written.
type exportOutput struct {
	w     io.Writer
	hash  hash.Hash
	bytes int64
	lines uint64
}

func (o *exportOutput) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	o.hash.Write(p[:n])
	o.bytes += int64(n)
	o.lines += uint64(bytes.Count(p[:n], []byte{'\n'}))
	return n, err
}

func (a *app) exportLive(ctx context.Context, c *control, f *exportFlags, out *exportOutput) error {
	resp, err := c.open(ctx, http.MethodGet, "/buffer/export?"+f.query.Values().Encode(), http.NoBody)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{out}, resp.Body, make([]byte, 256<<10))
	var sum evidence.Summary
	text := resp.Trailer.Get(agent.ExportTrailer)
	switch {
	case err == nil && text != "":
		if err := json.Unmarshal([]byte(text), &sum); err != nil {
			return fmt.Errorf("read the summary of the export: %w", err)
		}
		if got := hex.EncodeToString(out.hash.Sum(nil)); got != sum.SHA256 {
			return fmt.Errorf("what arrived (%d bytes, sha256 %s) is not what the sensor sent (%d bytes, sha256 %s)", out.bytes, got, sum.Bytes, sum.SHA256)
		}
		return a.exported(f, &sum, "")
	case ctx.Err() != nil:
		sum.Error = "interrupted"
	case err == nil, errors.Is(err, io.ErrUnexpectedEOF), isReset(err):
		sum.Error = "the sensor dropped the connection: it has ended, or nothing was taken for 30 seconds"
	default:
		return fmt.Errorf("export: %w", err)
	}
	// What arrived is all that is known.
	sum.Records, sum.Bytes, sum.SHA256 = out.lines, out.bytes, hex.EncodeToString(out.hash.Sum(nil))
	return a.exported(f, &sum, "")
}

// exported says what was written and what is missing, which is an error.
func (a *app) exported(f *exportFlags, s *evidence.Summary, damage string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "exported %s (%s)", plural64(s.Records, "record"), bytesText(s.Bytes))
	if s.First > 0 && s.First <= s.Last {
		fmt.Fprintf(&b, " of seq %d to %d, epoch %s", s.First, s.Last, safe(s.Epoch))
	}
	if f.to != "" {
		fmt.Fprintf(&b, ", to %s", safe(f.to))
	}
	fmt.Fprintf(&b, "\nsha256 %s\n", safe(s.SHA256))
	for i := range s.Missing {
		fmt.Fprintf(&b, "missing: %s\n", missingText(&s.Missing[i]))
	}
	if s.More > 0 {
		fmt.Fprintf(&b, "missing: %s more, in other places\n", plural64(s.More, "record"))
	}
	if s.Unknown > 0 {
		fmt.Fprintf(&b, "missing: %s that say nothing to select them by\n", plural64(s.Unknown, "record"))
	}
	if !s.Begins.IsZero() {
		fmt.Fprintf(&b, "missing: what is older than %s, the oldest record in the buffer: it was delivered, or is named in a RECORDS_LOST record\n", s.Begins.UTC().Format(time.RFC3339))
	}
	if damage != "" {
		fmt.Fprintf(&b, "missing: perhaps more: %s\n", safe(damage))
	}
	if _, err := io.WriteString(a.stderr, b.String()); err != nil {
		return err
	}
	switch {
	case s.Error != "":
		return &exit{exitFailure, fmt.Errorf("the export is not complete: %s", s.Error), ""}
	case !s.Complete() || damage != "":
		return &exit{exitFailure, errors.New("the export is not complete"), ""}
	}
	return nil
}

func missingText(m *evidence.Missing) string {
	text := fmt.Sprintf("seq %d to %d (%s): ", m.First, m.Last, plural64(m.Count(), "record"))
	if m.First == m.Last {
		text = fmt.Sprintf("seq %d: ", m.First)
	}
	switch m.Cause {
	case evidence.CauseGone:
		text += "no longer in the buffer; delivered, or named in a RECORDS_LOST record"
	case evidence.CauseLeft:
		text += "left the buffer during the export"
	case evidence.CauseFuture:
		text += "not there yet"
	case buffer.CauseTruncated:
		text += "dropped undelivered, because the buffer was full"
	case buffer.CauseCorrupt:
		text += "damaged on disk"
	default:
		text += safe(m.Cause)
	}
	if m.Reason != "" {
		text += ": " + safe(m.Reason)
	}
	return text
}
