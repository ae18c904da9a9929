// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor"
)

const (
	// handicapEnv has the test binary take something from itself and then become
	// edr-sensor.
	handicapEnv = "EDR_HANDICAP"
	// binaryEnv is a built edr-sensor; without it the test binary is one.
	binaryEnv = "EDR_BINARY"
)

// handicap does what handicapEnv says on the thread that becomes the program.
func handicap(what string) error {
	runtime.LockOSThread()
	var err error
	switch what {
	case "seccomp EPERM":
		err = filterBPF(unix.EPERM)
	case "seccomp ENOSYS":
		err = filterBPF(unix.ENOSYS)
	case "old release": // the kernel says 2.6 to who asks for it
		const uname26 = 0x0020000
		_, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, uname26, 0, 0)
		if int(errno) != 0 {
			err = errno
		}
	case "no BTF":
		err = hide("/sys/kernel/btf", "")
	case "lockdown":
		if sensor.NewPreflight().Lockdown() != "confidentiality" { // else it is true
			err = hide("/sys/kernel", "security/lockdown")
		}
	case "lockdown that is not visible":
		err = hide("/sys/kernel/security", "")
	case "locked memory":
		limit := unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}
		err = errors.Join(unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit), unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_RESOURCE, 0, 0, 0))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	path := os.Getenv(binaryEnv)
	if path == "" {
		path = "/proc/self/exe"
	}
	return unix.Exec(path, append([]string{"edr-sensor"}, os.Args[1:]...), os.Environ())
}

// filterBPF has the bpf system call end with an error.
func filterBPF(errno unix.Errno) error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// hide puts an empty directory over another one, in a mount namespace of its own. With
// a name it has the file of a locked down kernel, and its BTF.
func hide(dir, name string) error {
	if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
		return err
	}
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil || name == "" {
		return err
	}
	for path, content := range map[string]string{name: "none integrity [confidentiality]\n", "btf/vmlinux": ""} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// TestRefused runs the sensor where it cannot run. It must end with code 77 and one line
// that says what is the matter, before it made anything, and doctor must say the same.
func TestRefused(t *testing.T) {
	needRoot(t)
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	rootless := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}}, // root only
	}
	for _, tt := range []struct {
		name  string // a handicap
		attr  *syscall.SysProcAttr
		check string
		says  string
	}{
		{"seccomp EPERM", nil, sensor.CheckBPF, "a seccomp filter refuses the bpf system call (operation not permitted): allow it"},
		{"seccomp ENOSYS", nil, sensor.CheckBPF, "a seccomp filter refuses the bpf system call (function not implemented): allow it"},
		{"nobody", nobody, sensor.CheckCapabilities, "lacks CAP_BPF and CAP_PERFMON: run it as root"},
		{"user namespace", rootless, sensor.CheckCapabilities, "in its own user namespace only"},
		{"old release", nil, sensor.CheckRelease, "is older than the sensor's programs can run on: boot 5.10 or newer"},
		{"no BTF", nil, sensor.CheckBTF, "/sys/kernel/btf/vmlinux is missing"},
		{"lockdown", nil, sensor.CheckLockdown, "lockdown=confidentiality forbids programs to read kernel memory: boot with lockdown=integrity"},
		{"lockdown that is not visible", nil, sensor.CheckLockdown, "the kernel forbids programs to read its memory, as lockdown=confidentiality does"},
		{"locked memory", nil, sensor.CheckMemlock, "65536 bytes that this process may lock, which count before Linux 5.11: set LimitMEMLOCK=infinity"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			switch host := sensor.NewPreflight(); {
			case tt.check == sensor.CheckMemlock && !strings.HasPrefix(host.Release, "5.10."):
				t.Skipf("Linux %s does not count maps as locked memory", host.Release)
			case strings.HasPrefix(tt.name, "lockdown that") && host.Lockdown() != "confidentiality":
				t.Skip("this kernel is not locked down")
			}
			dir, path := configForAll(t)
			state := filepath.Join(dir, "state")
			code, out, errs := handicapped(t, tt.name, tt.attr, "run", "--config", path)
			if first, rest, _ := strings.Cut(errs, "\n"); rest != "" && strings.Contains(first, "the buffer is not in a good place") {
				errs = rest // of the file system of this test, not of the sensor
			}
			if code != exitPrivilege || out != "" || strings.Count(errs, "\n") != 1 {
				t.Errorf("exit code %d, want %d and one line:\n%s%s", code, exitPrivilege, out, errs)
			}
			var line struct{ Level, Msg, Code, Check, Error string }
			if err := json.Unmarshal([]byte(errs), &line); err != nil || line.Level != "error" || line.Msg != "not started" || line.Code != "REFUSED" || line.Check != tt.check || !strings.Contains(line.Error, tt.says) {
				t.Errorf("%v: %+v, want %s: …%s…", err, line, tt.check, tt.says)
			}
			if _, err := os.Stat(state); tt.check != sensor.CheckMemlock && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the state directory was made: %v", err)
			}

			code, out, errs = handicapped(t, tt.name, tt.attr, "doctor", "--json", "--config", path)
			var answer struct{ Checks []finding }
			if err := json.Unmarshal([]byte(out), &answer); err != nil || code != exitFailure || errs != "" {
				t.Fatalf("doctor: exit code %d, %v: %s%s", code, err, out, errs)
			}
			found := ""
			for _, f := range answer.Checks {
				if f.Verdict == fail && f.ID == tt.check {
					found += f.Found + ": " + f.Remedy
				}
			}
			if !strings.Contains(found, tt.says) {
				t.Errorf("doctor says %q, want %q; all:\n%s", found, tt.says, out)
			}
		})
	}
}

// TestStartRefusesConfiguration starts the sensor with what a start finds out to be wrong.
// What no new start heals ends with code 78; what may be there a moment later does not, and
// is tried again by systemd.
func TestStartRefusesConfiguration(t *testing.T) {
	needRoot(t)
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		t.Skip(err)
	}
	var inMemory unix.Statfs_t
	_, groups := os.Stat("/sys/fs/cgroup/cgroup.procs")
	_, mixed := os.Stat("/sys/fs/cgroup/unified/cgroup.procs")
	for _, tt := range []struct {
		name, key, value string
		code             int
		says             string
		skip             bool
	}{
		{"buffer in memory", "BUFFER__DIR", "/dev/shm/edr-refused", exitConfig, "set buffer.dir to a directory on a local disk", unix.Statfs("/dev/shm", &inMemory) != nil || inMemory.Type != unix.TMPFS_MAGIC},
		{"unknown group", "CONTROL__GROUP", "no-such-group", exitConfig, `control.group: "no-such-group" is no group of this host; make it`, false},
		{"no process", "SENSOR__SCOPE", "tree:4194304", exitConfig, `sensor.scope: "tree:4194304" is no process here; name one`, false},
		{"no cgroup", "SENSOR__SCOPE", "cgroup:/cgroup.procs", exitConfig, "cgroup.procs is no cgroup of version 2", groups != nil && mixed != nil},
		{"no cgroup yet", "SENSOR__SCOPE", "cgroup:/no/such/group", exitFailure, "no such file or directory", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.skip {
				t.Skip("this host has another file system there")
			}
			_, path := configForAll(t)
			t.Setenv("EDR_SENSOR_BUFFER__ALLOW_UNSAFE", fmt.Sprint(tt.key != "BUFFER__DIR"))
			t.Setenv("EDR_SENSOR_"+tt.key, tt.value)
			code, out, errs := handicapped(t, "none", nil, "run", "--config", path)
			if code != tt.code || out != "" {
				t.Errorf("exit code %d, want %d:\n%s%s", code, tt.code, out, errs)
			}
			var line struct{ Level, Msg, Code, Error string }
			last := errs[strings.LastIndex(strings.TrimSpace(errs), "\n")+1:]
			if err := json.Unmarshal([]byte(last), &line); err != nil || line.Level != "error" || line.Code != "NOT_STARTED" || !strings.Contains(line.Error, tt.says) {
				t.Errorf("%v: %+v, want …%s…", err, line, tt.says)
			}
		})
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("EDR_REQUIRE_ALL") == "1":
		t.Fatal("EDR_REQUIRE_ALL: needs root, to take away from")
	default:
		t.Skip("needs root, to take away from")
	}
}

// configForAll makes a configuration in a directory that every user may use. The sensor
// then watches this test and no more.
func configForAll(t *testing.T) (dir, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "edr-refused-") // nobody comes to t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "edr-sensor.yaml")
	// In a virtual machine /tmp is a tmpfs.
	content := fmt.Sprintf("agent: {state_dir: %[1]s/state}\nbuffer: {cap: 16MiB, allow_unsafe: true}\ncontrol: {socket: %[1]s/control.sock}\nhttp: {listen: \"\"}\nlog: {format: json}\nsensor: {scope: \"tree:%[2]d\"}\n", dir, os.Getpid())
	if err := errors.Join(os.Chmod(dir, 0o777), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
	return dir, path
}

// handicapped runs edr-sensor with a handicap.
func handicapped(t *testing.T, what string, attr *syscall.SysProcAttr, args ...string) (code int, out, errs string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), handicapEnv+"="+what)
	cmd.SysProcAttr = attr
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// TestRunAsUser runs the sensor as systemd does: as a user with a few capabilities and
// nothing of root's.
func TestRunAsUser(t *testing.T) {
	needRoot(t)
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		t.Skip(err)
	}
	attr := &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: 1000, Gid: 1000},
		// The last is for Linux 5.10.
		AmbientCaps: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_RESOURCE},
	}
	if !strings.HasPrefix(sensor.NewPreflight().Release, "5.10.") {
		attr.AmbientCaps = attr.AmbientCaps[:4]
	}
	dir, path := configForAll(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "run", "--config", path)
	cmd.Env = append(os.Environ(), handicapEnv+"=none")
	cmd.SysProcAttr = attr
	logged, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	started := false
	for lines := bufio.NewScanner(logged); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		var line struct{ Msg string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Errorf("%v: %s", err, lines.Text())
		}
		if line.Msg == "started" {
			started = true
			socket, err := os.Stat(filepath.Join(dir, "control.sock"))
			if err != nil || socket.Sys().(*syscall.Stat_t).Uid != 1000 {
				t.Errorf("control socket: %v", err)
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil || !started {
		t.Errorf("%v, started %t:\n%s", err, started, said.String())
	}
}
