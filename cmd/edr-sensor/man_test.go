// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func TestManPage(t *testing.T) {
	root := &cobra.Command{Use: "tool", Short: "Do things", Long: "First line\nof two.\n\n'quoted' and \\escaped\n.start\n\n  tool a   # kept\n  .tool b\nafter"}
	root.PersistentFlags().String("config", "", "read `FILE`")
	child := &cobra.Command{Use: "do [THING]", Short: "Do one thing", Run: func(*cobra.Command, []string) {}}
	child.Flags().BoolP("fast", "f", false, "hurry-up")
	child.Flags().Int("times", 3, "how `often`")
	hidden := &cobra.Command{Use: "secret", Hidden: true, Run: func(*cobra.Command, []string) {}}
	root.AddCommand(child, hidden)
	var b strings.Builder
	if err := manPage(&b, root); err != nil {
		t.Fatal(err)
	}
	_, page, _ := strings.Cut(b.String(), ".SH NAME\n")
	page, _, _ = strings.Cut(page, ".SH FILES")
	want := `tool \- do things
.SH SYNOPSIS
.B tool
.I command
[\fIoptions\fR]
.SH DESCRIPTION
.PP
First line
of two.
.PP
\&'quoted' and \eescaped
\&.start
.PP
.RS 4
.nf
tool a   # kept
\&.tool b
.fi
.RE
after
.SH COMMANDS
.SS do [THING] [flags]
.PP
Do one thing.
.TP
\fB\-f\fR, \fB\-\-fast\fR
hurry\-up
.TP
\fB\-\-times\fR \fIoften\fR
how often (default 3)
.SH OPTIONS OF ALL COMMANDS
.TP
\fB\-\-config\fR \fIFILE\fR
read FILE
`
	if diff := cmp.Diff(want, page); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
