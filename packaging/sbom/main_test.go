// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLicense(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"apache":       {"   Apache License\n   Version 2.0, January 2004", "Apache-2.0"},
		"mozilla":      {"Mozilla Public License, version 2.0", "MPL-2.0"},
		"mit":          {"Permission is hereby granted,\nfree of charge, to any person", "MIT"},
		"three clause": {"Redistribution and use in source\nand binary forms … Neither the name of", "BSD-3-Clause"},
		"two clause":   {"Redistribution and use in source and binary forms", "BSD-2-Clause"},
		"unknown":      {"GNU AFFERO GENERAL PUBLIC LICENSE", ""},
		"empty":        {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := license(test.text)
			if got != test.want || (err != nil) != (test.want == "") {
				t.Errorf("%q, %v; want %q", got, err, test.want)
			}
		})
	}
}

// TestReadRefuses: a module whose licence nobody knows is not shipped silently.
func TestReadRefuses(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"none":    {"README.md": "MIT"},
		"notice":  {"NOTICE": "made by somebody"},
		"unknown": {"LICENSE": "ask me"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range files {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			m := module{path: "example.com/m"}
			if err := m.read(dir); err == nil || !strings.HasPrefix(err.Error(), "example.com/m: ") {
				t.Errorf("%v, want an error that names the module", err)
			}
		})
	}
}

func TestNoticesOnce(t *testing.T) {
	got := string(notices([]module{
		{path: "a", version: "v1", texts: []string{"the licence", "notice of a"}},
		{path: "b", version: "v2", texts: []string{"the licence"}},
	}))
	if strings.Count(got, "the licence\n") != 1 || !strings.Contains(got, "a v1\nb v2\n") || !strings.Contains(got, "notice of a") {
		t.Errorf("got:\n%s", got)
	}
}
