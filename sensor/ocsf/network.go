// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	networkClass = `"category_uid":4,"category_name":"Network Activity","class_uid":4001,"class_name":"Network Activity",`
	netOpen      = `"activity_id":1,"activity_name":"Open","type_uid":400101,"type_name":"Network Activity: Open",`
	netClose     = `"activity_id":2,"activity_name":"Close","type_uid":400102,"type_name":"Network Activity: Close",`
	netReset     = `"activity_id":3,"activity_name":"Reset","type_uid":400103,"type_name":"Network Activity: Reset",`
	netFail      = `"activity_id":4,"activity_name":"Fail","type_uid":400104,"type_name":"Network Activity: Fail",`
	netRefuse    = `"activity_id":5,"activity_name":"Refuse","type_uid":400105,"type_name":"Network Activity: Refuse",`
	netListen    = `"activity_id":7,"activity_name":"Listen","type_uid":400107,"type_name":"Network Activity: Listen",`
)

// side is which end of a connection this host is.
type side uint8

const (
	unknownSide side = iota
	initiator
	responder
)

func sideOf(ev *event.Event) side {
	switch {
	case ev.TCP.Flags&event.TCPInitiated != 0:
		return initiator
	case ev.Kind == event.TCPConnect, ev.Kind == event.TCPConnectFailed:
		return initiator
	case ev.TCP.Flags&event.TCPEarly != 0 && ev.Kind == event.TCPClose:
		return unknownSide // opened before the sensor looked
	}
	return responder
}

func (e *Encoder) tcp(w *writer, ev *event.Event) {
	t := &ev.TCP
	w.raw(networkClass)
	w.raw(tcpActivity(ev))
	w.raw(informational)
	if t.Errno != 0 || ev.Kind == event.TCPConnectFailed {
		w.raw(failure)
		w.opt(`"status_code":`, unix.ErrnoName(unix.Errno(t.Errno)))
		if t.Errno > 0 {
			w.str(`"status_detail":`, unix.Errno(t.Errno).Error())
		}
	} else {
		w.raw(success)
	}
	w.raw(e.device)
	w.owner(ev)

	s := sideOf(ev)
	local, remote := plain(t.Local), plain(t.Remote)
	if ev.Kind == event.TCPListen {
		w.endpoint(`"dst_endpoint":{`, local)
	} else if s == responder {
		w.endpoint(`"src_endpoint":{`, remote)
		w.endpoint(`"dst_endpoint":{`, local)
	} else {
		w.endpoint(`"src_endpoint":{`, local)
		w.endpoint(`"dst_endpoint":{`, remote)
	}
	w.connection(ev, s, local, remote)
	if ev.Kind != event.TCPListen && t.Opened != 0 && (ev.Kind == event.TCPClose || ev.Kind == event.TCPConnectFailed) {
		w.ms(`"start_time":`, w.wall+int64(t.Opened))
		w.ms(`"end_time":`, ev.Time)
		w.int(`"duration":`, floorDiv(int64(ev.KTime-t.Opened), 1e6))
	}
	if ev.Kind == event.TCPClose {
		w.traffic(t, s)
	}

	w.open(`"unmapped":{`)
	if s != unknownSide {
		w.raw(`"initiated":`)
		if s == initiator {
			w.raw(`true,`)
		} else {
			w.raw(`false,`)
		}
	}
	w.uint(`"netns":`, uint64(t.NetNS))
	w.uid(`"cgroup_id":`, t.CgroupID)
	w.flag(`"owner_is_listener":`, t.Flags&event.TCPOwnerListener != 0)
	switch ev.Kind {
	case event.TCPListen:
		w.uint(`"backlog":`, uint64(t.Backlog))
	case event.TCPClose:
		w.flag(`"opened_before_sensor":`, t.Flags&event.TCPEarly != 0)
		w.closer(ev)
		w.open(`"tcp_info":{`)
		w.uint(`"retransmits":`, uint64(t.Retransmits))
		w.uint(`"rtt_us":`, uint64(t.SRTT))
		w.close('}')
	}
	w.close('}')
}

func tcpActivity(ev *event.Event) string {
	switch ev.Kind {
	case event.TCPListen:
		return netListen
	case event.TCPClose:
		return netClose
	case event.TCPConnectFailed:
		switch unix.Errno(ev.TCP.Errno) {
		case unix.ECONNREFUSED:
			return netRefuse
		case unix.ECONNRESET:
			return netReset
		}
		return netFail
	}
	return netOpen
}

// owner writes the process whose connection it is, if one can be named.
func (w *writer) owner(ev *event.Event) {
	if ev.Subject == nil && (ev.Actor.PID == 0 || ev.TCP.Flags&event.TCPOwnerUnknown != 0) {
		return
	}
	w.actingProcess(ev)
}

// actingProcess writes the process whose doing the event is.
func (w *writer) actingProcess(ev *event.Event) {
	p := ev.Subject
	if p == nil {
		p = &event.Process{Key: ev.Actor, Partial: true}
	}
	w.open(`"actor":{"process":{`)
	w.knownProcess(ev, p)
	if pp := ev.Parent; pp != nil {
		w.open(`"parent_process":{`)
		w.identity(pp)
		w.close('}')
	}
	w.open(`"xattributes":{`)
	w.kernelIdentity(p)
	w.rawStrings(p)
	w.close('}')
	w.close('}')
	w.user(p)
	w.close('}')
}

// closer names the process that closed the connection when it is not the owner.
func (w *writer) closer(ev *event.Event) {
	key := ev.TCP.Closer
	if key.PID == 0 || key == ev.Actor {
		return
	}
	p := ev.Creator
	if p == nil || p.Key != key {
		p = &event.Process{Key: key}
	}
	w.open(`"closed_by":{`)
	w.identity(p)
	w.close('}')
}

// plain is the address as on the wire: IPv4 in an IPv6 socket is IPv4.
func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

func (w *writer) endpoint(open string, a netip.AddrPort) {
	w.open(open)
	if a.Addr().IsValid() {
		w.raw(`"ip":"`)
		w.b = append(a.Addr().AppendTo(w.b), '"', ',')
	} else {
		w.raw(`"name":"unknown",`)
	}
	w.uint(`"port":`, uint64(a.Port()))
	w.close('}')
}

func (w *writer) connection(ev *event.Event, s side, local, remote netip.AddrPort) {
	w.open(`"connection_info":{`)
	w.raw(`"uid":"`)
	w.b = append(appendHex(w.b, ev.TCP.ConnID, 16), '"', ',')
	switch s {
	case initiator:
		w.raw(`"direction_id":2,"direction":"Outbound",`)
	case responder:
		w.raw(`"direction_id":1,"direction":"Inbound",`)
	default:
		w.raw(`"direction_id":0,"direction":"Unknown",`)
	}
	w.raw(`"protocol_num":6,"protocol_name":"tcp",`)
	if local.Addr().Is4() {
		w.raw(`"protocol_ver_id":4,"protocol_ver":"Internet Protocol version 4 (IPv4)",`)
	} else if local.Addr().Is6() {
		w.raw(`"protocol_ver_id":6,"protocol_ver":"Internet Protocol version 6 (IPv6)",`)
	}
	if ev.Kind != event.TCPListen {
		w.raw(boundary(local.Addr(), remote.Addr()))
		if local.Addr().IsValid() && local.Addr().BitLen() == remote.Addr().BitLen() {
			w.raw(`"community_uid":"`)
			w.b = append(appendCommunityID(w.b, local, remote), '"', ',')
		}
	}
	w.close('}')
	switch {
	case ev.Kind == event.TCPListen:
		w.raw(`"observation_point_id":2,"observation_point":"Destination",`)
	case s == responder:
		w.raw(`"is_src_dst_assignment_known":true,"observation_point_id":2,"observation_point":"Destination",`)
	case s == initiator:
		w.raw(`"is_src_dst_assignment_known":true,"observation_point_id":1,"observation_point":"Source",`)
	default:
		w.raw(`"is_src_dst_assignment_known":false,"observation_point_id":0,"observation_point":"Unknown",`)
	}
}

// boundary says how far the connection reaches, as far as addresses can tell.
func boundary(local, remote netip.Addr) string {
	switch {
	case !remote.IsValid():
		return `"boundary_id":0,"boundary":"Unknown",`
	case remote.IsLoopback(), remote == local:
		return `"boundary_id":1,"boundary":"Localhost",`
	case remote.IsPrivate(), remote.IsLinkLocalUnicast(), isShared(remote):
		return `"boundary_id":2,"boundary":"Internal",`
	}
	return `"boundary_id":3,"boundary":"External",`
}

// isShared is the carrier-grade NAT range 100.64.0.0/10.
func isShared(a netip.Addr) bool {
	if !a.Is4() {
		return false
	}
	b := a.As4()
	return b[0] == 100 && b[1]&0xc0 == 64
}

// appendCommunityID appends the Community ID version 1 with seed 0, by which
// Zeek, Suricata and others name the same flow.
func appendCommunityID(dst []byte, a, b netip.AddrPort) []byte {
	if a.Compare(b) > 0 {
		a, b = b, a
	}
	var tuple [2 + 16 + 16 + 2 + 2 + 2]byte
	t := tuple[:2]
	t = appendAddr(t, a.Addr())
	t = appendAddr(t, b.Addr())
	t = append(t, unix.IPPROTO_TCP, 0)
	t = binary.BigEndian.AppendUint16(t, a.Port())
	t = binary.BigEndian.AppendUint16(t, b.Port())
	sum := sha1.Sum(t) // what the specification asks for; nothing depends on its strength
	return base64.StdEncoding.AppendEncode(append(dst, '1', ':'), sum[:])
}

func appendAddr(dst []byte, a netip.Addr) []byte {
	if a.Is4() {
		b := a.As4()
		return append(dst, b[:]...)
	}
	b := a.As16()
	return append(dst, b[:]...)
}

// traffic counts relative to the source, which is the initiator, not to this
// host: out is from source to destination.
func (w *writer) traffic(t *event.TCPInfo, s side) {
	bytesOut, bytesIn := t.BytesSent, t.BytesReceived
	packetsOut, packetsIn := uint64(t.SegsOut), uint64(t.SegsIn)
	if s == responder {
		bytesOut, bytesIn = bytesIn, bytesOut
		packetsOut, packetsIn = packetsIn, packetsOut
	}
	w.open(`"cumulative_traffic":{`)
	w.uint(`"bytes":`, bytesIn+bytesOut)
	w.uint(`"bytes_out":`, bytesOut)
	w.uint(`"bytes_in":`, bytesIn)
	w.uint(`"packets":`, packetsIn+packetsOut)
	w.uint(`"packets_out":`, packetsOut)
	w.uint(`"packets_in":`, packetsIn)
	w.close('}')
}
