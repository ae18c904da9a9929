// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"syscall"
)

// bbolt panics over a damaged tree, partly in a goroutine of its own where no
// recover reaches. So the tree is checked with plain reads before bbolt maps
// the file: both metas, every page of the tree once, bounds, key order, and a
// stored freelist against the pages in use.

const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2
	noFreelist  = ^uint64(0)
	pageHeader  = 16
	elemSize    = 16
	bucketSize  = 16 // root page, sequence

	branchPage   = 0x01
	leafPage     = 0x02
	metaPage     = 0x04
	freelistPage = 0x10
	bucketFlag   = 0x01

	maxDepth = 32
)

// meta is bbolt's meta page.
type meta struct {
	root, freelist, pages, txid uint64
	alone                       bool // the other meta is damaged: a transaction may be missing
}

var errPageSize = errors.New("unexpected page size")

func parseMeta(p []byte) (meta, error) {
	le := binary.LittleEndian
	b := p[pageHeader:]
	switch {
	case le.Uint32(b) != boltMagic:
		return meta{}, errors.New("not a bbolt file")
	case le.Uint32(b[4:]) != boltVersion:
		return meta{}, fmt.Errorf("bbolt version %d", le.Uint32(b[4:]))
	}
	h := fnv.New64a()
	h.Write(b[:56])
	switch {
	case h.Sum64() != le.Uint64(b[56:]):
		return meta{}, errors.New("checksum")
	case le.Uint32(b[8:]) != pageSize:
		return meta{}, fmt.Errorf("%w %d", errPageSize, le.Uint32(b[8:]))
	}
	return meta{root: le.Uint64(b[16:]), freelist: le.Uint64(b[32:]), pages: le.Uint64(b[40:]), txid: le.Uint64(b[48:])}, nil
}

// preflight checks the file of the given size and returns its meta in force.
// What is wrong with the content matches ErrDamaged; a disk that does not yield
// it does not, as it may yet.
func preflight(f io.ReaderAt, size int64) (meta, error) {
	fail := func(format string, args ...any) (meta, error) {
		err := fmt.Errorf("preflight: "+format, args...)
		if errors.Is(err, syscall.EIO) {
			return meta{}, err
		}
		return meta{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if size < 4*pageSize {
		return fail("file of %d bytes", size)
	}
	var m meta
	var errs [2]error
	page := make([]byte, pageSize)
	for i := range errs {
		if _, err := f.ReadAt(page, int64(i)*pageSize); err != nil {
			return fail("read meta page %d: %w", i, err)
		}
		var this meta
		if this, errs[i] = parseMeta(page); errs[i] == nil && (m.pages == 0 || this.txid > m.txid) {
			m = this
		}
	}
	// bbolt takes the page size from the first meta that is valid otherwise.
	if errors.Is(errs[0], errPageSize) || errors.Is(errs[1], errPageSize) {
		return fail("%w", errors.Join(errs[:]...))
	}
	if errs[0] != nil && errs[1] != nil {
		return fail("meta page 0: %w; meta page 1: %w", errs[0], errs[1])
	}
	m.alone = errs[0] != nil || errs[1] != nil
	if m.pages < 4 || m.pages > uint64(size)/pageSize {
		return fail("%d pages in a file of %d bytes", m.pages, size)
	}
	w := walker{f: f, pages: m.pages, seen: make([]uint64, m.pages/64+1)}
	w.seen[0] = 3 // the metas
	if err := w.tree(m.root, nil, nil, 0); err != nil {
		return fail("%w", err)
	}
	if m.freelist != noFreelist {
		if err := w.freelist(m.freelist); err != nil {
			return fail("%w", err)
		}
	}
	return m, nil
}

type walker struct {
	f     io.ReaderAt
	pages uint64
	seen  []uint64 // bit per page
}

// claim marks n pages as in use, each at most once.
func (w *walker) claim(id, n uint64) error {
	if id < 2 || id >= w.pages || n > w.pages-id {
		return fmt.Errorf("page %d: out of bounds", id)
	}
	for i := id; i < id+n; i++ {
		if w.seen[i/64]&(1<<(i%64)) != 0 {
			return fmt.Errorf("page %d: used twice", i)
		}
		w.seen[i/64] |= 1 << (i % 64)
	}
	return nil
}

// load reads page id and checks its header. All of its overflow pages are read
// when whole wants them; a chunk's payload is not looked at here.
func (w *walker) load(id uint64, whole func(flags, count uint16) bool) (p []byte, flags, count uint16, size uint64, err error) {
	if id < 2 || id >= w.pages {
		return nil, 0, 0, 0, fmt.Errorf("page %d: out of bounds", id)
	}
	p = make([]byte, pageSize)
	if _, err := w.f.ReadAt(p, int64(id)*pageSize); err != nil {
		return nil, 0, 0, 0, fmt.Errorf("page %d: %w", id, err)
	}
	le := binary.LittleEndian
	if got := le.Uint64(p); got != id {
		return nil, 0, 0, 0, fmt.Errorf("page %d: says it is page %d", id, got)
	}
	flags, count = le.Uint16(p[8:]), le.Uint16(p[10:])
	n := uint64(le.Uint32(p[12:])) + 1
	if err := w.claim(id, n); err != nil {
		return nil, 0, 0, 0, err
	}
	if size = n * pageSize; n > 1 && whole(flags, count) {
		p = make([]byte, size)
		if _, err := w.f.ReadAt(p, int64(id)*pageSize); err != nil {
			return nil, 0, 0, 0, fmt.Errorf("page %d: %w", id, err)
		}
	}
	return p, flags, count, size, nil
}

// tree checks the page id and everything below it. Keys must be in [low, high).
func (w *walker) tree(id uint64, low, high []byte, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: tree is too deep", id)
	}
	p, flags, count, size, err := w.load(id, func(_, count uint16) bool { return count > 1 })
	if err != nil {
		return err
	}
	switch flags {
	case branchPage:
		return w.branch(id, p, int(count), low, high, depth)
	case leafPage:
		if err := w.leaf(p, int(count), size, low, high, depth); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		return nil
	default:
		return fmt.Errorf("page %d: flags %#x", id, flags)
	}
}

func (w *walker) branch(id uint64, p []byte, count int, low, high []byte, depth int) error {
	if count == 0 || pageHeader+count*elemSize > len(p) {
		return fmt.Errorf("page %d: branch with %d elements", id, count)
	}
	le := binary.LittleEndian
	keys := make([][]byte, count)
	for i := range count {
		e := pageHeader + i*elemSize
		key, ok := slice(p, uint64(e)+uint64(le.Uint32(p[e:])), uint64(le.Uint32(p[e+4:])))
		if !ok || len(key) == 0 {
			return fmt.Errorf("page %d: element %d: out of bounds", id, i)
		}
		keys[i] = key
	}
	if err := ordered(keys, low, high); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i := range count {
		next := high
		if i+1 < count {
			next = keys[i+1]
		}
		if err := w.tree(le.Uint64(p[pageHeader+i*elemSize+8:]), keys[i], next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks the elements of a leaf; size is that of the whole page, of which
// p may hold only the start.
func (w *walker) leaf(p []byte, count int, size uint64, low, high []byte, depth int) error {
	if pageHeader+count*elemSize > len(p) {
		return fmt.Errorf("leaf with %d elements", count)
	}
	le := binary.LittleEndian
	keys := make([][]byte, count)
	for i := range count {
		e := p[pageHeader+i*elemSize:]
		eflags, at := le.Uint32(e), uint64(pageHeader+i*elemSize)+uint64(le.Uint32(e[4:]))
		ksize, vsize := uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		key, ok := slice(p, at, ksize)
		if !ok || len(key) == 0 || at+ksize+vsize > size {
			return fmt.Errorf("element %d: out of bounds", i)
		}
		keys[i] = key
		switch eflags {
		case 0:
		case bucketFlag:
			v, ok := slice(p, at+ksize, vsize)
			if !ok || len(v) < bucketSize {
				return fmt.Errorf("element %d: bucket out of bounds", i)
			}
			if err := w.bucket(v, depth); err != nil {
				return err
			}
		default:
			return fmt.Errorf("element %d: flags %#x", i, eflags)
		}
	}
	return ordered(keys, low, high)
}

// bucket checks the bucket whose header, and page if that is inline, is v.
func (w *walker) bucket(v []byte, depth int) error {
	le := binary.LittleEndian
	if root := le.Uint64(v); root != 0 {
		return w.tree(root, nil, nil, depth+1)
	}
	p := v[bucketSize:]
	if len(p) < pageHeader || le.Uint16(p[8:]) != leafPage {
		return errors.New("inline bucket without a leaf")
	}
	// An inline bucket holds no bucket, which also ends the recursion.
	count := int(le.Uint16(p[10:]))
	if pageHeader+count*elemSize > len(p) {
		return fmt.Errorf("inline leaf with %d elements", count)
	}
	for i := range count {
		if le.Uint32(p[pageHeader+i*elemSize:]) != 0 {
			return errors.New("bucket inside an inline bucket")
		}
	}
	return w.leaf(p, count, uint64(len(p)), nil, nil, depth)
}

// freelist checks the stored list of free pages: in bounds, ascending, and
// none of them in use.
func (w *walker) freelist(id uint64) error {
	p, flags, count, _, err := w.load(id, func(uint16, uint16) bool { return true })
	if err != nil {
		return err
	}
	if flags != freelistPage {
		return fmt.Errorf("page %d: freelist with flags %#x", id, flags)
	}
	le := binary.LittleEndian
	n, ids := uint64(count), p[pageHeader:]
	if count == 0xffff {
		n, ids = le.Uint64(ids), ids[8:]
	}
	if n > uint64(len(ids))/8 {
		return fmt.Errorf("page %d: freelist of %d pages", id, n)
	}
	for i := range n {
		if err := w.claim(le.Uint64(ids[i*8:]), 1); err != nil {
			return fmt.Errorf("freelist: %w", err)
		}
	}
	return nil
}

// ordered checks that the keys ascend within [low, high).
func ordered(keys [][]byte, low, high []byte) error {
	for i, k := range keys {
		if i > 0 && bytes.Compare(keys[i-1], k) >= 0 || i == 0 && low != nil && bytes.Compare(k, low) < 0 ||
			high != nil && bytes.Compare(k, high) >= 0 {
			return fmt.Errorf("element %d: key out of order", i)
		}
	}
	return nil
}

// slice returns n bytes of p from at.
func slice(p []byte, at, n uint64) ([]byte, bool) {
	if at > uint64(len(p)) || n > uint64(len(p))-at {
		return nil, false
	}
	return p[at : at+n], true
}
