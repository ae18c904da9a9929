// SPDX-License-Identifier: Apache-2.0

package logging

// The keys of log fields. Every key that more than one package uses stands
// here, so that one thing has one name in all lines. The first four are the
// platform's: they are bound once, at the boundary that knows them.
const (
	KeyAgentID         = "agent_id"
	KeyCaseID          = "case_id"
	KeyInvestigationID = "investigation_id"
	KeyUserID          = "user_id"

	KeyAddress    = "address"
	KeyAttempt    = "attempt"
	KeyBatch      = "batch"
	KeyBytes      = "bytes"
	KeyCause      = "cause"
	KeyClass      = "class" // of an error: a word from a closed set
	KeyCode       = "code"  // of a decision, e.g. RINGBUF_FULL
	KeyComponent  = "component"
	KeyCount      = "count"
	KeyDuration   = "duration"
	KeyEpoch      = "epoch"
	KeyEvent      = "event" // event code, e.g. process.exec
	KeyFirst      = "first" // seq range, both ends included
	KeyHook       = "hook"
	KeyLast       = "last"
	KeyMode       = "mode"
	KeyPath       = "path"
	KeyReason     = "reason"
	KeyRemedy     = "remedy"
	KeyRing       = "ring"
	KeyScope      = "scope"
	KeySeq        = "seq"
	KeySignal     = "signal"
	KeyStream     = "stream"
	KeySuppressed = "suppressed" // lines like this one that were not written
	KeyTenantID   = "tenant_id"
	KeyVersion    = "version"

	keyUnbound = "unbound"
)
