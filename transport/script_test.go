// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
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
		{flagWrite, "OK 9007199254740992", reply{verdict: ok, last: 1 << 53}, true},
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
		{flagProbe, "GAP 5", reply{}, false},
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
		for _, flag := range []string{flagHello, flagContinue, flagProbe, flagWrite} {
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
	streams [buffer.Streams][]uint64
	blocked [buffer.Streams]bool // the stream's key holds something else
}

type modelCall struct {
	stream               buffer.Stream
	epoch, session, flag string
	after, first, n      uint64
	packed               bool
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
	case last < c.after:
		return fmt.Sprintf("GAP %d", last)
	case final <= last:
		return fmt.Sprintf("DUP %d", last)
	case c.first <= last:
		return fmt.Sprintf("OVERLAP %d", last)
	case m.blocked[c.stream]:
		set(last)
		return "WRONGTYPE"
	}
	set(final)
	for i := range c.n {
		m.streams[c.stream] = append(m.streams[c.stream], c.first+i)
	}
	return fmt.Sprintf("OK %d", final)
}

// TestT14ScriptAgainstModel runs random interleavings of several processes, epochs
// and server accidents against the script and the model, and compares every
// reply, the cursor and the stream. EDR_LONG=1 makes it the
// 100,000 of the proof, EDR_MODEL_RUNS any number.
func TestT14ScriptAgainstModel(t *testing.T) {
	t.Parallel()
	runs := 5_000
	if os.Getenv("EDR_LONG") == "1" {
		runs = 100_000
	}
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
	modelReady(t, c)
	sha := scriptLoad(t, c, deliverSource)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	counts := make(map[string]int)
	packed := packedModel()
	for run := range runs {
		if diff := modelRun(t, c, sha, packed, rng, counts); diff != "" {
			t.Fatalf("seed %d, run %d:\n%s", seed, run, diff)
		}
		if run%500 == 0 {
			c.FlushDB(t.Context())
		}
	}
	t.Logf("replies: %v", counts)
	for _, v := range []string{"OK", "DUP", "GAP", "OVERLAP", "FENCED", "EDRCURSOR", "WRONGTYPE", "trimmed", "packed"} {
		if counts[v] < runs/10 {
			t.Errorf("%s came %d times in %d runs", v, counts[v], runs)
		}
	}
}

// TestModelFindsDefects is the control of the test above: each defect that was put
// into the script must be found.
func TestModelFindsDefects(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	modelReady(t, c)
	packed := packedModel()
	for name, edit := range map[string][2]string{
		"a cursor for each stream":           {"'HSET', cursors, agent,", "'HSET', cursors, agent .. stream,"},
		"a repeated batch is stored":         {"if final <= last then", "if final < last then"},
		"a gap is passed over":               {"if last < after then", "if last + 3 < after then"},
		"a packed batch counts as one":       {"local final = first + n - 1", "local final = first + (packed and 0 or n - 1)"},
		"a packed batch is stored each time": {"local ends = packed and 0 or n - 1", "local ends = n - 1"},
		"a hole hides what is lost":          {"if last < after then", "if last < after and first == after + 1 then"},
		"every stream is trimmed":            {"if i < ends or limit == 0 then", "if i < ends then"},
		"trimming is exact":                  {"'MAXLEN', '~', int(limit)", "'MAXLEN', '=', '1'"},
		"the older epoch is accepted":        {"if e > epoch then", "if false then"},
	} {
		if !strings.Contains(deliverSource, edit[0]) {
			t.Errorf("%s: %q is not in the script", name, edit[0])
			continue
		}
		sha := scriptLoad(t, c, strings.Replace(deliverSource, edit[0], edit[1], 1))
		rng := rand.New(rand.NewPCG(1, 0))
		diff, counts := "", map[string]int{}
		for range 300 {
			if diff = modelRun(t, c, sha, packed, rng, counts); diff != "" {
				break
			}
		}
		if diff == "" {
			t.Errorf("%s: not found", name)
		}
	}
}

// modelReady makes approximate trimming bite on streams of a few entries.
func modelReady(t *testing.T, c *redis.Client) {
	t.Helper()
	if err := c.ConfigSet(t.Context(), "stream-node-max-entries", "2").Err(); err != nil {
		t.Fatal(err)
	}
}

func scriptLoad(t *testing.T, c *redis.Client, source string) string {
	t.Helper()
	sha, err := c.ScriptLoad(t.Context(), source).Result()
	if err != nil {
		t.Fatal(err)
	}
	return sha
}

// modelLimit is what the decision streams of the model's server may hold.
const modelLimit = 6

// packedModel returns batches of 0 to 4 records.
func packedModel() (out [5][]byte) {
	b, err := newBatch(&Options{BatchRecords: 4, Encoding: ZstdBatch}, testEpoch)
	if err != nil {
		panic(err)
	}
	recs := []buffer.Record{}
	for n := range out {
		out[n] = slices.Clone(b.pack(recs))
		recs = append(recs, buffer.Record{Data: []byte("{}")})
	}
	return out
}

// modelRun returns how script and model differ in one random run, "" when they do not.
func modelRun(t *testing.T, c *redis.Client, sha string, packed [5][]byte, rng *rand.Rand, counts map[string]int) string {
	ctx := t.Context()
	epochs := []string{"0192f0c0ffee00000001", "0192f0c0ffee00000002"}
	sessions := []string{"000000000000000000010000", "000000000000000000010001", "000000000000000000020000", "0000000000000000000a0000"}
	// Now and then near 2^53: the largest seq, and where %d and %g would differ.
	base := []uint64{0, 0, 999_999_999_999_990, 1<<53 - 400}[rng.IntN(4)]
	tag := strconv.FormatUint(rng.Uint64(), 36)
	cursors := "m:{" + tag + "}:cursors"
	var streams [buffer.Streams]string
	for i := range streams {
		streams[i] = fmt.Sprintf("m:{%s}:%d", tag, i)
	}

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
			pipe.Del(ctx, append(streams[:], cursors)...)
			continue
		case x < 11:
			i := rng.IntN(len(streams))
			log = append(log, "block "+streams[i])
			m.blocked[i], m.streams[i] = true, nil
			pipe.Set(ctx, streams[i], "mine", 0)
			continue
		case x < 14:
			log = append(log, "unblock")
			for i := range m.blocked {
				if m.blocked[i] && rng.IntN(2) == 0 {
					m.blocked[i] = false
					pipe.Del(ctx, streams[i])
				}
			}
			continue
		case x < 24: // another process, perhaps with a new queue
			session = rng.IntN(len(sessions))
			epoch = min(epoch+rng.IntN(4)/3, len(epochs)-1)
		case x < 27:
			epoch = rng.IntN(len(epochs))
		}
		call := modelCall{buffer.Stream(rng.IntN(len(streams))), epochs[epoch], sessions[session], flagWrite, 0, 0, uint64(1 + rng.IntN(4)), false}
		switch x := rng.IntN(10); {
		case x < 2:
			call.flag, call.n = flagHello, 0
		case x < 3:
			call.flag, call.n = []string{flagProbe, flagContinue}[rng.IntN(2)], 0
		}
		if call.n > 0 { // mostly the next batch, else one before or after it
			call.first = last + 1
			if rng.IntN(3) == 0 {
				call.first = max(1, last+1+uint64(rng.IntN(8))-min(last, uint64(rng.IntN(5))))
			}
			call.after = call.first - 1
			if rng.IntN(3) == 0 { // a hole in what the agent has
				call.after -= min(call.after, uint64(rng.IntN(10)))
			}
		}
		limit := 0
		if call.stream != buffer.Events {
			limit = modelLimit
		} else {
			call.packed = rng.IntN(2) == 0 // an agent may change its encoding
		}
		args := []any{"EVALSHA", sha, 2, streams[call.stream], cursors, testAgent, call.epoch, call.session, call.flag, call.after, call.first, call.n, limit}
		switch {
		case call.packed && call.n > 0:
			counts["packed"]++
			args = append(args, "z", packed[call.n])
		case call.packed:
			args = append(args, "z")
		default:
			args = append(args, "j")
			for i := range call.n {
				args = append(args, fmt.Sprint("id", i), "now", "{}")
			}
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
	_, _ = pipe.Exec(ctx) // each command has its own error

	var got []string
	for _, r := range replies {
		text, err := r.Text()
		if err != nil {
			text, _, _ = strings.Cut(err.Error(), " ")
		}
		got = append(got, text)
	}
	diff := ""
	if d := cmp.Diff(want, got); d != "" {
		diff += "replies (-model +script):\n" + d
	}
	if cursor.Val() != m.cursor {
		diff += fmt.Sprintf("cursor %q, model %q\n", cursor.Val(), m.cursor)
	}
	for i, want := range m.streams {
		if m.blocked[i] {
			continue
		}
		var seqs []uint64
		for _, e := range entries(t, c, streams[i]) {
			seqs = append(seqs, e.Seq)
		}
		// Trimming takes the oldest only, and never below the limit.
		if n := len(want) - len(seqs); i != int(buffer.Events) && n > 0 && len(seqs) >= modelLimit {
			counts["trimmed"]++
			want = want[n:]
		}
		if d := cmp.Diff(want, seqs); d != "" {
			diff += fmt.Sprintf("stream %d (-model +script):\n%s", i, d)
		}
	}
	if diff != "" {
		diff += "interleaving:\n" + strings.Join(log, "\n")
	}
	return diff
}

func TestScriptRefusesMalformedCalls(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	for _, args := range [][]any{
		{testAgent, testEpoch, "s", "W", "0", "x", "1", "0", "j", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "0", "1", "1", "x", "j", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "x", "1", "1", "0", "j", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "1", "1", "1", "0", "j", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "0", "1", "2", "0", "j", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "0", "1", "1", "0", "q", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "0", "1", "1", "0", "z", "i", "t", "d"},
		{testAgent, testEpoch, "s", "W", "0", "1", "1", "0", "j", "d"},
		{testAgent, testEpoch, "s", "P", "0", "0", "0", "0", "z", "d"},
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
	args := []any{testAgent, testEpoch, session, flagWrite, 0, 1, 5, 0, "j"}
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
