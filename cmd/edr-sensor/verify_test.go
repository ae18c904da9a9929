// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

const streamEpoch = "0192f0c0ffee00000001"

func addRecord(t *testing.T, c *redis.Client, key string, seq int, data string) {
	t.Helper()
	err := c.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"id", "u", "timestamp", "t", "data", data, "agent", "a", "epoch", streamEpoch, "seq", seq}}).Err()
	if err != nil {
		t.Fatal(err)
	}
}

func addPacked(t *testing.T, c *redis.Client, key string, seq int, data ...string) {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	frame := w.EncodeAll([]byte(strings.Join(data, "\n")), nil)
	err = c.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"agent", "a", "epoch", streamEpoch, "seq", seq, "n", len(data), "codec", "z", "data", frame}}).Err()
	if err != nil {
		t.Fatal(err)
	}
}

// TestEventsOfBothEncodings shows each record once, whatever the server has made
// of the stream.
func TestEventsOfBothEncodings(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	defer client.Close()
	path := configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr()))
	addRecord(t, client, eventsKey, 1, execOf(1))
	addPacked(t, client, eventsKey, 2, execOf(2), execOf(3))
	addPacked(t, client, eventsKey, 2, execOf(2), execOf(3)) // twice in the stream
	addPacked(t, client, eventsKey, 3, execOf(3), execOf(4))
	add(t, client, eventsKey, "*", execOf(99)) // somebody else's
	addRecord(t, client, eventsKey, 0, execOf(98))
	addRecord(t, client, eventsKey, 0, execOf(97))
	addRecord(t, client, eventsKey, 5, execOf(5))
	code, out, errs := run(t, "events", "--config", path, "--from-start", "-o", "json")
	want := strings.Join([]string{execOf(1), execOf(2), execOf(3), execOf(4), execOf(99), execOf(5)}, "\n") + "\n"
	if d := cmp.Diff(want, out); d != "" || code != 0 {
		t.Errorf("exit code %d, lines (-want +got):\n%s", code, d)
	}
	if strings.Count(errs, "malformed field: seq") != 1 {
		t.Errorf("stderr %q", errs)
	}
}

func TestVerify(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	defer client.Close()
	path := configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr()))
	lost := func(ranges string) string {
		return `{"status_code":"RECORDS_LOST","unmapped":{"lost":{"ranges":[` + ranges + `]}}}`
	}
	cursor := func(last int) {
		t.Helper()
		if err := client.HSet(t.Context(), "edr:{s000}:cursors", "a", fmt.Sprintf("%s:%d:0123456789abcdef01234567", streamEpoch, last)).Err(); err != nil {
			t.Fatal(err)
		}
	}
	step := func(name string, code int, want ...string) {
		t.Helper()
		got, out, errs := run(t, "events", "--verify", "--config", path)
		if got != code || errs != "" {
			t.Errorf("%s: exit code %d, want %d: %s", name, got, code, errs)
		}
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in:\n%s", name, w, out)
			}
		}
	}
	step("empty", 0, "no records of a sensor in edr:{s000}:events, decisions:system, decisions:agents and decisions:approvals")
	addRecord(t, client, eventsKey, 1, execOf(1))
	addRecord(t, client, decisionsKey, 2, "{}")
	addPacked(t, client, eventsKey, 3, execOf(3), execOf(4))
	cursor(4)
	step("whole", 0, "agent a epoch "+streamEpoch+": clean; 4 records up to seq 4\n")
	addRecord(t, client, eventsKey, 8, execOf(8))
	addRecord(t, client, decisionsKey, 9, lost(`{"first":5,"last":7}`))
	step("lost and named", 0, "clean; 6 records up to seq 9, 3 lost and named\n")
	cursor(11)
	step("missing at the end", 1, "NOT CLEAN; 6 records up to seq 11, 2 missing, 3 lost and named\n  missing 10-11\n")
	addRecord(t, client, eventsKey, 11, execOf(1))
	addRecord(t, client, eventsKey, 10, execOf(1))
	addPacked(t, client, eventsKey, 3, execOf(3), execOf(4))
	add(t, client, eventsKey, "*", "x")
	step("out of order and twice", 1, "8 records up to seq 11, 2 duplicate, 1 out of order, 3 lost", "entries of other producers: 1\n")

	code, out, errs := run(t, "events", "--verify", "--json", "--config", path)
	var got auditReport
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 || errs != "" {
		t.Fatalf("exit code %d, %v: %s%s", code, err, out, errs)
	}
	want := auditReport{Agents: []consumer.Finding{{Agent: "a", Epoch: streamEpoch, Last: 11, Records: 8, Duplicates: 2, OutOfOrder: 1, NamedLost: 3}}, Foreign: 1, Ends: true}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("json (-want +got):\n%s", d)
	}

	// What was deleted is not called missing; what is nobody's is a finding.
	if err := client.Del(t.Context(), eventsKey).Err(); err != nil {
		t.Fatal(err)
	}
	addRecord(t, client, eventsKey, 9, execOf(1))
	addRecord(t, client, eventsKey, 10, execOf(1))
	addRecord(t, client, eventsKey, 11, execOf(1))
	if err := client.XTrimMaxLen(t.Context(), eventsKey, 2).Err(); err != nil {
		t.Fatal(err)
	}
	step("trimmed", 0, "clean; 4 records up to seq 11", "4 not known, because a stream was trimmed")
	addRecord(t, client, eventsKey, 0, "{}")
	step("malformed", 1, "malformed entries: 1, the first is entry ", "malformed field: seq")

	// A user who may not see the cursors is told what that means.
	if err := client.Do(t.Context(), "ACL", "SETUSER", "default", "-hscan").Err(); err != nil {
		t.Fatal(err)
	}
	step("without cursors", 1, "what is missing at the end is not known")
	server.Kill9()
	if code, _, _ := run(t, "events", "--verify", "--config", path); code != exitUnavailable {
		t.Errorf("without a server: exit code %d", code)
	}
}

// TestVerifyWhileItIsTrimmed has a stream lose its beginning, and what is behind what has
// been read of it, while it is audited.
func TestVerifyWhileItIsTrimmed(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	defer client.Close()
	const n = 3*readCount + 10
	p := client.Pipeline()
	for seq := 1; seq <= n; seq++ {
		p.XAdd(t.Context(), &redis.XAddArgs{Stream: eventsKey, Values: []any{"id", "u", "timestamp", "t", "data", "{}", "agent", "a", "epoch", streamEpoch, "seq", seq}})
	}
	if _, err := p.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	trimming := server.Client()
	defer trimming.Close()
	trimming.AddHook(trimBehind{t, client})
	c := config.Default()
	c.Transport.Address = server.Addr()
	v, err := auditStreams(t.Context(), trimming, agent.Placed(c))
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Agents) != 1 || !v.Clean || v.Agents[0].Records != readCount+5 || v.Agents[0].Trimmed != n-readCount-5 {
		t.Errorf("%+v", v)
	}
}

// trimBehind trims the stream to its last five entries after the first read.
type trimBehind struct {
	t      *testing.T
	client *redis.Client
}

func (trimBehind) DialHook(next redis.DialHook) redis.DialHook { return next }

func (trimBehind) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h trimBehind) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if cmd.Name() == "xread" {
			if err := h.client.XTrimMaxLen(ctx, eventsKey, 5).Err(); err != nil {
				h.t.Error(err)
			}
		}
		return err
	}
}

func TestVerifyUsage(t *testing.T) {
	path := configFor(t, "log: {level: info}\n")
	for _, args := range [][]string{{"--json"}, {"--verify", "--tap"}, {"--verify", "--since", "5m"}, {"--verify", "--kind", "exec"}, {"--verify"}} {
		if code, _, errs := run(t, append([]string{"events", "--config", path}, args...)...); code != exitUsage || errs == "" {
			t.Errorf("%q: exit code %d: %s", args, code, errs)
		}
	}
}
