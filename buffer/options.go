// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"fmt"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configure [Open]. Zero values mean the defaults named here.
type Options struct {
	// Dir is the directory of the file; it is made when missing and locked
	// while the queue is open.
	Dir string

	// Cap is the size of the file in bytes, default 512 MiB. The file has this
	// size from the start; one of another size is resized, as by [Queue.Resize].
	Cap int64

	// CommitBytes and CommitInterval end a group commit: that much is
	// pending, default 256 KiB, or that long has passed since the first
	// pending record, default 50 ms. CommitBytes also bounds a chunk.
	CommitBytes    int
	CommitInterval time.Duration

	// RetainAge and RetainBytes bound what is kept of acknowledged records,
	// whichever is reached first: default 5 min and 64 MiB, negative for
	// none. They make room for new records before anything else does.
	RetainAge   time.Duration
	RetainBytes int64

	// Compression of the chunks to come: "none", the default, "s2" or "zstd". A file may
	// hold chunks of all of them.
	Compression string

	// MaxRecord is the largest record accepted, default 4 MiB.
	MaxRecord int

	// Committed is called by the writer after each durable commit with the
	// mark that is now on disk, nil when there is none. It must not block
	// nor modify the mark.
	Committed func(mark []byte)

	// AllowUnsafe has Open take a place that has an unsafe [Hazard].
	AllowUnsafe bool

	Registerer prometheus.Registerer

	// BeforeCommit is a seam for tests: the writer calls it before each
	// transaction. It may block, as a stalled disk does; an error counts as
	// that of the transaction.
	BeforeCommit func() error

	// afterCommit is called after each transaction; an error counts as that
	// of an fsync which did its work nevertheless.
	afterCommit func() error

	// badSector is asked before each read of the file while it is checked or salvaged; its
	// error is that of the disk.
	badSector func(off, n int64) error
}

// reads is f as it is checked and salvaged.
func (o Options) reads(f io.ReaderAt) io.ReaderAt {
	if o.badSector == nil {
		return f
	}
	return badDisk{f, o.badSector}
}

type badDisk struct {
	io.ReaderAt
	fault func(off, n int64) error
}

func (b badDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := b.fault(off, int64(len(p))); err != nil {
		return 0, err
	}
	return b.ReaderAt.ReadAt(p, off)
}

const (
	kib = 1 << 10
	mib = 1 << 20

	// Pages that the logical limit leaves alone for the tree, and the share
	// of the file that it never fills: what a first-fit ring of runs of
	// different lengths needs so that a fitting run is always free.
	sparePages = 64
	fillLimit  = 0.92

	urgentInterval = 10 * time.Millisecond // first urgent record until its commit
	idleInterval   = time.Second           // acknowledgement until it is persisted when nothing else is
	maxRecycle     = 1 * mib               // a larger chunk is not kept for reuse
	maxBatchKept   = 2 * mib               // nor a larger batch: one of four commits fits
)

func (o Options) withDefaults() (Options, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
		*v = max(*v, 0)
	}
	def(&o.Cap, 512*mib)
	o.Cap -= o.Cap % pageSize
	if o.CommitBytes == 0 {
		o.CommitBytes = 256 * kib
	}
	if o.CommitInterval == 0 {
		o.CommitInterval = 50 * time.Millisecond
	}
	age := int64(o.RetainAge)
	def(&age, int64(5*time.Minute))
	o.RetainAge = time.Duration(age)
	def(&o.RetainBytes, 64*mib)
	if o.MaxRecord == 0 {
		o.MaxRecord = 4 * mib
	}
	return o, o.check()
}

// check says why a queue of these options could not work.
func (o Options) check() error {
	if o.CommitBytes < minChunk || o.MaxRecord < 1 || o.MaxRecord > maxFrame {
		return fmt.Errorf("commit bytes %d, max record %d: out of range", o.CommitBytes, o.MaxRecord)
	}
	if need := o.maxBatch(); o.maxCommit()/32*31 < need {
		return fmt.Errorf("cap of %d bytes is too small for commits of %d bytes: about %d are needed",
			o.Cap, need, 7*int64(need)/2+2*sparePages*pageSize)
	}
	return nil
}

// maxCommit is the most that one transaction may add: what the logical limit
// leaves when it keeps room for two more of the same size.
func (o Options) maxCommit() int {
	return int((fillLimit*float64(o.Cap) - sparePages*pageSize) / 3)
}

// maxBatch is the most that one batch may hold. It does not depend on the cap, which may
// shrink while a batch is filled; check leaves room for what chunks and pages add.
func (o Options) maxBatch() int { return max(o.maxPending(), o.MaxRecord+frameHeader) }

// maxPending is how much may wait for the writer, one batch of any size aside.
func (o Options) maxPending() int { return 4 * o.CommitBytes }

// chunkBytes is the largest value of a chunk of more than one record.
func (o Options) chunkBytes() int { return o.CommitBytes/pageSize*pageSize - leafHeader }
