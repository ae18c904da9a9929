// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const bootID = "2899dae4-4fa4-4eef-95b6-6bc95325f61a"

func start() time.Time { return time.Date(2026, 11, 23, 15, 0, 0, 0, time.UTC) }

func newCase(id string) Case {
	return Case{
		ID: id, InvestigationID: "I", UserID: "U", Scope: Scope{Kind: "subtree", Value: "7", StartTicks: 5, BootID: bootID},
		Collect: Normal, Opened: start(), Until: start().Add(time.Hour),
	}
}

func load(t *testing.T, dir, boot string, now time.Time) (*Set, []Ended) {
	t.Helper()
	s, ended, damage := Load(dir, boot, now)
	if damage != nil {
		t.Fatal(damage)
	}
	return s, ended
}

func ids(list []Case) (out []string) {
	for _, c := range list {
		out = append(out, c.ID)
	}
	return out
}

func TestSetSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	s, _ := load(t, dir, bootID, start())
	for _, id := range []string{"a", "b", "c"} {
		if err := s.Open(newCase(id)); err != nil {
			t.Fatal(err)
		}
	}
	s.Events()[2].Tagged.Store(42)
	if c, err := s.Close("b"); err != nil || c.ID != "b" {
		t.Fatal(c, err)
	}
	orphan := event.ProcessKey{PID: 12, StartTime: 34}
	for _, changed := range []bool{true, false} {
		if s.SetRoots(map[*event.Case][]event.ProcessKey{s.Events()[0]: {orphan}, {}: {orphan}}); s.Stale() != changed {
			t.Errorf("stale %t, want %t", s.Stale(), changed)
		}
		if err := s.Save(); err != nil {
			t.Fatal(err)
		}
	}
	// What a killed sensor has written is not all that it knew.
	if killed, _ := load(t, dir, bootID, start()); !killed.List()[1].AtLeast {
		t.Error("the number of tagged events is taken for exact after a kill")
	}
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
	again, ended := load(t, dir, bootID, start().Add(time.Minute))
	if len(ended) > 0 {
		t.Errorf("ended: %v", ended)
	}
	if diff := cmp.Diff(s.List(), again.List(), cmpopts.IgnoreUnexported(Case{})); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
	if killed, _ := load(t, dir, bootID, start()); !killed.List()[1].AtLeast {
		t.Error("the number is taken for exact after a run that was killed before it wrote anything")
	}
	live := again.Events()
	want := event.CaseScope{Kind: event.CaseSubtree, PID: 7, StartTicks: 5}
	if got := live[0].Roots; len(got) != 1 || got[0] != orphan {
		t.Errorf("roots: %v", got)
	}
	if len(live) != 2 || live[1].ID != "c" || live[1].Tagged.Load() != 42 || live[1].Scope != want {
		t.Errorf("for the worker: %+v", live)
	}
	// The worker's values stay the same while others come and go.
	if err := again.Open(newCase("d")); err != nil {
		t.Fatal(err)
	}
	if again.Events()[0] != live[0] {
		t.Error("an open case has another value now")
	}
}

func TestSetEndsWithAReboot(t *testing.T) {
	dir := t.TempDir()
	s, _ := load(t, dir, bootID, start())
	stays := newCase("stays")
	stays.Scope = Scope{Kind: "path", Value: "/opt"}
	for _, c := range []Case{newCase("tree"), stays} {
		if err := s.Open(c); err != nil {
			t.Fatal(err)
		}
	}
	again, ended := load(t, dir, "another boot", start().Add(time.Minute))
	if diff := cmp.Diff([]string{"stays"}, ids(again.List())); diff != "" {
		t.Errorf("open (-want +got):\n%s", diff)
	}
	if len(ended) != 1 || ended[0].ID != "tree" || ended[0].Expired {
		t.Errorf("ended: %+v", ended)
	}
	if _, twice := load(t, dir, "another boot", start().Add(time.Minute)); len(twice) > 0 {
		t.Errorf("ended a second time: %v", twice)
	}
}

func TestSetExpires(t *testing.T) {
	dir := t.TempDir()
	s, _ := load(t, dir, bootID, start())
	for i, id := range []string{"long", "short"} {
		c := newCase(id)
		c.Until = start().Add(time.Duration(2-i) * time.Hour)
		if err := s.Open(c); err != nil {
			t.Fatal(err)
		}
	}
	if over := s.Expire(start().Add(time.Hour - 1)); len(over) > 0 || s.Stale() {
		t.Errorf("too early: %v", over)
	}
	over := s.Expire(start().Add(time.Hour))
	if diff := cmp.Diff([]string{"short"}, ids(over)); diff != "" || !s.Stale() {
		t.Errorf("stale %t (-want +got):\n%s", s.Stale(), diff)
	}
	if err := s.Save(); err != nil || s.Stale() {
		t.Errorf("%v, stale %t", err, s.Stale())
	}
	again, ended := load(t, dir, bootID, start().Add(3*time.Hour))
	if len(ended) != 1 || ended[0].ID != "long" || !ended[0].Expired || again.Len() != 0 {
		t.Errorf("while no sensor ran: %v ended, %d open", ended, again.Len())
	}
}

func TestOpenRefuses(t *testing.T) {
	s, _ := load(t, t.TempDir(), bootID, start())
	for _, tt := range []struct {
		name   string
		change func(*Case)
		want   string
	}{
		{"no id", func(c *Case) { c.ID = "" }, "case_id is missing"},
		{"an id of other characters", func(c *Case) { c.ID = "a b" }, "case_id contains ' '"},
		{"a long id", func(c *Case) { c.ID = strings.Repeat("x", 129) }, "more than 128 characters"},
		{"an investigation of other characters", func(c *Case) { c.InvestigationID = "\x1b" }, "investigation_id contains"},
		{"a user of other characters", func(c *Case) { c.UserID = "ü" }, "user_id contains"},
		{"a way to collect", func(c *Case) { c.Collect = "all" }, `collect "all": write normal or deep`},
		{"no time", func(c *Case) { c.Until = c.Opened }, "ttl 0s"},
		{"for ever", func(c *Case) { c.Until = c.Opened.Add(MaxTTL + 1) }, "ttl 720h"},
		{"no kind", func(c *Case) { c.Scope.Kind = "" }, "write one of pid, subtree"},
		{"no process", func(c *Case) { c.Scope.Value = "0" }, "the id of a process"},
		{"a process below zero", func(c *Case) { c.Scope.Value = "-1" }, "the id of a process"},
		{"a user", func(c *Case) { c.Scope = Scope{Kind: "uid", Value: "4294967295"} }, "number of a user"},
		{"a relative path", func(c *Case) { c.Scope = Scope{Kind: "path", Value: "opt"} }, "absolute path"},
		{"an unclean path", func(c *Case) { c.Scope = Scope{Kind: "path", Value: "/opt/../etc"} }, "absolute path"},
		{"a long path", func(c *Case) { c.Scope = Scope{Kind: "path", Value: "/" + strings.Repeat("x", maxValue)} }, "more than 4096 bytes"},
		{"a container", func(c *Case) { c.Scope = Scope{Kind: "container", Value: "a b"} }, "a container's id"},
	} {
		c := newCase("c")
		tt.change(&c)
		if err := s.Open(c); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	for i := range event.MaxCases {
		if err := s.Open(newCase(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Open(newCase("3")); !errors.Is(err, ErrOpen) {
		t.Errorf("the same id: %v", err)
	}
	if err := s.Open(newCase("more")); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := s.Close("more"); !errors.Is(err, ErrNotOpen) {
		t.Errorf("close of an unknown one: %v", err)
	}
}

// TestOpenNeedsTheFile: what would be gone after a restart is not opened.
func TestOpenNeedsTheFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, _ := load(t, dir, bootID, start())
	if err := s.Open(newCase("a")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Open(newCase("b")); !errors.Is(err, ErrFile) || s.Len() != 1 {
		t.Errorf("open: %v, %d open", err, s.Len())
	}
	if c, err := s.Close("a"); !errors.Is(err, ErrFile) || c.ID != "a" || s.Len() != 0 {
		t.Errorf("close: %v, %v, %d open", c, err, s.Len())
	}
}

// TestLoadOnAFullDisk: a file that is good and cannot be written is not damaged. Its cases
// are open, its numbers are not taken for exact, and it is written once there is room.
func TestLoadOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("edr-test", dir, "tmpfs", 0, "size=64k"); errors.Is(err, syscall.EPERM) {
		t.Skip("mount:", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s, _ := load(t, dir, bootID, start())
	for _, id := range []string{"short", "long"} {
		c := newCase(id)
		if id == "long" {
			c.Until = start().Add(3 * time.Hour)
		}
		if err := s.Open(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal("not full:", err)
	}
	later := start().Add(2 * time.Hour)
	for _, atLeast := range []bool{false, true} { // the second time after a run that was killed
		s, ended := load(t, dir, bootID, later)
		if len(ended) != 1 || ended[0].ID != "short" || ended[0].AtLeast != atLeast {
			t.Errorf("ended: %+v", ended)
		}
		if list := s.List(); len(list) != 1 || list[0].AtLeast != atLeast || !s.Stale() {
			t.Errorf("open: %+v, stale %t", list, s.Stale())
		}
	}
	s, _ = load(t, dir, bootID, later)
	if err := errors.Join(os.Remove(ballast), s.Save()); err != nil {
		t.Fatal(err)
	}
	if again, ended := load(t, dir, bootID, later); again.Len() != 1 || len(ended) > 0 || again.Stale() {
		t.Errorf("with room: %d open, %v ended", again.Len(), ended)
	}
}

func TestDamagedFileIsSetAside(t *testing.T) {
	good := `{"case_id":"a","scope":{"kind":"path","value":"/x"},"collect":"normal","opened":"2026-11-23T15:00:00Z","until":"2026-11-23T16:00:00Z","tagged":0}`
	for _, tt := range []struct{ name, content, want string }{
		{"empty", "", "unexpected end"},
		{"cut", `{"version":1,"cases":[` + good, "unexpected end"},
		{"of another version", `{"version":2,"cases":[]}`, "version 2, only 1 is known"},
		{"unknown field", `{"version":1,"cases":[],"more":1}`, "unknown field"},
		{"wrong case", `{"version":1,"cases":[` + strings.Replace(good, "/x", "x", 1) + `]}`, "case 1: scope path"},
		{"twice", `{"version":1,"cases":[` + good + "," + good + `]}`, "case a is there twice"},
		{"many", `{"version":1,"cases":[` + strings.Repeat(good+",", 16) + good + `]}`, "17 cases"},
		{"with too many roots", `{"version":1,"cases":[` + strings.Replace(good, `"tagged":0`, `"roots":[`+strings.Repeat(`{"pid":1,"start_time":1},`, maxRoots)+`{"pid":1,"start_time":1}]`, 1) + `]}`, "1025 roots"},
		{"huge", strings.Repeat(" ", fileMax+1), "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			s, ended, damage := Load(dir, bootID, start())
			if damage == nil || !strings.Contains(damage.Error(), tt.want) || !strings.Contains(damage.Error(), path+".damaged") || len(ended) > 0 {
				t.Errorf("damage %v, %v ended, want %q", damage, ended, tt.want)
			}
			if b, err := os.ReadFile(path + ".damaged"); err != nil || string(b) != tt.content {
				t.Errorf("set aside: %v", err)
			}
			if err := s.Open(newCase("next")); err != nil {
				t.Error(err)
			}
			if again, _ := load(t, dir, bootID, start()); again.Len() != 1 {
				t.Errorf("%d open after all", again.Len())
			}
		})
	}
}

func TestResolve(t *testing.T) {
	proc, cgroup := t.TempDir(), t.TempDir()
	r := Resolver{Proc: proc, Cgroup: cgroup, BootID: bootID}
	stat := "7 (a) b (c) S 1" + strings.Repeat(" 0", 17) + " 4242 0 0"
	group := filepath.Join(cgroup, "system.slice", "ssh.service")
	for _, err := range []error{
		os.Mkdir(filepath.Join(proc, "7"), 0o700), os.WriteFile(filepath.Join(proc, "7", "stat"), []byte(stat), 0o600),
		os.Mkdir(filepath.Join(proc, "8"), 0o700), os.WriteFile(filepath.Join(proc, "8", "stat"), []byte("8 (x) S"), 0o600),
		os.Mkdir(filepath.Join(proc, "9"), 0o700), os.WriteFile(filepath.Join(proc, "9", "stat"), []byte(stat), 0o600),
		os.WriteFile(filepath.Join(proc, "9", "status"), []byte("Name:\tx\nTgid:\t7\nPid:\t9\n"), 0o600),
		os.WriteFile(filepath.Join(proc, "7", "status"), []byte("Name:\tx\nTgid:\t7\nPid:\t7\n"), 0o600),
		os.MkdirAll(group, 0o700), os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	fi, err := os.Stat(group)
	if err != nil {
		t.Fatal(err)
	}
	id := strconv.FormatUint(fi.Sys().(*syscall.Stat_t).Ino, 10)
	for _, tt := range []struct {
		kind, value string
		want        Scope
		err         string
	}{
		{"pid", "7", Scope{Kind: "pid", Value: "7", StartTicks: 4242, BootID: bootID}, ""},
		{"subtree", "7", Scope{Kind: "subtree", Value: "7", StartTicks: 4242, BootID: bootID}, ""},
		{"subtree", "8", Scope{}, "cannot be understood"},
		{"subtree", "9", Scope{}, "a thread of process 7"},
		{"subtree", "10", Scope{}, "no such process"},
		{"pid", "../7", Scope{}, "the id of a process"},
		{"uid", "root", Scope{Kind: "uid", Value: "0"}, ""},
		{"uid", "1234567", Scope{Kind: "uid", Value: "1234567"}, ""},
		{"uid", "no such user", Scope{}, "name or the number of a user"},
		{"cgroup", "/system.slice/ssh.service", Scope{Kind: "cgroup", Value: "/system.slice/ssh.service"}, ""},
		{"cgroup", "system.slice/ssh.service/", Scope{Kind: "cgroup", Value: "/system.slice/ssh.service"}, ""},
		{"cgroup", group, Scope{Kind: "cgroup", Value: "/system.slice/ssh.service"}, ""},
		{"cgroup", id, Scope{Kind: "cgroup", Value: "/system.slice/ssh.service"}, ""},
		{"cgroup", cgroup, Scope{Kind: "cgroup", Value: "/"}, ""},
		{"cgroup", "/../etc", Scope{}, "no such control group"},
		{"cgroup", "/cgroup.procs", Scope{}, "is no directory"},
		{"cgroup", "1", Scope{}, "no such control group"},
		{"path", "/opt//app/", Scope{Kind: "path", Value: "/opt/app"}, ""},
		{"path", "app", Scope{}, "absolute path"},
		{"container", "4bf5122f3445", Scope{Kind: "container", Value: "4bf5122f3445"}, ""},
		{"planet", "earth", Scope{}, "write one of"},
	} {
		got, err := r.Resolve(tt.kind, tt.value)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s %s: %v, want %q", tt.kind, tt.value, err, tt.err)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("%s %s: %+v, %v, want %+v", tt.kind, tt.value, got, err, tt.want)
		}
	}
}

// FuzzFile has a file of cases be anything: what is read can be opened and kept.
func FuzzFile(f *testing.F) {
	f.Add([]byte(`{"version":1,"cases":[{"case_id":"a","scope":{"kind":"subtree","value":"7","start_ticks":1,"boot_id":"x"},"collect":"deep","opened":"2026-11-23T15:00:00Z","until":"2026-11-23T16:00:00Z","tagged":1}]}`))
	f.Add([]byte(`{"version":1,"cases":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		kept, err := parse(b)
		if err != nil {
			return
		}
		s := &Set{path: filepath.Join(t.TempDir(), fileName)}
		for _, c := range kept.Cases {
			if err := s.Open(c); err != nil {
				t.Fatalf("%s: %v", b, err)
			}
		}
		if len(s.Events()) != len(kept.Cases) {
			t.Fatalf("%d of %d", len(s.Events()), len(kept.Cases))
		}
	})
}
