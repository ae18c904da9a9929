// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// counter watches how many connections of sensors a server has.
type counter struct {
	most atomic.Int64
	stop func()
}

// count watches until stopped. A connection counts when two lists in a row have it: what
// the other side has closed before the first of them, the server knows by the second.
func count(t *testing.T, srv *redistest.Server) *counter {
	ctx, cancel := context.WithCancel(t.Context())
	w := &counter{}
	var wg sync.WaitGroup
	wg.Go(func() {
		var before map[string]bool
		client := srv.Client()
		for ctx.Err() == nil {
			list, err := client.ClientList(ctx).Result()
			if err != nil { // a client whose dials fail goes on to dial when it is closed
				client.Close()
				client = srv.Client()
			}
			now, n := sensors(list), int64(0)
			for id := range now {
				if before[id] {
					n++
				}
			}
			w.most.Store(max(w.most.Load(), n))
			before = now
			sleep(ctx, 5*time.Millisecond)
		}
		client.Close()
	})
	w.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(w.stop)
	return w
}

// sensors are the ids in a CLIENT LIST that a sensor has logged in on, see [as]: a link of a
// replica or a sentinel looks like any other until it has said what it is.
func sensors(list string) map[string]bool {
	ids := map[string]bool{}
	for line := range strings.Lines(list) {
		f := map[string]string{}
		for w := range strings.FieldsSeq(line) {
			k, v, _ := strings.Cut(w, "=")
			f[k] = v
		}
		if f["user"] == "edr-sensor" {
			ids[f["id"]] = true
		}
	}
	return ids
}

func kick(t *testing.T, c *redis.Client) {
	t.Helper()
	for id := range sensors(c.ClientList(t.Context()).Val()) {
		c.ClientKillByFilter(t.Context(), "ID", id)
	}
}

// TestConnections: no server ever has more than two connections of a sensor, while they
// break, while it probes, and while masters change.
func TestConnections(t *testing.T) {
	t.Parallel()
	most := func(t *testing.T, least int64, counters ...*counter) {
		t.Helper()
		for i, w := range counters {
			w.stop()
			if n := w.most.Load(); n > 2 || n < least {
				t.Errorf("server %d had %d connections, want %d to 2", i, n, least)
			}
		}
	}
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		srv := redistest.Start(t, limited(t))
		c := srv.Client()
		defer c.Close()
		disk := &fakeDisk{upstream: srv.Addr()}
		disk.synced.Store(true)
		o := as(t, fast(disk.start(t)))
		o.Ack, o.ProbeInterval = AckFsync, 10*time.Millisecond
		w, q := count(t, srv), newMemQueue()
		s := start(t, o, q)
		for range 30 {
			last := q.add(5, buffer.Events, true)
			await(t, text("a batch"), func() bool { return c.XLen(t.Context(), eventsKey).Val() == int64(last) })
			kick(t, c)
		}
		s.delivered(t, q.add(5, buffer.Events, true))
		srv.Kill9()
		srv.Restart()
		s.delivered(t, q.add(5, buffer.Events, true))
		await(t, text("both connections to be seen"), func() bool { return w.most.Load() == 2 })
		most(t, 2, w)
		s.stop(t)
	})
	t.Run("sentinel", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartSentinel(t, failTimeout, limited(t))
		o := asToo(t, g, as(t, fast(g.Addr())))
		o.Topology, o.Master, o.ProbeInterval = Sentinel, redistest.MasterName, 10*time.Millisecond
		counters := []*counter{count(t, g.Masters[0]), count(t, g.Replicas[0])}
		for _, s := range g.Sentinels {
			counters = append(counters, count(t, s))
		}
		failover(t, g, o, g.Masters[0], g.Replicas[0], eventsKey, 0)
		most(t, 0, counters...)
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		g := redistest.StartCluster(t, 3, failTimeout, limited(t))
		o := as(t, fast(g.Addr()))
		o.Topology, o.Shards, o.ProbeInterval = Cluster, 16, 10*time.Millisecond
		o.AgentID = "agent-1"
		tag := Tag(Shard(o.AgentID, 16), 16)
		master := slot(tag) * 3 / Slots
		var counters []*counter
		for i := range g.Masters {
			counters = append(counters, count(t, g.Masters[i]), count(t, g.Replicas[i]))
		}
		failover(t, g, o, g.Masters[master], g.Replicas[master], "edr:{"+tag+"}:events", 0)
		most(t, 0, counters...)
	})
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		srv := redistest.Start(t, limited(t))
		w := count(t, srv)
		for range 3 {
			c, err := net.Dial("tcp", srv.Addr())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Write([]byte("AUTH edr-sensor CHANGE-ME\r\n")); err != nil {
				t.Fatal(err)
			}
		}
		await(t, text("three connections to be seen"), func() bool { return w.most.Load() == 3 })
	})
}

// TestStorm: a server that was away, and whose handshakes take longer for the whole fleet
// than one sensor waits for its own, gets all sensors back; those that try again at fixed
// times keep it from answering any.
func TestStorm(t *testing.T) {
	t.Parallel()
	const fleet = 60
	dir := t.TempDir()
	pool := slowCertificate(t, dir)
	port := redistest.FreePort(t)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{
		"tls-port": fmt.Sprint(port), "tls-cert-file": dir + "/cert.pem", "tls-key-file": dir + "/key.pem", "tls-ca-cert-file": dir + "/cert.pem", "tls-auth-clients": "no",
	}})
	cfg := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}

	// What a handshake takes here is the measure of all times below: the quickest one, as
	// others may have waited for the CPU.
	handshake := func() time.Duration {
		quickest := time.Hour
		for range 20 {
			began := time.Now()
			c, err := tls.Dial("tcp", addr, cfg)
			if err != nil {
				t.Fatal(err)
			}
			quickest = min(quickest, time.Since(began))
			c.Close()
		}
		return quickest
	}
	quickest := handshake()
	all := quickest * fleet
	patience := all / 4

	var dials atomic.Int64
	senders := make([]*running, fleet)
	queues := make([]*memQueue, fleet)
	for i := range senders {
		o := fast(addr)
		o.AgentID, o.DialTimeout = fmt.Sprintf("agent-%d", i), patience
		o.FirstReconnect, o.BackoffBase, o.BackoffCap, o.HealthyAfter = 4*all, all, 16*all, time.Minute
		o.ProbeInterval = 50 * time.Millisecond // so that all notice, without records
		o.TLS = func() (*tls.Config, error) {
			dials.Add(1)
			return cfg, nil
		}
		queues[i] = newMemQueue()
		senders[i] = start(t, o, queues[i])
	}
	deliver := func() {
		for i, q := range queues {
			last := q.add(1, buffer.Events, true)
			awaitLong(t, lazy(func() string { return fmt.Sprintf("sender %d of the fleet, state %+v", i, senders[i].State()) }), func() bool { return senders[i].State().Acked >= last })
		}
	}
	deliver()
	srv.Kill9()
	for _, s := range senders {
		awaitLong(t, text("the sensors to notice"), func() bool { return s.State().Phase != Connected })
	}
	srv.Restart()
	dials.Store(0) // those before it were refused, however long it took to start
	deliver()
	jittered := float64(dials.Load()) / fleet
	for _, s := range senders {
		s.stop(t)
	}

	// Control: all at once, again and again.
	now := handshake()
	var succeeded atomic.Int64
	dials.Store(0)
	var wg sync.WaitGroup
	for range fleet {
		wg.Go(func() {
			for range 20 {
				dials.Add(1)
				d := tls.Dialer{NetDialer: &net.Dialer{}, Config: cfg}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				c, err := d.DialContext(ctx, "tcp", addr)
				cancel()
				if err == nil {
					succeeded.Add(1)
					defer c.Close()
					return
				}
				sleep(t.Context(), patience/4)
			}
		})
	}
	wg.Wait()
	fixed := float64(dials.Load()) / float64(max(1, succeeded.Load()))
	t.Logf("a handshake takes %v: all of %d came back with %.1f dials each; at fixed times %d did, with %.1f dials for each of them", all/fleet, fleet, jittered, succeeded.Load(), fixed)
	if now > 3*quickest || quickest > 3*now { // what is patience for the one was none for the other
		t.Logf("not compared: a handshake took %v at first and %v before the control", quickest, now)
	} else if fixed <= jittered {
		t.Errorf("fixed times need %.1f dials per connection and jitter %.1f: the test does not bite", fixed, jittered)
	}
}

// slowCertificate writes one whose handshakes are dear for the server and cheap for its
// clients.
func slowCertificate(t *testing.T, dir string) *x509.CertPool {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 4096)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: private}} {
		text := pem.EncodeToMemory(block)
		pool.AppendCertsFromPEM(text)
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return pool
}
