// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const shipped = "../../packaging/config/edr-sensor.yaml"

func write(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "edr-sensor.yaml")
}

// loadText loads one file and returns the problems without its directory.
func loadText(t *testing.T, text string, environ ...string) (Config, string) {
	t.Helper()
	dir := t.TempDir()
	c, err := Load(write(t, dir, map[string]string{"edr-sensor.yaml": text}), environ)
	if err == nil {
		return c, ""
	}
	return c, strings.ReplaceAll(err.Error(), dir+"/", "")
}

func TestShippedFileDocumentsTheDefaults(t *testing.T) {
	data, err := os.ReadFile(shipped)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load(shipped, nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Default(), c); d != "" {
		t.Errorf("as shipped it is not the default (-want +got):\n%s", d)
	}

	// With every "#key: value" uncommented it must set each key to its default.
	live := regexp.MustCompile(`(?m)^( +)#(\w+:)`).ReplaceAllString(string(data), "$1$2")
	path := write(t, t.TempDir(), map[string]string{"edr-sensor.yaml": live})
	c, settings, err := Explain(path, nil)
	if err != nil {
		t.Fatalf("uncommented: %v", err)
	}
	if d := cmp.Diff(Default(), c); d != "" {
		t.Errorf("uncommented it is not the default (-want +got):\n%s", d)
	}
	for _, s := range settings {
		if s.Source == "default" {
			t.Errorf("%s is not mentioned", s.Key)
		}
	}
}

func TestLaterSourcesWin(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, map[string]string{
		"edr-sensor.yaml":        "log: {level: debug}\nsensor:\n  hash:\n    per_second: 7\n    max_size: 1MiB\nhttp:\n",
		"conf.d/10-a.yaml":       "sensor: {hash: {per_second: 8}}\ncontext: {case_id: c-1}\n",
		"conf.d/20-b.yaml":       "context: {case_id: c-2}\nbuffer: {cap: 32MiB}\n",
		"conf.d/30-ignored.yml":  "nonsense",
		"conf.d/.40-hidden.yaml": "nonsense",
	})
	c, settings, err := Explain(path, []string{"EDR_SENSOR_LOG__LEVEL=warn", "EDR_SENSOR_TRANSPORT__TLS__ENABLED=true", "EDR_SENSOR_PORT=tcp://10.0.0.1", "HOME=/root"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Log.Level = "warn"
	want.Sensor.Hash.PerSecond, want.Sensor.Hash.MaxSize = 8, MiB
	want.Context.CaseID = "c-2"
	want.Buffer.Cap, want.Buffer.RetainBytes = 32*MiB, 8*MiB
	want.Transport.TLS.Enabled = true
	if d := cmp.Diff(want, c); d != "" {
		t.Errorf("config (-want +got):\n%s", d)
	}
	got := map[string]string{}
	for _, s := range settings {
		got[s.Key] = strings.TrimPrefix(s.Source, dir+"/")
	}
	for key, src := range map[string]string{
		"log.level": "environment EDR_SENSOR_LOG__LEVEL", "sensor.hash.per_second": "conf.d/10-a.yaml:1:29",
		"sensor.hash.max_size": "edr-sensor.yaml:5:15", "context.case_id": "conf.d/20-b.yaml:1:20", "agent.id": "default",
	} {
		if got[key] != src {
			t.Errorf("%s comes from %q, want %q", key, got[key], src)
		}
	}
}

func TestProblems(t *testing.T) {
	for _, c := range []struct {
		name, text string
		environ    []string
		want       []string
	}{
		{name: "unknown keys", text: "bufer:\n  cap: 1GiB\nbuffer:\n  captain: x\n  Cap: 1GiB\nlisten: x\nzzz: 1\n", want: []string{
			"edr-sensor.yaml:1:1: bufer: is not a known key; did you mean buffer?",
			"edr-sensor.yaml:4:3: buffer.captain: is not a known key",
			"edr-sensor.yaml:5:3: buffer.Cap: is not a known key; did you mean buffer.cap?",
			"edr-sensor.yaml:6:1: listen: is not a known key; did you mean http.listen?",
			"edr-sensor.yaml:7:1: zzz: is not a known key",
		}},
		{name: "types", text: `
sensor:
  fork_events: "yes"
  process_table: lots
  scope: [all]
  hash: on
context:
  case_id: 0123
  user_id: {a: b}
buffer:
  cap: true
  retain_age: 300
  commit_interval: soon
agent: [x]
log:
  level:
`, want: []string{
			`edr-sensor.yaml:3:16: sensor.fork_events: "yes" is a string, not a boolean; write true or false`,
			`edr-sensor.yaml:4:18: sensor.process_table: "lots" is a string, not a whole number; write a number from 1024 to 4194304`,
			`edr-sensor.yaml:5:10: sensor.scope: is a list, not a scope; write all, tree:PID or cgroup:/PATH`,
			`edr-sensor.yaml:6:9: sensor.hash: is a string, but sensor.hash is a section; put its keys on the following lines, indented`,
			`edr-sensor.yaml:8:12: context.case_id: "0123" is a number, not a string; write it in quotes`,
			`edr-sensor.yaml:9:12: context.user_id: is a section, not a string; write a string; "" is the empty one`,
			`edr-sensor.yaml:11:8: buffer.cap: "true" is a boolean, not a size; write a size such as 64MiB`,
			`edr-sensor.yaml:12:15: buffer.retain_age: "300" has no unit; write 300s, 300ms or 300m`,
			`edr-sensor.yaml:13:20: buffer.commit_interval: "soon" is not a duration; write a duration such as 50ms, 5m or 1h30m`,
			`edr-sensor.yaml:14:8: agent: is a list, but agent is a section; put its keys on the following lines, indented`,
			`edr-sensor.yaml:16:3: log.level: is empty, not a string; write a string; "" is the empty one`,
		}},
		{name: "ranges", text: `
buffer: {cap: 12MiB, commit_interval: 1h}
sensor:
  priority_ring: 3MiB
  bulk_ring: 4096GiB
  process_table: 5
  scope: tree:0
log: {level: inof, format: xml}
http: {listen: localhost}
control: {socket: control.sock}
agent: {id: a b}
transport: {db: -1, shard: "{a}", batch_bytes: 64M}
`, want: []string{
			`edr-sensor.yaml:2:15: buffer.cap: "12MiB" is below the minimum of 16MiB; set 16MiB or more`,
			`edr-sensor.yaml:2:39: buffer.commit_interval: "1h" is above the maximum of 5s; set 5s or less`,
			`edr-sensor.yaml:4:18: sensor.priority_ring: "3MiB" is not a power of two of at least a page (4KiB); set 4MiB`,
			`edr-sensor.yaml:5:14: sensor.bulk_ring: "4096GiB" is above the maximum of 1GiB; set 1GiB or less`,
			`edr-sensor.yaml:6:18: sensor.process_table: "5" is below the minimum of 1024; set 1024 or more`,
			`edr-sensor.yaml:7:10: sensor.scope: "tree:0" names no process id from 1 to 4194304; write all, tree:PID or cgroup:/PATH`,
			`edr-sensor.yaml:8:14: log.level: "inof" is not known here; did you mean info? (debug, info, warn, error)`,
			`edr-sensor.yaml:8:28: log.format: "xml" is not known here; write one of auto, console, json, journal`,
			`edr-sensor.yaml:9:16: http.listen: "localhost" is not host:port; write host:port, such as 127.0.0.1:9477`,
			`edr-sensor.yaml:10:19: control.socket: "control.sock" is not an absolute path; start it with /`,
			`edr-sensor.yaml:11:13: agent.id: "a b" contains ' '; use letters, digits and . _ : @ -`,
			`edr-sensor.yaml:12:17: transport.db: "-1" is below the minimum of 0; set 0 or more`,
			`edr-sensor.yaml:12:28: transport.shard: "{a}" contains a brace; remove the braces; the sensor adds them`,
			`edr-sensor.yaml:12:48: transport.batch_bytes: "64M" has the unknown unit M; write 64MiB`,
		}},
		{
			name: "secrets are refused and not repeated", text: "transport:\n  password: hunter2\n  auth_token: hunter2\n  address: redis://u:hunter2@h:6379\nredis_secret: hunter2\n",
			environ: []string{"EDR_SENSOR_TRANSPORT__PASSWORD=hunter2"}, want: []string{
				"edr-sensor.yaml:2:3: transport.password: would put a secret into the configuration; write it to a file that only the sensor can read and name that file: transport.password_file",
				"edr-sensor.yaml:3:3: transport.auth_token: would put a secret into the configuration; write it to a file that only the sensor can read and name that file: transport.password_file",
				"edr-sensor.yaml:4:12: transport.address: contains credentials; set transport.username, and put the password in a file named by transport.password_file",
				"edr-sensor.yaml:5:1: redis_secret: would put a secret into the configuration; write it to a file that only the sensor can read and name that file: transport.password_file",
				"environment EDR_SENSOR_TRANSPORT__PASSWORD: transport.password: would put a secret into the configuration; write it to a file that only the sensor can read and name that file: EDR_SENSOR_TRANSPORT__PASSWORD_FILE",
			},
		},
		{name: "addresses", text: "transport:\n  address: /run/r.sock\n", environ: []string{"EDR_SENSOR_TRANSPORT__ADDRESS=rediss://h:1"}, want: []string{
			`edr-sensor.yaml:2:12: transport.address: "/run/r.sock" is a path; write unix:///run/r.sock`,
			`environment EDR_SENSOR_TRANSPORT__ADDRESS: transport.address: "rediss://h:1" is a URL; write host:port or unix:///path, and set transport.tls.enabled for TLS`,
		}},
		{name: "environment", text: "", environ: []string{
			"EDR_SENSOR_BUFFER__CAP=1", "EDR_SENSOR_BUFFER_CAP=1GiB", "EDR_SENSOR_LOG__LEVL=info", "EDR_SENSOR_SENSOR__FORK_EVENTS=1", "EDR_SENSOR_PORT_6379_TCP=x",
		}, want: []string{
			`environment EDR_SENSOR_BUFFER_CAP: separates section and key by one underscore; write EDR_SENSOR_BUFFER__CAP`,
			`environment EDR_SENSOR_BUFFER__CAP: buffer.cap: "1" is below the minimum of 16MiB; set 16MiB or more`,
			`environment EDR_SENSOR_LOG__LEVL: log.levl: is not a known key; did you mean EDR_SENSOR_LOG__LEVEL?`,
			`environment EDR_SENSOR_SENSOR__FORK_EVENTS: sensor.fork_events: "1" is text, not a boolean; write true or false`,
		}},
		{name: "contradictions", text: "buffer:\n  cap: 16MiB\n  retain_bytes: 12MiB\n  commit_bytes: 2MiB\ntransport:\n  username: u\n  backoff_limit: 100ms\n  tls:\n    key_file: k\n", want: []string{
			`edr-sensor.yaml:3:17: buffer.retain_bytes: 12MiB is more than half of buffer.cap (16MiB), so delivered records would crowd out new ones; set 8MiB or less`,
			`edr-sensor.yaml:4:17: buffer.commit_bytes: 2MiB is more than a sixteenth of buffer.cap (16MiB); set 1MiB or less`,
			`edr-sensor.yaml:7:18: transport.backoff_base: 250ms is longer than transport.backoff_limit (100ms); set 100ms or less`,
			`edr-sensor.yaml:9:15: transport.tls.key_file: is set, but transport.tls.cert_file is not; name the certificate of this key`,
			`edr-sensor.yaml:9:15: transport.tls.enabled: is false, but other keys of transport.tls are set; set it to true, or remove them: the connection would not be encrypted`,
			`edr-sensor.yaml:6:13: transport.username: is set without a password; put the password in a file named by transport.password_file`,
		}},
		{name: "topologies", text: `
transport:
  topology: ring
  shards: 3
  shard: x
`, want: []string{
			`edr-sensor.yaml:3:13: transport.topology: "ring" is not offered: keys that move when a server fails lose track of what was delivered; use cluster or sentinel`,
			`edr-sensor.yaml:4:11: transport.shards: 3 is no power of two; set 1, or 2, 4, ... 256, the same for every sensor of the fleet`,
			`edr-sensor.yaml:5:10: transport.shard: is set, and with more than one of transport.shards it follows from the agent's id; remove one of them`,
		}},
		{name: "trim", text: "transport:\n  trim: minid 0s\n", environ: []string{"EDR_SENSOR_TRANSPORT__TRIM=maxlen"}, want: []string{
			`edr-sensor.yaml:2:9: transport.trim: "minid 0s" is no policy for trimming; write none, maxlen 1000000 or minid 1h`,
			`environment EDR_SENSOR_TRANSPORT__TRIM: transport.trim: "maxlen" is no policy for trimming; write none, maxlen 1000000 or minid 1h`,
		}},
		{name: "several servers", text: "transport:\n  address: h:1,h:2\n  sentinel: {master: m, username: u}\n", want: []string{
			`edr-sensor.yaml:2:12: transport.address: names several servers, and transport.topology is standalone; set transport.topology to cluster or sentinel, or name one`,
			`edr-sensor.yaml:3:22: transport.sentinel.master: is "m", and transport.topology is standalone; set both for Redis behind sentinels, or neither`,
			`edr-sensor.yaml:3:35: transport.sentinel.username: is set without a password; put the password in a file named by transport.sentinel.password_file`,
		}},
		{name: "cluster", text: "transport:\n  topology: cluster\n  address: h:1, :2,\n  db: 1\n", want: []string{
			`edr-sensor.yaml:3:12: transport.address: "h:1, :2," names no host; write host:port, such as 127.0.0.1:2`,
			`edr-sensor.yaml:4:7: transport.db: is not 0, and a cluster has no other; remove it`,
		}},
		{name: "lists", text: `
sensor:
  file:
    per_process: -1
    exclude_paths: [/srv, relative, //]
    exclude_executables: /usr/bin/dpkg
`, environ: []string{"EDR_SENSOR_SENSOR__FILE__EXCLUDE_EXECUTABLES=/bin/a::/bin/b", "EDR_SENSOR_SENSOR__FILE__EXCLUDE_PATHS=/"}, want: []string{
			`edr-sensor.yaml:4:18: sensor.file.per_process: "-1" is below the minimum of 0; set 0 or more`,
			`edr-sensor.yaml:5:20: sensor.file.exclude_paths: has the element "relative", which is not an absolute path; start it with /`,
			`edr-sensor.yaml:6:26: sensor.file.exclude_executables: "/usr/bin/dpkg" is a string, not a list; write a list such as [/srv/build, /var/cache]; [] is the empty one`,
			`environment EDR_SENSOR_SENSOR__FILE__EXCLUDE_EXECUTABLES: sensor.file.exclude_executables: "/bin/a::/bin/b" has the element "", which must not be empty; write a value, or remove the key for the default`,
			`environment EDR_SENSOR_SENSOR__FILE__EXCLUDE_PATHS: sensor.file.exclude_paths: "/" has the element "/", which is everything; set sensor.file.enabled to false instead`,
		}},
		{name: "elements of lists", text: "sensor:\n  file:\n    exclude_paths: [{a: b}]\n    exclude_executables: [[/a]]\n", want: []string{
			`edr-sensor.yaml:3:20: sensor.file.exclude_paths: has an element that is a section, not a string; write a list such as [/srv/build, /var/cache]; [] is the empty one`,
			`edr-sensor.yaml:4:26: sensor.file.exclude_executables: has an element that is a list, not a string; write a list such as [/srv/build, /var/cache]; [] is the empty one`,
		}},
		{name: "twice", text: "log:\n  level: info\nlog:\n  level: debug\n", want: []string{
			`edr-sensor.yaml:3:1: log: is set twice; the first is on line 1; remove one of them`,
		}},
		{name: "syntax", text: "log:\n  level: \"info\n", want: []string{`edr-sensor.yaml:2:10: syntax error: could not find end character of double-quoted text`}},
		{name: "not a map", text: "hello\n", want: []string{`edr-sensor.yaml:1:1: the file is a string, not a set of sections; start with a line such as sensor:`}},
		{name: "two documents", text: "log:\n---\nlog:\n", want: []string{`edr-sensor.yaml:3:4: starts a second document; keep one document per file, or use a drop-in in conf.d`}},
		{name: "anchors", text: "agent: &a {id: x}\ncontext: *a\n", want: []string{
			"edr-sensor.yaml:1:8: uses YAML's Anchor; write the value itself",
			"edr-sensor.yaml:2:10: uses YAML's Alias; write the value itself",
		}},
		{name: "deep", text: "a: " + strings.Repeat("[", 100), want: []string{"edr-sensor.yaml:1:1: nests more than 64 values; check the YAML syntax"}},
		{name: "dashes", text: strings.Repeat("- ", 100), want: []string{"edr-sensor.yaml:1:1: nests more than 64 values; check the YAML syntax"}},
		{name: "large", text: strings.Repeat("#", maxFile+1), want: []string{"edr-sensor.yaml:1:1: is larger than 64 KiB; is this the right file?"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, got := loadText(t, c.text, c.environ...)
			if d := cmp.Diff(strings.Join(c.want, "\n"), got); d != "" {
				t.Errorf("problems (-want +got):\n%s", d)
			}
			if strings.Contains(got, "hunter2") {
				t.Error("a secret is repeated")
			}
		})
	}
}

func TestGoodValues(t *testing.T) {
	c, problems := loadText(t, `
sensor:
  scope: "cgroup:/system.slice/x.service"
  priority_ring: 65536
  file:
    per_process: 0
    exclude_paths: [/srv/build, "/var/cache"]
    exclude_executables:
      - /usr/bin/dpkg
      - '/opt/x y'
buffer: {cap: 1TB, dir: /data/buffer}
transport:
  address: unix:///run/redis/redis.sock
  password_file: redis-password
  linger: 1ms
  timeout: 1m
http: {listen: ""}
context: {case_id: "0123"}
agent:
  state_dir: /srv/edr
`)
	if problems != "" {
		t.Fatal(problems)
	}
	if c.Sensor.Scope != (Scope{Kind: ScopeCgroup, Cgroup: "/system.slice/x.service"}) || c.Sensor.PriorityRing != 65536 ||
		c.Buffer.Cap != 1e12 || c.Buffer.Dir != "/data/buffer" || c.Transport.Linger != time.Millisecond || c.Transport.Timeout != time.Minute ||
		c.HTTP.Listen != "" || c.Context.CaseID != "0123" {
		t.Errorf("got %+v", c)
	}
	files := File{Enabled: true, ExcludePaths: []string{"/srv/build", "/var/cache"}, ExcludeExecutables: []string{"/usr/bin/dpkg", "/opt/x y"}}
	if d := cmp.Diff(files, c.Sensor.File); d != "" {
		t.Errorf("sensor.file (-want +got):\n%s", d)
	}
	if got := c.Transport.EventsKey(); got != "edr:{s000}:events" {
		t.Errorf("events key %s", got)
	}
}

func TestDerivedPaths(t *testing.T) {
	c, problems := loadText(t, "agent: {state_dir: /srv/edr}\n")
	if problems != "" || c.Buffer.Dir != "/srv/edr/buffer" {
		t.Errorf("%s, %s", c.Buffer.Dir, problems)
	}
}

// TestSecretFiles looks for relative names as the service does, which has a directory of
// credentials, and as a shell while the service does not run.
func TestSecretFiles(t *testing.T) {
	const file, credential = "/etc/edr-sensor/", "/run/credentials/"
	for name, c := range map[string]struct {
		have           []string
		service, shell string
	}{
		"a file":         {[]string{file}, file, file},
		"a credential":   {[]string{credential}, credential, file},
		"both":           {[]string{file, credential}, file, file}, // a new file is not hidden by systemd's copy of the old one
		"nothing so far": {nil, file, file},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := root + file
			path := write(t, dir, map[string]string{
				"edr-sensor.yaml":     "transport:\n  address: 127.0.0.1:6379\n  password_file: pw\n  tls: {enabled: true, cert_file: /srv/tls.pem, key_file: key.pem}\n",
				"conf.d/cluster.yaml": "transport: {topology: sentinel, sentinel: {master: m, password_file: s/pw}}\n",
			})
			for _, place := range c.have {
				write(t, root+place, map[string]string{"pw": "x", "key.pem": "x", "s/pw": "x"})
			}
			for environ, where := range map[string]string{"CREDENTIALS_DIRECTORY=" + root + credential: c.service, "CREDENTIALS_DIRECTORY=": c.shell} {
				got, err := Load(path, []string{environ})
				if err != nil {
					t.Fatal(err)
				}
				want := map[string]string{
					"transport.password_file": root + where + "pw", "transport.sentinel.password_file": root + where + "s/pw", "transport.tls.key_file": root + where + "key.pem",
				}
				if d := cmp.Diff(want, got.Transport.SecretFiles()); d != "" {
					t.Errorf("with %s (-want +got):\n%s", environ, d)
				}
			}
		})
	}
	c, problems := loadText(t, "transport: {password_file: /etc/pw}\n", "CREDENTIALS_DIRECTORY=/run")
	if problems != "" || c.Transport.PasswordFile != "/etc/pw" {
		t.Errorf("an absolute name: %s, %s", c.Transport.PasswordFile, problems)
	}
}

func TestUnreadableFiles(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]string{
		filepath.Join(dir, "none.yaml"): filepath.Join(dir, "none.yaml") + ": no such file or directory; name another file with --config, or install the default one",
		dir:                             dir + ": is a directory",
	} {
		if _, err := Load(path, nil); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestDumpReadsBack(t *testing.T) {
	c := Default()
	c.Transport.Username = `quo"te\ ünï`
	c.Sensor.Scope = Scope{Kind: ScopeTree, PID: 42}
	c.Buffer.CommitInterval = 1500 * time.Microsecond
	c.Buffer.Cap = 200*MiB + 1
	c.Transport.PasswordFile = "/etc/p"
	c.Sensor.File.ExcludePaths = []string{"/srv/build", `/a b/c:"ünï"`}
	path := write(t, t.TempDir(), map[string]string{"edr-sensor.yaml": string(c.Dump())})
	got, err := Load(path, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, c.Dump())
	}
	if d := cmp.Diff(c, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestHashNamesTheMeaning(t *testing.T) {
	a, _ := loadText(t, "buffer: {cap: 1GiB}\n")
	b, _ := loadText(t, "buffer:\n  # the same\n  cap: 1024MiB\n")
	other, _ := loadText(t, "buffer: {cap: 2GiB}\n")
	if a.Hash() != b.Hash() || len(a.Hash()) != 64 {
		t.Errorf("%s and %s should be equal", a.Hash(), b.Hash())
	}
	if a.Hash() == other.Hash() {
		t.Error("different configurations have one hash")
	}
}

func TestListsInTheEnvironment(t *testing.T) {
	for value, want := range map[string][]string{"": nil, "/a": {"/a"}, "/a:/b c": {"/a", "/b c"}} {
		c, problems := loadText(t, "sensor: {file: {exclude_paths: [/x]}}\n", "EDR_SENSOR_SENSOR__FILE__EXCLUDE_PATHS="+value)
		if d := cmp.Diff(want, c.Sensor.File.ExcludePaths); d != "" || problems != "" {
			t.Errorf("%q: %s (-want +got):\n%s", value, problems, d)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"level", "format", "cap", "commit_interval"}
	for s, want := range map[string]string{
		"lvel": "level", "fromat": "format", "comit_interval": "commit_interval", "cpa": "cap", "db": "", "banana": "", "": "",
		strings.Repeat("x", 1000): "",
	} {
		if got := nearest(s, words); got != want {
			t.Errorf("nearest(%q) = %q, want %q", s, got, want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	data, err := os.ReadFile(shipped)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(data), "")
	f.Add(regexp.MustCompile(`(?m)^( +)#(\w+:)`).ReplaceAllString(string(data), "$1$2"), "EDR_SENSOR_BUFFER__CAP=1GiB")
	f.Add("a: &x [*x]\n? {b: c}\n: |\n  text\n", "EDR_SENSOR_A__B__C=")
	f.Add("log: !!str {level: 'x'}\n<<: *y\n--- \n", "EDR_SENSOR___")
	f.Add("transport: {username: \"\\u0000\\x41\\L\"}\n", "EDR_SENSOR_TRANSPORT__USERNAME=\xff")
	f.Fuzz(func(t *testing.T, text, env string) {
		environ := []string{env}
		l := newLoader(environ)
		l.bytes("f.yaml", []byte(text))
		l.environment(environ)
		c, err := l.finish()
		if err != nil {
			if err.Error() == "" {
				t.Error("a problem says nothing")
			}
			return
		}
		// What was accepted can be written down and means the same.
		again := newLoader(nil)
		again.bytes("dump.yaml", c.Dump())
		d, err := again.finish()
		if err != nil {
			t.Fatalf("dump: %v\n%s", err, c.Dump())
		}
		if !cmp.Equal(c, d) {
			t.Errorf("dump means something else (-want +got):\n%s", cmp.Diff(c, d))
		}
	})
}

func TestDecisionsKeysFollowTheFirst(t *testing.T) {
	for yaml, want := range map[string][]string{
		"": {"edr:{s000}:events", "decisions:system", "decisions:agents", "decisions:approvals"},
		"{decisions_key: 'decisions:system:{s000}'}":                      {"edr:{s000}:events", "decisions:system:{s000}", "decisions:agents:{s000}", "decisions:approvals:{s000}"},
		"{decisions_key: audit}":                                          {"edr:{s000}:events", "audit", "audit:agents", "audit:approvals"},
		"{decisions_key: 'a:system', agents_key: me}":                     {"edr:{s000}:events", "a:system", "me", "a:approvals"},
		"{agents_key: decisions:system, approvals_key: decisions:system}": {"edr:{s000}:events", "decisions:system"},
	} {
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, []byte("transport: "+yaml+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path, nil)
		if err != nil {
			t.Errorf("%s: %v", yaml, err)
		}
		if d := cmp.Diff(want, c.Transport.Streams()); d != "" {
			t.Errorf("%s (-want +got):\n%s", yaml, d)
		}
		again := filepath.Join(t.TempDir(), "dump.yaml")
		if err := os.WriteFile(again, c.Dump(), 0o600); err != nil {
			t.Fatal(err)
		}
		if d, err := Load(again, nil); err != nil || d.Hash() != c.Hash() {
			t.Errorf("%s: read back: %v", yaml, err)
		}
	}
}

// TestAdoptTakesWhatIsLive changes every setting and looks what a reload takes over:
// those that the table calls live, which are those that the default file marks.
func TestAdoptTakesWhatIsLive(t *testing.T) {
	base, next := Default(), Default()
	other := map[string]string{
		"log.level": "debug", "log.format": "json", "sensor.scope": "tree:1", "transport.topology": "cluster", "transport.ack": "fsync", "transport.trim": "minid 1h", "transport.address": "h:1", "transport.prefix": "p", "transport.shard": "s1", "transport.encoding": "zstd-batch",
		"http.listen": "h:2", "buffer.compression": "zstd", "sensor.priority_ring": "32MiB", "sensor.bulk_ring": "32MiB",
	}
	for _, s := range table(&next) {
		was := s.show()
		for _, text := range []string{other[s.key], "/other", "other", "true", "false", "7", "4321", "77777", "7s", "700ms", "77ms", "33MiB", "99KiB", "2GiB", "warn"} {
			if text == "" {
				continue
			}
			if s.parse(node{shape: shapeText, text: text}) == nil && s.show() != was {
				break
			}
		}
		if s.show() == was {
			t.Fatalf("%s: no other value than %s", s.key, was)
		}
	}
	adopted := base.Adopt(next)
	text, err := os.ReadFile(shipped)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Diff(base, next) {
		inBase := slices.ContainsFunc(Diff(base, adopted), func(x Change) bool { return x.Key == c.Key })
		inNext := slices.ContainsFunc(Diff(adopted, next), func(x Change) bool { return x.Key == c.Key })
		if inBase != c.Live || inNext == c.Live {
			t.Errorf("%s, live %v: adopted %v, left as it was %v", c.Key, c.Live, inBase, inNext)
		}
		// The mark stands above the key, or above its section for all in it.
		path := strings.Split(c.Key, ".")
		marked := false
		for i, name := range path[1:] {
			comment := `#` // before a key; a section has none
			if i < len(path)-2 {
				comment = ``
			}
			block := regexp.MustCompile(`(?m)((?:^ *# .*\n)*)^ *` + comment + name + `:`)
			for _, m := range block.FindAllStringSubmatch(string(text), -1) {
				marked = marked || strings.Contains(m[1], "[reload]")
			}
		}
		if marked != c.Live {
			t.Errorf("%s: live %v, marked [reload] in %s %v", c.Key, c.Live, shipped, marked)
		}
	}
	if len(Diff(base, base)) != 0 || adopted.Hash() == base.Hash() {
		t.Error("a difference where there is none, or none where there is one")
	}
}
