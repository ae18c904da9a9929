// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// Info is what a buffer says about itself, as JSON. Counts are records.
type Info struct {
	Path         string    `json:"path"`
	Epoch        string    `json:"epoch"`
	Cap          int64     `json:"cap"`
	Bytes        int64     `json:"bytes"`        // of the file that hold records
	UnsentBytes  int64     `json:"unsent_bytes"` // of these, with records that are not delivered
	Chunks       int       `json:"chunks"`
	Records      uint64    `json:"records"`
	Unsent       uint64    `json:"unsent"`
	First        uint64    `json:"first"` // oldest seq there is; behind Last when there is none
	Acked        uint64    `json:"acked"` // newest seq delivered
	Last         uint64    `json:"last"`  // newest seq
	Oldest       time.Time `json:"oldest,omitzero"`
	OldestUnsent time.Time `json:"oldest_unsent,omitzero"`
	Newest       time.Time `json:"newest,omitzero"`

	Compression       string `json:"compression,omitempty"`        // of chunks to come, as a running sensor has it
	OldestCompression string `json:"oldest_compression,omitempty"` // of the oldest chunk
	NewestCompression string `json:"newest_compression,omitempty"`

	Truncated uint64 `json:"truncated"` // dropped undelivered
	Reclaimed uint64 `json:"reclaimed"` // dropped after delivery
	Corrupt   uint64 `json:"corrupt"`
	InDoubt   uint64 `json:"in_doubt"`
	Salvaged  uint64 `json:"salvaged"`
	Losses    []Loss `json:"losses,omitempty"` // that no delivered record names yet

	Recovery    *Recovery `json:"recovery,omitempty"` // the last time that this run replaced a damaged file
	Quarantined int64     `json:"quarantined_bytes"`
	Aside       []Aside   `json:"set_aside,omitempty"`

	Pending  int       `json:"pending_bytes"`          // wait to be durable
	Resize   string    `json:"resize_error,omitempty"` // why the cap is not the configured one
	Error    string    `json:"error,omitempty"`
	ErrSince time.Time `json:"error_since,omitzero"`
}

// Loss is a range of records that will not be delivered; all zero when unknown.
type Loss struct {
	Cause string `json:"cause"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Count uint64 `json:"count"`
}

// Recovery says how a damaged file was replaced.
type Recovery struct {
	At       time.Time `json:"at"`
	Cause    string    `json:"cause"`
	Aside    string    `json:"set_aside,omitempty"`
	Exact    bool      `json:"exact"`
	Salvaged uint64    `json:"salvaged"`
	Lost     uint64    `json:"lost"`
}

// Aside is what was set aside, as damaged or as refused by Redis.
type Aside struct {
	Path  string    `json:"path"`
	At    time.Time `json:"at,omitzero"`
	Bytes int64     `json:"bytes"`
	Chunk uint64    `json:"chunk,omitempty"` // first seq of a chunk
	// Record is the seq of a record. What is neither chunk nor record is a whole file.
	Record uint64 `json:"record,omitempty"`
}

// NewInfo puts into JSON what a buffer says.
func NewInfo(b *buffer.Info) Info {
	i := Info{
		Path: b.Path, Epoch: b.Epoch, Cap: b.Cap, Bytes: b.Bytes, UnsentBytes: b.UnsentBytes, Chunks: b.Chunks, Records: b.Records, Unsent: b.Unsent,
		First: b.First, Acked: b.Acked, Last: b.Last, Oldest: b.Oldest, OldestUnsent: b.OldestUnsent, Newest: b.Newest,
		Compression: b.Compression, OldestCompression: b.OldestCompression, NewestCompression: b.NewestCompression,
		Truncated: b.Truncated, Reclaimed: b.Reclaimed, Corrupt: b.Corrupt, InDoubt: b.InDoubt, Salvaged: b.Salvaged,
		Losses: losses(b.Lost), Quarantined: b.Quarantined, Pending: b.Pending, ErrSince: b.ErrSince,
	}
	if b.Err != nil {
		i.Error = b.Err.Error()
	}
	if b.Resized != nil && b.Resized.Err != nil {
		i.Resize = b.Resized.Err.Error()
	}
	i.Recovery = NewRecovery(b.Recovery)
	for _, a := range b.Aside {
		i.Aside = append(i.Aside, Aside(a))
	}
	return i
}

// NewRecovery is nil for none.
func NewRecovery(r *buffer.Recovery) *Recovery {
	if r == nil {
		return nil
	}
	out := &Recovery{At: r.At, Aside: r.Aside, Exact: r.Exact, Salvaged: r.Salvaged, Lost: r.Lost}
	if r.Cause != nil {
		out.Cause = r.Cause.Error()
	}
	return out
}

func losses(list []buffer.Loss) (out []Loss) {
	for _, l := range list {
		out = append(out, Loss(l))
	}
	return out
}
