// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// decisionHost is a sensor that has nothing but a buffer, which has n decisions.
func decisionHost(t *testing.T, n int) (*Agent, *httptest.Server) {
	t.Helper()
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: t.TempDir(), Cap: 16 << 20, AllowUnsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close(context.Background()) }) // a test may have done so
	b := q.NewBatch()
	for seq := range n {
		if err := b.End(fmt.Appendf(b.Begin(buffer.DecisionsSystem), `{"metadata":{"sequence":%d}}`, seq+1), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	a := &Agent{queue: q, tap: &tap{}, ending: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(a.serveDecisions))
	t.Cleanup(s.Close)
	return a, s
}

// TestCutDecisionsDoNotLookComplete: an answer has an end only if the buffer was read to its.
func TestCutDecisionsDoNotLookComplete(t *testing.T) {
	a, s := decisionHost(t, 3)
	for _, want := range []error{nil, io.ErrUnexpectedEOF} {
		r, err := http.Get(s.URL + "?since=2026-01-31T15:04:05Z")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if !errors.Is(err, want) || (len(body) > 0) != (want == nil) {
			t.Errorf("%q, %v, want %v", body, err, want)
		}
		_ = a.queue.Close(t.Context()) // it cannot be read any more
	}
}
