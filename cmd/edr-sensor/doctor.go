// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor"
)

// verdict is the outcome of one check.
type verdict string

const (
	pass verdict = "PASS"
	warn verdict = "WARN" // it works, but less well
	fail verdict = "FAIL" // it does not work
)

// finding is one check. Its ID is stable: scripts and documents refer to it.
type finding struct {
	ID      string  `json:"id"`
	Verdict verdict `json:"verdict"`
	Found   string  `json:"found"`
	Remedy  string  `json:"remedy,omitempty"`
}

// doctor examines a host. What it asks the kernel and Redis stands in functions,
// so that its judgement can be tested without either.
type doctor struct {
	root     fs.FS // of the host
	release  func() (string, error)
	hooks    func() ([]sensor.Coverage, error)
	redis    func(context.Context, config.Transport) []finding
	answers  func(context.Context, string) error // of a sensor on a control socket
	explain  func() (config.Config, error)
	file     string // configuration, empty without one
	findings []finding
}

func (a *app) doctorCommand() *cobra.Command {
	var asJSON bool
	var when string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine whether this host can run the sensor, and what to do if not",
		Long: `Examine the kernel, the privileges, the configuration, the state directory and
Redis. Every check has a stable id, a verdict (PASS, WARN, FAIL) and a remedy.

Exit codes: 0 without a FAIL, 1 with one, 2 wrong usage.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &doctor{
				root: os.DirFS("/"), release: kernelRelease, hooks: sensor.Probe, redis: examineRedis, answers: sensorAnswers,
				explain: func() (config.Config, error) { return config.Load(a.configFile(), a.environ) }, file: a.configFile(),
			}
			d.examine(cmd.Context())
			if asJSON {
				enc := json.NewEncoder(a.stdout)
				enc.SetIndent("", "  ")
				if err := enc.Encode(map[string]any{"version": thisBuild().Version, "checks": d.findings}); err != nil {
					return err
				}
			} else if _, err := io.WriteString(a.stdout, d.report(a.colour(when))); err != nil {
				return err
			}
			if d.count(fail) > 0 {
				return &exit{code: exitFailure}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	addColourFlag(cmd, &when)
	return cmd
}

func (d *doctor) add(id string, v verdict, found, remedy string) {
	if v == pass {
		remedy = ""
	}
	d.findings = append(d.findings, finding{id, v, found, remedy})
}

func (d *doctor) count(v verdict) int {
	n := 0
	for _, f := range d.findings {
		if f.Verdict == v {
			n++
		}
	}
	return n
}

func (d *doctor) examine(ctx context.Context) {
	d.kernel()
	d.privileges()
	d.coverage()
	c, err := d.explain()
	if n := len(config.Problems(err)); n > 0 {
		d.add("config.valid", fail, fmt.Sprintf("%s; the first: %s", plural(n, "problem"), config.Problems(err)[0]), "edr-sensor check lists them all")
		return // the rest depends on it
	}
	d.configuration(c)
	d.state(c)
	d.findings = append(d.findings, d.redis(ctx, c.Transport)...)
	if err := d.answers(ctx, c.Control.Socket); err != nil {
		d.add("sensor.running", warn, err.Error(), "start it: systemctl start edr-sensor, or edr-sensor run")
	} else {
		d.add("sensor.running", pass, "a sensor answers on "+c.Control.Socket, "")
	}
}

func (d *doctor) kernel() {
	release, err := d.release()
	major, minor, ok := parseRelease(release)
	switch {
	case err != nil || !ok:
		d.add("kernel.release", warn, fmt.Sprintf("cannot be read: %q %v", release, err), "")
	case major < 5 || major == 5 && minor < 8:
		d.add("kernel.release", fail, release, "use 5.10 or newer; before 5.8 there is no ring buffer")
	case major == 5 && minor < 10:
		d.add("kernel.release", warn, release, "use 5.10 or newer; older ones are not tested")
	default:
		d.add("kernel.release", pass, release, "")
	}

	if d.exists(btfPath) {
		d.add("kernel.btf", pass, "/"+btfPath, "")
	} else {
		d.add("kernel.btf", fail, "/"+btfPath+" is missing", "use a kernel built with CONFIG_DEBUG_INFO_BTF")
	}

	lsm := d.read("sys/kernel/security/lsm")
	if lsm == "" {
		lsm = "not visible (securityfs is not mounted)"
	}
	d.add("kernel.lsm", pass, lsm, "")
	if mode := lockdown(d.read("sys/kernel/security/lockdown")); mode == "confidentiality" {
		d.add("kernel.lockdown", fail, mode, "lockdown=confidentiality forbids programs to read kernel memory: use integrity, or none")
	} else {
		d.add("kernel.lockdown", pass, orDash(mode), "")
	}

	paranoid := d.read("proc/sys/kernel/perf_event_paranoid")
	d.add("kernel.perf_event_paranoid", pass, orDash(paranoid)+" (no hook of the sensor depends on it)", "")
	switch {
	case d.exists("sys/fs/cgroup/cgroup.controllers"):
		d.add("kernel.cgroup", pass, "version 2", "")
	case d.exists("sys/fs/cgroup/unified/cgroup.controllers"):
		d.add("kernel.cgroup", pass, "mixed; version 2 at /sys/fs/cgroup/unified", "")
	default:
		d.add("kernel.cgroup", warn, "no version 2 at /sys/fs/cgroup", "containers are recognised, but sensor.scope: cgroup:… needs version 2")
	}
}

func (d *doctor) exists(path string) bool {
	_, err := fs.Stat(d.root, path)
	return err == nil
}

func (d *doctor) read(path string) string {
	b, err := fs.ReadFile(d.root, path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// lockdown reads "none [integrity] confidentiality".
func lockdown(s string) string {
	_, s, _ = strings.Cut(s, "[")
	s, _, _ = strings.Cut(s, "]")
	return s
}

func (d *doctor) privileges() {
	effective, err := effectiveCaps(d.root)
	if err != nil {
		d.add("privileges.capabilities", fail, err.Error(), "")
		return
	}
	if missing := missingCaps(effective); len(missing) > 0 {
		d.add("privileges.capabilities", fail, "missing "+joinAnd(missing), "run as root, or as the service's user with AmbientCapabilities as in the unit file")
		return
	}
	var weak []string
	for _, c := range []capability{{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE}, {"CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH}} {
		if effective&(1<<c.bit) == 0 {
			weak = append(weak, c.name)
		}
	}
	if len(weak) > 0 {
		d.add("privileges.capabilities", warn, "missing "+joinAnd(weak), "without them, executables of other users may not be hashed and arguments of running processes not be read")
		return
	}
	d.add("privileges.capabilities", pass, "sufficient", "")
}

// coverage attaches every hook for a moment.
func (d *doctor) coverage() {
	if d.count(fail) > 0 {
		d.add("hooks", warn, "not tried", "mend what failed above first")
		return
	}
	coverage, err := d.hooks()
	if err != nil {
		d.add("hooks", fail, err.Error(), "")
	}
	for _, c := range coverage {
		id, why := "hooks."+c.Event, ""
		if len(c.Errs) > 0 {
			why = strings.Join(c.Errs, "; ")
		}
		switch {
		case strings.HasSuffix(c.Hook, syscallHook):
			d.add(id, warn, "degraded, from system calls by "+c.Hook+": "+why, "see Degraded file events in docs/events.md; on kernels since 5.10 with bpf among the security modules (lsm=), or with fentry, they are complete")
		case c.Hook != "" && why != "":
			d.add(id, pass, c.Hook+" (better ones were refused: "+why+")", "")
		case c.Hook != "":
			d.add(id, pass, c.Hook, "")
		case c.Required:
			d.add(id, fail, "no hook: "+why, "use a kernel since 5.10 with CONFIG_DEBUG_INFO_BTF and CONFIG_BPF_EVENTS")
		default:
			d.add(id, warn, "no hook: "+why, "the sensor runs without these events")
		}
	}
}

func (d *doctor) configuration(c config.Config) {
	if d.file == "" {
		d.add("config.valid", pass, "no file: the defaults", "")
	} else {
		d.add("config.valid", pass, d.file, "")
	}
	var loose []string
	for _, path := range []string{d.file, c.Transport.PasswordFile, c.Transport.TLS.KeyFile} {
		if path == "" {
			continue
		}
		// The configuration may be read by all; secrets may not.
		forbidden := fs.FileMode(0o022)
		if path != d.file {
			forbidden = 0o026
		}
		if st, err := os.Stat(path); err == nil && st.Mode().Perm()&forbidden != 0 {
			loose = append(loose, fmt.Sprintf("%s (%v)", path, st.Mode().Perm()))
		}
	}
	if len(loose) > 0 {
		d.add("config.permissions", warn, "open to other users: "+strings.Join(loose, ", "), "chmod go-w the configuration and chmod 0600 the secrets")
	} else {
		d.add("config.permissions", pass, "not open to other users", "")
	}
	if problems := missingFiles(c); len(problems) > 0 {
		var text []string
		for _, p := range problems {
			text = append(text, p.Error())
		}
		d.add("config.files", fail, strings.Join(text, "; "), "make them readable for the sensor")
	} else {
		d.add("config.files", pass, "readable", "")
	}
}

// state looks at the place of the buffer without making anything.
func (d *doctor) state(c config.Config) {
	dir := existing(c.Buffer.Dir)
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		d.add("state.writable", fail, fmt.Sprintf("%s: %v", dir, err), "give the sensor's user this directory, or set buffer.dir and agent.state_dir")
	} else {
		d.add("state.writable", pass, dir, "")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		d.add("state.space", warn, fmt.Sprintf("%s: %v", dir, err), "")
		return
	}
	free := int64(st.Bavail) * st.Bsize
	used := dirSize(c.Buffer.Dir)
	found := fmt.Sprintf("%s free, buffer.cap is %s", bytesText(free), config.FormatSize(c.Buffer.Cap))
	if free+used < c.Buffer.Cap {
		d.add("state.space", fail, found, "make room, or lower buffer.cap: the buffer must be able to grow to it")
	} else {
		d.add("state.space", pass, found, "")
	}
}

// existing is the nearest directory above path that is there.
func existing(path string) string {
	for {
		if st, err := os.Stat(path); err == nil && st.IsDir() || path == "/" || path == "." {
			return path
		}
		path = filepath.Dir(path)
	}
}

func dirSize(dir string) (n int64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
	}
	return n
}

// report writes one line per finding, remedies below.
func (d *doctor) report(colour bool) string {
	b := lineBuilder{colour: colour}
	for _, f := range d.findings {
		paint := map[verdict]string{pass: green, warn: yellow, fail: red}[f.Verdict]
		b.add(paint, string(f.Verdict))
		b.add(plain, fmt.Sprintf("  %-27s %s\n", f.ID, safe(f.Found)))
		if f.Remedy != "" {
			b.add(dim, fmt.Sprintf("      %-27s → %s", "", safe(f.Remedy)))
			b.add(plain, "\n")
		}
	}
	b.add(bold, fmt.Sprintf("%d passed, %s, %d failed", d.count(pass), plural(d.count(warn), "warning"), d.count(fail)))
	b.add(plain, "\n")
	return b.String()
}

// examineRedis connects as the sensor would.
func examineRedis(ctx context.Context, t config.Transport) []finding {
	if t.Address == "" {
		return []finding{{"redis.reachable", warn, "transport.address is not set: events stay in the buffer", "set it to host:port or unix:///path"}}
	}
	client, err := newRedis(t)
	if err != nil {
		return []finding{{"redis.reachable", fail, err.Error(), "edr-sensor check"}}
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, t.Timeout+5*time.Second)
	defer cancel()
	err = client.Ping(ctx).Err()
	switch {
	case err != nil && !isReply(err):
		return []finding{{"redis.reachable", fail, fmt.Sprintf("%s: %v", t.Address, err), "check that it runs, the address, firewalls, and whether the port speaks TLS"}}
	case err != nil && !redis.IsPermissionError(err):
		return []finding{
			{"redis.reachable", pass, t.Address, ""},
			{"redis.auth", fail, err.Error(), "check transport.username and transport.password_file"},
		}
	}
	return append([]finding{{"redis.reachable", pass, t.Address, ""}, {"redis.auth", pass, "accepted", ""}}, examineServer(ctx, client)...)
}

// examineServer judges settings of the server that would lose events silently.
func examineServer(ctx context.Context, client *redis.Client) []finding {
	info, err := client.Info(ctx).Result()
	if err != nil {
		return []finding{{"redis.maxmemory_policy", warn, "cannot be asked: " + err.Error(), "check on the server that it is noeviction"}}
	}
	facts := parseInfo(info)
	return []finding{judgeVersion(facts["redis_version"]), judgePolicy(facts["maxmemory_policy"], facts["maxmemory"]), judgePersistence(facts["aof_enabled"])}
}

func parseInfo(info string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(info) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			m[k] = v
		}
	}
	return m
}

func judgeVersion(version string) finding {
	major, _, ok := parseRelease(version)
	if ok && major < 7 {
		return finding{"redis.version", fail, version, "use Redis 7.0 or Valkey, or newer: the sensor's script needs it"}
	}
	return finding{"redis.version", pass, orDash(version), ""}
}

func judgePolicy(policy, limit string) finding {
	const remedy = "set maxmemory-policy noeviction: with this one a full server deletes whole streams without an error"
	switch {
	case policy == "":
		return finding{"redis.maxmemory_policy", warn, "unknown", "check on the server that it is noeviction"}
	case strings.HasPrefix(policy, "allkeys-") && limit != "0":
		return finding{"redis.maxmemory_policy", fail, policy, remedy}
	case strings.HasPrefix(policy, "allkeys-"):
		return finding{"redis.maxmemory_policy", warn, policy + ", without maxmemory at present", remedy}
	}
	return finding{"redis.maxmemory_policy", pass, policy, ""}
}

func judgePersistence(aof string) finding {
	if aof == "0" {
		return finding{"redis.persistence", warn, "no append-only file", "set appendonly yes: a restart of the server loses what consumers have not read, and the sensor can only send again what its buffer retained"}
	}
	return finding{"redis.persistence", pass, "append-only file", ""}
}

func sensorAnswers(ctx context.Context, socket string) error {
	a := app{}
	c, err := a.control(socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	body, err := c.get(ctx, "/status")
	if err != nil {
		return err
	}
	return body.Close()
}

// capability is one that the sensor uses.
type capability struct {
	name string
	bit  uint
}

// effectiveCaps reads the capability set of this process.
func effectiveCaps(root fs.FS) (uint64, error) {
	b, err := fs.ReadFile(root, "proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("/proc/self/status has no CapEff")
}

// missingCaps lists what loading programs needs; CAP_SYS_ADMIN contains both.
func missingCaps(effective uint64) []string {
	if effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
		return nil
	}
	var missing []string
	for _, c := range []capability{{"CAP_BPF", unix.CAP_BPF}, {"CAP_PERFMON", unix.CAP_PERFMON}} {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	return missing
}

func joinAnd(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(slices.Clone(words[:last]), ", ") + " and " + words[last]
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

// parseRelease reads the first two numbers of a version.
func parseRelease(s string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(s, "%d.%d", &major, &minor)
	return major, minor, err == nil && n == 2
}
