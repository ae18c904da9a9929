// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// mark is what the buffer stores with every chunk: how far the rings were read
// when the chunk was closed, and which rings those were.
type mark struct {
	bootID         [16]byte
	priority, bulk ringMark
	serial         uint64 // number of the Flush in this run
	ktime          uint64 // newest kernel time written
	wall           int64  // newest wall time, ns since the Unix epoch
	clean          bool   // the last one of a run that stopped in order

	// Kernel time before which the records of these rings do not count: those of the
	// rings that were read before them do.
	since uint64
	// What the kernel had counted, by kind, when it was reported last.
	lost, suppressed [event.Kinds]uint64
	missed           uint64
}

type ringMark struct {
	id  uint32 // kernel's id of the map
	pos uint64 // everything before it is covered
}

const (
	markVersion = 2
	markSize    = 1 + 1 + 16 + 2*12 + 5*8 + 1 // and two numbers for each kind
)

var errMark = errors.New("not a ring mark")

func (m *mark) append(b []byte) []byte {
	clean := byte(0)
	if m.clean {
		clean = 1
	}
	b = append(b, markVersion, clean)
	b = append(b, m.bootID[:]...)
	for _, r := range [...]ringMark{m.priority, m.bulk} {
		b = binary.LittleEndian.AppendUint32(b, r.id)
		b = binary.LittleEndian.AppendUint64(b, r.pos)
	}
	for _, n := range [...]uint64{m.serial, m.ktime, uint64(m.wall), m.since, m.missed} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	b = append(b, byte(event.Kinds))
	for kind := range m.lost {
		b = binary.LittleEndian.AppendUint64(b, m.lost[kind])
		b = binary.LittleEndian.AppendUint64(b, m.suppressed[kind])
	}
	return b
}

// parseMark also takes the mark of a version that knows other kinds.
func parseMark(b []byte) (m mark, err error) {
	if len(b) < markSize || b[0] != markVersion || len(b) != markSize+16*int(b[markSize-1]) {
		return m, fmt.Errorf("%w: %d bytes", errMark, len(b))
	}
	m.clean = b[1] == 1
	copy(m.bootID[:], b[2:])
	b = b[18:]
	for _, r := range [...]*ringMark{&m.priority, &m.bulk} {
		r.id, r.pos = binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint64(b[4:])
		b = b[12:]
	}
	var wall uint64
	for _, n := range [...]*uint64{&m.serial, &m.ktime, &wall, &m.since, &m.missed} {
		*n, b = binary.LittleEndian.Uint64(b), b[8:]
	}
	m.wall = int64(wall)
	kinds := int(b[0])
	for kind := range min(kinds, len(m.lost)) {
		at := b[1+16*kind:]
		m.lost[kind], m.suppressed[kind] = binary.LittleEndian.Uint64(at), binary.LittleEndian.Uint64(at[8:])
	}
	return m, nil
}

// parseBootID turns the kernel's UUID text into bytes; zero when it is none.
func parseBootID(s string) (id [16]byte) {
	if b, err := hex.DecodeString(strings.ReplaceAll(s, "-", "")); err == nil && len(b) == len(id) {
		copy(id[:], b)
	}
	return id
}

func mapID(m *ebpf.Map) (uint32, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("map info: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("map info: the kernel gives no id")
	}
	return uint32(id), nil
}
