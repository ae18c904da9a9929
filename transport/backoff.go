// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"syscall"
	"time"
)

// backoff spreads attempts over a random time below a growing limit (full
// jitter): thousands of agents that lost one server must not return in step.
type backoff struct {
	first, base, cap time.Duration
	healthy          time.Duration

	failures int
	taken    int       // batches since the last failure that was forgiven
	last     time.Time // when the server took a batch
}

// A network that resets one request in twenty must not slow delivery down for long; a
// server that takes a batch or two and is gone again is still left alone.
const (
	// forgiving is how many batches that the server takes make up for one failure.
	forgiving = 8
	// grace is for how long after a batch attempts that were reset do not count. A
	// connect is a dozen requests: such a network lets every other one through. Those
	// that are refused or time out count, as a server that is down or overloaded has them.
	grace = 5 * time.Second
)

// delivered counts a batch that the server has taken.
func (b *backoff) delivered() {
	b.last = time.Now()
	if b.failures == 0 {
		return
	}
	if b.taken++; b.taken == forgiving {
		b.failures, b.taken = b.failures-1, 0
	}
}

// next counts a failure and returns how long to wait before the next attempt.
// up is how long the connection that failed had worked, zero when it never did; torn
// says that it was reset.
func (b *backoff) next(up time.Duration, slow, torn bool) time.Duration {
	if torn && up == 0 && time.Since(b.last) < grace {
		return rand.N(b.first + 1)
	}
	if up >= b.healthy {
		b.failures, b.taken = 0, 0
	}
	limit, top := b.base, b.cap
	if slow {
		top *= 2
	}
	if b.failures == 0 && up > 0 {
		limit = b.first
	}
	for i := 1; i < b.failures && limit < top; i++ {
		limit *= 2
	}
	b.failures++
	return rand.N(min(limit, top) + 1)
}

// torn reports whether err is a connection that the other side, or the network, reset.
func torn(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// jitter returns d give or take a quarter.
func jitter(d time.Duration) time.Duration {
	return d - d/4 + rand.N(d/2+1)
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
