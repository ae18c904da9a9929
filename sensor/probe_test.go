// SPDX-License-Identifier: Apache-2.0

package sensor

import "testing"

func TestProbeNamesEveryHook(t *testing.T) {
	require(t, "root")
	require(t, "btf")
	coverage, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range coverage {
		if c.Required && c.Hook == "" {
			t.Errorf("%s has no hook: %v", c.Event, c.Errs)
		}
	}
	if len(coverage) < 5 {
		t.Errorf("coverage %+v", coverage)
	}
}
