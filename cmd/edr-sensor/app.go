// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

// Exit codes. From 64 on they are those of sysexits.h.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitUnavailable = 69 // Redis cannot be reached
	exitPrivilege   = 77 // or a host that refuses the sensor
	exitConfig      = 78
)

// exit is an error that knows its exit code and what to try next. Without an
// error it only carries the code: everything was said already.
type exit struct {
	code int
	err  error
	try  string // a command, or a sentence; may be empty
}

func (e *exit) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exit) Unwrap() error { return e.err }

func usage(cmd *cobra.Command, format string, args ...any) error {
	return &exit{exitUsage, fmt.Errorf(format, args...), cmd.CommandPath() + " --help"}
}

// app is one invocation.
type app struct {
	stdin          *os.File // nil: nothing is read
	stdout, stderr io.Writer
	environ        []string
	configPath     string // --config
}

// run executes the command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	e := &exit{code: exitFailure, err: err}
	errors.As(err, &e)
	if e.err != nil {
		fmt.Fprintf(a.stderr, "edr-sensor: %s\n", strings.TrimSpace(e.err.Error()))
	}
	if e.try != "" {
		fmt.Fprintf(a.stderr, "Try: %s\n", e.try)
	}
	return e.code
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "edr-sensor",
		Short: "Watch this Linux host with eBPF and deliver what happens as OCSF events to Redis Streams",
		Long: `edr-sensor watches this Linux host with eBPF: processes and TCP connections, with
full command lines, ancestry, users and containers. Events are kept in a bounded
buffer on disk and delivered to Redis Streams exactly once; what is lost is
counted and named.

Exit codes: 0 good, 1 failed, 2 wrong usage, 69 Redis cannot be reached,
77 the host refuses the sensor, or a privilege is missing, 78 wrong configuration.`,
		Args:              a.unknownCommand,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, "%w", err) })
	root.PersistentFlags().StringVar(&a.configPath, "config", "", "configuration file (default "+config.DefaultPath+" where it exists)")
	_ = root.MarkPersistentFlagFilename("config", "yaml", "yml")
	root.AddCommand(a.runCommand(), a.checkCommand(), a.doctorCommand(), a.statusCommand(), a.topCommand(), a.eventsCommand(), a.decisionsCommand(), a.bufferCommand(), a.caseCommand(), a.reloadCommand(), a.logCommand(), a.reportCommand(), a.versionCommand(), a.completionCommand(), a.manCommand())
	return root
}

func (a *app) unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("unknown command %q", args[0])
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		text += fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
	}
	return usage(cmd, "%s", text)
}

// noArgs is the Args of commands that take only flags.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "unexpected argument %q", args[0])
	}
	return nil
}

// configFile is the file to read: the one named, else the installed one, else
// none, which means the defaults.
func (a *app) configFile() string {
	if a.configPath != "" {
		return a.configPath
	}
	if _, err := os.Stat(config.DefaultPath); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return config.DefaultPath
}

// load reads the configuration for a command that needs it.
func (a *app) load() (config.Config, error) {
	c, err := config.Load(a.configFile(), a.environ)
	if err != nil {
		return config.Config{}, a.configError(err)
	}
	return c, nil
}

// configError is how a command ends that the configuration's problems hinder.
func (a *app) configError(err error) error {
	return &exit{exitConfig, fmt.Errorf("configuration:\n%w", err), "edr-sensor check" + a.configFlag()}
}

// configFlag repeats --config in a hint.
func (a *app) configFlag() string {
	if a.configPath == "" {
		return ""
	}
	return " --config " + a.configPath
}

// getenv looks a variable up in the environment of this invocation.
func (a *app) getenv(name string) string {
	for _, kv := range a.environ {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// colour decides whether to paint: when asked to, else on a terminal unless
// NO_COLOR (no-color.org) is set.
func (a *app) colour(when string) bool {
	switch when {
	case "always":
		return true
	case "never":
		return false
	}
	columns, _ := terminalSize(a.stdout)
	return columns > 0 && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"
}
