// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"context"
	"maps"
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
// the next one that is says how many were not. Who can, calls Settle now and then,
// and Flush at the end, so that the last count is said too. Safe for concurrent
// use.
type Limiter struct {
	interval time.Duration
	mu       sync.Mutex
	keys     map[string]*limit
}

type limit struct {
	last       time.Time
	suppressed uint64
	say        func(suppressed uint64) // writes the last line that was suppressed
}

// NewLimiter makes a Limiter that lets one line per key through in an interval.
func NewLimiter(interval time.Duration) *Limiter {
	return &Limiter{interval: interval, keys: make(map[string]*limit)}
}

// Allow reports whether a line of this key may be written now, and how many
// were suppressed since the last one that was.
func (l *Limiter) Allow(key string) (suppressed uint64, ok bool) { return l.allow(key, nil) }

func (l *Limiter) allow(key string, say func(uint64)) (suppressed uint64, ok bool) {
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
	k.say = say
	return 0, false
}

// Say calls say if [Limiter.Allow] lets it, with how many were left out before it, and
// reports whether it did. The last one left out may be called later.
func (l *Limiter) Say(key string, say func(suppressed uint64)) bool {
	n, ok := l.allow(key, say)
	if ok {
		say(n)
	}
	return ok
}

// Log writes the line at the given level if [Limiter.Allow] lets it, with the
// field suppressed=N when lines of this key were left out before it. It reports
// whether the line was written. The last one left out may be written later, so
// what the fields refer to must not change.
func (l *Limiter) Log(ctx context.Context, level zapcore.Level, key, msg string, fields ...zap.Field) bool {
	log := From(ctx)
	return l.Say(key, func(n uint64) {
		if n > 0 {
			fields = append(slices.Clip(fields), zap.Uint64(KeySuppressed, n))
		}
		log.Log(level, msg, fields...)
	})
}

// Settle writes, for each key whose interval is over, the last line that was
// suppressed, and how many there were before it.
func (l *Limiter) Settle() { l.settle(false) }

// Flush is Settle for all keys, at the end.
func (l *Limiter) Flush() { l.settle(true) }

func (l *Limiter) settle(all bool) {
	type due struct {
		say func(uint64)
		n   uint64
	}
	var lines []due
	l.mu.Lock()
	now := time.Now()
	for _, key := range slices.Sorted(maps.Keys(l.keys)) {
		k := l.keys[key]
		if !all && now.Sub(k.last) < l.interval {
			continue
		}
		if k.suppressed == 0 || k.say == nil {
			// Without a line the next one is the first again; a count that only its
			// owner can word waits for it.
			if k.suppressed == 0 {
				delete(l.keys, key)
			}
			continue
		}
		lines = append(lines, due{k.say, k.suppressed - 1}) // this one is written now
		k.suppressed, k.last = 0, now
	}
	l.mu.Unlock()
	for _, d := range lines {
		d.say(d.n)
	}
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
