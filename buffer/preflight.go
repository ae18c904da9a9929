// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// bbolt panics over a damaged tree, partly in a goroutine of its own where no
// recover reaches. So the tree is checked with plain reads before bbolt maps
// the file: both metas, every page of the tree once, bounds, key order, and a
// stored freelist against the pages in use.
//
// Of a chunk bbolt reads the first page, when it has to find out which pages are free and when
// the chunk is deleted. To check these is a read for each chunk. A file that was closed spares
// that: its list of free pages is stored, the seal vouches for the tree, and the tree has the
// extent of each chunk. Then its page is looked at before it is deleted (mend.go).

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
	alone                       bool  // the other meta is damaged: a transaction may be missing
	missing                     bool  // one was written, as the seal beside the damaged meta says
	seal                        *seal // nil when it has none
	other                       *meta // the older one, when that has a seal
	cut                         error // what is wrong with the transaction after this one, which is to be given up
	newer                       *meta // that one, when only a chunk of it is wrong
	chunks                      index // found by walk
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
// closed is the transaction that the file was closed with, 0 when that is not known.
// What is wrong with the content matches ErrDamaged; a disk that does not yield
// it does not, as it may yet: whoever calls tries again, and takes it for that in the end.
func preflight(f io.ReaderAt, size int64, closed uint64) (meta, error) {
	fail := func(format string, args ...any) (meta, error) {
		err := fmt.Errorf("preflight: "+format, args...)
		if errors.Is(err, syscall.EIO) {
			return meta{}, err
		}
		return meta{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	m, err := metaInForce(f, size)
	if err != nil {
		return fail("%w", err)
	}
	if m.txid == closed && m.freelist != noFreelist && m.seal != nil && m.proven(f, nil) == nil {
		return m, nil
	}
	if err = m.check(f); err == nil {
		return m, nil
	}
	if o := m.other; o != nil && !errors.Is(err, syscall.EIO) && o.inBounds(size) == nil {
		chunk := errors.Is(err, errChunk)
		// A chunk of it that is damaged, too, was so before m was written: one for the reader.
		if cerr := o.check(f); cerr == nil || errors.Is(cerr, errChunk) && !chunk {
			if o.cut = err; chunk {
				o.newer = &m
			}
			return *o, nil
		}
	}
	if errors.Is(err, errChunk) {
		return m, nil // the tree is as it was written; the chunk is for the reader to find
	}
	return fail("%w", err)
}

// check checks the tree that m leads to, and the first page of each of its chunks.
func (m *meta) check(f io.ReaderAt) error {
	return m.proven(f, func(e *entry) error {
		var p [leafHeader]byte
		if _, err := f.ReadAt(p[:], int64(e.root)*pageSize); err != nil {
			return fmt.Errorf("page %d: %w", e.root, err)
		}
		if _, err := leafSize(p[:], e); err != nil {
			return fmt.Errorf("page %d: %s", e.root, err.Error()) // no errChunk, as bbolt would trust it
		}
		return nil
	})
}

// proven checks the tree that m leads to against its seal. Each chunk is for chunk to check,
// when that is not nil.
func (m *meta) proven(f io.ReaderAt, chunk func(e *entry) error) error {
	if err := m.walk(f, chunk); err != nil {
		return err
	}
	if m.seal == nil && m.other == nil {
		return nil // of a version that had no seals, or new
	}
	return m.holds(f)
}

// walk walks the tree that m leads to, and the list of free pages.
func (m *meta) walk(f io.ReaderAt, chunk func(e *entry) error) error {
	w := walker{f: f, pages: m.pages, seen: make([]uint64, m.pages/64+1), chunk: chunk}
	w.seen[0] = 3 // the metas
	if err := w.tree(m.root, nil, nil, 0); err != nil {
		return err
	}
	m.chunks = w.found
	if m.freelist == noFreelist {
		return nil
	}
	return w.freelist(m.freelist)
}

func (m meta) inBounds(size int64) error {
	if m.pages < 4 || m.pages > uint64(size)/pageSize {
		return fmt.Errorf("%d pages in a file of %d bytes", m.pages, size)
	}
	return nil
}

// metaInForce returns the newer of the two metas that are sound.
func metaInForce(f io.ReaderAt, size int64) (m meta, err error) {
	if size < 4*pageSize {
		return m, fmt.Errorf("file of %d bytes", size)
	}
	var errs [2]error
	found := 0
	var damaged []byte
	for i := range errs {
		page := make([]byte, pageSize)
		if _, err := f.ReadAt(page, int64(i)*pageSize); err != nil {
			return meta{}, fmt.Errorf("read meta page %d: %w", i, err)
		}
		var this meta
		if this, errs[i] = parseMeta(page); errs[i] != nil {
			damaged = page
			continue
		}
		if s, ok := parseSeal(page, this.txid); ok && this.txid%2 == uint64(i) {
			this.seal = &s
		}
		older := m
		if found = found + 1; found == 1 || this.txid > m.txid {
			m = this
		} else {
			older = this
		}
		if found == 2 && older.seal != nil && older.txid+1 == m.txid {
			m.other = &older
		}
	}
	// bbolt takes the page size from the first meta that is valid otherwise.
	if errors.Is(errs[0], errPageSize) || errors.Is(errs[1], errPageSize) {
		return meta{}, errors.Join(errs[:]...)
	}
	if errs[0] != nil && errs[1] != nil {
		return meta{}, fmt.Errorf("meta page 0: %w; meta page 1: %w", errs[0], errs[1])
	}
	if m.alone = damaged != nil; m.alone {
		_, m.missing = parseSeal(damaged, m.txid+1)
	}
	if err := m.inBounds(size); err != nil {
		return meta{}, err
	}
	return m, nil
}

type walker struct {
	f     io.ReaderAt
	pages uint64
	seen  []uint64             // bit per page
	chunk func(e *entry) error // looks at the first page of a chunk; may be nil
	found index
}

// claim marks n pages as in use, each at most once.
func (w *walker) claim(id, n uint64) error {
	if id < 2 || id >= w.pages || n > w.pages-id {
		return fmt.Errorf("page %d: out of bounds", id)
	}
	for end := id + n; id < end; {
		k := min(64-id%64, end-id)
		mask := (^uint64(0) >> (64 - k)) << (id % 64)
		if w.seen[id/64]&mask != 0 {
			return fmt.Errorf("page %d or one of the %d behind it: used twice", id, k-1)
		}
		w.seen[id/64] |= mask
		id += k
	}
	return nil
}

// ahead tells the disk that page id will be read: otherwise each read would wait for it.
func (w *walker) ahead(id uint64) {
	if f, ok := w.f.(*os.File); ok {
		_ = unix.Fadvise(int(f.Fd()), int64(id)*pageSize, pageSize, unix.FADV_WILLNEED)
	}
}

// load reads page id, of at most limit pages, and checks its header.
func (w *walker) load(id, limit uint64) (p []byte, flags, count uint16, err error) {
	if id < 2 || id >= w.pages {
		return nil, 0, 0, fmt.Errorf("page %d: out of bounds", id)
	}
	p = make([]byte, pageSize)
	if _, err := w.f.ReadAt(p, int64(id)*pageSize); err != nil {
		return nil, 0, 0, fmt.Errorf("page %d: %w", id, err)
	}
	le := binary.LittleEndian
	if got := le.Uint64(p); got != id {
		return nil, 0, 0, fmt.Errorf("page %d: says it is page %d", id, got)
	}
	flags, count = le.Uint16(p[8:]), le.Uint16(p[10:])
	n := uint64(le.Uint32(p[12:])) + 1
	if n > limit {
		return nil, 0, 0, fmt.Errorf("page %d: of %d pages", id, n)
	}
	if err := w.claim(id, n); err != nil {
		return nil, 0, 0, err
	}
	if n > 1 {
		p = make([]byte, n*pageSize)
		if _, err := w.f.ReadAt(p, int64(id)*pageSize); err != nil {
			return nil, 0, 0, fmt.Errorf("page %d: %w", id, err)
		}
	}
	return p, flags, count, nil
}

// tree checks the page id and everything below it. Keys must be in [low, high).
func (w *walker) tree(id uint64, low, high []byte, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: tree is too deep", id)
	}
	p, flags, count, err := w.load(id, maxChunkPages)
	if err != nil {
		return err
	}
	switch flags {
	case branchPage:
		return w.branch(id, p, int(count), low, high, depth)
	case leafPage:
		if err := w.leaf(p, int(count), low, high, depth); err != nil {
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
		w.ahead(le.Uint64(p[pageHeader+i*elemSize+8:]))
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

// leaf checks the elements of a leaf.
func (w *walker) leaf(p []byte, count int, low, high []byte, depth int) error {
	if pageHeader+count*elemSize > len(p) {
		return fmt.Errorf("leaf with %d elements", count)
	}
	le := binary.LittleEndian
	keys := make([][]byte, count)
	var chunks []entry
	for i := range count {
		e := p[pageHeader+i*elemSize:]
		eflags, at := le.Uint32(e), uint64(pageHeader+i*elemSize)+uint64(le.Uint32(e[4:]))
		ksize, vsize := uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		key, ok := slice(p, at, ksize)
		if !ok || len(key) == 0 || at+ksize+vsize > uint64(len(p)) {
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
			if len(key) == 8 {
				e, err := entryFrom(key, le.Uint64(v), le.Uint64(v[8:]))
				if err == nil {
					err = w.claim(e.root, uint64(e.pages))
				}
				if err != nil {
					return err
				}
				w.found.push(e)
				if w.chunk != nil {
					w.ahead(e.root)
					chunks = append(chunks, e)
				}
				continue
			}
			if err := w.bucket(v, depth); err != nil {
				return err
			}
		default:
			return fmt.Errorf("element %d: flags %#x", i, eflags)
		}
	}
	if err := ordered(keys, low, high); err != nil {
		return err
	}
	for i := range chunks {
		if err := w.chunk(&chunks[i]); err != nil {
			return err
		}
	}
	return nil
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
	return w.leaf(p, count, nil, nil, depth)
}

// freelist checks the stored list of free pages: in bounds, ascending, and
// none of them in use.
func (w *walker) freelist(id uint64) error {
	p, flags, count, err := w.load(id, w.pages*8/pageSize+2)
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
