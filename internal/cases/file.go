// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/durable"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	fileName    = "cases.json"
	fileVersion = 1
	fileMax     = 4 << 20
)

// file is the form in which the cases are kept.
type file struct {
	Version int    `json:"version"`
	Ended   bool   `json:"ended,omitempty"` // by a sensor that tagged nothing afterwards
	Cases   []Case `json:"cases"`
}

// Ended is a case that did not survive until this start, and why.
type Ended struct {
	Case
	Expired bool // else the host was rebooted, and with it ended the process of the scope
}

// Load reads the cases that were open when the sensor last ran. A file that is damaged,
// or of a version that is not known, is set aside: damage tells why and where it is
// now. The Set is always good. It is stale where the file cannot be written: the next
// run then finds the same in it again, ended cases included.
func Load(dir, bootID string, now time.Time) (s *Set, ended []Ended, damage error) {
	s = &Set{path: filepath.Join(dir, fileName), bootID: bootID}
	f, err := read(s.path)
	if err != nil {
		aside := s.path + ".damaged"
		if moved := os.Rename(s.path, aside); moved != nil {
			return s, nil, fmt.Errorf("%w; it cannot be set aside either: %w", err, moved)
		}
		return s, nil, fmt.Errorf("%w; it is %s now", err, aside)
	}
	for _, c := range f.Cases {
		switch {
		case c.over(now):
			ended = append(ended, Ended{c, true})
		case c.Scope.process() && c.Scope.BootID != bootID:
			ended = append(ended, Ended{c, false})
		default:
			s.open = append(s.open, c.start())
		}
	}
	if len(ended) > 0 || f.Ended && len(s.open) > 0 { // tagged from now on, so that what is written is not the last
		if s.Save() != nil {
			begun(s.path)
		}
	}
	return s, ended, nil
}

// begun takes back in place, for which a full disk has room, that the numbers in the file
// at path are exact. Best effort, as the file is stale anyway.
func begun(path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if i := bytes.Index(b, []byte(`"ended": true`)); err == nil && i >= 0 {
		_, _ = f.WriteAt([]byte(`"ended":false`), int64(i))
	}
}

// read returns what is in a file; nothing when it does not exist.
func read(path string) (f file, err error) {
	r, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, fileMax+1))
	if err != nil {
		return f, err
	}
	if f, err = parse(b); err != nil {
		return f, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

func parse(b []byte) (f file, err error) {
	if len(b) > fileMax {
		return f, fmt.Errorf("more than %d bytes", fileMax)
	}
	var version struct{ Version int }
	if err := json.Unmarshal(b, &version); err != nil {
		return f, err
	}
	if version.Version != fileVersion {
		return f, fmt.Errorf("version %d, only %d is known", version.Version, fileVersion)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return f, err
	}
	if len(f.Cases) > event.MaxCases {
		return f, fmt.Errorf("%d cases, at most %d can be", len(f.Cases), event.MaxCases)
	}
	seen := map[string]bool{}
	for i := range f.Cases {
		c := &f.Cases[i]
		if err := c.check(); err != nil {
			return f, fmt.Errorf("case %d: %w", i+1, err)
		}
		if seen[c.ID] {
			return f, fmt.Errorf("case %s is there twice", c.ID)
		}
		seen[c.ID] = true
		c.AtLeast = c.AtLeast || !f.Ended
	}
	return f, nil
}

// Save writes the file, with how many events were tagged so far.
func (s *Set) Save() error { return s.write(false) }

// End writes the file when nothing is tagged any more, so that the next run can rely on
// the numbers.
func (s *Set) End() error { return s.write(true) }

func (s *Set) write(ended bool) error {
	f := file{Version: fileVersion, Ended: ended, Cases: make([]Case, len(s.open))}
	for i, c := range s.open {
		f.Cases[i] = c.view()
	}
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	err = durable.WriteFile(s.path, append(b, '\n'))
	s.stale = err != nil
	if err != nil {
		return fmt.Errorf("%w: write %s: %w", ErrFile, s.path, err)
	}
	return nil
}
