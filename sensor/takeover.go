// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"context"
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

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

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
	if s.taken.how == howReplaced && m != nil { // the mark stays theirs until they are read
		s.mark.serial, s.mark.lost, s.mark.suppressed, s.mark.missed = m.serial, m.lost, m.suppressed, m.missed
		s.committed.Store(m.serial) // which is durable: ours have to be above it
	}
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
// is durable. Until then this process may end at any moment, and whoever comes next goes on
// with the old rings and a cut of its own: no durable mark is beyond a record that was left
// out here because it comes after the cut. So the rings are first read to where the first of
// those is. Behind it is, rarely, one that overtook others on its way; those are read last,
// and become durable with the mark that names the own rings.
func (s *Sensor) readPredecessor(stop, ctx context.Context) error {
	old := s.taken.old
	if old == nil {
		return nil
	}
	all := [...]uint64{old.rings.priority.producer(), old.rings.bulk.producer()}
	if err := old.rings.endBeforeCut(); err != nil {
		return err
	}
	for stop.Err() == nil && !old.rings.reached(old.rings.ends) {
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
	old.rings.ended = false
	if stop.Err() != nil {
		old.rings.until = 0 // the next process goes on with them: to this one there is no cut
		return nil
	}
	for !old.rings.reached(all) {
		n, err := s.poll(ctx)
		if err != nil {
			return err
		}
		if n == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pollMin):
			}
		}
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
	lost := event.SelfInfo{Activity: event.ActivityLost, Severity: 4, Failed: true, From: s.lastTick, To: time.Now()}
	s.reportLoss(ctx, lost, counters)
	s.reported = own
	missed, err := old.set.missed()
	if err != nil {
		logging.From(ctx).Error("read statistics of replaced programs", zap.Error(err))
	}
	if missed > s.mark.missed {
		s.tellMissed(ctx, lost, missed-s.mark.missed)
	}
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
