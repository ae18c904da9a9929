// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

func TestParseReply(t *testing.T) {
	const e, s = testEpoch, "000000000000000000010000"
	for _, tt := range []struct {
		flag, text string
		want       reply
		good       bool
	}{
		{flagWrite, "OK 12", reply{verdict: ok, last: 12}, true},
		{flagResume, "OK 9007199254740992", reply{verdict: ok, last: 1 << 53}, true},
		{flagProbe, "OK 0", reply{verdict: ok}, true},
		{flagHello, "OK 5 -", reply{verdict: ok, last: 5}, true},
		{flagHello, "OK 5 " + s, reply{verdict: ok, last: 5, session: s}, true},
		{flagWrite, "DUP 5", reply{verdict: dup, last: 5}, true},
		{flagWrite, "GAP 0", reply{verdict: gap}, true},
		{flagWrite, "OVERLAP 7", reply{verdict: overlap, last: 7}, true},
		{flagWrite, "FENCED " + e + " " + s, reply{verdict: fenced, epoch: e, session: s}, true},
		{flagWrite, "", reply{}, false},
		{flagWrite, "OK", reply{}, false},
		{flagWrite, "OK ", reply{}, false},
		{flagWrite, "ok 1", reply{}, false},
		{flagWrite, "OK -1", reply{}, false},
		{flagWrite, "OK +1", reply{}, false},
		{flagWrite, "OK 01", reply{}, false},
		{flagWrite, "OK 1e3", reply{}, false},
		{flagWrite, "OK 1 2", reply{}, false},
		{flagWrite, "OK 9007199254740993", reply{}, false},
		{flagWrite, "OK 99999999999999999999", reply{}, false},
		{flagHello, "OK 5", reply{}, false},
		{flagHello, "OK 5 x", reply{}, false},
		{flagProbe, "GAP 5", reply{}, false},
		{flagResume, "GAP 5", reply{}, false},
		{flagWrite, "FENCED " + e, reply{}, false},
		{flagWrite, "FENCED 1 2", reply{}, false},
		{flagWrite, "FENCED " + strings.ToUpper(e) + " " + s, reply{}, false},
		{flagWrite, "HELLO 1", reply{}, false},
	} {
		got, err := parseReply(tt.flag, tt.text)
		if (err == nil) != tt.good || got != tt.want {
			t.Errorf("parseReply(%s, %q) = %+v, %v", tt.flag, tt.text, got, err)
		}
		if err != nil && classify(err) != ClassReply {
			t.Errorf("parseReply(%s, %q): class %s", tt.flag, tt.text, classify(err))
		}
	}
}

func FuzzParseReply(f *testing.F) {
	for _, s := range []string{"OK 1", "OK 1 -", "DUP 3", "GAP 0", "OVERLAP 9", "FENCED " + testEpoch + " " + testEpoch + "0001", "OK 1 2 3", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, flag := range []string{flagHello, flagContinue, flagProbe, flagWrite, flagResume} {
			r, err := parseReply(flag, text)
			if err != nil {
				if r != (reply{}) || len(err.Error()) > 600 {
					t.Errorf("%q: %+v with error %v", text, r, err)
				}
				continue
			}
			// What is accepted has exactly one spelling.
			again := string(r.verdict) + " " + strconv.FormatUint(r.last, 10)
			switch {
			case r.verdict == fenced:
				again = "FENCED " + r.epoch + " " + r.session
			case flag == flagHello && r.session == "":
				again += " -"
			case flag == flagHello:
				again += " " + r.session
			}
			if again != text || r.last > maxSeq {
				t.Errorf("%q accepted as %q", text, again)
			}
		}
	})
}

// modelServer is what deliver.lua does, in Go: the reference of the test below.
type modelServer struct {
	cursor  string // as stored, "" when absent
	stream  []uint64
	blocked bool // the stream's key holds something else
}

type modelCall struct {
	epoch, session, flag string
	first, n             uint64
}

func (m *modelServer) call(c modelCall) string {
	last, owner := uint64(0), "-"
	if m.cursor != "" {
		f := strings.Split(m.cursor, ":")
		if len(f) != 3 {
			return "EDRCURSOR"
		}
		mine := f[2] == c.session || c.flag == flagHello || (c.flag == flagContinue && f[2][:processLen] == c.session[:processLen])
		if f[0] > c.epoch || (f[0] == c.epoch && !mine) {
			return "FENCED " + f[0] + " " + f[2]
		}
		if f[0] == c.epoch {
			last, _ = strconv.ParseUint(f[1], 10, 64)
			owner = f[2]
		}
	}
	set := func(seq uint64) { m.cursor = fmt.Sprintf("%s:%d:%s", c.epoch, seq, c.session) }
	final := c.first + c.n - 1
	switch {
	case c.flag == flagHello:
		set(last)
		return fmt.Sprintf("OK %d %s", last, owner)
	case c.flag == flagContinue:
		set(last)
		return fmt.Sprintf("OK %d", last)
	case c.flag == flagProbe:
		return fmt.Sprintf("OK %d", last)
	case c.first > last+1 && c.flag != flagResume:
		return fmt.Sprintf("GAP %d", last)
	case final <= last:
		return fmt.Sprintf("DUP %d", last)
	case c.first <= last:
		return fmt.Sprintf("OVERLAP %d", last)
	case m.blocked:
		set(last)
		return "WRONGTYPE"
	}
	set(final)
	for i := range c.n {
		m.stream = append(m.stream, c.first+i)
	}
	return fmt.Sprintf("OK %d", final)
}

// TestScriptAgainstModel runs random interleavings of several processes, epochs
// and server accidents against the script and the model, and compares every
// reply, the cursor and the stream. EDR_MODEL_RUNS changes how many.
func TestScriptAgainstModel(t *testing.T) {
	t.Parallel()
	runs := 5_000
	if v := os.Getenv("EDR_MODEL_RUNS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		runs = n
	}
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	if err := c.ScriptLoad(t.Context(), deliverSource).Err(); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	counts := make(map[string]int)
	for run := range runs {
		if !modelRun(t, c, rng, counts) {
			t.Fatalf("seed %d, run %d", seed, run)
		}
		if run%500 == 0 {
			c.FlushDB(t.Context())
		}
	}
	t.Logf("replies: %v", counts)
	for _, v := range []string{"OK", "DUP", "GAP", "OVERLAP", "FENCED", "EDRCURSOR", "WRONGTYPE"} {
		if counts[v] < runs/10 {
			t.Errorf("%s came %d times in %d runs", v, counts[v], runs)
		}
	}
}

func modelRun(t *testing.T, c *redis.Client, rng *rand.Rand, counts map[string]int) bool {
	ctx := t.Context()
	epochs := []string{"0192f0c0ffee00000001", "0192f0c0ffee00000002"}
	sessions := []string{"000000000000000000010000", "000000000000000000010001", "000000000000000000020000", "0000000000000000000a0000"}
	// Now and then near 2^53: the largest seq, and where %d and %g would differ.
	base := []uint64{0, 0, 999_999_999_999_990, 1<<53 - 400}[rng.IntN(4)]
	tag := strconv.FormatUint(rng.Uint64(), 36)
	stream, cursors := "m:{"+tag+"}:events", "m:{"+tag+"}:cursors"

	var m modelServer
	var log, want []string
	var replies []*redis.Cmd
	history := []string{""} // cursors a server may go back to
	epoch, session, last := 0, 0, base
	if base > 0 {
		history = []string{fmt.Sprintf("%s:%d:%s", epochs[0], base, sessions[0])}
	}
	pipe := c.Pipeline()
	restore := func(cursor string) {
		m.cursor = cursor
		if cursor == "" {
			pipe.HDel(ctx, cursors, testAgent)
		} else {
			pipe.HSet(ctx, cursors, testAgent, cursor)
		}
	}
	restore(history[0])
	for range 10 + rng.IntN(20) {
		switch x := rng.IntN(100); {
		case x < 4:
			h := history[rng.IntN(len(history))]
			log = append(log, "restore "+h)
			restore(h)
			continue
		case x < 6:
			log = append(log, "spoil cursor")
			restore("nonsense")
			history = append(history, fmt.Sprintf("%s:%d:%s", epochs[epoch], base, sessions[session]))
			continue
		case x < 8:
			log = append(log, "flush")
			m = modelServer{}
			pipe.Del(ctx, stream, cursors)
			continue
		case x < 11:
			log = append(log, "block")
			m.blocked, m.stream = true, nil
			pipe.Set(ctx, stream, "mine", 0)
			continue
		case x < 14:
			log = append(log, "unblock")
			if m.blocked {
				m.blocked = false
				pipe.Del(ctx, stream)
			}
			continue
		case x < 24: // another process, perhaps with a new queue
			session = rng.IntN(len(sessions))
			epoch = min(epoch+rng.IntN(4)/3, len(epochs)-1)
		case x < 27:
			epoch = rng.IntN(len(epochs))
		}
		call := modelCall{epochs[epoch], sessions[session], flagWrite, 0, uint64(1 + rng.IntN(4))}
		switch x := rng.IntN(10); {
		case x < 2:
			call.flag, call.n = flagHello, 0
		case x < 3:
			call.flag, call.n = []string{flagProbe, flagContinue}[rng.IntN(2)], 0
		case x < 5:
			call.flag = flagResume
		}
		if call.n > 0 { // mostly the next batch, else one before or after it
			call.first = last + 1
			if rng.IntN(3) == 0 {
				call.first = max(1, last+1+uint64(rng.IntN(8))-min(last, uint64(rng.IntN(5))))
			}
		}
		args := []any{"EVALSHA", deliverSHA(), 2, stream, cursors, testAgent, call.epoch, call.session, call.flag, call.first, call.n}
		for i := range call.n {
			args = append(args, fmt.Sprint("id", i), "now", "{}")
		}
		replies = append(replies, pipe.Do(ctx, args...))
		w := m.call(call)
		want = append(want, w)
		log = append(log, fmt.Sprintf("%+v -> %s", call, w))
		counts[strings.Fields(w)[0]]++
		if f := strings.Split(m.cursor, ":"); len(f) == 3 {
			last, _ = strconv.ParseUint(f[1], 10, 64)
			history = append(history, m.cursor)
		}
	}
	cursor := pipe.HGet(ctx, cursors, testAgent)
	kind := pipe.Type(ctx, stream)
	_, _ = pipe.Exec(ctx) // each command has its own error

	var got []string
	for _, r := range replies {
		text, err := r.Text()
		if err != nil {
			text, _, _ = strings.Cut(err.Error(), " ")
		}
		got = append(got, text)
	}
	good := true
	if d := cmp.Diff(want, got); d != "" {
		good = false
		t.Errorf("replies (-model +script):\n%s", d)
	}
	if cursor.Val() != m.cursor {
		good = false
		t.Errorf("cursor %q, model %q", cursor.Val(), m.cursor)
	}
	if kind.Val() != "string" {
		var seqs []uint64
		for _, e := range entries(t, c, stream) {
			seqs = append(seqs, e.Seq)
		}
		if d := cmp.Diff(m.stream, seqs); d != "" {
			good = false
			t.Errorf("stream (-model +script):\n%s", d)
		}
	}
	if !good {
		t.Logf("interleaving:\n%s", strings.Join(log, "\n"))
	}
	return good
}

func TestScriptRefusesMalformedCalls(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	for _, args := range [][]any{
		{testAgent, testEpoch, "s", "W", "x", "1", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "1", "2", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "1"},
		{},
	} {
		err := c.Eval(t.Context(), deliverSource, []string{eventsKey, cursorKey}, args...).Err()
		if err == nil || !strings.HasPrefix(err.Error(), "EDRCALL") {
			t.Errorf("%v: %v", args, err)
		}
	}
	if n := c.Exists(t.Context(), eventsKey, cursorKey).Val(); n != 0 {
		t.Errorf("%d keys were written", n)
	}
}

// TestScriptCountsHalfABatch makes XADD fail in the middle, as it does when a
// stream has used up its ids. Nothing rolls back what was added before: the
// cursor must say exactly that.
func TestScriptCountsHalfABatch(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	// Two ids are left.
	err := c.Do(t.Context(), "XADD", eventsKey, "18446744073709551615-18446744073709551613", "a", "b").Err()
	if err != nil {
		t.Fatal(err)
	}
	const session = "000000000000000000010000"
	args := []any{testAgent, testEpoch, session, flagWrite, 1, 5}
	for range 5 {
		args = append(args, "id", "now", "{}")
	}
	err = c.Eval(t.Context(), deliverSource, []string{eventsKey, cursorKey}, args...).Err()
	if err == nil || !strings.Contains(err.Error(), "exhausted") || classify(err) != ClassServer {
		t.Errorf("error %v, class %s", err, classify(err))
	}
	if n := c.XLen(t.Context(), eventsKey).Val(); n != 3 {
		t.Errorf("%d entries, want 3", n)
	}
	if got, want := c.HGet(t.Context(), cursorKey, testAgent).Val(), testEpoch+":2:"+session; got != want {
		t.Errorf("cursor %q, want %q", got, want)
	}
}
