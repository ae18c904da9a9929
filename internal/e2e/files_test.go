// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// changeFiles does one of each in dir, which must be empty.
func changeFiles(dir string) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	old := time.Unix(1_600_000_000, 0)
	return errors.Join(
		os.Mkdir(at("folder"), 0o750),
		os.WriteFile(at("new"), []byte("content"), 0o600),
		os.Chmod(at("new"), 0o640),
		os.Chown(at("new"), 12, 34),
		os.Truncate(at("new"), 3),
		os.Chtimes(at("new"), old, old),
		os.Link(at("new"), at("second name")),
		os.Symlink("nowhere", at("symlink")),
		os.Rename(at("new"), at("renamed")),
		os.Remove(at("renamed")),
	)
}

// createFiles makes n empty files in dir.
func createFiles(dir string, n int) error {
	for i := range n {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// TestFiles changes files by whatever hooks this kernel has: every change must be in
// the stream with its path and its process, what is excluded must not, and what is
// left out of a flood must be counted.
func TestFiles(t *testing.T) {
	requireHost(t)
	const perProcess, flood = 50, 500
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	dir := t.TempDir()
	excluded, flooded, changed := filepath.Join(dir, "excluded"), filepath.Join(dir, "flooded"), filepath.Join(dir, "changed")
	for _, d := range []string{excluded, flooded, changed} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h := newHost(t, w, server.Addr(), fmt.Sprintf("sensor: {scope: \"tree:%d\", file: {per_process: %d, exclude_paths: [%q]}}", w.pid(), perProcess, excluded))
	h.start()
	w.do(order{Op: "files", Dir: changed})
	w.do(order{Op: "create", Dir: excluded, N: 1})
	w.do(order{Op: "create", Dir: flooded, N: flood})
	h.delivered(30 * time.Second)
	eventually(t, 30*time.Second, "the status tells what was left out", func() bool {
		return h.mustStatus().Sensor.Suppressed["file.create"] > 1 // of the flood, too
	})
	_, page := h.get("/metrics")
	if !strings.Contains(page, `sensor_suppressed_events_total{kind="file.create"}`) {
		t.Error("no metric of what was left out")
	}
	h.finish()

	recs := readStreams(t, server.Client())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs are named lost, want none", lost)
	}
	seen := map[string][]string{} // event code → paths, those of a result behind
	created := 0
	var leftOut uint64
	for _, r := range recs {
		ev := r.event
		if ev.Metadata.EventCode == "sensor.suppressed" {
			leftOut += ev.Unmapped.Suppressed.ByType["file.create"]
		}
		if !strings.HasPrefix(ev.Metadata.EventCode, "file.") {
			continue
		}
		if ev.Actor.Process.PID != w.pid() || ev.Actor.Process.Path == "" {
			t.Errorf("%s %s by %+v", ev.Metadata.EventCode, ev.File.Path, ev.Actor.Process)
		}
		if strings.HasPrefix(ev.File.Path, excluded) {
			t.Errorf("%s of an excluded path: %s", ev.Metadata.EventCode, ev.File.Path)
		}
		if strings.HasPrefix(ev.File.Path, flooded) && ev.Metadata.EventCode == "file.create" {
			created++
		}
		path, ok := strings.CutPrefix(ev.File.Path, changed+"/")
		if !ok {
			continue
		}
		if result, ok := strings.CutPrefix(ev.Result.Path, changed+"/"); ok && result != path {
			path += " → " + result
		}
		seen[ev.Metadata.EventCode] = append(seen[ev.Metadata.EventCode], path)
	}
	if uint64(created)+leftOut != flood+1 { // the excluded one is left out as well
		t.Errorf("%d files created and %d left out, want %d together", created, leftOut, flood+1)
	}
	if len(seen["file.write"]) == 0 { // no hook on this kernel
		seen["file.write"] = seen["file.open_write"]
	}
	for code, path := range map[string]string{
		"file.mkdir": "folder", "file.create": "new", "file.write": "new", "file.chmod": "new", "file.chown": "new", "file.truncate": "new",
		"file.timestomp": "new", "file.link": "second name", "file.symlink": "symlink", "file.rename": "new → renamed", "file.delete": "renamed",
	} {
		if n := len(slices.DeleteFunc(slices.Clone(seen[code]), func(p string) bool { return p != path })); n != 1 {
			t.Errorf("%s of %s is there %d times, want 1; all: %q", code, path, n, seen[code])
		}
	}
}
