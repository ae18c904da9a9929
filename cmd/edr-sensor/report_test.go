// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// unpack reads a report; its manifest apart.
func unpack(t *testing.T, archive []byte) (files map[string]string, m manifest) {
	t.Helper()
	gz, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	files = map[string]string{}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		dir, name := filepath.Split(h.Name)
		if h.Mode != 0o600 || !strings.HasPrefix(dir, "edr-sensor-report-") || strings.Count(dir, "/") != 1 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		files[name] = string(data)
	}
	if err := json.Unmarshal([]byte(files["manifest.json"]), &m); err != nil {
		t.Fatalf("manifest: %v:\n%s", err, files["manifest.json"])
	}
	delete(files, "manifest.json")
	for _, f := range m.Files {
		sum := sha256.Sum256([]byte(files[f.Name]))
		if text, ok := files[f.Name]; !ok || len(text) != f.Bytes || hex.EncodeToString(sum[:]) != f.SHA256 || f.About == "" {
			t.Errorf("%s: the manifest says %+v", f.Name, f)
		}
	}
	if len(m.Files) != len(files) {
		t.Errorf("%d files, the manifest names %d", len(files), len(m.Files))
	}
	return files, m
}

type manifest struct {
	Files   []reported `json:"files"`
	LeftOut []omission `json:"left_out"`
}

func (m manifest) omits(what, why string) bool {
	return slices.ContainsFunc(m.LeftOut, func(o omission) bool { return o.What == what && strings.Contains(o.Why, why) })
}

func (m manifest) redacted(name string) int {
	for _, f := range m.Files {
		if f.Name == name {
			return f.Redacted
		}
	}
	return -1
}

// TestReportHasNoSecrets has a sensor that tells every secret in every answer.
func TestReportHasNoSecrets(t *testing.T) {
	dir := t.TempDir()
	const (
		inFile    = `k7"Zp&q/ü9`
		inRunning = "other-Password-of-the-running-one"
		inURL     = "urlSecret42"
		inEnviron = "environSecret42"
		inArgv    = "argvSecret42"
	)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("pw", inFile+"\n", 0o600)
	running := write("pw2", inRunning+"\n", 0o600)
	all := strings.Join([]string{
		inFile, inRunning, inEnviron, base64.StdEncoding.EncodeToString([]byte(inFile)),
		"redis://u:" + inURL + "@h", "curl --token " + inArgv, "PASSWORD=" + inArgv,
	}, " ; ")
	quoted, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(pattern, text string) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, text)
			if pattern == "/tap" {
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			}
		})
	}
	answer("/status", fmt.Sprintf(`{"agent_id":"a","buffer":{"error":%s}}`, quoted))
	answer("/metrics", "# HELP x "+all+"\nx 1\n")
	answer("/config", fmt.Sprintf(`{"settings":[{"key":"transport.password_file","value":%q},{"key":"x","value":%s}]}`, running, quoted))
	answer("/log/recent", fmt.Sprintf(`{"level":"warn","error":%s}`+"\n", quoted))
	answer("/decisions", fmt.Sprintf(`{"metadata":{"log_name":"decisions:system"},"message":%s}
{"metadata":{"log_name":"decisions:agents"},"message":"about what was observed"}
`, quoted))
	answer("/tap", fmt.Sprintf(`{"metadata":{"event_code":"process.exec"},"process":{"cmd_line":%s}}`+"\n", quoted))
	socket, _ := fakeControl(t, mux)
	path := write("edr-sensor.yaml", fmt.Sprintf("agent: {state_dir: %[1]s/state}\ncontrol: {socket: %[2]s}\ntransport: {address: 'unix://%[1]s/none', password_file: pw}\n", dir, socket), 0o600)

	for _, events := range []bool{false, true} {
		t.Run(fmt.Sprintf("events=%t", events), func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "report.tar.gz")
			args := []string{"report", "--config", path, "-o", out}
			if events {
				args = append(args, "--events")
			}
			var stdout, stderr bytes.Buffer
			a := app{stdout: &stdout, stderr: &stderr, environ: []string{"DEPLOY_TOKEN=" + inEnviron, "BROKER=amqp://u:" + inURL + "@broker"}}
			if code := a.run(t.Context(), args); code != 0 {
				t.Fatalf("exit code %d: %s", code, &stderr)
			}
			st, err := os.Stat(out)
			if err != nil || st.Mode() != 0o600 {
				t.Fatalf("%v: mode %v, want 0600", err, st.Mode())
			}
			archive, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			files, m := unpack(t, archive)
			searched := stdout.String() + stderr.String() + fmt.Sprint(m)
			for _, text := range files {
				searched += text
			}
			jsonForm := strings.Trim(string(mustJSON(t, inFile)), `"`)
			for _, secret := range []string{inFile, jsonForm, inRunning, inURL, inEnviron, inArgv, base64.StdEncoding.EncodeToString([]byte(inFile))} {
				if i := strings.Index(searched, secret); i >= 0 {
					t.Errorf("the report has the secret %s: …%s…", secret, searched[max(0, i-100):min(len(searched), i+100)])
				}
			}
			for _, name := range []string{"status.json", "metrics.txt", "config-running.json", "log.ndjson", "decisions.ndjson"} {
				if m.redacted(name) < 6 {
					t.Errorf("%s: %d places are redacted, and it had each secret: %s", name, m.redacted(name), files[name])
				}
			}
			for name, text := range files {
				if filepath.Ext(name) == ".json" && !json.Valid([]byte(text)) {
					t.Errorf("%s is no JSON any more: %s", name, text)
				}
			}
			for _, name := range []string{"config.json", "doctor.json", "host.json", "process.txt"} {
				if files[name] == "" {
					t.Errorf("%s is not in the report, which has %v", name, sorted(files))
				}
			}
			if events != (files["events.ndjson"] != "") || events == m.omits("events.ndjson", "--events") {
				t.Errorf("events: %q, left out: %v", files["events.ndjson"], m.LeftOut)
			}
			if observed := strings.Contains(files["decisions.ndjson"], "about what was observed"); events != observed || events == m.omits("decisions:agents", "1 decision about") {
				t.Errorf("decisions about what was observed are there: %t; left out: %v", observed, m.LeftOut)
			}
			if code := a.run(t.Context(), args); code != exitFailure || !strings.Contains(stderr.String(), "is there already") {
				t.Errorf("the second time: exit code %d: %s", code, &stderr)
			}
			if again, err := os.ReadFile(out); err != nil || !bytes.Equal(again, archive) {
				t.Errorf("a report was written over: %v", err)
			}
		})
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestReportWithoutASensor is what it is for most of all.
func TestReportWithoutASensor(t *testing.T) {
	dir := t.TempDir()
	report := func(config string) (files map[string]string, m manifest) {
		t.Helper()
		path := configFor(t, config)
		code, out, errs := run(t, "report", "--config", path, "--socket", filepath.Join(dir, "none"), "-o", "-")
		if code != 0 || errs != "" {
			t.Fatalf("exit code %d: %s", code, errs)
		}
		return unpack(t, []byte(out))
	}
	files, m := report("agent: {state_dir: " + dir + "}\n")
	if !m.omits("status.json", "no sensor answers") || !m.omits("process.txt", "no sensor") || !m.omits("decisions.ndjson", "no Redis is configured") {
		t.Errorf("left out: %v", m.LeftOut)
	}
	if !strings.Contains(files["doctor.json"], "sensor.running") || !strings.Contains(files["host.json"], "kernel.perf_event_paranoid") || !strings.Contains(files["config.json"], "buffer.cap") {
		t.Errorf("has %v", sorted(files))
	}

	files, m = report("log: {levels: info}\n")
	if !strings.Contains(files["config.json"], "log.levels: is not a known key") || !strings.Contains(files["doctor.json"], "config.valid") {
		t.Errorf("a wrong configuration: %v\n%s", m.LeftOut, files["config.json"])
	}

	_, m = report("transport: {address: 'unix://" + dir + "/none', password_file: none}\n")
	if !m.omits("decisions.ndjson", "no such file") {
		t.Errorf("without the password of Redis, left out: %v", m.LeftOut)
	}
}

func TestLastLines(t *testing.T) {
	for _, tt := range []struct {
		text string
		n    int
		want string
	}{{"", 2, ""}, {"a\n", 2, "a\n"}, {"a\nb\n", 2, "a\nb\n"}, {"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc\n", 1, "c\n"}} {
		if got := string(lastLines([]byte(tt.text), tt.n)); got != tt.want {
			t.Errorf("last %d of %q: %q, want %q", tt.n, tt.text, got, tt.want)
		}
	}
}
