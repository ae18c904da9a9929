// SPDX-License-Identifier: Apache-2.0

package enrich

import "testing"

// TestCommonProcessID uses the vector of the OCSF specification.
func TestCommonProcessID(t *testing.T) {
	boot := parseUUID("2899dae4-4fa4-4eef-95b6-6bc95325f61a")
	got := commonProcessID(boot, 4026532263, 55558*tick+9_999_999, 29)
	if want := "b770a0ed-8463-822c-b5f6-30d9081ddbd9"; got != want {
		t.Errorf("commonProcessID = %s, want %s", got, want)
	}
}

func TestParseUUID(t *testing.T) {
	for _, s := range []string{"", "2899dae4", "2899dae4-4fa4-4eef-95b6-6bc95325f61g", "2899dae4-4fa4-4eef-95b6-6bc95325f61a00"} {
		if got := parseUUID(s); got != [16]byte{} {
			t.Errorf("parseUUID(%q) = %x", s, got)
		}
	}
}
