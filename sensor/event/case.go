// SPDX-License-Identifier: Apache-2.0

package event

import (
	"sync/atomic"
	"time"
)

// MaxCases is how many cases can be open at the same time.
const MaxCases = 16

// Case is an open case: what its scope covers carries its ids. Once it is handed to
// the worker it is not written any more, but for Tagged.
type Case struct {
	ID, InvestigationID, UserID string
	Opened                      time.Time
	Scope                       CaseScope
	// Roots are processes of a CaseSubtree that an earlier run of the sensor knew to
	// belong to it, though their parents are gone.
	Roots  []ProcessKey
	Deep   bool          // report everything the sensor can see of the scope
	Tagged atomic.Uint64 // records that carry its ids
}

// CaseScopeKind says by what a [CaseScope] recognises what it covers.
type CaseScopeKind uint8

// The scopes of cases. An event is covered when one of the processes that it is
// about is: the one that acts, and for a fork the new one as well.
const (
	CaseProcess   CaseScopeKind = iota + 1 // one process
	CaseSubtree                            // a process, and what descends from it since the case was opened or runs below it then
	CaseContainer                          // the processes of a container
	CaseCgroup                             // the processes of a control group and of those below it
	CaseUser                               // the processes whose real, effective or login user it is
	CasePath                               // the processes that run an executable at the path or below it, and changes of files there
)

// CaseScope is what a case covers.
type CaseScope struct {
	Kind       CaseScopeKind
	PID        uint32 // CaseProcess, CaseSubtree: in the initial pid namespace
	StartTicks uint64 // of that process: hundredths of a second since boot, as in /proc/PID/stat
	UID        uint32 // CaseUser
	Text       string // CaseContainer: id, or at least its first 12 characters; CaseCgroup, CasePath: absolute and clean path
}
