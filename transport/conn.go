// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// conn is one connection to the server, dialled by us and used until its first
// error. go-redis speaks the protocol on it but can neither replace it nor retry
// anything behind our back: a batch that may have been applied is never sent
// again before the server has said what it holds.
type conn struct {
	net    *lastWords
	client *redis.Client
	redis  *redis.Conn       // sticks to the one connection, without a check per command
	secret [sha256.Size]byte // of the password
}

var errSpent = errors.New("connection lost")

// login is who a connection is authenticated as.
type login struct{ user, passwordFile string }

// dial connects to addr. The first call makes go-redis greet, authenticate and select.
func dial(ctx context.Context, o *Options, addr string, l login, db int) (*conn, error) {
	password, err := readPassword(l.passwordFile)
	if err != nil {
		return nil, &classError{ClassCredentials, err}
	}
	nc, err := dialNet(ctx, o, addr)
	if err != nil {
		return nil, err
	}
	return newConn(o, nc, addr, l.user, password, db), nil
}

// newConn lets go-redis speak on nc.
func newConn(o *Options, nc net.Conn, addr, user, password string, db int) *conn {
	words := &lastWords{Conn: nc, grammar: grammar{most: senderLimits()}}
	var spent atomic.Bool
	client := redis.NewClient(&redis.Options{
		Addr: addr,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			if spent.Swap(true) {
				return nil, errSpent
			}
			return words, nil
		},
		Username: user,
		Password: password,
		DB:       db,
		// Nothing a writer needs is in RESP3, and RESP2 has no push messages.
		Protocol:              2,
		MaxRetries:            -1,
		ContextTimeoutEnabled: true,
		ReadTimeout:           o.Timeout,
		WriteTimeout:          o.Timeout,
		// The second slot is never dialled; with a size of 1 the first refused
		// dial would start a goroutine that dials once per second.
		PoolSize:                 2,
		PipelinePoolSize:         -1,
		DialerRetries:            1,
		ReadBufferSize:           4 << 10,
		WriteBufferSize:          16 << 10,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	return &conn{words, client, client.Conn(), sha256.Sum256([]byte(password))}
}

// dialNet opens the connection and does the TLS handshake itself, so that an
// error says in which of the two it happened: go-redis would report both as a
// deadline exceeded.
func dialNet(ctx context.Context, o *Options, addr string) (net.Conn, error) {
	network, address, err := splitAddr(addr)
	if err != nil {
		return nil, err
	}
	var cfg *tls.Config
	if o.TLS != nil {
		if cfg, err = o.TLS(); err != nil {
			return nil, &classError{ClassTLS, fmt.Errorf("tls: %w", err)}
		}
	}
	d := net.Dialer{Timeout: o.DialTimeout}
	nc, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, &classError{ClassDial, fmt.Errorf("connect: %w", err)}
	}
	if cfg == nil {
		return nc, nil
	}
	cfg = cfg.Clone()
	if cfg.ServerName == "" && network == "tcp" {
		cfg.ServerName, _, _ = net.SplitHostPort(address)
	}
	tc := tls.Client(nc, cfg)
	hctx, cancel := context.WithTimeout(ctx, o.DialTimeout)
	defer cancel()
	if err := tc.HandshakeContext(hctx); err != nil {
		nc.Close()
		class := ClassHandshake
		if refusedTLS(err) {
			class = ClassTLS
		}
		return nil, &classError{class, fmt.Errorf("tls handshake with %s: %w", addr, err)}
	}
	return tc, nil
}

// lastWords is a connection that, when a write fails, finds out what the server
// said before it closed: "max number of clients reached", "invalid bulk length", or that
// it wants a client certificate. The bare write error would hide the reason, and go-redis
// passes over an error in answer to its greeting. It ends with what is no reply.
type lastWords struct {
	net.Conn
	grammar grammar
	heard   string // the error reply in the last read, if it was one
	spoke   bool   // the server has said something
	welcome bool   // and that was no error: later ones are answers to something
}

func (c *lastWords) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if bad := c.grammar.check(p[:n]); bad != nil {
		return 0, fmt.Errorf("read: %w", bad) // go-redis unwraps what its greeting meets
	}
	c.heard, c.spoke = "", c.spoke || n > 0
	if line, isError := strings.CutPrefix(string(p[:min(n, 256)]), "-"); isError {
		c.heard, _, _ = strings.Cut(line, "\r\n")
	} else if n > 0 {
		c.welcome = true
	}
	return n, err
}

func (c *lastWords) Write(p []byte) (int, error) {
	c.grammar.request()
	n, err := c.Conn.Write(p)
	var ne net.Error
	if err == nil || (errors.As(err, &ne) && ne.Timeout()) {
		return n, err
	}
	if c.heard == "" || c.welcome {
		// What was said is in the socket already, or never comes.
		if derr := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); derr != nil {
			return n, err
		}
		var buf [256]byte
		if _, rerr := c.Read(buf[:]); refusedTLS(rerr) {
			return n, &classError{ClassTLS, rerr}
		}
	}
	if c.heard != "" {
		return n, &classError{classifyReply(c.heard), fmt.Errorf("%w, after %q", err, c.heard)}
	}
	return n, err
}

// readPassword reads the one line of a password file.
func readPassword(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read password: %w", err)
	}
	p := strings.TrimRight(string(b), "\r\n")
	if p == "" {
		return "", fmt.Errorf("read password: %s is empty", path)
	}
	return p, nil
}

// call runs the script with the given arguments, EVALSHA first. The server may
// have lost the script (restart, failover, SCRIPT FLUSH): then it is loaded and
// the call repeated, which is safe because it was not run.
func (c *conn) call(ctx context.Context, args []any) (string, error) {
	text, err := redisText(ctx, c.redis, args)
	if err == nil || classify(err) != ClassNoScript {
		return text, err
	}
	if err := c.redis.ScriptLoad(ctx, deliverSource).Err(); err != nil {
		return "", fmt.Errorf("load script: %w", err)
	}
	return redisText(ctx, c.redis, args)
}

func redisText(ctx context.Context, r *redis.Conn, args []any) (string, error) {
	cmd := redis.NewCmd(ctx, args...)
	if err := r.Process(ctx, cmd); err != nil {
		return "", err
	}
	text, err := cmd.Text()
	if err != nil {
		return "", badReply(fmt.Sprint(cmd.Val()))
	}
	return text, nil
}

// close drops the connection; what is in flight stays in doubt.
func (c *conn) close() {
	c.redis.Close()
	c.client.Close()
	c.net.Close() // go-redis has not seen it if nothing was sent
}
