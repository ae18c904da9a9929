// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// rings are the two of one kernel. The worker reads those of one at a time.
type rings struct {
	priority, bulk *ring
	ids            [2]uint32 // of the maps
	// Kernel times between which records count; until is 0 without an end.
	from, until uint64
	// Kinds whose records are of another version: what to do with them.
	foreign map[uint32]foreign
}

// foreign is what becomes of records that this version does not understand.
type foreign uint8

const (
	lostRecord foreign = iota + 1 // it is an event, and counts as lost
	noEvent                       // a heartbeat of the process before
)

// foreignKinds compares the layouts of records. The error says that nothing at all can be
// read of them.
func foreignKinds(theirs, ours map[uint32]string) (map[uint32]foreign, error) {
	if theirs[^uint32(0)] != ours[^uint32(0)] || theirs[^uint32(0)] == "" {
		return nil, errors.New("its records begin in another way")
	}
	list := map[uint32]foreign{}
	for kind, layout := range theirs {
		switch {
		case layout == ours[kind]:
		case strings.HasPrefix(layout, "HEARTBEAT "):
			list[kind] = noEvent
		default:
			list[kind] = lostRecord
		}
	}
	return list, nil
}

// kindNumber is the number of a record's kind; 0 of one that is too short to have one.
func kindNumber(rec []byte) uint32 {
	if len(rec) < 8 {
		return 0
	}
	return binary.NativeEndian.Uint32(rec[4:])
}

func (r *rings) close() error {
	var errs []error
	for _, ring := range [...]*ring{r.priority, r.bulk} {
		if ring != nil {
			errs = append(errs, ring.close())
		}
	}
	return errors.Join(errs...)
}

// counts tells whether a record is to be read from these rings.
func (r *rings) counts(rec []byte) bool {
	t := ktimeOf(rec)
	return t >= r.from && (r.until == 0 || t < r.until)
}

// ktimeOf is the kernel time of a record; 0 of one that is too short to have one.
func ktimeOf(rec []byte) uint64 {
	if len(rec) < 16 {
		return 0
	}
	return binary.NativeEndian.Uint64(rec[8:])
}

// resume goes on where a mark says that everything is durable. What was released since
// is durable, too, or made no record.
func (r *rings) resume(m *mark) error {
	for i, at := range [...]struct {
		ring *ring
		pos  uint64
	}{{r.priority, m.priority.pos}, {r.bulk, m.bulk.pos}} {
		if int64(at.pos-at.ring.position()) <= 0 {
			continue
		}
		if err := at.ring.seek(at.pos); err != nil {
			return fmt.Errorf("%s ring: %w", ringNames[i], err)
		}
	}
	r.from = m.since
	return nil
}

// waiting counts the records that were not read yet.
func (r *rings) waiting() (n uint64, err error) {
	for _, ring := range [...]*ring{r.priority, r.bulk} {
		_, err := ring.scan(func(rec []byte) {
			if _, beat := asHeartbeat(rec); !beat && r.counts(rec) && r.foreign[kindNumber(rec)] != noEvent {
				n++
			}
		})
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// takeover is what a process finds of the one before it.
type takeover struct {
	mark     *mark  // where it was; nil when that is not known
	markErr  error  // why not
	how      string // adopted, replaced; empty when nothing is taken over
	why      string // in a sentence, when it is replaced or nothing is taken over
	old      *predecessor
	waited   uint64 // records found in the rings
	carryErr error  // why the new programs do not know all that the old ones know
	attached uint64 // kernel time when the programs in place of the old ones were
}

// How a process takes over.
const (
	howAdopted  = "adopted"  // the same programs go on
	howReplaced = "replaced" // others take their place, while these go on
)

// predecessor is a kernel whose rings are read to their end, while another one has taken
// its place already.
type predecessor struct {
	set      *keptSet
	rings    rings
	counters *ebpf.Map
	serial   uint64 // of the mark by which it is no more needed
}

func (p *predecessor) close() error {
	err := p.rings.close()
	if p.counters != nil {
		err = errors.Join(err, p.counters.Close())
	}
	p.set.close()
	return err
}

// choose finds the set that counts: the one that the mark names, or without a mark the
// only one that there is. The names of all others, which are closed, are returned.
func (t *takeover) choose(o Options) (set *keptSet, useless []string) {
	if len(o.Mark) > 0 {
		m, err := parseMark(o.Mark)
		if t.markErr = err; err == nil {
			t.mark = &m
		}
	}
	sets, useless := readKept(o.Kept)
	t.why = "nothing was kept of it"
	if o.Keeper == nil {
		t.why = "there is no service manager that keeps anything"
	}
	wanted := ""
	switch {
	case t.mark != nil:
		wanted = strconv.FormatUint(uint64(t.mark.priority.id), 10)
	case len(sets) == 1:
		wanted = sets[0].id
	}
	for _, s := range sets {
		err := errors.New("the buffer does not name it")
		if s.id == wanted {
			err = t.refuses(s, o.Host.BootID)
		}
		if err == nil {
			set = s
			continue
		}
		if set == nil {
			t.why = "what was kept is of no use: " + err.Error()
		}
		useless = append(useless, s.names()...)
		s.close()
	}
	if set != nil {
		t.why = ""
	}
	return set, useless
}

// refuses says why a set cannot be what the mark names.
func (t *takeover) refuses(s *keptSet, bootID string) error {
	switch {
	case s.broken != nil:
		return s.broken
	case s.manifest.BootID != bootID:
		return errors.New("it is of another boot")
	case t.mark != nil && t.mark.bootID != parseBootID(bootID):
		return errors.New("the buffer is of another boot")
	}
	return nil
}

// openPredecessor opens what is to be read to its end.
func openPredecessor(set *keptSet, m *mark, wire map[uint32]string) (p *predecessor, err error) {
	foreign, err := foreignKinds(set.manifest.Wire, wire)
	if err != nil {
		return nil, err
	}
	p = &predecessor{set: set, rings: rings{foreign: foreign}}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.rings.close())
			if p.counters != nil {
				err = errors.Join(err, p.counters.Close())
			}
		}
	}()
	for i, into := range [...]**ring{&p.rings.priority, &p.rings.bulk} {
		ring, err := set.openMap(ringNames[i] + "_ring")
		if err != nil {
			return p, err
		}
		if p.rings.ids[i], err = mapID(ring); err == nil {
			*into, err = openRing(ring)
		}
		// The mapping keeps the memory; nobody waits for its descriptor.
		if err = errors.Join(err, ring.Close()); err != nil {
			return p, err
		}
		(*into).fd = -1
	}
	if m != nil {
		if err = p.rings.resume(m); err != nil {
			return p, err
		}
	}
	if err = p.introduce(); err != nil {
		return p, err
	}
	p.counters, err = set.openMap("kind_counters")
	return p, err
}

// introduce tells the old programs who the sensor is now, so that what it does to its files
// is no tampering to them.
func (p *predecessor) introduce() error {
	if !slices.Contains(p.set.manifest.Maps, "sensor_self") {
		return nil // an older version's
	}
	m, err := p.set.openMap("sensor_self")
	if err != nil {
		return err
	}
	return errors.Join(introduce(m, 0), m.Close())
}

// inherit opens the kernel: the one of the process before if it is of the same setup, or
// a new one beside it.
func (s *Sensor) inherit(o kernelOptions) error {
	t := &s.taken
	set, useless := t.choose(s.o)
	if set != nil && t.mark != nil && t.mark.clean && !set.manifest.fresh() {
		// Somebody restarts the sensor, perhaps because he has made better hooks possible.
		set.replace = true
	}
	k, took, err := loadKernel(o, set)
	if err != nil {
		if set != nil {
			set.close()
		}
		return err
	}
	s.kernel = k
	switch {
	case took:
		t.how = howAdopted
		set.close() // the kernel has copies
	case set != nil:
		t.how, t.why = howReplaced, "programs, maps or settings are others"
		if set.replace {
			t.why = "better hooks may be possible by now"
		}
		if set.broken != nil {
			t.why = set.broken.Error()
		}
		wire, err := wireOf(k.spec.Types)
		if err == nil {
			t.old, err = openPredecessor(set, t.mark, wire)
		}
		if err == nil {
			s.old.Store(&t.old.rings)
		}
		if err != nil {
			t.how, t.old, t.why = "", nil, "what was kept cannot be read: "+err.Error()
			useless = append(useless, set.names()...)
			set.close()
		}
	}
	if len(useless) > 0 && s.o.Keeper != nil {
		return s.o.Keeper.Drop(useless...)
	}
	return nil
}

// carryOn has the own programs know what began before they were attached as the old ones
// know it: who opened a connection, how a file was before it was written, which processes
// are in the tree. Without that a file that was written before and is closed after would
// not be reported. What ends at the same time may stay behind, which does no harm: nothing
// else is found under its address that is not entered anew.
func (s *Sensor) carryOn(old *keptSet) error {
	layouts := stateOf(s.kernel.spec)
	var errs []error
	for _, name := range [...]string{"sockets", "written_files", "scope_pids"} {
		if layouts[name] != old.manifest.State[name] {
			errs = append(errs, fmt.Errorf("%s: the old programs keep them in another form", name))
			continue
		}
		from, err := old.openMap(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		early, err := s.kernel.earlyEntry(name)
		if err == nil {
			err = carry(from, s.kernel.maps[name], early)
		}
		if err = errors.Join(err, from.Close()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	if s.o.Scope.Mode == ScopeTree {
		errs = append(errs, forgetDead(s.kernel.maps["scope_pids"]))
	}
	return errors.Join(errs...)
}

// carry copies entries, but for those that the new map knows better: early tells which of
// its entries were made of what was there when the programs were attached.
func carry(from, to *ebpf.Map, early func(value []byte) bool) error {
	var key []byte
	// An entry that goes meanwhile has the iteration begin again.
	for range 2 * from.MaxEntries() {
		var err error
		if key == nil {
			key, err = from.NextKeyBytes(nil)
		} else {
			key, err = from.NextKeyBytes(key)
		}
		if err != nil || key == nil {
			return err
		}
		value, err := from.LookupBytes(key)
		if err != nil {
			return err
		}
		if value == nil {
			continue
		}
		flags := ebpf.UpdateNoExist
		if own, err := to.LookupBytes(key); err == nil && own != nil {
			if !early(own) {
				continue
			}
			flags = ebpf.UpdateExist
		}
		err = to.Update(key, value, flags)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// earlyEntry tells entries apart by the field that says so.
func (k *kernel) earlyEntry(name string) (func(value []byte) bool, error) {
	var field string
	var bit byte
	switch name {
	case "sockets":
		field, bit = "flags", byte(event.TCPEarly)
	case "written_files":
		field, bit = "early", 1
	default:
		return func([]byte) bool { return false }, nil
	}
	s, ok := btf.UnderlyingType(k.spec.Maps[name].Value).(*btf.Struct)
	if ok {
		for _, m := range s.Members {
			if m.Name == field {
				at := int(m.Offset.Bytes())
				return func(value []byte) bool { return at < len(value) && value[at]&bit != 0 }, nil
			}
		}
	}
	return nil, fmt.Errorf("no field %s in what %s holds", field, name)
}

// forgetDead takes processes out of a tree that ended while they were put in.
func forgetDead(pids *ebpf.Map) error {
	running, err := scanProc()
	if err != nil {
		return err
	}
	var pid uint32
	var in uint8
	var dead []uint32
	for it := pids.Iterate(); it.Next(&pid, &in); {
		if p, ok := running[pid]; !ok || p.dead {
			dead = append(dead, pid)
		}
	}
	for _, pid := range dead {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			continue // made since
		}
		if err := pids.Delete(pid); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// continueRings has the rings of an adopted kernel go on where the mark was. Without a
// mark, when the buffer was set aside, they go on behind what was released.
func (s *Sensor) continueRings() {
	m := s.taken.mark
	if s.taken.how != howAdopted || m == nil {
		return
	}
	if err := s.own.resume(m); err != nil {
		// What was released is durable, and nothing else is known.
		s.taken.why = "the buffer's position makes no sense: " + err.Error()
	}
	s.mark.serial, s.mark.since, s.mark.missed = m.serial, m.since, m.missed
	s.mark.lost, s.mark.suppressed, s.missed = m.lost, m.suppressed, m.missed
	for kind := range s.reported {
		s.reported[kind].Lost, s.reported[kind].Suppressed = m.lost[kind], m.suppressed[kind]
	}
	s.committed.Store(m.serial)
}

// takeOver goes on with what the process before has left, or says what was not seen
// since. It tells whether the processes that run are known to who gets the events.
func (s *Sensor) takeOver(ctx context.Context) (known bool) {
	t := &s.taken
	if t.how == "" {
		s.reportGap(ctx)
		return false
	}
	i := event.SelfInfo{
		Name: "Taken Over", Severity: 1, Code: "TAKEN_OVER", After: t.how, To: time.Now(), Attrs: map[string]any{"set": s.kernel.setID},
	}
	in := &s.own
	if t.old != nil {
		in = &t.old.rings
		i.Attrs["replaced"] = t.old.set.id
	}
	if t.why != "" {
		i.Attrs["why"] = t.why
	}
	if t.carryErr != nil {
		i.Attrs["not_carried_on"] = strings.Join(sentences([]error{t.carryErr}), "; ")
	}
	var err error
	if t.waited, err = in.waiting(); err != nil {
		logging.From(ctx).Error("count what waits in the rings", zap.Error(err))
	}
	i.Count = t.waited
	gap := "at a time that is not known"
	if t.mark != nil {
		i.From = time.Unix(0, t.mark.wall)
		s.lastTick = i.From // what was lost since is reported with its time
		gap = fmt.Sprintf("%s ago", i.To.Sub(i.From).Round(time.Millisecond))
	}
	i.Attrs["priority_position"], i.Attrs["bulk_position"] = in.priority.position(), in.bulk.position()
	i.Message = fmt.Sprintf("the programs of the sensor before this one went on to see; %d events that it had not kept, the last at %s, are read from their rings", t.waited, gap)
	if t.old == nil {
		s.metrics.takeovers[howAdopted].Inc()
		s.Notify(ctx, i)
		return true
	}
	c := s.findCut(ctx)
	t.old.rings.until, s.own.from = c.at, c.at
	i.Attrs["cut_ktime"], i.Attrs["agreed_events"], i.Attrs["disagreed_events"] = c.at, c.agreed, c.disagreed
	if !c.proven {
		i.Severity = 3
		i.Message += fmt.Sprintf("; where the new programs took over, %d events were seen by one set of programs and not by the other, or differ", c.disagreed)
	}
	s.metrics.takeovers[howReplaced].Inc()
	s.Notify(ctx, i)
	return true
}

// unlearn takes back what the snapshot knows of programs that were begun in events which
// are still to be read: those that come before them are of other programs.
func (s *Sensor) unlearn() error {
	unlearn := func(in *rings) error {
		_, err := in.priority.scan(func(rec []byte) {
			if _, beat := asHeartbeat(rec); beat || !in.counts(rec) || in.foreign[kindNumber(rec)] != 0 {
				return
			}
			s.dec.reset()
			ev := &s.events[0]
			if s.dec.decode(rec, ev) != nil {
				return // counted when it is read
			}
			switch ev.Kind {
			case event.Exec:
				s.o.Enricher.Unlearn(ev.Actor, ev.KTime)
			case event.Fork:
				s.o.Enricher.Unlearn(ev.Fork.Child, ev.KTime)
			}
		})
		return err
	}
	var err error
	if s.taken.old != nil {
		err = unlearn(&s.taken.old.rings)
	}
	return errors.Join(err, unlearn(&s.own))
}

// readPredecessor reads the rings of the process before to the cut, and has the mark name
// the own ones from then on. That the old ones are no more needed is known when that mark
// is durable.
func (s *Sensor) readPredecessor(stop, ctx context.Context) error {
	old := s.taken.old
	if old == nil {
		return nil
	}
	ends := [...]uint64{old.rings.priority.producer(), old.rings.bulk.producer()}
	s.readFrom(&old.rings)
	for stop.Err() == nil && (int64(ends[0]-old.rings.priority.position()) > 0 || int64(ends[1]-old.rings.bulk.position()) > 0) {
		n, err := s.poll(ctx)
		if err != nil {
			return err
		}
		if err := s.flush(ctx, false); err != nil {
			return err
		}
		s.beat.Store(int64(time.Since(s.born)))
		if n == 0 { // a record is being written
			select {
			case <-stop.Done():
			case <-time.After(pollMin):
			}
		}
	}
	if stop.Err() != nil {
		return nil // the next process goes on with them
	}
	s.reportOldLoss(ctx, old)
	s.readFrom(&s.own)
	s.mark.lost, s.mark.suppressed, s.mark.missed = [event.Kinds]uint64{}, [event.Kinds]uint64{}, 0
	s.pending = true // for the mark alone, if need be
	if err := s.flush(ctx, false); err != nil {
		return err
	}
	old.serial = s.mark.serial
	return nil
}

// readFrom has the worker read these rings from now on.
func (s *Sensor) readFrom(in *rings) {
	s.in = in
	s.mark.priority = ringMark{in.ids[0], in.priority.position()}
	s.mark.bulk = ringMark{in.ids[1], in.bulk.position()}
	s.mark.since = in.from
}

// reportOldLoss reports what the old rings had no room for since that was reported last.
func (s *Sensor) reportOldLoss(ctx context.Context, old *predecessor) {
	counters, err := readCounters(old.counters)
	if err != nil {
		logging.From(ctx).Error("read kernel loss counters", zap.Error(err))
		return
	}
	own := s.reported
	s.reported = [event.Kinds]KindCounter{}
	if m := s.taken.mark; m != nil {
		for kind := range s.reported {
			s.reported[kind].Lost, s.reported[kind].Suppressed = m.lost[kind], m.suppressed[kind]
		}
	}
	for kind, f := range old.rings.foreign {
		if f == noEvent && int(kind) < len(counters) {
			counters[kind] = s.reported[kind]
		}
	}
	s.reportLoss(ctx, event.SelfInfo{Activity: event.ActivityLost, Severity: 4, Failed: true, From: s.lastTick, To: time.Now()}, counters)
	s.reported = own
}

// dropPredecessor lets go of the old programs when everything that they saw is durable.
func (s *Sensor) dropPredecessor(ctx context.Context) {
	old := s.taken.old
	if old == nil || old.serial == 0 || s.committed.Load() < old.serial {
		return
	}
	s.taken.old = nil
	err := s.o.Keeper.Drop(old.set.names()...)
	if err = errors.Join(err, old.close()); err != nil {
		logging.From(ctx).Error("let go of replaced programs", zap.Error(err))
	}
}

/*
 * The cut is a kernel time at which one set of programs takes over from another, while both
 * see everything. Of an event both make a record, each with its own time, which differ by
 * as much as the programs run apart: microseconds, or longer when the CPU is taken away in
 * between. An event is read twice or not at all if its two times lie on different sides of
 * the cut. So the cut is put into a moment in which neither has a record, and it is tried
 * out: between it and a later such moment both must have as many records of each kind of
 * each thread.
 */
type cut struct {
	at                uint64
	agreed, disagreed uint64
	proven            bool
}

const (
	cutOverlap = 60 * time.Millisecond // in which both see, at least
	cutMargin  = 10 * time.Millisecond // from its ends, where one may lag
	cutTries   = 40
)

// witness is what is compared of a record: what it is of, and when it was seen.
type witness struct {
	key   witnessKey
	ktime uint64
}

type witnessKey struct {
	kind, pid, tid uint32
	start          uint64
	bulk           bool
}

// findCut looks for the cut until one is found, but not for ever.
func (s *Sensor) findCut(ctx context.Context) (c cut) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for try := range cutTries {
		timer.Reset(cutOverlap)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		old, errOld := witnesses(&s.taken.old.rings, s.taken.attached)
		own, errOwn := witnesses(&s.own, s.taken.attached)
		if err := errors.Join(errOld, errOwn); err != nil {
			logging.From(ctx).Error("compare rings", zap.Error(err))
		}
		c = cutBetween(old, own, s.taken.attached, bootTime(), try > cutTries/2)
		if c.proven || ctx.Err() != nil {
			return c
		}
	}
	return c
}

// bootTime is the kernel's time of now.
func bootTime() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // known to every kernel since 2.6.39
	return uint64(ts.Nano())
}

// witnesses lists the records of both rings that were not read yet and are not older than
// from.
func witnesses(in *rings, from uint64) (list []witness, err error) {
	for _, r := range [...]*ring{in.priority, in.bulk} {
		_, errScan := r.scan(func(rec []byte) {
			if _, beat := asHeartbeat(rec); beat || len(rec) < 32 || ktimeOf(rec) < from || in.foreign[kindNumber(rec)] != 0 {
				return
			}
			u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(rec[at:]) }
			key := witnessKey{kind: u32(4), start: binary.NativeEndian.Uint64(rec[16:]), pid: u32(24), tid: u32(28), bulk: r == in.bulk}
			list = append(list, witness{key, ktimeOf(rec)})
		})
		err = errors.Join(err, errScan)
	}
	return list, err
}

// cutBetween finds the cut in what two sets of programs saw between two times. What only
// one of them saw at all says nothing: their settings may differ. Lenient disregards the
// bulk ring, where they may differ for one and the same thread.
func cutBetween(old, own []witness, from, to uint64, lenient bool) (c cut) {
	margin := uint64(cutMargin)
	if to <= from+2*margin {
		margin = 0
	}
	from, to = from+margin, to-margin
	third := (to - from) / 3
	var times []uint64
	for _, w := range slices.Concat(old, own) {
		times = append(times, w.ktime)
	}
	slices.Sort(times)
	c.at = widestGap(times, from, from+2*third)
	end := widestGap(times, from+2*third, to)

	count := map[witnessKey][2]uint64{} // all there are
	within := map[witnessKey][2]uint64{}
	for i, list := range [...][]witness{old, own} {
		for _, w := range list {
			if w.key.bulk && lenient {
				continue
			}
			n := count[w.key]
			n[i]++
			count[w.key] = n
			if w.ktime >= c.at && w.ktime < end {
				n := within[w.key]
				n[i]++
				within[w.key] = n
			}
		}
	}
	for key, n := range within {
		if all := count[key]; all[0] == 0 || all[1] == 0 {
			continue
		}
		c.agreed += min(n[0], n[1])
		c.disagreed += max(n[0], n[1]) - min(n[0], n[1])
	}
	c.proven = c.disagreed == 0
	return c
}

// widestGap is the middle of the longest time between two bounds in which nothing is.
func widestGap(sorted []uint64, from, to uint64) uint64 {
	first, _ := slices.BinarySearch(sorted, from)
	end, _ := slices.BinarySearch(sorted, to)
	middle, wide, last := from, uint64(0), from
	for _, t := range append(slices.Clone(sorted[first:end]), to) {
		if t-last > wide {
			middle, wide = last+(t-last)/2, t-last
		}
		last = t
	}
	return middle
}
