// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestIdentify(t *testing.T) {
	for _, tt := range []struct{ name, data, id, stamp string }{
		{"usual", `{"time":1,"time_dt":"2026-01-02T03:04:05.6Z","metadata":{"uid":"u1"}}`, "u1", "2026-01-02T03:04:05.6Z"},
		{"nested uids", `{"actor":{"uid":"no","metadata":{"uid":"no"}},"metadata":{"product":{"uid":"no"},"uid":"u1"},"uid":"no","time_dt":"T"}`, "u1", "T"},
		{"text that looks like it", `{"cmd_line":"\"metadata\":{\"uid\":\"no\"}","metadata":{"note":"\\","uid":"u1"},"time_dt":"T"}`, "u1", "T"},
		{"white space", " {\n\t\"metadata\" : { \"uid\" : \"u1\" } ,\r\n \"time_dt\" : \"T\" }", "u1", "T"},
		{"numeric time", `{"time":1700000000123,"metadata":{"uid":"u1"}}`, "u1", "2023-11-14T22:13:20.123Z"},
		{"numeric time with space", `{"time" : 1700000000123 ,"metadata":{"uid":"u1"}}`, "u1", "2023-11-14T22:13:20.123Z"},
		{"values of all kinds", `{"a":[1,{"b":"]"}],"c":null,"d":-1.5e3,"e":true,"f":{},"g":[],"metadata":{"x":[{}],"uid":"u1"},"time_dt":"T"}`, "u1", "T"},
		{"escaped uid", `{"metadata":{"uid":"a\u0041"},"time_dt":"T"}`, "", "T"},
		{"wrong types", `{"metadata":[{"uid":"no"}],"time_dt":5,"time":"x"}`, "", ""},
		{"uid is an object", `{"metadata":{"uid":{"uid":"no"}},"time_dt":"T"}`, "", "T"},
		{"empty", ``, "", ""},
		{"not an object", `["metadata"]`, "", ""},
		{"cut", `{"metadata":{"uid":"u1"},"time_dt":"2026`, "u1", ""},
		{"cut in a string", `{"a":"\`, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, stamp, _ := identify([]byte(tt.data))
			if string(id) != tt.id || string(stamp) != tt.stamp {
				t.Errorf("got %q, %q, want %q, %q", id, stamp, tt.id, tt.stamp)
			}
		})
	}
	usual := []byte(payload(7))
	if n := testing.AllocsPerRun(100, func() { identify(usual) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestIdentifyGoldenEvents reads what the encoder really writes.
func TestIdentifyGoldenEvents(t *testing.T) {
	files, err := filepath.Glob("../sensor/ocsf/testdata/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden events: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var want struct {
			Time     int64  `json:"time"`
			TimeDT   string `json:"time_dt"`
			Metadata struct {
				UID string `json:"uid"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(data, &want); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		id, stamp, millis := identify(data)
		if millis != want.Time || millis == 0 {
			t.Errorf("%s: time %d, want %d", file, millis, want.Time)
		}
		if string(id) != want.Metadata.UID || string(stamp) != want.TimeDT || len(id) == 0 || len(stamp) == 0 {
			t.Errorf("%s: got %q, %q, want %q, %q", file, id, stamp, want.Metadata.UID, want.TimeDT)
		}
	}
}

// FuzzIdentify compares with encoding/json wherever that accepts the record and
// reads it without having to choose between members of the same name.
func FuzzIdentify(f *testing.F) {
	f.Add([]byte(payload(3)))
	f.Add([]byte(`{"metadata":{"uid":"u1"},"time":1700000000123}`))
	f.Add([]byte(`{"a":[1,{"b":"]"}],"metadata":{"x":[{}],"uid":"u\"1"},"time_dt":"T"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		id, stamp, _ := identify(data)
		var r map[string]json.RawMessage
		if json.Unmarshal(data, &r) != nil || strings.Count(string(data), "uid") > 1 ||
			strings.Count(string(data), "metadata") > 1 || strings.Count(string(data), "time_dt") > 1 || strings.Contains(string(data), `\u`) {
			return
		}
		var meta map[string]json.RawMessage
		_ = json.Unmarshal(r["metadata"], &meta)
		if want := plainString(meta["uid"]); string(id) != want {
			t.Errorf("id %q, want %q", id, want)
		}
		if want := plainString(r["time_dt"]); want != "" && string(stamp) != want {
			t.Errorf("timestamp %q, want %q", stamp, want)
		}
	})
}

// plainString is the string in raw, or nothing when it has escape sequences.
func plainString(raw json.RawMessage) string {
	s := strings.TrimSpace(string(raw))
	if len(s) < 2 || s[0] != '"' || strings.Contains(s, `\`) {
		return ""
	}
	return s[1 : len(s)-1]
}
