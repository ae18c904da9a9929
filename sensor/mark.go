// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
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
}

type ringMark struct {
	id  uint32 // kernel's id of the map
	pos uint64 // everything before it is covered
}

const (
	markVersion = 1
	markSize    = 1 + 1 + 16 + 2*12 + 3*8
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
	b = binary.LittleEndian.AppendUint64(b, m.serial)
	b = binary.LittleEndian.AppendUint64(b, m.ktime)
	return binary.LittleEndian.AppendUint64(b, uint64(m.wall))
}

func parseMark(b []byte) (m mark, err error) {
	if len(b) != markSize || b[0] != markVersion {
		return m, fmt.Errorf("%w: %d bytes", errMark, len(b))
	}
	m.clean = b[1] == 1
	copy(m.bootID[:], b[2:])
	b = b[18:]
	for _, r := range [...]*ringMark{&m.priority, &m.bulk} {
		r.id, r.pos = binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint64(b[4:])
		b = b[12:]
	}
	m.serial, m.ktime = binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	m.wall = int64(binary.LittleEndian.Uint64(b[16:]))
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
