// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/user"
	"strings"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check [FILE]",
		Short: "Check the configuration; exit 78 when it is wrong",
		Long: `Check the configuration file, its drop-ins and the EDR_SENSOR_… environment, and
the files they name. Every problem is reported with its place and its remedy.
Nothing is started and no connection is made.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(cmd, "unexpected argument %q", args[1])
			}
			if len(args) == 1 && a.configPath != "" {
				return usage(cmd, "name the file once, as an argument or with --config")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				a.configPath = args[0]
			}
			return a.check()
		},
	}
}

func (a *app) check() error {
	path := a.configFile()
	c, settings, err := config.Explain(path, a.environ)
	problems := config.Problems(err)
	if err == nil {
		problems = missingFiles(c)
	}
	if n := len(problems); n > 0 {
		for _, p := range problems {
			fmt.Fprintln(a.stderr, p)
		}
		return &exit{exitConfig, fmt.Errorf("the configuration has %s", plural(n, "problem")), ""}
	}
	return a.summarise(path, c, settings)
}

// missingFiles reports the files, and the group, that a valid configuration names and
// that cannot be used.
func missingFiles(c config.Config) []*config.Problem {
	var out []*config.Problem
	bad := func(key, path string, err error, remedy string) {
		if err != nil {
			// The path stands in err already.
			out = append(out, &config.Problem{Key: key, What: strings.TrimPrefix(err.Error(), "open "), Remedy: remedy})
		}
	}
	// A directory that does not exist here may be meant for another host.
	if _, err := os.Stat(c.Buffer.Dir); err == nil && !c.Buffer.AllowUnsafe {
		hazards, _ := buffer.Hazards(c.Buffer.Dir) // one that cannot be looked at is the start's to refuse
		for _, h := range hazards {
			if h.Unsafe {
				out = append(out, &config.Problem{Key: "buffer.dir", What: fmt.Sprintf("%s is on %s: %s", h.Dir, h.FS, h.What), Remedy: h.Remedy})
			}
		}
	}
	if g := c.Control.Group; g != "" {
		_, err := user.LookupGroup(g)
		bad("control.group", g, err, "make the group, or leave it empty for root only")
	}
	t := c.Transport
	if t.PasswordFile != "" {
		_, err := readSecret(t.PasswordFile)
		bad("transport.password_file", t.PasswordFile, err, "write the password into it, one line, readable only by the sensor")
	}
	if t.Sentinel.PasswordFile != "" {
		_, err := readSecret(t.Sentinel.PasswordFile)
		bad("transport.sentinel.password_file", t.Sentinel.PasswordFile, err, "write the password of the sentinels into it, one line, readable only by the sensor")
	}
	if t.TLS.CAFile != "" {
		pem, err := os.ReadFile(t.TLS.CAFile)
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
			err = fmt.Errorf("%s: no certificate in PEM form in it", t.TLS.CAFile)
		}
		bad("transport.tls.ca_file", t.TLS.CAFile, err, "name the PEM file of the CA")
	}
	if t.TLS.CertFile != "" {
		_, err := tls.LoadX509KeyPair(t.TLS.CertFile, t.TLS.KeyFile)
		bad("transport.tls.cert_file", t.TLS.CertFile, err, "name a PEM certificate and the key that belongs to it")
	}
	return out
}

// readSecret reads the one line of a password file.
func readSecret(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	s := strings.TrimRight(string(b), "\r\n")
	if s == "" {
		return "", fmt.Errorf("%s: is empty", path)
	}
	return s, nil
}

// summarise says in a few lines what the sensor would do.
func (a *app) summarise(path string, c config.Config, settings []config.Setting) error {
	var b strings.Builder
	if path == "" {
		path = "no file: the defaults"
	}
	fmt.Fprintf(&b, "the configuration is good (%s)\n", path)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-9s %s\n", name, fmt.Sprintf(format, args...))
	}
	watch := c.Sensor.Scope.String()
	if watch == "all" {
		watch = "the whole host"
	}
	row("watches", "%s", watch)
	row("keeps", "at most %s in %s", config.FormatSize(c.Buffer.Cap), c.Buffer.Dir)
	if t := agent.Placed(c); t.Address == "" {
		row("sends", "nothing: transport.address is not set")
	} else {
		secure := "without TLS"
		if t.TLS.Enabled {
			secure = "with TLS"
		}
		row("sends", "to %s %s, streams %s", t.Address, secure, joinAnd(t.Streams()))
	}
	if c.HTTP.Listen == "" {
		row("serves", "no HTTP; control socket %s", c.Control.Socket)
	} else {
		row("serves", "http://%s/metrics; control socket %s", c.HTTP.Listen, c.Control.Socket)
	}
	for _, id := range [][2]string{{"case_id", c.Context.CaseID}, {"investigation_id", c.Context.InvestigationID}, {"user_id", c.Context.UserID}} {
		if id[1] != "" {
			row("bound to", "%s %s", id[0], id[1])
		}
	}
	row("hash", "%s", c.Hash())
	for _, s := range settings {
		if s.Source != "default" {
			row("set", "%s = %s  (%s%s)", s.Key, s.Value, s.Source, map[bool]string{true: "; a reload applies it"}[s.Live])
		}
	}
	_, err := fmt.Fprint(a.stdout, b.String())
	return err
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
