// SPDX-License-Identifier: Apache-2.0

// Command sbom says what a Go binary is made of: a bill of materials in CycloneDX
// 1.6, and the licences of the modules in it, which have to accompany the binary.
// All of it comes from the binary's own build information, so it lists what is
// linked, not what go.mod mentions. The same binary gives the same bytes.
//
//	sbom -version 1.2.3 -bom FILE -licenses FILE BINARY
package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("sbom", flag.ContinueOnError)
	version := flags.String("version", "", "version of the binary")
	bom := flags.String("bom", "", "write the bill of materials to this file")
	licenses := flags.String("licenses", "", "write the licences to this file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 || *version == "" || *bom == "" || *licenses == "" {
		return errors.New("usage: sbom -version VERSION -bom FILE -licenses FILE BINARY")
	}
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	binary, err := os.ReadFile(flags.Arg(0))
	if err != nil {
		return err
	}
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return fmt.Errorf("%s: %w", flags.Arg(0), err)
	}
	modules, err := linked(info)
	if err != nil {
		return err
	}
	if err := os.WriteFile(*licenses, notices(modules), 0o644); err != nil {
		return err
	}
	doc := materials(info, *version, sha256.Sum256(binary), time.Unix(epoch, 0).UTC(), modules)
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*bom, append(b, '\n'), 0o644)
}

// module is one that is linked, with what its authors want to be passed on.
type module struct {
	path, version, sum string
	license            string // SPDX id
	texts              []string
}

// linked returns the modules in the binary and the standard library, with their
// licences from the module cache.
func linked(info *debug.BuildInfo) ([]module, error) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env GOROOT: %w", err)
	}
	std := module{path: "stdlib", version: strings.TrimPrefix(info.GoVersion, "go")}
	if err := std.read(strings.TrimSpace(string(root))); err != nil {
		return nil, err
	}
	out := []module{std}
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		m := module{path: d.Path, version: d.Version, sum: d.Sum}
		dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", d.Path).Output()
		if err != nil {
			return nil, fmt.Errorf("%s: where it is: %w", d.Path, err)
		}
		if err := m.read(strings.TrimSpace(string(dir))); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b module) int { return strings.Compare(a.path, b.path) })
	return out, nil
}

// read takes the licence and the notice from the module's top folder.
func (m *module) read(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", m.path, err)
	}
	for _, e := range entries {
		name := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(e.Name()), ".TXT"), ".MD")
		if e.IsDir() || name != "LICENSE" && name != "LICENCE" && name != "COPYING" && name != "NOTICE" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return fmt.Errorf("%s: %w", m.path, err)
		}
		text := strings.TrimSpace(string(b))
		m.texts = append(m.texts, text)
		if name != "NOTICE" {
			if m.license, err = license(text); err != nil {
				return fmt.Errorf("%s: %s: %w", m.path, e.Name(), err)
			}
		}
	}
	if m.license == "" {
		return fmt.Errorf("%s: has no licence in %s", m.path, dir)
	}
	return nil
}

// license recognises the licences that Go modules use. One that it does not know
// stops the build: somebody has to read it first.
func license(text string) (string, error) {
	flat := strings.Join(strings.Fields(text), " ")
	has := func(s string) bool { return strings.Contains(flat, s) }
	switch {
	case has("Apache License") && has("Version 2.0"):
		return "Apache-2.0", nil
	case has("Mozilla Public License") && has("2.0"):
		return "MPL-2.0", nil
	case has("Permission is hereby granted, free of charge"):
		return "MIT", nil
	case has("Redistribution and use in source and binary forms") && has("Neither the name"):
		return "BSD-3-Clause", nil
	case has("Redistribution and use in source and binary forms"):
		return "BSD-2-Clause", nil
	}
	return "", errors.New("not a known licence: read it, and teach packaging/sbom its name")
}

// notices writes each text once, under the modules that it belongs to.
func notices(modules []module) []byte {
	var order []string
	owners := map[string][]string{}
	for _, m := range modules {
		for _, t := range m.texts {
			if owners[t] == nil {
				order = append(order, t)
			}
			owners[t] = append(owners[t], m.path+" "+m.version)
		}
	}
	var b bytes.Buffer
	b.WriteString("The edr-sensor binary contains the modules named below, under these licences.\n")
	for _, t := range order {
		fmt.Fprintf(&b, "\n%s\n%s\n%s\n\n%s\n", strings.Repeat("=", 78), strings.Join(owners[t], "\n"), strings.Repeat("-", 78), t)
	}
	return b.Bytes()
}

// The part of CycloneDX 1.6 that a binary needs.
type (
	bill struct {
		Schema       string       `json:"$schema"`
		Format       string       `json:"bomFormat"`
		Spec         string       `json:"specVersion"`
		Serial       string       `json:"serialNumber"`
		Version      int          `json:"version"`
		Metadata     metadata     `json:"metadata"`
		Components   []component  `json:"components"`
		Dependencies []dependency `json:"dependencies"`
	}
	metadata struct {
		Timestamp  string      `json:"timestamp"`
		Lifecycles []lifecycle `json:"lifecycles"`
		Component  component   `json:"component"`
	}
	lifecycle struct {
		Phase string `json:"phase"`
	}
	component struct {
		Type       string      `json:"type"`
		Ref        string      `json:"bom-ref"`
		Name       string      `json:"name"`
		Version    string      `json:"version"`
		PURL       string      `json:"purl"`
		Hashes     []hash      `json:"hashes,omitempty"`
		Licenses   []licensing `json:"licenses"`
		Properties []property  `json:"properties,omitempty"`
	}
	hash struct {
		Algorithm string `json:"alg"`
		Content   string `json:"content"`
	}
	licensing struct {
		License struct {
			ID string `json:"id"`
		} `json:"license"`
	}
	property struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	dependency struct {
		Ref       string   `json:"ref"`
		DependsOn []string `json:"dependsOn,omitempty"`
	}
)

func materials(info *debug.BuildInfo, version string, sum [32]byte, built time.Time, modules []module) bill {
	top := newComponent("application", info.Main.Path, version, "Apache-2.0")
	top.Name = filepath.Base(info.Main.Path)
	top.Hashes = []hash{{"SHA-256", hex.EncodeToString(sum[:])}}
	for _, s := range info.Settings {
		if s.Key == "GOOS" || s.Key == "GOARCH" {
			top.Properties = append(top.Properties, property{"cdx:gomod:build:env:" + s.Key, s.Value})
		}
	}
	doc := bill{
		Schema: "http://cyclonedx.org/schema/bom-1.6.schema.json", Format: "CycloneDX", Spec: "1.6", Version: 1,
		Serial:   serial(sum),
		Metadata: metadata{Timestamp: built.Format(time.RFC3339), Lifecycles: []lifecycle{{"build"}}, Component: top},
	}
	all := dependency{Ref: top.Ref}
	for _, m := range modules {
		c := newComponent("library", m.path, m.version, m.license)
		if m.sum != "" {
			c.Properties = []property{{"cdx:gomod:sum", m.sum}}
		}
		doc.Components = append(doc.Components, c)
		doc.Dependencies = append(doc.Dependencies, dependency{Ref: c.Ref})
		all.DependsOn = append(all.DependsOn, c.Ref)
	}
	doc.Dependencies = append([]dependency{all}, doc.Dependencies...)
	return doc
}

func newComponent(kind, path, version, license string) component {
	purl := "pkg:golang/" + path + "@" + strings.ReplaceAll(url.PathEscape(version), "+", "%2B")
	c := component{Type: kind, Ref: purl, Name: path, Version: version, PURL: purl, Licenses: make([]licensing, 1)}
	c.Licenses[0].License.ID = license
	return c
}

// serial is a UUID (version 8) of the binary: another binary, another document.
func serial(sum [32]byte) string {
	u := sum[:16]
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:16])
}
