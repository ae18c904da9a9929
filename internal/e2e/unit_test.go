// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// exposureLimit is the worst score of systemd-analyze security that the unit may have.
const exposureLimit = 2.5

// TestUnit holds the unit, alone and with each drop-in, against systemd's own tool.
func TestUnit(t *testing.T) {
	path, err := exec.LookPath("systemd-analyze")
	require(t, err == nil, "no systemd-analyze (Debian package systemd)")
	source := filepath.Join(moduleRoot, "packaging", "systemd")
	unit, err := os.ReadFile(filepath.Join(source, "edr-sensor.service"))
	if err != nil {
		t.Fatal(err)
	}
	dropins, err := filepath.Glob(filepath.Join(source, "dropins", "*.conf"))
	if err != nil || len(dropins) == 0 {
		t.Fatalf("no drop-ins found: %v", err)
	}
	score := regexp.MustCompile(`exposure level for edr-sensor\.service: ([0-9.]+)`)
	for _, dropin := range append([]string{""}, dropins...) {
		t.Run(strings.TrimSuffix(filepath.Base("unit/"+dropin), ".conf"), func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "edr-sensor.service")
			// The command has to be there; which one does not matter.
			text := strings.ReplaceAll(string(unit), "/usr/bin/edr-sensor", "/bin/true")
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			if dropin != "" {
				b, err := os.ReadFile(dropin)
				if err == nil {
					err = os.Mkdir(file+".d", 0o755)
				}
				if err == nil {
					err = os.WriteFile(filepath.Join(file+".d", filepath.Base(dropin)), b, 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.Command(path, "verify", "--man=no", file).CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("systemd-analyze verify: %v\n%s", err, out)
			}
			out, err := exec.Command(path, "security", "--offline=yes", "--no-pager", file).CombinedOutput()
			m := score.FindSubmatch(out)
			if err != nil || m == nil {
				t.Fatalf("systemd-analyze security: %v\n%s", err, out)
			}
			got, err := strconv.ParseFloat(string(m[1]), 64)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("exposure %.1f", got)
			if dropin == "" && got > exposureLimit {
				t.Errorf("exposure %.1f, want at most %.1f\n%s", got, exposureLimit, out)
			}
		})
	}
}
