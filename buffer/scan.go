// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// Scan calls visit for the durable records written since a time or a moment before
// it, oldest first, delivered or not, until visit returns false. Data is valid until
// visit returns. Any goroutine may call it at any time: it is a view. It hands out
// nothing in the sense of [Queue.Read], and passes over what leaves the queue
// meanwhile or cannot be read, which is Read's to report. It costs a read of the
// file from there on.
func (q *Queue) Scan(ctx context.Context, since time.Time, visit func(Record) bool) error {
	q.mu.Lock()
	entries := slices.Clone(q.index.live())
	q.mu.Unlock()
	var p []byte
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("scan: %w", err)
		}
		// An entry's time is that of its commit or later.
		if e.at != 0 && e.at < since.UnixNano() {
			continue
		}
		p = slices.Grow(p[:0], int(e.pages)*pageSize)[:int(e.pages)*pageSize]
		if _, err := q.file.Load().ReadAt(p, int64(e.root)*pageSize); err != nil {
			continue
		}
		v, err := leafValue(p, e.root, e.pages)
		if err != nil {
			continue
		}
		b, err := frames(v, e.first, e.count)
		// That the checksum and the seq are right proves that these are the bytes.
		if err != nil || int64(binary.LittleEndian.Uint64(v[32:])) < since.UnixNano() {
			continue
		}
		for seq := e.first; seq <= e.last(); seq++ {
			rec, rest, ok := nextFrame(b)
			if !ok {
				break // verified; cannot be
			}
			rec.Seq, b = seq, rest
			if !visit(rec) {
				return nil
			}
		}
	}
	return nil
}
