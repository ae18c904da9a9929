// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"context"
	"log" // for libraries only
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

type contextKey struct{}

// bound is what a context carries: the bare logger and the fields bound to it,
// kept apart so that binding a key again replaces its value; zap's own With
// would write the key twice.
type bound struct {
	log    *Log // nil when the logger is a bare one
	base   *zap.Logger
	fields []zap.Field
	logger *zap.Logger // base with fields
}

// Into returns a context that logs to a logger made elsewhere, as tests do; its
// levels are its own. A program uses [Log.Into].
func Into(ctx context.Context, l *zap.Logger) context.Context {
	return context.WithValue(ctx, contextKey{}, &bound{base: l, logger: l})
}

// With returns a context whose lines also carry fields. A key that is bound
// already gets the new value. Bind at boundaries, not per event.
func With(ctx context.Context, fields ...zap.Field) context.Context {
	b, ok := ctx.Value(contextKey{}).(*bound)
	if !ok {
		l := unbound()
		b = &bound{base: l, logger: l}
	}
	merged := make([]zap.Field, 0, len(b.fields)+len(fields))
	merged = append(merged, b.fields...)
next:
	for _, f := range fields {
		for i := range merged {
			if merged[i].Key == f.Key {
				merged[i] = f
				continue next
			}
		}
		merged = append(merged, f)
	}
	return context.WithValue(ctx, contextKey{}, &bound{b.log, b.base, merged, b.base.With(merged...)})
}

// Of returns the Log of ctx, never nil: one without effect where ctx has none.
func Of(ctx context.Context) *Log {
	if b, ok := ctx.Value(contextKey{}).(*bound); ok && b.log != nil {
		return b.log
	}
	return &Log{Levels: newLevels(), logger: zap.NewNop()}
}

// Std returns a logger for a library that knows only the standard one.
func Std(ctx context.Context, level zapcore.Level) *log.Logger { //nolint:forbidigo // not to write with, but to pass on
	l, err := zap.NewStdLogAt(From(ctx), level)
	if err != nil { // no such level
		return zap.NewStdLog(From(ctx))
	}
	return l
}

// From returns the logger of ctx with all fields bound to it; never nil. When
// nothing was bound it writes JSON to standard error under the name "unbound",
// with the field unbound=true.
func From(ctx context.Context) *zap.Logger {
	if b, ok := ctx.Value(contextKey{}).(*bound); ok {
		return b.logger
	}
	return unbound()
}

// unbound is made anew at each use: it exists only to show a defect, and
// keeping one would be package state.
func unbound() *zap.Logger {
	core := zapcore.NewCore(jsonEncoder(isJournal(os.Stderr, os.Getenv("JOURNAL_STREAM"))), zapcore.Lock(os.Stderr), zapcore.InfoLevel)
	return zap.New(core).Named("unbound").With(zap.Bool(keyUnbound, true))
}
