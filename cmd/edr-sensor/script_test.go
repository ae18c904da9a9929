// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(handicapEnv); what != "" {
		if err := os.Unsetenv(handicapEnv); err == nil {
			err = handicap(what)
			fmt.Fprintln(os.Stderr, "handicap:", err)
		}
		os.Exit(1)
	}
	if where := os.Getenv(panicEnv); where != "" {
		os.Exit(crash(where))
	}
	testscript.Main(m, map[string]func(){"edr-sensor": main})
}

// TestScripts runs the binary as people do. Each script says what is typed and
// what exactly comes back.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Condition: func(cond string) (bool, error) {
			return cond == "root" && os.Geteuid() == 0, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "buffer": buffers},
	})
}

// exits runs edr-sensor and wants the exit code that comes first.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARGUMENT…]")
	}
	// A shell makes the code visible; testscript only tells success from failure.
	script := append([]string{"-c", `"$@"; code=$?; [ $code = "$0" ] || { echo "exit code $code, want $0" >&2; exit 1; }`}, args...)
	ts.Check(ts.Exec("sh", script...))
}

// buffers makes a buffer of a stopped sensor, or harms the chunk that has a seq.
func buffers(ts *testscript.TestScript, _ bool, args []string) {
	switch {
	case len(args) == 2 && args[0] == "make":
		ts.Check(makeBuffer(ts.MkAbs(args[1])))
	case len(args) == 3 && args[0] == "harm":
		seq, err := strconv.ParseUint(args[2], 10, 64)
		ts.Check(err)
		ts.Check(harmBuffer(ts.MkAbs(args[1]), seq))
	default:
		ts.Fatalf("usage: buffer make DIR, buffer harm DIR SEQ")
	}
}
