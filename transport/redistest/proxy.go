// SPDX-License-Identifier: Apache-2.0

package redistest

import (
	"bytes"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Faults says how often a [Proxy] does what to a request, as probabilities.
type Faults struct {
	DropReply float64       // the server applies the request; the reply is dropped, the connection reset
	Reset     float64       // half of the request is passed on, then both sides are reset
	Stall     float64       // the reply is held back for StallFor, then the connection is reset
	StallFor  time.Duration // choose it longer than the client's timeout
	Seed      uint64
	Delay     time.Duration // of each reply, as by a network with such a round trip

	Rate int // bytes a second of each connection's requests; 0: any number

	// What has more bytes than Limit, or Word in it, is reset each time, and what is not
	// longer than Spare never.
	Limit, Spare int
	Word         string
}

// Proxy passes TCP connections on to a server and injects faults. It takes what
// a client sends until a reply comes as one request.
type Proxy struct {
	network, upstream string
	ln                net.Listener
	wg                sync.WaitGroup
	done              chan struct{}

	mu     sync.Mutex
	rng    *rand.Rand
	faults Faults
	open   map[net.Conn]struct{}

	// Dropped, Resets and Stalls count the faults injected, Refused those of Limit and Word.
	Dropped, Resets, Stalls, Refused atomic.Int64
}

// StartProxy listens on a free loopback port for connections to addr, in the
// form of [Server.Addr], and ends with the test.
func StartProxy(tb testing.TB, addr string, f Faults) *Proxy {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{
		network: "tcp", upstream: addr, ln: ln, done: make(chan struct{}),
		rng: rand.New(rand.NewPCG(f.Seed, 1)), faults: f, open: make(map[net.Conn]struct{}),
	}
	if path, unix := strings.CutPrefix(addr, "unix://"); unix {
		p.network, p.upstream = "unix", path
	}
	p.wg.Go(p.accept)
	tb.Cleanup(p.close)
	return p
}

// Addr is where clients connect.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// SetFaults replaces the probabilities; the random sequence goes on.
func (p *Proxy) SetFaults(f Faults) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = f
}

func (p *Proxy) close() {
	close(p.done)
	p.ln.Close()
	p.mu.Lock()
	for c := range p.open {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial(p.network, p.upstream)
		if err != nil {
			reset(client)
			continue
		}
		p.mu.Lock()
		p.open[client], p.open[server] = struct{}{}, struct{}{}
		p.mu.Unlock()
		l := &link{p: p, client: client, server: server}
		p.wg.Go(l.requests)
		p.wg.Go(l.replies)
	}
}

type fate int

const (
	pass fate = iota
	dropReply
	resetRequest
	stallReply
)

// draw decides what happens to a request.
func (p *Proxy) draw() (fate, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	x, f := p.rng.Float64(), p.faults
	switch {
	case x < f.DropReply:
		return dropReply, 0
	case x < f.DropReply+f.Reset:
		return resetRequest, 0
	case x < f.DropReply+f.Reset+f.Stall:
		return stallReply, f.StallFor
	}
	return pass, 0
}

// refuses reports whether a request is one that never passes, by how long it is so far and
// by what came last of it.
func (p *Proxy) refuses(size int, part []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.faults
	return f.Limit > 0 && size > f.Limit || f.Word != "" && bytes.Contains(part, []byte(f.Word))
}

func (p *Proxy) spare() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults.Spare
}

func (p *Proxy) rate() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults.Rate
}

func (p *Proxy) delay() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults.Delay
}

// wait returns at the latest when the proxy ends.
func (p *Proxy) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.done:
	}
}

// link is one client's connection through the proxy.
type link struct {
	p              *Proxy
	client, server net.Conn

	mu      sync.Mutex
	pending bool // a request was begun and not answered
	size    int  // of it so far
	fate    fate
	stall   time.Duration
}

func (l *link) requests() {
	defer l.end()
	buf := make([]byte, 64<<10)
	for {
		rate := l.p.rate()
		part := buf
		if rate > 0 {
			part = buf[:512]
		}
		n, err := l.client.Read(part)
		if rate > 0 {
			l.p.wait(time.Second * time.Duration(n) / time.Duration(rate))
		}
		if n > 0 {
			l.mu.Lock()
			if !l.pending {
				l.pending, l.size = true, 0
				l.fate, l.stall = l.p.draw()
			}
			l.size += n
			f, size := l.fate, l.size
			l.mu.Unlock()
			if l.p.refuses(size, buf[:n]) {
				l.p.Refused.Add(1)
				return
			}
			if f == resetRequest && size > l.p.spare() {
				l.p.Resets.Add(1)
				_, _ = l.server.Write(buf[:n/2])
				return
			}
			if _, err := l.server.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (l *link) replies() {
	defer l.end()
	buf := make([]byte, 64<<10)
	for {
		n, err := l.server.Read(buf)
		if n > 0 {
			l.mu.Lock()
			f, stall, delay := l.fate, l.stall, time.Duration(0)
			if l.pending {
				delay = l.p.delay()
			}
			l.pending = false
			l.mu.Unlock()
			l.p.wait(delay)
			switch f {
			case dropReply:
				l.p.Dropped.Add(1)
				return
			case stallReply:
				l.p.Stalls.Add(1)
				l.p.wait(stall)
				return
			}
			if _, err := l.client.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// end resets both sides; the other direction then ends as well.
func (l *link) end() {
	l.p.mu.Lock()
	delete(l.p.open, l.client)
	delete(l.p.open, l.server)
	l.p.mu.Unlock()
	reset(l.client)
	reset(l.server)
}

// reset closes c with RST where there is one.
func reset(c net.Conn) {
	if t, tcp := c.(*net.TCPConn); tcp {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}
