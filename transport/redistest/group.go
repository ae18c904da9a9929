// SPDX-License-Identifier: Apache-2.0

package redistest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// Group is several servers among which one can take over from another.
type Group struct {
	// Masters and Replicas are the servers as started; Replicas[i] is that of
	// Masters[i].
	Masters, Replicas []*Server
	// Sentinels watch Masters[0] under the name [MasterName].
	Sentinels []*Server
	tb        testing.TB
}

// MasterName is what sentinels call the master.
const MasterName = "edr"

// StartCluster runs a Redis Cluster with a replica for each master and waits until
// it serves all slots, split evenly in the order of Masters. A master counts as
// failed after timeout.
func StartCluster(tb testing.TB, masters int, timeout time.Duration, o Options) *Group {
	tb.Helper()
	g := &Group{tb: tb}
	node := func() *Server {
		n := o
		n.TCP = true
		n.Config = map[string]string{
			"cluster-enabled": "yes", "cluster-port": fmt.Sprint(FreePort(tb)), "cluster-node-timeout": fmt.Sprint(timeout.Milliseconds()),
			"cluster-replica-validity-factor": "0", // one that is far behind takes over, too
		}
		maps.Copy(n.Config, o.Config)
		return Start(tb, n)
	}
	for range masters {
		g.Masters = append(g.Masters, node())
	}
	for range masters {
		g.Replicas = append(g.Replicas, node())
	}
	const slots = 16384
	first := g.Masters[0]
	for i, m := range g.Masters {
		g.do(m, "CLUSTER", "ADDSLOTSRANGE", i*slots/masters, (i+1)*slots/masters-1)
		g.do(m, "CLUSTER", "SET-CONFIG-EPOCH", i+1)
	}
	var met time.Time
	meet := func() { // a node that is not met within the timeout is forgotten
		if time.Since(met) < 3*timeout+time.Second {
			return
		}
		met = time.Now()
		for _, n := range g.nodes()[1:] {
			g.do(first, "CLUSTER", "MEET", "127.0.0.1", n.port, n.o.Config["cluster-port"])
		}
	}
	for i, r := range g.Replicas {
		id := g.do(g.Masters[i], "CLUSTER", "MYID")
		g.await("the replica to know its master", func() bool {
			meet()
			return try(r, "CLUSTER", "REPLICATE", id) == nil
		})
	}
	for _, n := range g.nodes() {
		g.await("the cluster", func() bool {
			meet()
			c := n.Client()
			defer c.Close()
			state := c.ClusterInfo(tb.Context()).Val()
			return strings.Contains(state, "cluster_state:ok") && strings.Contains(state, fmt.Sprintf("cluster_known_nodes:%d", 2*masters))
		})
	}
	g.linked()
	return g
}

// StartSentinel runs a master with a replica and three sentinels, and waits until
// they all know each other. The master counts as failed after timeout.
func StartSentinel(tb testing.TB, timeout time.Duration, o Options) *Group {
	tb.Helper()
	o.TCP = true
	g := &Group{tb: tb, Masters: []*Server{Start(tb, o)}}
	r := o
	r.Config = map[string]string{"replicaof": fmt.Sprintf("127.0.0.1 %d", g.Masters[0].port), "repl-diskless-sync-delay": "0"}
	maps.Copy(r.Config, o.Config)
	g.Replicas = []*Server{Start(tb, r)}
	g.linked()
	for range 3 {
		g.Sentinels = append(g.Sentinels, Start(tb, Options{TCP: true, sentinel: fmt.Sprintf(
			"sentinel monitor %s 127.0.0.1 %d 2\nsentinel down-after-milliseconds %s %d\nsentinel failover-timeout %s 10000\n",
			MasterName, g.Masters[0].port, MasterName, timeout.Milliseconds(), MasterName)}))
	}
	for _, s := range g.Sentinels {
		g.await("the sentinels", func() bool {
			c := s.Client()
			defer c.Close()
			v, err := c.Do(tb.Context(), "SENTINEL", "MASTER", MasterName).StringSlice()
			m := map[string]string{}
			for i := 0; i+1 < len(v); i += 2 {
				m[v[i]] = v[i+1]
			}
			return err == nil && m["num-other-sentinels"] == "2" && m["num-slaves"] == "1" && m["flags"] == "master"
		})
	}
	return g
}

// Addr is the address list of the nodes or the sentinels.
func (g *Group) Addr() string {
	all := g.Sentinels
	if all == nil {
		all = g.nodes()
	}
	var addrs []string
	for _, s := range all {
		addrs = append(addrs, s.Addr())
	}
	return strings.Join(addrs, ",")
}

// Move makes another master serve the slot of the one at addr, with its keys.
func (g *Group) Move(slot int, addr string) {
	g.tb.Helper()
	var from, to *Server
	for _, m := range g.Masters {
		if m.Addr() == addr {
			from = m
		} else {
			to = m
		}
	}
	source, target := g.do(from, "CLUSTER", "MYID"), g.do(to, "CLUSTER", "MYID")
	g.do(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", source)
	g.do(from, "CLUSTER", "SETSLOT", slot, "MIGRATING", target)
	c := from.Client()
	defer c.Close()
	keys := c.ClusterGetKeysInSlot(g.tb.Context(), slot, 1000).Val()
	for _, key := range keys { // one by one: the client meets a slot that is half here
		g.do(from, "MIGRATE", "127.0.0.1", to.port, key, 0, 5000)
	}
	g.do(to, "CLUSTER", "SETSLOT", slot, "NODE", target)
	g.do(from, "CLUSTER", "SETSLOT", slot, "NODE", target)
}

func (g *Group) nodes() []*Server {
	return slices.Concat(g.Masters, g.Replicas)
}

// Linked waits until the server follows a master.
func (g *Group) Linked(replica *Server) {
	g.tb.Helper()
	g.await("the replica's link", func() bool { return info(replica, "replication")["master_link_status"] == "up" })
}

// linked waits until each replica follows its master.
func (g *Group) linked() {
	g.tb.Helper()
	for _, r := range g.Replicas {
		g.Linked(r)
	}
}

// Lose makes what the master takes from now on unknown to its replica: the replica
// is stopped and its link cut, for what is in a socket it would still read. It first
// waits until the replica has everything.
func (g *Group) Lose(master, replica *Server) {
	g.tb.Helper()
	g.await("the replica to have everything", func() bool {
		m, r := info(master, "replication"), info(replica, "replication")
		return m["master_repl_offset"] != "" && m["master_repl_offset"] == r["slave_repl_offset"]
	})
	replica.Stall()
	g.do(master, "CLIENT", "KILL", "TYPE", "replica")
}

// info returns a section of INFO, empty when the server does not answer.
func info(s *Server, section string) map[string]string {
	c := s.Client()
	defer c.Close()
	m := map[string]string{}
	for line := range strings.Lines(c.Info(s.tb.Context(), section).Val()) {
		if k, v, found := strings.Cut(strings.TrimSpace(line), ":"); found {
			m[k] = v
		}
	}
	return m
}

// Pair waits until one of Masters[i] and Replicas[i] follows the other, and tells which.
func (g *Group) Pair(i int) (master, replica *Server) {
	g.tb.Helper()
	g.await("a master and its replica", func() bool {
		master, replica = g.Masters[i], g.Replicas[i]
		if info(master, "replication")["role"] != "master" {
			master, replica = replica, master
		}
		return info(master, "replication")["role"] == "master" && info(replica, "replication")["master_link_status"] == "up"
	})
	return master, replica
}

// Promoted waits until the server is a master and returns when that was seen.
func (g *Group) Promoted(s *Server) time.Time {
	g.tb.Helper()
	g.await("the promotion", func() bool { return info(s, "replication")["role"] == "master" })
	return time.Now()
}

func (g *Group) do(s *Server, args ...any) string {
	g.tb.Helper()
	c := s.Client()
	defer c.Close()
	v, err := c.Do(g.tb.Context(), args...).Result()
	if err != nil {
		g.tb.Fatalf("%v: %v", args, err)
	}
	return fmt.Sprint(v)
}

func try(s *Server, args ...any) error {
	c := s.Client()
	defer c.Close()
	return c.Do(s.tb.Context(), args...).Err()
}

func (g *Group) await(what string, cond func() bool) {
	g.tb.Helper()
	deadline := time.NewTimer(5 * time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			g.tb.Fatalf("timed out waiting for %s", what)
		}
	}
}
