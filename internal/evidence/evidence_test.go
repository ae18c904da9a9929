// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// event is one record of the tests.
func event(seq uint64, code, caseID string, at time.Time) string {
	tags := ""
	if caseID != "" {
		tags = fmt.Sprintf(`,"tags":[{"name":"user_id","value":%[1]q},{"name":"case_id","value":%[1]q}]`, caseID)
	}
	return fmt.Sprintf(`{"metadata":{"version":"1.8.0","sequence":%d,"event_code":%q,"product":{"name":"a \"b\\"}%s,"profiles":["host"]},"time":1,"time_dt":%q}`,
		seq, code, tags, at.UTC().Format(time.RFC3339Nano))
}

// openQueue makes a queue in dir that commits at once.
func openQueue(t testing.TB, dir string) *buffer.Queue {
	t.Helper()
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: dir, Cap: 16 << 20, CommitInterval: time.Millisecond, AllowUnsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func closeQueue(t testing.TB, q *buffer.Queue) {
	t.Helper()
	if err := q.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// store makes one chunk of records of a stream.
func store(t testing.TB, q *buffer.Queue, s buffer.Stream, records ...string) {
	t.Helper()
	b := q.NewBatch()
	for _, r := range records {
		if err := b.End(append(b.Begin(s), r...), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(q.Append(t.Context(), b), q.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func inspect(t testing.TB, path string) *buffer.Snapshot {
	t.Helper()
	s, err := buffer.Inspect(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// damage changes a byte of the payload of the chunk that has seq.
func damage(t testing.TB, dir string, seq uint64) {
	t.Helper()
	s := inspect(t, dir)
	at := int64(0)
	err := s.Walk(t.Context(), buffer.Range{First: seq, Last: seq}, func(c *buffer.Chunk) bool { at = c.Offset; return false })
	f, ferr := os.OpenFile(s.Path, os.O_RDWR, 0)
	if err = errors.Join(err, ferr); err != nil || at == 0 {
		t.Fatal(at, err)
	}
	defer f.Close()
	var one [1]byte
	if _, err := f.ReadAt(one[:], at+100); err != nil {
		t.Fatal(err)
	}
	one[0] ^= 1
	if _, err := f.WriteAt(one[:], at+100); err != nil {
		t.Fatal(err)
	}
}

// seqs are those of the lines of an export, which have to be records as they are.
func seqs(t *testing.T, text string, all map[uint64]string) (list []uint64) {
	t.Helper()
	for line := range strings.Lines(text) {
		var e struct{ Metadata struct{ Sequence uint64 } }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if n := e.Metadata.Sequence; all[n]+"\n" != line {
			t.Errorf("record %d is %q, want %q", n, line, all[n])
		}
		list = append(list, e.Metadata.Sequence)
	}
	return list
}

// TestExportSelects asks for the same of a queue in use and of its file.
func TestExportSelects(t *testing.T) {
	dir := t.TempDir()
	q := openQueue(t, dir)
	start := time.Now().Truncate(time.Second)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	all := map[uint64]string{
		1: event(1, "process.exec", "", at(-4)), 2: event(2, "net.connect_failed", "C-1", at(-3)),
		3: event(3, "sensor.start", "", at(-2)),
		4: event(4, "file.open_write", `C "2"`, at(-1)), 5: event(5, "process.exit", "C-1", at(0)),
	}
	store(t, q, buffer.Events, all[1], all[2])
	store(t, q, buffer.DecisionsApprovals, all[3])
	store(t, q, buffer.Events, all[4], all[5])
	q.Ack(2)
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		q    Query
		want []uint64
	}{
		{"all", Query{}, []uint64{1, 2, 3, 4, 5}},
		{"seqs", Query{First: 2, Last: 4}, []uint64{2, 3, 4}},
		{"one seq", Query{First: 5, Last: 5}, []uint64{5}},
		{"from", Query{First: 4}, []uint64{4, 5}},
		{"up to", Query{Last: 1}, []uint64{1}},
		{"since", Query{Since: at(-2)}, []uint64{3, 4, 5}},
		{"until", Query{Until: at(-2)}, []uint64{1, 2}},
		{"a second", Query{Since: at(-1), Until: at(0)}, []uint64{4}},
		{"kind by code", Query{Kinds: []string{"process.exec"}}, []uint64{1}},
		{"kind by family", Query{Kinds: []string{"process"}}, []uint64{1, 5}},
		{"kinds by short name and pattern", Query{Kinds: []string{"open", "f?iled"}}, []uint64{2, 4}},
		{"case", Query{Cases: []string{"C-1"}}, []uint64{2, 5}},
		{"a case with quotes, and another", Query{Cases: []string{`C "2"`, "C-9"}}, []uint64{4}},
		{"events", Query{Streams: []string{"events"}}, []uint64{1, 2, 4, 5}},
		{"decisions", Query{Streams: []string{"decisions"}}, []uint64{3}},
		{"one stream of decisions", Query{Streams: []string{"decisions:approvals"}}, []uint64{3}},
		{"another", Query{Streams: []string{"decisions:system"}}, nil},
		{"all conditions", Query{First: 2, Since: at(-3), Kinds: []string{"net", "exit"}, Cases: []string{"C-1"}, Streams: []string{"events"}}, []uint64{2, 5}},
	} {
		// What is said over the wire is the same query.
		again, err := ParseQuery(c.q.Values())
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if c.q.String() != again.String() || !again.Since.Equal(c.q.Since) || !again.Until.Equal(c.q.Until) {
			t.Errorf("%s: %s is read as %s", c.name, c.q.String(), again.String())
		}
		for name, src := range map[string]Source{"queue": q, "file": inspect(t, dir)} {
			var b bytes.Buffer
			s, err := Export(t.Context(), src, again, &b)
			if err != nil || !s.Complete() || s.Records != uint64(len(c.want)) || s.Bytes != int64(b.Len()) {
				t.Errorf("%s of %s: %v, %+v", c.name, name, err, s)
			}
			if sum := sha256.Sum256(b.Bytes()); s.SHA256 != hex.EncodeToString(sum[:]) {
				t.Errorf("%s of %s: the hash is of something else", c.name, name)
			}
			if d := cmp.Diff(c.want, seqs(t, b.String(), all)); d != "" {
				t.Errorf("%s of %s (-want +got):\n%s", c.name, name, d)
			}
		}
	}

	var b bytes.Buffer
	if _, err := Export(t.Context(), q, Query{First: 2, Last: 3, Envelope: true}, &b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	for i, want := range []string{`"seq":2,"stream":"events","delivered":true,`, `"seq":3,"stream":"decisions:approvals","delivered":false,`} {
		var e struct {
			Epoch  string
			Stored time.Time
			Event  json.RawMessage
		}
		if err := json.Unmarshal([]byte(lines[i]), &e); err != nil || e.Epoch != q.Epoch() || e.Stored.Before(start) || string(e.Event) != all[uint64(i+2)] || !strings.Contains(lines[i], want) {
			t.Errorf("%s, %v; want %s", lines[i], err, want)
		}
	}
	closeQueue(t, q)
}

// TestExportNamesWhatIsMissing has records that are damaged, that have left, that were
// never there, and that are none.
func TestExportNamesWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	q := openQueue(t, dir)
	all := map[uint64]string{}
	for seq := uint64(1); seq <= 12; seq += 3 {
		var three []string
		for n := seq; n < seq+3; n++ {
			all[n] = event(n, "process.exec", "", time.Now())
			three = append(three, all[n])
		}
		store(t, q, buffer.Events, three...)
	}
	closeQueue(t, q)
	damage(t, dir, 5)
	check := func(name string, src Source, query Query, missing []Missing, want ...uint64) Summary {
		t.Helper()
		var b bytes.Buffer
		s, err := Export(t.Context(), src, query, &b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(want, seqs(t, b.String(), all)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		for i := range s.Missing {
			if s.Missing[i].Reason != "" {
				s.Missing[i].Reason = "why"
			}
		}
		if d := cmp.Diff(missing, s.Missing); d != "" || s.Complete() != (missing == nil) {
			t.Errorf("%s: missing (-want +got):\n%s", name, d)
		}
		return s
	}
	bad := Missing{Cause: buffer.CauseCorrupt, First: 4, Last: 6, Reason: "why"}
	file := inspect(t, dir)
	check("all", file, Query{}, []Missing{bad}, 1, 2, 3, 7, 8, 9, 10, 11, 12)
	check("a part of it", file, Query{First: 5, Last: 8}, []Missing{{bad.Cause, 5, 6, "why"}}, 7, 8)
	check("beside it", file, Query{First: 7, Last: 9}, nil, 7, 8, 9)
	check("more than there is", file, Query{First: 9, Last: 20}, []Missing{{Cause: CauseFuture, First: 13, Last: 20}}, 9, 10, 11, 12)
	check("only what will be", file, Query{First: 30, Last: 31}, []Missing{{Cause: CauseFuture, First: 30, Last: 31}})
	check("behind the end", file, Query{First: 30}, nil)

	// The reader meets the chunk, takes it out and names it; then it is a hole.
	q = openQueue(t, dir)
	for after := uint64(0); after < 12; {
		recs, err := q.Read(t.Context(), after, nil, 100, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		after = recs[len(recs)-1].Seq
	}
	bad.Reason = ""
	check("a hole", q, Query{}, []Missing{bad}, 1, 2, 3, 7, 8, 9, 10, 11, 12)
	check("a hole at the end of the range", q, Query{First: 1, Last: 5}, []Missing{{Cause: bad.Cause, First: 4, Last: 5}}, 1, 2, 3)
	r, err := Verify(t.Context(), q)
	if err != nil || !r.Clean() || len(r.Notes) != 1 || r.Records != 9 {
		t.Errorf("a hole is counted, and no damage: %+v, %v", r, err)
	}

	// A record that is none is evidence, but says nothing to select it by.
	store(t, q, buffer.Events, "not JSON")
	var b bytes.Buffer
	if s, err := Export(t.Context(), q, Query{First: 13}, &b); err != nil || !s.Complete() || b.String() != "not JSON\n" {
		t.Errorf("%+v, %v: %q", s, err, b.String())
	}
	b.Reset()
	if s, err := Export(t.Context(), q, Query{First: 12, Kinds: []string{"exec"}}, &b); err != nil || s.Complete() || s.Unknown != 1 || s.Records != 1 {
		t.Errorf("%+v, %v: %q", s, err, b.String())
	}
	if r, err := Verify(t.Context(), q); err != nil || len(r.Findings) != 1 || !strings.Contains(r.Findings[0], "record 13: is no event") {
		t.Errorf("%+v, %v", r, err)
	}
	closeQueue(t, q)
}

// TestExportOfWhatHasLeft: the buffer says what it still knows of what it had to drop.
func TestExportOfWhatHasLeft(t *testing.T) {
	q := openQueue(t, t.TempDir())
	defer closeQueue(t, q)
	pad := strings.Repeat("x", 60<<10)
	for seq := uint64(1); seq <= 300; seq++ {
		store(t, q, buffer.Events, strings.Replace(event(seq, "process.exec", "", time.Now()), `"time":`, `"pad":"`+pad+`","time":`, 1))
		if seq == 20 {
			q.Ack(10)
		}
	}
	i := q.Info()
	if i.First <= 20 || i.Truncated == 0 || i.Reclaimed != 10 {
		t.Fatalf("%+v", i)
	}
	s, err := Export(t.Context(), q, Query{First: 3, Last: i.First}, &bytes.Buffer{})
	want := []Missing{{Cause: CauseGone, First: 3, Last: 10}, {Cause: buffer.CauseTruncated, First: 11, Last: i.First - 1}}
	if d := cmp.Diff(want, s.Missing); d != "" || err != nil || s.Records != 1 {
		t.Errorf("%v, %+v (-want +got):\n%s", err, s, d)
	}
	s, err = Export(t.Context(), q, Query{First: 15, Last: 16}, &bytes.Buffer{})
	if d := cmp.Diff([]Missing{{Cause: buffer.CauseTruncated, First: 15, Last: 16}}, s.Missing); d != "" || err != nil || s.Records != 0 {
		t.Errorf("%v, %+v (-want +got):\n%s", err, s, d)
	}
	s, err = Export(t.Context(), q, Query{Since: i.Oldest.Add(-time.Minute)}, &bytes.Buffer{})
	if err != nil || !s.Begins.Equal(i.Oldest) || s.Complete() || s.Records != i.Records {
		t.Errorf("since before the buffer begins: %v, %+v", err, s)
	}
	if s, err = Export(t.Context(), q, Query{}, &bytes.Buffer{}); err != nil || !s.Complete() || s.Records != i.Records {
		t.Errorf("what there is: %v, %+v", err, s)
	}
	full := errors.New("no space left")
	if s, err = Export(t.Context(), q, Query{}, failing{full}); !errors.Is(err, full) || s.Complete() || s.Records != 0 {
		t.Errorf("no space: %v, %+v", err, s)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err = Export(ended, q, Query{}, &bytes.Buffer{}); !errors.Is(err, context.Canceled) || s.Complete() {
		t.Errorf("ended: %v, %+v", err, s)
	}
}

type failing struct{ error }

func (f failing) Write([]byte) (int, error) { return 0, f.error }

// faked is a source that lies.
type faked struct {
	Source
	change func(*buffer.Info)
}

func (f faked) Info() buffer.Info {
	i := f.Source.Info()
	f.change(&i)
	return i
}

func TestVerifyFindsFaults(t *testing.T) {
	dir := t.TempDir()
	q := openQueue(t, dir)
	for seq := uint64(1); seq <= 4; seq++ {
		store(t, q, buffer.Events, event(seq, "process.exec", "", time.Now()))
	}
	store(t, q, buffer.Events, event(9, "process.exec", "", time.Now())) // says another seq than it has
	closeQueue(t, q)
	nothing := func(*buffer.Info) {}
	for _, c := range []struct {
		name string
		info func(*buffer.Info)
		seq  uint64 // to damage
		want []string
	}{
		{"a record with another seq", nothing, 0, []string{"record 5: says that it is 9"}},
		{"a chunk", nothing, 3, []string{"chunk of seq 3 to 3 (1 records): damaged chunk: checksum", "record 5: says that it is 9"}},
		{"a counter", func(i *buffer.Info) { i.Truncated++ }, 0, []string{"the counters account for 6 records of 5", "record 5", "the counters account for"}},
		{"bounds", func(i *buffer.Info) { i.Acked = 7 }, 0, []string{"the bounds contradict", "record 5", "the bounds contradict"}},
		{"a record too many", func(i *buffer.Info) { i.Records, i.Last = 6, 6 }, 0, []string{"record 5", "there are 5 records, the counters say 6"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join(dir, "q.db"))
			if err != nil {
				t.Fatal(err)
			}
			copied := t.TempDir()
			if err := os.WriteFile(filepath.Join(copied, "q.db"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.seq > 0 {
				damage(t, copied, c.seq)
			}
			r, err := Verify(t.Context(), faked{inspect(t, copied), c.info})
			if err != nil {
				t.Fatal(err)
			}
			same := slices.EqualFunc(r.Findings, c.want, strings.HasPrefix)
			if !same || r.Clean() || r.Chunks != 5 {
				t.Errorf("%+v, want %q", r, c.want)
			}
		})
	}
}

func TestQueryIsChecked(t *testing.T) {
	for _, c := range []struct{ query, want string }{
		{"first=x", "first: "},
		{"first=5&last=4", "ends before it begins"},
		{"first=1&first=2", "is there 2 times"},
		{"since=yesterday", "since: "},
		{"since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "is not after the begin"},
		{"kind=[", "syntax error"},
		{"stream=event", "must be one of events, decisions, "},
		{"envelope=perhaps", "envelope: "},
		{"pid=1", "pid: is not known"},
	} {
		v, err := url.ParseQuery(c.query)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseQuery(v); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.query, err, c.want)
		}
	}
}

// FuzzHead holds what the walk over JSON finds against encoding/json.
func FuzzHead(f *testing.F) {
	files, err := filepath.Glob("../../sensor/ocsf/testdata/*.json")
	if err != nil || len(files) < 20 {
		f.Fatal(len(files), err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		var b bytes.Buffer
		if json.Compact(&b, data) == nil {
			f.Add(b.Bytes())
		}
	}
	for _, s := range []string{
		`{}`, `{"metadata":{}}`, `{"metadata":{"event_code":"a"},"time_dt":""}`, `{"time_dt":"x","metadata":{"tags":[],"event_code":"a","sequence":7}}`,
		`{"metadata":{"tags":[{"value":"\u0041\"\\","name":"case_id"},{"name":"case_id","value":"b"}],"event_code":"a.b"}}`, `{"a":[1,2,{"b":"]}"}],"metadata":{"event_code":"\\"}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		h, ok := readHead(data)
		at, _ := h.time()
		found := h.tagged("case_id", []string{"C-1", `A"\`})
		var want struct {
			Metadata *struct {
				Sequence uint64          `json:"sequence"`
				Code     string          `json:"event_code"`
				Tags     json.RawMessage `json:"tags"`
			} `json:"metadata"`
			At string `json:"time_dt"`
		}
		if json.Unmarshal(data, &want) != nil || want.Metadata == nil || ambiguous(data) {
			return // all that matters is that it did not panic
		}
		m := want.Metadata
		if ok != (m.Code != "") || ok && (h.code != m.Code || h.seq != m.Sequence) {
			t.Fatalf("%t %+v, want %+v: %s", ok, h, m, data)
		}
		if t1, err := time.Parse(time.RFC3339Nano, want.At); ok && err == nil && !at.Equal(t1) {
			t.Fatalf("time %v, want %v: %s", at, t1, data)
		}
		var tags []struct{ Name, Value string }
		if ok && json.Unmarshal(m.Tags, &tags) == nil {
			has := false
			for _, tag := range tags {
				has = has || tag.Name == "case_id" && (tag.Value == "C-1" || tag.Value == `A"\`)
			}
			if has != found {
				t.Fatalf("tagged %t, want %t: %s", found, has, data)
			}
		}
	})
}

// ambiguous tells of JSON that readers differ about: keys that are there twice, or that
// differ in the case of letters or in escapes, and null.
func ambiguous(data []byte) bool {
	lower := bytes.ToLower(data)
	for _, key := range []string{`"metadata"`, `"sequence"`, `"event_code"`, `"tags"`, `"time_dt"`} {
		if bytes.Count(lower, []byte(key)) != bytes.Count(data, []byte(key)) || bytes.Count(data, []byte(key)) > 1 {
			return true
		}
	}
	for _, key := range []string{`"name"`, `"value"`} {
		if bytes.Count(lower, []byte(key)) != bytes.Count(data, []byte(key)) {
			return true
		}
	}
	return bytes.Contains(data, []byte("null")) || bytes.Contains(data, []byte(`\u`)) || bytes.ContainsFunc(data, func(r rune) bool { return r >= 0x80 })
}

// TestEvidenceOfAnEarlierEpoch: what another epoch had delivered is part of the evidence,
// without a seq, and no fault.
func TestEvidenceOfAnEarlierEpoch(t *testing.T) {
	dir := t.TempDir()
	q := openQueue(t, dir)
	all := map[uint64]string{}
	for seq := uint64(1); seq <= 5; seq++ {
		all[seq] = event(seq, "process.exec", "", time.Now())
		store(t, q, buffer.Events, all[seq])
	}
	q.Ack(2)
	epoch, err := q.Renew(t.Context(), q.Epoch())
	if err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]Source{"queue": q, "file": inspect(t, dir)} {
		var b bytes.Buffer
		s, err := Export(t.Context(), src, Query{}, &b)
		if err != nil || !s.Complete() || s.First != 1 || s.Last != 3 || s.Records != 5 {
			t.Errorf("%s: %v, %+v", name, err, s)
		}
		if d := cmp.Diff([]uint64{1, 2, 3, 4, 5}, seqs(t, b.String(), all)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		b.Reset()
		s, err = Export(t.Context(), src, Query{First: 1, Last: 2}, &b) // in the numbers of this epoch
		if d := cmp.Diff([]uint64{3, 4}, seqs(t, b.String(), all)); d != "" || err != nil || !s.Complete() {
			t.Errorf("%s: %v, %+v (-want +got):\n%s", name, err, s, d)
		}
		b.Reset()
		if _, err = Export(t.Context(), src, Query{Last: 1, Envelope: true}, &b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for i, line := range slices.Collect(strings.Lines(b.String())) {
			want := `{"epoch":"","seq":0,"stream":"events","delivered":true,`
			if i == 2 {
				want = fmt.Sprintf(`{"epoch":%q,"seq":1,"stream":"events","delivered":false,`, epoch)
			}
			if !strings.HasPrefix(line, want) || i > 2 {
				t.Errorf("%s: %s, want %s", name, line, want)
			}
		}
		if r, err := Verify(t.Context(), src); err != nil || !r.Clean() || r.Records != 5 || len(r.Notes) > 0 {
			t.Errorf("%s: %v, %+v", name, err, r)
		}
	}
	closeQueue(t, q)
}
