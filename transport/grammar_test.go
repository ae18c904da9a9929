// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// actor is a connection to a server that answers each request with the next line of its
// part, and then hangs up.
type actor struct {
	part  [][]byte
	reply bytes.Buffer
}

func (a *actor) Write(p []byte) (int, error) {
	if len(a.part) > 0 {
		a.reply.Write(a.part[0])
		a.part = a.part[1:]
	}
	return len(p), nil
}

func (a *actor) Read(p []byte) (int, error) {
	if a.reply.Len() == 0 {
		return 0, io.EOF
	}
	return a.reply.Read(p)
}

func (*actor) Close() error                     { return nil }
func (*actor) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*actor) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*actor) SetDeadline(time.Time) error      { return nil }
func (*actor) SetReadDeadline(time.Time) error  { return nil }
func (*actor) SetWriteDeadline(time.Time) error { return nil }

// hostile are replies that go-redis would give all memory for, or pass on at any length.
func hostile() map[string]string {
	return map[string]string{
		"string of an exabyte":  "$1152921504606846976\r\n",
		"string of a gigabyte":  "$1073741824\r\nx",
		"list of an exabyte":    "*1152921504606846976\r\n",
		"lists in lists":        strings.Repeat("*65000\r\n", 100),
		"length that overflows": "$9223372036854775807\r\n",
		"negative length":       "$-2\r\n",
		"no length":             "*\r\n",
		"map":                   "%1073741824\r\n",
		"attribute":             "|1073741824\r\n",
		"push":                  ">1073741824\r\n",
		"endless line":          "+" + strings.Repeat("x", 1<<20),
		"endless error":         "-" + strings.Repeat("x", 1<<20) + "\r\n",
		"more than is asked":    "$-1\r\n" + strings.Repeat("$4\r\nmore\r\n", 1<<19),
		"another protocol":      "HTTP/1.1 400 Bad Request\r\n\r\n",
		"nothing":               "\r\n",
	}
}

// TestHostileReplies: whatever a server answers costs little memory, and ends in a class.
func TestHostileReplies(t *testing.T) {
	o := fast("127.0.0.1:1")
	for name, text := range hostile() {
		c := newConn(&o, &actor{part: [][]byte{[]byte(text)}}, o.Addr, "", "", 0)
		var err error
		if used := allocated(func() { _, err = c.call(t.Context(), []any{"PING"}) }); used > 16<<20 {
			t.Errorf("%s: %d bytes allocated", name, used)
		}
		if name != "more than is asked" && (classify(err) != ClassReply || len(err.Error()) > 600) {
			t.Errorf("%s: class %q, %v", name, classify(err), err)
		}
		c.close()
	}
	bare := redis.NewClient(&redis.Options{Protocol: 2, MaxRetries: -1, DialerRetries: 1, PoolSize: 1, DisableIdentity: true, Dialer: func(context.Context, string, string) (net.Conn, error) {
		return &actor{part: [][]byte{[]byte("-ERR unknown command\r\n"), []byte("$268435456\r\n")}}, nil
	}})
	defer bare.Close()
	if used := allocated(func() { bare.Ping(t.Context()) }); used < 256<<20 {
		t.Errorf("control: go-redis by itself allocates %d bytes", used)
	}
}

// TestGrammarPasses: what Redis says comes through as it was, however it is cut.
func TestGrammarPasses(t *testing.T) {
	const text = "+OK\r\n:5\r\n$-1\r\n*-1\r\n*0\r\n$0\r\n\r\n*2\r\n$9\r\n-a\r\n$99\r\n\r\n*1\r\n:-3\r\n-ERR no\r\n-ERR wwith args beginning with\r\n"
	for size := 1; size < len(text); size++ {
		g := grammar{most: limits{len(text), 16, 3}}
		for chunk := range slices.Chunk([]byte(text), size) {
			before := string(chunk)
			if err := g.check(chunk); err != nil || string(chunk) != before {
				t.Fatalf("cut every %d bytes: %q became %q, %v", size, before, chunk, err)
			}
		}
		if g.skip != 0 || len(g.line) != 0 {
			t.Errorf("cut every %d bytes: ends inside a reply: %+v", size, g)
		}
	}
}

// TestEchoedPassword: a server that does not know AUTH repeats the password, and nobody
// gets to see it.
func TestEchoedPassword(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-in-file"
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{"rename-command": "AUTH LOGIN"}})
	c := srv.Client()
	defer c.Close()
	if err := c.Do(t.Context(), "AUTH", "edr-sensor", secret).Err(); err == nil || !strings.Contains(err.Error(), secret) {
		t.Errorf("control: the server does not repeat it: %v", err)
	}
	o := fast(srv.Addr())
	o.Username, o.PasswordFile = "edr-sensor", writePassword(t, "", secret)
	s := start(t, o, newMemQueue())
	if st := s.reaches(t, Held, ClassScripting); !strings.Contains(st.Error, "unknown command 'auth'") || strings.Contains(fmt.Sprintf("%+v", st), secret) {
		t.Errorf("state %+v", st)
	}
	echo := "-ERR unknown command `HELLO`, with args beginning with: `2`, `AUTH`, `" + secret + "`\r\n+OK\r\n"
	for size := 1; size < len(echo); size++ {
		g, got := grammar{most: senderLimits()}, ""
		for chunk := range slices.Chunk([]byte(echo), size) {
			if err := g.check(chunk); err != nil {
				t.Fatal(err)
			}
			got += string(chunk)
		}
		if strings.Contains(got, "s3") || strings.Contains(got, "file") || len(got) != len(echo) || !strings.HasSuffix(got, "*\r\n+OK\r\n") {
			t.Errorf("cut every %d bytes: %q", size, got)
		}
	}
}

// FuzzServer lets a server answer anything at all to everything that a Sender asks, in
// each topology: it must not panic, nor use much memory, nor take for delivered what was
// not sent; and what it says of it is short.
func FuzzServer(f *testing.F) {
	add := func(replies ...string) { f.Add([]byte(strings.Join(replies, "\x00"))) }
	const hello = "-NOPROTO\r\n\x00+OK\r\n" // then AUTH
	slots := "*2\r\n*3\r\n:0\r\n:8191\r\n*3\r\n" + bulk("10.0.0.1") + ":7000\r\n" + bulk("id") + "*4\r\n:8192\r\n:16383\r\n*2\r\n$-1\r\n:7001\r\n*4\r\n" + bulk("?") + ":7002\r\n" + bulk("id") + "*2\r\n" + bulk("hostname") + bulk("h") + "\r\n"
	add(hello, goodServer(), slots)
	add(hello, bulk("OK 0 "+testEpoch+"0001"), "$-1\r\n", "$-1\r\n", "-NOPERM\r\n", "-NOPERM\r\n", "-ERR no such key\r\n", bulk("DUP 9"), slots)
	add(hello, bulk("FENCED "+testEpoch+" "+testEpoch+"0001"))
	add(hello, "-MOVED 1 10.0.0.1:7000\r\n", "-NOSCRIPT\r\n", bulk(deliverSHA()))
	add(hello, slots)
	add(hello, "*2\r\n"+bulk("10.0.0.1")+bulk("6379"))
	add(hello, "*-1\r\n")
	for _, text := range hostile() {
		if len(text) < 1<<10 {
			add(hello, text, text, text, text)
			add(text)
		}
	}
	if s, err := converse(f, Standalone, []byte(hello+"\x00"+goodServer())); err != nil || s.acked != 8 || len(s.State().Risks) != 3 {
		f.Fatalf("the good server is not understood: %v, %+v", err, s.State())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			return
		}
		for _, topology := range []Topology{Standalone, Cluster, Sentinel} {
			var s *Sender
			var err error
			used := allocated(func() { s, err = converse(t, topology, data) })
			if used > 64<<20 {
				t.Errorf("%s: %d bytes allocated", topology, used)
			}
			if err != nil {
				s.fail(quiet(t), err)
			}
			st := s.State()
			if len(st.Error) > 2*maxReplyLine || len(st.Risks) > len(Risks()) {
				t.Errorf("%s: %d bytes of error, %d risks", topology, len(st.Error), len(st.Risks))
			}
			for _, r := range st.Risks {
				if len(r.Text) > 2*maxReplyLine {
					t.Errorf("%s: risk of %d bytes", topology, len(r.Text))
				}
			}
			if s.acked > s.sent || s.pos > s.sent || len(s.finder.nodes) > maxNodes {
				t.Errorf("%s: acked %d and pos %d of %d sent, %d nodes", topology, s.acked, s.pos, s.sent, len(s.finder.nodes))
			}
		}
	})
}

func bulk(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }

// goodServer is the part of a server that takes everything, and is at risk.
func goodServer() string {
	group := "*1\r\n*12\r\n" + bulk("name") + bulk("siem") + bulk("consumers") + ":1\r\n" + bulk("pending") + ":90\r\n" +
		bulk("last-delivered-id") + bulk("0-0") + bulk("entries-read") + ":1\r\n" + bulk("lag") + ":7\r\n"
	info := bulk("# Memory\r\nused_memory:9\r\nmaxmemory:10\r\nmaxmemory_policy:allkeys-lru\r\n")
	return strings.Join([]string{bulk("OK 0 -"), bulk("1"), bulk("1"), bulk("v1"), info, group, group, group, group, bulk("OK 8"), ":1\r\n"}, "\x00")
}

// converse has a Sender ask everything once, of a server whose replies are data, cut at
// each zero byte.
func converse(t testing.TB, topology Topology, data []byte) (*Sender, error) {
	o := fast("127.0.0.1:1")
	o.Topology, o.Master, o.Ack, o.DecisionsLimit = topology, "edr", AckReplica, 100
	q := newMemQueue()
	q.add(8, buffer.Events, true)
	s, err := New(o, q)
	if err != nil {
		t.Fatal(err)
	}
	ctx := quiet(t)
	c := newConn(&s.o, &actor{part: bytes.Split(data, []byte{0})}, o.Addr, "edr-sensor", "secret", 0)
	defer c.close()
	if topology != Standalone {
		s.finder.conn, s.finder.from = c, o.Addr
		addr, err := s.finder.ask(ctx, s.slot)
		if len(addr) > 300 || err == nil && addr == "" {
			t.Errorf("address %q", addr)
		}
		return s, err
	}
	s.conn = c
	if err := s.probe(ctx, flagHello); err != nil {
		return s, err
	}
	if err := s.checkMeta(ctx); err != nil {
		return s, err
	}
	if err := s.tend(ctx); err != nil {
		return s, err
	}
	recs, err := s.next(ctx, false)
	if err != nil {
		return s, err
	}
	if err := s.send(ctx, recs); err != nil {
		s.finder.moved(err, o.Addr)
		return s, err
	}
	return s, s.settle(ctx)
}

// allocated is how many bytes f has allocated.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}
