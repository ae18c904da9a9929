// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/agent"
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
	host     sensor.Preflight
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
			d := a.newDoctor()
			d.examine(cmd.Context())
			if asJSON {
				if err := a.writeJSON(map[string]any{"version": thisBuild().Version, "checks": d.findings}); err != nil {
					return err
				}
			} else if _, err := io.WriteString(a.stdout, a.printable(d.report(a.colour(when)))); err != nil {
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

// newDoctor examines this host.
func (a *app) newDoctor() *doctor {
	return &doctor{
		host: sensor.NewPreflight(), hooks: sensor.Probe, redis: examineRedis, answers: sensorAnswers,
		explain: func() (config.Config, error) { return config.Load(a.configFile(), a.environ) }, file: a.configFile(),
	}
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
	d.refusals()
	d.settings(d.coverage())
	c, err := d.explain()
	if n := len(config.Problems(err)); n > 0 {
		d.add("config.valid", fail, fmt.Sprintf("%s; the first: %s", plural(n, "problem"), config.Problems(err)[0]), "edr-sensor check lists them all")
		return // the rest depends on it
	}
	d.configuration(c)
	d.state(c)
	d.findings = append(d.findings, d.redis(ctx, agent.Placed(c))...)
	if err := d.answers(ctx, c.Control.Socket); err != nil {
		d.add("sensor.running", warn, err.Error(), "start it: systemctl start edr-sensor, or edr-sensor run")
	} else {
		d.add("sensor.running", pass, "a sensor answers on "+c.Control.Socket, "")
	}
}

// refusals says what keeps a sensor from running here, and what a missing capability
// costs.
func (d *doctor) refusals() {
	refused := map[string]*sensor.Refusal{}
	for _, r := range d.host.Refusals() {
		refused[r.Check] = r
	}
	judge := func(id, found string) {
		if r := refused[id]; r != nil {
			d.add(id, fail, r.Cause, r.Remedy)
		} else {
			d.add(id, pass, orDash(found), "")
		}
	}
	judge(sensor.CheckRelease, d.host.Release)
	judge(sensor.CheckBTF, "readable")
	judge(sensor.CheckLockdown, d.host.Lockdown())
	var costs, names []string
	for _, lack := range d.host.Lacking() {
		costs, names = append(costs, "without "+lack.Capability+": "+lack.Cost), append(names, lack.Capability)
	}
	if len(costs) > 0 && refused[sensor.CheckCapabilities] == nil {
		d.add(sensor.CheckCapabilities, warn, strings.Join(costs, "; "), "AmbientCapabilities="+strings.Join(names, " ")+" in the systemd unit")
	} else {
		judge(sensor.CheckCapabilities, "sufficient")
	}
	if refused[sensor.CheckMemlock] != nil {
		judge(sensor.CheckMemlock, "")
	} else if refused[sensor.CheckCapabilities] == nil { // else not tried
		judge(sensor.CheckBPF, "allowed")
	}
}

func (d *doctor) exists(path string) bool {
	_, err := fs.Stat(d.host.Root, path)
	return err == nil
}

func (d *doctor) read(path string) string {
	b, err := fs.ReadFile(d.host.Root, path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// settings says what the kernel's settings cost, given the hooks that it allows.
func (d *doctor) settings(coverage []sensor.Coverage) {
	by := func(what string) bool {
		return slices.ContainsFunc(coverage, func(c sensor.Coverage) bool { return strings.Contains(c.Hook, what) })
	}
	degraded := by(syscallHook)
	modules := d.host.SecurityModules()
	switch list := strings.Join(modules, ","); {
	case modules == nil:
		d.add("kernel.lsm", pass, "not visible (securityfs is not mounted); whether bpf is among them was tried", "")
	case slices.Contains(modules, "bpf"):
		d.add("kernel.lsm", pass, list, "")
	case degraded || by("kprobe/"):
		d.add("kernel.lsm", warn, list+": bpf is not among them, and not every event has fentry in its place", "boot with lsm="+list+",bpf")
	case by("fentry/"):
		d.add("kernel.lsm", pass, list+" (bpf is not among them; fentry sees the same here)", "")
	default:
		d.add("kernel.lsm", pass, list+" (bpf is not among them)", "")
	}

	paranoid := d.read("proc/sys/kernel/perf_event_paranoid")
	switch level, _ := strconv.Atoi(paranoid); { // 3 is Debian's and Ubuntu's own
	case level >= 3 && (degraded || by("kprobe/")):
		d.add("kernel.perf_event_paranoid", warn, paranoid+" refuses kprobes to a sensor without CAP_SYS_ADMIN, and file events have no better hook here", "sysctl kernel.perf_event_paranoid=2")
	case level >= 3:
		d.add("kernel.perf_event_paranoid", pass, paranoid+" (refuses kprobes without CAP_SYS_ADMIN; no event needs one here)", "")
	default:
		d.add("kernel.perf_event_paranoid", pass, orDash(paranoid), "")
	}

	switch disabled := d.read("proc/sys/kernel/io_uring_disabled"); {
	case degraded && disabled != "2":
		d.add("kernel.io_uring", warn, "allowed, and file events from system calls do not show what is done through it", "sysctl kernel.io_uring_disabled=2 (since Linux 6.6), or allow better hooks")
	case disabled == "":
		d.add("kernel.io_uring", pass, "-", "")
	default:
		d.add("kernel.io_uring", pass, "io_uring_disabled is "+disabled, "")
	}

	switch {
	case d.exists("sys/fs/cgroup/cgroup.controllers"):
		d.add("kernel.cgroup", pass, "version 2", "")
	case d.exists("sys/fs/cgroup/unified/cgroup.controllers"):
		d.add("kernel.cgroup", pass, "mixed; version 2 at /sys/fs/cgroup/unified", "")
	default:
		d.add("kernel.cgroup", warn, "no version 2 at /sys/fs/cgroup", "containers are recognised, but sensor.scope: cgroup:… needs version 2")
	}
}

// coverage attaches every hook for a moment; what it returns is nil if it did not.
func (d *doctor) coverage() []sensor.Coverage {
	if d.count(fail) > 0 {
		d.add(sensor.CheckHooks, warn, "not tried", "mend what failed above first")
		return nil
	}
	coverage, err := d.hooks()
	if refusal := (*sensor.Refusal)(nil); errors.As(err, &refusal) {
		d.add(refusal.Check, fail, refusal.Cause, refusal.Remedy)
	} else if err != nil {
		d.add(sensor.CheckHooks, fail, err.Error(), "")
	}
	for _, c := range coverage {
		id, why := "hooks."+c.Event, ""
		if len(c.Errs) > 0 {
			why = strings.Join(c.Errs, "; ")
		}
		switch {
		case strings.HasSuffix(c.Hook, syscallHook):
			d.add(id, warn, "degraded, from system calls by "+c.Hook+", blind to "+c.Blind+": "+why, "see Degraded file events in docs/events.md; on kernels since 5.10 with bpf among the security modules (lsm=), or with fentry, they are complete")
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
	return coverage
}

func (d *doctor) configuration(c config.Config) {
	if d.file == "" {
		d.add("config.valid", pass, "no file: the defaults", "")
	} else {
		d.add("config.valid", pass, d.file, "")
	}
	var loose []string
	for _, path := range append([]string{d.file}, slices.Sorted(maps.Values(c.Transport.SecretFiles()))...) {
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
	d.place(c)
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

// place says whether what the buffer has synced is safe there.
func (d *doctor) place(c config.Config) {
	hazards, err := buffer.Hazards(c.Buffer.Dir)
	if err != nil {
		d.add("state.place", warn, err.Error(), "")
		return
	}
	for _, h := range hazards {
		state := warn
		if h.Unsafe && !c.Buffer.AllowUnsafe {
			state = fail
		}
		d.add("state.place", state, fmt.Sprintf("%s is on %s: %s", h.Dir, h.FS, h.What), h.Remedy)
	}
	if len(hazards) == 0 {
		d.add("state.place", pass, c.Buffer.Dir, "")
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

// report writes one line per finding, remedies below; one that helps several in a row is
// below the last.
func (d *doctor) report(colour bool) string {
	b := lineBuilder{colour: colour}
	for i, f := range d.findings {
		paint := map[verdict]string{pass: green, warn: yellow, fail: red}[f.Verdict]
		b.add(paint, string(f.Verdict))
		b.add(plain, fmt.Sprintf("  %-27s %s\n", f.ID, safe(f.Found)))
		if last := i+1 == len(d.findings) || d.findings[i+1].Remedy != f.Remedy; last && f.Remedy != "" {
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

// parseRelease reads the first two numbers of a version.
func parseRelease(s string) (major, minor int, ok bool) {
	n, err := fmt.Sscanf(s, "%d.%d", &major, &minor)
	return major, minor, err == nil && n == 2
}

func joinAnd(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(slices.Clone(words[:last]), ", ") + " and " + words[last]
}
