// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The sidecar, q.state, is a copy of the state beside the file, so that a file that is
// empty, missing, put back from a copy, or whose newest pages are damaged is told from
// one that is as it was left, and what it lost can be counted. It is written after each
// transaction, before anybody learns of that, and synced once a second: after the death
// of the process it is exact, after that of the host it may be a second old. Two slots
// take turns, so that a torn write leaves the one before.
//
//	0  magic   "EDRs"
//	4  crc32c  of everything behind it
//	8  length  of the state
//	12 boot    id of the boot that it was written in, 16 bytes
//	28 state   as in the file
const (
	sidecarName   = "q.state"
	sidecarMagic  = "EDRs"
	sidecarHeader = 28
	sidecarSlot   = 64 * kib
	sidecarSync   = time.Second
)

// sidecar is the open sidecar; it belongs to the writer.
type sidecar struct {
	f      *os.File
	boot   [16]byte
	buf    []byte
	synced time.Time
}

// witness is what a sidecar says.
type witness struct {
	*state
	exact bool // written in this boot: nothing was handed out that it does not know
}

// bootID returns the identity of this boot, zero when the kernel does not tell.
func bootID() (id [16]byte) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	var n int
	for _, c := range bytes.TrimSpace(b) {
		var v byte
		switch {
		case c >= '0' && c <= '9':
			v = c - '0'
		case c >= 'a' && c <= 'f':
			v = c - 'a' + 10
		default:
			continue
		}
		if n < 32 {
			id[n/2] |= v << (4 * (1 - n%2))
			n++
		}
	}
	return id
}

// readSidecar returns the newest state that a sidecar in dir holds, a nil one when
// there is none that can be read: it is a help, and never a reason not to start.
func readSidecar(dir string, boot [16]byte) (w witness) {
	f, err := os.Open(filepath.Join(dir, sidecarName))
	if err != nil {
		return witness{}
	}
	defer f.Close()
	b := make([]byte, sidecarSlot)
	for i := range int64(2) {
		n, err := f.ReadAt(b, i*sidecarSlot)
		if err != nil && !errors.Is(err, io.EOF) {
			continue
		}
		s, at, ok := parseSlot(b[:n])
		if ok && (w.state == nil || s.epoch > w.epoch || s.epoch == w.epoch && s.gen > w.gen) {
			w = witness{s, at == boot && boot != [16]byte{}}
		}
	}
	return w
}

func parseSlot(b []byte) (s *state, boot [16]byte, ok bool) {
	if len(b) < sidecarHeader || string(b[:4]) != sidecarMagic {
		return nil, boot, false
	}
	n := uint64(binary.LittleEndian.Uint32(b[8:]))
	if n > uint64(len(b)-sidecarHeader) {
		return nil, boot, false
	}
	b = b[:sidecarHeader+n]
	if crc32.Checksum(b[8:], castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return nil, boot, false
	}
	copy(boot[:], b[12:])
	s, err := decodeState(b[sidecarHeader:])
	return s, boot, err == nil
}

// openSidecar makes the sidecar when it is missing, with blocks behind it.
func openSidecar(dir string, boot [16]byte) (*sidecar, error) {
	f, err := os.OpenFile(filepath.Join(dir, sidecarName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, 2*sidecarSlot)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, errors.Join(fmt.Errorf("preallocate %s: %w", f.Name(), err), f.Close())
	}
	return &sidecar{f: f, boot: boot}, nil
}

// write notes s, and syncs when that is due.
func (c *sidecar) write(s *state, now time.Time) error {
	b := append(c.buf[:0], sidecarMagic...)
	b = append(b, make([]byte, 8)...)
	b = append(b, c.boot[:]...)
	b = s.encode(b)
	c.buf = b
	if len(b) > sidecarSlot {
		// A mark of that size is not ours; without a slot this is no witness.
		return errors.Join(fmt.Errorf("state of %d bytes", len(b)), c.f.Truncate(0))
	}
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-sidecarHeader))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	if _, err := c.f.WriteAt(b, int64(s.gen%2)*sidecarSlot); err != nil {
		return err
	}
	if now.Sub(c.synced) < sidecarSync {
		return nil
	}
	c.synced = now
	return c.sync()
}

func (c *sidecar) sync() error { return unix.Fdatasync(int(c.f.Fd())) }

func (c *sidecar) close() error { return errors.Join(c.sync(), c.f.Close()) }
