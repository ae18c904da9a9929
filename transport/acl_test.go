// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// limited are options of servers that have the user of the ACL file that is shipped, with
// more rules if there are any.
func limited(t testing.TB, more ...string) redistest.Options {
	t.Helper()
	file, err := os.ReadFile("../packaging/redis/edr-sensor.acl")
	if err != nil {
		t.Fatal(err)
	}
	rules := strings.Join(append([]string{strings.TrimSpace(string(file))}, more...), " ")
	path := filepath.Join(t.TempDir(), "users.acl")
	if err := os.WriteFile(path, []byte(rules+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return redistest.Options{TCP: true, Config: map[string]string{"aclfile": path}}
}

// as makes a Sender log in as that user.
func as(t testing.TB, o Options) Options {
	t.Helper()
	o.Username, o.PasswordFile = "edr-sensor", writePassword(t, "", "CHANGE-ME")
	return o
}

// asToo makes it log in to the sentinels as well, as a user who may ask them one thing.
func asToo(t testing.TB, g *redistest.Group, o Options) Options {
	t.Helper()
	for _, s := range g.Sentinels {
		c := s.Client()
		defer c.Close()
		if err := c.Do(t.Context(), "ACL", "SETUSER", "edr-sensor", "on", ">CHANGE-ME", "-@all", "+hello", "+auth", "+sentinel|get-master-addr-by-name").Err(); err != nil {
			t.Fatal(err)
		}
	}
	o.SentinelUsername, o.SentinelPasswordFile = "edr-sensor", writePassword(t, "", "CHANGE-ME")
	return o
}

// nothingRefused checks that the servers that are up have had nothing to refuse.
func nothingRefused(t *testing.T, servers ...*redistest.Server) {
	t.Helper()
	for _, s := range servers {
		if s.PID() == 0 {
			continue
		}
		c := s.Client()
		defer c.Close()
		if log, err := c.ACLLog(t.Context(), 10).Result(); err != nil || len(log) > 0 {
			for _, l := range log {
				t.Errorf("%s was refused: %s %s in %s", l.Username, l.Reason, l.Object, l.Context)
			}
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// TestACLOptions: what the ACL file grants is enough for everything, with the one rule more
// that operations.md names for an option; without that rule delivery is held. Under the
// file as it is the warnings work too.
func TestACLOptions(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		rule string
		aof  string
		edit func(*Options)
	}{
		"ack reply":    {edit: func(*Options) {}},
		"ack replica":  {rule: "+wait", edit: func(o *Options) { o.Ack = AckReplica }},
		"ack fsync":    {rule: "+waitaof", aof: "everysec", edit: func(o *Options) { o.Ack = AckFsync }},
		"trim minid":   {rule: "+time", edit: func(o *Options) { o.TrimAge = time.Hour }},
		"trim maxlen":  {edit: func(o *Options) { o.TrimLength, o.DecisionsLimit = 1000, 1000 }},
		"db":           {rule: "+select", edit: func(o *Options) { o.DB = 1 }},
		"packed":       {edit: func(o *Options) { o.Encoding = ZstdBatch }},
		"other shards": {edit: func(o *Options) { o.Shards = 8 }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			probe := redistest.Start(t, redistest.Options{}).Client()
			defer probe.Close()
			if known, err := probe.Command(t.Context()).Result(); tt.rule == "+waitaof" && (err != nil || known["waitaof"] == nil) {
				t.Skipf("this server has no WAITAOF (%v)", err)
			}
			for _, granted := range []bool{true, false} {
				var rules []string
				if granted && tt.rule != "" {
					rules = append(rules, tt.rule)
				}
				if !granted && tt.rule == "" {
					continue
				}
				so := limited(t, rules...)
				so.AOF, so.Config["repl-diskless-sync-delay"] = tt.aof, "0"
				srv := redistest.Start(t, so)
				if tt.rule == "+wait" {
					_, port, _ := net.SplitHostPort(srv.Addr())
					redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{"replicaof": "127.0.0.1 " + port}})
				}
				c := srv.Client()
				defer c.Close()
				o := as(t, fast(srv.Addr()))
				o.ProbeInterval = 20 * time.Millisecond
				tt.edit(&o)
				if err := c.HSet(t.Context(), "edr:meta", "proto", 1, "shards", max(1, o.Shards), "tagscheme", "v1").Err(); err != nil {
					t.Fatal(err)
				}
				q := newMemQueue()
				q.add(20, buffer.Events, false)
				q.add(2, buffer.DecisionsSystem, false)
				q.add(2, buffer.DecisionsAgents, false)
				last := q.add(2, buffer.DecisionsApprovals, false)
				s := start(t, o, q)
				if !granted {
					s.reaches(t, Held, ClassPermission)
					s.stop(t)
					continue
				}
				s.delivered(t, last)
				s.stop(t)
				nothingRefused(t, srv)
				if len(s.refused) > 0 {
					t.Errorf("may not ask %v", s.refused)
				}
			}
		})
	}
	t.Run("risks", func(t *testing.T) {
		t.Parallel()
		so := limited(t)
		so.Config["maxmemory-policy"] = "allkeys-lru"
		srv := redistest.Start(t, so)
		c := srv.Client()
		defer c.Close()
		o := as(t, fast(srv.Addr()))
		o.ProbeInterval, o.DecisionsLimit = 20*time.Millisecond, 100
		q := newMemQueue()
		s := start(t, o, q)
		s.delivered(t, q.add(90, buffer.DecisionsSystem, false))
		if err := c.XGroupCreate(t.Context(), "decisions:system", "siem", "0").Err(); err != nil {
			t.Fatal(err)
		}
		if err := c.ConfigSet(t.Context(), "maxmemory", "100mb").Err(); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []RiskKind{RiskEviction, RiskUnread} {
			await(t, lazy(func() string { return fmt.Sprintf("%s, state %+v", kind, s.State()) }), func() bool {
				return slices.ContainsFunc(s.State().Risks, func(r Risk) bool { return r.Kind == kind })
			})
		}
		s.stop(t)
		nothingRefused(t, srv)
	})
}

// TestACLForbids: what is not granted is not possible, whatever becomes of the sensor.
func TestACLForbids(t *testing.T) {
	t.Parallel()
	so := limited(t)
	srv := redistest.Start(t, so)
	so.Username, so.Password = "edr-sensor", "CHANGE-ME"
	admin := srv.Client()
	defer admin.Close()
	for _, key := range []string{eventsKey, "decisions:system"} {
		if err := admin.XAdd(t.Context(), &redis.XAddArgs{Stream: key, Values: []any{"a", "b"}}).Err(); err != nil {
			t.Fatal(err)
		}
	}
	admin.Set(t.Context(), "other", "x", 0)
	copied := *admin.Options()
	copied.Username, copied.Password, copied.ClientName = so.Username, so.Password, ""
	c := redis.NewClient(&copied)
	defer c.Close()
	for _, command := range []string{
		"XRANGE " + eventsKey + " - +", "XREAD STREAMS " + eventsKey + " 0", "XLEN " + eventsKey, "XTRIM " + eventsKey + " MAXLEN 0", "XDEL " + eventsKey + " 1-1",
		"DEL " + eventsKey, "DEL decisions:system", "GET other", "XADD other * a b", "HGET other a", "HGETALL edr:{s000}:cursors", "KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET *", "CONFIG SET dir /",
		"SHUTDOWN NOSAVE", "ACL LIST", "CLIENT LIST", "MONITOR", "EVAL return 0", "FUNCTION LIST", "SCRIPT FLUSH", "CLUSTER RESET", "REPLICAOF NO ONE", "MIGRATE h 1 decisions:system 0 1", "PUBLISH a b", "SAVE",
	} {
		var args []any
		for word := range strings.FieldsSeq(command) {
			args = append(args, word)
		}
		if err := c.Do(t.Context(), args...).Err(); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			t.Errorf("%s: %v", command, err)
		}
	}
	if err := c.Do(t.Context(), "XADD", eventsKey, "*", "a", "b").Err(); err != nil {
		t.Errorf("control: %v", err)
	}
}
