// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// tick is the unit of start times in /proc/PID/stat: USER_HZ is 100 on every
// architecture we build for.
const tick = 10_000_000 // nanoseconds

// commonProcessID is the OCSF Common Process ID: a version 8 UUID of the SHA-256
// over boot id, pid namespace, start time in clock ticks and the pid in that
// namespace, each little endian. Every observer on this host computes the same.
func commonProcessID(boot [16]byte, pidNS, startTime uint64, nsPID uint32) string {
	var in [40]byte
	copy(in[:], boot[:])
	binary.LittleEndian.PutUint64(in[16:], pidNS)
	binary.LittleEndian.PutUint64(in[24:], startTime/tick)
	binary.LittleEndian.PutUint64(in[32:], uint64(nsPID))
	sum := sha256.Sum256(in[:])
	sum[6] = sum[6]&0x0f | 0x80
	sum[8] = sum[8]&0x3f | 0x80
	var out [36]byte
	hex.Encode(out[:], sum[:4])
	out[8] = '-'
	hex.Encode(out[9:], sum[4:6])
	out[13] = '-'
	hex.Encode(out[14:], sum[6:8])
	out[18] = '-'
	hex.Encode(out[19:], sum[8:10])
	out[23] = '-'
	hex.Encode(out[24:], sum[10:16])
	return string(out[:])
}

// identify sets p's CPID; it stays empty while the pid namespace is unknown.
func (e *Enricher) identify(p *event.Process) {
	if p.NS.PID == 0 || p.NSPID == 0 {
		p.CPID = ""
		return
	}
	p.CPID = commonProcessID(e.boot, uint64(p.NS.PID), p.Key.StartTime, p.NSPID)
}

// parseUUID turns a UUID's text into bytes; zero when it is none.
func parseUUID(s string) (id [16]byte) {
	if b, err := hex.DecodeString(strings.ReplaceAll(s, "-", "")); err == nil && len(b) == len(id) {
		copy(id[:], b)
	}
	return id
}
