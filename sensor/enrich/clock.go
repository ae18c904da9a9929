// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"time"

	"golang.org/x/sys/unix"
)

// clock turns kernel times into wall times. The distance between the two is
// measured again once a second of kernel time, so that a wall clock that is set
// or disciplined is followed.
type clock struct {
	read     func() (boot, wall int64)
	offset   int64
	measured uint64 // kernel time at which offset was measured
}

func newClock() *clock {
	c := &clock{read: readClocks}
	c.measure()
	return c
}

// wall is the time since the Unix epoch, in nanoseconds, of a kernel time.
func (c *clock) wall(ktime uint64) int64 {
	if ktime > c.measured+uint64(time.Second) {
		c.measure()
	}
	return c.offset + int64(ktime)
}

func (c *clock) measure() {
	boot, wall := c.read()
	c.offset, c.measured = wall-boot, uint64(boot)
}

// readClocks reads both clocks at one moment: of three tries, the one in which
// the least time passed between two readings of the first clock.
func readClocks() (boot, wall int64) {
	best := int64(-1)
	for range 3 {
		before, w, after := readClock(unix.CLOCK_BOOTTIME), readClock(unix.CLOCK_REALTIME), readClock(unix.CLOCK_BOOTTIME)
		if took := after - before; best < 0 || took < best {
			best, boot, wall = took, before+took/2, w
		}
	}
	return boot, wall
}

func readClock(id int32) int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		return 0 // both clocks exist since Linux 2.6.39
	}
	return t.Nano()
}
