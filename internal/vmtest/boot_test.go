// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/debian"
)

// A virtual machine that hangs is ended: soon, and tried again, where no test of it runs, for
// a boot or a reboot takes seconds; else after more than twice what any takes on a machine that
// does nothing else.
const (
	idleTimeout = 5 * time.Minute
	bootTimeout = 25 * time.Minute
)

// machine is a computer to emulate.
type machine struct {
	arch     string // as Debian and Go call it
	arch32   string // that it runs as well
	cpus     int
	emulator string
	args     []string // with a place to report to on standard output
	accel    []string // how to emulate
	console  string   // for the kernel's messages
	report   string   // for the init script
	elf      elf.Machine
	exit     []byte // code of exit(0)
}

// fast is how to emulate for tests, steady for figures: each instruction takes 2 ns of the
// machine's time, whatever else the emulating one does.
func fast() []string { return []string{"-accel", "tcg,thread=multi"} }

func steady() []string {
	return []string{"-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"}
}

// machines are emulated even on a processor that could do more, so that they are the
// same everywhere and need no privilege.
func machines() []machine {
	return []machine{
		{
			arch: "amd64", arch32: "386", emulator: "qemu-system-x86_64",
			args:    []string{"-cpu", "max", "-serial", "stdio"},
			console: "ttyS0", report: "ttyS1",
			elf: elf.EM_X86_64, exit: []byte{0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05},
		},
		{
			// The board has one serial port only. A processor with pointer
			// authentication takes three times as long.
			arch: "arm64", arch32: "arm", emulator: "qemu-system-aarch64",
			args:    []string{"-M", "virt", "-cpu", "cortex-a72", "-chardev", "stdio,id=report", "-device", "pci-serial,chardev=report"},
			console: "ttyAMA0", report: "ttyS0",
			elf: elf.EM_AARCH64, exit: []byte{0, 0, 0x80, 0xd2, 0xa8, 0x0b, 0x80, 0xd2, 1, 0, 0, 0xd4},
		},
	}
}

// securityModules is what lsm= says. It has bpf in it, which Debian leaves out in 5.10.
const securityModules = "lockdown,capability,landlock,yama,apparmor,bpf"

// boot starts a kernel with security modules and waits for its end. out is what the init script said, console
// what the kernel said; both are there after an error, too. dir is for files. spent is the
// emulator's CPU time, which says more about the tests than the time on the clock of a
// machine that others use, too.
func boot(ctx context.Context, dir string, m machine, kernel debian.Kernel, initramfs, lsm string) (out, console []byte, spent time.Duration, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("no end after %s", bootTimeout))
	defer cancel()
	ctx, hung := context.WithCancelCause(ctx)
	defer hung(nil)
	serial := filepath.Join(dir, "console")
	cmd := exec.CommandContext(ctx, m.emulator, slices.Concat(m.accel, []string{
		"-smp", strconv.Itoa(m.cpus), "-m", "1024",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernel.Image(), "-initrd", initramfs,
		// no_timer_check is for 7.x, which panics when the emulator is slow.
		"-append", "console=" + m.console + " REPORT=" + m.report + " quiet no_timer_check panic=-1 softlockup_panic=1 " +
			"lsm=" + lsm,
		"-serial", "file:" + serial,
	}, m.args)...)
	report, err := os.Create(filepath.Join(dir, "report")) // to look at while it runs
	if err != nil {
		return nil, nil, 0, err
	}
	defer report.Close()
	says := watch{idle: time.AfterFunc(idleTimeout, func() { hung(fmt.Errorf("no test ran for %s", idleTimeout)) })}
	defer says.idle.Stop()
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&says, report), &errs
	err = cmd.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if errs.Len() > 0 {
		err = errors.Join(err, fmt.Errorf("qemu: %s", bytes.TrimSpace(errs.Bytes())))
	}
	console, errRead := os.ReadFile(serial)
	if errors.Is(errRead, os.ErrNotExist) {
		errRead = nil // qemu came not that far, and said so
	}
	if s := cmd.ProcessState; s != nil {
		spent = s.UserTime() + s.SystemTime()
	}
	return says.out, console, spent, errors.Join(err, errRead)
}

// watch keeps what a machine says, and has a timer run while no test does.
type watch struct {
	out  []byte
	idle *time.Timer
}

func (w *watch) Write(p []byte) (int, error) {
	news := max(0, len(w.out)-len(begins)) // with what may be the first part of a word
	w.out = append(w.out, p...)
	if bytes.Contains(w.out[news:], []byte("@vm ")) {
		if amid(w.out) {
			w.idle.Stop()
		} else {
			w.idle.Reset(idleTimeout)
		}
	}
	return len(p), nil
}

// What a machine says when a test binary begins and when it has ended.
const begins, ends = "@vm begin ", "@vm end "

// amid reports whether a test binary is running.
func amid(out []byte) bool {
	return bytes.LastIndex(out, []byte(begins)) > bytes.LastIndex(out, []byte(ends))
}

// tail returns the last lines of a console, without what terminals make of them.
func tail(console []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(console), "\r", "")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
