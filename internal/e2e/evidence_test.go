// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/evidence"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// export gets evidence out of the buffer into a file, and returns it by seq; the seqs
// must ascend without a gap from first on. It expects the exit code 0.
func (h *host) export(first uint64, args ...string) (recs map[uint64][]byte, sum string) {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "evidence.ndjson")
	said := h.run(append([]string{"buffer", "export", "--to", file}, args...)...)
	data, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatal(err)
	}
	hash := sha256.Sum256(data)
	sum = hex.EncodeToString(hash[:])
	if !strings.Contains(said, "sha256 "+sum+"\n") || strings.Contains(said, "missing") {
		h.t.Errorf("export %v says %q, the file's hash is %s", args, said, sum)
	}
	recs = map[uint64][]byte{}
	for line := range bytes.Lines(data) {
		var e ocsfEvent
		if err := json.Unmarshal(line, &e); err != nil {
			h.t.Fatalf("%v: %s", err, line)
		}
		if want := first + uint64(len(recs)); e.Metadata.Sequence != want && len(args) == 0 {
			h.t.Fatalf("seq %d, want %d", e.Metadata.Sequence, want)
		}
		recs[e.Metadata.Sequence] = bytes.TrimSuffix(line, []byte("\n"))
	}
	return recs, sum
}

// TestEvidence gets evidence out of the buffer while events flow and Redis is away, and
// again from the files of the sensor once that is killed. Each line is byte for byte what
// the streams deliver later, and who got it is on record there.
func TestEvidence(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "always"})
	h := newHost(t, w, server.Addr(), "buffer: {retain_age: 1h, compression: none}")
	h.start()
	w.do(order{Op: "exec", From: 1, N: 50})
	tail := h.delivered(30 * time.Second).Buffer.Acked
	server.Kill9()
	flow := func(from int) (end func()) {
		done := make(chan struct{})
		before := h.mustStatus().Buffer.Last
		go func() {
			defer close(done)
			w.do(order{Op: "exec", From: from, N: 600})
		}()
		eventually(t, 30*time.Second, "events flow", func() bool { return h.mustStatus().Buffer.Last > before+50 })
		return func() { <-done }
	}

	end := flow(1000)
	live, sum := h.export(1)
	execs, _ := h.export(1, "--kind", "exec", "--since", "1h")
	if out := h.run("buffer", "verify"); !strings.Contains(out, "nothing is wrong") {
		t.Errorf("verify: %s", out)
	}
	var info evidence.Info
	if err := json.Unmarshal([]byte(h.run("buffer", "info", "--json")), &info); err != nil || info.First != 1 || info.Acked < tail || info.Unsent == 0 || info.Cap != h.mustStatus().Buffer.Cap {
		t.Errorf("info: %+v, %v", info, err)
	}
	end()
	both := 0 // events flow: the later export has newer ones
	for seq := range execs {
		if live[seq] != nil {
			both++
		}
	}
	if uint64(len(live)) <= tail || both < 50 || both >= len(live) {
		t.Errorf("%d records, %d of them of kind exec; %d had been delivered before", len(live), both, tail)
	}

	end = flow(3000)
	h.kill9()
	end()
	// The files as the dead sensor has left them.
	killed, _ := h.export(1)
	if len(killed) <= len(live) {
		t.Errorf("%d records of the files, %d while it ran", len(killed), len(live))
	}
	if out := h.run("buffer", "verify"); !strings.Contains(out, "nothing is wrong") || !strings.Contains(out, "no sensor answers") {
		t.Errorf("verify: %s", out)
	}

	h.start()
	if server.Restart(); h.delivered(60*time.Second).Buffer.Truncated > 0 {
		t.Error("records were truncated")
	}
	h.finish()
	streams := map[uint64]record{}
	exported, started := 0, 0
	recs := readStreams(t, server.Client())
	for _, r := range recs {
		streams[r.seq] = r
		switch r.event.StatusCode {
		case "EXPORT_STARTED":
			started++
		case "EVIDENCE_EXPORTED":
			exported++
			if exported == 1 && (r.stream != approvalsKey || r.event.Count != uint64(len(live)) || !bytes.Contains(r.data, []byte(sum))) {
				t.Errorf("of an export of %d records with the hash %s it says, on %s: %s", len(live), sum, r.stream, r.data)
			}
		}
	}
	verify(t, recs)
	if started != 2 || exported != 2 {
		t.Errorf("%d exports began and %d ended on record, want 2", started, exported)
	}
	for name, all := range map[string]map[uint64][]byte{"the running sensor": live, "the running sensor, execs": execs, "the files": killed} {
		for seq, line := range all {
			if r, ok := streams[seq]; !ok || !bytes.Equal(r.data, line) {
				t.Fatalf("%s: seq %d is %.200s, delivered was %.200s (%t)", name, seq, line, r.data, ok)
			}
		}
	}
	// What has been delivered is still there.
	kept, _ := h.export(1)
	for seq, r := range streams {
		if !bytes.Equal(r.data, kept[seq]) {
			t.Fatalf("seq %d is %.200s in the buffer, delivered was %.200s", seq, kept[seq], r.data)
		}
	}
	// A damaged copy is found to be that, and its sensor's own file is not.
	copied := filepath.Join(t.TempDir(), "q.db")
	data, err := os.ReadFile(info.Path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, killed[tail+1])
	if at < 0 {
		t.Fatal("a record is not in the file as it is")
	}
	data[at+10] ^= 1
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary(t), "buffer", "verify", copied)
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !bytes.Contains(out, []byte("damaged: chunk of seq ")) {
		t.Errorf("verify of a damaged copy: %v, %s", err, out)
	}
	h.run("buffer", "verify")
}
