// SPDX-License-Identifier: Apache-2.0

// Package defects has each way of losing the context once. It is never built;
// the static check must report every line that says so, and no other.
package defects

import (
	"context"
	"fmt"
	"log" // want "log"
	"log/slog" // want "log/slog"
	"net/http"
	"os"

	"go.uber.org/zap"
	core "go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

type stage struct {
	log   *zap.Logger        // want "zap.Logger"
	sugar *zap.SugaredLogger // want "zap.SugaredLogger"
	core  core.Core          // want "core.Core"
	ctx   context.Context    // want "context.Context in a struct"
	std   any
	count int
}

var global = zap.L() // want "zap.L"

func newStage(ctx context.Context) *stage {
	s := &stage{count: 1}
	s.std = logging.From(ctx)              // want "logging.From is kept"
	_ = stage{std: logging.From(ctx)}      // want "logging.From is kept"
	l := logging.From(ctx)                 // a name for a few lines is fine
	l.Info("ready")
	keep(logging.From(ctx))                // want "logging.From is kept"
	return s
}

func keep(any) {}

func (s *stage) run(ctx context.Context) {
	logging.From(context.Background()).Info("x") // want "context.Background"
	go func() {
		ctx := context.TODO() // want "context.TODO"
		logging.From(ctx).Info("x")
	}()
	logging.From(ctx).Info("fine", zap.Int("n", 1))
	logging.From(context.WithoutCancel(ctx)).Info("fine")
	_ = logging.With(ctx, zap.String(logging.KeyComponent, "worker")) // want "component \"worker\""
	_ = logging.With(ctx, zap.String(logging.KeyComponent, "sensor"))
	_, _ = logging.New(logging.Options{}, nil) // want "logging.New"
	_ = logging.Into(ctx, nil)                 // want "logging.Into"
	zap.NewNop().Info("x")                     // want "zap.NewNop"
	zap.S().Info("x")                          // want "zap.S"
	fmt.Println("x")                           // want "fmt.Println"
	fmt.Printf("x")                            // want "fmt.Printf"
	println("x")                               // want "println"
	fmt.Fprintln(os.Stderr, "x")               // want "os.Stderr"
	_ = &http.Server{Handler: nil}             // want "(BaseContext, ErrorLog)"
	_ = &http.Server{BaseContext: nil}         // want "(ErrorLog)"
	_ = &http.Server{BaseContext: nil, ErrorLog: nil}
}

func (s *stage) write(ctx context.Context, n int, ev *event.Event) {
	logging.From(ctx).Info("rejected")         // want "a line about an event without inCases"
	s.limiter.Log(ctx, zap.ErrorLevel, "key", "rejected") // want "a line about an event without inCases"
	logging.From(inCases(ctx, ev)).Info("fine")
	s.limiter.Log(inCases(ctx, ev), zap.ErrorLevel, "key", "fine")
}

func (s *stage) read(ctx context.Context, n int) {
	s.limiter.Log(ctx, zap.ErrorLevel, "key", "fine: there is no event yet")
}

func inCases(ctx context.Context, ev *event.Event) context.Context { return ctx }
