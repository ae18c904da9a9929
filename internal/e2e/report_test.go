// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestReport makes reports of a sensor that runs, and of the same when it is down. What
// a process was called is in them only when that is asked for.
func TestReport(t *testing.T) {
	requireHost(t)
	const password = "correct-horse-battery"
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{Config: map[string]string{"requirepass": password}, Password: password})
	h := newHost(t, w, server.Addr(), "")
	h.password(password)
	h.env = []string{"DEPLOY_TOKEN=staple-in-the-environment"}
	h.start()
	w.do(order{Op: "exec", From: 1, N: 5})
	h.delivered(30 * time.Second)

	check := func(files map[string]string, has map[string]string) {
		t.Helper()
		for name, want := range has {
			if !strings.Contains(files[name], want) {
				t.Errorf("%s does not have %s: %.2000s", name, want, files[name])
			}
		}
		for name, text := range files {
			for _, secret := range []string{password, "staple-in-the-environment"} {
				if strings.Contains(text, secret) {
					t.Errorf("%s has the secret %s", name, secret)
				}
			}
			if strings.Contains(text, marker(3)) && name != "events.ndjson" {
				t.Errorf("%s names a process of the host", name)
			}
		}
	}
	files := h.report()
	check(files, map[string]string{
		"status.json": `"agent_id"`, "metrics.txt": "\nagent_build_info{", "config.json": `"transport.password_file"`, "config-running.json": `"config_sha256"`,
		"log.ndjson": `"msg":"started"`, "decisions.ndjson": `"START"`, "doctor.json": `"redis.auth"`, "host.json": `"btf"`,
		"process.txt": "VmRSS:", "bpf.txt": "prog_tag:", "manifest.json": "--events was not given",
	})
	for line := range strings.Lines(files["log.ndjson"]) {
		var l struct {
			AgentID string `json:"agent_id"`
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil || l.AgentID == "" {
			t.Errorf("%v: line of the log: %s", err, line)
		}
	}
	h.finish()
	check(h.report("--events"), map[string]string{
		"manifest.json": "no sensor answers", "decisions.ndjson": `"STOP"`, "events.ndjson": marker(3), "config.json": "transport.password_file",
	})
}

// password has the sensor use one for Redis.
func (h *host) password(p string) {
	h.t.Helper()
	file := filepath.Join(h.dir, "redis-password")
	yaml, err := os.ReadFile(h.config)
	if err == nil {
		err = errors.Join(os.WriteFile(file, []byte(p+"\n"), 0o600),
			os.WriteFile(h.config, []byte(strings.Replace(string(yaml), "transport: {", "transport: {password_file: redis-password, ", 1)), 0o600))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// report makes a report and returns its files.
func (h *host) report(args ...string) map[string]string {
	h.t.Helper()
	cmd := exec.Command(binary(h.t), append([]string{"report", "--config", h.config, "--output", "-"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	gz, err := gzip.NewReader(out)
	if err != nil {
		h.t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(gz); ; {
		f, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			h.t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			h.t.Fatal(err)
		}
		files[filepath.Base(f.Name)] = string(text)
	}
	if err := cmd.Wait(); err != nil {
		h.t.Fatal(err)
	}
	return files
}
