// SPDX-License-Identifier: Apache-2.0

// Package buffer is the bounded, durable queue between the sensor and the
// transport: one bbolt file of a fixed size, one appender, one reader.
//
// It promises that every record appended is, at any later time and however the
// process died, in exactly one place: still live, delivered, or counted and
// named in a [Loss]. It knows nothing of what records mean, of the network, or of
// the kernel's ring buffers, whose reading position it stores as an opaque mark.
//
// # Life of a record
//
// [Batch] frames records in memory. [Queue.Append] copies them into chunks of at
// most CommitBytes and gives them their seq; the writer, the only goroutine that
// changes the file, commits whole batches: when CommitBytes are pending, or
// CommitInterval after the first of them, 10 ms after the first urgent one. While
// one commit syncs, the next forms, so under load commits grow to four chunks and
// more records share a sync. Memory is bounded
// by one commit in flight and one forming; behind that Append blocks, and the ring
// buffers of the kernel are the queue.
//
// A commit deletes what has to leave, stores chunks, counters, losses and the
// mark, all in one transaction. [Queue.Read] returns records once they are durable.
// [Queue.Ack] moves a watermark; what is below stays as a retention tail, so that a
// server that lost confirmed records can have them again, and is the first to leave.
//
// # The file
//
// q.db is preallocated and has the size of the cap at any time; a full disk cannot stop
// it. [Queue.Resize] sets more space aside, or copies what is kept into a smaller file
// that takes its name. Where what was synced is not safe, Open refuses (place.go).
//
//	m  state   counters, losses, lease, mark: one value with a checksum (state.go)
//	c  <BE64 first seq> -> bucket: sequence = records | pages<<32; key d = chunk (chunk.go)
//
// A bucket per chunk, because bbolt never splits a leaf of up to four keys: chunks
// as values of one bucket would share leaves and be written again and again
// (measured: 4.5 to 5.9 bytes written per payload byte, against 1.09 at 256 KiB per
// commit and 1.03 at 1 MiB here). FreelistArray, because first fit keeps a ring of
// runs of different lengths whole where the hash map fragments it. Chunks fill at
// most 0.92 of the file less a reserve; ErrMaxSizeReached is a backstop only, and
// answered by a transaction that frees more. The freelist is stored by Close alone:
// while running it would cost a rewrite per commit, without it an open after a kill
// reads one page per chunk. One after Close reads the tree alone, which has the extent of
// each chunk and is proven by its seal; the page of a chunk is looked at when bbolt is about
// to (mend.go).
//
// A transaction costs one sync, not the two of bbolt: a seal in the meta page, a checksum
// of the tree, tells one that a power failure has cut off, and the file is what the meta
// page before leads to (seal.go).
//
// The frames of a chunk may be compressed (codec.go). Its checksum is over what is stored:
// whoever copies chunks need not restore them, and who does is bounded by the largest
// chunk, whatever a header says.
//
// The reader uses pread, never bbolt's mapping, which faults page by page and dies
// with the process when the file is cut. It finds chunks in an index in memory, not in
// a View: a View pins pages, and this way none is ever open while anything waits.
// That a chunk is still in the index after its bytes were read proves that they were
// not overwritten; its checksum and seq prove the rest. In a backlog it tells the disk of
// the next two to four megabytes (readahead.go).
//
// Seqs in the file only ascend. [Queue.Renew] begins a new epoch in it by noting how much
// lower those of the epoch are from then on: one transaction, whatever the queue holds.
//
// # Accounting
//
// At any time, asserted when a file is opened and at every step of the tests:
//
//	last = truncated + reclaimed + corrupt + in doubt + live
//
// Records in doubt are what keeps the sum exact. When the oldest records have to go
// while the server is away, the reply to the last batch may have been lost with the
// connection: the server has it, and nobody here knows. Counting it as truncated
// would count a delivered batch as lost. So Read hands out only up to a lease that
// is on disk, a dropped record below the lease and above the watermark is in doubt,
// and the server decides: an Ack that covers it means delivered; a Read that asks
// for what is behind a lower seq means lost. Either decision is durable before
// anything behind it is handed out. The counter so lags an outage by a batch or two
// and is exact when it ends.
//
// A [Loss] stays in the state, and with it the seq of the record that names it. Is that
// record itself dropped, given up ([Queue.SetAside]) or lost by the server when the queue no
// longer has it ([Queue.Forfeit]), its losses are unnamed again in the same transaction. Of
// those whose record was acknowledged the newest 64 are kept as they are, and the older ones
// of a cause as one, which is named again when any of their records may have been lost:
// twice is harmless, never is not.
//
// A resize is the one that looks at chunks which are neither next to be read nor to leave:
// one that it finds damaged may so be in doubt amid live ones.
//
// The size and the name of the file are looked at before each transaction, so that the
// mapping of a file that was cut is not touched. What is cut between that and the last page
// written faults in this goroutine, where SetPanicOnFault makes it an error; nothing that
// is cheap closes that gap, as a mapping cannot be asked. One that is cut in the milliseconds
// in which it is opened, at a start or after a failed commit, faults in a goroutine of bbolt
// and ends the process; the next start restores what is left.
//
// # Errors
//
// A failed commit is shown in [Stats] and tried again, with backoff, on a new
// handle: after a failed fsync the old one means nothing, and neither does the page
// cache, which is dropped before the file is read back. Every transaction has a
// number, so that reading back tells whether it is there. A damaged chunk is
// counted, named, deleted and skipped, and a copy of it kept.
//
// A damaged tree is found by a preflight with plain reads, because bbolt panics over it
// in a goroutine of its own, at an open and when a transaction fails. What bbolt wants to find
// in front of a chunk follows from the tree, and is written anew where it is damaged. When the
// tree is damaged, or when the file under an open queue was cut, removed
// or replaced, a new file takes over every intact chunk, found by magic and checksum and
// not by the tree, and the old one is set aside. A file that the disk refuses to read
// again and again counts as damaged, for what it yields is better than none. What the
// new file counts as live, delivered or lost comes from the newest state: that in
// memory, that of the tree where a meta page still leads to it, or that of the sidecar
// (sidecar.go). Where that state surely knows every record handed out, epoch and seqs go
// on and each missing record is named. Otherwise a server may know seqs that would be
// given twice, and fence us; so a new epoch begins with the records numbered anew and a
// loss of unknown size.
//
// # Where this differs from the design notes
//
//   - They never set NoSync, as then a meta page may be on disk without its tree. Here it
//     is set and that is told by the seal; it is worth a third to a half of the time of a
//     commit of 256 KiB.
//   - A frame's length is a fixed word instead of a varint: records are encoded in
//     place behind it, two bytes are cheaper than a copy.
//   - Counters and mark are one value instead of a key each; below a kilobyte it lives
//     inside the root page and costs no page of its own.
//   - In the notes a file whose ring has wrapped costs little while it is nearly
//     empty. Here bbolt's array of free pages is merged anew in each commit: at a cap
//     of 512 MiB 1 MB of garbage per commit, about 1 % of a core at 20 commits/s. It
//     grows with the cap.
//   - In the notes a fast drain takes half of the rate of the appends, hence a throttle.
//     Here appends kept 99 to 100 % of 5,000 records a second beside a drain of 180 MiB/s
//     (BenchmarkDrain); to wait for commits cost a quarter of that drain and gained nothing.
//   - In the notes RSS needs a deliberate MADV_DONTNEED after scans. Deleting chunks
//     is enough to need it: 136 MiB of file pages after four seconds at 5,000 records
//     per second, 11 MiB with it.
package buffer
