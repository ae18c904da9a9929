// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configure [Open]. Zero values mean the defaults named here.
type Options struct {
	// Dir is the directory of the file; it is made when missing and locked
	// while the queue is open.
	Dir string

	// Cap is the size of the file in bytes, default 512 MiB. The file has
	// this size from the start and never another.
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

	// MaxRecord is the largest record accepted, default 4 MiB.
	MaxRecord int

	// Committed is called by the writer after each durable commit with the
	// mark that is now on disk, nil when there is none. It must not block
	// nor modify the mark.
	Committed func(mark []byte)

	Registerer prometheus.Registerer

	// BeforeCommit is a seam for tests: the writer calls it before each
	// transaction. It may block, as a stalled disk does; an error counts as
	// that of the transaction.
	BeforeCommit func() error

	// afterCommit is called after each transaction; an error counts as that
	// of an fsync which did its work nevertheless.
	afterCommit func() error
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
	maxRecycle     = 1 * mib               // larger memory is not kept for reuse
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
	if o.CommitBytes < minChunk || o.MaxRecord < 1 || o.MaxRecord > maxFrame {
		return o, fmt.Errorf("commit bytes %d, max record %d: out of range", o.CommitBytes, o.MaxRecord)
	}
	if need := max(o.maxPending(), o.MaxRecord+frameHeader); o.maxBatch() < need {
		return o, fmt.Errorf("cap of %d bytes is too small for commits of %d bytes: about %d are needed",
			o.Cap, need, 7*int64(need)/2+2*sparePages*pageSize)
	}
	return o, nil
}

// maxCommit is the most that one transaction may add: what the logical limit
// leaves when it keeps room for two more of the same size.
func (o Options) maxCommit() int {
	return int((fillLimit*float64(o.Cap) - sparePages*pageSize) / 3)
}

// maxBatch leaves room for what chunks and pages add to the frames.
func (o Options) maxBatch() int { return o.maxCommit() / 32 * 31 }

// maxPending is how much may wait for the writer, one batch of any size aside.
func (o Options) maxPending() int { return 4 * o.CommitBytes }

// chunkBytes is the largest value of a chunk of more than one record.
func (o Options) chunkBytes() int { return o.CommitBytes/pageSize*pageSize - leafHeader }
