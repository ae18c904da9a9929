// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/fnv"
	"io"
	"os"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// bbolt syncs twice for a transaction: the pages it wrote, then the meta page that leads
// to them, so that a meta page on disk proves its tree. Here one sync does for both, and
// what proves the tree is a seal: a checksum of the meta, of every page of the tree and of
// a stored freelist, in the meta page itself, in a sector of its own behind what bbolt uses
// there. Chunks have their own checksum; the seal says from which seq on they are new.
//
// When the power fails before the sync has ended, any of these sectors may be on disk and
// any not. Then the seal of the newer meta does not hold, or a new chunk does not, and the
// file is what the other meta leads to: that and its tree were synced before, and a
// transaction writes to neither, as it copies what it changes and uses pages that the one
// before has freed, never those that it frees itself. Nobody has learned of what is given
// up, as whatever was committed is told after the sync.
//
// What this cannot tell is a chunk that was synced, and damaged on the disk before the power
// failed, while neither the next transaction was there nor a sidecar that knows of this one:
// it is given up like one that was cut off.
//
//	 0  magic  "EDRm"
//	 4  crc32c of everything behind it
//	 8  txid   of the meta
//	16  fresh  first seq of what the transaction added
//	24  tree   first half of a SHA-256
//
// The tree has no CRC32C: the state in it ends with one, and exchanging a state for another
// that ends with its own changes no CRC32C of the page around it.
const (
	sealAt    = 512
	sealSize  = 24 + len(treeHash{})
	sealMagic = "EDRm"

	metaSum = 56 // where bbolt's checksum of a meta is, behind the page header
)

// treeHash is that of a tree, or of one of its pages.
type treeHash [16]byte

func hashed(h hash.Hash) treeHash { return treeHash(h.Sum(nil)[:len(treeHash{})]) }

// seal is what a meta page says about its tree.
type seal struct {
	fresh uint64
	tree  treeHash
}

var errCutOff = errors.New("cut off on its way to the disk")

// parseSeal returns the seal of the meta page p of transaction txid.
func parseSeal(p []byte, txid uint64) (s seal, ok bool) {
	le := binary.LittleEndian
	b := p[sealAt : sealAt+sealSize]
	if string(b[:4]) != sealMagic || crc32.Checksum(b[8:], castagnoli) != le.Uint32(b[4:]) || le.Uint64(b[8:]) != txid {
		return seal{}, false
	}
	return seal{fresh: le.Uint64(b[16:]), tree: treeHash(b[24:])}, true
}

func (s seal) encode(txid uint64) []byte {
	le := binary.LittleEndian
	b := make([]byte, sealSize)
	copy(b, sealMagic)
	le.PutUint64(b[8:], txid)
	le.PutUint64(b[16:], s.fresh)
	copy(b[24:], s.tree[:])
	le.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	return b
}

// treePage is a page of the tree, as far as a seal wants to know it.
type treePage struct {
	sum   treeHash
	below []uint64
	fresh []entry // new chunks that it names, where they are asked for
}

// treeSum computes the checksum in a seal. known holds the pages of the transaction before:
// a page that is in both trees has not been written since.
type treeSum struct {
	f     io.ReaderAt
	buf   []byte
	known map[uint64]treePage
	found map[uint64]treePage
	fresh uint64
	pages uint64
}

// of returns the checksum of what the meta with the bytes b leads to.
func (t *treeSum) of(m meta, b []byte) (treeHash, error) {
	t.found, t.pages = make(map[uint64]treePage, len(t.known)+8), m.pages
	h := sha256.New()
	h.Write(b[:metaSum])
	err := t.add(h, m.root, 0)
	if err == nil && m.freelist != noFreelist {
		if err = t.read(m.freelist); err == nil {
			h.Write(t.buf)
		}
	}
	t.known = t.found
	return hashed(h), err
}

// read reads page id with its overflow.
func (t *treeSum) read(id uint64) error {
	if cap(t.buf) < pageSize {
		t.buf = make([]byte, pageSize)
	}
	t.buf = t.buf[:pageSize]
	if _, err := t.f.ReadAt(t.buf, int64(id)*pageSize); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	n := int(binary.LittleEndian.Uint32(t.buf[12:])) + 1
	if id < 2 || id >= t.pages || uint64(n) > t.pages-id {
		return fmt.Errorf("page %d: out of bounds", id)
	}
	if n == 1 {
		return nil
	}
	if cap(t.buf) < n*pageSize {
		t.buf = make([]byte, n*pageSize)
	}
	t.buf = t.buf[:n*pageSize]
	if _, err := t.f.ReadAt(t.buf, int64(id)*pageSize); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// add extends h by page id and what is below it.
func (t *treeSum) add(h hash.Hash, id uint64, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: tree is too deep", id)
	}
	if _, twice := t.found[id]; twice {
		return fmt.Errorf("page %d: used twice", id)
	}
	p, ok := t.known[id]
	if !ok {
		if err := t.read(id); err != nil {
			return err
		}
		var err error
		if p, err = t.parse(); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
	}
	t.found[id] = p
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], id)
	h.Write(b[:])
	h.Write(p.sum[:])
	for _, id := range p.below {
		if err := t.add(h, id, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// parse finds what is below the page that was read, chunks left out.
func (t *treeSum) parse() (treePage, error) {
	le := binary.LittleEndian
	sum := sha256.Sum256(t.buf)
	p := treePage{sum: treeHash(sum[:len(treeHash{})])}
	flags, count := le.Uint16(t.buf[8:]), int(le.Uint16(t.buf[10:]))
	if pageHeader+count*elemSize > len(t.buf) || flags != branchPage && flags != leafPage {
		return p, errors.New("not a page of a tree")
	}
	for i := range count {
		at := pageHeader + i*elemSize
		e := t.buf[at:]
		if flags == branchPage {
			p.below = append(p.below, le.Uint64(e[8:]))
			continue
		}
		pos, ksize := uint64(at)+uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:]))
		k, ok := slice(t.buf, pos, ksize)
		v, fits := slice(t.buf, pos+ksize, uint64(le.Uint32(e[12:])))
		switch {
		case !ok || !fits:
			return p, fmt.Errorf("element %d: out of bounds", i)
		case le.Uint32(e)&bucketFlag == 0:
		case len(v) < bucketSize:
			return p, fmt.Errorf("element %d: bucket out of bounds", i)
		case len(k) == 8:
			if binary.BigEndian.Uint64(k) >= t.fresh {
				e, err := entryFrom(k, le.Uint64(v), le.Uint64(v[8:]))
				if err != nil {
					return p, err
				}
				p.fresh = append(p.fresh, e)
			}
		case le.Uint64(v) != 0:
			p.below = append(p.below, le.Uint64(v))
		}
	}
	return p, nil
}

// holds says whether m's tree, which is known to be one, and the chunks that came with
// it are on disk as they were written.
func (m meta) holds(f io.ReaderAt) error {
	b, err := m.page(f)
	if err != nil {
		return err
	}
	if m.seal == nil {
		return fmt.Errorf("transaction %d: no seal: %w", m.txid, errCutOff)
	}
	t := treeSum{f: f, fresh: m.seal.fresh}
	sum, err := t.of(m, b[pageHeader:])
	if err != nil {
		return err
	}
	if sum != m.seal.tree {
		return fmt.Errorf("transaction %d: its tree has checksum %x, its seal %x: %w", m.txid, sum, m.seal.tree, errCutOff)
	}
	for _, p := range t.found {
		for _, e := range p.fresh {
			b := make([]byte, int(e.pages)*pageSize)
			if _, err := f.ReadAt(b, int64(e.root)*pageSize); err != nil {
				return fmt.Errorf("chunk at seq %d: %w", e.first, err)
			}
			n, err := leafSize(b, &e)
			if err == nil {
				_, err = frames(b[leafHeader:leafHeader+n], e.first, e.count)
			}
			if err != nil {
				return fmt.Errorf("transaction %d: chunk at seq %d: %w: %w", m.txid, e.first, err, errCutOff)
			}
		}
	}
	return nil
}

// page reads the meta page of m.
func (m meta) page(f io.ReaderAt) ([]byte, error) {
	p := make([]byte, pageSize)
	_, err := f.ReadAt(p, int64(m.txid%2)*pageSize)
	return p, err
}

// giveUp puts m, with a lower number, in the place of the meta whose transaction was cut
// off. So both metas are sound again, and m is the newer.
func (m meta) giveUp(f *os.File) error {
	p, err := m.page(f)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	m.txid--
	le.PutUint64(p, m.txid%2)
	b := p[pageHeader:]
	le.PutUint64(b[48:], m.txid)
	h := fnv.New64a()
	h.Write(b[:metaSum])
	le.PutUint64(b[metaSum:], h.Sum64())
	sum, err := (&treeSum{f: f, fresh: ^uint64(0)}).of(m, b)
	if err != nil {
		return err
	}
	copy(p[sealAt:], seal{fresh: ^uint64(0), tree: sum}.encode(m.txid))
	if _, err := f.WriteAt(p, int64(m.txid%2)*pageSize); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// sealer makes transactions of one handle durable.
type sealer struct {
	db  *bolt.DB
	f   *os.File
	sum treeSum
	// A file whose last transaction has no seal, as a new one, gets its next one the way
	// of bbolt: the seal of the one before is what tells one that was cut off.
	sealed bool
}

func newSealer(path string, db *bolt.DB) (*sealer, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &sealer{db: db, f: f, sum: treeSum{f: f, fresh: ^uint64(0)}}
	m, err := s.meta()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.sealed = m.seal != nil
	return s, nil
}

func (s *sealer) meta() (meta, error) {
	st, err := s.f.Stat()
	if err != nil {
		return meta{}, err
	}
	return metaInForce(s.f, st.Size())
}

// sync seals the last transaction, which added what is from seq fresh on, and makes it
// durable.
func (s *sealer) sync(fresh uint64) error {
	m, err := s.meta()
	if err != nil {
		return err
	}
	b, err := m.page(s.f)
	if err != nil {
		return err
	}
	sum, err := s.sum.of(m, b[pageHeader:])
	if err != nil {
		return err
	}
	if _, err := s.f.WriteAt(seal{fresh, sum}.encode(m.txid), int64(m.txid%2)*pageSize+sealAt); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(s.f.Fd())); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	s.sealed = true
	return nil
}

func (s *sealer) close() error {
	if s == nil {
		return nil
	}
	return s.f.Close()
}
