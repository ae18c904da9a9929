// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// manFiles ends the manual page: what the commands do not say of themselves.
const manFiles = `.SH FILES
.TP
.I /etc/edr\-sensor/edr\-sensor.yaml
The configuration; it documents every key.
.TP
.I /etc/edr\-sensor/conf.d/*.yaml
Drop\-ins, each over the one before, sorted by name.
.TP
.I /etc/edr\-sensor/redis\-password
The password for Redis, one line; name it by transport.password_file: redis\-password.
.TP
.I /var/lib/edr\-sensor
The identity of the sensor, open cases, and the buffer.
.TP
.I /run/edr\-sensor/control.sock
Where a running sensor answers the other commands.
.TP
.I /usr/share/doc/edr\-sensor
Events, decisions, metrics, log and operation, and examples of drop\-ins for the unit.
.TP
.I /usr/share/edr\-sensor
Alerts for Prometheus, a dashboard for Grafana, the ACL for Redis.
.SH ENVIRONMENT
.TP
.B EDR_SENSOR_\fISECTION\fB__\fIKEY
Sets a key over the configuration files, as in EDR_SENSOR_BUFFER__CAP=1GiB.
.TP
.B NO_COLOR
When it is set, nothing is painted.
.SH SEE ALSO
.BR edr\-sensor.yaml (5),
.BR systemctl (1),
.BR journalctl (1),
.UR https://github.com/aurorasoc/edr\-sensor
.UE
`

// manCommand writes the page that the packages install. It is hidden: whoever
// has it installed reads it with man.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man",
		Short:  "Write the manual page",
		Hidden: true,
		Args:   noArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return manPage(a.stdout, cmd.Root()) },
	}
}

// manPage writes one page of all commands below root.
func manPage(to io.Writer, root *cobra.Command) error {
	root.InitDefaultHelpFlag()
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s 1 \"\" \"%s\" \"\"\n", roff(strings.ToUpper(root.Name())), roff(root.Name()+" "+thisBuild().Version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(root.Name()), roff(lowerFirst(root.Short)))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n.I command\n[\\fIoptions\\fR]\n", roff(root.Name()))
	b.WriteString(".SH DESCRIPTION\n")
	manText(&b, root.Long)
	b.WriteString(".SH COMMANDS\n")
	manCommands(&b, root)
	b.WriteString(".SH OPTIONS OF ALL COMMANDS\n")
	manFlags(&b, root.PersistentFlags())
	b.WriteString(manFiles)
	_, err := io.WriteString(to, b.String())
	return err
}

// manCommands writes those below parent, and theirs, in the order of the help.
func manCommands(b *strings.Builder, parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if !c.IsAvailableCommand() || c.Name() == "help" {
			continue
		}
		if c.Runnable() {
			fmt.Fprintf(b, ".SS %s\n", roff(strings.TrimPrefix(c.UseLine(), c.Root().Name()+" ")))
			text := c.Long
			if text == "" {
				text = c.Short + "."
			}
			manText(b, text)
			manText(b, c.Example)
			manFlags(b, c.LocalNonPersistentFlags())
		}
		manCommands(b, c)
	}
}

// manText writes paragraphs; what is indented keeps its lines.
func manText(b *strings.Builder, text string) {
	literal, start := false, true
	set := func(on bool) {
		if literal != on {
			b.WriteString(map[bool]string{true: ".RS 4\n.nf\n", false: ".fi\n.RE\n"}[on])
			literal = on
		}
	}
	for line := range strings.Lines(strings.TrimRight(text, "\n")) {
		line = strings.TrimRight(line, "\n")
		switch {
		case line == "":
			set(false)
			start = true
			continue
		case strings.HasPrefix(line, "  "):
			if start {
				b.WriteString(".PP\n")
			}
			set(true)
			line = strings.TrimPrefix(line, "  ")
		default:
			set(false)
			if start {
				b.WriteString(".PP\n")
			}
		}
		start = false
		b.WriteString(roff(line) + "\n")
	}
	set(false)
}

func manFlags(b *strings.Builder, flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		b.WriteString(".TP\n\\fB")
		if f.Shorthand != "" {
			b.WriteString(roff("-"+f.Shorthand) + "\\fR, \\fB")
		}
		value, text := pflag.UnquoteUsage(f)
		b.WriteString(roff("--"+f.Name) + "\\fR")
		if value != "" {
			b.WriteString(" \\fI" + roff(value) + "\\fR")
		}
		b.WriteString("\n" + roff(text))
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "0s" && f.DefValue != "[]" {
			b.WriteString(" (default " + roff(f.DefValue) + ")")
		}
		b.WriteString("\n")
	})
}

// roff writes text so that troff takes none of it for a request or an escape.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...").Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}

func lowerFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}
