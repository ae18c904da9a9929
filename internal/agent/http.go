// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// listenHTTP opens http.listen. It waits no longer than a moment for who resolves a name:
// that, or whoever holds the port, is no reason to watch nothing.
func (a *Agent) listenHTTP(ctx context.Context) net.Listener {
	if a.cfg.HTTP.Listen == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", a.cfg.HTTP.Listen)
	if err != nil {
		why := err.Error()
		a.unserved.Store(&why)
		return nil
	}
	a.unserved.Store(nil)
	return &boundListener{Listener: l}
}

// httpConns is how many connections to http.listen there are at the same time: who
// connects is not known, and may be any user of the host.
const httpConns = 64

// boundListener closes at once what connects beyond the bound.
type boundListener struct {
	net.Listener
	open atomic.Int32
}

func (l *boundListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= httpConns {
			return &boundConn{Conn: c, gone: func() { l.open.Add(-1) }}, nil
		}
		l.open.Add(-1)
		_ = c.Close() // nobody to tell
	}
}

// boundConn tells once that it was closed.
type boundConn struct {
	net.Conn
	once sync.Once
	gone func()
}

func (c *boundConn) Close() error {
	c.once.Do(c.gone)
	return c.Conn.Close()
}

// serveLater serves http.listen again whenever it could not be opened or was lost, until
// ctx ends.
func (a *Agent) serveLater(ctx context.Context, lost <-chan error, serve func(net.Listener)) {
	for ctx.Err() == nil {
		if a.unserved.Load() == nil {
			select {
			case <-ctx.Done():
				return
			case err := <-lost:
				why := err.Error()
				a.unserved.Store(&why)
			}
		}
		a.serveAgain(ctx, serve)
	}
}

// serveAgain makes it known that http.listen is not served, and tries it again until it is
// or ctx ends.
func (a *Agent) serveAgain(ctx context.Context, serve func(net.Listener)) {
	why, since := a.unserved.Load(), time.Now()
	address := a.cfg.HTTP.Listen
	a.decide(ctx, event.SelfInfo{
		Name: "HTTP Not Served", Severity: 4, Failed: true, Code: "HTTP_UNSERVED",
		Message: "/metrics and all else at http.listen is not served, while events are seen and kept: " + *why,
		Attrs:   map[string]any{"address": address, "error": *why, "remedy": "end what holds the port (ss -ltnp names it), or set http.listen to another address and restart; until then it is tried again each second"},
	})
	tick := time.NewTicker(monitorEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if l := a.listenHTTP(ctx); l != nil {
			serve(l)
			a.decide(ctx, event.SelfInfo{
				Name: "HTTP Served", Severity: 1, Code: "HTTP_SERVED", From: since, To: time.Now(),
				Message: "/metrics and all else at http.listen is served", Attrs: map[string]any{"address": address},
			})
			return
		}
	}
}

// handler serves what operators and Prometheus ask over HTTP on the loopback.
func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.serveMetrics())
	// Alive: systemd's watchdog, which is fed only while the stages move, is what
	// restarts a sensor that hangs.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /status", a.serveStatus)
	return mux
}

func (a *Agent) serveMetrics() http.Handler {
	return promhttp.HandlerFor(a.registry, promhttp.HandlerOpts{Registry: a.registry, MaxRequestsInFlight: 4})
}

// newServer returns a server that no slow or silent client can hold open. Requests
// inherit what ctx binds, and on the control socket they know who asks.
func newServer(ctx context.Context, h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ErrorLog: logging.Std(ctx, zap.WarnLevel),
		BaseContext: func(net.Listener) context.Context { return ctx }, ConnContext: identify,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: controlWrite, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
	}
}

// readyz answers 200 while events are seen and kept, delivered or not. A line
// each says what is not as it should be, and by which metric to see it.
func (a *Agent) readyz(w http.ResponseWriter, _ *http.Request) {
	state := a.mode.current.Load()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	word := "ready"
	if !state.ready() {
		word = "not ready"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	fmt.Fprintf(w, "%s: %s\n", word, state.Mode)
	for _, p := range state.Problems {
		fmt.Fprintln(w, p)
	}
}

func (a *Agent) serveStatus(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, a.status())
}

// serveTap streams events as they are appended, one JSON document per line.
func (a *Agent) serveTap(w http.ResponseWriter, r *http.Request) {
	v := a.tap.open(false)
	if v == nil {
		http.Error(w, fmt.Sprintf("all %d live views are taken", tapViewers), http.StatusServiceUnavailable)
		return
	}
	defer a.tap.close(v)
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	if _, err := w.Write(nil); err != nil || rc.Flush() != nil {
		return
	}
	a.follow(w, r, v, 0, "")
}

// follow writes what v gets until somebody ends it, but for records up to a seq of an
// epoch. After a renewal of that some may be written twice, but none is passed over.
func (a *Agent) follow(w http.ResponseWriter, r *http.Request, v *viewer, after uint64, epoch string) {
	rc := http.NewResponseController(w)
	told := time.Now()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-a.ending:
			return
		case line := <-v.lines:
			v.took(line)
			if after > 0 && seqOf(line) <= after && a.queue.Epoch() == epoch {
				continue
			}
			answerBy(w)
			if _, err := w.Write(line); err != nil {
				return
			}
		}
		behind := len(v.lines) > 0
		if v.dropped.Load() > 0 && (!behind || time.Since(told) >= tapTold) {
			fmt.Fprintf(w, "{\"tap_dropped\":%d}\n", v.dropped.Swap(0))
			told = time.Now()
		}
		if !behind && rc.Flush() != nil {
			return
		}
	}
}
