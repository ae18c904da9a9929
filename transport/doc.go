// SPDX-License-Identifier: Apache-2.0

// Package transport delivers the records of the buffer to Redis Streams, each
// exactly once and in order, whatever happens to the network and the server.
//
// One script, deliver.lua, runs on the server. It keeps for each agent the last
// seq it stored, in the same slot as the stream, so that a call can be repeated
// without harm and a server that went back in time (lost the tail of its log,
// failed over, was emptied) is noticed: the agent rewinds over the records the
// buffer has kept. See deliver.lua for the protocol.
//
// A [Sender] is one goroutine, that of [Sender.Run], with one connection and one
// batch in flight. After any failure it drops the connection, waits, and asks
// the server what it has; it never guesses. What cannot be delivered stays in the
// buffer, whose overflow policy decides about loss and accounts for it. Only a single
// record that does not pass where others do is given up, copied aside and named as lost
// (refuse.go); else it would be the last one ever delivered. Of what a server answers it
// takes only what it can have asked for, of bounded size.
//
// A stop is Run's ctx ending, then [Sender.Drain] with a deadline once the buffer
// has committed its last records, then [Sender.Close].
//
// The consumer's rule: entries of one agent are in order of (epoch, seq). Drop an
// entry that is not above the last one seen: a server that loses the middle of
// its log can show one twice. A seq that is missing is named in a loss record.
package transport
