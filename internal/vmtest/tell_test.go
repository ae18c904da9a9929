// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// stories are outputs of the init script, and what the test of them has to say.
func stories() map[string]struct {
	out     string
	pass    bool
	says    []string
	console string
} {
	const head = "@vm kernel 6.1.0\n@vm security capability,bpf\n"
	return map[string]struct {
		out     string
		pass    bool
		says    []string
		console string
	}{
		"passed": {
			out: head + "@vm begin sensor 2.5\n\x16=== RUN   TestA\n\x16=== RUN   TestA/x/y\n    a_test.go:1: word\n" +
				"\x16--- PASS: TestA/x/y (0.25s)\n\x16=== NAME  TestA\n\x16--- PASS: TestA (1.50s)\n\x16=== NAME  \n\x16PASS\n\n" +
				"@vm end sensor 4.5 0\n@vm done\n",
			pass: true,
			says: []string{
				"--- PASS: TestTell/sensor/TestA/x/y", "a_test.go:1: word", "Linux 6.1.0 (capability,bpf): 1 passed, 0 failed, 0 skipped",
				"from 2.5s to 4.5s after the boot; the slowest: TestA 1.5s",
			},
		},
		"skipped": {
			out: head + "@vm begin sensor 2\n\x16=== RUN   TestA\n    a_test.go:1: no such hook\n\x16--- SKIP: TestA (0.00s)\n\x16PASS\n\n" +
				"@vm end sensor 3 0\n@vm done\n",
			pass: true,
			says: []string{"--- SKIP: TestTell/sensor/TestA", "a_test.go:1: no such hook", "0 passed, 0 failed, 1 skipped"},
		},
		"failed": {
			out: head + "@vm begin sensor 2\n\x16=== RUN   TestA\n\x16=== RUN   TestA/x\n    a_test.go:1: wrong\n" +
				"\x16--- FAIL: TestA/x (0.00s)\n\x16--- FAIL: TestA (0.00s)\n\x16FAIL\n\n@vm end sensor 3 1\n@vm done\n",
			says: []string{"--- FAIL: TestTell/sensor/TestA/x", "a_test.go:1: wrong", "exit code 1", "0 passed, 1 failed, 0 skipped"},
		},
		"two suites, the second fails": {
			out: head + "@vm begin sensor 2\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n\x16PASS\n\n@vm end sensor 3 0\n" +
				"@vm begin bpf 3\n\x16=== RUN   TestB\n\x16--- FAIL: TestB (0.00s)\n\x16FAIL\n\n@vm end bpf 3 1\n@vm done\n",
			says: []string{"--- PASS: TestTell/sensor/TestA", "--- FAIL: TestTell/bpf/TestB", "1 passed, 1 failed, 0 skipped"},
		},
		"panicked": {
			out: head + "@vm begin sensor 2\n\x16=== RUN   TestA\npanic: oh\n\ngoroutine 1 [running]:\n\n@vm end sensor 3 2\n@vm done\n",
			// test2json ends what a binary that failed left running.
			says: []string{"--- FAIL: TestTell/sensor/TestA", "panic: oh", "exit code 2"},
		},
		"no tests": {
			out:  head + "@vm begin sensor 2\ntesting: warning: no tests to run\n\x16PASS\n\n@vm end sensor 3 0\n@vm done\n",
			says: []string{"no tests"},
		},
		"kernel died in a test": {
			out:     head + "@vm begin sensor 2\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n\x16=== RUN   TestB\n",
			console: "first\r\nKernel panic - not syncing: Fatal exception\r\n",
			says: []string{
				"--- PASS: TestTell/sensor/TestA", "--- FAIL: TestTell/sensor/TestB", "did not end",
				"did not come to its end; its console:", "Kernel panic - not syncing: Fatal exception",
			},
		},
		"nothing":      {console: "VFS: Unable to mount root fs", says: []string{"did not come to its end", "Unable to mount root fs"}},
		"end is cut":   {out: head + "@vm begin sensor 2\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n\x16PASS\n\n@vm en", says: []string{"not understood"}},
		"out of order": {out: head + "@vm end sensor 3 0\n@vm done\n", says: []string{"not understood"}},
		"no number":    {out: head + "@vm begin sensor later\n", says: []string{"invalid duration"}},
	}
}

const storyEnv = "EDR_STORY" // name of a story to tell

// TestTell tells each story in a process of its own, for most of them fail.
func TestTell(t *testing.T) {
	if story, ok := stories()[os.Getenv(storyEnv)]; ok {
		replay(t, []byte(story.out), []byte(story.console), nil, func(*result) {})
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, story := range stories() {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestTell$", "-test.v")
			cmd.Env = append(os.Environ(), storyEnv+"="+name)
			said, err := cmd.CombinedOutput()
			if exit := (&exec.ExitError{}); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if (err == nil) != story.pass {
				t.Errorf("%v, want it to pass: %t", err, story.pass)
			}
			for _, want := range story.says {
				if !strings.Contains(string(said), want) {
					t.Errorf("%q is not said", want)
				}
			}
			if t.Failed() {
				t.Logf("%s", said)
			}
		})
	}
}

func TestAgain(t *testing.T) {
	hang := errors.New("no end")
	for _, tt := range []struct {
		name, out, console string
		err                error
		want               bool
	}{
		{"fine", "@vm begin sensor 2\n@vm done\n", "", nil, false},
		{"hung in the boot", "@vm kernel 6.1\n", "", hang, true},
		{"hung in a test", "@vm begin sensor 2\n", "", hang, false},
		{"hung in a reboot", "@vm begin sensor 2\n@vm end sensor 3 0\n", "reboot: Restarting system", hang, true},
		{"hung in the shutdown before it", "@vm begin sensor 2\n@vm end sensor 3 0\n", "", hang, false},
		{"hung at its end", "@vm begin sensor 2\n@vm end sensor 3 0\n@vm done\n", "", hang, false},
		{"hung in a test after a reboot", "@vm begin sensor 2\n@vm end sensor 3 0\n@vm begin rebooted 1\n", "reboot: Restarting system", hang, false},
		{"soft lockup in the boot", "", "watchdog: BUG: soft lockup - CPU#0", nil, true},
		{"breakpoint of the kernel's own", "@vm begin sensor 2\n", "Oops: int3: 0000 [#1] PREEMPT SMP", nil, true},
		{"soft lockup in a test", "@vm begin sensor 2\n", "watchdog: BUG: soft lockup - CPU#0", nil, false},
		{"soft lockup in a reboot", "@vm begin sensor 2\n@vm end sensor 3 0\n", "reboot: Restarting system\nwatchdog: BUG: soft lockup - CPU#0", nil, true},
		{"soft lockup in a reboot that it survived", "@vm begin sensor 2\n@vm end sensor 3 0\n@vm begin rebooted 1\n@vm end rebooted 2 0\n@vm done\n", "reboot: Restarting system\nwatchdog: BUG: soft lockup - CPU#0", nil, false},
		{"another panic in the boot", "", "Kernel panic", nil, false},
	} {
		if got := again([]byte(tt.out), []byte(tt.console), tt.err); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}

// A machine that says nothing is waited for as long as its tests may take, but in a boot or
// a reboot.
func TestWatch(t *testing.T) {
	for _, tt := range []struct {
		name string
		says []string
		hung bool
	}{
		{"boot", nil, true},
		{"kernel", []string{"@vm kernel 6.1\n"}, true},
		{"test", []string{"@vm kernel 6.1\n@vm begin sensor 2\n"}, false},
		{"test, in parts", []string{"@vm beg", "in sensor 2\n=== RUN TestA\n"}, false},
		{"reboot", []string{"@vm begin sensor 2\n", "=== RUN TestA\n", "@vm end sensor 3 0\n"}, true},
		{"test after a reboot", []string{"@vm begin sensor 2\n@vm end sensor 3 0\n@vm kernel 6.1\n", "@vm begin rebooted 1\n"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hung := false
				w := watch{idle: time.AfterFunc(idleTimeout, func() { hung = true })}
				defer w.idle.Stop()
				for _, s := range tt.says {
					<-time.After(time.Minute)
					if _, err := io.WriteString(&w, s); err != nil {
						t.Fatal(err)
					}
				}
				<-time.After(idleTimeout + time.Second)
				synctest.Wait()
				if hung != tt.hung || string(w.out) != strings.Join(tt.says, "") {
					t.Errorf("hung %t, want %t; kept %q", hung, tt.hung, w.out)
				}
			})
		})
	}
}

// The archive is read back by a cpio that is not ours.
func TestArchive(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		require(t, errors.New("no cpio (Debian package cpio)"))
	}
	dir := t.TempDir()
	write := func(name string, data string) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(data), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir, "from/a/one"), "1")
	write(filepath.Join(dir, "from/two"), "22")
	var out bytes.Buffer
	a := newArchive(&out)
	a.bytes("init", []byte("12345"), 0o755)
	a.link("bin/sh", "busybox")
	a.bytes("bin/empty", nil, 0o644)
	a.tree("tests/pkg/testdata", filepath.Join(dir, "from"))
	a.tree("tests/other/testdata", filepath.Join(dir, "missing"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "to")
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), cpio, "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = to, &out
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	got := map[string]string{}
	err = filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if d.Type() == os.ModeSymlink {
			var target string
			target, err = os.Readlink(path)
			content = []byte(target)
		}
		got[strings.TrimPrefix(path, to+"/")] = info.Mode().String() + " " + string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"init": "-rwxr-xr-x 12345", "bin/sh": "Lrwxrwxrwx busybox", "bin/empty": "-rw-r--r-- ",
		"tests/pkg/testdata/a/one": "-rw-r--r-- 1", "tests/pkg/testdata/two": "-rw-r--r-- 22",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	a = newArchive(&out)
	a.file("x", filepath.Join(dir, "missing"), 0o644)
	if err := a.close(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestNothing(t *testing.T) {
	for _, m := range machines() {
		program := nothing(m)
		f, err := elf.NewFile(bytes.NewReader(program))
		if err != nil {
			t.Fatal(err)
		}
		if f.Machine != m.elf || len(f.Progs) != 1 || f.Entry != f.Progs[0].Vaddr+64+56 {
			t.Errorf("%s: %+v", m.arch, f.FileHeader)
		}
		if m.arch != runtime.GOARCH {
			continue
		}
		path := filepath.Join(t.TempDir(), "renamed")
		if err := os.WriteFile(path, program, 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), path, "argument").CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v, said %q", err, out)
		}
	}
}
