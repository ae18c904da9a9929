// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"testing"
	"time"
)

func TestClockFollowsSteps(t *testing.T) {
	var boot, wall int64 = 100e9, 5000e9
	reads := 0
	c := &clock{read: func() (int64, int64) { reads++; return boot, wall }}
	c.measure()
	if got := c.wall(99e9); got != 4999e9 {
		t.Errorf("wall = %d", got)
	}
	// The wall clock is set an hour ahead.
	boot, wall = 102e9, 5002e9+int64(time.Hour)
	if got := c.wall(101e9); got != 5001e9 || reads != 1 {
		t.Errorf("within a second: wall = %d after %d readings", got, reads)
	}
	if got := c.wall(101e9 + 1); got != 5001e9+1+int64(time.Hour) || reads != 2 {
		t.Errorf("after a second: wall = %d after %d readings", got, reads)
	}
	for range 100 { // a backlog is not measured again and again
		c.wall(50e9)
	}
	if reads != 2 {
		t.Errorf("%d readings", reads)
	}
}

func TestReadClocks(t *testing.T) {
	c := newClock()
	before := time.Now().UnixNano()
	got := c.wall(uint64(readClock(7))) // CLOCK_BOOTTIME
	after := time.Now().UnixNano()
	if slack := int64(time.Second); got < before-slack || got > after+slack {
		t.Errorf("now is %d, not in %d..%d", got, before, after)
	}
}
