// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf/ocsftest"
	"github.com/aurorasoc/edr-sensor/transport"
)

// require skips with the exact reason, or fails where everything is required.
func require(t *testing.T, ok bool, missing string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("EDR_REQUIRE_ALL") != "" {
		t.Fatalf("EDR_REQUIRE_ALL: %s", missing)
	}
	t.Skip(missing)
}

func requireHost(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: this test loads programs into the kernel")
	}
	require(t, os.Geteuid() == 0, "loading BPF programs needs root")
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	require(t, err == nil, "this kernel has no BTF (/sys/kernel/btf/vmlinux)")
	_, err = exec.LookPath("redis-server")
	require(t, err == nil, "no redis-server (Debian package redis-server)")
}

var build struct {
	once sync.Once
	path string
	err  error
}

// binary builds edr-sensor as a user would, once.
func binary(t *testing.T) string {
	t.Helper()
	build.once.Do(func() {
		dir, err := scratchDir()
		if err != nil {
			build.err = err
			return
		}
		build.path = filepath.Join(dir, "edr-sensor")
		cmd := exec.Command("go", "build", "-trimpath", "-o", build.path, "github.com/aurorasoc/edr-sensor/cmd/edr-sensor")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

// host is one sensor installation: directories and configuration that outlive
// the process.
type host struct {
	t      *testing.T
	dir    string
	config string
	env    []string
	proc   *exec.Cmd
	log    *lines

	manager *manager // that the sensor runs under, if any
	binary  string   // that runs, if it is not the usual one
	left    bool     // Redis did not get all in the last stop
}

func newHost(t *testing.T, w *workload, redisAddr, extra string) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir(), log: &lines{}}
	h.config = filepath.Join(h.dir, "edr-sensor.yaml")
	yaml := fmt.Sprintf(`
agent: {state_dir: %[1]s/state}
log: {format: json, level: debug}
control: {socket: %[1]s/control.sock}
http: {listen: "127.0.0.1:0"}
%[4]s
transport: {address: "%[3]s"}
`, h.dir, 0, redisAddr, extra)
	if !strings.Contains(extra, "sensor:") {
		yaml += fmt.Sprintf("sensor: {scope: \"tree:%d\"}\n", w.pid())
	}
	if err := os.WriteFile(h.config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if h.proc != nil {
			h.kill9()
		}
		checkLog(t, h.log.all(), nil)
		if t.Failed() {
			t.Logf("last lines of the sensor's log:\n%s", h.log.tail(40))
		}
	})
	return h
}

// start runs the sensor and waits until it sees events.
func (h *host) start() {
	h.t.Helper()
	h.launch()
	eventually(h.t, 60*time.Second, "the sensor is attached", func() bool {
		if h.proc.ProcessState != nil {
			return false
		}
		s, err := h.status()
		return err == nil && s.Mode != agent.Starting && !s.Sensor.Beat.IsZero()
	})
}

// launch runs it.
func (h *host) launch() {
	h.t.Helper()
	path := h.binary
	if path == "" {
		path = binary(h.t)
	}
	if h.manager != nil {
		h.proc = h.manager.command(path, "run", "--config", h.config)
	} else {
		h.proc = exec.Command(path, "run", "--config", h.config)
		h.proc.Env = os.Environ()
	}
	if hazards, err := buffer.Hazards(h.dir); err == nil && len(hazards) > 0 { // temporary files may be in memory
		h.proc.Env = append(h.proc.Env, "EDR_SENSOR_BUFFER__ALLOW_UNSAFE=true")
	}
	h.proc.Env = append(h.proc.Env, h.env...)
	h.proc.Stderr = h.log
	start := h.proc.Start
	if h.manager != nil {
		start = func() error { // which keeps what is passed on
			h.manager.mu.Lock()
			defer h.manager.mu.Unlock()
			return h.proc.Start()
		}
	}
	if err := start(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) kill9() {
	_ = h.proc.Process.Kill()
	_ = h.proc.Wait()
	h.proc = nil
}

// stop asks for an orderly end and returns the exit code.
func (h *host) stop() int {
	h.t.Helper()
	from := len(h.log.all())
	if err := h.proc.Process.Signal(syscall.SIGTERM); err != nil {
		h.t.Fatal(err)
	}
	_ = h.proc.Wait()
	code := h.proc.ProcessState.ExitCode()
	h.proc, h.left = nil, false
	for _, l := range h.log.all()[from:] {
		if bytes.Contains(l, []byte("records stay in the buffer")) {
			h.left = true
			h.t.Logf("not all was delivered by the stop: %s", l)
		}
	}
	return code
}

// finish is a stop after which Redis has everything. A stop waits for it for seconds, which a
// busy machine may exceed, and leaves the rest to the next start: then there is one. It returns
// how often the sensor was stopped, and wants the exit code 0.
func (h *host) finish() (stops int) {
	h.t.Helper()
	for stops = 1; ; stops++ {
		if code := h.stop(); code != 0 {
			h.t.Errorf("exit code %d after SIGTERM, want 0", code)
		}
		if !h.left {
			return stops
		}
		if stops == 5 {
			h.t.Fatal("no stop delivers everything")
		}
		h.start()
		h.delivered(60 * time.Second)
	}
}

func (h *host) control() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(h.dir, "control.sock"))
	}}}
}

func (h *host) status() (s agent.Status, err error) {
	r, err := h.control().Get("http://sensor/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

func (h *host) mustStatus() agent.Status {
	h.t.Helper()
	s, err := h.status()
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// get fetches a page of the sensor's HTTP server.
func (h *host) get(path string) (int, string) {
	h.t.Helper()
	addr := ""
	eventually(h.t, 30*time.Second, "the log tells the HTTP address", func() bool {
		for _, l := range h.log.all() {
			var line struct{ Msg, HTTP string }
			if json.Unmarshal(l, &line) == nil && line.HTTP != "" {
				addr = line.HTTP
			}
		}
		return addr != ""
	})
	r, err := http.Get("http://" + addr + path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// readyz waits until /readyz answers with this code and all of these texts.
func (h *host) readyz(code int, texts ...string) {
	h.t.Helper()
	eventually(h.t, 30*time.Second, fmt.Sprintf("/readyz answers %d %q", code, texts), func() bool {
		got, body := h.get("/readyz")
		return got == code && !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(body, s) })
	})
}

// lines collects a process's output.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) all() [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out [][]byte
	s := bufio.NewScanner(bytes.NewReader(bytes.Clone(l.buf.Bytes())))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		out = append(out, bytes.Clone(s.Bytes()))
	}
	return out
}

func (l *lines) tail(n int) string {
	all := l.all()
	return string(bytes.Join(all[max(0, len(all)-n):], []byte("\n")))
}

// checkLog wants every line of a sensor's log to say which sensor and which part
// of it speaks, and to carry the context given.
func checkLog(t *testing.T, lines [][]byte, context map[string]string) {
	t.Helper()
	agentID := ""
	for i, l := range lines {
		var f map[string]any
		if err := json.Unmarshal(l, &f); err != nil {
			// A process that is killed may end within its last line, and the next
			// start writes on behind it.
			if !bytes.HasPrefix(l, []byte(`{"level"`)) && !bytes.HasPrefix(l, []byte("edr-sensor: ")) && !bytes.HasPrefix(l, []byte("Try: ")) {
				t.Errorf("line %d of the log is no JSON: %s", i+1, l)
			}
			continue
		}
		id, _ := f["agent_id"].(string)
		if agentID == "" {
			agentID = id
		}
		if part, _ := f["component"].(string); id == "" || id != agentID || part == "" || f["unbound"] != nil {
			t.Errorf("context is missing in line %d of the log: %s", i+1, l)
		}
		for k, want := range context {
			if f[k] != want {
				t.Errorf("%s is not %s in line %d of the log: %s", k, want, i+1, l)
			}
		}
	}
}

// eventually waits for a condition, looking every few milliseconds.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(within)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// record is one entry of a stream, as a consumer gets it.
type record struct {
	stream string
	agent  string
	epoch  string
	seq    uint64
	data   []byte
	event  ocsfEvent
}

// ocsfEvent is the part of an event that the tests look at.
type ocsfEvent struct {
	Metadata struct {
		EventCode   string                         `json:"event_code"`
		Correlation string                         `json:"correlation_uid"`
		Tags        []struct{ Name, Value string } `json:"tags"`
		Sequence    uint64                         `json:"sequence"`
		UID         string                         `json:"uid"`
	} `json:"metadata"`
	Time         int64   `json:"time"`
	From         int64   `json:"start_time"`
	To           int64   `json:"end_time"`
	ActivityID   int     `json:"activity_id"`
	ActivityName string  `json:"activity_name"`
	StatusCode   string  `json:"status_code"`
	Message      string  `json:"message"`
	ExitCode     int     `json:"exit_code"`
	Count        uint64  `json:"count"`
	Process      process `json:"process"`
	Actor        struct {
		Process process `json:"process"`
	} `json:"actor"`
	Traffic struct {
		In  int `json:"bytes_in"`
		Out int `json:"bytes_out"`
	} `json:"cumulative_traffic"`
	Src      endpoint `json:"src_endpoint"`
	Dst      endpoint `json:"dst_endpoint"`
	File     file     `json:"file"`
	Result   file     `json:"file_result"`
	Unmapped struct {
		Suppressed struct {
			ByType map[string]uint64 `json:"by_type"`
		} `json:"suppressed"`
		Lost struct {
			ByType map[string]uint64 `json:"by_type"`
			Ranges []struct {
				Cause       string
				First, Last uint64
				Count       uint64
			} `json:"ranges"`
		} `json:"lost"`
	} `json:"unmapped"`
}

type process struct {
	PID       int    `json:"pid"`
	UID       string `json:"uid"`
	Path      string `json:"path"`
	CmdLine   string `json:"cmd_line"`
	Container struct {
		UID     string `json:"uid"`
		Runtime string `json:"runtime"`
	} `json:"container"`
	Parent *process `json:"parent_process"`
}

type file struct {
	Path string `json:"path"`
}

type endpoint struct {
	IP   string `json:"ip"`
	Port int    `json:"port"`
}

// readStreams returns every entry of the streams, of all if none is named, each
// stream in its order.
func readStreams(t *testing.T, c *redis.Client, keys ...string) []record {
	t.Helper()
	var out []record
	if len(keys) == 0 {
		keys = []string{eventsKey, decisionsKey, agentsKey, approvalsKey}
	}
	for _, key := range keys {
		from := "-"
		for {
			msgs, err := c.XRangeN(t.Context(), key, from, "+", 500).Result()
			if err != nil {
				t.Fatal(err)
			}
			if len(msgs) == 0 {
				break
			}
			for _, m := range msgs {
				out = append(out, newRecord(t, key, m))
			}
			from = "(" + msgs[len(msgs)-1].ID
		}
	}
	return out
}

const (
	eventsKey    = "edr:{s000}:events"
	decisionsKey = "decisions:system"
	agentsKey    = "decisions:agents"
	approvalsKey = "decisions:approvals"
)

func newRecord(t *testing.T, key string, m redis.XMessage) record {
	t.Helper()
	str := func(k string) string { s, _ := m.Values[k].(string); return s }
	seq, err := strconv.ParseUint(str("seq"), 10, 64)
	if err != nil {
		t.Fatalf("entry %s: seq: %v", m.ID, err)
	}
	r := record{stream: key, agent: str("agent"), epoch: str("epoch"), seq: seq, data: []byte(str("data"))}
	if err := json.Unmarshal(r.data, &r.event); err != nil {
		t.Fatalf("entry %s: %v", m.ID, err)
	}
	if r.event.Metadata.Sequence != seq || r.event.Metadata.UID != str("id") {
		t.Errorf("entry %s: seq %d and id %q, but the event says %d and %q", m.ID, seq, str("id"), r.event.Metadata.Sequence, r.event.Metadata.UID)
	}
	return r
}

// verify checks what every consumer relies on: in each stream ascending seqs,
// over both each seq at most once, events valid OCSF, and every seq that is
// missing named in a loss record, and only those. It returns the named seqs.
// Validating takes milliseconds: of a kind that comes thousands of times, events that
// differ in numbers, it is done for the first 1,000 and every fiftieth one after them.
func verify(t *testing.T, recs []record) (lost uint64) {
	t.Helper()
	valid := ocsftest.Validator(t)
	type epoch struct {
		seen, named map[uint64]int
		last        map[string]uint64
		top         uint64
	}
	epochs := map[string]*epoch{}
	invalid := 0
	kinds := map[string]int{}
	for _, r := range recs {
		e := epochs[r.epoch]
		if e == nil {
			e = &epoch{map[uint64]int{}, map[uint64]int{}, map[string]uint64{}, 0}
			epochs[r.epoch] = e
		}
		if r.seq <= e.last[r.stream] {
			t.Errorf("%s: seq %d after %d", r.stream, r.seq, e.last[r.stream])
		}
		e.last[r.stream] = r.seq
		e.top = max(e.top, r.seq)
		e.seen[r.seq]++
		for _, l := range r.event.Unmapped.Lost.Ranges {
			for s := l.First; s != 0 && s <= l.Last; s++ {
				e.named[s]++
			}
		}
		kind := r.event.Metadata.EventCode
		if kinds[kind]++; kinds[kind] > 1000 && kinds[kind]%50 != 0 {
			continue
		}
		if err := valid(r.data); err != nil {
			if invalid++; invalid <= 3 {
				t.Errorf("seq %d is not valid OCSF: %v\n%s", r.seq, err, r.data[:min(len(r.data), 2000)])
			}
		}
	}
	if invalid > 3 {
		t.Errorf("%d events are not valid OCSF", invalid)
	}
	for name, e := range epochs {
		missing, wrong := 0, 0
		for s := uint64(1); s <= e.top; s++ {
			switch seen, named := e.seen[s], e.named[s]; {
			case seen > 1:
				t.Errorf("epoch %s: seq %d is there %d times", name, s, seen)
			case seen == 0 && named == 0:
				missing++
			case seen == 1 && named > 0:
				wrong++
			case seen == 0:
				lost++
			}
		}
		if missing > 0 || wrong > 0 {
			t.Errorf("epoch %s: of %d seqs %d are missing and not named, %d are named lost but delivered", name, e.top, missing, wrong)
		}
	}
	return lost
}

// delivered waits until Redis has everything that is in the buffer.
func (h *host) delivered(within time.Duration) agent.Status {
	h.t.Helper()
	return allDelivered(h.t, within, h.status)
}

// allDelivered waits until Redis has everything that was seen. An answer is not of one moment:
// the buffer is looked at first, and what leaves a ring for it before that is looked at is in
// neither. So it takes two answers that say the same.
func allDelivered(t *testing.T, within time.Duration, status func() (agent.Status, error)) (s agent.Status) {
	t.Helper()
	var before agent.Status
	had := false // before said that all is delivered
	eventually(t, within, "everything is delivered", func() bool {
		var err error
		s, err = status()
		has := err == nil && s.Transport.State == string(transport.Connected) && s.Transport.Acked == s.Buffer.Last &&
			s.Sensor.Rings["priority"].Used == 0 && s.Sensor.Rings["bulk"].Used == 0
		again := has && had && s.Buffer.Last == before.Buffer.Last
		before, had = s, has
		return again
	})
	return s
}
