// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/ptytest"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// The work that the screens show: a backup and something that fetches.
const (
	backupScript = `while :; do tar -cf backup.tar backup.sh fetch.sh; gzip -kf backup.tar; mv backup.tar.gz old.gz; sleep 0.2; done`
	fetchScript  = `while :; do exec 3<>/dev/tcp/127.0.0.1/$1; read -r -u 3 line; exec 3>&-; sleep 0.1; done`
)

// TestScreens holds the screens in the README against those of a running sensor, and
// with -update writes them: what is shown there has been seen. Numbers differ, and so
// does what a kernel allows.
func TestScreens(t *testing.T) {
	requireHost(t)
	require(t, ptytest.Exists(), "no /dev/ptmx")
	_, err := exec.LookPath("bash")
	require(t, err == nil, "no bash")

	dir := t.TempDir()
	for name, script := range map[string]string{"backup.sh": backupScript, "fetch.sh": fetchScript} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintln(c, "hello")
			_ = c.Close()
		}
	}()

	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server.Addr(), redistest.Faults{}) // by TCP, as usual
	h := newHost(t, w, proxy.Addr(), "")
	h.env = []string{"EDR_SENSOR_AGENT__ID=web-01"}
	h.start()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	backup := w.do(order{Op: "shell", Name: "backup", Script: "cd " + dir + "; sh backup.sh & job=$!"})
	w.do(order{Op: "shell", Name: "fetch", Script: "cd " + dir + "; bash fetch.sh " + port + " & job=$!"})
	t.Cleanup(func() {
		for _, name := range []string{"backup", "fetch"} {
			w.do(order{Op: "shell", Name: name, Script: "kill $job; wait"})
		}
	})
	h.run("case", "open", "--case-id", "C-17", "--user-id", "mara", "--subtree", fmt.Sprint(backup.PID), "--ttl", "2h", "--collect", "deep")

	page := filepath.Join(moduleRoot, "README.md")
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	readme := string(b)
	fresh := map[string]string{"status": h.statusScreen(), "top": h.topScreen()}
	for _, name := range []string{"status", "top"} {
		block := regexp.MustCompile("(?s)(\n```\n\\$ sudo edr-sensor " + name + "\n)(.*?)(```\n)")
		found := block.FindStringSubmatch(readme)
		if found == nil {
			t.Fatalf("README.md shows no edr-sensor %s", name)
		}
		if *update {
			readme = block.ReplaceAllLiteralString(readme, found[1]+fresh[name]+found[3])
			continue
		}
		if shown, now := skeleton(found[2]), skeleton(fresh[name]); shown != now {
			t.Errorf("README.md shows another screen of edr-sensor %s than there is; make screens writes it.\nThere:\n%s\nNow:\n%s", name, found[2], fresh[name])
		}
	}
	if *update {
		if err := os.WriteFile(page, []byte(readme), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStatusWhileRedisIsAway is told when the buffer will be full, and what the log says
// about it, which nobody is told over HTTP.
func TestStatusWhileRedisIsAway(t *testing.T) {
	requireHost(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{})
	h := newHost(t, w, server.Addr(), "buffer: {cap: 16MiB, compression: none}")
	h.env = []string{"EDR_SENSOR_TRANSPORT__TIMEOUT=500ms"}
	h.start()
	h.delivered(30 * time.Second)
	server.Stall()
	n := 0
	eventually(t, 60*time.Second, "it is known when the buffer is full", func() bool {
		w.do(order{Op: "exec", From: 1 + n, N: 20, PerSec: 40})
		n += 20
		b := h.mustStatus().Buffer
		return b.FullIn != nil && *b.FullIn > 0 && b.Unsent > uint64(n)
	})
	s := h.mustStatus()
	if len(s.Warnings) == 0 || !strings.Contains(string(s.Warnings[0]), "not delivering") || !strings.Contains(string(s.Warnings[0]), "agent_id") {
		t.Errorf("warnings: %s", s.Warnings)
	}
	if _, page := h.get("/status"); !strings.Contains(page, `"full_in_seconds"`) || strings.Contains(page, `"warnings"`) {
		t.Errorf("over HTTP: %s", page)
	}
	screen := h.run("status")
	for _, want := range []string{", full in ", " behind", "warn not delivering"} {
		if !strings.Contains(screen, want) {
			t.Errorf("the screen does not say %q:\n%s", want, screen)
		}
	}
	server.Resume()
	h.delivered(60 * time.Second)
	eventually(t, 30*time.Second, "the buffer is not said to become full", func() bool { return h.mustStatus().Buffer.FullIn == nil })
}

// terminal runs edr-sensor where an operator does.
func (h *host) terminal(width, height int, args ...string) *ptytest.Terminal {
	h.t.Helper()
	p := ptytest.Open(h.t, width, height)
	cmd := exec.Command(binary(h.t), append(args, "--config", h.config)...)
	cmd.Env = []string{"TERM=xterm", "LANG=C.UTF-8", "TZ=UTC"}
	p.Start(cmd)
	return p
}

// run runs a command that must succeed.
func (h *host) run(args ...string) string {
	h.t.Helper()
	out, err := exec.Command(binary(h.t), append(args, "--config", h.config)...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("edr-sensor %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func (h *host) statusScreen() string {
	h.t.Helper()
	eventually(h.t, 30*time.Second, "rates of some seconds are known", func() bool {
		s, err := h.status()
		return err == nil && s.Rates != nil && s.Rates.Seconds > 5 && s.Rates.Delivered > 0
	})
	p := h.terminal(80, 24, "status")
	if code := p.Wait(); code != 0 {
		h.t.Errorf("status: exit code %d", code)
	}
	p.Clean()
	return strings.TrimRight(p.String(), "\n") + "\n"
}

func (h *host) topScreen() string {
	h.t.Helper()
	p := h.terminal(80, 12, "top", "--every", "1s")
	row := regexp.MustCompile(`(?m)^ +[0-9.]+ +([0-9]+) .*(backup|fetch)\.sh`)
	s := p.Await("both scripts are among the busiest", func(s ptytest.State) bool {
		names := map[string]bool{}
		for _, m := range row.FindAllStringSubmatch(s.String(), -1) {
			names[m[2]] = names[m[2]] || len(m[1]) > 2 || !*update // a busy machine takes its time for so many
		}
		return names["backup"] && names["fetch"] && s.Alternate
	})
	p.Type("q")
	if code := p.Wait(); code != 0 {
		h.t.Errorf("top: exit code %d", code)
	}
	p.Clean()
	return s.String() + "\n"
}

// skeleton is what a screen has however much there is to show: its labels and the heads
// of its tables; not what there may be or not.
func skeleton(screen string) string {
	var out []string
	number := regexp.MustCompile(`[0-9]`)
	for line := range strings.Lines(screen) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case line[0] != ' ' && line[0] != '\t' && !slices.Contains([]string{"cases", "log", "error"}, words[0]) && !number.MatchString(words[0]), strings.HasPrefix(line, "A SECOND"):
			if words[0] == "events" || strings.ToUpper(line) == line || strings.HasPrefix(line, "[p]") {
				out = append(out, strings.Join(words, " "))
			} else {
				out = append(out, words[0])
			}
		}
	}
	return strings.Join(out, "\n")
}
