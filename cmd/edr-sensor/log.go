// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// logLevels is what the sensor tells about its log. It is kept apart from the
// server's type, because the two may be of different versions.
type logLevels struct {
	Levels []struct {
		Component  string    `json:"component"`
		Level      string    `json:"level"`
		Configured string    `json:"configured"`
		Until      time.Time `json:"until,omitzero"`
	} `json:"levels"`
	Dropped uint64 `json:"dropped"`
}

// logRequest asks for a level.
type logRequest struct {
	Level     string `json:"level,omitempty"`
	Component string `json:"component,omitempty"`
	Seconds   int64  `json:"seconds,omitempty"`
}

const logReset = "reset"

func (a *app) logCommand() *cobra.Command {
	var socket, component string
	var lasts time.Duration
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "log [debug|info|warn|error|reset]",
		Short: "Show the levels of the sensor's log, or change them while it runs",
		Long: `Show the levels of the running sensor's log, or change them.

A change holds until the next one, until --for is over, or until the sensor ends;
reset goes back to the configuration. Without --component it is for all components.
Each change is a record on the decisions stream.

  edr-sensor log
  edr-sensor log debug --component transport --for 10m
  edr-sensor log reset`,
		ValidArgs: append(logging.LevelNames(), logReset),
		RunE: func(cmd *cobra.Command, args []string) error {
			var q logRequest
			switch {
			case len(args) > 1:
				return usage(cmd, "unexpected argument %q", args[1])
			case len(args) == 0 && (component != "" || lasts != 0):
				return usage(cmd, "--component and --for need a level")
			case len(args) == 1 && !slices.Contains(append(logging.LevelNames(), logReset), args[0]):
				return usage(cmd, "unknown level %q: must be one of %s, %s", args[0], strings.Join(logging.LevelNames(), ", "), logReset)
			case component != "" && !slices.Contains(logging.Components(), component):
				return usage(cmd, "--component %q: must be one of %s", component, strings.Join(logging.Components(), ", "))
			case len(args) == 1 && args[0] == logReset && lasts != 0:
				return usage(cmd, "--for goes with a level, not with %s", logReset)
			case lasts != 0 && lasts < time.Second:
				return usage(cmd, "--for %s: must be a second or more", lasts)
			case len(args) == 1 && args[0] != logReset:
				q = logRequest{args[0], component, int64(lasts / time.Second)}
			default:
				q.Component = component
			}
			c, err := a.control(socket)
			if err != nil {
				return err
			}
			var l logLevels
			if len(args) == 0 {
				if err := c.read(cmd.Context(), "/log", 10*time.Second, &l); err != nil {
					return err
				}
			} else if err := c.ask(cmd.Context(), http.MethodPost, "/log", q, &l); err != nil {
				return err
			}
			if asJSON {
				return a.writeJSON(l)
			}
			return l.print(a.stdout, time.Now())
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control socket of the sensor (default: control.socket)")
	cmd.Flags().StringVar(&component, "component", "", strings.Join(logging.Components(), ", ")+" (default: all)")
	cmd.Flags().DurationVar(&lasts, "for", 0, "go back to the configured level after this time, such as 10m")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	_ = cmd.RegisterFlagCompletionFunc("component", cobra.FixedCompletions(logging.Components(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (l *logLevels) print(to io.Writer, now time.Time) error {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "COMPONENT\tLEVEL\tCONFIGURED")
	for _, row := range l.Levels {
		name, until := row.Component, ""
		if name == "" {
			name = "(all)"
		}
		if left := row.Until.Sub(now); !row.Until.IsZero() {
			until = fmt.Sprintf("\tfor %s more", max(left, 0).Round(time.Second))
		}
		fmt.Fprintf(w, "%s\t%s\t%s%s\n", safe(name), safe(row.Level), safe(row.Configured), until)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if l.Dropped > 0 {
		_, err := fmt.Fprintf(to, "%s lines were dropped, because nobody read them in time\n", thousands(l.Dropped))
		return err
	}
	return nil
}
