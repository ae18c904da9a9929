// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/bpf"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	beatEvery  = 5 * time.Second
	stuckAfter = 15 * time.Second // without one of them at its end
)

// Stages that a heartbeat goes through, and where it can get stuck.
const (
	StageHeartbeat = "heartbeat" // it is not sent
	StageProgram   = "program"   // the kernel does not run our programs
	StageRing      = "ring"      // records find no room
	StageWorker    = "worker"    // records are not read
	StageBuffer    = "buffer"    // what was read does not become durable
)

// Stuck names a stage that does not move, and says in a sentence how that shows. Its
// zero value says that all do.
type Stuck struct {
	Stage, Reason string
}

// announcement is struct announced of bpf/events.h, announcedHeartbeat and
// announcedExercise what there can be one for.
type announcement = bpf.SensorAnnounced

const (
	announcedHeartbeat = uint32(iota)
	announcedExercise
)

// announce tells the programs of the calling thread, which must be locked.
func (k *kernel) announce(what uint32, serial uint64) error {
	ns, err := namespaceOf("self", "pid")
	if err != nil {
		return fmt.Errorf("announce thread: %w", err)
	}
	a := announcement{Serial: serial, PidNs: ns, Tid: uint32(unix.Gettid())}
	if err := k.maps["announced_threads"].Put(what, a); err != nil {
		return fmt.Errorf("announce thread: %w", err)
	}
	return nil
}

// beat sends one heartbeat: a thread that is announced and ends, as threads do all the
// time. Nothing else on the host changes, and no process is made.
func (k *kernel) beat(serial uint64) error {
	sent := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The runtime never ends the main thread: while it is held, another
			// one does this.
			sent <- k.beat(serial)
			runtime.UnlockOSThread()
			return
		}
		sent <- k.announce(announcedHeartbeat, serial)
		// Not unlocked, so that the thread ends with the goroutine.
	}()
	return <-sent
}

const heartbeatSize = int(unsafe.Sizeof(bpf.SensorHeartbeat{}))

// asHeartbeat returns the serial of a record that is a heartbeat.
func asHeartbeat(rec []byte) (serial uint64, ok bool) {
	if len(rec) != heartbeatSize {
		return 0, false
	}
	h := (*bpf.SensorHeartbeat)(unsafe.Pointer(&rec[0]))
	if event.Kind(h.Header.Kind) != event.Heartbeat || int(h.Header.Size) != len(rec) {
		return 0, false
	}
	return h.Serial, true
}

// pulse follows heartbeats through the stages. One is waited for at a time; those that
// are sent meanwhile have higher serials, and any of them ends the waiting.
type pulse struct {
	mu      sync.Mutex
	serial  uint64    // of the newest that was sent
	sent    time.Time // when
	failed  error     // why none could be sent
	waiting uint64    // the serial waited for, 0 when none is
	since   time.Time // when that was sent; without one, when the last wait ended
	counted KindCounter

	rings   [2]ringPulse // priority, bulk
	handing atomic.Int64 // ns after the sensor's birth when the sink was given a batch, 0 when it holds none
}

// ringPulse is what the worker met in a ring.
type ringPulse struct {
	serial  atomic.Uint64 // newest heartbeat read
	pos     atomic.Uint64 // the ring's position behind it
	at      atomic.Int64  // ns after the sensor's birth when it was read
	reached atomic.Uint64 // the position up to which everything was read
}

func (p *ringPulse) met(serial, pos uint64, at time.Duration) {
	p.pos.Store(pos)
	p.serial.Store(serial)
	p.at.Store(int64(at))
}

// pulseAge is how long ago the worker met a heartbeat in a ring, in seconds; before the
// first how long the sensor lives.
func (s *Sensor) pulseAge(ring int) float64 {
	return (time.Since(s.born) - time.Duration(s.pulse.rings[ring].at.Load())).Seconds()
}

// ringIndex is the place of a ring in a pulse.
func (s *Sensor) ringIndex(r *ring) int {
	if r == s.priority {
		return 0
	}
	return 1
}

var ringNames = [...]string{"priority", "bulk"}

// sendBeat sends the next heartbeat.
func (s *Sensor) sendBeat() error {
	counters, err := s.kernel.counters()
	if err != nil {
		return err
	}
	p := &s.pulse
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	s.settle(now)
	if p.failed = s.kernel.beat(p.serial + 1); p.failed != nil {
		return p.failed
	}
	p.serial++
	p.sent = now
	if p.waiting == 0 {
		p.waiting, p.since, p.counted = p.serial, now, counters[event.Heartbeat]
	}
	return nil
}

// settle ends the waiting when the heartbeat, or a later one, came all the way. The
// caller holds the pulse.
func (s *Sensor) settle(now time.Time) {
	p := &s.pulse
	for i, r := range [...]*ring{s.priority, s.bulk} {
		if at := &p.rings[i]; at.serial.Load() < p.waiting || !r.released(at.pos.Load()) {
			return
		}
	}
	if p.waiting != 0 {
		p.waiting, p.since = 0, now
	}
}

// Stuck says which stage between the kernel and the disk does not move, by what became
// of the heartbeats and of the worker's turns. Safe for concurrent use before Close.
func (s *Sensor) Stuck(now time.Time) Stuck {
	p := &s.pulse
	p.mu.Lock()
	s.settle(now)
	f := findings{
		now: now, turn: s.Beat(), sent: p.sent, since: p.since, failed: p.failed,
		waiting: p.waiting != 0, hook: s.hooks.Load()[event.Exit],
	}
	counted, waiting := p.counted, p.waiting
	p.mu.Unlock()
	if ns := p.handing.Load(); ns != 0 {
		f.handing = s.born.Add(time.Duration(ns))
	}
	for i, r := range [...]*ring{s.priority, s.bulk} {
		at := &p.rings[i]
		f.rings[i] = ringFindings{
			read: at.serial.Load() >= waiting, released: r.released(at.pos.Load()),
			unread: r.producer() - at.reached.Load(), used: r.used(),
		}
	}
	if f.waiting && now.Sub(f.since) > stuckAfter {
		counters, err := s.kernel.counters()
		if err != nil {
			return Stuck{StageProgram, err.Error()}
		}
		f.written, f.lost = counters[event.Heartbeat].Attempts-counted.Attempts, counters[event.Heartbeat].Lost-counted.Lost
	}
	return f.judge()
}

// findings are what the judgement on the stages rests on, all of one moment.
type findings struct {
	now           time.Time
	handing       time.Time // since when the sink takes a batch, zero when it takes none
	turn          time.Time // the worker's last; zero before its first
	sent, since   time.Time // the newest heartbeat, and the one that is waited for
	failed        error
	waiting       bool
	hook          string // that sees threads end
	written, lost uint64 // records of heartbeats since then
	rings         [2]ringFindings
}

type ringFindings struct {
	read, released bool   // of the heartbeat
	unread, used   uint64 // bytes
}

// judge names the first cause, not what follows from it: a disk that stands still makes
// the worker wait and the rings full.
func (f findings) judge() Stuck {
	ago := func(t time.Time) time.Duration { return f.now.Sub(t).Round(time.Second) }
	overdue := func(t time.Time) bool { return !t.IsZero() && f.now.Sub(t) > stuckAfter }
	switch {
	case overdue(f.handing):
		return Stuck{StageBuffer, fmt.Sprintf("it has not taken what the worker hands over for %s", ago(f.handing))}
	case overdue(f.turn):
		return Stuck{StageWorker, fmt.Sprintf("it has not finished a turn for %s", ago(f.turn))}
	case f.failed != nil:
		return Stuck{StageHeartbeat, f.failed.Error()}
	case !f.waiting && overdue(f.sent):
		return Stuck{StageHeartbeat, fmt.Sprintf("none was sent for %s", ago(f.sent))}
	case !f.waiting || !overdue(f.since):
		return Stuck{}
	case f.written == 0:
		hook := f.hook
		if hook == "" {
			hook = "the hook that sees threads end"
		}
		return Stuck{StageProgram, fmt.Sprintf("%s does not run: no heartbeat of the last %s made a record", hook, ago(f.since))}
	}
	for i, r := range f.rings {
		name := ringNames[i]
		switch {
		case r.read && r.released:
			continue
		case r.read:
			return Stuck{StageBuffer, fmt.Sprintf("what was read from the %s ring %s ago is not durable", name, ago(f.since))}
		case f.lost == 0:
			return Stuck{StageWorker, fmt.Sprintf("a heartbeat is in the %s ring for %s and the worker has not come to it", name, ago(f.since))}
		case r.unread < r.used/2:
			return Stuck{StageBuffer, fmt.Sprintf("the %s ring is full of %d bytes that are read and not durable", name, r.used-r.unread)}
		default:
			return Stuck{StageRing, fmt.Sprintf("the %s ring has had no room for a heartbeat for %s: the worker is slower than the events", name, ago(f.since))}
		}
	}
	return Stuck{}
}
