// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
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
	// Topology says what Addr is; the default is [Standalone].
	Topology Topology
	// Addr is host:port, or unix:///path/to/socket; with [Sentinel] and [Cluster]
	// one or more of host:port, separated by commas.
	Addr string
	// Master is the sentinels' name of the master. SentinelUsername and
	// SentinelPasswordFile are for them, as Username and PasswordFile are for it.
	Master                                 string
	SentinelUsername, SentinelPasswordFile string
	// TLS makes every connection a TLS one. It is called for each, so that changed
	// files need no restart; an empty ServerName becomes the host that is dialled.
	// The Sender clones the result. There is no fallback to plain text.
	TLS func() (*tls.Config, error)
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
	// Defaults "edr" and "s000". With more Shards than one, a power of two up to
	// [MaxShards] and the same for all agents, Shard is that of the agent: see [Tag].
	Prefix, Shard string
	Shards        int
	// SystemKey, AgentsKey and ApprovalsKey are the streams of the decisions:
	// about the sensor itself ("decisions:system"), about what it observed
	// ("decisions:agents"), and what an operator approved ("decisions:approvals").
	// On a cluster each has the {<Shard>} tag, or gets it at its end.
	SystemKey, AgentsKey, ApprovalsKey string
	// DecisionsLimit is about how many entries a decisions stream may have: the
	// oldest are deleted, read or not, whoever wrote them. 0: any number.
	DecisionsLimit int
	// TrimLength and TrimAge, of which one may be set, are the same for the events
	// stream: about how many entries, and of about which age. Without them it is
	// trimmed by its consumers only, who know what they have read.
	TrimLength int
	TrimAge    time.Duration

	// Encoding is that of the events stream, [JSON] by default.
	Encoding Encoding

	// Ack says when a record counts as delivered; the default is [AckReply].
	Ack Ack

	// A batch is sent when it has BatchRecords (256) or BatchBytes (768 KiB) of
	// payload, Linger (50 ms) after its first record was seen, or at once when
	// it holds an urgent record. A larger record travels alone. While the server
	// is slow to answer, batches linger longer, up to LingerLimit (1 s), so that
	// it has fewer and fuller ones to take.
	// One batch is under way at a time: of events of 3 KB these let 5,000 a second pass
	// over a round trip of 20 ms, where 256 KiB did not.
	BatchRecords        int
	BatchBytes          int
	Linger, LingerLimit time.Duration

	// DialTimeout (5 s) covers the dial and, separately, the TLS handshake;
	// Timeout (3 s) one request and its reply.
	DialTimeout, Timeout time.Duration
	// ProbeInterval (30 s, jittered by a quarter) is how often an idle Sender
	// asks whether the server still has everything.
	ProbeInterval time.Duration

	// After a failure the Sender waits a random time below a limit. The limit is
	// FirstReconnect (500 ms) when a healthy connection broke, then BackoffBase
	// (250 ms), doubled at each failure up to BackoffCap (30 s; twice that for
	// refused credentials, TLS and a full server). Each eight batches that are taken make
	// up for one failure, and HealthyAfter (60 s) without any for all of them: a connect
	// alone proves nothing. For five seconds after a batch attempts that are reset do not
	// count, and wait below FirstReconnect.
	FirstReconnect          time.Duration
	BackoffBase, BackoffCap time.Duration
	HealthyAfter            time.Duration

	// Renew is called when the server has records of another writer as this agent: it
	// moves the queue to an epoch above that of the fencing and returns the agent id to
	// go on with. It is called on the sending goroutine. Nil, or twice within ten
	// minutes: delivery stops, and the buffer keeps the records.
	Renew func(context.Context, Fencing) (agentID string, err error)
	// Processes are those that have sent from this queue, oldest first, and Remember
	// makes a new list durable. With them a Sender can tell what it has delivered
	// itself from what a copy of the queue has. Nil: not told apart.
	Processes []string
	Remember  func(processes []string) error

	// Registerer gets the metrics; nil leaves them unregistered.
	Registerer prometheus.Registerer
	// OnChange is called with each new [State] that differs from the one before
	// in its phase, class, warning, or number of rewinds, rotations or refusals. It runs on the
	// sending goroutine and must not block.
	OnChange func(State)

	keys [3]string // of the decisions, as given
}

func (o *Options) setDefaults() {
	def(&o.Topology, Standalone)
	def(&o.Ack, AckReply)
	def(&o.Prefix, "edr")
	def(&o.Shards, 1)
	def(&o.SystemKey, "decisions:system")
	def(&o.AgentsKey, "decisions:agents")
	def(&o.ApprovalsKey, "decisions:approvals")
	def(&o.Encoding, JSON)
	o.keys = [3]string{o.SystemKey, o.AgentsKey, o.ApprovalsKey}
	o.place()
	def(&o.BatchRecords, 256)
	def(&o.BatchBytes, 768<<10)
	def(&o.Linger, 50*time.Millisecond)
	def(&o.LingerLimit, max(o.Linger, time.Second))
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

// place gives the keys the tag of the agent's shard.
func (o *Options) place() {
	if o.Shards > 1 && o.Shards <= MaxShards {
		o.Shard = Tag(Shard(o.AgentID, o.Shards), o.Shards)
	}
	def(&o.Shard, Tag(0, 1))
	if o.Topology == Cluster {
		o.SystemKey, o.AgentsKey, o.ApprovalsKey = Tagged(o.keys[0], o.Shard), Tagged(o.keys[1], o.Shard), Tagged(o.keys[2], o.Shard)
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
	if o.Shards < 1 || o.Shards > MaxShards || o.Shards&(o.Shards-1) != 0 {
		return fmt.Errorf("%d shards: want a power of two up to %d", o.Shards, MaxShards)
	}
	if o.BatchRecords < 1 || o.BatchBytes < 1 {
		return fmt.Errorf("batch of %d records and %d bytes: both must be positive", o.BatchRecords, o.BatchBytes)
	}
	if o.Encoding != JSON && o.Encoding != ZstdBatch {
		return fmt.Errorf("encoding %q: want %s or %s", o.Encoding, JSON, ZstdBatch)
	}
	if o.TrimLength < 0 || o.TrimAge < 0 || o.TrimLength > 0 && o.TrimAge > 0 || o.TrimAge%time.Millisecond != 0 {
		return fmt.Errorf("trim to %d entries and %v: want one of them, and whole milliseconds", o.TrimLength, o.TrimAge)
	}
	if o.DecisionsLimit < 0 {
		return fmt.Errorf("decisions limit %d is negative", o.DecisionsLimit)
	}
	if o.Ack != AckReply && o.Ack != AckReplica && o.Ack != AckFsync {
		return fmt.Errorf("ack %q: want %s, %s or %s", o.Ack, AckReply, AckReplica, AckFsync)
	}
	return o.validateTopology()
}

func (o *Options) validateTopology() error {
	addrs := splitAddrs(o.Addr)
	for _, a := range addrs {
		if network, _, err := splitAddr(a); err != nil {
			return err
		} else if network == "unix" && o.Topology != Standalone {
			return fmt.Errorf("address %q: topology %s needs host:port", a, o.Topology)
		}
	}
	switch o.Topology {
	case Standalone:
		if len(addrs) > 1 {
			return fmt.Errorf("address %q: topology %s has one", o.Addr, o.Topology)
		}
	case Sentinel:
		if o.Master == "" {
			return errors.New("sentinel without the name of the master")
		}
	case Cluster:
		if o.DB != 0 {
			return fmt.Errorf("db %d: a cluster has only db 0", o.DB)
		}
		for _, key := range []string{o.SystemKey, o.AgentsKey, o.ApprovalsKey} {
			if slot(key) != slot("{"+o.Shard+"}") {
				return fmt.Errorf("decisions key %q: on a cluster it needs the tag {%s}", key, o.Shard)
			}
		}
	default:
		return fmt.Errorf("topology %q: want %s, %s or %s", o.Topology, Standalone, Sentinel, Cluster)
	}
	return nil
}

func splitAddrs(addrs string) []string {
	list := strings.Split(addrs, ",")
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
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
