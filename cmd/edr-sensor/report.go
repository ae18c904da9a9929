// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
)

// What a report has at most.
const (
	reportFile      = 8 << 20 // bytes of a file
	reportLines     = 2000    // decisions, events, lines of a log: the newest
	reportPatience  = 20 * time.Second
	reportEventTime = 3 * time.Second // that events are waited for
)

type reportFlags struct {
	output, socket string
	since          time.Duration
	events         bool
}

func (a *app) reportCommand() *cobra.Command {
	var f reportFlags
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Write a support bundle: what the sensor does and where it runs, without secrets",
		Long: `Write an archive for whoever is to help: status, metrics, the configuration in force
and where each value comes from, what doctor says, the log, the decisions, and facts
about the kernel. It works as well as it can when the sensor is down.

Passwords, keys and tokens are taken out wherever they stand, and events are not in it
unless --events asks for some. manifest.json names each file, and what was left out and
why. Only its owner can read the archive; look at it before you hand it on.`,
		Example: `  sudo edr-sensor report
  sudo edr-sensor report --since 2h --output /tmp/report.tar.gz
  sudo edr-sensor report --output - | tar -tz`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.since <= 0 {
				return usage(cmd, "--since %s: write a duration such as 2h", f.since)
			}
			if width, _ := terminalSize(a.stdout); f.output == "-" && width > 0 {
				return usage(cmd, "--output -: standard output is a terminal")
			}
			return a.report(cmd.Context(), &f)
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.output, "output", "o", "", "file to write; - is standard output (default: edr-sensor-report-HOST-TIME.tar.gz here)")
	fl.DurationVar(&f.since, "since", 24*time.Hour, "how far back the log and the decisions go")
	fl.BoolVar(&f.events, "events", false, "put in some of the newest events, with command lines and paths of this host")
	fl.StringVar(&f.socket, "socket", "", "control socket of the sensor (default: control.socket)")
	return cmd
}

// bundle collects the files of a report.
type bundle struct {
	redact  *redactor
	files   []reported
	leftOut []omission
}

// reported is a file of the report, as the manifest describes it.
type reported struct {
	Name     string `json:"name"`
	About    string `json:"about"`
	Bytes    int    `json:"bytes"`
	SHA256   string `json:"sha256"`
	Redacted int    `json:"redacted"` // places
	data     []byte
}

type omission struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

func (b *bundle) omit(what string, format string, args ...any) {
	if o := (omission{what, fmt.Sprintf(format, args...)}); !slices.Contains(b.leftOut, o) {
		b.leftOut = append(b.leftOut, o)
	}
}

// add puts a file in, or says why it is not.
func (b *bundle) add(name, about string, data []byte, err error) {
	switch {
	case err != nil && len(data) == 0:
		b.omit(name, "%v", err)
		return
	case err != nil:
		b.omit("the rest of "+name, "%v", err)
	case len(data) == 0:
		b.omit(name, "there is none")
		return
	}
	if len(data) > reportFile {
		b.omit("the beginning of "+name, "it is larger than %s", bytesText(reportFile))
		data = data[len(data)-reportFile:]
		if i := bytes.IndexByte(data, '\n'); i >= 0 {
			data = data[i+1:]
		}
	}
	b.files = append(b.files, reported{Name: name, About: about, data: data})
}

func (b *bundle) addJSON(name, about string, v any, err error) {
	data, e := json.MarshalIndent(v, "", "  ")
	if e != nil {
		err = errors.Join(err, e)
	}
	b.add(name, about, append(data, '\n'), err)
}

func (a *app) report(ctx context.Context, f *reportFlags) error {
	now := time.Now().UTC()
	host, err := os.Hostname()
	if err != nil || strings.Trim(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") != "" {
		host = "host"
	}
	dir := "edr-sensor-report-" + host + "-" + now.Format("20060102T150405Z")
	b := &bundle{redact: newRedactor()}
	if err := a.collect(ctx, f, now, b); err != nil {
		return err
	}
	archive, err := b.pack(dir, host, now)
	if err != nil {
		return fmt.Errorf("pack the report: %w", err)
	}
	if f.output == "-" {
		_, err := a.stdout.Write(archive)
		return err
	}
	path := f.output
	if path == "" {
		path = dir + ".tar.gz"
	}
	if err := writeNew(path, archive); err != nil {
		return err
	}
	var s strings.Builder
	fmt.Fprintf(&s, "%s: %s, %d files, %s redacted\n", path, bytesText(int64(len(archive))), len(b.files), plural(b.places(), "place"))
	for _, o := range b.leftOut {
		clean, _ := b.redact.apply([]byte(o.What + ": " + o.Why))
		fmt.Fprintf(&s, "  left out: %s\n", safe(string(clean)))
	}
	s.WriteString("Only you can read it. Look at it before you hand it on: tar -xzf " + path + "\n")
	_, err = io.WriteString(a.stdout, s.String())
	return err
}

// writeNew writes a file that only its owner can read, and none that is there.
func writeNew(path string, data []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return &exit{exitFailure, fmt.Errorf("write the report: %s is there already", path), "name another file with --output"}
	}
	if err != nil {
		return &exit{exitFailure, fmt.Errorf("write the report: %w", err), "name a file in another directory with --output"}
	}
	_, err = file.Write(data)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("write the report: %w", errors.Join(err, os.Remove(path)))
	}
	return nil
}

// collect gathers what there is. Only the end of ctx is an error.
func (a *app) collect(ctx context.Context, f *reportFlags, now time.Time, b *bundle) error {
	b.redact.environment(a.environ)
	cfg, settings, err := config.Explain(a.configFile(), a.environ)
	a.collectConfig(b, settings, err)
	if err != nil {
		cfg = config.Default()
	}
	b.secretFiles(slices.Collect(maps.Values(cfg.Transport.SecretFiles()))...)
	if f.socket == "" {
		f.socket = cfg.Control.Socket
	}
	c := newControl(f.socket)
	up := a.collectSensor(ctx, f, c, now, b)
	collectJournal(ctx, now.Add(-f.since), b)
	collectHost(b)
	if pid := c.peer(ctx); pid > 0 {
		collectProcess(b, pid)
	} else {
		b.omit("process.txt", "no sensor answers")
	}
	if !up {
		a.collectStreams(ctx, agent.Placed(cfg), f, now, b)
	}
	d := a.newDoctor()
	d.examine(ctx)
	b.addJSON("doctor.json", "what edr-sensor doctor says of this host", map[string]any{"version": thisBuild().Version, "checks": d.findings}, nil)
	if !f.events {
		b.omit("events.ndjson", "--events was not given: events have command lines, paths and addresses of this host")
	}
	return ctx.Err()
}

func (a *app) collectConfig(b *bundle, settings []config.Setting, err error) {
	var problems []string
	for _, p := range config.Problems(err) {
		problems = append(problems, p.Error())
	}
	b.addJSON("config.json", "the configuration as it would be loaded now, and where each value comes from", map[string]any{
		"file": a.configFile(), "problems": problems, "settings": settings,
	}, nil)
}

// secretFiles learns what must not be in the report.
func (b *bundle) secretFiles(paths ...string) {
	for _, path := range paths {
		if path == "" {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			b.omit("what is in "+path, "it cannot be read, so that only what looks like a secret is taken out: %v", err)
			continue
		}
		for line := range strings.Lines(string(data)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "-----") {
				b.redact.know(line)
			}
		}
	}
}

// collectSensor asks the running sensor, and tells whether there is one.
func (a *app) collectSensor(ctx context.Context, f *reportFlags, c *control, now time.Time, b *bundle) (up bool) {
	fetch := func(path string, most time.Duration) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, most)
		defer cancel()
		body, err := c.get(ctx, path)
		if err != nil {
			return nil, err
		}
		defer body.Close()
		data, err := io.ReadAll(io.LimitReader(body, 4*reportFile))
		if errors.Is(err, context.DeadlineExceeded) && path == "/tap" {
			err = nil
		}
		return data, err
	}
	status, err := fetch("/status", reportPatience)
	b.add("status.json", "what the sensor sees, keeps, sends and misses", status, err)
	if err != nil {
		for _, name := range []string{"metrics.txt", "config-running.json", "log.ndjson"} {
			b.omit(name, "the sensor did not answer")
		}
		return false
	}
	metrics, err := fetch("/metrics", reportPatience)
	b.add("metrics.txt", "the metrics, as Prometheus gets them", metrics, err)
	running, err := fetch("/config", reportPatience)
	b.add("config-running.json", "the configuration in force", running, err)
	var inForce struct{ Settings []config.Setting }
	if json.Unmarshal(running, &inForce) == nil {
		for _, s := range inForce.Settings {
			if _, secret := (config.Transport{}).SecretFiles()[s.Key]; secret {
				b.secretFiles(s.Value)
			}
		}
	}
	lines, err := fetch("/log/recent", reportPatience)
	b.add("log.ndjson", "the newest lines of the log, as the sensor remembers them", lines, err)
	q := url.Values{"since": {now.Add(-f.since).Format(time.RFC3339Nano)}}
	decisions, err := fetch("/decisions?"+q.Encode(), reportPatience+scanPatience)
	b.decisions(decisions, err, f.events)
	if f.events {
		events, err := fetch("/tap", reportEventTime)
		b.add("events.ndjson", fmt.Sprintf("events of %s", reportEventTime), lastLines(events, reportLines), err)
	}
	return true
}

// scanPatience is for a buffer that is large.
const scanPatience = 30 * time.Second

// decisions puts in those that say nothing about what was observed, unless that is
// wanted.
func (b *bundle) decisions(lines []byte, err error, observed bool) {
	var out bytes.Buffer
	kept, aside := 0, 0
	for line := range bytes.Lines(lines) {
		var d decision
		if json.Unmarshal(line, &d) != nil {
			continue
		}
		if d.Metadata.LogName == "decisions:agents" && !observed {
			aside++
			continue
		}
		kept++
		out.Write(line)
	}
	if aside > 0 {
		b.omit("decisions:agents", "%s about what was observed: --events puts them in", plural(aside, "decision"))
	}
	if kept > reportLines {
		b.omit("older decisions", "there are %d", kept-reportLines)
	}
	b.add("decisions.ndjson", "what the sensor decided, and why", lastLines(out.Bytes(), reportLines), err)
}

// lastLines are the last n.
func lastLines(text []byte, n int) []byte {
	at := len(text)
	for ; n >= 0 && at >= 0; n-- {
		at = bytes.LastIndexByte(text[:max(at, 0)], '\n')
		if n == 0 && at >= 0 {
			return text[at+1:]
		}
		if at < 0 {
			return text
		}
	}
	return text
}

// collectStreams asks Redis for what a sensor that is down cannot tell.
func (a *app) collectStreams(ctx context.Context, t config.Transport, f *reportFlags, now time.Time, b *bundle) {
	if t.Address == "" {
		b.omit("decisions.ndjson", "the sensor did not answer, and no Redis is configured")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reportPatience)
	defer cancel()
	read := func(keys []string, since time.Time) ([]byte, error) {
		var k keeper
		err := a.redisView(ctx, t, keys, &since, false, &k, func(string, ...any) {})
		return k.Bytes(), err
	}
	decisions, err := read(t.DecisionKeys(), now.Add(-f.since))
	b.decisions(decisions, err, f.events)
	if f.events {
		events, err := read([]string{t.EventsKey()}, now.Add(-f.since))
		b.add("events.ndjson", "the newest events in Redis", lastLines(events, reportLines), err)
	}
}

// keeper is a view that keeps the newest of what it is shown.
type keeper struct{ bytes.Buffer }

func (k *keeper) show(line []byte) error {
	if k.Len()+len(line) > 2*reportFile {
		tail := bytes.Clone(k.Bytes()[k.Len()/2:])
		k.Reset()
		k.Write(tail[bytes.IndexByte(tail, '\n')+1:])
	}
	k.Write(line)
	return k.WriteByte('\n')
}

func (k *keeper) done() bool   { return false }
func (k *keeper) flush() error { return nil }

// collectJournal reads what systemd kept of the unit.
func collectJournal(ctx context.Context, since time.Time, b *bundle) {
	ctx, cancel := context.WithTimeout(ctx, reportPatience)
	defer cancel()
	path, err := exec.LookPath("journalctl")
	if err != nil {
		b.omit("journal.txt", "there is no journalctl here")
		return
	}
	cmd := exec.CommandContext(ctx, path, "--no-pager", "--quiet", "--unit=edr-sensor", "--output=short-iso-precise",
		fmt.Sprintf("--lines=%d", reportLines), fmt.Sprintf("--since=@%d", since.Unix()))
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && len(exit.Stderr) > 0 {
		err = fmt.Errorf("journalctl: %s", strings.TrimSpace(string(exit.Stderr)))
	}
	b.add("journal.txt", "the journal of the unit edr-sensor", out, err)
}

func (b *bundle) places() (n int) {
	for _, f := range b.files {
		n += f.Redacted
	}
	return n
}

// pack takes secrets out and makes the archive.
func (b *bundle) pack(dir, host string, now time.Time) ([]byte, error) {
	for i := range b.files {
		f := &b.files[i]
		f.data, f.Redacted = b.redact.apply(f.data)
		sum := sha256.Sum256(f.data)
		f.Bytes, f.SHA256 = len(f.data), hex.EncodeToString(sum[:])
	}
	manifest, err := json.MarshalIndent(map[string]any{
		"made": now.Format(time.RFC3339), "host": host, "version": thisBuild(), "files": b.files, "left_out": b.leftOut,
		"redacted": "secrets that the sensor's files and environment name, and what looks like one, are " + redacted,
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	manifest, _ = b.redact.apply(append(manifest, '\n'))
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	tw := tar.NewWriter(gz)
	for _, f := range append([]reported{{Name: "manifest.json", data: manifest}}, b.files...) {
		h := &tar.Header{Name: filepath.Join(dir, f.Name), Mode: 0o600, Size: int64(len(f.data)), ModTime: now, Typeflag: tar.TypeReg}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(tw.Close(), gz.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
