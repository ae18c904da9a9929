// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestSenderWhileClusterIsDown: a slot that nobody serves, and a whole cluster that refuses
// since a part of it is gone.
func TestSenderWhileClusterIsDown(t *testing.T) {
	t.Parallel()
	t.Run("slot", func(t *testing.T) {
		t.Parallel()
		for _, topology := range []Topology{Standalone, Cluster} {
			srv := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"cluster-enabled": "yes", "cluster-port": fmt.Sprint(redistest.FreePort(t))}})
			c := srv.Client()
			defer c.Close()
			if err := c.ClusterAddSlotsRange(t.Context(), 0, Slots-1).Err(); err != nil {
				t.Fatal(err)
			}
			await(t, text("the cluster"), func() bool { return strings.Contains(c.ClusterInfo(t.Context()).Val(), "cluster_state:ok") })
			o := fast(srv.Addr())
			o.Topology = topology
			o.SystemKey, o.AgentsKey, o.ApprovalsKey = "s:{s000}", "a:{s000}", "p:{s000}"
			q := newMemQueue()
			s := start(t, o, q)
			s.delivered(t, q.add(10, buffer.Events, false))
			away := slot("{s000}")
			if err := c.ClusterDelSlots(t.Context(), away).Err(); err != nil {
				t.Fatal(err)
			}
			last := q.add(10, buffer.Events, false)
			s.reaches(t, Retrying, ClassCluster)
			before := testutil.ToFloat64(s.m.errors[ClassCluster])
			await(t, text("further attempts"), func() bool { return testutil.ToFloat64(s.m.errors[ClassCluster]) > before+2 })
			if st := s.State(); st.Acked != 10 || topology == Standalone && !strings.Contains(st.Error, "CLUSTERDOWN Hash slot not served") {
				t.Errorf("%s: state %+v", topology, st)
			}
			if err := c.ClusterAddSlots(t.Context(), away).Err(); err != nil {
				t.Fatal(err)
			}
			s.delivered(t, last)
			exactlyOnce(t, c, last)
			s.stop(t)
		}
	})
	t.Run("coverage", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartCluster(t, 3, steadyTimeout, redistest.Options{Config: map[string]string{
			"cluster-require-full-coverage": "yes", "cluster-replica-no-failover": "yes", // no other master's, either, when that is slow
		}})
		o := fast(g.Addr())
		o.Topology, o.Shards = Cluster, 16
		for i := 0; ; i++ { // one whose shard is not on the master that goes
			o.AgentID = fmt.Sprintf("agent-%d", i)
			if slot(Tag(Shard(o.AgentID, 16), 16))*3/Slots == 1 {
				break
			}
		}
		q := newMemQueue()
		s := start(t, o, q)
		s.delivered(t, q.add(10, buffer.Events, false))
		g.Masters[0].Kill9()
		c := g.Masters[1].Client()
		defer c.Close()
		awaitLong(t, text("the cluster to be down"), func() bool { return strings.Contains(c.ClusterInfo(t.Context()).Val(), "cluster_state:fail") })
		last := q.add(10, buffer.Events, false)
		if st := s.reaches(t, Retrying, ClassCluster); st.Acked != 10 || !strings.Contains(st.Error, "CLUSTERDOWN The cluster is down") {
			t.Errorf("state %+v", st)
		}
		g.Masters[0].Restart()
		s.eventually(t, last)
		if d := cmp.Diff(audit{}, auditKey(t, c, s.batch.keys[buffer.Events], last)); d != "" {
			t.Errorf("stream of %d (-want +got):\n%s", last, d)
		}
	})
}

// TestSenderUnblocked: somebody ends the one command of the sensor's that blocks.
func TestSenderUnblocked(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	o := fast(srv.Addr())
	o.Ack = AckReplica // and there is none
	var told []State
	o.OnChange = func(st State) { told = append(told, st) }
	s := start(t, o, q)
	last := q.add(10, buffer.Events, false)
	await(t, text("a WAIT that is ended"), func() bool {
		ids, err := waiting(t, c)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			c.ClientUnblockWithError(t.Context(), id)
		}
		return testutil.ToFloat64(s.m.errors[ClassBusy]) > 0
	})
	await(t, text("another connection"), func() bool { return s.State().Phase == Connected })
	s.stop(t)
	exactlyOnce(t, c, last)
	if !slices.ContainsFunc(told, func(st State) bool { return st.Phase == Retrying && strings.Contains(st.Error, "UNBLOCKED") }) {
		t.Errorf("told %+v", told)
	}
	if got := q.Bounds().Acked; got != 0 {
		t.Errorf("acknowledged %d without a replica", got)
	}
}

// waiting are the connections that wait for replicas.
func waiting(t testing.TB, c *redis.Client) (ids []int64, err error) {
	list, err := c.ClientList(t.Context()).Result()
	for line := range strings.Lines(list) {
		var id int64
		if strings.Contains(line, " cmd=wait ") {
			if _, err := fmt.Sscanf(line, "id=%d", &id); err != nil {
				return nil, err
			}
			ids = append(ids, id)
		}
	}
	return ids, err
}
