// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// manager is a service manager as far as the sensor needs one: it keeps descriptors that
// it is sent and passes them on to the next process, as systemd does.
type manager struct {
	t      *testing.T
	socket string
	fd     int
	done   chan struct{}

	mu       sync.Mutex
	store    []stored
	watchdog int // times that it was fed
}

type stored struct {
	name string
	file *os.File
}

func startManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, socket: filepath.Join(t.TempDir(), "notify"), done: make(chan struct{})}
	var err error
	if m.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		err = unix.Bind(m.fd, &unix.SockaddrUnix{Name: m.socket})
	}
	if err != nil {
		t.Fatal(err)
	}
	go m.receive()
	t.Cleanup(func() {
		_ = unix.Shutdown(m.fd, unix.SHUT_RDWR)
		<-m.done
		_ = unix.Close(m.fd)
		m.forget()
	})
	return m
}

func (m *manager) receive() {
	defer close(m.done)
	b, rights := make([]byte, 4096), make([]byte, 4096)
	for {
		n, rn, _, _, err := unix.Recvmsg(m.fd, b, rights, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		var files []*os.File
		if messages, err := unix.ParseSocketControlMessage(rights[:rn]); err == nil {
			for i := range messages {
				fds, _ := unix.ParseUnixRights(&messages[i])
				for _, fd := range fds {
					files = append(files, os.NewFile(uintptr(fd), "kept"))
				}
			}
		}
		m.handle(string(b[:n]), files)
	}
}

func (m *manager) handle(message string, files []*os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fields := map[string]string{}
	for line := range strings.SplitSeq(message, "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			fields[k] = v
		}
	}
	name := fields["FDNAME"]
	switch {
	case fields["FDSTORE"] == "1":
		for _, f := range files {
			m.store = append(m.store, stored{name, f})
		}
		return
	case fields["FDSTOREREMOVE"] == "1":
		kept := m.store[:0]
		for _, s := range m.store {
			if s.name == name {
				_ = s.file.Close()
			} else {
				kept = append(kept, s)
			}
		}
		m.store = kept
	case fields["WATCHDOG"] == "1":
		m.watchdog++
	}
	for _, f := range files { // of a barrier: closing it is the answer
		_ = f.Close()
	}
}

// forget closes what is kept, as when the service was stopped.
func (m *manager) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.store {
		_ = s.file.Close()
	}
	m.store = nil
}

func (m *manager) kept() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.store)
}

func (m *manager) fed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.watchdog
}

// command is one that the manager starts, with all that is kept.
func (m *manager) command(path string, args ...string) *exec.Cmd {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	// The shell becomes the sensor: LISTEN_PID is the one that it will have.
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, path}, args...)...)
	for _, s := range m.store {
		names = append(names, s.name)
		cmd.ExtraFiles = append(cmd.ExtraFiles, s.file)
	}
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.socket, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return cmd
}

// otherBinary is the sensor built with another object: the same programs, whose file has
// bytes behind its end.
func otherBinary(t *testing.T, version string) string {
	t.Helper()
	dir, err := scratchDir()
	if err != nil {
		t.Fatal(err)
	}
	replace := map[string]string{}
	for _, name := range []string{"sensor_x86_bpfel.o", "sensor_arm64_bpfel.o"} {
		path, err := filepath.Abs(filepath.Join(moduleRoot, "bpf", name))
		if err != nil {
			t.Fatal(err)
		}
		object, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), append(object, "another version"...), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		replace[path] = filepath.Join(dir, name)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "edr-sensor")
	cmd := exec.Command("go", "build", "-trimpath", "-overlay", filepath.Join(dir, "overlay.json"), "-ldflags", "-s -w -X main.version="+version, "-o", path, "github.com/aurorasoc/edr-sensor/cmd/edr-sensor")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// stream makes numbered execs at a rate, and numbered connections of the workload's and to
// it in between, until it is ended.
type stream struct {
	stop               chan struct{}
	done               chan error
	execs, connections int // made
}

func startStream(w *workload, perSecond int, out, in string) *stream {
	const batch = 5
	s := &stream{stop: make(chan struct{}), done: make(chan error)}
	go func() {
		for {
			select {
			case <-s.stop:
				s.done <- nil
				return
			default:
			}
			w.do(order{Op: "exec", From: s.execs, N: batch, PerSec: perSecond})
			s.execs += batch
			other := make(chan error, 1)
			go func() { other <- connects(order{Addr: in, From: s.connections, N: batch}) }()
			w.do(order{Op: "connect", Addr: out, From: s.connections, N: batch})
			if err := <-other; err != nil {
				<-s.stop
				s.done <- err
				return
			}
			s.connections += batch
		}
	}()
	return s
}

func (s *stream) end() error {
	close(s.stop)
	return <-s.done
}

// TestTakeOver restarts the sensor again and again under a stream of numbered execs and
// connections: by kill -9 at any moment, and by a version with other kernel programs in its
// place. Each number arrives exactly once.
func TestTakeOver(t *testing.T) {
	requireHost(t)
	const kills, swaps, perSecond = 20, 5, 50
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	m := startManager(t)
	h.manager = m
	other := otherBinary(t, "2")
	h.start()
	_, page := h.get("/metrics")
	first := metricstest.Parse(page)
	kept := m.kept()
	if kept < 20 || kept > 256 {
		t.Errorf("%d descriptors are kept", kept)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveTraffic(l)
	served := w.do(order{Op: "listen"}).Addr
	h.delivered(30 * time.Second)
	s := startStream(w, perSecond, l.Addr().String(), served)
	for i := range kills + swaps {
		if i%5 == 4 { // an upgrade: an orderly stop, and another version
			h.binary = map[bool]string{true: "", false: other}[h.binary != ""]
			if code := h.stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		} else {
			// Anywhere in a commit, a delivery or a takeover.
			pause := time.NewTimer(time.Duration(i*37%200) * time.Millisecond)
			<-pause.C
			h.kill9()
		}
		h.start()
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "no more is kept than before", func() bool { return m.kept() == kept })
	h.delivered(30 * time.Second)
	_, page = h.get("/metrics")
	metricstest.Moved(t, first, metricstest.Parse(page), "sensor_takeovers_total")
	if code := h.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs named lost", lost)
	}
	missing, twice := numbersOf(recs, 0, s.execs)
	if len(missing)+len(twice) > 0 {
		t.Errorf("of %d execs %d are missing: %v; %d are there again: %v", s.execs, len(missing), missing, len(twice), twice)
	}
	// A run that was killed before its first commit has left no record of itself.
	codes := decisionCodes(recs)
	if n := codes["TAKEN_OVER"]; n != codes["START"]-1 || n < swaps || codes["BLIND_KILLED"]+codes["BLIND_STOPPED"]+codes["KEEP_FAILED"] != 0 {
		t.Errorf("decisions by code %v, want TAKEN_OVER in each run but the first and none that is blind", codes)
	}
	checkConnections(t, recs, w.pid(), port(t, l.Addr().String()), port(t, served), s.connections)
	t.Logf("%d execs and twice %d connections through %d kills and %d swaps, %d descriptors kept", s.execs, s.connections, kills, swaps, kept)
}

// TestTakeOverInterrupted ends the sensor, by SIGTERM and by SIGKILL in turns, while it takes
// over from a version with other kernel programs: nothing of what those saw may be passed over
// by the one that did not live to read it.
func TestTakeOverInterrupted(t *testing.T) {
	requireHost(t)
	const rounds = 20
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	h.manager = startManager(t)
	versions := []string{binary(t), otherBinary(t, "2")}
	h.binary = versions[0]
	h.start()
	h.delivered(30 * time.Second)
	end := numberedExecs(w)
	for i := range rounds {
		h.kill9()
		h.binary = versions[(i+1)%2]
		h.launch()
		// From where it opens the buffer to where it lets go of the old programs.
		pause := time.NewTimer(50*time.Millisecond + time.Duration(i*37%400)*time.Millisecond)
		<-pause.C
		if i%2 == 0 {
			_ = h.proc.Process.Signal(unix.SIGTERM)
			_ = h.proc.Wait()
		}
		h.kill9()
		began := time.Now().UnixMilli()
		h.start()
		eventually(t, 30*time.Second, "the run has left a record of itself", func() bool { // before it is killed
			return slices.ContainsFunc(readStreams(t, server.Client(), decisionsKey), func(r record) bool {
				return r.event.StatusCode == "TAKEN_OVER" && r.event.To >= began
			})
		})
	}
	made := end()
	h.delivered(30 * time.Second)
	h.stop()
	recs := readStreams(t, server.Client())
	verify(t, recs)
	missing, twice := numbersOf(recs, 1, made)
	if len(missing)+len(twice) > 0 {
		t.Errorf("of %d execs %d are missing: %v; %d are there again: %v", made, len(missing), missing, len(twice), twice)
	}
	explain(t, recs, missing)
	codes := decisionCodes(recs)
	if codes["BLIND_KILLED"]+codes["BLIND_STOPPED"]+codes["KEEP_FAILED"] != 0 {
		t.Errorf("decisions by code %v, want none that is blind", codes)
	}
	replaced, stopped := 0, codes["STOP"]
	for _, r := range recs {
		if r.event.StatusCode == "TAKEN_OVER" && strings.Contains(string(r.data), `"after":"replaced"`) {
			replaced++
		}
	}
	if replaced < rounds/4 || stopped == 0 {
		t.Errorf("%d runs replaced programs, %d were stopped in order: too few to tell", replaced, stopped)
	}
	t.Logf("%d execs through %d rounds, %d runs replaced programs, %d were stopped in order", made, rounds, replaced, stopped)
}

// TestTakeOverControl restarts without what was kept: the gap is there, and named.
func TestTakeOverControl(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), "")
	m := startManager(t)
	h.manager = m
	h.start()
	w.do(order{Op: "exec", From: 1, N: 10})
	h.delivered(30 * time.Second)
	h.kill9()
	m.forget()
	w.do(order{Op: "exec", From: 11, N: 10})
	h.start()
	w.do(order{Op: "exec", From: 21, N: 10})
	h.delivered(30 * time.Second)
	h.stop()
	recs := readStreams(t, server.Client())
	verify(t, recs)
	if missing, twice := numbersOf(recs, 1, 30); len(missing) != 10 || missing[0] != 11 || len(twice) != 0 {
		t.Errorf("missing %v, twice %v; want the ten that nobody saw", missing, twice)
	}
	if codes := decisionCodes(recs); codes["TAKEN_OVER"] != 0 || codes["BLIND_KILLED"] != 1 {
		t.Errorf("decisions by code %v, want 1 BLIND_KILLED", codes)
	}
}

// TestWatchdog has the disk stand still: the sensor says so, and does not feed the watchdog
// until it moves again.
func TestWatchdog(t *testing.T) {
	requireHost(t)
	mount := loopMount(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), fmt.Sprintf(`buffer: {dir: "%s/buffer", cap: 64MiB, compression: none}`, mount))
	h.manager = startManager(t)
	h.start()
	grows := func() {
		t.Helper()
		n := h.manager.fed()
		eventually(t, 30*time.Second, "the watchdog is fed", func() bool { return h.manager.fed() > n+1 })
	}
	h.readyz(200, "ready: online")
	grows()
	thaw := freeze(t, mount)
	w.do(order{Op: "exec", From: 1, N: 1})
	eventually(t, time.Minute, "the sensor is stuck", func() bool {
		code, body := h.get("/readyz")
		return code == 503 && strings.Contains(body, "stuck at stage buffer")
	})
	// One may be on its way.
	n := h.manager.fed()
	wait := time.NewTimer(3 * time.Second)
	<-wait.C
	if more := h.manager.fed() - n; more > 1 {
		t.Errorf("the watchdog was fed %d times while the buffer does not move", more)
	}
	thaw()
	h.readyz(200, "ready: online")
	grows()
	h.delivered(30 * time.Second)
	h.stop()
	recs := readStreams(t, server.Client())
	verify(t, recs)
	if missing, twice := numbersOf(recs, 1, 1); len(missing)+len(twice) > 0 {
		t.Errorf("missing %v, twice %v", missing, twice)
	}
}

// numbersOf says which of the numbered execs are missing, and which are there twice.
func numbersOf(recs []record, from, n int) (missing, twice []int) {
	seen := map[string]int{}
	for _, r := range recs {
		if r.event.Metadata.EventCode != "process.exec" {
			continue
		}
		for word := range strings.FieldsSeq(r.event.Process.CmdLine) {
			if strings.HasPrefix(word, "edr-e2e-") {
				seen[word]++
			}
		}
	}
	for i := from; i < from+n; i++ {
		switch seen[marker(i)] {
		case 0:
			missing = append(missing, i)
		case 1:
		default:
			twice = append(twice, i)
		}
	}
	return missing, twice
}

func decisionCodes(recs []record) map[string]int {
	codes := map[string]int{}
	for _, r := range recs {
		if r.stream == decisionsKey {
			codes[r.event.StatusCode]++
		}
	}
	return codes
}

// TestTakeOverLoss overflows a ring while no sensor runs: what had no room is reported by
// the next one with its number, and by no other after it.
func TestTakeOverLoss(t *testing.T) {
	requireHost(t)
	const execs = 300
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), fmt.Sprintf(`sensor: {scope: "tree:%d", priority_ring: 128KiB}`, w.pid()))
	h.manager = startManager(t)
	h.start()
	w.do(order{Op: "exec", From: 1, N: 5})
	h.delivered(30 * time.Second)
	h.kill9()
	w.do(order{Op: "exec", From: 6, N: execs - 5})
	runs := 0
	start := func() { // until the run has left a record of itself
		t.Helper()
		h.start()
		runs++
		eventually(t, 30*time.Second, fmt.Sprintf("%d runs have taken over", runs), func() bool {
			return decisionCodes(readStreams(t, server.Client(), decisionsKey))["TAKEN_OVER"] == runs
		})
	}
	for range 3 { // each may end before it counted
		start()
		h.delivered(30 * time.Second)
		h.kill9()
	}
	var recs []record
	var named, records uint64
	count := func() bool {
		recs, named, records = readStreams(t, server.Client()), 0, 0
		for _, r := range recs {
			if r.event.StatusCode == "RINGBUF_FULL" {
				records++
				named += r.event.Unmapped.Lost.ByType["process.exec"]
			}
		}
		return records > 0
	}
	start()
	eventually(t, 30*time.Second, "the loss is told", count)
	h.kill9()
	start() // and not again: an end in order counts, too
	h.delivered(30 * time.Second)
	h.stop()
	count()
	verify(t, recs)
	missing, twice := numbersOf(recs, 1, execs)
	if len(missing) == 0 || len(twice) > 0 || named != uint64(len(missing)) || records != 1 {
		t.Errorf("%d execs are missing, %d are there twice, %d are named lost in %d records", len(missing), len(twice), named, records)
	}
	if codes := decisionCodes(recs); codes["TAKEN_OVER"] != runs {
		t.Errorf("decisions by code %v, want %d TAKEN_OVER", codes, runs)
	}
	t.Logf("%d of %d execs had no room", named, execs)
}
