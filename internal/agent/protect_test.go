// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const hardenEnv = "EDR_TEST_HARDEN"

func TestMain(m *testing.M) {
	if os.Getenv(hardenEnv) != "" {
		hardened()
		return
	}
	if what := os.Getenv(gaugeEnv); what != "" {
		useMuch(what)
		return
	}
	os.Exit(m.Run())
}

// hardened is a process that has hardened itself, and says what it can still do.
func hardened() {
	Harden(context.Background())
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Println("dumpable", dumpable, err)
	privileges, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	fmt.Println("no new privileges", privileges, err)
	var core unix.Rlimit
	err = unix.Getrlimit(unix.RLIMIT_CORE, &core)
	fmt.Println("core", core.Cur, core.Max, err)
	fmt.Printf("environment %q %q\n", os.Getenv("MY_PASSWORD"), os.Getenv("OTHER"))
	// All that the sensor reads of itself.
	_, err = binarySum()
	fmt.Println("exe", err)
	for _, name := range []string{"stat", "status", "limits", "cgroup", "mountinfo", "uid_map", "io"} {
		_, err := os.ReadFile("/proc/self/" + name)
		fmt.Println(name, err)
	}
	_, err = os.Readlink("/proc/self/ns/pid")
	_, errStat := os.Stat("/proc/self/ns/pid")
	fmt.Println("ns", errors.Join(err, errStat))
	fds, err := os.ReadDir("/proc/self/fd")
	fmt.Println("fd", len(fds) > 2, err)
}

// TestHarden hardens a process of an ordinary user without capabilities: it loses nothing
// that the sensor needs.
func TestHarden(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{hardenEnv + "=1", "MY_PASSWORD=hunter2", "OTHER=value"}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	said := strings.Split(strings.TrimSpace(string(out)), "\n")
	want := []string{
		"dumpable 0 <nil>", "no new privileges 1 <nil>", "core 0 0 <nil>", `environment "" "value"`, "exe <nil>", "stat <nil>", "status <nil>", "limits <nil>",
		"cgroup <nil>", "mountinfo <nil>", "uid_map <nil>", "io open /proc/self/io: permission denied", "ns <nil>", "fd true <nil>",
	}
	if os.Getenv("CGO_ENABLED") != "0" && slices.Contains(said, "no new privileges 0 <nil>") {
		want[1] = "no new privileges 0 <nil>" // with cgo the runtime does not do it for all threads
	}
	if !slices.Equal(said, want) {
		t.Errorf("a hardened process says\n%s\nwant\n%s", strings.Join(said, "\n"), strings.Join(want, "\n"))
	}
}

func TestSecret(t *testing.T) {
	for name, want := range map[string]bool{
		"REDIS_PASSWORD": true, "aws_secret_access_key": true, "GITHUB_TOKEN": true, "REDISCLI_AUTH": true,
		"PATH": false, "NOTIFY_SOCKET": false, "CREDENTIALS_DIRECTORY": false, "EDR_SENSOR_TRANSPORT__PASSWORD_FILE": false, "GOMEMLIMIT": false,
	} {
		if got := secret(name); got != want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

func TestProtected(t *testing.T) {
	a := &Agent{cfg: config.Default(), file: "/etc/x/sensor.yaml"}
	a.cfg.Transport.PasswordFile = "/etc/x/password"
	have := map[string]string{}
	for _, p := range a.protected() {
		have[p.Path] = p.Part.Part()
		if p.All {
			have[p.Path] += " and below"
		}
	}
	for path, want := range map[string]string{
		"/etc/x/sensor.yaml": "configuration", "/etc/x/conf.d": "configuration and below", "/etc/x/password": "configuration",
		"/var/lib/edr-sensor": "state and below", "/var/lib/edr-sensor/buffer": "state and below",
		"/etc/systemd/system/edr-sensor.service": "unit", "/etc/systemd/system/edr-sensor.service.d": "unit and below",
	} {
		if have[path] != want && !strings.HasPrefix(path, "/etc/systemd/") {
			t.Errorf("%s: %q, want %q", path, have[path], want)
		}
	}
	if !slices.Contains(slices.Collect(maps.Values(have)), event.FileOfBinary.Part()) {
		t.Errorf("the binary is not among %v", have)
	}
}

// The binary on disk is compared with what runs: replaced, put back, removed. One that is the
// same says nothing.
func TestInstalled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sensor")
	write := func(text string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path+"~", []byte(text), 0o755), os.Rename(path+"~", path)); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	w := &installed{path: path}
	var err error
	if w.last, err = os.Stat(path); err != nil {
		t.Fatal(err)
	}
	running, err := binarySum()
	if err != nil {
		t.Fatal(err)
	}
	step := func(want ...string) {
		t.Helper()
		var got []string
		for _, i := range w.step() {
			if i.Before != running {
				t.Errorf("before %s", i.Before)
			}
			got = append(got, i.After[:4])
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
	step()
	write("two")
	step("3fc4") // sha256 of two
	step()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	step("none")
	step()
	write("one")
	step("7692")
}

func TestSums(t *testing.T) {
	dir := t.TempDir()
	a := &Agent{cfg: config.Default(), file: filepath.Join(dir, "sensor.yaml")}
	a.cfg.Agent.StateDir, a.cfg.Buffer.Dir = filepath.Join(dir, "state"), filepath.Join(dir, "state")
	a.cfg.Transport.PasswordFile = filepath.Join(dir, "password")
	for _, name := range []string{"sensor.yaml", "password", "conf.d/10.yaml", "state/agent_id"} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("one"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for path, sum := range a.sums() {
		if name, ok := strings.CutPrefix(path, dir+"/"); ok {
			got = append(got, name+" "+sum[:4])
		}
	}
	slices.Sort(got)
	if want := []string{"conf.d/10.yaml 7692", "sensor.yaml 7692"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
