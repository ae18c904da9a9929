// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
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
			var watched *config.Scope
			if scope != "" {
				s, err := config.ParseScope(scope)
				if err != nil {
					return usage(cmd, "--scope: %w", err)
				}
				watched = &s
			}
			l, err := a.loadAll(watched, level)
			if err != nil {
				return &exit{exitConfig, fmt.Errorf("configuration:\n%w", err), "edr-sensor check" + a.configFlag()}
			}
			c := l.Config
			load := func() (agent.Loaded, error) {
				l, err := a.loadAll(watched, level)
				if err != nil {
					return l, err
				}
				var problems []error
				for _, p := range missingFiles(l.Config) {
					problems = append(problems, p)
				}
				return l, errors.Join(problems...)
			}
			hangup := make(chan os.Signal, 1) // caught from now on, so that it ends nothing
			signal.Notify(hangup, unix.SIGHUP)
			defer signal.Stop(hangup)
			logs, err := logging.New(agent.LogOptions(c.Log), a.stderr)
			if err != nil {
				return usage(cmd, "--log-level: %w", err)
			}
			ctx := logs.Into(cmd.Context())
			agent.Harden(ctx)
			if err := agent.Run(ctx, agent.Options{Loaded: l, Version: thisBuild().Version, Load: load, Reload: hangup, ConfigFile: a.configFile()}); err != nil && !errors.Is(err, context.Canceled) {
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
// the process, a problem about the configuration: starting again does not help.
func exitCode(err error) int {
	if refusal := (*sensor.Refusal)(nil); errors.As(err, &refusal) {
		return exitPrivilege
	}
	if problem := (*config.Problem)(nil); errors.As(err, &problem) || errors.Is(err, buffer.ErrUnsafe) {
		return exitConfig
	}
	return exitFailure
}

// loadAll reads the configuration with what the command line sets over it. The
// error joins all problems.
func (a *app) loadAll(scope *config.Scope, level string) (agent.Loaded, error) {
	c, settings, err := config.Explain(a.configFile(), a.environ)
	if err != nil {
		return agent.Loaded{}, err
	}
	override := func(key, value, flag string) {
		for i := range settings {
			if settings[i].Key == key {
				settings[i].Value, settings[i].Source = value, flag
			}
		}
	}
	if scope != nil {
		c.Sensor.Scope = *scope
		override("sensor.scope", scope.String(), "--scope")
	}
	if level != "" {
		c.Log.Level = level
		override("log.level", level, "--log-level")
	}
	return agent.Loaded{Config: c, Settings: settings}, nil
}
