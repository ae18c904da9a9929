// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Class says what kind of failure keeps records from being delivered. The set is
// closed: it labels metrics and keys the log limiter.
type Class string

// The classes. A failure is retried, or delivery is held until its cause is removed, while
// the buffer keeps the records. Only a single record that does not pass where others do is
// given up, see refuse.go.
const (
	ClassNone Class = ""

	// The network: whether the server applied the last batch is unknown.
	ClassNetwork   Class = "network"   // the connection broke
	ClassTimeout   Class = "timeout"   // no reply in time
	ClassDial      Class = "dial"      // no connection: refused, no route, unknown name
	ClassHandshake Class = "handshake" // TLS handshake broken off or not answered
	ClassTLS       Class = "tls"       // a certificate refused, on either side, or no TLS at all

	// The server says: not now.
	ClassLoading    Class = "loading"
	ClassBusy       Class = "busy"
	ClassReadOnly   Class = "readonly"
	ClassReplicas   Class = "replicas"   // NOREPLICAS, MASTERDOWN
	ClassCluster    Class = "cluster"    // MOVED, ASK, CLUSTERDOWN, TRYAGAIN, CROSSSLOT
	ClassMaxClients Class = "maxclients" // no free connection slot
	ClassNoScript   Class = "noscript"

	// Somebody has to do something.
	ClassOOM         Class = "oom"
	ClassMisconf     Class = "misconf"
	ClassCredentials Class = "credentials" // the password file cannot be read
	ClassAuth        Class = "auth"
	ClassPermission  Class = "permission"
	ClassWrongType   Class = "wrongtype"
	ClassScripting   Class = "scripting"  // the server cannot run the script
	ClassTopology    Class = "topology"   // the server is not what it was taken for
	ClassDurability  Class = "durability" // the server cannot confirm what was asked of it
	ClassCursor      Class = "cursor"     // the agent's cursor is not readable
	ClassFenced      Class = "fenced"     // another process writes as this agent
	ClassOversize    Class = "oversize"   // a batch is broken off again and again, or called too large

	ClassReply  Class = "reply"  // an answer outside the protocol
	ClassServer Class = "server" // any other error reply
)

// Classes returns all classes but [ClassNone], for tables and metrics.
func Classes() []Class {
	return []Class{
		ClassNetwork, ClassTimeout, ClassDial, ClassHandshake, ClassTLS,
		ClassLoading, ClassBusy, ClassReadOnly, ClassReplicas, ClassCluster, ClassMaxClients, ClassNoScript,
		ClassOOM, ClassMisconf, ClassCredentials, ClassAuth, ClassPermission, ClassWrongType, ClassScripting,
		ClassTopology, ClassDurability, ClassCursor, ClassFenced, ClassOversize, ClassReply, ClassServer,
	}
}

// policy is what a class means for the send loop.
type policy struct {
	phase Phase // Retrying or Held or Fenced
	slow  bool  // twice the backoff cap: each attempt costs the server, or risks a lockout
	hint  string
}

func (c Class) policy() policy {
	switch c {
	case ClassNetwork:
		return policy{Retrying, false, "the connection broke; if it breaks on the first command, check whether the server expects TLS"}
	case ClassTimeout:
		return policy{Retrying, false, "no answer in time: check the load, latency and slow log of the server, and whether the link carries transport.batch_bytes within transport.timeout"}
	case ClassDial:
		return policy{Retrying, false, "check that the server runs, the address, and firewalls in between"}
	case ClassHandshake:
		return policy{Retrying, true, "check that the port speaks TLS"}
	case ClassTLS:
		return policy{Held, true, "check the CA file, the server name, expiry dates and the client certificate, and that the port speaks TLS; there is no fallback to plain text"}
	case ClassLoading:
		return policy{Retrying, false, "the server is loading its data set"}
	case ClassBusy:
		return policy{Retrying, false, "a script or function blocks the server: see SCRIPT KILL, FUNCTION KILL"}
	case ClassReadOnly:
		return policy{Retrying, false, "this is a read-only replica: if it lasts, the address is the wrong one"}
	case ClassReplicas:
		return policy{Retrying, false, "the server refuses writes until enough replicas, or its master, are back"}
	case ClassCluster:
		return policy{Retrying, false, "the slot is served by another node or by none at present; if it lasts, set topology: cluster, and give each decisions key the shard's {tag}"}
	case ClassMaxClients:
		return policy{Retrying, true, "the server is out of connection slots: raise maxclients or find who holds them"}
	case ClassNoScript:
		return policy{Retrying, false, "the server forgot the script; it is loaded again"}
	case ClassOOM:
		return policy{Held, false, "Redis is full: raise maxmemory, or let consumers read and trim the stream; events stay in the buffer meanwhile"}
	case ClassMisconf:
		return policy{Held, false, "Redis refuses writes because it cannot persist them: check its disk and log"}
	case ClassCredentials:
		return policy{Held, false, "make the password file readable for the sensor"}
	case ClassAuth:
		return policy{Held, true, "check the user name and the password file; the file is read again at each attempt"}
	case ClassPermission:
		return policy{Held, true, "grant what packaging/redis/edr-sensor.acl grants: +evalsha +script|load +hget +hset +xadd on the sensor's keys, +cluster|slots on a cluster, +wait or +waitaof for ack"}
	case ClassWrongType:
		return policy{Held, false, "a key of the sensor holds something else: choose another prefix or move that key; the sensor never deletes it"}
	case ClassScripting:
		return policy{Held, true, "the server must allow EVALSHA and SCRIPT LOAD and be Redis 6.0 or Valkey, or newer"}
	case ClassTopology:
		return policy{Held, true, "topology, address, sentinel.master and shards must be those of the servers, and of what the operator wrote into <prefix>:meta"}
	case ClassDurability:
		return policy{Held, true, "ack: fsync needs Redis 7.2 or newer with appendonly yes; older ones have appendfsync always, with ack: reply"}
	case ClassCursor:
		return policy{Held, false, "the agent's field in the cursors hash was written by something else: remove it after checking the stream"}
	case ClassFenced:
		return policy{Fenced, true, "another process writes as this agent: a cloned machine or a restored queue; give one of them a new agent id and an empty buffer"}
	case ClassOversize:
		return policy{Held, false, "the server, or what stands before it, breaks the connection over some records: raise proto-max-bulk-len and client-query-buffer-limit, or the limit of the proxy, or look for what inspects the traffic"}
	case ClassReply:
		return policy{Held, false, "the server's answer is not one of protocol edr/1: is there a proxy in between?"}
	}
	return policy{Held, false, "see the server's message"}
}

// classify maps an error of any layer to its class. What the server applied is
// known for none of them: after each the Sender asks before it sends again.
func classify(err error) Class {
	if err == nil {
		return ClassNone
	}
	// Ours know what they are.
	if c, ours := errors.AsType[*classError](err); ours {
		return c.class
	}
	if re, said := errors.AsType[redis.Error](err); said {
		return classifyReply(re.Error())
	}
	var ne net.Error
	switch {
	case refusedTLS(err): // a server that wants a client certificate says so on the first read
		return ClassTLS
	case errors.As(err, &ne) && ne.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return ClassTimeout
	}
	return ClassNetwork
}

// refusedTLS tells a refusal, which will be repeated, from a broken handshake.
func refusedTLS(err error) bool {
	var (
		op     *net.OpError
		record tls.RecordHeaderError
		verify *tls.CertificateVerificationError
	)
	// crypto/tls marks an alert of the other side only by this Op.
	return errors.As(err, &record) || errors.As(err, &verify) || (errors.As(err, &op) && op.Op == "remote error")
}

// classifyReply maps the text of an error reply. Error codes are the first word
// by Redis' convention; the ones that share the code ERR need a closer look.
func classifyReply(msg string) Class {
	msg = inScript(msg)
	word, _, _ := strings.Cut(msg, " ")
	switch word {
	case "LOADING":
		return ClassLoading
	case "BUSY", "UNBLOCKED":
		return ClassBusy
	case "READONLY":
		return ClassReadOnly
	case "NOREPLICAS", "MASTERDOWN":
		return ClassReplicas
	case "MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN", "CROSSSLOT":
		return ClassCluster
	case "NOSCRIPT":
		return ClassNoScript
	case "OOM":
		return ClassOOM
	case "MISCONF":
		return ClassMisconf
	case "NOAUTH", "WRONGPASS":
		return ClassAuth
	case "NOPERM":
		return ClassPermission
	case "WRONGTYPE":
		return ClassWrongType
	case "EDRCURSOR":
		return ClassCursor
	}
	for _, m := range []struct {
		has   string
		class Class
	}{
		{"max number of clients", ClassMaxClients},
		{"can't run this command", ClassPermission}, // ACL checks inside a script
		{"ACL failure in script", ClassPermission},  // the same in Valkey
		{"without any password configured", ClassAuth},
		{"invalid password", ClassAuth},
		{"unauthenticated", ClassAuth}, // more than ten arguments before AUTH is a protocol error
		{"invalid username-password", ClassAuth},
		{"invalid bulk length", ClassOversize},
		{"invalid multibulk length", ClassOversize},
		{"Protocol error: too big", ClassOversize},
		{"maximum allowed size", ClassOversize},
		{"unknown command", ClassScripting},
		{"rror compiling script", ClassScripting},
		{"Could not find engine", ClassScripting},
		{"DB index is out of range", ClassServer},
	} {
		if strings.Contains(msg, m.has) {
			return m.class
		}
	}
	return ClassServer
}

// inScript returns what a command in the script met, out of what Redis before 7.0 says of
// it: "ERR Error running script (call to f_…): @user_script:61: @user_script: 61: -OOM …".
func inScript(msg string) string {
	const place = "@user_script"
	if !strings.HasPrefix(msg, "ERR Error running script") && !strings.HasPrefix(msg, place) {
		return msg
	}
	if at := strings.LastIndex(msg, place); at >= 0 {
		msg = strings.TrimPrefix(strings.TrimLeft(msg[at+len(place):], ": 0123456789"), "-")
	}
	return msg
}

// classError is an error whose class is known where it arises.
type classError struct {
	class Class
	err   error
}

func (e *classError) Error() string { return e.err.Error() }
func (e *classError) Unwrap() error { return e.err }
