// SPDX-License-Identifier: Apache-2.0

package installed

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/internal/agent"
)

const (
	unit   = "edr-sensor.service"
	config = "/etc/edr-sensor/edr-sensor.yaml"
	confd  = "/etc/edr-sensor/conf.d/"
	// patience is how long an emulated machine on a busy one may take for one thing.
	patience = 2 * time.Minute
)

// Versions of the packages in this directory, as internal/vmtest builds them.
const olderVersion, newerVersion = "9.0.0", "9.1.0"

// machine is the one that the test runs on.
type machine struct {
	t      *testing.T // of the step that runs
	broken bool       // a step failed, and those after it say nothing
	redis  *redis.Client
	seen   *stream
	next   int // number of the next marker
}

func newMachine(t *testing.T) *machine {
	if os.Getenv("EDR_INSTALLED") != "1" {
		t.Skip("runs in the virtual machines of internal/vmtest (make test-systemd)")
	}
	return &machine{t: t}
}

// step is one test. The first that fails is the last.
func (m *machine) step(name string, do func()) {
	outer := m.t
	outer.Helper()
	if m.broken {
		return
	}
	start := time.Now()
	m.broken = !outer.Run(name, func(t *testing.T) {
		m.t = t
		defer func() {
			if t.Failed() {
				t.Logf("the journal's end:\n%s", m.says("journalctl -n 40 --no-pager -o short-precise"))
			}
			t.Logf("took %s", time.Since(start).Round(100*time.Millisecond))
		}()
		do()
	})
	m.t = outer
}

// try runs a shell script and returns all it says.
func (m *machine) try(script string, args ...string) (string, error) {
	cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// run is try for what must not fail.
func (m *machine) run(script string, args ...string) string {
	m.t.Helper()
	out, err := m.try(script, args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// says is try for what may fail.
func (m *machine) says(script string) string {
	out, _ := m.try(script)
	return out
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) remove(path string) {
	m.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) read(path string) string {
	m.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	return string(b)
}

func (m *machine) exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// equal compares what is with what should be.
func (m *machine) equal(what, got, want string) {
	m.t.Helper()
	if got != want {
		m.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// contain wants all of them in a text.
func (m *machine) contain(what, text string, want ...string) {
	m.t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			m.t.Errorf("%s: no %q in\n%s", what, w, text)
		}
	}
}

// await waits for a condition, which says what is instead.
func (m *machine) await(what string, ok func() (instead string)) {
	m.t.Helper()
	tick := time.NewTicker(300 * time.Millisecond) // each look is a few programs that the sensor sees
	defer tick.Stop()
	for end := time.Now().Add(patience); ; <-tick.C {
		instead := ok()
		if instead == "" {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("%s: not within %s, but: %s", what, patience, instead)
		}
	}
}

// show is a property of the unit.
func (m *machine) show(property string) string {
	m.t.Helper()
	return m.run("systemctl show -p " + property + " --value " + unit)
}

func (m *machine) pid() string { m.t.Helper(); return m.show("MainPID") }

// awaitAnother waits until the unit runs as another process than that.
func (m *machine) awaitAnother(pid string) {
	m.t.Helper()
	m.await("another process after "+pid, func() string {
		if got := m.run("systemctl show -p ActiveState,MainPID " + unit); !strings.Contains(got, "ActiveState=active") || strings.Contains(got+"\n", "MainPID="+pid+"\n") {
			return got
		}
		return ""
	})
}

// running wants the unit to run as that process still.
func (m *machine) running(pid string) {
	m.t.Helper()
	m.equal("state", m.show("ActiveState"), "active")
	m.equal("process", m.pid(), pid)
}

// get asks the sensor over HTTP.
func (m *machine) get(path string) (int, string) {
	m.t.Helper()
	c := http.Client{Timeout: patience}
	r, err := c.Get("http://127.0.0.1:9477" + path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// status asks the sensor over its socket.
func (m *machine) status() agent.Status {
	m.t.Helper()
	var s agent.Status
	c := http.Client{Timeout: patience, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", "/run/edr-sensor/control.sock")
	}}}
	r, err := c.Get("http://sensor/status")
	if err != nil {
		m.t.Fatal(err)
	}
	defer r.Body.Close()
	if err := json.NewDecoder(r.Body).Decode(&s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// awaitMode waits for a mode of the sensor.
func (m *machine) awaitMode(want agent.Mode) agent.Status {
	m.t.Helper()
	var s agent.Status
	m.await("mode "+string(want), func() string {
		if s = m.status(); s.Mode != want {
			return fmt.Sprintf("%s, %s", s.Mode, s.Reason)
		}
		return ""
	})
	return s
}

// entries are entries of the unit's journal.
func (m *machine) entries(match ...string) []map[string]any {
	m.t.Helper()
	out := m.run(`exec journalctl --no-pager -o json -u `+unit+` "$@"`, match...)
	var list []map[string]any
	for line := range strings.Lines(out) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			m.t.Fatalf("the journal says %q: %v", line, err)
		}
		list = append(list, e)
	}
	return list
}

// logged waits until what a command finds in the journal has all of them: journald reads what
// a program wrote when it gets the CPU, which may be after that program has ended.
func (m *machine) logged(command string, want ...string) {
	m.t.Helper()
	m.await(fmt.Sprintf("%q in the journal", want), func() string {
		said := m.says(command)
		if slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(said, w) }) {
			return said + "\n." // also when it says nothing
		}
		return ""
	})
}

// serve starts a Redis with the ACL that the package brings, and has the sensor deliver
// to it as the README says, but by a relative name.
func (m *machine) serve() {
	m.t.Helper()
	acl := strings.ReplaceAll(m.read("/usr/share/edr-sensor/redis/edr-sensor.acl"), "CHANGE-ME", "the-password")
	m.write("/var/lib/vm-redis/users.acl", acl)
	m.connect()
	m.run("printf '%s\\n' the-password | install -m 600 /dev/stdin /etc/edr-sensor/redis-password")
	m.write(confd+"redis.yaml", "transport: {address: \"127.0.0.1:6379\", username: edr-sensor, password_file: redis-password}\n")
}

// connect starts Redis and reads what comes to it from the first record on.
func (m *machine) connect() {
	m.t.Helper()
	m.startRedis()
	redis.SetLogger(mute{})
	m.redis = redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", DialTimeout: patience, ReadTimeout: patience, MaxRetries: 20})
	m.await("an answer of Redis", func() string {
		if err := m.redis.Ping(m.t.Context()).Err(); err != nil {
			return err.Error()
		}
		return ""
	})
	m.seen = follow(m.redis)
}

func (m *machine) startRedis() {
	m.t.Helper()
	m.run("systemd-run --quiet --unit=vm-redis -- redis-server --bind 127.0.0.1 --dir /var/lib/vm-redis --aclfile /var/lib/vm-redis/users.acl --save '' --appendonly yes")
}

// mute is a log for what the client says while Redis is away, which is meant.
type mute struct{}

func (mute) Printf(context.Context, string, ...any) {}

// marker runs a program that the sensor must see, and returns its number.
func (m *machine) marker() int {
	m.t.Helper()
	m.next++
	if err := exec.Command("/bin/true", fmt.Sprintf("vm-marker-%d-", m.next)).Run(); err != nil {
		m.t.Fatal(err)
	}
	return m.next
}

// delivered waits until all markers have been delivered, and wants each once.
func (m *machine) delivered() {
	m.t.Helper()
	m.await(fmt.Sprintf("markers 1 to %d in Redis", m.next), func() string {
		if missing := m.seen.missing(m.next); len(missing) > 0 {
			return fmt.Sprintf("missing %v; %s", missing, m.says("edr-sensor status | head -30"))
		}
		return ""
	})
	if twice := m.seen.twice(); len(twice) > 0 {
		m.t.Errorf("delivered more than once: markers %v", twice)
	}
}

// through runs a marker every 200 ms while something happens, and wants all delivered.
func (m *machine) through(do func()) {
	m.t.Helper()
	stop, stopped := make(chan struct{}), make(chan struct{})
	before := m.next
	go func() {
		defer close(stopped)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				m.marker()
			}
		}
	}()
	do()
	close(stop)
	<-stopped
	m.delivered()
	m.t.Logf("%d programs were run meanwhile, each was delivered once", m.next-before)
}

// decided waits for a decision that was not there before, and returns it.
func (m *machine) decided(code string, after int) {
	m.t.Helper()
	m.await("decision "+code, func() string {
		if n := m.seen.decisions(code); n <= after {
			return fmt.Sprintf("%d of them", n)
		}
		return ""
	})
}

// stream remembers what came to Redis. It reads as long as the machine runs.
type stream struct {
	mu      sync.Mutex
	markers map[int]int
	decided map[string]int
	err     error
}

var markerName = regexp.MustCompile(`vm-marker-([0-9]+)-`)

func follow(c *redis.Client) *stream {
	s := &stream{markers: map[int]int{}, decided: map[string]int{}}
	go func() {
		at := map[string]string{"edr:{s000}:events": "0", "decisions:system": "0"}
		for {
			r, err := c.XRead(context.Background(), &redis.XReadArgs{
				Streams: []string{"edr:{s000}:events", "decisions:system", at["edr:{s000}:events"], at["decisions:system"]}, Block: time.Second,
			}).Result()
			for _, x := range r {
				for _, msg := range x.Messages {
					at[x.Stream] = msg.ID
					s.take(msg.Values)
				}
			}
			_ = err // it is away, or has nothing new
		}
	}()
	return s
}

// take looks at one record.
func (s *stream) take(values map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range values {
		text, ok := v.(string)
		if !ok || !strings.HasPrefix(text, "{") {
			continue
		}
		var e struct {
			Class    int    `json:"class_uid"`
			Activity int    `json:"activity_id"`
			Code     string `json:"status_code"`
		}
		found := markerName.FindStringSubmatch(text)
		if found == nil && !strings.Contains(text, `"status_code"`) {
			continue
		}
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			s.err = err
			continue
		}
		if found != nil && e.Class == 1007 && e.Activity == 1 {
			n, _ := strconv.Atoi(found[1]) // of digits
			s.markers[n]++
		}
		if e.Code != "" {
			s.decided[e.Code]++
		}
	}
}

func (s *stream) missing(last int) (list []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := 1; n <= last; n++ {
		if s.markers[n] == 0 {
			list = append(list, n)
		}
	}
	return list
}

func (s *stream) twice() (list []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, times := range s.markers {
		if times > 1 {
			list = append(list, n)
		}
	}
	return list
}

func (s *stream) decisions(code string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.decided[code]
}
