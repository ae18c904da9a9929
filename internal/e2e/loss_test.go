// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/transport"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

const smallBuffer = `buffer: {dir: "%s", cap: 16MiB, retain_bytes: 1MiB, compression: none}`

// TestTruncation lets the buffer overflow while Redis is away: the file keeps
// its size, and afterwards what was received and what was truncated are
// together all that was produced, each seq accounted for by name.
func TestTruncation(t *testing.T) {
	requireHost(t)
	for _, killed := range []bool{false, true} {
		t.Run(map[bool]string{false: "redis away", true: "redis away and sensor killed"}[killed], func(t *testing.T) {
			w := startWorkload(t)
			// What Redis has confirmed must survive its death here: this test is
			// about losses of the buffer's own making.
			server := redistest.Start(t, redistest.Options{AOF: "always"})
			dir := filepath.Join(t.TempDir(), "buffer")
			h := newHost(t, w, server.Addr(), fmt.Sprintf(smallBuffer, dir))
			h.start()
			w.do(order{Op: "exec", From: 1, N: 50})
			h.delivered(30 * time.Second)
			_, page := h.get("/metrics")
			before := metricstest.Parse(page)
			server.Kill9()
			w.do(order{Op: "exec", From: 90, N: 1}) // an idle sensor asks every 30 s only
			h.readyz(200, "ready: buffering", "(transport_connected)")

			file := filepath.Join(dir, "q.db")
			fill := func() {
				w.do(order{Op: "exec", From: 100, N: 700, ArgSize: 60 << 10})
				if fi, err := os.Stat(file); err != nil || fi.Size() > 16<<20 {
					t.Errorf("buffer file %v, %v; want at most 16 MiB", fi, err)
				}
			}
			filled := make(chan struct{})
			go func() { // what is looked for is over soon after it
				defer close(filled)
				fill()
			}()
			eventually(t, 90*time.Second, "records are truncated", func() bool { return h.mustStatus().Buffer.Truncated > 0 })
			h.readyz(503, "not ready: truncating", "(buffer_truncations_total)", "(transport_connected)")
			<-filled
			_, page = h.get("/metrics")
			metricstest.Moved(t, before, metricstest.Parse(page), "buffer_truncations_total")
			if killed {
				before := h.mustStatus().Buffer.Truncated
				done := make(chan struct{})
				go func() {
					defer close(done)
					w.do(order{Op: "exec", From: 1000, N: 300, ArgSize: 60 << 10})
				}()
				eventually(t, 30*time.Second, "truncation goes on", func() bool { return h.mustStatus().Buffer.Truncated > before })
				h.kill9()
				<-done
				h.start()
				fill()
			}
			server.Restart()
			h.delivered(90 * time.Second)
			// The newest loss record may name the last truncations a moment later.
			eventually(t, 30*time.Second, "no loss is unnamed", func() bool { return h.mustStatus().Buffer.Losses == 0 })
			s := h.delivered(60 * time.Second)
			h.readyz(200, "ready: online")
			h.finish()

			recs := readStreams(t, server.Client())
			named := verify(t, recs)
			if s.Buffer.Truncated == 0 || named != s.Buffer.Truncated {
				t.Errorf("%d seqs are named lost, buffer_truncations_total is %d", named, s.Buffer.Truncated)
			}
			top := uint64(0)
			for _, r := range recs {
				top = max(top, r.seq)
			}
			if !killed { // who is killed as a decision is dropped cannot write it again
				checkTold(t, recs, h.log.all(), "START", "MODE", "TRUNCATION_STARTED", "TRUNCATION_ENDED")
			}
			if got := uint64(len(recs)); got+s.Buffer.Truncated != top {
				t.Errorf("received %d + truncated %d = %d, produced %d", got, s.Buffer.Truncated, got+s.Buffer.Truncated, top)
			}
		})
	}
}

// TestDiskStall freezes the file system under the buffer for two seconds at
// 5,000 events a second: the rings hold what the disk cannot take.
func TestDiskStall(t *testing.T) {
	requireHost(t)
	mount := loopMount(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	h := newHost(t, w, server.Addr(), fmt.Sprintf(`buffer: {dir: "%s/buffer", cap: 64MiB, compression: none}`, mount))
	h.start()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveTraffic(l)
	served := w.do(order{Op: "listen"}).Addr

	// 1,250 connections a second, of which the sensor sees one end as connect
	// and close, and as many the other way: 5,000 events a second.
	const perSec, seconds = 1250, 5
	start, before := time.Now(), h.mustStatus().Buffer.Last
	done := make(chan error, 1)
	go func() { done <- connects(order{Addr: served, N: perSec * seconds, PerSec: perSec}) }()
	out := make(chan struct{})
	go func() {
		defer close(out)
		w.do(order{Op: "connect", Addr: l.Addr().String(), N: perSec * seconds, PerSec: perSec})
	}()
	eventually(t, 30*time.Second, "events flow", func() bool { return h.mustStatus().Buffer.Last > 2000 })
	thaw := freeze(t, mount)
	timer := time.NewTimer(2 * time.Second)
	<-timer.C
	thaw()
	<-out
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	offered := time.Since(start)
	s := h.delivered(60 * time.Second)
	t.Logf("%.0f events a second for %v, two of them with a frozen disk", float64(s.Buffer.Last-before)/offered.Seconds(), offered.Round(100*time.Millisecond))
	h.stop()
	for kind, n := range s.Sensor.Lost {
		if n != 0 {
			t.Errorf("%d %s events lost in the kernel", n, kind)
		}
	}
	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs named lost", lost)
	}
	checkConnections(t, recs, w.pid(), port(t, l.Addr().String()), port(t, served), perSec*seconds)
}

// loopMount makes a small ext4 of its own, so that it can be frozen.
func loopMount(t *testing.T) string {
	t.Helper()
	image, mount := filepath.Join(t.TempDir(), "disk.img"), t.TempDir()
	for _, cmd := range [][]string{
		{"truncate", "-s", "160M", image},
		{"mkfs.ext4", "-q", "-F", image},
		{"mount", "-o", "loop", image, mount},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			require(t, false, fmt.Sprintf("a loop-mounted file system: %v: %v: %s", cmd, err, out))
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mount).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return mount
}

const (
	fiFreeze = 0xc0045877 // FIFREEZE, linux/fs.h
	fiThaw   = 0xc0045878
)

// freeze stops every write and fsync on the file system until thaw is called.
func freeze(t *testing.T, mount string) (thaw func()) {
	t.Helper()
	d, err := os.Open(mount)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(d.Fd()), fiFreeze, 0); err != nil {
		t.Fatalf("freeze %s: %v", mount, err)
	}
	thawed := false
	thaw = func() {
		if thawed {
			return
		}
		thawed = true
		if err := unix.IoctlSetInt(int(d.Fd()), fiThaw, 0); err != nil {
			t.Errorf("thaw %s: %v", mount, err)
		}
		_ = d.Close()
	}
	t.Cleanup(thaw)
	return thaw
}

// TestRefusedRecord has something before Redis that breaks every request with a certain word
// in it, as what inspects traffic does. The one event with it is named as lost, in the stream and
// in the log, with its copy on disk; all others arrive. It stays lost when the word is free to
// pass, through a kill and a Redis that has to be given everything again.
func TestRefusedRecord(t *testing.T) {
	requireHost(t)
	const word = "EICAR-STANDARD-ANTIVIRUS"
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	c := server.Client()
	defer c.Close()
	proxy := redistest.StartProxy(t, server.Addr(), redistest.Faults{})
	h := newHost(t, w, proxy.Addr(), "buffer: {retain_age: 1h}")
	h.env = []string{"EDR_SENSOR_TRANSPORT__BACKOFF_BASE=10ms", "EDR_SENSOR_TRANSPORT__BACKOFF_LIMIT=100ms"}
	h.start()
	h.delivered(30 * time.Second)
	proxy.SetFaults(redistest.Faults{Word: word})
	dir := filepath.Join(t.TempDir(), word)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w.do(order{Op: "exec", From: 1, N: 50})
	w.do(order{Op: "create", Dir: dir, N: 1})
	w.do(order{Op: "exec", From: 51, N: 50})
	eventually(t, 60*time.Second, "the decision is delivered", func() bool {
		return len(decisions(t, readStreams(t, c, decisionsKey), decisionsKey, "RECORD_REFUSED")) > 0 && h.mustStatus().Transport.State == string(transport.Connected)
	})
	s := h.delivered(60 * time.Second)
	refusal := s.Transport.Refusal
	if refusal == nil {
		t.Fatalf("status tells of no refusal: %+v", s.Transport)
	}
	if held, err := os.ReadFile(refusal.Path); err != nil || !strings.Contains(string(held), word) {
		t.Errorf("the copy is %d bytes, %v", len(held), err)
	}

	// What has a line by now has to be on disk: a kill would take its record away.
	h.readyz(200, "ready: online")
	h.delivered(30 * time.Second)
	h.kill9()
	proxy.SetFaults(redistest.Faults{})
	if err := c.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	h.start()
	w.do(order{Op: "exec", From: 101, N: 50})
	h.delivered(60 * time.Second)
	eventually(t, 30*time.Second, "no loss is unnamed", func() bool { return h.mustStatus().Buffer.Losses == 0 })
	h.delivered(30 * time.Second)
	h.finish()
	recs := readStreams(t, c)
	told := decisions(t, recs, decisionsKey, "RECORD_REFUSED")
	if lost := verify(t, recs); lost != uint64(len(told)) || lost == 0 {
		t.Errorf("%d seqs are named lost, %d were refused", lost, len(told))
	}
	for _, r := range recs {
		if strings.Contains(string(r.data), word) && r.stream == eventsKey {
			t.Errorf("seq %d is delivered, which was refused", r.seq)
		}
	}
	checkTold(t, recs, h.log.all(), "START", "MODE", "RECORD_REFUSED")
	t.Logf("%d records refused by %d resets, seq %d of %d bytes", len(told), proxy.Refused.Load(), refusal.Seq, refusal.Bytes)
}
