// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"cmp"
	"io"
	"time"
)

// Info is what a buffer, in use or not, says about itself to people who examine it.
type Info struct {
	Path string // of the file
	Stats
	Chunks int
	Oldest time.Time // when the oldest record was written; zero when that cannot be told, or there is none
	Newest time.Time // the same of the newest
	// Compression is that of the chunks to come, "" when the buffer is not open here; of those
	// that there are the oldest and the newest tell, where they can be read.
	Compression                          string
	OldestCompression, NewestCompression string
	Lost                                 []Loss  // losses that no delivered record names yet: nobody may know of them
	Aside                                []Aside // what was set aside beside it, oldest first
}

// Info returns a snapshot. It reads two pages of the file, and the names beside it.
func (q *Queue) Info() Info {
	q.mu.Lock()
	i := Info{Path: q.path, Stats: q.stats(), Lost: q.state.unreported(), Compression: cmp.Or(q.o.Compression, codecNames[codecNone])}
	ends := i.ends(&q.index)
	q.mu.Unlock()
	i.date(q.file.Load(), ends)
	i.Aside, _ = asides(q.path)
	return i
}

// Info returns what the snapshot has of it.
func (s *Snapshot) Info() Info {
	i := Info{Path: s.Path, Stats: s.Stats, Lost: s.Lost, Aside: s.Aside}
	i.date(s.f, i.ends(&s.index))
	return i
}

// ends counts the chunks and returns the pages of the oldest and the newest.
func (i *Info) ends(x *index) (pages [2]uint64) {
	l := x.live()
	if i.Chunks = len(l); i.Chunks > 0 {
		pages = [2]uint64{l[0].root, l[len(l)-1].root}
	}
	return pages
}

func (i *Info) date(f io.ReaderAt, pages [2]uint64) {
	if i.Chunks == 0 {
		return
	}
	for n, end := range [2]struct {
		at    *time.Time
		codec *string
	}{{&i.Oldest, &i.OldestCompression}, {&i.Newest, &i.NewestCompression}} {
		if at, codec := writtenAt(f, pages[n]); at > 0 && int(codec) < len(codecNames) {
			*end.at, *end.codec = time.Unix(0, at), codecNames[codec]
		}
	}
}

// unreported lists the losses that no delivered record names yet, in the seqs of the epoch.
func (s *state) unreported() (list []Loss) {
	for _, l := range s.losses.unreported(s.acked) {
		list = append(list, l.shift(-s.base))
	}
	return list
}
