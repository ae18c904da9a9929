// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/redis/go-redis/v9"
)

const (
	stream = "edr:{s000}:events"
	epoch1 = "0192f0c0ffee00000001"
	epoch2 = "0192f0c0ffee00000002"
)

func pack(tb testing.TB, plain string) string {
	tb.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		tb.Fatal(err)
	}
	return string(w.EncodeAll([]byte(plain), nil))
}

func jsonEntry(seq uint64, data string) map[string]any {
	return map[string]any{"id": "u", "timestamp": "t", "data": data, "agent": "a", "epoch": epoch1, "seq": fmt.Sprint(seq)}
}

func packedEntry(tb testing.TB, seq uint64, lines ...string) map[string]any {
	tb.Helper()
	return map[string]any{
		"agent": "a", "epoch": epoch1, "seq": fmt.Sprint(seq), "n": fmt.Sprint(len(lines)), "codec": "z", "data": pack(tb, strings.Join(lines, "\n")),
	}
}

func with(m map[string]any, key string, value any) map[string]any {
	if value == nil {
		delete(m, key)
	} else {
		m[key] = value
	}
	return m
}

func decoder(tb testing.TB, l Limits) *Decoder {
	tb.Helper()
	d, err := NewDecoder(l)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func TestDecode(t *testing.T) {
	d := decoder(t, Limits{Bytes: 1 << 20, Records: 100})
	want := func(seq uint64, lines ...string) (out []Record) {
		for i, l := range lines {
			out = append(out, Record{stream, "5-0", "a", epoch1, seq + uint64(i), []byte(l)})
		}
		return out
	}
	bomb := pack(t, strings.Repeat("x", 4<<20))
	for _, tt := range []struct {
		name   string
		values map[string]any
		want   []Record
		err    error
	}{
		{"json", jsonEntry(7, `{"a":1}`), want(7, `{"a":1}`), nil},
		{"json with line breaks", jsonEntry(1<<53, "{\n}"), want(1<<53, "{\n}"), nil},
		{"batch", packedEntry(t, 7, `{}`, `{"b":2}`, `{}`), want(7, `{}`, `{"b":2}`, `{}`), nil},
		{"batch of one, with line breaks", with(packedEntry(t, 7, "{\n}"), "n", "1"), want(7, "{\n}"), nil},
		{"batch up to the last seq", packedEntry(t, 1<<53-1, "1", "2"), want(1<<53-1, "1", "2"), nil},
		{"of another producer", map[string]any{"data": "x", "seq": "y"}, []Record{{Stream: stream, Entry: "5-0", Data: []byte("x")}}, nil},

		{"no data", with(jsonEntry(1, ""), "data", nil), nil, ErrField},
		{"data is no string", with(jsonEntry(1, ""), "data", 5), nil, ErrField},
		{"no agent in a batch", with(packedEntry(t, 1, "{}"), "agent", nil), nil, ErrField},
		{"empty agent", with(jsonEntry(1, "{}"), "agent", ""), nil, ErrField},
		{"long agent", with(jsonEntry(1, "{}"), "agent", strings.Repeat("x", 257)), nil, ErrField},
		{"no epoch", with(jsonEntry(1, "{}"), "epoch", nil), nil, ErrField},
		{"short epoch", with(jsonEntry(1, "{}"), "epoch", "0"), nil, ErrField},
		{"upper-case epoch", with(jsonEntry(1, "{}"), "epoch", strings.ToUpper(epoch1[:19]+"a")), nil, ErrField},
		{"no seq", with(jsonEntry(1, "{}"), "seq", nil), nil, ErrField},
		{"seq 0", jsonEntry(0, "{}"), nil, ErrField},
		{"seq 01", with(jsonEntry(1, "{}"), "seq", "01"), nil, ErrField},
		{"seq -1", with(jsonEntry(1, "{}"), "seq", "-1"), nil, ErrField},
		{"seq above 2^53", jsonEntry(1<<53+1, "{}"), nil, ErrField},
		{"another codec", with(packedEntry(t, 1, "{}"), "codec", "gz"), nil, ErrField},
		{"no n", with(packedEntry(t, 1, "{}"), "n", nil), nil, ErrField},
		{"n 0", with(packedEntry(t, 1, "{}"), "n", "0"), nil, ErrField},
		{"n beyond the last seq", packedEntry(t, 1<<53, "1", "2"), nil, ErrField},
		{"n above the limit", with(packedEntry(t, 1, "{}"), "n", "101"), nil, ErrTooLarge},
		{"fewer than n", with(packedEntry(t, 1, "1", "2"), "n", "3"), nil, ErrPayload},
		{"more than n", with(packedEntry(t, 1, "1", "2", "3"), "n", "2"), nil, ErrPayload},
		{"not zstd", with(packedEntry(t, 1, "{}"), "data", "{}"), nil, ErrPayload},
		{"cut", with(packedEntry(t, 1, "{}"), "data", pack(t, "{}")[:8]), nil, ErrPayload},
		{"json larger than allowed", jsonEntry(1, strings.Repeat("x", 1<<20+1)), nil, ErrTooLarge},
		{"foreign larger than allowed", map[string]any{"data": strings.Repeat("x", 1<<20+1)}, nil, ErrTooLarge},
		{"bomb", with(packedEntry(t, 1, "{}"), "data", bomb), nil, ErrTooLarge},
		{"bomb of many frames", with(packedEntry(t, 1, "{}"), "data", strings.Repeat(pack(t, strings.Repeat("x", 1<<19)), 8)), nil, ErrTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := d.Decode(stream, redis.XMessage{ID: "5-0", Values: tt.values}, nil)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			var e *EntryError
			if err != nil && (!errors.As(err, &e) || e.Entry != "5-0" || e.Stream != stream || len(err.Error()) > 300) {
				t.Errorf("error %v", err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("records (-want +got):\n%s", d)
			}
		})
	}
	if cap(d.plain) > 2<<20 {
		t.Errorf("the decoder keeps %d bytes", cap(d.plain))
	}
	if _, err := NewDecoder(Limits{Bytes: -1}); err == nil {
		t.Error("negative limit accepted")
	}
}

// FuzzDecode: whatever is in an entry, decoding neither panics nor exceeds its
// limits, and what it accepts has the seqs that the entry says.
func FuzzDecode(f *testing.F) {
	f.Add("a", epoch1, "7", "3", "z", []byte(pack(f, "1\n2\n3")))
	f.Add("a", epoch1, "7", "", "", []byte("{}"))
	f.Add("", "", "", "", "", []byte("of another"))
	f.Add("a", epoch1, "9007199254740992", "2", "z", []byte{0x28, 0xb5, 0x2f, 0xfd})
	f.Add("a", epoch1, "1", "1", "z", []byte(pack(f, strings.Repeat("x", 1<<17))))
	limits := Limits{Bytes: 1 << 16, Records: 1000}
	d := decoder(f, limits)
	f.Fuzz(func(t *testing.T, agent, epoch, seq, n, codec string, data []byte) {
		v := map[string]any{"data": string(data)}
		for key, value := range map[string]string{"agent": agent, "epoch": epoch, "seq": seq, "n": n, "codec": codec} {
			if value != "" {
				v[key] = value
			}
		}
		recs, err := d.Decode("s", redis.XMessage{ID: "1-1", Values: v}, nil)
		if err != nil {
			var e *EntryError
			if recs != nil || !errors.As(err, &e) || len(err.Error()) > 300 {
				t.Errorf("%d records and %v", len(recs), err)
			}
			return
		}
		size := 0
		for i := range recs {
			size += len(recs[i].Data)
			if recs[i].Foreign() {
				continue
			}
			if recs[i].Seq != recs[0].Seq+uint64(i) || recs[i].Seq > maxSeq || recs[i].Seq == 0 || !isEpoch(recs[i].Epoch) {
				t.Errorf("record %d: %+v", i, recs[i])
			}
		}
		if size > limits.Bytes || len(recs) == 0 || len(recs) > limits.Records || (codec == "" && !bytes.Equal(recs[0].Data, data)) {
			t.Errorf("%d records of %d bytes", len(recs), size)
		}
	})
}

func TestPositions(t *testing.T) {
	p := NewPositions(100)
	at := func(s, agent, epoch string, seq uint64) *Record {
		return &Record{Stream: s, Agent: agent, Epoch: epoch, Seq: seq}
	}
	for i, tt := range []struct {
		r    *Record
		want bool
	}{
		{at("s", "a", epoch1, 5), true},
		{at("s", "a", epoch1, 5), false},
		{at("s", "a", epoch1, 4), false},
		{at("s", "a", epoch1, 7), true}, // a gap is not the rule's affair
		{at("t", "a", epoch1, 6), true}, // streams are each in order
		{at("s", "b", epoch1, 1), true},
		{at("s", "a", epoch2, 1), true}, // a newer epoch begins anew
		{at("s", "a", epoch1, 8), false},
		{&Record{Stream: "s", Data: []byte("foreign")}, true},
		{&Record{Stream: "s", Data: []byte("foreign")}, true},
	} {
		if got := p.Fresh(tt.r); got != tt.want {
			t.Errorf("record %d: %v", i, got)
		}
	}
	// What was seen lately is remembered, and memory stays bounded.
	for i := range 10_000 {
		p.Fresh(at("s", fmt.Sprint(i), epoch1, 1))
		p.Fresh(at("s", "busy", epoch1, uint64(i+1)))
	}
	if p.Fresh(at("s", "busy", epoch1, 10_000)) || p.Fresh(at("s", "9990", epoch1, 1)) {
		t.Error("forgot what was seen lately")
	}
	if n := len(p.cur) + len(p.prev); n > 101 {
		t.Errorf("%d positions kept", n)
	}
}

func TestParsePosition(t *testing.T) {
	for s, want := range map[string]bool{epoch1 + ":5": true, epoch1 + ":05": false, epoch1: false, ":5": false, "x:5": false, epoch1 + ":5:6": false, "": false} {
		p, err := ParsePosition(s)
		if (err == nil) != want || (want && p.String() != s) {
			t.Errorf("%q: %v, %v", s, p, err)
		}
	}
}
