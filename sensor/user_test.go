// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// The sensor need not be root, and its tests show it: with capabilitiesEnv the tests run
// as a user with these capabilities and no others. What they watch, the actors, is root's
// as ever: root stays behind to start them.

const (
	capabilitiesEnv = "EDR_CAPABILITIES"
	agencyEnv       = "EDR_AGENCY" // path of the socket on which root takes orders for actors
	hooksEnv        = "EDR_HOOKS"  // forms of hooks, one of which every event on files must have
	testUser        = 1000
)

// testAsUser runs the tests again as a user and returns their exit code.
func testAsUser(capabilities string) int {
	code, err := func() (int, error) {
		dir, err := os.MkdirTemp("", "edr-agency-")
		if err != nil {
			return 1, err
		}
		defer os.RemoveAll(dir)
		socket := filepath.Join(dir, "socket")
		listener, err := net.Listen("unix", socket)
		if err != nil {
			return 1, err
		}
		defer listener.Close()
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o777)); err != nil {
			return 1, err
		}
		go engage(listener)
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), agencyEnv+"="+socket)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testUser, Gid: testUser}}
		for name := range strings.FieldsSeq(capabilities) {
			bit, ok := map[string]uintptr{
				"CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE,
				"CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "CAP_SYS_RESOURCE": unix.CAP_SYS_RESOURCE,
			}[name]
			if !ok {
				return 1, fmt.Errorf("nothing is known of %s", name)
			}
			cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, bit)
		}
		err = cmd.Run()
		if exit := (&exec.ExitError{}); errors.As(err, &exit) {
			return exit.ExitCode(), nil
		}
		return 0, err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, capabilitiesEnv+":", err)
		return 1
	}
	return code
}

// engage starts an actor for each stage that it hears of, until the tests end. It hangs
// up when the actor has ended, and says what was wrong.
func engage(listener net.Listener) {
	unix.Umask(0) // what actors leave behind, the tests must be able to remove
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			stage, err := bufio.NewReader(conn).ReadString('\n')
			if err == nil {
				err = actorFor(strings.TrimSpace(stage)).Run()
			}
			if err != nil {
				fmt.Fprint(conn, err)
			}
		}()
	}
}

// engageAt orders an actor. What is returned waits for its end.
func engageAt(agency, stage string) (end func() error, err error) {
	conn, err := net.Dial("unix", agency)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintln(conn, stage); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return func() error {
		said, err := io.ReadAll(conn)
		if len(said) > 0 {
			err = errors.New(string(said))
		}
		return errors.Join(err, conn.Close())
	}, nil
}

// TestRootAllowedHooks attaches everything and tries the chains as they are: whatever this
// kernel refuses, no event may disappear without a word, and a program on an LSM hook may
// only count where it runs.
func TestRootAllowedHooks(t *testing.T) {
	a := startActor(t)
	k := watchFiles(t, a, FileOptions{}, "")
	opens := false
	for _, c := range k.coverage() {
		opens = opens || c.Kind == event.FileOpenWrite && c.Hook != ""
	}
	modules := NewPreflight().SecurityModules()
	withoutBPF := modules != nil && !strings.Contains(","+strings.Join(modules, ",")+",", ",bpf,")
	forms := os.Getenv(hooksEnv)
	for _, c := range k.coverage() {
		said := strings.Join(c.Errs, "; ")
		switch {
		case c.Hook == "" && c.Kind == event.FileModify && opens: // degraded, and reported so
		case c.Hook == "":
			t.Errorf("%s has no hook: %s", c.Event, said)
		case strings.HasPrefix(c.Hook, "lsm/") && withoutBPF:
			t.Errorf("%s by %s, which never runs: active are %v", c.Event, c.Hook, modules)
		case c.Kind >= event.FileCreate && c.Kind != event.Signal && forms != "" && !hasForm(c.Hook, strings.Split(forms, ",")):
			t.Errorf("%s by %s, want one of %s: %s", c.Event, c.Hook, forms, said)
		case c.Kind >= event.FileCreate && c.Kind != event.Signal && forms == "fentry/" && !strings.Contains(said, "bpf is not among the active security modules") &&
			!strings.Contains(said, "was attached and did not run"):
			t.Errorf("%s by %s, and why not by LSM is not said: %s", c.Event, c.Hook, said)
		}
	}

	bulk := newTap(t, k.bulk)
	dir := real(t, t.TempDir())
	path := filepath.Join(dir, "file")
	for _, change := range []string{"create", "append", "chmod", "rename", "unlink"} {
		a.must(request{Op: "file", Args: []string{change, path}})
	}
	seen := map[event.Kind]bool{}
	for _, r := range lastFile(a, bulk, dir) {
		seen[kindOf(r.SensorEventHeader)] = r.file.path == path && int(r.Pid) == a.pid
	}
	for _, kind := range kinds(event.FileCreate, event.FileModify, event.FileChmod, event.FileRename, event.FileDelete) {
		if h := k.find(kind); h.section == "" && kind == event.FileModify {
			kind = event.FileOpenWrite
		}
		if !seen[kind] {
			t.Errorf("%s was not seen, or of another file: %v", kind, seen)
		}
	}
}

// hasForm reports whether all programs of a hook are of one of the forms.
func hasForm(hook string, forms []string) bool {
	for section := range strings.SplitSeq(hook, ", ") {
		ok := false
		for _, form := range forms {
			ok = ok || strings.HasPrefix(section, form)
		}
		if !ok {
			return false
		}
	}
	return true
}

// TestAsUser has some of the tests run as a user here, too; the kernels that have
// better hooks run all of them so in a virtual machine.
func TestAsUser(t *testing.T) {
	require(t, "root")
	require(t, "btf")
	if os.Getenv(capabilitiesEnv) != "" {
		return // they all do
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=TestRoot(AllowedHooks|Coverage|Understand|Snapshot|ScopeCgroup|TCPConnection)$")
	capabilities := "CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"
	if NewPreflight().before(5, 11) {
		capabilities += " CAP_SYS_RESOURCE" // for locked memory
	}
	cmd.Env = append(os.Environ(), capabilitiesEnv+"="+capabilities)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
