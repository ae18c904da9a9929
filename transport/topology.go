// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Topology says how the server that takes the records is found.
type Topology string

// The topologies. There is no client-side sharding over independent servers
// (go-redis' Ring): it moves keys when one of them fails, and the cursor would
// stay behind.
const (
	Standalone Topology = "standalone" // Addr is it
	Sentinel   Topology = "sentinel"   // Addr are the sentinels that know it
	Cluster    Topology = "cluster"    // Addr are nodes of the cluster
)

// finder finds the server to write to. It asks again at every connect, and while
// the server is away: a dead master tells nobody who has taken its place.
type finder struct {
	o     *Options
	seeds []string
	nodes []string // of the cluster, as it told last
	turn  int      // which candidate is asked next
	seed  int      // which seed is, beside nodes
	hint  string   // where a node said the slot is; used once

	conn *conn // who answered last; open only while delivery is away
	from string

	failed string        // the address that was told and did not take anything since
	doubt  time.Duration // for how long one who tells that address again is believed
	due    time.Time     // the end of that
}

// maxAsked is how many candidates one find may ask: each can take a dial timeout.
const maxAsked = 3

// Who tells an address that fails may itself be cut off from the others, so another one is
// asked. Each costs a handshake, and a long outage is mostly that of the server.
const (
	minDoubt = 2 * time.Second
	maxDoubt = time.Minute
)

// maxNodes bounds what is remembered of a cluster's nodes.
const maxNodes = 256

func newFinder(o *Options) *finder {
	f := &finder{o: o, seeds: splitAddrs(o.Addr)}
	f.turn = rand.IntN(len(f.seeds)) // a fleet must not ask the first one only
	f.seed = f.turn
	return f
}

// moves reports whether another server can take over.
func (f *finder) moves() bool { return f.o.Topology != Standalone }

// find returns the address of the server that has the slot; slots matter to a
// cluster only.
func (f *finder) find(ctx context.Context, slot int) (string, error) {
	if !f.moves() {
		return f.seeds[0], nil
	}
	if addr := f.hint; addr != "" {
		f.hint = ""
		return addr, nil
	}
	if f.conn != nil {
		if addr, err := f.ask(ctx, slot); err == nil {
			if addr != f.failed || time.Now().Before(f.due) {
				return addr, nil
			}
			return f.second(ctx, slot, addr), nil
		}
		f.close()
	}
	var errs []error
	candidates := f.candidates()
	for i := range min(len(candidates), maxAsked) {
		if len(f.nodes) > 0 && i == maxAsked-1 && len(candidates) > maxAsked {
			// All nodes may have other addresses by now: the names of the seeds are what lasts.
			f.from = f.seeds[f.seed%len(f.seeds)]
			f.seed++
		} else {
			f.from = candidates[f.turn%len(candidates)]
			f.turn++
		}
		addr, err := f.dialAndAsk(ctx, slot)
		if err == nil {
			return addr, nil
		}
		f.close()
		errs = append(errs, fmt.Errorf("ask %s: %w", f.from, err))
		if ctx.Err() != nil {
			break
		}
	}
	// What needs somebody says more than that one of them is away.
	for _, err := range errs {
		if classify(err).policy().phase == Held {
			return "", err
		}
	}
	return "", errs[len(errs)-1]
}

// second asks one more candidate, and returns addr, which failed, if that does not answer.
func (f *finder) second(ctx context.Context, slot int, addr string) string {
	others := slices.DeleteFunc(f.candidates(), func(c string) bool { return c == f.from || c == addr })
	f.doubt = min(2*f.doubt, maxDoubt)
	f.due = time.Now().Add(jitter(f.doubt))
	if len(others) == 0 {
		return addr
	}
	conn, from := f.conn, f.from
	f.conn, f.from = nil, others[f.turn%len(others)]
	f.turn++
	told, err := f.dialAndAsk(ctx, slot)
	if err != nil {
		f.close()
		f.conn, f.from = conn, from
		return addr
	}
	conn.close()
	return told
}

func (f *finder) candidates() []string {
	all := slices.Clone(f.nodes)
	for _, s := range f.seeds {
		if !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return all
}

func (f *finder) dialAndAsk(ctx context.Context, slot int) (string, error) {
	l := login{f.o.Username, f.o.PasswordFile}
	if f.o.Topology == Sentinel {
		l = login{f.o.SentinelUsername, f.o.SentinelPasswordFile}
	}
	c, err := dial(ctx, f.o, f.from, l, 0)
	if err != nil {
		return "", err
	}
	f.conn = c
	f.doubt = max(f.doubt, minDoubt)
	f.due = time.Now().Add(jitter(f.doubt))
	return f.ask(ctx, slot)
}

// ask asks the server at f.conn.
func (f *finder) ask(ctx context.Context, slot int) (string, error) {
	if f.o.Topology == Cluster {
		return f.askCluster(ctx, f.conn, f.from, slot)
	}
	reply, err := f.conn.redis.Do(ctx, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", f.o.Master).StringSlice()
	switch {
	case errors.Is(err, redis.Nil):
		return "", &classError{ClassTopology, fmt.Errorf("this sentinel knows no master %q", f.o.Master)}
	case err != nil:
		return "", misplaced(err)
	case len(reply) != 2:
		return "", badReply(strings.Join(reply, " "))
	}
	return hostPort(reply[0], reply[1], f.from)
}

// askCluster asks c, which is the node at from, for the slot's master, and takes
// note of who belongs to the cluster.
func (f *finder) askCluster(ctx context.Context, c *conn, from string, slot int) (string, error) {
	ranges, err := c.redis.Do(ctx, "CLUSTER", "SLOTS").Slice()
	if err != nil {
		return "", misplaced(err)
	}
	var owner string
	var nodes []string
	for _, r := range ranges {
		first, last, members, err := slotRange(r, from)
		if err != nil {
			return "", err
		}
		if int64(slot) >= first && int64(slot) <= last && len(members) > 0 {
			owner = members[0] // the master stands first
		}
		for _, m := range members {
			if len(nodes) < maxNodes && !slices.Contains(nodes, m) {
				nodes = append(nodes, m)
			}
		}
	}
	if owner == "" {
		return "", &classError{ClassCluster, fmt.Errorf("no node serves slot %d", slot)}
	}
	f.nodes = nodes
	return owner, nil
}

// slotRange reads one element of CLUSTER SLOTS: first, last, then its nodes, each
// with host and port first. A host that is unknown is that of the one who answers.
func slotRange(v any, from string) (first, last int64, nodes []string, err error) {
	parts, isList := v.([]any)
	if !isList || len(parts) < 2 {
		return 0, 0, nil, badReply(fmt.Sprint(v))
	}
	first, ok1 := parts[0].(int64)
	last, ok2 := parts[1].(int64)
	if !ok1 || !ok2 {
		return 0, 0, nil, badReply(fmt.Sprint(v))
	}
	for _, p := range parts[2:] {
		node, _ := p.([]any)
		if len(node) < 2 {
			return 0, 0, nil, badReply(fmt.Sprint(v))
		}
		host, _ := node[0].(string)
		addr, err := hostPort(host, fmt.Sprint(node[1]), from)
		if err != nil {
			return 0, 0, nil, err
		}
		nodes = append(nodes, addr)
	}
	return first, last, nodes, nil
}

// hostPort joins an address that a server has told; without a host it is the
// server's own.
func hostPort(host, port, from string) (string, error) {
	if host == "" || host == "?" {
		host, _, _ = net.SplitHostPort(from)
	}
	addr := net.JoinHostPort(host, port)
	if len(addr) > 300 || strings.ContainsAny(addr, "\r\n\t /@") {
		return "", badReply(addr)
	}
	return addr, nil
}

// moved takes the address from a MOVED error, if it is one.
func (f *finder) moved(err error, node string) {
	re, said := errors.AsType[redis.Error](err)
	if !said || f.o.Topology != Cluster {
		return
	}
	if w := strings.Fields(re.Error()); len(w) == 3 && w[0] == "MOVED" {
		if host, port, err := net.SplitHostPort(w[2]); err == nil {
			f.hint, _ = hostPort(host, port, node)
		}
	}
}

// misplaced names the class of an answer that shows that the server is not what
// it was taken for.
func misplaced(err error) error {
	if re, said := errors.AsType[redis.Error](err); said {
		m := re.Error()
		if strings.Contains(m, "cluster support disabled") || strings.Contains(m, "unknown command 'SENTINEL'") {
			return &classError{ClassTopology, err}
		}
	}
	return err
}

// Dial connects to the server that takes the records of o's agent, without logging in:
// for those who read what the Sender delivers. DB and credentials are the caller's; the
// protocol is RESP2.
func Dial(ctx context.Context, o Options) (net.Conn, error) {
	o.setDefaults()
	if err := o.validateTopology(); err != nil {
		return nil, err
	}
	f := newFinder(&o)
	defer f.close()
	addr, err := f.find(ctx, slot("{"+o.Shard+"}"))
	if err != nil {
		return nil, fmt.Errorf("find the server: %w", err)
	}
	nc, err := dialNet(ctx, &o, addr)
	if err != nil {
		return nil, err
	}
	return &lastWords{Conn: nc, grammar: grammar{most: readerLimits()}}, nil
}

// Place returns the shard of the agent and the keys of the decisions streams, system,
// agents and approvals, as the Sender uses them.
func (o Options) Place() (shard string, decisions [3]string) {
	o.setDefaults()
	return o.Shard, [3]string{o.SystemKey, o.AgentsKey, o.ApprovalsKey}
}

// settled ends the search: the address that was told takes records.
func (f *finder) settled() {
	f.close()
	f.failed, f.doubt = "", 0
}

func (f *finder) close() {
	if f.conn != nil {
		f.conn.close()
		f.conn = nil
	}
}

// pause waits for d, or until another server has taken over from the one that
// failed. Asking costs no handshake: the connection stays until delivery is back.
func (s *Sender) pause(ctx context.Context, d time.Duration) {
	if !s.finder.moves() {
		sleep(ctx, d)
		return
	}
	for end := time.Now().Add(d); ctx.Err() == nil; {
		// Failovers take seconds; a longer outage is not shortened by asking often.
		poll := jitter(min(time.Second+time.Since(s.lost)/10, 15*time.Second))
		left := time.Until(end)
		if left <= poll {
			sleep(ctx, left)
			return
		}
		sleep(ctx, poll)
		if addr, err := s.finder.find(ctx, s.slot); err == nil && addr != s.node {
			s.finder.hint = addr
			sleep(ctx, rand.N(s.o.FirstReconnect+1))
			return
		}
	}
}

// checkMeta holds what the operator has written down about the fleet's keys
// against our own. Nothing written is fine, and so is a user who may not look. A cluster can
// have it on another node: while that cannot be asked, this one gets records, and tend asks again.
func (s *Sender) checkMeta(ctx context.Context) error {
	if s.meta {
		return nil
	}
	key := s.o.Prefix + ":meta"
	addr := s.node
	if s.o.Topology == Cluster && slot(key) != s.slot {
		var err error
		if addr, err = s.finder.askCluster(ctx, s.conn, s.node, slot(key)); classify(err) == ClassCluster {
			return s.unchecked(ctx, err)
		} else if err != nil {
			return err
		}
	}
	if addr == s.node {
		err := s.compare(ctx, s.conn, key)
		s.meta = err == nil
		return err
	}
	short, cancel := context.WithTimeout(ctx, s.o.Timeout) // delivery waits for it
	defer cancel()
	c, err := dial(short, &s.o, addr, login{s.o.Username, s.o.PasswordFile}, 0)
	if err != nil {
		return s.unchecked(ctx, err)
	}
	defer c.close()
	if err := s.compare(short, c, key); classify(err) == ClassTopology {
		return err
	} else if err != nil {
		return s.unchecked(ctx, err)
	}
	s.meta = true
	return nil
}

// unchecked says why the fleet's keys are not known to be ours, which refuses nothing.
func (s *Sender) unchecked(ctx context.Context, err error) error {
	s.limiter.Log(ctx, zapcore.WarnLevel, "meta", "fleet's keys not checked, delivering", zap.Error(err))
	return nil
}

// compare asks c for what was written down in key.
func (s *Sender) compare(ctx context.Context, c *conn, key string) error {
	for _, want := range []struct{ field, value string }{
		{"proto", "1"},
		{"shards", fmt.Sprint(s.o.Shards)},
		{"tagscheme", "v1"},
	} {
		got, err := c.redis.HGet(ctx, key, want.field).Result()
		switch {
		case errors.Is(err, redis.Nil), err != nil && classify(err) == ClassPermission:
			continue
		case err != nil:
			return err
		}
		if got != want.value {
			return &classError{ClassTopology, fmt.Errorf("%s says %s %.32q, this sensor has %s", key, want.field, got, want.value)}
		}
	}
	return nil
}
