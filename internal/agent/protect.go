// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Harden makes this process hard to look into: nobody but root may read its memory or
// attach to it, it leaves no core, gains no privileges by executing something, and has no
// secrets in its environment. What the host refuses is logged; the sensor does without.
func Harden(ctx context.Context) {
	var errs []error
	// Files of /proc/PID then belong to root. Reading its own is allowed all the same.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		errs = append(errs, errors.Join(errors.New("not dumpable"), err))
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); errno != 0 && errno != syscall.ENOTSUP { // built with cgo, for tests
		errs = append(errs, errors.Join(errors.New("no new privileges"), errno))
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil || core.Max != 0 {
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
			errs = append(errs, errors.Join(errors.New("no core"), err))
		}
	}
	if err := wipeSecrets(); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		logging.From(ctx).Warn("process not hardened", zap.Error(err))
	}
}

// secret tells the names of variables that hold what nobody should find here. The sensor
// takes no secrets from its environment, but it inherits what whoever starts it has.
func secret(name string) bool {
	for _, part := range []string{"PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "CREDENTIAL", "REDISCLI_AUTH"} {
		if strings.Contains(strings.ToUpper(name), part) && !strings.HasPrefix(name, "EDR_SENSOR_") && name != "CREDENTIALS_DIRECTORY" {
			return true
		}
	}
	return false
}

// wipeSecrets takes secrets out of the environment, and out of the memory that
// /proc/PID/environ shows.
func wipeSecrets() error {
	found := false
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); secret(name) {
			found = true
			if err := os.Unsetenv(name); err != nil {
				return err
			}
		}
	}
	if !found {
		return nil
	}
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return err
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(f) < 49 {
		return errors.New("wipe environment: /proc/self/stat does not say where it is")
	}
	start, err1 := strconv.ParseUint(f[47], 10, 64)
	end, err2 := strconv.ParseUint(f[48], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if start == 0 || end <= start {
		return errors.New("wipe environment: this process may not know where it is")
	}
	// The runtime has copied all of it when it started.
	block := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&start))), end-start)
	for len(block) > 0 {
		n := strings.IndexByte(unsafe.String(&block[0], len(block)), 0)
		if n < 0 {
			n = len(block)
		}
		if name, value, _ := strings.Cut(unsafe.String(&block[0], n), "="); n > 0 && secret(name) {
			clear(block[n-len(value) : n])
		}
		block = block[min(n+1, len(block)):]
	}
	return nil
}

// sums are the SHA-256 of those of the sensor's own files that say how it runs, by path;
// none of what holds secrets or changes all the time.
func (a *Agent) sums() map[string]string {
	out := map[string]string{}
	add := func(path string) {
		if sum, err := fileSum(path); err == nil {
			out[path] = sum
		}
	}
	for _, p := range a.protected() {
		if p.Part == event.FileOfState || a.secretFile(p.Path) {
			continue
		}
		add(p.Path)
		if !p.All {
			continue
		}
		entries, err := os.ReadDir(p.Path)
		if err != nil {
			continue // it is not there
		}
		for _, e := range entries {
			add(filepath.Join(p.Path, e.Name()))
		}
	}
	return out
}

func (a *Agent) secretFile(path string) bool {
	for _, secret := range a.cfg.Transport.SecretFiles() {
		if path == secret && path != "" {
			return true
		}
	}
	return false
}

// fileSum is the SHA-256 of a regular file.
func fileSum(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", errors.Join(errors.New(path+" is no file"), err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// installed watches the file that this process was started from.
type installed struct {
	path string
	last os.FileInfo // nil: it is not there
	said bool        // that it is another one
}

// watchInstalled begins with the binary that runs, wherever its path leads by now.
func watchInstalled() *installed {
	w := &installed{}
	path, err := os.Executable()
	if err != nil {
		return w
	}
	w.path = strings.TrimSuffix(path, " (deleted)")
	w.last, _ = os.Stat("/proc/self/exe") // nil: whatever is there is another one
	return w
}

// step tells once of each change of the binary on disk: what runs is another one from then on.
func (w *installed) step() (out []event.SelfInfo) {
	if w.path == "" {
		return nil
	}
	now, err := os.Stat(w.path)
	if err != nil {
		now = nil
	}
	if w.last == nil && now == nil || w.last != nil && now != nil && os.SameFile(w.last, now) && w.last.ModTime().Equal(now.ModTime()) && w.last.Size() == now.Size() {
		return nil
	}
	w.last = now
	running, err := binarySum()
	if err != nil {
		running = "unknown: " + err.Error()
	}
	i := event.SelfInfo{
		Name: "Binary Replaced", Severity: 3, Code: "BINARY_REPLACED", Before: running, After: "none",
		Message: w.path + " was removed; the sensor goes on until it is restarted", Attrs: map[string]any{"path": w.path},
	}
	if now != nil {
		if i.After, err = fileSum(w.path); err != nil {
			i.After = "unknown: " + err.Error()
		}
		if i.After == running { // put in place again, or the file system shows one file as two
			i.Severity = 1
			if !w.said {
				return nil
			}
		}
		i.Message = w.path + " is another file than the one that was started; a restart will run it"
	}
	w.said = true
	return []event.SelfInfo{i}
}

// defaultUnit is the unit that the packages install.
const defaultUnit = "edr-sensor.service"

// unitName is the service that this process runs in, else the one it should.
func unitName() string {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return defaultUnit
	}
	for line := range strings.Lines(string(data)) {
		if base := filepath.Base(strings.TrimSpace(line)); strings.HasSuffix(base, ".service") {
			return base
		}
	}
	return defaultUnit
}

// unitDirs are where systemd looks for a unit and its drop-ins, the first one wins.
func unitDirs() []string {
	return []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}
}

// protected are the sensor's own files.
func (a *Agent) protected() []sensor.Protected {
	var list []sensor.Protected
	add := func(part event.FileFlags, all bool, paths ...string) {
		for _, path := range paths {
			if filepath.IsAbs(path) {
				list = append(list, sensor.Protected{Path: path, Part: part, All: all})
			}
		}
	}
	if binary, err := os.Executable(); err == nil {
		add(event.FileOfBinary, false, strings.TrimSuffix(binary, " (deleted)"))
	}
	unit := unitName()
	for _, dir := range unitDirs() {
		add(event.FileOfUnit, false, filepath.Join(dir, unit))
		add(event.FileOfUnit, true, filepath.Join(dir, unit+".d"))
	}
	t := a.cfg.Transport
	add(event.FileOfConfig, false, t.PasswordFile, t.TLS.CAFile, t.TLS.CertFile, t.TLS.KeyFile, "/etc/default/edr-sensor")
	if file, err := filepath.Abs(a.file); err == nil && a.file != "" {
		add(event.FileOfConfig, false, file)
		add(event.FileOfConfig, true, filepath.Join(filepath.Dir(file), "conf.d"))
	} else {
		add(event.FileOfConfig, false, config.DefaultPath)
	}
	add(event.FileOfState, true, a.cfg.Agent.StateDir, a.bufferDir())
	return list
}
