// SPDX-License-Identifier: Apache-2.0

package transport

import "time"

// Phase is what a [Sender] is doing.
type Phase string

// The phases. In all but Connected the buffer keeps what is not delivered.
const (
	Connecting Phase = "connecting" // not connected yet
	Connected  Phase = "connected"
	Retrying   Phase = "retrying" // a failure that usually passes by itself
	Held       Phase = "held"     // a failure that needs somebody; still tried now and then
	Fenced     Phase = "fenced"   // another process writes as this agent
)

// State is a snapshot of a [Sender].
type State struct {
	Phase   Phase
	Since   time.Time // when this phase began
	Address string
	// Class, Error and Hint describe the last failure, and are empty while
	// connected. Hint says what a person can do.
	Class Class
	Error string
	Hint  string
	// Warning is about the server's configuration: it would lose events without
	// telling anybody. Empty when nothing is known against it.
	Warning string
	// Acked is the highest seq the server has confirmed, and LastReply when it
	// last answered (zero: never).
	Acked     uint64
	LastReply time.Time
	// Rewinds counts how often the server had less than it had confirmed, and Behind
	// is what it lacked the last time; zero before the first.
	Rewinds uint64
	Behind  Behind
	// Rotations counts the connects with another password than before.
	Rotations uint64
}

// Behind is a range of seqs, both ends included.
type Behind struct{ First, Last uint64 }

func (s *State) differs(o *State) bool {
	return s.Phase != o.Phase || s.Class != o.Class || s.Warning != o.Warning || s.Rewinds != o.Rewinds || s.Rotations != o.Rotations
}
