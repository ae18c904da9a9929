// SPDX-License-Identifier: Apache-2.0

// Command fleet measures what many sensors cost a Redis: the transport as the sensor has
// it, many times in one process, with a source of events in place of the disk buffer. It
// starts its servers, kills them under the fleet, and watches all sensors come back.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/aurorasoc/edr-sensor/transport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("fleet", flag.ContinueOnError)
	s := setup{}
	events := fs.String("events", "../sensor/ocsf/testdata", "folder with events of the encoder")
	sizes := fs.String("sensors", "10,100,1000", "how many sensors, several separated by commas")
	fs.Float64Var(&s.rate, "rate", 5, "events per second of a sensor")
	fs.DurationVar(&s.spread, "spread", 500*time.Millisecond, "time over which sensors come back (transport.reconnect_spread)")
	fs.DurationVar(&s.measure, "for", 8*time.Second, "how long to measure each row")
	fs.IntVar(&s.servers, "servers", 1, "how many servers share the sensors")
	fs.StringVar(&s.dir, "dir", "/var/tmp", "folder for the servers' append-only files")
	connect := fs.String("connect", "", "servers that are there, host:port separated by commas, without TLS or users; they are not restarted, and keep nothing")
	only := fs.String("rows", "", "only rows whose encoding, linger and tls contain this, as in \"zstd-batch 1s tls\"")
	docs := fs.String("docs", "", "write the table into operations.md in this folder")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if s.rate <= 0 || s.servers < 1 {
		return fmt.Errorf("%v events per second, %d servers: want more", s.rate, s.servers)
	}
	if *connect != "" {
		s.given = strings.Split(*connect, ",")
	}
	var size int
	var err error
	if s.events, size, err = loadEvents(*events); err != nil {
		return err
	}
	var results []result
	for text := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return fmt.Errorf("-sensors %q: want numbers", *sizes)
		}
		for _, c := range cells(n) {
			if !strings.Contains(c.String(), *only) || s.given != nil && c.tls {
				continue
			}
			fmt.Fprintf(os.Stderr, "%d %s\n", n, c)
			r, err := s.bounded(ctx, c)
			if err != nil {
				return fmt.Errorf("%d %s: %w", n, c, err)
			}
			results = append(results, r)
		}
	}
	text, err := s.page(ctx, results, size)
	if err != nil {
		return err
	}
	if *docs != "" {
		return writeDocs(filepath.Join(*docs, "operations.md"), text)
	}
	_, err = io.WriteString(out, text)
	return err
}

// cells are the rows for a number of sensors.
func cells(n int) []cell {
	const least, most = 50 * time.Millisecond, time.Second
	return []cell{
		{n, transport.JSON, least, false},
		{n, transport.JSON, least, true},
		{n, transport.ZstdBatch, least, false},
		{n, transport.ZstdBatch, most, false},
		{n, transport.ZstdBatch, most, true},
	}
}

func (c cell) String() string {
	text := fmt.Sprintf("%s %v", c.encoding, c.linger)
	if c.tls {
		text += " tls"
	}
	return text
}

// bounded is run with an end: no state of a server may hold the program up.
func (s *setup) bounded(ctx context.Context, c cell) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute+2*s.measure)
	defer cancel()
	return s.run(ctx, c)
}

// page prints everything as Markdown.
func (s *setup) page(ctx context.Context, results []result, size int) (string, error) {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	busy, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	how := fmt.Sprintf("append-only file, `everysec`; `reconnect_spread` %v", s.spread)
	if s.given != nil {
		how = "servers as they were"
	}
	p("Sensors and %d redis-server shared %d CPUs (load average over 15 minutes: %s); %v events/s per sensor of %d bytes of JSON on average; %s.\n",
		max(s.servers, len(s.given)), runtime.NumCPU(), strings.Fields(string(busy))[2], s.rate, size, how)
	p("| sensors | encoding, linger | events/s offered | delivered | CPU µs/event | µs/call | wire B/event | memory B/event | KiB/connection | sensor KiB | connections/sensor | event to reply ms p50 | p99 | dials/sensor | back s 50 %% | 99 %% | 100 %% |")
	p("|--:|---|%s", strings.Repeat("--:|", 15))
	for _, r := range results {
		row := []string{strconv.Itoa(r.sensors), r.String()}
		for _, v := range []float64{
			r.offered, r.delivered, r.perEvent * 1e6, r.perCall * 1e6, r.wire, r.memory, r.perConnection / 1024, r.perSensor / 1024,
			r.connections, r.p50 * 1e3, r.p99 * 1e3, r.dials, r.back[0], r.back[1], r.back[2],
		} {
			row = append(row, number(v))
		}
		p("| %s |", strings.Join(row, " | "))
	}
	if s.given != nil {
		return b.String(), nil
	}
	var costs [3]float64
	for i, kind := range []keyKind{"", ecdsaKey, rsaKey} {
		var err error
		if costs[i], err = s.handshake(ctx, kind); err != nil {
			return "", errors.Join(fmt.Errorf("handshakes: %w", err))
		}
	}
	p("\nA connection costs the server %s ms of CPU in plain text, %s ms with TLS and an %s certificate, %s ms with %s.",
		number(costs[0]*1e3), number(costs[1]*1e3), ecdsaKey, number(costs[2]*1e3), rsaKey)
	return b.String(), nil
}

// number prints three digits, or what is missing.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// The table is written between these lines of the page, the rest of which is by hand.
const (
	tableBegin = "<!-- table: make bench-fleet -->\n"
	tableEnd   = "<!-- end of table -->\n"
)

func writeDocs(name, text string) error {
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(old), tableBegin)
	_, after, ends := strings.Cut(rest, tableEnd)
	if !begins || !ends {
		return fmt.Errorf("%s has no place for the table", name)
	}
	return os.WriteFile(name, []byte(before+tableBegin+"\n"+text+"\n"+tableEnd+after), 0o644)
}
