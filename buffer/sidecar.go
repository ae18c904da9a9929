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
// of the process it is exact, after that of the host it may be a second old. Three slots
// take turns: one write that is torn leaves the one before, and what was synced last is left
// alone, as a power failure may tear all that was written since.
//
//	0  magic   "EDRs"
//	4  crc32c  of everything behind it
//	8  length  of the state
//	12 boot    id of the boot that it was written in, 16 bytes
//	28 state   as in the file
//
// Behind the slots Close leaves a voucher, the number of the transaction that it closed the
// file with, and Open takes it away before it trusts the file for it: a process that dies of
// such a file has the next one check all of it.
//
//	0  magic   "EDRv"
//	4  crc32c  of what is behind it
//	8  txid
const (
	sidecarName   = "q.state"
	sidecarMagic  = "EDRs"
	sidecarHeader = 28
	sidecarSlot   = 64 * kib
	sidecarSlots  = 3
	sidecarSync   = time.Second

	voucherMagic = "EDRv"
	voucherSize  = 16
	voucherAt    = sidecarSlots * sidecarSlot
	sidecarSize  = voucherAt + pageSize

	noSidecar = "there is no room for " + sidecarName + ": after a power failure what is intact would be salvaged into a new epoch"
)

// sidecar is the open sidecar; it belongs to the writer.
type sidecar struct {
	f      *os.File
	boot   [16]byte
	buf    []byte
	synced time.Time
	epoch  string // synced last
	slot   int    // written last
	kept   int    // synced last
}

// witness is what a sidecar says.
type witness struct {
	*state
	exact  bool   // written in this boot: nothing was handed out that it does not know
	closed uint64 // transaction that the file was closed with, 0 when that is not known
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
func readSidecar(dir string, boot [16]byte) witness {
	f, err := os.Open(filepath.Join(dir, sidecarName))
	if err != nil {
		return witness{}
	}
	defer f.Close()
	w, _ := newestSlot(f, boot)
	b := make([]byte, voucherSize)
	if _, err := f.ReadAt(b, voucherAt); err == nil && w.state != nil {
		w.closed = parseVoucher(b)
	}
	return w
}

func parseVoucher(b []byte) uint64 {
	if string(b[:4]) != voucherMagic || crc32.Checksum(b[8:], castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return 0
	}
	return binary.LittleEndian.Uint64(b[8:])
}

// vouch leaves the voucher for transaction txid. That it is missing only costs time.
func (c *sidecar) vouch(txid uint64) {
	b := append(make([]byte, 0, voucherSize), voucherMagic...)
	b = binary.LittleEndian.AppendUint64(append(b, 0, 0, 0, 0), txid)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	_, _ = c.f.WriteAt(b, voucherAt)
}

// withdraw takes the voucher away.
func withdraw(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, sidecarName), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, voucherSize), voucherAt)
	return errors.Join(err, f.Close())
}

// newestSlot returns what the newest of the slots in f says, and which that is.
func newestSlot(f *os.File, boot [16]byte) (w witness, slot int) {
	b := make([]byte, sidecarSlot)
	for i := range sidecarSlots {
		n, err := f.ReadAt(b, int64(i)*sidecarSlot)
		if err != nil && !errors.Is(err, io.EOF) {
			continue
		}
		s, at, ok := parseSlot(b[:n])
		if ok && (w.state == nil || s.epoch > w.epoch || s.epoch == w.epoch && s.gen > w.gen) {
			w, slot = witness{state: s, exact: at == boot && boot != [16]byte{}}, i
		}
	}
	return w, slot
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

// openSidecar makes the sidecar when it is missing, with blocks behind it. w is what it says.
func openSidecar(dir string, w witness, boot [16]byte) (*sidecar, error) {
	f, err := os.OpenFile(filepath.Join(dir, sidecarName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Size() < sidecarSize { // else XFS, when full, refuses what there is
		err = unix.Fallocate(int(f.Fd()), 0, 0, sidecarSize)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP), noSpace(err) && st.Size() >= voucherAt:
			err = nil
		case noSpace(err):
			err = errors.Join(err, f.Truncate(0)) // it must not be taken for what it is not
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("preallocate %s: %w", f.Name(), err), f.Close())
	}
	_, slot := newestSlot(f, boot)
	c := &sidecar{f: f, boot: boot, slot: slot, kept: slot}
	if w.closed != 0 { // synced by Close
		c.synced, c.epoch = time.Now(), w.epoch
	}
	return c, nil
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
	if c.slot = (c.slot + 1) % sidecarSlots; c.slot == c.kept {
		c.slot = (c.slot + 1) % sidecarSlots
	}
	if _, err := c.f.WriteAt(b, int64(c.slot)*sidecarSlot); err != nil {
		return err
	}
	// A sidecar of another epoch tells nothing of one that a transaction was cut off in.
	if now.Sub(c.synced) < sidecarSync && s.epoch == c.epoch {
		return nil
	}
	c.synced, c.epoch = now, s.epoch
	if err := c.sync(); err != nil {
		return err
	}
	c.kept = c.slot
	return nil
}

func (c *sidecar) sync() error { return unix.Fdatasync(int(c.f.Fd())) }

func (c *sidecar) close() error {
	if c == nil {
		return nil
	}
	return errors.Join(c.sync(), c.f.Close())
}
