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
)

// sensorCase is a case as the sensor tells of it. It is kept apart from the server's
// type, because the two may be of different versions.
type sensorCase struct {
	ID              string    `json:"case_id"`
	InvestigationID string    `json:"investigation_id,omitempty"`
	UserID          string    `json:"user_id,omitempty"`
	Scope           caseScope `json:"scope"`
	Collect         string    `json:"collect"`
	Opened          time.Time `json:"opened"`
	Until           time.Time `json:"until"`
	Tagged          uint64    `json:"tagged"`
	AtLeast         bool      `json:"tagged_at_least,omitempty"`
	Covered         *int      `json:"covered,omitempty"`
	Note            string    `json:"note,omitempty"`
}

type caseScope struct {
	Kind  string `json:"kind"`
	Value string `json:"value"`
}

// caseRequest asks to open a case.
type caseRequest struct {
	ID              string    `json:"case_id"`
	InvestigationID string    `json:"investigation_id"`
	UserID          string    `json:"user_id"`
	Scope           caseScope `json:"scope"`
	TTL             string    `json:"ttl"`
	Collect         string    `json:"collect"`
}

// caseFlags are those of the case commands.
type caseFlags struct {
	socket string
	asJSON bool
}

func (a *app) caseCommand() *cobra.Command {
	var f caseFlags
	cmd := &cobra.Command{
		Use:   "case",
		Short: "Open, list and close cases: what is investigated on this host",
		Long: `Open, list and close cases on the running sensor.

While a case is open, every event of its scope carries its ids, and so do the
decisions about it. With --collect deep nothing the sensor can see of the scope is
left out. Cases survive restarts and end by themselves.

  edr-sensor case open --case-id C-17 --investigation-id I-4 --subtree 4711
  edr-sensor case open --case-id C-18 --container 4bf5122f3445 --ttl 30m --collect deep
  edr-sensor case list
  edr-sensor case close C-17`,
		Args: a.unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&f.socket, "socket", "", "control socket of the sensor (default: control.socket)")
	cmd.PersistentFlags().BoolVar(&f.asJSON, "json", false, "write JSON")
	cmd.AddCommand(a.caseOpenCommand(&f), a.caseListCommand(&f), a.caseCloseCommand(&f))
	return cmd
}

// scopeFlags are the flags that name a scope; exactly one is given.
func scopeFlags() []struct{ name, usage string } {
	return []struct{ name, usage string }{
		{"pid", "one process, by its id"},
		{"subtree", "a process, by its id, and all that descends from it"},
		{"container", "a container, by its id or at least 12 characters of it"},
		{"cgroup", "a control group and those below it, by path or id"},
		{"uid", "a user, by name or number"},
		{"path", "an executable, or all files and executables below a directory"},
	}
}

func (a *app) caseOpenCommand(f *caseFlags) *cobra.Command {
	var r caseRequest
	cmd := &cobra.Command{
		Use:   "open --case-id ID --SCOPE VALUE",
		Short: "Open a case: from now on the events of its scope carry its ids",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if r.ID == "" {
				return usage(cmd, "--case-id is missing: name the case")
			}
			var err error
			if r.Scope, err = scopeOf(cmd); err != nil {
				return err
			}
			if ttl, err := time.ParseDuration(r.TTL); err != nil || ttl <= 0 {
				return usage(cmd, "--ttl %s: write a duration such as 30m or 4h", r.TTL)
			}
			if r.Collect != "normal" && r.Collect != "deep" {
				return usage(cmd, "--collect %s: write normal or deep", r.Collect)
			}
			c, err := a.control(f.socket)
			if err != nil {
				return err
			}
			var answer sensorCase
			if err := c.ask(cmd.Context(), http.MethodPost, "/cases/open", r, &answer); err != nil {
				return err
			}
			return a.show(f, answer, answer.opened)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&r.ID, "case-id", "", "id of the case")
	fl.StringVar(&r.InvestigationID, "investigation-id", "", "id of the investigation it belongs to")
	fl.StringVar(&r.UserID, "user-id", "", "who opens it (default: the name of the user who calls)")
	for _, s := range scopeFlags() {
		fl.String(s.name, "", s.usage)
	}
	fl.StringVar(&r.TTL, "ttl", "4h", "end it after this time")
	fl.StringVar(&r.Collect, "collect", "normal", "normal, or deep: everything that the sensor can see of the scope, without limits and exclusions")
	_ = cmd.RegisterFlagCompletionFunc("collect", cobra.FixedCompletions([]string{"normal", "deep"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// scopeOf finds the one scope that was given.
func scopeOf(cmd *cobra.Command) (s caseScope, err error) {
	var all, given []string
	for _, f := range scopeFlags() {
		all = append(all, "--"+f.name)
		if cmd.Flags().Changed(f.name) {
			given = append(given, "--"+f.name)
			s.Kind, s.Value = f.name, cmd.Flags().Lookup(f.name).Value.String()
		}
	}
	switch {
	case len(given) == 0:
		return s, usage(cmd, "no scope: say what the case covers with one of %s", strings.Join(all, ", "))
	case len(given) > 1:
		return s, usage(cmd, "%s: a case has one scope: open a second case for the other", strings.Join(given, " and "))
	case s.Value == "":
		return s, usage(cmd, "%s is empty", given[0])
	}
	return s, nil
}

func (a *app) caseListCommand(f *caseFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the open cases",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.control(f.socket)
			if err != nil {
				return err
			}
			var answer struct {
				Cases []sensorCase `json:"cases"`
			}
			if err := c.ask(cmd.Context(), http.MethodGet, "/cases", nil, &answer); err != nil {
				return err
			}
			return a.show(f, answer, func(now time.Time) string { return caseTable(answer.Cases, now) })
		},
	}
}

func (a *app) caseCloseCommand(f *caseFlags) *cobra.Command {
	var id, user string
	cmd := &cobra.Command{
		Use:   "close ID",
		Short: "Close a case before its time is over",
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usage(cmd, "unexpected argument %q", args[1])
			case len(args) == 1 && id != "" && id != args[0]:
				return usage(cmd, "two cases, %s and %s: close one after the other", id, args[0])
			case len(args) == 1:
				id = args[0]
			case id == "":
				return usage(cmd, "no case: say which to close")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.control(f.socket)
			if err != nil {
				return err
			}
			request := struct {
				ID     string `json:"case_id"`
				UserID string `json:"user_id"`
			}{id, user}
			var answer sensorCase
			if err := c.ask(cmd.Context(), http.MethodPost, "/cases/close", request, &answer); err != nil {
				return err
			}
			return a.show(f, answer, answer.closed)
		},
	}
	cmd.Flags().StringVar(&id, "case-id", "", "id of the case")
	cmd.Flags().StringVar(&user, "user-id", "", "who closes it (default: the name of the user who calls)")
	return cmd
}

// show writes an answer as JSON, or as text for people.
func (a *app) show(f *caseFlags, answer any, text func(now time.Time) string) error {
	if f.asJSON {
		return a.writeJSON(answer)
	}
	_, err := io.WriteString(a.stdout, a.printable(text(time.Now())))
	return err
}

func (c sensorCase) opened(now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "case %s is open on %s %s for %s", safe(c.ID), safe(c.Scope.Kind), safe(c.Scope.Value), left(now, c.Until))
	if c.Covered != nil {
		fmt.Fprintf(&b, "; it covers %d %s now", *c.Covered, verb(uint64(*c.Covered), "running process", "running processes"))
	}
	b.WriteString("\n")
	if c.Covered != nil && *c.Covered == 0 {
		b.WriteString("Nothing that runs belongs to its scope. Events will carry its ids once something does.\n")
	}
	if c.Note != "" {
		b.WriteString(safe(c.Note) + "\n")
	}
	return b.String()
}

func (c sensorCase) closed(time.Time) string {
	atLeast := ""
	if c.AtLeast {
		atLeast = "at least "
	}
	return fmt.Sprintf("case %s is closed; %s%s %s its ids\n", safe(c.ID), atLeast, plural(int(c.Tagged), "event"), verb(c.Tagged, "carries", "carry"))
}

func verb(n uint64, one, more string) string {
	if n == 1 {
		return one
	}
	return more
}

// left is the time until then, as people say it.
func left(now, until time.Time) string {
	if !until.After(now) {
		return "no more time"
	}
	return ago(until.Add(time.Second/2), now)
}

// caseTable lists cases in columns as wide as they have to be.
func caseTable(list []sensorCase, now time.Time) string {
	if len(list) == 0 {
		return "no case is open\n"
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CASE\tINVESTIGATION\tUSER\tSCOPE\tCOLLECT\tLEFT\tEVENTS")
	for _, c := range list {
		cells := []string{c.ID, orDash(c.InvestigationID), orDash(c.UserID), c.Scope.Kind + " " + c.Scope.Value, c.Collect, left(now, c.Until), thousands(c.Tagged)}
		for i, cell := range cells {
			cells[i] = cut(safe(cell), 80)
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	_ = w.Flush() // a Builder takes everything
	lines := slices.Collect(strings.Lines(b.String()))
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " \n") + "\n"
	}
	return strings.Join(lines, "")
}
