// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
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
			logs, err := logging.New(agent.LogOptions(c.Log), a.stderr)
			if err != nil {
				return usage(cmd, "--log-level: %w", err)
			}
			ctx := logs.Into(cmd.Context())
			if err := agent.Run(ctx, c, thisBuild().Version); err != nil && !errors.Is(err, context.Canceled) {
				return &exit{code: exitCode(err)} // the log says why
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&scope, "scope", "", "watch only this: all, tree:PID or cgroup:/PATH (overrides sensor.scope)")
	cmd.Flags().StringVar(&level, "log-level", "", "debug, info, warn or error (overrides log.level)")
	_ = cmd.RegisterFlagCompletionFunc("scope", cobra.FixedCompletions([]string{"all", "tree:", "cgroup:/"}, cobra.ShellCompDirectiveNoSpace))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(logging.LevelNames(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// exitCode maps the error of a run. A refusal is about the host or the privileges of
// the process: starting again does not help.
func exitCode(err error) int {
	if refusal := (*sensor.Refusal)(nil); errors.As(err, &refusal) {
		return exitPrivilege
	}
	return exitFailure
}
