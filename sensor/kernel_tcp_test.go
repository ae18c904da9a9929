// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func endpoints(e *bpf.SensorTcpEvent) (local, remote netip.AddrPort) {
	address := func(b [16]uint8, port uint16) netip.AddrPort {
		if e.Family == unix.AF_INET {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), port)
		}
		return netip.AddrPortFrom(netip.AddrFrom16(b), port)
	}
	return address(e.LocalAddr, e.LocalPort), address(e.RemoteAddr, e.RemotePort)
}

// closes counts the closes down to none.
func closes(n int) func(record) bool {
	return func(r record) bool {
		if kindOf(r.SensorEventHeader) == event.TCPClose {
			n--
		}
		return n == 0
	}
}

// connection is what was reported of one: its records by kind, by conn_id.
type connection map[event.Kind]*bpf.SensorTcpEvent

// connections sorts records into the two ends of a connection whose client is at local:
// the end that connected, the end that accepted, and everything else.
func connections(t testing.TB, records []record, local string) (client, server connection) {
	t.Helper()
	byID := map[uint64]connection{}
	for _, r := range records {
		kind := kindOf(r.SensorEventHeader)
		if byID[r.tcp.ConnId] == nil {
			byID[r.tcp.ConnId] = connection{}
		}
		if byID[r.tcp.ConnId][kind] != nil {
			t.Errorf("two records of %s for connection %x", kind, r.tcp.ConnId)
		}
		byID[r.tcp.ConnId][kind] = r.tcp
		from, to := endpoints(r.tcp)
		if from.String() == local {
			client = byID[r.tcp.ConnId]
		} else if to.String() == local {
			server = byID[r.tcp.ConnId]
		}
	}
	if client == nil || server == nil {
		t.Fatalf("no connection from %s in %d records", local, len(records))
	}
	return client, server
}

// acceptedBy is how a connection says whose it is: that of who called accept(2), where
// the kernel lets it be seen, else of who called listen(2).
func acceptedBy(k *kernel) event.TCPFlags {
	if strings.HasSuffix(k.find(event.TCPAccept).section, "sock_graft") {
		return 0
	}
	return event.TCPOwnerListener
}

// A process that was given a listener is the one that accepts.
func TestRootTCPAccepter(t *testing.T) {
	for _, multipath := range []bool{false, true} {
		t.Run(fmt.Sprintf("multipath %t", multipath), func(t *testing.T) {
			a := startActor(t)
			k := watch(t, a)
			requireHook(t, k, event.TCPClose)
			bulk := newTap(t, k.bulk)
			lent := a.must(request{Op: "lend", Network: "tcp4", Multipath: multipath})
			records := bulk.until("both closes", closes(2))
			_, server := connections(t, records, lent.Local)
			accept, in := server[event.TCPAccept], server[event.TCPClose]
			if accept == nil || in == nil || len(server) != 2 {
				t.Fatalf("server %v", server)
			}
			by := lent.PID
			if acceptedBy(k) == event.TCPOwnerListener {
				by = a.pid
			}
			for name, e := range map[string]*bpf.SensorTcpEvent{"accepted": accept, "closed": in} {
				if int(e.Header.Pid) != by || event.TCPFlags(e.Flags) != acceptedBy(k) {
					t.Errorf("%s by %d, flags %#x; want %d", name, e.Header.Pid, e.Flags, by)
				}
			}
			if accept.Opened != in.Opened || accept.ConnId != in.ConnId || accept.Header.Ktime >= in.Header.Ktime {
				t.Errorf("accepted %+v, closed %+v", accept, in)
			}
		})
	}
}

// One that nobody accepts is told when it ends, with the process that listened.
func TestRootTCPNotAccepted(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	addr := a.must(request{Op: "listen", Network: "tcp4"}).Local
	local := a.must(request{Op: "dial", Network: "tcp4", Addr: addr}).Local
	a.must(request{Op: "stop listening"})
	a.must(request{Op: "drop"})
	_, server := connections(t, bulk.until("both closes", closes(2)), local)
	for _, kind := range kinds(event.TCPAccept, event.TCPClose) {
		if e := server[kind]; e == nil || int(e.Header.Pid) != a.pid || event.TCPFlags(e.Flags) != event.TCPOwnerListener {
			t.Errorf("%s: %+v", kind, e)
		}
	}
}

func TestRootTCPConnection(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	for _, tt := range []struct {
		name     string
		network  string
		up, down int
		first    string
	}{
		{"nothing sent", "tcp4", 0, 0, "client"},
		{"one byte", "tcp4", 1, 0, "client"},
		{"one byte back", "tcp4", 0, 1, "client"},
		{"both ways", "tcp4", 50_000, 1234, "client"},
		{"server closes", "tcp4", 777, 3_000_001, "server"},
		{"version 6", "tcp6", 123_456, 654_321, "client"},
		{"version 6, server closes", "tcp6", 5, 0, "server"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			talk := a.must(request{Op: "tcp", Network: tt.network, Up: tt.up, Down: tt.down, First: tt.first})
			client, server := connections(t, bulk.until("both closes", closes(2)), talk.Local)
			connect, accept := client[event.TCPConnect], server[event.TCPAccept]
			out, in := client[event.TCPClose], server[event.TCPClose]
			if connect == nil || accept == nil || out == nil || in == nil || len(client) != 2 || len(server) != 2 {
				t.Fatalf("client %v, server %v", client, server)
			}
			for name, e := range map[string]*bpf.SensorTcpEvent{"connect": connect, "client's close": out} {
				local, remote := endpoints(e)
				if local.String() != talk.Local || remote.String() != talk.Remote {
					t.Errorf("%s: %s to %s, want %s to %s", name, local, remote, talk.Local, talk.Remote)
				}
				if event.TCPFlags(e.Flags) != event.TCPInitiated {
					t.Errorf("%s: flags %#x", name, e.Flags)
				}
			}
			for name, e := range map[string]*bpf.SensorTcpEvent{"accept": accept, "server's close": in} {
				local, remote := endpoints(e)
				if local.String() != talk.Remote || remote.String() != talk.Local {
					t.Errorf("%s: %s from %s, want %s from %s", name, local, remote, talk.Remote, talk.Local)
				}
				if event.TCPFlags(e.Flags) != acceptedBy(k) {
					t.Errorf("%s: flags %#x", name, e.Flags)
				}
			}
			for name, e := range map[string]*bpf.SensorTcpEvent{"client": out, "server": in} {
				sent, received := tt.up, tt.down
				if name == "server" {
					sent, received = received, sent
				}
				if e.BytesSent != uint64(sent) || e.BytesReceived != uint64(received) {
					t.Errorf("%s sent %d and received %d bytes, want %d and %d", name, e.BytesSent, e.BytesReceived, sent, received)
				}
				if int(e.CloserPid) != a.pid || e.CloserStartTime != e.Header.StartTime {
					t.Errorf("%s closed by %d, want %d", name, e.CloserPid, a.pid)
				}
				if e.Error != 0 || e.SegsIn == 0 || e.SegsOut == 0 {
					t.Errorf("%s: error %d, segments in %d, out %d", name, e.Error, e.SegsIn, e.SegsOut)
				}
				if e.Opened == 0 || e.Opened > e.Header.Ktime {
					t.Errorf("%s: opened at %d, closed at %d", name, e.Opened, e.Header.Ktime)
				}
			}
			for _, e := range []*bpf.SensorTcpEvent{connect, accept, out, in} {
				if int(e.Header.Pid) != a.pid || e.Header.StartTime == 0 || e.Netns == 0 {
					t.Errorf("process %d of %d in network %d, want %d", e.Header.Pid, e.Header.StartTime, e.Netns, a.pid)
				}
			}
			if connect.Opened != out.Opened || accept.Opened != in.Opened {
				t.Error("two times of opening")
			}
		})
	}
}

func TestRootTCPReset(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	talk := a.must(request{Op: "tcp", Network: "tcp4", Up: 10, Down: 20, First: "client-unread"})
	client, server := connections(t, bulk.until("both closes", closes(2)), talk.Local)
	if e := client[event.TCPClose]; e.Error != 0 || int(e.CloserPid) != a.pid || e.BytesReceived != 20 || e.BytesSent != 10 {
		t.Errorf("client: error %d, closer %d, %d bytes in, %d out", e.Error, e.CloserPid, e.BytesReceived, e.BytesSent)
	}
	if e := server[event.TCPClose]; e.Error != int32(unix.ECONNRESET) || e.CloserPid != 0 || e.BytesReceived != 10 || e.BytesSent != 20 {
		t.Errorf("server: error %d, closer %d, %d bytes in, %d out", e.Error, e.CloserPid, e.BytesReceived, e.BytesSent)
	}
}

func TestRootTCPRefused(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	for network, address := range map[string]string{"tcp4": "127.0.0.1:1", "tcp6": "[::1]:1"} {
		t.Run(network, func(t *testing.T) {
			if answer := a.do(request{Op: "connect", Network: network, Addr: address}); answer.Err == "" {
				t.Fatal("somebody listens on port 1")
			}
			records := bulk.until("failure", func(r record) bool { return kindOf(r.SensorEventHeader) == event.TCPConnectFailed })
			e := records[0].tcp
			local, remote := endpoints(e)
			if len(records) != 1 || remote.String() != address || local.Addr() != remote.Addr() || local.Port() == 0 {
				t.Errorf("%d records, the first from %s to %s", len(records), local, remote)
			}
			if e.Error != int32(unix.ECONNREFUSED) || int(e.Header.Pid) != a.pid || event.TCPFlags(e.Flags) != event.TCPInitiated || e.BytesSent != 0 {
				t.Errorf("error %d, process %d, flags %#x", e.Error, e.Header.Pid, e.Flags)
			}
		})
	}
}

func TestRootTCPAbandoned(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	address := a.must(request{Op: "abandon"}).Remote
	records := bulk.until("failure", func(r record) bool { return kindOf(r.SensorEventHeader) == event.TCPConnectFailed })
	e := records[len(records)-1].tcp
	if _, remote := endpoints(e); remote.String() != address || e.Error != 0 || int(e.Header.Pid) != a.pid {
		t.Errorf("to %s, error %d, process %d; want %s", remote, e.Error, e.Header.Pid, address)
	}
}

// A dual-stack listener takes IPv4 connections into IPv6 sockets; what is reported is
// what is on the wire.
func TestRootTCPMappedAddress(t *testing.T) {
	a := startActor(t)
	server := a.spawn()
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	address := server.must(request{Op: "serve", Network: "tcp", Addr: "[::]:0"}).Local
	port := netip.MustParseAddrPort(address).Port()
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	a.must(request{Op: "connect", Network: "tcp4", Addr: to.String()})
	records := bulk.until("both closes", closes(2))
	for _, r := range records {
		local, remote := endpoints(r.tcp)
		switch kind := kindOf(r.SensorEventHeader); {
		case kind == event.TCPListen:
			if r.tcp.Family != unix.AF_INET6 || !local.Addr().IsUnspecified() || local.Port() != port || r.tcp.Backlog == 0 {
				t.Errorf("listen on %s, family %d, backlog %d", local, r.tcp.Family, r.tcp.Backlog)
			}
		case r.tcp.Family != unix.AF_INET:
			t.Errorf("%s: family %d", kind, r.tcp.Family)
		case kind == event.TCPAccept:
			if local != to || int(r.Pid) != server.pid {
				t.Errorf("accepted on %s by %d, want %s by %d", local, r.Pid, to, server.pid)
			}
		case kind == event.TCPConnect:
			if remote != to || int(r.Pid) != a.pid {
				t.Errorf("connected to %s by %d, want %s by %d", remote, r.Pid, to, a.pid)
			}
		}
	}
}

// Several processes may listen on one port; each connection belongs to the one whose
// socket took it.
func TestRootTCPSharedPort(t *testing.T) {
	a := startActor(t)
	servers := []*actor{a.spawn(), a.spawn(), a.spawn()}
	k := watch(t, a)
	requireHook(t, k, event.TCPClose)
	bulk := newTap(t, k.bulk)
	var address string
	for _, s := range servers {
		address = s.must(request{Op: "serve", Network: "tcp4", Addr: address, Shared: true}).Local
	}
	const conversations = 30
	took, by := map[string]string{}, map[string]int{}
	for range conversations {
		answer := a.must(request{Op: "connect", Network: "tcp4", Addr: address})
		took[answer.Local] = answer.Output
		by[answer.Output]++
	}
	if len(by) < 2 {
		t.Skipf("all connections went to one listener: %v", by)
	}
	seen := 0
	for _, r := range bulk.until("all closes", closes(2*conversations)) {
		if kindOf(r.SensorEventHeader) != event.TCPAccept {
			continue
		}
		seen++
		_, remote := endpoints(r.tcp)
		if got, want := strconv.Itoa(int(r.Pid)), took[remote.String()]; got != want {
			t.Errorf("connection from %s belongs to process %s, was taken by %s", remote, got, want)
		}
	}
	if seen != conversations {
		t.Errorf("%d connections, want %d", seen, conversations)
	}
}

// What was open before the sensor is known by its owner, or, where nobody in scope
// held it, by who closes it.
func TestRootTCPEarly(t *testing.T) {
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("known %t", known), func(t *testing.T) {
			a := startActor(t)
			server := a.spawn()
			address := server.must(request{Op: "listen", Network: "tcp4"}).Local
			client := a.must(request{Op: "dial", Network: "tcp4", Addr: address}).Local
			server.must(request{Op: "accept"})
			k := watch(t, server)
			requireHook(t, k, event.TCPClose)
			if !known {
				forgetAll(t, k.maps["sockets"])
			}
			bulk := newTap(t, k.bulk)
			server.must(request{Op: "drop"})
			a.must(request{Op: "drop"})
			records := bulk.until("close", closes(1))
			e := records[0].tcp
			local, remote := endpoints(e)
			if len(records) != 1 || local.String() != address || remote.String() != client {
				t.Errorf("%d records, the first from %s to %s", len(records), local, remote)
			}
			flags, pid := event.TCPEarly|event.TCPOwnerUnknown, 0
			if known {
				flags, pid = event.TCPEarly, server.pid
			}
			if event.TCPFlags(e.Flags) != flags || e.Opened != 0 || int(e.Header.Pid) != pid || int(e.CloserPid) != server.pid || e.ConnId == 0 {
				t.Errorf("flags %#x, opened %d, process %d, closer %d; want %#x of %d", e.Flags, e.Opened, e.Header.Pid, e.CloserPid, flags, pid)
			}
		})
	}
}

// A listener older than the sensor still gives its connections an owner.
func TestRootTCPEarlyListener(t *testing.T) {
	for _, multipath := range []bool{false, true} {
		t.Run(fmt.Sprintf("multipath %t", multipath), func(t *testing.T) {
			a := startActor(t)
			server := a.spawn()
			address := server.must(request{Op: "serve", Network: "tcp4", Multipath: multipath}).Local
			k := watch(t, a)
			requireHook(t, k, event.TCPClose)
			bulk := newTap(t, k.bulk)
			client := a.must(request{Op: "connect", Network: "tcp4", Addr: address}).Local
			_, accepted := connections(t, bulk.until("both closes", closes(2)), client)
			e := accepted[event.TCPAccept]
			if e == nil || int(e.Header.Pid) != server.pid || event.TCPFlags(e.Flags) != acceptedBy(k) || e.Opened == 0 {
				t.Errorf("accepted: %+v, want by %d", e, server.pid)
			}
		})
	}
}

func forgetAll(t *testing.T, sockets *ebpf.Map) {
	t.Helper()
	var keys []uint64
	var key uint64
	value := make([]byte, sockets.ValueSize())
	it := sockets.Iterate()
	for it.Next(&key, &value) {
		keys = append(keys, key)
	}
	if err := it.Err(); err != nil || len(keys) == 0 {
		t.Fatalf("%d sockets, %v", len(keys), err)
	}
	for _, key := range keys {
		if err := sockets.Delete(key); err != nil {
			t.Fatal(err)
		}
	}
}
