// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
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

// TestDecisionsFollowAcrossARenewal: in the new epoch numbers begin again.
func TestDecisionsFollowAcrossARenewal(t *testing.T) {
	a, s := decisionHost(t, 3)
	r, err := http.Get(s.URL + "?since=2026-01-31T15:04:05Z&follow=1")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	lines := bufio.NewScanner(r.Body)
	var got []string
	read := func(n int) {
		t.Helper()
		for range n {
			if !lines.Scan() {
				t.Fatalf("%q, %v", got, lines.Err())
			}
			got = append(got, lines.Text())
		}
	}
	pass := func(seqs ...uint64) {
		for _, seq := range seqs {
			a.tap.publish(fmt.Appendf(nil, `{"metadata":{"sequence":%d}}`, seq), true)
		}
	}
	read(3)
	pass(3, 4) // the first of them was shown already
	read(1)
	if _, err := a.queue.Renew(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	pass(1, 5, 6)
	read(2)
	for n, seq := range []uint64{1, 2, 3, 4, 1, 5} {
		if want := fmt.Sprintf(`{"metadata":{"sequence":%d}}`, seq); got[n] != want {
			t.Errorf("line %d: %s, want %s", n, got[n], want)
		}
	}
	close(a.ending)
}
