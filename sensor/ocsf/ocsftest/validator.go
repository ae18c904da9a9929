// SPDX-License-Identifier: Apache-2.0

// Package ocsftest checks events against the JSON Schemas of OCSF 1.8.0, and
// what those schemas leave out. It is for tests only.
package ocsftest

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

//go:embed schema/*.schema.json
var schemas embed.FS

// Validator returns a function that tells what is wrong with one event: it is
// no JSON, its class is unknown, its schema rejects it, a caption is not that of
// its id, or time_dt is not time. The function is not safe for concurrent use.
func Validator(t testing.TB) func(event []byte) error {
	t.Helper()
	classes := map[int64]*jsonschema.Schema{}
	compiler := jsonschema.NewCompiler()
	for uid, name := range map[int64]string{
		1007: "process_activity", 5015: "process_query", 4001: "network_activity", 6002: "application_lifecycle", 1001: "file_activity",
	} {
		file := "schema/" + name + ".schema.json"
		text, err := schemas.ReadFile(file)
		if err != nil {
			t.Fatalf("read schema: %v", err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatalf("parse schema %s: %v", name, err)
		}
		if err := compiler.AddResource(file, doc); err != nil {
			t.Fatalf("add schema %s: %v", name, err)
		}
		if classes[uid], err = compiler.Compile(file); err != nil {
			t.Fatalf("compile schema %s: %v", name, err)
		}
	}
	return func(event []byte) error {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(event))
		if err != nil {
			return fmt.Errorf("parse event: %w", err)
		}
		if err := unique(json.NewDecoder(bytes.NewReader(event)), ""); err != nil {
			return err
		}
		doc, ok := v.(map[string]any)
		if !ok {
			return errors.New("event is not an object")
		}
		schema := classes[integer(doc["class_uid"])]
		if schema == nil {
			return fmt.Errorf("class_uid %v has no schema here", doc["class_uid"])
		}
		if err := schema.Validate(v); err != nil {
			return err
		}
		return errors.Join(append(captions("", doc), names(doc), times(doc))...)
	}
}

// unique reads one value and fails when an object in it has a name twice, of
// which parsers keep either.
func unique(d *json.Decoder, path string) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	bracket, _ := token.(json.Delim)
	seen := map[string]bool{}
	for (bracket == '{' || bracket == '[') && d.More() {
		at := path + "[]"
		if bracket == '{' {
			if token, err = d.Token(); err != nil {
				return err
			}
			name, _ := token.(string)
			at = path + "." + name
			if seen[name] {
				return fmt.Errorf("%s occurs twice", at)
			}
			seen[name] = true
		}
		if err := unique(d, at); err != nil {
			return err
		}
	}
	if bracket != 0 {
		_, err = d.Token()
	}
	return err
}

func integer(v any) int64 {
	n, _ := v.(json.Number)
	i, _ := n.Int64()
	return i
}

// captionOf has what OCSF 1.8.0 calls the ids that the sensor emits, by the
// attribute or, where several objects use one name, by its path's end.
func captionOf(path string, id int64) (caption string, known bool) {
	fileTypes := map[int64]string{
		0: "Unknown", 1: "Regular File", 2: "Folder", 3: "Character Device", 4: "Block Device", 5: "Local Socket", 6: "Named Pipe", 7: "Symbolic Link", 8: "Executable File",
	}
	table := map[string]map[int64]string{
		"severity_id":          {0: "Unknown", 1: "Informational", 2: "Low", 3: "Medium", 4: "High", 5: "Critical", 6: "Fatal", 99: "Other"},
		"status_id":            {0: "Unknown", 1: "Success", 2: "Failure", 99: "Other"},
		"launch_type_id":       {0: "Unknown", 1: "Spawn", 2: "Fork", 3: "Exec", 99: "Other"},
		"injection_type_id":    {0: "Unknown", 1: "Remote Thread", 2: "Load Library", 99: "Other"},
		"query_result_id":      {0: "Unknown", 1: "Exists"},
		"direction_id":         {0: "Unknown", 1: "Inbound", 2: "Outbound", 3: "Lateral", 99: "Other"},
		"boundary_id":          {0: "Unknown", 1: "Localhost", 2: "Internal", 3: "External"},
		"protocol_ver_id":      {4: "Internet Protocol version 4 (IPv4)", 6: "Internet Protocol version 6 (IPv6)"},
		"observation_point_id": {0: "Unknown", 1: "Source", 2: "Destination"},
		"algorithm_id":         {3: "SHA-256"},
		"file.type_id":         fileTypes,
		"file_result.type_id":  fileTypes,
		"user.type_id":         {0: "Unknown", 1: "User", 2: "Admin", 3: "System"},
		"device.type_id":       {0: "Unknown", 1: "Server", 2: "Desktop", 3: "Laptop", 6: "Virtual"},
		"os.type_id":           {200: "Linux"},
		"agent_list.type_id":   {1: "Endpoint Detection and Response"},
	}
	for name, ids := range table {
		if path == name || strings.HasSuffix(path, "."+name) {
			caption, known = ids[id]
			return caption, known
		}
	}
	return "", false
}

// captions compares every x_id with its sibling x.
func captions(path string, v any) (errs []error) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			errs = append(errs, captions(path, e)...)
		}
	case map[string]any:
		for key, value := range v {
			at := strings.TrimPrefix(path+"."+key, ".")
			if key == "xattributes" || at == "unmapped" {
				continue
			}
			errs = append(errs, captions(at, value)...)
			name, isID := strings.CutSuffix(key, "_id")
			number, isNumber := value.(json.Number)
			if !isID || !isNumber || key == "activity_id" {
				continue
			}
			id := integer(number)
			want, known := captionOf(at, id)
			if got, _ := v[name].(string); !known || got != want && id != 99 {
				errs = append(errs, fmt.Errorf("%s %d has the caption %q, want %q", at, id, got, want))
			}
		}
	}
	return errs
}

// names checks the captions of the event's own type.
func names(doc map[string]any) error {
	class, activity := integer(doc["class_uid"]), integer(doc["activity_id"])
	wantClass := map[int64]string{1007: "Process Activity", 5015: "Process Query", 4001: "Network Activity", 6002: "Application Lifecycle", 1001: "File System Activity"}[class]
	wantCategory := map[int64]string{1: "System Activity", 4: "Network Activity", 5: "Discovery", 6: "Application Activity"}[class/1000]
	wantActivity := map[int64]string{
		100101: "Create", 100103: "Update", 100104: "Delete", 100105: "Rename", 100106: "Set Attributes", 100107: "Set Security",
		100112: "Mount", 100113: "Unmount", 100114: "Open",
		100701: "Launch", 100702: "Terminate", 100704: "Inject", 501501: "Query", 400101: "Open", 400102: "Close", 400103: "Reset",
		400104: "Fail", 400105: "Refuse", 400107: "Listen", 600203: "Start", 600204: "Stop",
	}[class*100+activity]
	wantType := wantClass + ": " + wantActivity
	if activity == 99 {
		wantActivity, _ = doc["activity_name"].(string) // ours
		wantType = wantClass + ": Other"
	}
	for key, want := range map[string]string{
		"class_name": wantClass, "category_name": wantCategory, "activity_name": wantActivity, "type_name": wantType,
	} {
		if got, _ := doc[key].(string); got != want || want == "" {
			return fmt.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	return nil
}

// times checks that time_dt says the same as time, more precisely.
func times(doc map[string]any) error {
	s, _ := doc["time_dt"].(string)
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return fmt.Errorf("time_dt: %w", err)
	}
	if ms := integer(doc["time"]); t.UnixMilli() != ms {
		return fmt.Errorf("time_dt %s is %d, but time is %d", s, t.UnixMilli(), ms)
	}
	return nil
}
