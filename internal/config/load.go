// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// envPrefix starts every variable that overrides a key: the key's parts in upper
// case, joined by two underscores, follow it.
const envPrefix = "EDR_SENSOR_"

// loader applies one source after another to a Config and collects problems.
type loader struct {
	config      Config
	table       []setting
	index       map[string]int // key → table
	set         map[string]Position
	problems    []error
	dir         string // of the main file
	credentials string // where systemd puts them
}

// credentialsDir is where those of the service are while it runs, also for a shell, which
// has no $CREDENTIALS_DIRECTORY of it.
const credentialsDir = "/run/credentials/edr-sensor.service"

func newLoader(environ []string) *loader {
	l := &loader{config: Default(), index: map[string]int{}, set: map[string]Position{}, credentials: credentialsDir}
	l.table = table(&l.config)
	for i, s := range l.table {
		l.index[s.key] = i
	}
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, "CREDENTIALS_DIRECTORY="); ok && v != "" {
			l.credentials = v
		}
	}
	return l
}

func (l *loader) problem(p *Problem) { l.problems = append(l.problems, p) }

func (l *loader) files(path string) {
	if path == "" {
		return
	}
	l.dir = filepath.Dir(path)
	l.file(path)
	// A missing conf.d is no problem: it is optional.
	drops, err := os.ReadDir(filepath.Join(l.dir, "conf.d"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.problem(&Problem{Position: Position{Source: filepath.Join(l.dir, "conf.d")}, What: cause(err)})
	}
	for _, d := range drops { // ReadDir sorts by name
		if strings.HasSuffix(d.Name(), ".yaml") && !strings.HasPrefix(d.Name(), ".") {
			l.file(filepath.Join(l.dir, "conf.d", d.Name()))
		}
	}
}

func (l *loader) file(path string) {
	data, err := readFile(path)
	if err != nil {
		remedy := ""
		switch {
		case errors.Is(err, fs.ErrNotExist):
			remedy = "name another file with --config, or install the default one"
		case errors.Is(err, fs.ErrPermission):
			remedy = "run as root, or give this user the right to read it"
		}
		l.problem(&Problem{Position: Position{Source: path}, What: cause(err), Remedy: remedy})
		return
	}
	l.bytes(path, data)
}

// readFile reads at most one byte more than a configuration may have.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		return nil, errors.New("is a directory")
	}
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// cause is an error without the path that the position already gives.
func cause(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}

func (l *loader) bytes(name string, data []byte) {
	root, err := parseYAML(name, data)
	if err != nil {
		l.problems = append(l.problems, err)
	}
	switch root.shape {
	case shapeMap:
		l.section("", root)
	case shapeNull:
	default:
		l.problem(&Problem{Position: root.pos, What: "the file " + root.shape.String() + ", not a set of sections", Remedy: "start with a line such as sensor:"})
	}
}

// section applies the pairs of a map whose key is prefix without its last dot.
func (l *loader) section(prefix string, n node) {
	seen := map[string]Position{}
	for _, p := range n.pairs {
		key := prefix + p.key
		if p.key == "" {
			continue // parseYAML reported it
		}
		if first, dup := seen[p.key]; dup {
			l.problem(&Problem{Position: p.pos, Key: key, What: fmt.Sprintf("is set twice; the first is on line %d", first.Line), Remedy: "remove one of them"})
			continue
		}
		seen[p.key] = p.pos
		if i, ok := l.index[key]; ok {
			l.assign(l.table[i], p.val)
			continue
		}
		if l.isSection(key) {
			switch p.val.shape {
			case shapeMap:
				l.section(key+".", p.val)
			case shapeNull: // everything in it is commented out
			default:
				l.problem(&Problem{Position: p.val.pos, Key: key, What: p.val.shape.String() + ", but " + key + " is a section", Remedy: "put its keys on the following lines, indented"})
			}
			continue
		}
		l.unknown(p.pos, key, keyName)
	}
}

func (l *loader) isSection(key string) bool {
	return slices.ContainsFunc(l.table, func(s setting) bool { return strings.HasPrefix(s.key, key+".") })
}

func (l *loader) assign(s setting, n node) {
	l.set[s.key] = n.pos
	f := s.parse(n)
	if f == nil {
		return
	}
	p := &Problem{Position: n.pos, Key: s.key, Value: n.text, What: f.what, Remedy: f.remedy}
	if s.key == "transport.address" && strings.Contains(n.text, "@") {
		p.Value = "" // it may hold a password
	}
	l.problem(p)
}

// unknown reports a key that does not exist, without its value, which may be a
// secret. name says how keys are called in this source.
func (l *loader) unknown(pos Position, key string, name func(string) string) {
	p := &Problem{Position: pos, Key: key, What: "is not a known key"}
	switch leaf := key[strings.LastIndexByte(key, '.')+1:]; {
	case isSecret(leaf):
		p.What = "would put a secret into the configuration"
		p.Remedy = "write it to a file that only the sensor can read and name that file: " + name("transport.password_file")
	default:
		if near := l.suggest(key); near != "" {
			p.Remedy = "did you mean " + name(near) + "?"
		}
	}
	l.problem(p)
}

func isSecret(leaf string) bool {
	leaf = strings.ToLower(leaf)
	return leaf == "pass" || leaf == "auth" || strings.Contains(leaf, "password") || strings.Contains(leaf, "secret") || strings.Contains(leaf, "token") || strings.Contains(leaf, "passwd")
}

// suggest finds the key that was meant: the same word elsewhere, or a similar one
// in the same section.
func (l *loader) suggest(key string) string {
	dot := strings.LastIndexByte(key, '.') + 1
	section, leaf := key[:dot], key[dot:]
	var siblings, elsewhere []string
	for _, s := range l.table {
		if rest, ok := strings.CutPrefix(s.key, section); ok {
			name, _, _ := strings.Cut(rest, ".")
			if !slices.Contains(siblings, name) {
				siblings = append(siblings, name)
			}
		}
		if strings.HasSuffix(s.key, "."+leaf) {
			elsewhere = append(elsewhere, s.key)
		}
	}
	if near := nearest(leaf, siblings); near != "" {
		return section + near
	}
	if len(elsewhere) == 1 {
		return elsewhere[0]
	}
	return ""
}

func keyName(key string) string { return key }

func (l *loader) environment(environ []string) {
	environ = slices.Sorted(slices.Values(environ)) // so that problems have an order
	for _, kv := range environ {
		name, value, ok := strings.Cut(kv, "=")
		rest, ours := strings.CutPrefix(name, envPrefix)
		if !ok || !ours {
			continue
		}
		pos := Position{Source: "environment " + name}
		if !strings.Contains(rest, "__") {
			// Orchestrators set EDR_SENSOR_PORT and the like for a service of
			// this name; only a likely slip is worth a word.
			for _, s := range l.table {
				if strings.ReplaceAll(envName(s.key), "__", "_") == name {
					l.problem(&Problem{Position: pos, What: "separates section and key by one underscore", Remedy: "write " + envName(s.key)})
				}
			}
			continue
		}
		key := strings.ToLower(strings.ReplaceAll(rest, "__", "."))
		if i, known := l.index[key]; known {
			l.assign(l.table[i], node{pos: pos, shape: shapeText, text: value})
		} else {
			l.unknown(pos, key, envName)
		}
	}
}

func envName(key string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "__"))
}

// finish derives what was not said, checks values against each other and returns
// the result.
func (l *loader) finish() (Config, error) {
	c := &l.config
	if _, ok := l.set["buffer.dir"]; !ok {
		c.Buffer.Dir = bufferDir(c.Agent.StateDir)
	}
	for key, dst := range map[string]*string{"agents": &c.Transport.AgentsKey, "approvals": &c.Transport.ApprovalsKey} {
		if _, ok := l.set["transport."+key+"_key"]; !ok {
			*dst = decisionsKey(c.Transport.DecisionsKey, key)
		}
	}
	c.Transport.PasswordFile = l.secretFile(c.Transport.PasswordFile)
	c.Transport.Sentinel.PasswordFile = l.secretFile(c.Transport.Sentinel.PasswordFile)
	c.Transport.TLS.KeyFile = l.secretFile(c.Transport.TLS.KeyFile)
	if _, ok := l.set["buffer.retain_bytes"]; !ok {
		// A small cap alone must be a valid configuration.
		c.Buffer.RetainBytes = min(c.Buffer.RetainBytes, c.Buffer.Cap/4)
	}
	for _, x := range contradictions(c) {
		p := &Problem{Key: x.keys[0], What: x.what, Remedy: x.remedy}
		for _, key := range x.keys { // the default of the first may meet the value of another
			if pos, ok := l.set[key]; ok {
				p.Position = pos
				break
			}
		}
		l.problem(p)
	}
	return l.config, errors.Join(l.problems...)
}

// secretFile resolves a relative path: in the directory of the configuration file, where
// the service and a shell find the same and the sensor reads what replaces it. What is not
// there may be a credential, of which systemd makes a copy when the service starts.
func (l *loader) secretFile(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	dir, err := filepath.Abs(l.dir)
	if err != nil {
		dir = l.dir
	}
	file, credential := filepath.Join(dir, path), filepath.Join(l.credentials, path)
	if !exists(file) && exists(credential) {
		return credential
	}
	return file
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
