// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const twoCases = `{"cases":[
 {"case_id":"C-17","investigation_id":"I-4","user_id":"mara","scope":{"kind":"subtree","value":"4711"},"collect":"deep","opened":"2026-11-23T15:00:00Z","until":"2026-11-23T19:00:00Z","tagged":12345},
 {"case_id":"C-18","scope":{"kind":"path","value":"/opt/\u001b[2Japp"},"collect":"normal","opened":"2026-11-23T15:00:00Z","until":"2026-11-23T15:00:01Z","tagged":0}]}`

func TestCaseTable(t *testing.T) {
	now := time.Date(2026, 11, 23, 15, 10, 0, 0, time.UTC)
	var answer struct {
		Cases []sensorCase `json:"cases"`
	}
	if err := json.Unmarshal([]byte(twoCases), &answer); err != nil {
		t.Fatal(err)
	}
	const want = `CASE  INVESTIGATION  USER  SCOPE                 COLLECT  LEFT          EVENTS
C-17  I-4            mara  subtree 4711          deep     3h50m         12,345
C-18  -              -     path /opt/\x1b[2Japp  normal   no more time  0
`
	if diff := cmp.Diff(want, caseTable(answer.Cases, now)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := caseTable(nil, now); got != "no case is open\n" {
		t.Errorf("%q", got)
	}
}

// TestCaseCommands talks to a socket that answers as a sensor does.
func TestCaseCommands(t *testing.T) {
	var got map[string]any
	var code int
	var reply string
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, r *http.Request) {
		got = nil
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
			t.Error(err)
		}
		w.WriteHeader(code)
		_, _ = w.Write([]byte(reply))
	}
	mux.HandleFunc("POST /cases/open", answer)
	mux.HandleFunc("POST /cases/close", answer)
	mux.HandleFunc("GET /cases", answer)
	socket, _ := fakeControl(t, mux)

	until := time.Now().Add(4 * time.Hour).UTC().Format(time.RFC3339Nano)
	open := func(covered, note string) string {
		return `{"case_id":"C","scope":{"kind":"subtree","value":"7"},"collect":"deep","until":"` + until + `","covered":` + covered + `,"note":"` + note + `"}`
	}
	for _, tt := range []struct {
		args      string
		code      int
		reply     string
		request   map[string]any
		exit      int
		out, errs string // out exactly, errs in part
	}{
		{
			"open --case-id C --investigation-id I --user-id U --subtree 7 --ttl 30m --collect deep", 200, open("3", ""),
			map[string]any{"case_id": "C", "investigation_id": "I", "user_id": "U", "scope": map[string]any{"kind": "subtree", "value": "7"}, "ttl": "30m", "collect": "deep"},
			0, "case C is open on subtree 7 for 4h0m; it covers 3 running processes now\n", "",
		},
		{
			"open --case-id C --uid alice", 200, open("0", "beware"),
			map[string]any{"case_id": "C", "investigation_id": "", "user_id": "", "scope": map[string]any{"kind": "uid", "value": "alice"}, "ttl": "4h", "collect": "normal"},
			0, "case C is open on subtree 7 for 4h0m; it covers 0 running processes now\nNothing that runs belongs to its scope. Events will carry its ids once something does.\nbeware\n", "",
		},
		{"open --case-id C --path /x", 409, "case C is open already: close it first", nil, 1, "", "edr-sensor: case C is open already: close it first"},
		{"open --case-id C --path /x", 403, "user 7 may not open and close cases", nil, 77, "", "may not"},
		{"open --case-id C --path /x", 507, "no space left", nil, 1, "", "507 Insufficient Storage: no space left"},
		{"close C", 200, `{"case_id":"C","tagged":1}`, map[string]any{"case_id": "C", "user_id": ""}, 0, "case C is closed; 1 event carries its ids\n", ""},
		{"close --case-id C --user-id u", 200, `{"case_id":"C","tagged":2,"tagged_at_least":true}`, map[string]any{"case_id": "C", "user_id": "u"}, 0, "case C is closed; at least 2 events carry its ids\n", ""},
		{"close D", 404, "case D is not open", nil, 1, "", "case D is not open"},
		{"list", 404, "404 page not found\n", nil, 1, "", "another version"},
		{"list", 200, `{"cases":[]}`, nil, 0, "no case is open\n", ""},

		{"open --pid 7", 0, "", nil, 2, "", "--case-id is missing"},
		{"open --case-id C", 0, "", nil, 2, "", "no scope: say what the case covers with one of --pid, --subtree, --container, --cgroup, --uid, --path"},
		{"open --case-id C --pid 7 --uid 0", 0, "", nil, 2, "", "--pid and --uid: a case has one scope"},
		{"open --case-id C --pid=", 0, "", nil, 2, "", "--pid is empty"},
		{"open --case-id C --pid 7 --ttl x", 0, "", nil, 2, "", "--ttl x: write a duration"},
		{"open --case-id C --pid 7 --collect all", 0, "", nil, 2, "", "--collect all: write normal or deep"},
		{"open --case-id C --pid 7 more", 0, "", nil, 2, "", "unexpected argument"},
		{"close", 0, "", nil, 2, "", "no case: say which to close"},
		{"close C D", 0, "", nil, 2, "", "unexpected argument"},
		{"close C --case-id D", 0, "", nil, 2, "", "two cases"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			got, code, reply = nil, tt.code, tt.reply
			var out, errs bytes.Buffer
			a := app{stdout: &out, stderr: &errs}
			exit := a.run(t.Context(), append([]string{"case", "--socket", socket}, strings.Fields(tt.args)...))
			if exit != tt.exit || out.String() != tt.out || !strings.Contains(errs.String(), tt.errs) {
				t.Errorf("exit code %d, want %d\n%s\n%s, want %s", exit, tt.exit, cmp.Diff(tt.out, out.String()), errs.String(), tt.errs)
			}
			if tt.request != nil {
				if diff := cmp.Diff(tt.request, got); diff != "" {
					t.Errorf("request (-want +got):\n%s", diff)
				}
			}
		})
	}

	t.Run("json", func(t *testing.T) {
		code, reply = 200, twoCases
		var out bytes.Buffer
		a := app{stdout: &out, stderr: &out}
		if exit := a.run(t.Context(), []string{"case", "list", "--json", "--socket", socket}); exit != 0 {
			t.Fatalf("exit code %d: %s", exit, &out)
		}
		var list struct {
			Cases []sensorCase `json:"cases"`
		}
		if err := json.Unmarshal(out.Bytes(), &list); err != nil || len(list.Cases) != 2 || list.Cases[0].Tagged != 12345 {
			t.Errorf("%v: %s", err, &out)
		}
	})
}
