// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"cmp"
	bits "encoding/binary" // binary is the sensor's
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestIncident lets go wrong, one after the other, what can: Redis dies, the buffer
// fills and drops its oldest records, Redis comes back without the end of its data, a
// chunk on the disk is damaged, a bad configuration is loaded, and in the middle of a
// case the sensor is killed. Afterwards what happened is told twice, by the decisions
// streams and by the log, from each without a look at the other. Both must tell the
// script, in its order, with its ids and counts; and neither may be able to without
// any one of the records or lines that it was told from.
func TestIncident(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "always"})
	c := server.Client()
	defer c.Close()
	dir := filepath.Join(t.TempDir(), "buffer")
	h := newHost(t, w, server.Addr(), fmt.Sprintf(smallBuffer, dir))
	h.env = []string{"EDR_SENSOR_TRANSPORT__BACKOFF_LIMIT=1s"} // the script waits for each return
	shell := func(script string) int {
		t.Helper()
		return w.do(order{Op: "shell", Name: "suspect", Script: script}).PID
	}
	suspect := shell("/bin/true edr-e2e-before")
	decided := func(code string, n int) {
		t.Helper()
		eventually(t, 60*time.Second, fmt.Sprintf("%d %s are in Redis", n, code), func() bool {
			return len(slices.DeleteFunc(readStreams(t, c, decisionsKey, agentsKey, approvalsKey), func(r record) bool { return r.event.StatusCode != code })) >= n
		})
	}
	mode := func(want string) {
		t.Helper()
		eventually(t, 60*time.Second, "the mode is "+want, func() bool { return string(h.mustStatus().Mode) == want })
	}
	n := 0
	execs := func(count, size int) {
		w.do(order{Op: "exec", From: n + 1, N: count, ArgSize: size})
		n += count
	}
	var script []string
	did := func(format string, args ...any) { script = append(script, fmt.Sprintf(format, args...)) }

	h.start()
	agent, first := h.mustStatus().AgentID, h.proc.Process.Pid
	mode("online")
	did("agent %s: started as %d", agent, first)
	execs(20, 0)
	h.delivered(30 * time.Second)
	kept, size := settledAOF(t, h, server)
	execs(20, 0)
	h.delivered(30 * time.Second)

	// Redis dies, and the disk of its host loses the end of the file.
	server.Kill9()
	confirmed := h.mustStatus().Transport.Acked
	did("Redis went away")
	execs(1, 0) // an idle sensor asks every 30 s only
	mode("buffering")
	filled := make(chan struct{})
	go func() { // the mode is over soon after it
		defer close(filled)
		execs(600, 60<<10)
	}()
	mode("truncating")
	<-filled
	if err := os.Truncate(aof(t, server), size); err != nil {
		t.Fatal(err)
	}
	server.Restart()
	decided("TRUNCATION_ENDED", 1)
	settled := func() {
		t.Helper()
		h.delivered(60 * time.Second)
		eventually(t, 30*time.Second, "no loss is unnamed", func() bool { return h.mustStatus().Buffer.Losses == 0 })
		mode("online")
		h.delivered(60 * time.Second)
	}
	settled()
	truncated := h.mustStatus().Buffer.Truncated
	did("%d records were truncated", truncated)
	did("Redis lacked %d-%d: %d of them are lost", kept+1, confirmed, confirmed-kept)
	did("Redis came back")

	// Once more, and a bit flips where nobody has read yet.
	server.Kill9()
	did("Redis went away")
	execs(1, 0)
	mode("buffering")
	for range 8 { // each of them is in a chunk of its own, at least
		before := h.mustStatus().Buffer.Last
		execs(5, 0)
		eventually(t, 30*time.Second, "they are on the disk", func() bool { return h.mustStatus().Buffer.Last >= before+10 })
	}
	s := h.mustStatus().Buffer
	rotten := rot(t, filepath.Join(dir, "q.db"), s.Acked, s.Last)
	server.Restart()
	decided("BUFFER_DAMAGED", 1)
	settled()
	did("Redis came back")
	did("%d records were damaged: %d-%d", rotten.Count, rotten.First, rotten.Last)

	good, err := os.ReadFile(h.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(h.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(strings.Replace(string(good), "cap: 16MiB", "cap: 1MiB, color: blue", 1))
	if err := h.proc.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	decided("CONFIG_REJECTED", 1)
	write(string(good))
	did("SIGHUP: 2 problems in the configuration, nothing was changed")

	h.must("it covers 1 running process ", "case", "open", "--case-id", "C-17", "--investigation-id", "I-4", "--user-id", "mara", "--subtree", fmt.Sprint(suspect))
	did("mara opened case C-17 of I-4 on subtree %d", suspect)
	shell("/bin/true edr-e2e-seen")
	h.delivered(30 * time.Second)

	h.kill9()
	killed := time.Now()
	shell("/bin/true edr-e2e-unseen")
	unseen := time.Now()
	h.start()
	second := h.proc.Process.Pid
	did("%d was killed; it was online", first)
	did("agent %s: started as %d", agent, second)
	did("case C-17 of I-4 goes on")
	mode("online")
	shell("/bin/true edr-e2e-seen")
	h.must("case C-17 is closed", "case", "close", "C-17", "--user-id", "noor")
	did("noor closed case C-17 of I-4, which mara had opened")
	decided("CASE_CLOSED", 1)
	settled()
	_, page := h.get("/metrics")
	if code := h.stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
	did("%d was stopped; it was online", second)

	// What really is in the streams, and what the counters say, has to agree.
	recs := readStreams(t, c)
	lost := verify(t, recs)
	wantLost := truncated + confirmed - kept + rotten.Last - rotten.First + 1
	if truncated == 0 || lost != wantLost || value(t, page, "buffer_truncations_total") != float64(truncated) || value(t, page, "buffer_corrupt_records_total") != float64(rotten.Last-rotten.First+1) {
		t.Errorf("%d seqs are missing, want %d: %d truncated (the counter says %v), %d-%d lost by Redis, %d-%d damaged (%v)", lost, wantLost, truncated,
			value(t, page, "buffer_truncations_total"), kept+1, confirmed, rotten.First, rotten.Last, value(t, page, "buffer_corrupt_records_total"))
	}
	tagged := uint64(0)
	for _, r := range recs {
		if strings.HasSuffix(r.event.Process.CmdLine, "edr-e2e-unseen") {
			t.Error("the time in which no sensor ran was seen")
		}
		if r.stream == eventsKey && r.tagged("C-17") {
			tagged++
		}
	}

	fromRecords := recordFacts(t, slices.DeleteFunc(slices.Clone(recs), func(r record) bool { return r.stream == eventsKey }))
	fromLines := lineFacts(h.log.all())
	if !slices.ContainsFunc(fromRecords, func(f fact) bool { return f.number("restated_seq") > 0 }) {
		t.Error("no decision was dropped and written again: the buffer was not full enough")
	}
	closed := fromRecords[slices.IndexFunc(fromRecords, func(f fact) bool { return f.Code == "CASE_CLOSED" })]
	if n := closed.number("tagged"); n == 0 || n > tagged || closed.Evidence["tagged_at_least"] != true {
		t.Errorf("%d events carry the ids of the case, CASE_CLOSED says %v", tagged, closed.Evidence)
	}
	for _, source := range []struct {
		name  string
		facts []fact
		tell  func([]fact) (*told, error)
	}{{"decisions", fromRecords, reconstruct}, {"log", fromLines, reconstructFromLog}} {
		t.Run(source.name, func(t *testing.T) {
			told, err := source.tell(source.facts)
			if err != nil {
				t.Fatal(err)
			}
			if d := gocmp.Diff(script, told.steps); d != "" {
				t.Errorf("the script and what is told (-did +told):\n%s", d)
			}
			if w := told.blind; len(w) != 1 || w[0].From.After(killed) || w[0].To.Before(unseen) {
				t.Errorf("not seen: %v, want from %v or before until %v or after", w, killed, unseen)
			}
			for i, f := range source.facts {
				if !told.used[i] {
					t.Logf("not needed: %+v", f)
					continue
				}
				less, err := source.tell(slices.Delete(slices.Clone(source.facts), i, i+1))
				if err == nil && gocmp.Equal(script, less.steps) {
					t.Errorf("control: the script is told as well without %+v", f)
				}
			}
			t.Logf("%d facts tell:\n%s", len(told.used), strings.Join(told.steps, "\n"))
		})
	}
	checkTold(t, recs, h.log.all())
	checkCaseLines(t, h.log.all(), map[string]string{"case_id": "C-17", "investigation_id": "I-4"})
}

// aof is the file that Redis appends its data to.
func aof(t *testing.T, server *redistest.Server) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(server.Dir(), "appendonlydir", "*.incr.aof"))
	if err != nil || len(files) != 1 {
		t.Fatalf("append-only files %v, %v, want one", files, err)
	}
	return files[0]
}

// settledAOF waits for a moment in which nothing is on its way, and returns what
// Redis has confirmed and how long its file is.
func settledAOF(t *testing.T, h *host, server *redistest.Server) (acked uint64, size int64) {
	t.Helper()
	eventually(t, 30*time.Second, "Redis has all and is quiet", func() bool {
		s := h.mustStatus()
		fi, err := os.Stat(aof(t, server))
		if err != nil {
			t.Fatal(err)
		}
		quiet := s.Transport.Acked == s.Buffer.Last && s.Transport.Acked == acked && fi.Size() == size
		acked, size = s.Transport.Acked, fi.Size()
		return quiet
	})
	return acked, size
}

// rot flips a bit in the middle one of the chunks in the buffer's file whose records
// are all in (after, last], and returns its range.
func rot(t *testing.T, path string, after, last uint64) lostRange {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The header of a chunk, see buffer/chunk.go: magic, checksum of what follows,
	// count at 12, first at 16, length of the payload at 44, payload at 48.
	const header = 48
	type chunk struct {
		at int
		r  lostRange
	}
	var chunks []chunk
	for at := 0; ; at++ {
		i := bytes.Index(data[at:], []byte("EDRc"))
		if i < 0 {
			break
		}
		at += i
		b := data[at:]
		if len(b) < header {
			break
		}
		count, seq, size := bits.LittleEndian.Uint32(b[12:]), bits.LittleEndian.Uint64(b[16:]), bits.LittleEndian.Uint32(b[44:])
		if uint64(size) > uint64(len(b)-header) || crc32.Checksum(b[8:header+size], crc32.MakeTable(crc32.Castagnoli)) != bits.LittleEndian.Uint32(b[4:]) {
			continue
		}
		if r := (lostRange{First: seq, Last: seq + uint64(count) - 1, Count: uint64(count), Cause: "corrupt"}); r.First > after && r.Last <= last {
			chunks = append(chunks, chunk{at, r})
		}
	}
	slices.SortFunc(chunks, func(a, b chunk) int { return cmp.Compare(a.r.First, b.r.First) })
	if len(chunks) < 5 {
		t.Fatalf("%d chunks between %d and %d, want some", len(chunks), after, last)
	}
	c := chunks[len(chunks)/2]
	if _, err := f.WriteAt([]byte{data[c.at+header+20] ^ 1}, int64(c.at+header+20)); err != nil {
		t.Fatal(err)
	}
	return c.r
}

// fact is one thing that the sensor made known, by a record or by a line.
type fact struct {
	Order         uint64 // in which it was made known first: seq, or number of the line
	Code          string
	Line          string // the message, when it is a line of a stage and not of a decision
	Before, After string
	Reason        string
	Agent         string
	Case          string
	Investigation string
	User          string
	Count         uint64
	From, To      time.Time
	Ranges        []lostRange
	Evidence      map[string]any
}

type lostRange struct {
	Cause              string
	First, Last, Count uint64
}

func (f *fact) number(key string) uint64 {
	n, _ := f.Evidence[key].(float64)
	return uint64(n)
}

// recordFacts reads what the decisions streams say.
func recordFacts(t *testing.T, recs []record) (out []fact) {
	t.Helper()
	for _, r := range recs {
		var d struct {
			Start    int64  `json:"start_time"`
			End      int64  `json:"end_time"`
			Message  string `json:"message"`
			Unmapped struct {
				Sensor map[string]any
				Lost   struct{ Ranges []lostRange }
			}
		}
		if err := json.Unmarshal(r.data, &d); err != nil {
			t.Fatal(err)
		}
		f := fact{
			Order: r.seq, Code: r.event.StatusCode, Reason: d.Message, Agent: r.agent, Count: r.event.Count,
			Ranges: d.Unmapped.Lost.Ranges, Evidence: d.Unmapped.Sensor, Investigation: r.event.Metadata.Correlation,
		}
		for _, tag := range r.event.Metadata.Tags {
			switch tag.Name {
			case "case_id":
				f.Case = tag.Value
			case "user_id":
				f.User = tag.Value
			}
		}
		f.Before, _ = f.Evidence["before"].(string)
		f.After, _ = f.Evidence["after"].(string)
		if d.Start != 0 {
			f.From, f.To = time.UnixMilli(d.Start), time.UnixMilli(d.End)
		}
		if first := f.number("restated_seq"); first != 0 {
			f.Order = first
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b fact) int { return cmp.Compare(a.Order, b.Order) })
	return out
}

// The lines of the stages that are evidence beside those of the decisions.
const (
	lineStarted = "started"
	lineStopped = "stopped"
	lineBehind  = "server lost confirmed records, sending them again"
	lineGone    = "server lost records that the buffer no longer has"
)

// lineFacts reads what the log says.
func lineFacts(lines [][]byte) (out []fact) {
	for i, l := range lines {
		var d struct {
			Msg, Code, Reason, Before, After string
			Agent                            string `json:"agent_id"`
			Case                             string `json:"case_id"`
			Investigation                    string `json:"investigation_id"`
			User                             string `json:"user_id"`
			Count, First, Last               uint64
			From, To                         time.Time
			Ranges                           []lostRange
			Evidence                         map[string]any
		}
		if json.Unmarshal(l, &d) != nil {
			continue // cut by the kill, see checkLog
		}
		f := fact{
			Order: uint64(i), Code: d.Code, Before: d.Before, After: d.After, Reason: d.Reason, Agent: d.Agent, Case: d.Case,
			Investigation: d.Investigation, User: d.User, Count: d.Count, From: d.From, To: d.To, Ranges: d.Ranges, Evidence: d.Evidence,
		}
		switch d.Msg {
		case "decided":
		case lineStarted, lineStopped:
			f.Line = d.Msg
		case lineBehind, lineGone:
			f.Line, f.Ranges = d.Msg, []lostRange{{First: d.First, Last: d.Last, Count: d.Last - d.First + 1}}
		default:
			continue
		}
		out = append(out, f)
	}
	// What names losses may be lost itself; then a later line names all of them again.
	var later []lostRange
	for i, f := range slices.Backward(out) {
		if f.Code != "RECORDS_LOST" {
			continue
		}
		if fresh := join(append(slices.Clone(later), f.Ranges...)); total(fresh) == total(later) {
			out = slices.Delete(out, i, i+1)
		} else {
			later = fresh
		}
	}
	return out
}

// join sorts ranges and joins those of a cause that touch or overlap.
func join(all []lostRange) (out []lostRange) {
	slices.SortFunc(all, func(a, b lostRange) int { return cmp.Or(cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.First, b.First)) })
	for _, r := range all {
		if n := len(out); n > 0 && out[n-1].Cause == r.Cause && r.First <= out[n-1].Last+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
		} else {
			out = append(out, r)
		}
	}
	for i := range out {
		out[i].Count = out[i].Last - out[i].First + 1
	}
	return out
}

// total counts the records in ranges.
func total(ranges []lostRange) (n uint64) {
	for _, r := range ranges {
		n += r.Count
	}
	return n
}

// histories is every decision in a line, less the names of losses, which may be said
// again, sorted: the order of two that were made at the same moment is nobody's.
func histories(facts []fact) (out []string) {
	for _, f := range facts {
		if f.Code == "RECORDS_LOST" || f.Line != "" {
			continue
		}
		evidence := map[string]any{}
		maps.Copy(evidence, f.Evidence)
		for _, k := range []string{"before", "after", "restated_seq"} {
			delete(evidence, k)
		}
		b, _ := json.Marshal(evidence) // sorted
		out = append(out, fmt.Sprintf("%s %s→%s %d %q agent=%s case=%s of %s by %s %s", f.Code, f.Before, f.After, f.Count, f.Reason, f.Agent, f.Case, f.Investigation, f.User, b))
	}
	slices.Sort(out)
	return out
}

// checkTold wants one record for each decision that has a line, and the other way round:
// also of those that were dropped with the oldest records. With codes it looks at those.
func checkTold(t *testing.T, recs []record, lines [][]byte, codes ...string) {
	t.Helper()
	others := func(f fact) bool { return len(codes) > 0 && !slices.Contains(codes, f.Code) }
	fromRecords := recordFacts(t, slices.DeleteFunc(slices.Clone(recs), func(r record) bool { return r.stream == eventsKey }))
	fromLines := lineFacts(lines)
	if d := gocmp.Diff(histories(slices.DeleteFunc(fromRecords, others)), histories(slices.DeleteFunc(fromLines, others))); d != "" {
		t.Errorf("records and lines (-record +line):\n%s", d)
	}
}

// told is what was reconstructed, and from which of the facts.
type told struct {
	steps []string
	blind []fact
	used  map[int]bool
}

// reconstruct tells what happened from decisions. It knows nothing of the script, but
// how a sensor behaves, and refuses decisions that do not fit together.
func reconstruct(facts []fact) (*told, error) {
	s := &told{used: map[int]bool{}}
	step := func(format string, args ...any) { s.steps = append(s.steps, fmt.Sprintf(format, args...)) }

	// When losses are named has no meaning, so the names are collected first.
	named := map[string][]lostRange{}
	for i, f := range facts {
		if f.Code != "RECORDS_LOST" || f.Line != "" {
			continue
		}
		s.used[i] = true
		if total(f.Ranges) != f.Count {
			return nil, fmt.Errorf("the ranges do not add up to the count: %+v", f)
		}
		for _, r := range f.Ranges {
			named[r.Cause] = join(append(named[r.Cause], r))
		}
	}

	var (
		agent                = facts[0].Agent
		mode, config         string // mode is "" before the first run, and "stopped" between runs
		pid                  uint64
		away                 bool // Redis is
		dropping             bool // a truncation has begun and not ended
		dropStep             = -1 // which step tells of it
		dropped, damaged     uint64
		behind               []lostRange
		open                 fact // the case
		goesOn               bool // and this run knows of it
		killed, blinds, news int
	)
	for i, f := range facts {
		bad := func(why string) (*told, error) { return nil, fmt.Errorf("%s: %+v", why, f) }
		if f.Agent != agent || agent == "" {
			return bad("not of agent " + agent)
		}
		if f.Line != "" || f.Code == "RECORDS_LOST" {
			continue
		}
		if mode == "" && f.Code != "START" {
			return bad("the history does not begin with a start")
		}
		s.used[i] = true
		switch f.Code {
		case "START":
			if mode != "" && mode != "stopped" {
				step("%d was killed; it was %s", pid, mode)
				killed++
			}
			if open.Code != "" && !goesOn {
				return bad("the run before did not know of the case")
			}
			mode, config, pid, away, goesOn = "starting", "", f.number("pid"), false, false
			step("agent %s: started as %d", f.Agent, pid)
		case "BUFFER_NEW":
			news++
		case "CONFIG_LOADED":
			config = f.After
		case "CONFIG_REJECTED":
			problems, _ := f.Evidence["problems"].([]any)
			if f.Before != config || f.After != config || uint64(len(problems)) != f.Count {
				return bad("not of the configuration " + config)
			}
			step("%v: %d problems in the configuration, nothing was changed", f.Evidence["asked_by"], f.Count)
		case "MODE":
			if f.Before != mode || config == "" {
				return bad("something is missing before it")
			}
			mode = f.After
			if mode == "buffering" && !away {
				away = true
				step("Redis went away")
			}
		case "DELIVERY_RESUMED":
			if !away || f.To.Before(f.From) {
				return bad("Redis was not away")
			}
			away = false
			step("Redis came back")
		case "TRUNCATION_STARTED":
			if dropping || !away && dropStep < 0 {
				return bad("out of place")
			}
			if dropping = true; dropStep < 0 {
				dropStep = len(s.steps)
				step("") // until it has ended
			}
		case "TRUNCATION_ENDED":
			dropped += f.Count
			if !dropping || f.number("truncated") != dropped {
				return bad("something is missing before it")
			}
			dropping = false
			s.steps[dropStep] = fmt.Sprintf("%d records were truncated", dropped)
		case "SERVER_BEHIND":
			r := lostRange{First: f.number("first"), Last: f.number("last"), Count: f.Count}
			behind = append(behind, r)
			gone := total(within(named["server_loss"], r))
			step("Redis lacked %d-%d: %d of them are lost", r.First, r.Last, gone)
		case "BUFFER_DAMAGED":
			damaged += f.Count
			for _, r := range named["corrupt"] {
				step("%d records were damaged: %d-%d", f.Count, r.First, r.Last)
			}
		case "CASE_OPENED":
			open, goesOn = f, true
			step("%s opened case %s of %s on %v", f.User, f.Case, f.Investigation, f.Evidence["scope"])
		case "CASE_RESUMED":
			if goesOn || f.Case != open.Case || f.Investigation != open.Investigation || f.User != open.User {
				return bad("not the case that was open")
			}
			goesOn = true
			step("case %s of %s goes on", f.Case, f.Investigation)
		case "CASE_CLOSED":
			if !goesOn || f.Case != open.Case || f.Investigation != open.Investigation || f.Evidence["opened_by"] != open.User {
				return bad("not the case that was open")
			}
			step("%s closed case %s of %s, which %s had opened", f.User, f.Case, f.Investigation, open.User)
			open = fact{}
		case "BLIND_KILLED":
			blinds++
			s.blind = append(s.blind, f)
		case "STOP":
			if f.Before != mode {
				return bad("something is missing before it")
			}
			step("%d was stopped; it was %s", pid, mode)
			mode = "stopped"
		default:
			delete(s.used, i)
		}
	}
	switch {
	case news != 1:
		return nil, fmt.Errorf("the history begins with %d new buffers", news)
	case killed != blinds:
		return nil, fmt.Errorf("%d runs were killed, %d times are known in which none ran", killed, blinds)
	case mode != "stopped":
		return nil, errors.New("the last run has no end")
	case away || dropping || open.Code != "":
		return nil, fmt.Errorf("it goes on: Redis away %t, truncation %t, case %q", away, dropping, open.Case)
	case total(named["truncated"]) != dropped || total(named["corrupt"]) != damaged || !slices.Equal(within(named["server_loss"], behind...), named["server_loss"]):
		return nil, fmt.Errorf("named are %v; %d were truncated, %d damaged, and Redis lacked %v", named, dropped, damaged, behind)
	}
	return s, nil
}

// within returns those of ranges that are part of one of the others.
func within(ranges []lostRange, others ...lostRange) []lostRange {
	return slices.DeleteFunc(slices.Clone(ranges), func(r lostRange) bool {
		return !slices.ContainsFunc(others, func(o lostRange) bool { return o.First <= r.First && r.Last <= o.Last })
	})
}

// reconstructFromLog does the same with lines: those of the decisions, to which those
// of the stages that did what was decided have to fit.
func reconstructFromLog(facts []fact) (*told, error) {
	s, err := reconstruct(facts)
	if err != nil {
		return nil, err
	}
	// What a stage says and what a decision says of it, in their order.
	stages, decisions := map[string][]string{}, map[string][]string{}
	for i, f := range facts {
		switch {
		case f.Line == lineBehind || f.Line == lineGone:
			stages[f.Line] = append(stages[f.Line], fmt.Sprint(f.Ranges[0].First, "-", f.Ranges[0].Last))
		case f.Line != "":
			stages[f.Line] = append(stages[f.Line], "")
		case f.Code == "SERVER_BEHIND":
			decisions[lineBehind] = append(decisions[lineBehind], fmt.Sprint(f.number("first"), "-", f.number("last")))
		case f.Code == "RECORDS_LOST":
			for _, r := range f.Ranges {
				if r.Cause == "server_loss" {
					decisions[lineGone] = append(decisions[lineGone], fmt.Sprint(r.First, "-", r.Last))
				}
			}
		case f.Code == "START":
			decisions[lineStarted] = append(decisions[lineStarted], "")
		case f.Code == "STOP":
			decisions[lineStopped] = append(decisions[lineStopped], "")
		}
		s.used[i] = s.used[i] || f.Line != ""
	}
	if d := gocmp.Diff(decisions, stages); d != "" {
		return nil, fmt.Errorf("decisions and stages (-decided +done):\n%s", d)
	}
	return s, nil
}

// checkCaseLines wants the ids of a case on every line that speaks of it.
func checkCaseLines(t *testing.T, lines [][]byte, ids map[string]string) {
	t.Helper()
	found := 0
	for _, l := range lines {
		if !bytes.Contains(l, []byte(`"`+ids["case_id"]+`"`)) {
			continue
		}
		found++
		checkLog(t, [][]byte{l}, ids)
	}
	if found < 3 {
		t.Errorf("%d lines speak of case %s, want more", found, ids["case_id"])
	}
}
