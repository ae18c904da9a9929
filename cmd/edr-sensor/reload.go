// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
)

func (a *app) reloadCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Have the running sensor read its configuration again",
		Long: `Have the running sensor read its configuration again: the file, its drop-ins and
the environment it was started with. All of it is checked before any of it is
applied; with a problem in it everything stays as it is, and the exit code is 78.
What needs a restart is named. SIGHUP does the same.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.reload(cmd.Context(), socket) },
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control socket (default: control.socket)")
	return cmd
}

func (a *app) reload(ctx context.Context, socket string) error {
	c, err := a.control(socket)
	if err != nil {
		return err
	}
	var r agent.ReloadResult
	if err := c.ask(ctx, http.MethodPost, "/reload", struct{}{}, &r); err != nil {
		return err
	}
	if !r.Accepted {
		for _, p := range r.Problems {
			fmt.Fprintln(a.stderr, p)
		}
		return &exit{exitConfig, fmt.Errorf("the sensor refused the configuration, which has %s, and goes on with what it had", plural(len(r.Problems), "problem")), "edr-sensor check" + a.configFlag()}
	}
	_, err = fmt.Fprint(a.stdout, a.printable(reloadText(r)))
	return err
}

// reloadText says what a reload has changed, in lines for people.
func reloadText(r agent.ReloadResult) string {
	var b strings.Builder
	if len(r.Applied)+len(r.NeedsRestart) == 0 {
		fmt.Fprintln(&b, "the configuration is good, and nothing in it has changed")
	} else {
		fmt.Fprintln(&b, "the configuration is good")
	}
	for _, c := range r.Applied {
		fmt.Fprintf(&b, "  %-9s %s: %s → %s\n", "applied", c.Key, orNone(c.Before), orNone(c.After))
	}
	for _, m := range r.Missing {
		fmt.Fprintf(&b, "  %-9s %s\n", "no effect", m)
	}
	for _, c := range r.NeedsRestart {
		fmt.Fprintf(&b, "  %-9s %s: %s → %s\n", "waits", c.Key, orNone(c.Before), orNone(c.After))
	}
	if len(r.NeedsRestart) > 0 {
		fmt.Fprintln(&b, "Try: systemctl restart edr-sensor")
	}
	return b.String()
}

func orNone(s string) string {
	if s == "" {
		return `""`
	}
	return s
}
