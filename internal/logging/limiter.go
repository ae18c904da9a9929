// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// maxLimiterKeys bounds a Limiter's memory. Keys are meant to come from a closed
// set (error classes); beyond the bound all further keys share one budget.
const maxLimiterKeys = 256

// Limiter thins repeated lines: at most one per key and interval is written, and
// the next one that is says how many were not. Safe for concurrent use.
type Limiter struct {
	interval time.Duration
	mu       sync.Mutex
	keys     map[string]*limit
}

type limit struct {
	last       time.Time
	suppressed uint64
}

// NewLimiter makes a Limiter that lets one line per key through in an interval.
func NewLimiter(interval time.Duration) *Limiter {
	return &Limiter{interval: interval, keys: make(map[string]*limit)}
}

// Allow reports whether a line of this key may be written now, and how many
// were suppressed since the last one that was.
func (l *Limiter) Allow(key string) (suppressed uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.keys[key]
	if k == nil && len(l.keys) >= maxLimiterKeys {
		key = ""
		k = l.keys[key]
	}
	if k == nil {
		l.keys[key] = &limit{last: time.Now()}
		return 0, true
	}
	if now := time.Now(); now.Sub(k.last) >= l.interval {
		suppressed, k.suppressed, k.last = k.suppressed, 0, now
		return suppressed, true
	}
	k.suppressed++
	return 0, false
}

// Log writes the line at the given level if [Limiter.Allow] lets it, with the
// field suppressed=N when lines of this key were left out before it.
func (l *Limiter) Log(ctx context.Context, level zapcore.Level, key, msg string, fields ...zap.Field) {
	n, ok := l.Allow(key)
	if !ok {
		return
	}
	if n > 0 {
		fields = append(slices.Clip(fields), zap.Uint64(KeySuppressed, n))
	}
	From(ctx).Log(level, msg, fields...)
}

// Forget ends the interval of key, because its cause is gone: the next line of
// this key is written at once. It returns how many were suppressed meanwhile,
// for the line that reports the recovery.
func (l *Limiter) Forget(key string) (suppressed uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.keys[key]; k != nil {
		suppressed = k.suppressed
		delete(l.keys, key)
	}
	return suppressed
}
