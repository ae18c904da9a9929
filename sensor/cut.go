// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

/*
 * The cut is a kernel time at which one set of programs takes over from another, while both
 * see everything. Of an event both make a record, each with its own time, which differ by
 * as much as the programs run apart: microseconds, or longer when the CPU is taken away in
 * between. An event is read twice or not at all if its two times lie on different sides of
 * the cut. So the cut is put into a moment in which neither has a record, and it is tried
 * out: between it and a later such moment both must have as many records of each kind of
 * each thread.
 */
type cut struct {
	at                uint64
	agreed, disagreed uint64
	proven            bool
}

const (
	cutOverlap = 60 * time.Millisecond // in which both see, at least
	cutMargin  = 10 * time.Millisecond // from its ends, where one may lag
	cutTries   = 40
)

// witness is what is compared of a record: what it is of, and when it was seen.
type witness struct {
	key   witnessKey
	ktime uint64
}

type witnessKey struct {
	kind, pid, tid uint32
	start          uint64
	bulk           bool
}

// findCut looks for the cut until one is found, but not for ever.
func (s *Sensor) findCut(ctx context.Context) (c cut) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for try := range cutTries {
		timer.Reset(cutOverlap)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		old, errOld := witnesses(&s.taken.old.rings, s.taken.attached)
		own, errOwn := witnesses(&s.own, s.taken.attached)
		if err := errors.Join(errOld, errOwn); err != nil {
			logging.From(ctx).Error("compare rings", zap.Error(err))
		}
		c = cutBetween(old, own, s.taken.attached, bootTime(), try > cutTries/2)
		if c.proven || ctx.Err() != nil {
			return c
		}
	}
	return c
}

// bootTime is the kernel's time of now.
func bootTime() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // known to every kernel since 2.6.39
	return uint64(ts.Nano())
}

// witnesses lists the records of both rings that were not read yet and are not older than
// from.
func witnesses(in *rings, from uint64) (list []witness, err error) {
	for _, r := range [...]*ring{in.priority, in.bulk} {
		_, errScan := r.scan(func(rec []byte) {
			if _, beat := asHeartbeat(rec); beat || len(rec) < 32 || ktimeOf(rec) < from || in.foreign[kindNumber(rec)] != 0 {
				return
			}
			u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(rec[at:]) }
			key := witnessKey{kind: u32(4), start: binary.NativeEndian.Uint64(rec[16:]), pid: u32(24), tid: u32(28), bulk: r == in.bulk}
			list = append(list, witness{key, ktimeOf(rec)})
		})
		err = errors.Join(err, errScan)
	}
	return list, err
}

// cutBetween finds the cut in what two sets of programs saw between two times. What only
// one of them saw at all says nothing: their settings may differ. Lenient disregards the
// bulk ring, where they may differ for one and the same thread.
func cutBetween(old, own []witness, from, to uint64, lenient bool) (c cut) {
	margin := uint64(cutMargin)
	if to <= from+2*margin {
		margin = 0
	}
	from, to = from+margin, to-margin
	third := (to - from) / 3
	var times []uint64
	for _, w := range slices.Concat(old, own) {
		times = append(times, w.ktime)
	}
	slices.Sort(times)
	c.at = widestGap(times, from, from+2*third)
	end := widestGap(times, from+2*third, to)

	count := map[witnessKey][2]uint64{} // all there are
	within := map[witnessKey][2]uint64{}
	for i, list := range [...][]witness{old, own} {
		for _, w := range list {
			if w.key.bulk && lenient {
				continue
			}
			n := count[w.key]
			n[i]++
			count[w.key] = n
			if w.ktime >= c.at && w.ktime < end {
				n := within[w.key]
				n[i]++
				within[w.key] = n
			}
		}
	}
	for key, n := range within {
		if all := count[key]; all[0] == 0 || all[1] == 0 {
			continue
		}
		c.agreed += min(n[0], n[1])
		c.disagreed += max(n[0], n[1]) - min(n[0], n[1])
	}
	c.proven = c.disagreed == 0
	return c
}

// widestGap is the middle of the longest time between two bounds in which nothing is.
func widestGap(sorted []uint64, from, to uint64) uint64 {
	first, _ := slices.BinarySearch(sorted, from)
	end, _ := slices.BinarySearch(sorted, to)
	middle, wide, last := from, uint64(0), from
	for _, t := range append(slices.Clone(sorted[first:end]), to) {
		if t-last > wide {
			middle, wide = last+(t-last)/2, t-last
		}
		last = t
	}
	return middle
}
