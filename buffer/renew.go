// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"fmt"
	"time"
)

// Renew begins a new epoch with what is not acknowledged: those records are its first,
// from seq 1, in the same order. It is for who was fenced: the server has an epoch above
// ours, and takes nothing of this one any more. The new epoch is above that as well; above
// may be empty.
//
// It is one transaction, whatever the queue holds: after a crash the one epoch is in
// force, or the other. Losses not yet reported keep their count and lose their range, as
// their numbers mean nothing in the new epoch. What was under way when it was dropped
// counts as lost. What is kept of acknowledged records can be scanned but not read again.
//
// The one who calls Read calls it, between two of them, and then reads behind seq 0. A
// record appended carries on whatever its payload says of epoch and seq; who writes such
// payloads has to ask Epoch and Next again.
func (q *Queue) Renew(ctx context.Context, above string) (epoch string, err error) {
	q.mu.Lock()
	if err := q.usable(); err != nil {
		q.mu.Unlock()
		return "", fmt.Errorf("renew epoch: %w", err)
	}
	epoch = mintEpoch(time.Now())
	for _, e := range []string{q.state.epoch, above} {
		if len(e) != epochLen && e != "" {
			q.mu.Unlock()
			return "", fmt.Errorf("renew epoch: %q is none", e)
		}
		if epoch <= e { // the clock was set back, here or there
			epoch = nextEpoch(e)
		}
	}
	q.renew = epoch
	q.dirty()
	q.mu.Unlock()
	if err := q.Flush(ctx); err != nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.renew == epoch {
			q.renew = ""
		}
		return "", fmt.Errorf("renew epoch: %w", err)
	}
	return q.Epoch(), nil
}
