// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options say where the records go and how eagerly. Zero values mean the
// defaults given at each field.
type Options struct {
	// Addr is host:port, or unix:///path/to/socket.
	Addr string
	// TLS makes the connection a TLS one; an empty ServerName becomes the host
	// of Addr. The Sender clones it. There is no fallback to plain text.
	TLS *tls.Config
	// Username is the ACL user; empty is the server's default user.
	Username string
	// PasswordFile holds the password, one line. It is read at each connect, so
	// that a changed password needs no restart. Empty: no authentication.
	PasswordFile string
	// DB is the number of the logical database.
	DB int

	// AgentID names the agent in the cursor and in every entry.
	AgentID string
	// Prefix and Shard make the keys <Prefix>:{<Shard>}:events and :cursors.
	// Defaults "edr" and "s000".
	Prefix, Shard string
	// SystemKey, AgentsKey and ApprovalsKey are the streams of the decisions:
	// about the sensor itself ("decisions:system"), about what it observed
	// ("decisions:agents"), and what an operator approved ("decisions:approvals").
	// On a cluster each must carry the same {<Shard>} tag.
	SystemKey, AgentsKey, ApprovalsKey string
	// DecisionsLimit is about how many entries a decisions stream may have: the
	// oldest are deleted, read or not, whoever wrote them. 0: any number. The events
	// stream is never trimmed.
	DecisionsLimit int

	// A batch is sent when it has BatchRecords (256) or BatchBytes (256 KiB) of
	// payload, Linger (50 ms) after its first record was seen, or at once when
	// it holds an urgent record. A larger record travels alone.
	BatchRecords int
	BatchBytes   int
	Linger       time.Duration

	// DialTimeout (5 s) covers the dial and, separately, the TLS handshake;
	// Timeout (3 s) one request and its reply.
	DialTimeout, Timeout time.Duration
	// ProbeInterval (30 s, jittered by a quarter) is how often an idle Sender
	// asks whether the server still has everything.
	ProbeInterval time.Duration

	// After a failure the Sender waits a random time below a limit. The limit is
	// FirstReconnect (500 ms) when a healthy connection broke, then BackoffBase
	// (250 ms), doubled at each failure up to BackoffCap (30 s; twice that for
	// refused credentials, TLS and a full server). It starts over after
	// HealthyAfter (60 s) without failure: a connect alone proves nothing.
	FirstReconnect          time.Duration
	BackoffBase, BackoffCap time.Duration
	HealthyAfter            time.Duration

	// Registerer gets the metrics; nil leaves them unregistered.
	Registerer prometheus.Registerer
	// OnChange is called with each new [State] that differs from the one before
	// in its phase, class, warning, or number of rewinds or rotations. It runs on the
	// sending goroutine and must not block.
	OnChange func(State)
}

func (o *Options) setDefaults() {
	def(&o.Prefix, "edr")
	def(&o.Shard, "s000")
	def(&o.SystemKey, "decisions:system")
	def(&o.AgentsKey, "decisions:agents")
	def(&o.ApprovalsKey, "decisions:approvals")
	def(&o.BatchRecords, 256)
	def(&o.BatchBytes, 256<<10)
	def(&o.Linger, 50*time.Millisecond)
	def(&o.DialTimeout, 5*time.Second)
	def(&o.Timeout, 3*time.Second)
	def(&o.ProbeInterval, 30*time.Second)
	def(&o.FirstReconnect, 500*time.Millisecond)
	def(&o.BackoffBase, 250*time.Millisecond)
	def(&o.BackoffCap, 30*time.Second)
	def(&o.HealthyAfter, time.Minute)
	if o.OnChange == nil {
		o.OnChange = func(State) {}
	}
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (o *Options) validate() error {
	if o.AgentID == "" {
		return errors.New("agent id is empty")
	}
	if strings.ContainsAny(o.Prefix+o.Shard, "{}") {
		return fmt.Errorf("prefix %q and shard %q must not contain braces", o.Prefix, o.Shard)
	}
	if o.BatchRecords < 1 || o.BatchBytes < 1 {
		return fmt.Errorf("batch of %d records and %d bytes: both must be positive", o.BatchRecords, o.BatchBytes)
	}
	if o.DecisionsLimit < 0 {
		return fmt.Errorf("decisions limit %d is negative", o.DecisionsLimit)
	}
	_, _, err := splitAddr(o.Addr)
	return err
}

// splitAddr turns an address of [Options] into what a net.Dialer takes.
func splitAddr(addr string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		if !strings.HasPrefix(path, "/") {
			return "", "", fmt.Errorf("address %q: the path of a unix socket must be absolute, as in unix:///run/redis/redis.sock", addr)
		}
		return "unix", path, nil
	}
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return "", "", fmt.Errorf("address %q: want host:port or unix:///path: %w", addr, err)
	}
	return "tcp", addr, nil
}
