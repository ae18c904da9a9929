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

// The classes. No class ever drops or skips a record: a failure is retried, or
// delivery is held until its cause is removed, while the buffer keeps the records.
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
	ClassScripting   Class = "scripting" // the server cannot run the script
	ClassCursor      Class = "cursor"    // the agent's cursor is not readable
	ClassFenced      Class = "fenced"    // another process writes as this agent

	ClassReply  Class = "reply"  // an answer outside the protocol
	ClassServer Class = "server" // any other error reply
)

// Classes returns all classes but [ClassNone], for tables and metrics.
func Classes() []Class {
	return []Class{
		ClassNetwork, ClassTimeout, ClassDial, ClassHandshake, ClassTLS,
		ClassLoading, ClassBusy, ClassReadOnly, ClassReplicas, ClassCluster, ClassMaxClients, ClassNoScript,
		ClassOOM, ClassMisconf, ClassCredentials, ClassAuth, ClassPermission, ClassWrongType, ClassScripting,
		ClassCursor, ClassFenced, ClassReply, ClassServer,
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
		return policy{Retrying, false, "the server does not answer in time: check its load, latency and slow log"}
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
		return policy{Retrying, false, "the slot is served by another node or by none at present; each decisions key must carry the shard's {tag}"}
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
		return policy{Held, true, "grant what packaging/redis/edr-sensor.acl grants: +evalsha +script|load +hget +hset +xadd on the sensor's keys"}
	case ClassWrongType:
		return policy{Held, false, "a key of the sensor holds something else: choose another prefix or move that key; the sensor never deletes it"}
	case ClassScripting:
		return policy{Held, true, "the server must allow EVALSHA and SCRIPT LOAD and be Redis 7.0 or Valkey, or newer"}
	case ClassCursor:
		return policy{Held, false, "the agent's field in the cursors hash was written by something else: remove it after checking the stream"}
	case ClassFenced:
		return policy{Fenced, true, "another process writes as this agent: a cloned machine or a restored queue; give one of them a new agent id and an empty buffer"}
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
		{"without any password configured", ClassAuth},
		{"invalid password", ClassAuth},
		{"unauthenticated", ClassAuth}, // more than ten arguments before AUTH is a protocol error
		{"invalid username-password", ClassAuth},
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

// classError is an error whose class is known where it arises.
type classError struct {
	class Class
	err   error
}

func (e *classError) Error() string { return e.err.Error() }
func (e *classError) Unwrap() error { return e.err }
