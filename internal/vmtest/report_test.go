// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// report is what came out of a virtual machine.
type report struct {
	kernel   string // uname -r
	security string // active security modules
	runs     []suiteRun
	done     bool // the machine came to the end of its plan
}

// suiteRun is the output of one test binary.
type suiteRun struct {
	dir        string
	start, end time.Duration // since boot, by the machine's clock
	output     []byte
	ended      bool
	code       int
}

// parse reads what the init script wrote, up to wherever it ends.
func parse(out []byte) (report, error) {
	var r report
	for line := range bytes.Lines(out) {
		word, ok := strings.CutPrefix(string(line), "@vm ")
		if !ok {
			if n := len(r.runs); n > 0 && !r.runs[n-1].ended {
				r.runs[n-1].output = append(r.runs[n-1].output, line...)
			}
			continue
		}
		verb, rest, _ := strings.Cut(strings.TrimSpace(word), " ")
		f := strings.Fields(rest)
		n := len(r.runs)
		var err error
		switch {
		case verb == "kernel":
			r.kernel = rest
		case verb == "security":
			r.security = rest
		case verb == "begin" && len(f) == 2:
			run := suiteRun{dir: f[0]}
			run.start, err = time.ParseDuration(f[1] + "s")
			r.runs = append(r.runs, run)
		case verb == "end" && len(f) == 3 && n > 0 && r.runs[n-1].dir == f[0]:
			run := &r.runs[n-1]
			run.ended = true
			run.end, err = time.ParseDuration(f[1] + "s")
			code, errCode := strconv.Atoi(f[2])
			run.code, err = code, errors.Join(err, errCode)
		case verb == "done":
			r.done = true
		default:
			err = errors.New("not understood")
		}
		if err != nil {
			return r, fmt.Errorf("line %q of the init script: %w", line, err)
		}
	}
	return r, nil
}

// result is a test that ran in the virtual machine.
type result struct {
	name   string // without its parents'
	full   string
	output strings.Builder
	end    string // pass, fail or skip; empty when it did not end
	took   time.Duration
	subs   []*result
}

// results reads the output of a test binary that ran with -test.v=test2json. What
// belongs to no test is the output of the first result, whose subs are the tests.
func results(ctx context.Context, output []byte) (*result, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-t") // without times, no durations either
	cmd.Stdin = bytes.NewReader(output)
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("test2json: %w", err)
	}
	root := new(result)
	byName := map[string]*result{"": root}
	for d := json.NewDecoder(bytes.NewReader(events)); ; {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return root, nil
		} else if err != nil {
			return nil, fmt.Errorf("output of test2json: %w", err)
		}
		r := byName[e.Test]
		if r == nil {
			// The name of a test may have slashes in itself, so the parent is the longest
			// name that ran.
			parent, name := root, e.Test
			for i, c := range e.Test {
				if p := byName[e.Test[:i]]; c == '/' && p != nil {
					parent, name = p, e.Test[i+1:]
				}
			}
			r = &result{name: name, full: e.Test}
			byName[e.Test] = r
			parent.subs = append(parent.subs, r)
		}
		switch e.Action {
		case "output":
			r.output.WriteString(e.Output)
		case "pass", "fail", "skip":
			r.end, r.took = e.Action, time.Duration(e.Elapsed*float64(time.Second)).Round(time.Millisecond)
		}
	}
}

// replay has a result end in this process as it ended in the machine.
func (r *result) replay(t *testing.T) {
	for _, sub := range r.subs {
		t.Run(sub.name, sub.replay)
	}
	switch said := r.said(); r.end {
	case "pass":
		if said != "" {
			t.Log(said)
		}
	case "skip":
		t.Skip(said)
	case "fail":
		t.Error(said)
	default:
		t.Errorf("did not end\n%s", said)
	}
}

// said is the output without the lines of the testing package itself.
func (r *result) said() string {
	var b strings.Builder
	for line := range strings.Lines(r.output.String()) {
		if s := strings.TrimSpace(line); !strings.HasPrefix(s, "=== ") && !strings.HasPrefix(s, "--- ") {
			b.WriteString(line)
		}
	}
	return strings.TrimSpace(b.String())
}

// count adds up how the tests without subtests ended.
func (r *result) count(sums map[string]int) {
	if len(r.subs) == 0 {
		sums[r.end]++
	}
	for _, sub := range r.subs {
		sub.count(sums)
	}
}
