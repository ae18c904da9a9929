// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/aurorasoc/edr-sensor/internal/debian"
)

const compatDoc = "../docs/compatibility.md"

// TestCompatibility runs the proofs against the servers of other Debian suites.
func TestCompatibility(t *testing.T) {
	if testing.Short() || os.Getenv("EDR_REDIS_SERVER") != "" {
		t.Skip("runs the other tests with EDR_REDIS_SERVER set to servers from Debian's mirrors")
	}
	t.Parallel()
	// Those that depend on what the server does.
	proofs := "^(TestT1LossyProxy|TestT3LogCut|TestT8|TestT13|TestT14|TestT15|TestModel|TestScript|TestSenderHolds|TestSenderStores|TestSenderPacks|TestSenderFences|TestSenderLoads|TestACL|TestRefusedByRedis|TestWiped)"
	all := proofs
	if os.Getenv("EDR_LONG") == "1" {
		all = "^(TestT[0-9]|TestModel|TestSender|TestScript|TestACL)"
	}
	type row struct{ suite, pkg, server, result string }
	rows := []row{
		{"bullseye", "redis-server", "", ""},
		{"bookworm", "redis-server", "", ""}, // the machine's own, by all tests of this package
		{"trixie", "redis-server", "", ""},
		{"trixie", "valkey-server", "", ""},
	}
	cache, err := debian.UserCache(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	for i := range rows {
		r := &rows[i]
		if r.suite == "bookworm" {
			r.server, r.result = versionOf(t, "redis-server"), "works: all tests"
			continue
		}
		path, release, err := cache.Program(t.Context(), r.suite, r.pkg)
		if err != nil {
			if os.Getenv("EDR_REQUIRE_ALL") == "1" {
				t.Fatal(err)
			}
			t.Skipf("needs a mirror of Debian: %v", err)
		}
		defer release()
		r.server = versionOf(t, path)
		run := all
		if r.suite == "bullseye" { // before 6.2 the ACL file is not understood, nor what others have the server do
			run = strings.Replace(proofs, "|TestACL", "", 1)
		}
		cmd := exec.Command(os.Args[0], "-test.run", run, "-test.v", "-test.timeout", "10m")
		cmd.Env = append(os.Environ(), "EDR_REDIS_SERVER="+path, "EDR_MODEL_RUNS=1000", "EDR_LONG=")
		out, err := cmd.CombinedOutput()
		passed := bytes.Count(out, []byte("\n--- PASS: "))
		if err != nil || passed == 0 || bytes.Contains(out, []byte("--- SKIP")) {
			t.Errorf("%s: %v\n%s", r.server, err, out)
			continue
		}
		r.result = fmt.Sprintf("works: %d proofs", passed)
		if r.suite == "bullseye" {
			r.result += "; before 6.2 leave `resetchannels` out of the ACL file"
		}
		t.Logf("%s of %s: %s", r.server, r.suite, r.result)
	}
	if !*update || t.Failed() {
		return
	}
	var table strings.Builder
	for _, r := range rows {
		fmt.Fprintf(&table, "| %s | %s | `%s` | %s |\n", r.server, r.suite, r.pkg, r.result)
	}
	doc, err := os.ReadFile(compatDoc)
	if err != nil {
		t.Fatal(err)
	}
	doc = regexp.MustCompile(`(?m)(^\| [A-Z][a-z]+ [0-9].*\n)+`).ReplaceAllLiteral(doc, []byte(table.String()))
	if err := os.WriteFile(compatDoc, doc, 0o644); err != nil {
		t.Fatal(err)
	}
}

// versionOf is the name and version of a server program.
func versionOf(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		t.Skipf("needs %s: %v", path, err)
	}
	m := regexp.MustCompile(`^(\w+) server v=([0-9.]+)`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("%s --version: %s", path, out)
	}
	return string(m[1]) + " " + string(m[2])
}
