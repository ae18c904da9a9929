// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// bootTimeout ends a virtual machine that hangs.
const bootTimeout = 7 * time.Minute

// boot starts a kernel and waits for its end. out is what the init script said, console
// what the kernel said; both are there after an error, too. dir is for files.
func boot(ctx context.Context, dir string, kernel image, initramfs string) (out, console []byte, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("no end after %s", bootTimeout))
	defer cancel()
	serial := filepath.Join(dir, "console")
	// Emulated even where the processor could do more: everywhere the same machine.
	// no_timer_check is for 7.x, which panics when the emulator is slow.
	// lsm= has bpf in it, which Debian leaves out in 5.10.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "max", "-m", "1024",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+serial, "-serial", "stdio",
		"-kernel", kernel.vmlinuz(), "-initrd", initramfs,
		"-append", "console=ttyS0 quiet no_timer_check panic=-1 softlockup_panic=1 "+
			"lsm=lockdown,capability,landlock,yama,apparmor,bpf")
	var says, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &says, &errs
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
	return says.Bytes(), console, errors.Join(err, errRead)
}

// tail returns the last lines of a console, without what terminals make of them.
func tail(console []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(console), "\r", "")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
