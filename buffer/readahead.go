// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"os"

	"golang.org/x/sys/unix"
)

// A backlog that is no longer in the page cache is drained chunk by chunk, each read waiting
// for the disk, while the kernel's own readahead sees no more than the end of a run of
// pages. So the disk is told of the chunks to come: always between half a window and a
// whole one.
const aheadWindow = 4 * mib

// ahead is what the disk was told of.
type ahead struct {
	from, to uint64 // seqs
	runs     []run  // to tell it next
}

// run is a part of the file.
type run struct{ off, n int64 }

// plan notes what to ask for when the chunks before place i are read next, and those from
// there on later. Called with the lock held.
func (a *ahead) plan(l []entry, i int) {
	a.runs = a.runs[:0]
	if i == 0 || i == len(l) {
		return
	}
	pos := l[i-1].last()
	if pos < a.from || pos > a.to { // somewhere else than before
		a.from, a.to = pos, pos
	}
	a.from = pos
	left := int64(aheadWindow)
	for ; i < len(l) && l[i].last() <= a.to; i++ {
		left -= int64(l[i].pages) * pageSize
	}
	if left < aheadWindow/2 {
		return
	}
	for ; i < len(l) && left > 0; i++ {
		r := run{int64(l[i].root) * pageSize, int64(l[i].pages) * pageSize}
		if n := len(a.runs); n > 0 && a.runs[n-1].off+a.runs[n-1].n == r.off {
			a.runs[n-1].n += r.n
		} else {
			a.runs = append(a.runs, r)
		}
		left -= r.n
		a.to = l[i].last()
	}
}

// tell asks for it. It is advice: an error changes no more than the speed.
func (a *ahead) tell(f *os.File) {
	for _, r := range a.runs {
		_ = unix.Fadvise(int(f.Fd()), r.off, r.n, unix.FADV_WILLNEED)
	}
	a.runs = a.runs[:0]
}
