// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
)

// eventsFlags are those of the events command.
type eventsFlags struct {
	output    string
	colour    string
	kinds     []string
	pids      []int
	exes      []string
	since     string
	fromStart bool
	follow    bool
	number    int
	tap       bool
	socket    string
	verify    bool
	json      bool
}

func (a *app) eventsCommand() *cobra.Command {
	var f eventsFlags
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show events, live or from the Redis streams",
		Long: `Show events and the sensor's own decisions, one per line.

They come from the Redis streams of the configuration. Without Redis, or with
--tap, they come live from the running sensor. Without --since or --from-start
only new events are shown, until Ctrl-C.

  edr-sensor events --kind exec --exe curl        executions of any curl
  edr-sensor events --kind net --pid 4711         connections of one process
  edr-sensor events --kind rename,delete          files renamed or deleted
  edr-sensor events --since 10m -o json | jq .    the last ten minutes, complete

With --verify it shows no events but reads all that the streams hold and tells of
each agent what is missing, there twice or out of order, and what of the missing a
loss record names. It exits 1 when anything is, but for what is named as lost.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.validate(cmd); err != nil {
				return err
			}
			if f.verify {
				return a.verify(cmd.Context(), cmd, f.json)
			}
			return a.events(cmd.Context(), cmd, &f)
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.output, "output", "o", "compact", "compact or json (the event as it is stored)")
	fl.StringSliceVar(&f.kinds, "kind", nil, "only these kinds: exec, net.close, file, 'conn*' …")
	fl.IntSliceVar(&f.pids, "pid", nil, "only events of, or caused by, these processes")
	fl.StringSliceVar(&f.exes, "exe", nil, "only these executables: curl, bin/curl, /usr/bin/curl, '/tmp/*' …")
	fl.StringVar(&f.since, "since", "", "start this long ago (10m), or at this time (2026-01-31T15:04:05Z); Redis only")
	fl.BoolVar(&f.fromStart, "from-start", false, "start with the oldest event in the streams; Redis only")
	fl.BoolVarP(&f.follow, "follow", "f", false, "go on with new events after those of --since or --from-start")
	fl.IntVarP(&f.number, "number", "n", 0, "end after this many events were shown")
	fl.BoolVar(&f.tap, "tap", false, "read live from the sensor instead of Redis")
	fl.StringVar(&f.socket, "socket", "", "control socket for --tap (default: control.socket)")
	fl.BoolVar(&f.verify, "verify", false, "audit the streams: what is missing, duplicate, out of order or named as lost")
	fl.BoolVar(&f.json, "json", false, "with --verify: the findings as JSON")
	addColourFlag(cmd, &f.colour)
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"compact", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(eventKinds(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// eventKinds are the words for --kind.
func eventKinds() []string {
	return []string{
		"process", "exec", "fork", "exit", "snapshot", "net", "connect", "connect_failed", "accept", "listen", "close",
		"file", "create", "write", "open_write", "delete", "rename", "link", "symlink", "mkdir", "chmod", "chown", "truncate", "xattr", "timestomp",
		"mount", "umount", "move_mount", "sensor",
	}
}

func addColourFlag(cmd *cobra.Command, when *string) {
	cmd.Flags().StringVar(when, "color", "auto", "auto, always or never")
	_ = cmd.RegisterFlagCompletionFunc("color", cobra.FixedCompletions([]string{"auto", "always", "never"}, cobra.ShellCompDirectiveNoFileComp))
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		switch *when {
		case "auto", "always", "never":
		default:
			return usage(cmd, "--color %s: write auto, always or never", *when)
		}
		if before != nil {
			return before(cmd, args)
		}
		return nil
	}
}

func (f *eventsFlags) validate(cmd *cobra.Command) error {
	if f.output != "compact" && f.output != "json" {
		return usage(cmd, "--output %s: write compact or json", f.output)
	}
	if f.number < 0 {
		return usage(cmd, "--number %d: write a positive number", f.number)
	}
	if f.since != "" && f.fromStart {
		return usage(cmd, "--since and --from-start exclude each other")
	}
	if f.tap && (f.since != "" || f.fromStart) {
		return usage(cmd, "--since and --from-start need Redis; --tap shows only what happens now")
	}
	if f.json && !f.verify {
		return usage(cmd, "--json belongs to --verify; for events write -o json")
	}
	if f.verify {
		for _, name := range []string{"tap", "socket", "since", "from-start", "follow", "number", "kind", "pid", "exe", "output"} {
			if cmd.Flags().Changed(name) {
				return usage(cmd, "--verify and --%s exclude each other: it reads all that the streams hold", name)
			}
		}
	}
	for _, list := range [][]string{f.kinds, f.exes} {
		for _, pattern := range list {
			if _, err := path.Match(pattern, ""); err != nil {
				return usage(cmd, "pattern %q: %w", pattern, err)
			}
		}
	}
	if _, err := f.start(time.Now()); err != nil {
		return usage(cmd, "--since %s: write a duration such as 10m, or a time such as 2026-01-31T15:04:05Z", f.since)
	}
	return nil
}

// start is when to begin; nil means with what comes next.
func (f *eventsFlags) start(now time.Time) (*time.Time, error) {
	if f.fromStart {
		return &time.Time{}, nil
	}
	if f.since == "" {
		return nil, nil //nolint:nilnil // documented
	}
	if d, err := time.ParseDuration(f.since); err == nil && d >= 0 {
		t := now.Add(-d)
		return &t, nil
	}
	t, err := time.Parse(time.RFC3339, f.since)
	if err != nil {
		return nil, err
	}
	return &t, nil
}

func (a *app) events(ctx context.Context, cmd *cobra.Command, f *eventsFlags) error {
	st := a.style(f.colour)
	tty := st.width > 0
	p := &printer{
		out: bufio.NewWriter(a.stdout), left: f.number, json: f.output == "json",
		filter: filter{f.kinds, f.pids, f.exes},
		// A file is no terminal: whoever reads it may know more than this locale.
		compact: compact{colour: st.colour, ascii: tty && st.ascii, width: st.width, zone: time.Local},
	}
	say := func(format string, args ...any) {
		if tty {
			fmt.Fprintf(a.stderr, format+"\n", args...)
		}
	}
	if f.tap || f.socket != "" {
		return a.tapEvents(ctx, f.socket, p, say)
	}
	c, err := a.load()
	if err != nil {
		return err
	}
	if c.Transport.Address == "" {
		if f.since != "" || f.fromStart {
			return usage(cmd, "--since and --from-start need Redis, and transport.address is not set")
		}
		return a.tapEvents(ctx, c.Control.Socket, p, say)
	}
	return a.redisEvents(ctx, agent.Placed(c), f, p, say)
}

// tapEvents shows what the sensor appends, live.
func (a *app) tapEvents(ctx context.Context, socket string, p *printer, say func(string, ...any)) error {
	c, err := a.control(socket)
	if err != nil {
		return err
	}
	body, err := c.get(ctx, "/tap")
	if err != nil {
		return err
	}
	defer body.Close()
	say("live from the sensor on %s; Ctrl-C ends", c.socket)
	return a.tapView(ctx, c, body, p, true)
}

// view shows records as they come.
type view interface {
	show(line []byte) error
	done() bool // enough was shown
	flush() error
}

// tapView shows what the sensor sends, which has an end only if it does not follow.
func (a *app) tapView(ctx context.Context, c *control, body io.Reader, p view, follows bool) error {
	r := bufio.NewReaderSize(body, 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			if errors.Is(err, io.EOF) && !follows {
				return p.flush()
			}
			return errors.Join(p.flush(), a.tapEnd(ctx, c, err, follows))
		}
		line = bytes.TrimSuffix(line, []byte{'\n'})
		if n := dropped(line); n > 0 {
			fmt.Fprintf(a.stderr, "%s left out: this view is slower than the sensor\n", plural(n, "event"))
			continue
		}
		if err := p.show(line); err != nil || p.done() {
			return errors.Join(err, p.flush())
		}
		if r.Buffered() == 0 {
			if err := p.flush(); err != nil {
				return err
			}
		}
	}
}

// tapEnd says why a live view ended, or an answer that does not follow has no end.
func (a *app) tapEnd(ctx context.Context, c *control, err error, follows bool) error {
	if ctx.Err() != nil {
		return nil //nolint:nilerr // Ctrl-C is how a live view ends
	}
	if !follows {
		return &exit{exitFailure, fmt.Errorf("the answer of the sensor on %s is not complete: %w", c.socket, err), "journalctl -u edr-sensor"}
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &exit{exitFailure, fmt.Errorf("the sensor on %s ended", c.socket), "systemctl status edr-sensor"}
	}
	return fmt.Errorf("read events: %w", err)
}

// dropped reads a line that tells how many events a slow view did not get.
func dropped(line []byte) int {
	if !bytes.HasPrefix(line, []byte(`{"tap_dropped":`)) {
		return 0
	}
	var d struct {
		N int `json:"tap_dropped"`
	}
	if json.Unmarshal(line, &d) != nil {
		return 0
	}
	return d.N
}

// How long a read of the streams waits, and how soon a lost server is asked
// again.
const (
	streamWait  = time.Second
	streamRetry = time.Second
)

// redisEvents shows what the streams hold, and what arrives.
func (a *app) redisEvents(ctx context.Context, t config.Transport, f *eventsFlags, p *printer, say func(string, ...any)) error {
	since, err := f.start(time.Now())
	if err != nil {
		return err
	}
	return a.redisView(ctx, t, t.Streams(), since, f.follow, p, say)
}

// redisView shows what streams hold since a time, or only what arrives when since is
// nil, and with follow goes on.
func (a *app) redisView(ctx context.Context, t config.Transport, keys []string, since *time.Time, follow bool, p view, say func(string, ...any)) error {
	client, err := newRedis(t)
	if err != nil {
		return &exit{exitConfig, err, "edr-sensor check" + a.configFlag()}
	}
	defer client.Close()
	s, err := openStreams(ctx, client, keys, since)
	if err != nil {
		return explainRedis(t, err)
	}
	wait := time.Duration(0)
	if since == nil || follow {
		wait = streamWait
	}
	say("%s at %s; Ctrl-C ends", joinAnd(keys), t.Address)
	away := false
	told := make(map[string]bool) // streams of which a malformed entry was reported
	for {
		batch, err := s.next(ctx, wait)
		switch {
		case ctx.Err() != nil:
			return p.flush()
		case err != nil && (wait == 0 || isReply(err) && !redis.IsLoadingError(err)):
			return errors.Join(p.flush(), explainRedis(t, err))
		case err != nil:
			// A view that follows outlives a restart of the server.
			if !away {
				fmt.Fprintf(a.stderr, "redis at %s: %v; trying again\n", t.Address, err)
			}
			away = true
			select {
			case <-ctx.Done():
			case <-time.After(streamRetry):
			}
			continue
		}
		if away {
			fmt.Fprintf(a.stderr, "redis at %s is back\n", t.Address)
			away = false
		}
		for _, e := range batch {
			recs, err := s.records(e)
			if err != nil && !told[e.key] {
				told[e.key] = true
				fmt.Fprintf(a.stderr, "%s: left out, as are further ones of this stream that are malformed\n", safe(err.Error()))
			}
			for i := range recs {
				if err := p.show(recs[i].Data); err != nil {
					return err
				}
				if p.done() {
					return p.flush()
				}
			}
		}
		if err := p.flush(); err != nil {
			return err
		}
		if len(batch) == 0 && wait == 0 {
			return nil
		}
	}
}

// printer writes the events that pass the filter.
type printer struct {
	out     *bufio.Writer
	compact compact
	json    bool
	filter  filter
	left    int // events still to show; 0 from the beginning: no end
	shown   int
}

func (p *printer) flush() error { return p.out.Flush() }

func (p *printer) done() bool { return p.left > 0 && p.shown >= p.left }

// show writes one event. What is not an event is shown as it is, made safe:
// somebody put it into the stream.
func (p *printer) show(line []byte) error {
	if p.json && p.filter.everything() {
		return p.write(line)
	}
	r, err := parseRecord(line)
	switch {
	case err != nil && p.filter.everything():
		return p.write([]byte(cut(safe(string(line)), cutText)))
	case err != nil || !p.filter.match(r):
		return nil //nolint:nilerr // it does not match
	case p.json:
		return p.write(line)
	}
	return p.write([]byte(p.compact.line(r)))
}

func (p *printer) write(line []byte) error {
	p.shown++
	if _, err := p.out.Write(line); err != nil {
		return err
	}
	return p.out.WriteByte('\n')
}
