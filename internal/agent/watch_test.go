// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/transport"
)

// cutLink takes a link of this process away from the kernel, as a fault of it would: the
// descriptor goes on to be one, of something else.
func cutLink(t *testing.T) {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil || !strings.Contains(to, "bpf_link") && !strings.Contains(to, "bpf-link") {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("this process has no link")
}

// onlyThis is a configuration that watches one process and talks to nobody.
func onlyThis(t *testing.T, pid int) config.Config {
	t.Helper()
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" {
			t.Fatalf("needs root and BTF: uid %d, %v", os.Geteuid(), err)
		}
		t.Skipf("needs root and BTF: uid %d, %v", os.Geteuid(), err)
	}
	cfg := config.Default()
	cfg.Agent.StateDir = filepath.Join(t.TempDir(), "state")
	cfg.Buffer.Dir = filepath.Join(cfg.Agent.StateDir, "buffer")
	cfg.Buffer.Cap, cfg.Buffer.AllowUnsafe = 16<<20, true
	cfg.Control.Socket, cfg.HTTP.Listen, cfg.Transport.Address = "", "", ""
	cfg.Sensor.Scope = config.Scope{Kind: config.ScopeTree, PID: uint32(pid)}
	return cfg
}

// decided waits for a line of the sensor with a text in it.
func decided(t *testing.T, v *viewer, text string) string {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case line := <-v.lines:
			v.took(line)
			if strings.Contains(string(line), text) {
				return string(line)
			}
		case <-limit:
			t.Fatalf("nothing says %s", text)
		}
	}
}

// TestLostHookIsADecision runs a sensor whose link is gone: it decides so, with what it saw
// and what it did, and sees the event again.
func TestLostHookIsADecision(t *testing.T) {
	idle := exec.Command("sleep", "600")
	if err := idle.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = idle.Process.Kill(); _ = idle.Wait() })
	a, err := New(t.Context(), Options{Loaded: Loaded{Config: onlyThis(t, idle.Process.Pid)}, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	cutLink(t)
	view := a.tap.open(false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	said := decided(t, view, "HOOK_LOST")
	for _, want := range []string{"process.fork", "sched_process_fork", "no longer knows the link", "was attached anew"} {
		if !strings.Contains(said, want) {
			t.Errorf("the decision does not say %q: %s", want, said)
		}
	}
	if missing := unseen(a.sensor.Coverage()); len(missing) > 0 && strings.Contains(fmt.Sprint(missing), "process.") {
		t.Errorf("not seen: %v", missing)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestSilentSender(t *testing.T) {
	now := time.Unix(10_000, 0)
	old, recent := now.Add(-2*senderQuiet), now.Add(-senderQuiet/2)
	for _, tt := range []struct {
		name                 string
		since, reply, oldest time.Time
		silent               bool
	}{
		{"nothing moves", old, old, old, true},
		{"connected lately", recent, old, old, false},
		{"answers", old, recent, old, false},
		{"never answered yet", old, time.Time{}, old, false},
		{"idle until now", old, old, recent, false},
		{"nothing to send", old, old, time.Time{}, false},
	} {
		got := silent(now, transport.State{Since: tt.since, LastReply: tt.reply, Address: "redis:6379"}, buffer.Stats{Unsent: 5, OldestUnsent: tt.oldest})
		if (got != "") != tt.silent || tt.silent && !strings.Contains(got, "sender: 5 records wait") {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}
