// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// rings are the two of one kernel. The worker reads those of one at a time.
type rings struct {
	priority, bulk *ring
	ids            [2]uint32 // of the maps
	// Kernel times between which records count; until is 0 without an end.
	from, until uint64
	// Positions that are not read beyond, while ended says so.
	ends  [2]uint64
	ended bool
	// Kinds whose records are of another version: what to do with them.
	foreign map[uint32]foreign
}

// foreign is what becomes of records that this version does not understand.
type foreign uint8

const (
	lostRecord foreign = iota + 1 // it is an event, and counts as lost
	noEvent                       // a heartbeat of the process before
)

// foreignKinds compares the layouts of records. The error says that nothing at all can be
// read of them.
func foreignKinds(theirs, ours map[uint32]string) (map[uint32]foreign, error) {
	if theirs[^uint32(0)] != ours[^uint32(0)] || theirs[^uint32(0)] == "" {
		return nil, errors.New("its records begin in another way")
	}
	list := map[uint32]foreign{}
	for kind, layout := range theirs {
		switch {
		case layout == ours[kind]:
		case strings.HasPrefix(layout, "HEARTBEAT "):
			list[kind] = noEvent
		default:
			list[kind] = lostRecord
		}
	}
	return list, nil
}

// kindNumber is the number of a record's kind; 0 of one that is too short to have one.
func kindNumber(rec []byte) uint32 {
	if len(rec) < 8 {
		return 0
	}
	return binary.NativeEndian.Uint32(rec[4:])
}

func (r *rings) close() error {
	var errs []error
	for _, ring := range [...]*ring{r.priority, r.bulk} {
		if ring != nil {
			errs = append(errs, ring.close())
		}
	}
	return errors.Join(errs...)
}

// counts tells whether a record is to be read from these rings.
func (r *rings) counts(rec []byte) bool {
	t := ktimeOf(rec)
	return t >= r.from && (r.until == 0 || t < r.until)
}

// ktimeOf is the kernel time of a record; 0 of one that is too short to have one.
func ktimeOf(rec []byte) uint64 {
	if len(rec) < 16 {
		return 0
	}
	return binary.NativeEndian.Uint64(rec[8:])
}

// resume goes on where a mark says that everything is durable. What was released since
// is durable, too, or made no record.
func (r *rings) resume(m *mark) error {
	for i, at := range [...]struct {
		ring *ring
		pos  uint64
	}{{r.priority, m.priority.pos}, {r.bulk, m.bulk.pos}} {
		if int64(at.pos-at.ring.position()) <= 0 {
			continue
		}
		if err := at.ring.seek(at.pos); err != nil {
			return fmt.Errorf("%s ring: %w", ringNames[i], err)
		}
	}
	r.from = m.since
	return nil
}

// limits are the positions up to which the rings are read now: what comes to the bulk ring
// while the other is read waits for its turn.
func (r *rings) limits() (priority, bulk uint64) {
	priority, bulk = ^uint64(0), r.bulk.producer()
	if r.ended {
		priority, bulk = min(priority, r.ends[0]), min(bulk, r.ends[1])
	}
	return priority, bulk
}

// reached tells whether everything before these positions was read.
func (r *rings) reached(ends [2]uint64) bool {
	return int64(ends[0]-r.priority.position()) <= 0 && int64(ends[1]-r.bulk.position()) <= 0
}

// endBeforeCut has the rings be read up to the first record that does not count any more,
// or to where they are now.
func (r *rings) endBeforeCut() error {
	for i, ring := range [...]*ring{r.priority, r.bulk} {
		r.ends[i] = ring.producer()
		at, err := ring.find(func(rec []byte) bool { return r.until != 0 && ktimeOf(rec) >= r.until })
		if err != nil {
			return fmt.Errorf("%s ring: %w", ringNames[i], err)
		}
		if int64(at-r.ends[i]) < 0 {
			r.ends[i] = at
		}
	}
	r.ended = true
	return nil
}

// waiting counts the records that were not read yet.
func (r *rings) waiting() (n uint64, err error) {
	for _, ring := range [...]*ring{r.priority, r.bulk} {
		_, err := ring.scan(func(rec []byte) {
			if _, beat := asHeartbeat(rec); !beat && r.counts(rec) && r.foreign[kindNumber(rec)] != noEvent {
				n++
			}
		})
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
