// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// require skips the test, with the exact reason, on a host without what it needs.
// With EDR_REQUIRE_ALL=1 it fails instead, so that a machine that is there to run
// everything cannot skip in silence.
func require(t testing.TB, what string) {
	t.Helper()
	var err error
	switch what {
	case "root":
		if os.Geteuid() != 0 && os.Getenv(agencyEnv) == "" { // else root does for it what it must
			err = fmt.Errorf("effective uid is %d", os.Geteuid())
		}
	case "btf":
		_, err = os.Stat("/sys/kernel/btf/vmlinux")
	case "cgroup2":
		_, err = cgroup2Mount()
	default:
		t.Fatalf("require: nothing is known of %q", what)
	}
	need(t, what, err)
}

// need is require where the test has tried it itself.
func need(t testing.TB, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if os.Getenv("EDR_REQUIRE_ALL") == "1" {
		t.Fatalf("needs %s: %v", what, err)
	}
	t.Skipf("needs %s: %v", what, err)
}

// requireHook skips the test when this kernel refuses every program for the event. It
// never fails: no setting of the machine would help.
func requireHook(t testing.TB, k *kernel, kind event.Kind) {
	t.Helper()
	for _, c := range k.coverage() {
		if c.Kind == kind && c.Hook == "" {
			t.Skipf("this kernel refuses every hook for %s: %s", c.Event, strings.Join(c.Errs, "; "))
		}
	}
}
