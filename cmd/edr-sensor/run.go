// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
)

func (a *app) runCommand() *cobra.Command {
	var scope, level string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the sensor in the foreground",
		Long: `Run the sensor in the foreground, as systemd does. It stops in order at the first
SIGINT or SIGTERM and at once at the second.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			if scope != "" {
				if c.Sensor.Scope, err = config.ParseScope(scope); err != nil {
					return usage(cmd, "--scope: %w", err)
				}
			}
			if level != "" {
				c.Log.Level = level
			}
			logger, _, err := logging.New(logging.Format(c.Log.Format), c.Log.Level, a.stderr)
			if err != nil {
				return usage(cmd, "--log-level: %w", err)
			}
			if err := privileged(os.DirFS("/")); err != nil {
				return err
			}
			ctx := logging.Into(cmd.Context(), logger)
			if err := agent.Run(ctx, c, thisBuild().Version); err != nil && !errors.Is(err, context.Canceled) {
				return &exit{exitCode(err), err, "edr-sensor doctor" + a.configFlag()}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&scope, "scope", "", "watch only this: all, tree:PID or cgroup:/PATH (overrides sensor.scope)")
	cmd.Flags().StringVar(&level, "log-level", "", "debug, info, warn or error (overrides log.level)")
	_ = cmd.RegisterFlagCompletionFunc("scope", cobra.FixedCompletions([]string{"all", "tree:", "cgroup:/"}, cobra.ShellCompDirectiveNoSpace))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(logging.Levels(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// btfPath is where the kernel describes its types to programs.
const btfPath = "sys/kernel/btf/vmlinux"

// privileged says in one sentence what is missing to load programs at all.
func privileged(root fs.FS) error {
	effective, err := effectiveCaps(root)
	if err != nil {
		return fmt.Errorf("read own capabilities: %w", err)
	}
	if missing := missingCaps(effective); len(missing) > 0 {
		return &exit{exitPrivilege, fmt.Errorf("loading programs into the kernel needs root, or the capabilities CAP_BPF and CAP_PERFMON, and this process lacks %s", joinAnd(missing)), "sudo edr-sensor run"}
	}
	if _, err := fs.Stat(root, btfPath); err != nil {
		return &exit{exitPrivilege, fmt.Errorf("this kernel does not describe its types (/%s is missing), so no program can be fitted to it: use one built with CONFIG_DEBUG_INFO_BTF, 5.10 or newer", btfPath), "edr-sensor doctor"}
	}
	return nil
}

// exitCode maps the error of a run.
func exitCode(err error) int {
	if errors.Is(err, unix.EPERM) {
		return exitPrivilege
	}
	return exitFailure
}
