// SPDX-License-Identifier: Apache-2.0

// Package consumer reads what edr-sensors have stored in Redis Streams, each
// record once and in order.
//
// The sensor stores every record exactly once as far as the server lets it. A
// server that loses the middle of its log can show entries twice nevertheless, so
// a consumer follows one rule, [Positions]: per stream and agent, drop what is not
// above the last (epoch, seq) seen. A newer epoch is a greater string and begins
// at seq 1.
//
// A seq belongs to one agent and epoch, over all of the agent's streams together.
// One that is in none of them is named in a RECORDS_LOST decision, or it is a
// defect: [Audit] tells which.
//
// [Group] puts this together for a consumer group: it resumes where the group has
// acknowledged, takes over what a dead member left, and stores positions with the
// acknowledgement. Those who read with XREAD or XRANGE need a [Decoder] and
// [Positions] only.
//
// Nothing that comes from Redis is trusted: whoever may write to a stream can put
// anything there. What is not a sensor's entry is an [EntryError], and its size
// and what it unpacks to are bounded by [Limits]. The data of a record is handed
// on as it is, neither parsed nor checked.
package consumer
