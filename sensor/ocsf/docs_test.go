// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const docsFile = "../../docs/events.md"

// fields collects, by object, the paths that events carry.
type fields map[string]map[string]bool

// objects are documented once, wherever they stand. The value is the section.
func objects() map[string]string {
	return map[string]string{
		"metadata": "metadata", "device": "device", "user": "user", "container": "container", "file": "file", "file_result": "file",
		"process": "process", "parent_process": "process", "ancestry": "process", "closed_by": "process",
		"src_endpoint": "endpoint", "dst_endpoint": "endpoint",
	}
}

// walk adds the fields of v, which stands at path in object.
func (f fields) walk(object, path string, v any) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			if _, scalar := e.(string); !scalar {
				f.walk(object, path, e)
			}
		}
	case map[string]any:
		for key, value := range v {
			at := strings.TrimPrefix(path+"."+key, ".")
			switch {
			case strings.HasSuffix(path, "by_type"):
				at = path + ".*"
			case path == "unmapped.sensor" && key != "before" && key != "after":
				f.add(object, path+".*")
				continue
			}
			f.add(object, at)
			if section, ok := objects()[key]; ok {
				f.walk(section, "", value)
			} else {
				f.walk(object, at, value)
			}
		}
	}
}

func (f fields) add(object, path string) {
	if f[object] == nil {
		f[object] = map[string]bool{}
	}
	f[object][path] = true
}

// members are the names that stand directly in the object at path.
func members(doc any, path string) []string {
	for key := range strings.SplitSeq(path, ".") {
		m, _ := doc.(map[string]any)
		doc = m[key]
		if list, ok := doc.([]any); ok && len(list) > 0 {
			doc = list[0]
		}
	}
	m, _ := doc.(map[string]any)
	return slices.Collect(maps.Keys(m))
}

// TestDocs compares docs/events.md with what the golden files say, and fails
// when a field has no meaning, or a meaning has no field.
func TestDocs(t *testing.T) {
	all := fields{}
	byCode := map[string]fields{}
	docs := map[string][]any{}
	examples := map[string]string{}
	e := newTestEncoder()
	for _, g := range goldens() {
		text := pretty(t, e, &g)
		var doc map[string]any
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		code, variant, _ := strings.Cut(g.name, "-")
		if variant == "" {
			examples[code] = shorten(string(text))
		}
		if byCode[code] == nil {
			byCode[code] = fields{}
		}
		all.walk("event", "", doc)
		byCode[code].walk("event", "", doc)
		docs[code] = append(docs[code], doc)
	}
	meaning := meanings()
	for object, paths := range all {
		for path := range paths {
			if meaning[object][path] == "" {
				t.Errorf("%s: %s has no meaning in fields_test.go", object, path)
			}
		}
	}
	for object, paths := range meaning {
		for path := range paths {
			if !all[object][path] {
				t.Errorf("%s: %s is in no golden file", object, path)
			}
		}
	}
	if t.Failed() {
		return
	}

	intro, err := os.ReadFile("testdata/events-intro.md")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	b.Write(intro)
	codes := sections()
	for code := range byCode {
		if !slices.ContainsFunc(codes, func(s section) bool { return s.code == code }) {
			t.Errorf("%s has no section in fields_test.go", code)
		}
	}
	fmt.Fprint(&b, "\n## Events\n\n| event_code | class / activity | type_uid | stream |\n|---|---|---|---|\n")
	for _, s := range codes {
		for i, id := range types(docs[s.code]) {
			code := ""
			if i == 0 {
				code = fmt.Sprintf("[`%s`](#%s)", s.code, strings.NewReplacer(".", "", " ", "-").Replace(s.code))
			}
			fmt.Fprintf(&b, "| %s | %s |\n", code, id)
		}
	}
	for _, s := range codes {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\nSeen by: %s.\n\n", s.code, s.text, s.hook)
		fmt.Fprint(&b, "| field | meaning |\n|---|---|\n")
		for _, path := range slices.Sorted(maps.Keys(byCode[s.code]["event"])) {
			if meaning["event"][path] == "-" {
				continue
			}
			text := meaning["event"][path]
			if last := path[strings.LastIndexByte(path, '.')+1:]; objects()[last] != "" {
				names := map[string]bool{}
				for _, doc := range docs[s.code] {
					for _, name := range members(doc, path) {
						names[name] = true
					}
				}
				text += ": `" + strings.Join(slices.Sorted(maps.Keys(names)), "`, `") + "` (see [" + objects()[last] + "](#" + objects()[last] + "))"
			}
			fmt.Fprintf(&b, "| `%s` | %s |\n", path, text)
		}
		fmt.Fprintf(&b, "\n<details><summary>Example, shortened</summary>\n\n```jsonc\n%s```\n\n</details>\n", examples[s.code])
	}
	fmt.Fprint(&b, "\n## Objects\n\nThe same wherever they stand. An event has the members that its table names.\n")
	for _, o := range []string{"metadata", "device", "process", "file", "user", "container", "endpoint"} {
		fmt.Fprintf(&b, "\n### %s\n\n| field | meaning |\n|---|---|\n", o)
		for _, path := range slices.Sorted(maps.Keys(all[o])) {
			if meaning[o][path] != "-" {
				fmt.Fprintf(&b, "| `%s` | %s |\n", path, meaning[o][path])
			}
		}
	}

	compare(t, docsFile, b.Bytes())
}

// types are the table cells of the types that the documents have.
func types(docs []any) []string {
	set := map[string]bool{}
	for _, d := range docs {
		doc, _ := d.(map[string]any)
		metadata, _ := doc["metadata"].(map[string]any)
		set[fmt.Sprintf("%v %v / %v %v | %v | %v", doc["class_uid"], doc["class_name"], doc["activity_id"], doc["activity_name"],
			int64(doc["type_uid"].(float64)), metadata["log_name"])] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// shorten leaves out of a golden file what is the same in all.
func shorten(pretty string) string {
	start := regexp.MustCompile(`^( *)("(?:device|product|profiles|ns|ancestry|parent_process)": )([{[])$`)
	long := regexp.MustCompile(`"[^"]{100,}"`)
	var b strings.Builder
	skip := "" // the line that ends what is left out
	for line := range strings.Lines(pretty) {
		line = strings.TrimSuffix(line, "\n")
		if skip != "" {
			if rest, ok := strings.CutPrefix(line, skip); ok && (rest == "" || rest == ",") {
				b.WriteString(rest + "\n")
				skip = ""
			}
			continue
		}
		if m := start.FindStringSubmatch(line); m != nil {
			end := map[string]string{"{": "}", "[": "]"}[m[3]]
			b.WriteString(m[1] + m[2] + m[3] + "…" + end)
			skip = m[1] + end
			continue
		}
		b.WriteString(long.ReplaceAllStringFunc(line, func(s string) string { return s[:60] + `…"` }) + "\n")
	}
	return b.String()
}

// TestSigmaPipeline fails when docs/sigma maps a rule's field to one that the
// event does not carry.
func TestSigmaPipeline(t *testing.T) {
	file, err := os.ReadFile("../../docs/sigma/ocsf-linux.yml")
	if err != nil {
		t.Fatal(err)
	}
	exec := execEvent()
	exec.Subject = login() // in a session
	rename := fileEvent(event.FileRename, "/tmp/x")
	rename.File.Path2 = []byte("/etc/x")
	events := map[string]golden{
		"process_creation": {ev: exec}, "network_connection": {ev: tcpEvent(event.TCPConnect)}, "file_event": {ev: rename},
	}
	mapped := regexp.MustCompile(`(?m)^      \w+: \[?([a-z_., ]+)\]?$`)
	n := 0
	for _, part := range strings.Split(string(file), "  - id: ")[1:] {
		category, _, ok := strings.Cut(part, "_fields\n")
		if !ok {
			continue
		}
		g, ok := events[category]
		if !ok {
			t.Fatalf("%s: no such event", category)
		}
		var doc map[string]any
		if err := json.Unmarshal(pretty(t, newTestEncoder(), &g), &doc); err != nil {
			t.Fatal(err)
		}
		for _, m := range mapped.FindAllStringSubmatch(part, -1) {
			for field := range strings.SplitSeq(m[1], ", ") {
				n++
				var at any = doc
				for key := range strings.SplitSeq(field, ".") {
					object, _ := at.(map[string]any)
					at = object[key]
				}
				if at == nil {
					t.Errorf("%s: %s is not in the event", category, field)
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("found %d mapped fields, the file has more", n)
	}
}
