// SPDX-License-Identifier: Apache-2.0

// Package sensor sees what happens on the host: it loads and attaches the
// kernel programs, reads their ring buffers in place, and runs the worker that
// decodes, enriches and encodes every record and hands it to a Sink.
//
// One goroutine, the one that calls [Sensor.Run], does all of that, so the
// process table needs no lock. Ring space is released only when the Sink says
// that the events are durable ([Sensor.Release]): the ring is the queue in
// front of the disk, and what it cannot hold is counted in the kernel.
package sensor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/enrich"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf"
)

// ErrFull is what a Sink's End returns when the record would fit after a Flush.
var ErrFull = errors.New("flush before the next record")

// Sink takes the encoded events in order. All its methods are called by the
// worker only.
type Sink interface {
	// Next is the sequence number of the record that Begin starts.
	Next() uint64
	// Begin returns the slice to append one event to.
	Begin() []byte
	// BeginDecision returns the slice to append one decision to.
	BeginDecision(event.Decisions) []byte
	// End completes the record. Urgent asks for a commit at once; names are the
	// losses that this record reports. With an error nothing was added: ErrFull
	// asks for a Flush first, any other is final.
	End(rec []byte, urgent bool, names []event.Loss) error
	// Size is the number of bytes ended since the last Flush.
	Size() int
	// Flush hands over the records ended so far, and the mark to store with
	// them. It blocks while the disk cannot follow. On an error nothing was
	// handed over and the next Flush tries again.
	Flush(ctx context.Context, mark []byte) error
	// Unnamed appends the losses that no record has reported yet.
	Unnamed(dst []event.Loss) []event.Loss
	// Dropped is what the buffer no longer has and nobody is known to have received:
	// in part it may have been under way when it went, and is no loss until that is known.
	Dropped() event.Loss
}

// Options are what a Sensor needs. Encoder and Enricher belong to the worker
// from Open on.
type Options struct {
	Scope         Scope
	PriorityBytes int // ring for processes; a power of two, multiple of the page size
	BulkBytes     int // ring for the network and files
	Files         FileOptions
	Protected     []Protected // files of the sensor itself
	ForkEvents    bool
	Host          event.Host
	Encoder       *ocsf.Encoder
	Enricher      *enrich.Enricher
	Sink          Sink
	ExerciseDir   string // where the hooks are tried; nobody else may write there
	Mark          []byte // stored with the last durable commit of the run before, if any
	// Keeper, if set, keeps what is in the kernel over a restart; Kept is what it has kept.
	// Both are used until Close, which the descriptors do not survive.
	Keeper     Keeper
	Kept       []Kept
	Registerer prometheus.Registerer
	// CaseRoots, if set, is given every few seconds, and at the end of Run, what the
	// cases of subtrees need to go on in the next run. The worker waits for it.
	CaseRoots func(map[*event.Case][]event.ProcessKey)
}

const (
	pollRecords = 256       // records decoded before the first of them is enriched
	bulkShare   = 32        // of them kept for the bulk ring while the priority ring is never empty
	flushBytes  = 256 << 10 // handed over before a poll is complete, so that memory stays bounded
	tickEvery   = time.Second
	linesEvery  = 10 * time.Second // log lines that a record or a tick repeats
	maxNotices  = 1024
)

// Sensor is one set of attached programs and the worker that reads them.
type Sensor struct {
	o        Options
	metrics  *metrics
	kernel   *kernel
	who      identity
	priority *ring
	bulk     *ring
	own      rings  // those two
	in       *rings // that the worker reads: own, or those of the process before
	taken    takeover
	settled  chan struct{} // closed when only the own are read
	keepErr  error         // why nothing outlives this process
	wait     *waiter
	dec      decoder
	hooks    atomic.Pointer[[event.Kinds]string] // by what each kind is seen
	coverage atomic.Pointer[[]Coverage]
	pulse    pulse
	born     time.Time // what times are counted from, so that the clock may be set

	events  [pollRecords]event.Event
	after   [pollRecords]uint64 // the ring's position behind each event
	bad     [pollRecords]uint64 // how many records before each, and behind the one before it, were none
	self    event.Event
	losses  []event.Loss
	open    []*event.Case // as applied last
	rooted  time.Time     // when CaseRoots was given its last
	mark    mark
	markBuf []byte
	pending bool // records ended since the last Flush

	old       atomic.Pointer[rings] // of the process before, once they are opened
	committed atomic.Uint64         // serial of the newest durable mark
	beat      atomic.Int64          // ns after born of the last turn of the loop
	lost      atomic.Uint64         // kernel losses reported so far
	discarded atomic.Uint64         // events that could not become records so far

	cases atomic.Pointer[caseRequest] // for the worker, the newest only

	mu       sync.Mutex // notices come from other goroutines, rarely
	notices  []event.SelfInfo
	overflow uint64
	repeats  repeats
	recalled told

	told told // the worker's

	reported  [event.Kinds]KindCounter // kernel counters at the last tick
	unwritten map[string]uint64        // events that could not become records since the last flush, by reason
	missed    uint64                   // program runs left out by the kernel, reported so far
	left      suppressed
	shed      atomic.Pointer[string] // of the file options
	limiter   *logging.Limiter       // of lines that a record or a tick can repeat
	lastTick  time.Time
}

// Open loads the programs into the kernel; nothing is attached yet. The caller
// must Close the Sensor. Errors name the program or map and the remedy.
func Open(o Options) (*Sensor, error) {
	s := &Sensor{o: o, metrics: newMetrics(o.Registerer), limiter: logging.NewLimiter(linesEvery), born: time.Now(), settled: make(chan struct{}), who: whoAmI()}
	if err := s.inherit(kernelOptions{Scope: o.Scope, PriorityBytes: o.PriorityBytes, BulkBytes: o.BulkBytes, Files: o.Files, Protected: o.Protected, Keeper: o.Keeper}); err != nil {
		return nil, fmt.Errorf("load sensor: %w", err)
	}
	s.cover(nil)
	if err := s.openRings(); err != nil {
		return nil, errors.Join(fmt.Errorf("open sensor: %w", err), s.Close())
	}
	return s, nil
}

func (s *Sensor) openRings() (err error) {
	if s.priority, err = openRing(s.kernel.priority); err != nil {
		return fmt.Errorf("priority ring: %w", err)
	}
	if s.bulk, err = openRing(s.kernel.bulk); err != nil {
		return fmt.Errorf("bulk ring: %w", err)
	}
	for i, r := range [...]*ring{s.priority, s.bulk} {
		exposeRing(s.o.Registerer, ringNames[i], r, func() float64 { return s.pulseAge(i) })
	}
	if s.wait, err = newWaiter(s.priority, s.bulk); err != nil {
		return fmt.Errorf("ring waiter: %w", err)
	}
	if s.mark.priority.id, err = mapID(s.kernel.priority); err != nil {
		return fmt.Errorf("priority ring: %w", err)
	}
	if s.mark.bulk.id, err = mapID(s.kernel.bulk); err != nil {
		return fmt.Errorf("bulk ring: %w", err)
	}
	s.mark.bootID = parseBootID(s.o.Host.BootID)
	s.own = rings{priority: s.priority, bulk: s.bulk, ids: [...]uint32{s.mark.priority.id, s.mark.bulk.id}}
	s.continueRings()
	s.readFrom(&s.own)
	if s.taken.old != nil { // from the first mark on, which may be the last
		s.readFrom(&s.taken.old.rings)
	}
	if s.taken.how == howAdopted {
		s.pulse.serial = bootTime() // greater than any that the process before has sent
	}
	return nil
}

// Close releases everything but for what is kept for the next process. It must not run
// at the same time as Run.
func (s *Sensor) Close() error {
	var errs []error
	s.kernel.leaving = s.o.Keeper != nil
	if s.taken.old != nil {
		errs = append(errs, s.taken.old.close())
	}
	if s.wait != nil {
		errs = append(errs, s.wait.close())
	}
	for _, r := range []*ring{s.priority, s.bulk} {
		if r != nil {
			errs = append(errs, r.close())
		}
	}
	return errors.Join(append(errs, s.kernel.close())...)
}

// Attach puts the programs in place. It fails only when an event that the
// sensor cannot do without has no hook; Coverage tells about the others.
func (s *Sensor) Attach() error {
	var err error
	if s.taken.how != howAdopted { // else they are
		err = s.kernel.attach()
	}
	if err == nil && s.taken.old != nil {
		s.taken.carryErr = s.carryOn(s.taken.old.set)
	}
	s.taken.attached = bootTime()
	s.cover(s.kernel.coverage())
	if err != nil {
		return fmt.Errorf("attach sensor: %w", err)
	}
	s.keepErr = s.kernel.keep(s.o.Host.BootID)
	return nil
}

// Coverage is what each event is seen by on this host, after Attach. Safe for concurrent
// use; the slice must not be changed.
func (s *Sensor) Coverage() []Coverage { return *s.coverage.Load() }

// Beat is when the worker last finished a turn; zero before Run.
func (s *Sensor) Beat() time.Time {
	if ns := s.beat.Load(); ns != 0 {
		return s.born.Add(time.Duration(ns))
	}
	return time.Time{}
}

// Lost is the number of events the kernel had no room for, since Run.
func (s *Sensor) Lost() uint64 { return s.lost.Load() }

// Discarded is the number of events that could not become records, since Run:
// undecodable, too large, or too many about the sensor itself at once.
func (s *Sensor) Discarded() uint64 { return s.discarded.Load() }

// discard counts events that cannot become records; the next flush reports them.
func (s *Sensor) discard(reason string, n uint64) {
	if n == 0 {
		return
	}
	s.unwritten[reason] += n
	s.discarded.Add(n)
}

// Release frees the ring space that a durable mark covers. The sink's owner
// calls it after each commit, from any one goroutine.
func (s *Sensor) Release(stored []byte) {
	m, err := parseMark(stored)
	if err != nil {
		return
	}
	ids := [...]uint32{m.priority.id, m.bulk.id}
	in := &s.own
	if old := s.old.Load(); old != nil && ids == old.ids {
		in = old
	} else if ids != s.own.ids {
		return // the mark of an earlier run
	}
	in.priority.release(m.priority.pos)
	in.bulk.release(m.bulk.pos)
	s.committed.Store(m.serial)
}

// Stats is a snapshot of the kernel side, for people.
type Stats struct {
	Events map[string]uint64 `json:"events"` // attempts to report, by event code, since the programs were loaded
	Lost   map[string]uint64 `json:"lost"`   // those the ring had no room for
	// Left out on purpose, and not among the events: too many of one process, or excluded.
	Suppressed map[string]uint64 `json:"suppressed"`
	Rings      map[string]Ring   `json:"rings"`
	Beat       time.Time         `json:"beat"` // when the worker last finished a turn
}

// Ring is how full a ring is, in bytes; what is read but not yet durable counts.
type Ring struct {
	Used uint64 `json:"used"`
	Size uint64 `json:"size"`
}

// Stats may be called at any time before Close, from any goroutine.
func (s *Sensor) Stats() (Stats, error) {
	counters, err := s.kernel.counters()
	if err != nil {
		return Stats{}, fmt.Errorf("read kernel counters: %w", err)
	}
	st := Stats{Events: map[string]uint64{}, Lost: map[string]uint64{}, Suppressed: map[string]uint64{}, Beat: s.Beat(), Rings: map[string]Ring{
		"priority": {s.priority.used(), uint64(s.priority.size())},
		"bulk":     {s.bulk.used(), uint64(s.bulk.size())},
	}}
	for k := event.None + 1; k < event.Heartbeat; k++ {
		st.Events[k.String()], st.Lost[k.String()] = counters[k].Attempts, counters[k].Lost
		if n := counters[k].Suppressed; n > 0 {
			st.Suppressed[k.String()] = n
		}
	}
	return st, nil
}
