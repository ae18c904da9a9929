// SPDX-License-Identifier: Apache-2.0

// Package enrich adds to a decoded event what the kernel did not say: the wall
// time, the process it is about and its ancestors, the container, the names of
// users and groups, and the hash of the executable.
//
// An Enricher belongs to the worker goroutine. It keeps copies of what it needs
// of an event; the processes it sets in an event are valid until the next one.
// Executables are read by goroutines of its own, and an event waits for them no
// longer than Options.HashWait per batch.
package enrich

import (
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// Options are the bounds of an Enricher. Zero values mean the defaults.
type Options struct {
	Host          event.Host
	TableSize     int           // processes kept, never more; 65536
	ExitGrace     time.Duration // for how long one is kept after its exit; 60 s
	HashMaxBytes  int64         // larger executables are not hashed; 64 MiB
	HashPerSecond float64       // new executables hashed a second, and at once; 200. Negative: no hashes at all
	HashWait      time.Duration // for how long hashes may delay a batch of events; 50 ms. Negative: not at all
	Scoped        bool          // only a part of the host is watched: arguments of processes outside of it are not taken from /proc
	Registerer    prometheus.Registerer
}

func (o Options) withDefaults() Options {
	if o.TableSize == 0 {
		o.TableSize = 65536
	}
	if o.ExitGrace == 0 {
		o.ExitGrace = time.Minute
	}
	if o.HashMaxBytes == 0 {
		o.HashMaxBytes = 64 << 20
	}
	if o.HashPerSecond == 0 {
		o.HashPerSecond = 200
	}
	if o.HashWait == 0 {
		o.HashWait = 50 * time.Millisecond
	}
	return o
}

// maxAncestors bounds Event.Ancestors.
const maxAncestors = 16

// Enricher knows the host's processes. It is not safe for concurrent use.
type Enricher struct {
	host    event.Host
	scoped  bool
	boot    [16]byte
	metrics *metrics
	proc    procfs
	clock   *clock
	table   *table
	users   nameFile
	groups  nameFile
	cgroups *cgroups
	strings *interner
	hashes  *hasher
	cases   cases

	sparse            atomic.Bool   // processes are not looked up
	unhashed, unfound atomic.Uint64 // because less was to be done
	ofOwn             bool          // the event is about the sensor itself

	wait   time.Duration // per batch
	left   time.Duration // of wait, in this batch
	timer  *time.Timer
	chain  [maxAncestors]*event.Process
	argv   []byte // of the last snapshot event
	quoted []byte
}

type metrics struct {
	processes         prometheus.Gauge
	evicted, released prometheus.Counter
	partial, shed     prometheus.Counter
	hashes            map[string]prometheus.Counter // by note, "" is done
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		processes: f.NewGauge(prometheus.GaugeOpts{Name: "enrich_processes", Help: "Processes in the process table, exited ones that are still kept included. If it stays at sensor.process_table, raise that."}),
		partial:   f.NewCounter(prometheus.CounterOpts{Name: "enrich_partial_processes_total", Help: "Processes met in an event without having been seen to start. If it grows after the start, execs were missed: see sensor_lost_events_total."}),
		shed:      f.NewCounter(prometheus.CounterOpts{Name: "enrich_lookups_shed_total", Help: "Processes that were not looked up in /proc because the sensor was to do less. If it grows, agent_shed_level says for how long it has done less, and LOAD_SHED on the decisions stream why."}),
		hashes:    map[string]prometheus.Counter{},
	}
	evicted := f.NewCounterVec(prometheus.CounterOpts{Name: "enrich_evicted_total", Help: "Processes dropped from the full table, by state. If it grows for running, later events of theirs lack parents and hashes: raise sensor.process_table."}, []string{"state"})
	m.evicted, m.released = evicted.WithLabelValues("running"), evicted.WithLabelValues("exited")
	hashes := f.NewCounterVec(prometheus.CounterOpts{Name: "enrich_hashes_total", Help: "Executables of execs and running processes, by whether they could be hashed in time and why not. If it grows for pending or rate, raise sensor.hash.wait or sensor.hash.per_second; for size, sensor.hash.max_size; for shed, see agent_shed_level."}, []string{"result"})
	for _, note := range [...]string{"", notePending, noteRate, noteSize, noteGone, noteChanged, noteError, noteShed} {
		label := note
		if note == "" {
			label = "ok"
		}
		m.hashes[note] = hashes.WithLabelValues(label)
	}
	return m
}

// New starts an Enricher; the caller must Close it.
func New(o Options) *Enricher { return newEnricher(o.withDefaults(), "/proc", "/etc") }

func newEnricher(o Options, proc procfs, etc string) *Enricher {
	e := &Enricher{
		host: o.Host, scoped: o.Scoped, boot: parseUUID(o.Host.BootID), metrics: newMetrics(o.Registerer), proc: proc, clock: newClock(),
		users: nameFile{path: etc + "/passwd"}, groups: nameFile{path: etc + "/group"},
		cgroups: newCgroups(), strings: newInterner(),
		hashes: newHasher(o.HashMaxBytes, o.HashPerSecond, proc),
		wait:   o.HashWait, left: o.HashWait, timer: time.NewTimer(time.Hour),
	}
	e.table = newTable(o.TableSize, o.ExitGrace, func(live bool) {
		if live {
			e.metrics.evicted.Inc()
		} else {
			e.metrics.released.Inc()
		}
	})
	e.table.cases = &e.cases
	return e
}

// Shed has the Enricher do less from now on, or again everything: read no executables,
// but for a case, and look up no processes that were not seen to start. Safe for concurrent
// use.
func (e *Enricher) Shed(hashes, lookups bool) {
	e.hashes.shed.Store(hashes)
	e.sparse.Store(lookups)
}

// Shed is how much was not done, since less was to be done.
type Shed struct{ Hashes, Lookups uint64 }

// ShedSoFar counts since New. Safe for concurrent use.
func (e *Enricher) ShedSoFar() Shed { return Shed{e.unhashed.Load(), e.unfound.Load()} }

// Close ends the hashing goroutines.
func (e *Enricher) Close() {
	e.timer.Stop()
	e.hashes.close()
}

// Prefetch starts the hashing that ev will need. It is called for every event of
// a batch before the first of them is applied, and never blocks.
func (e *Enricher) Prefetch(ev *event.Event) {
	if ev.Kind == event.Exec || ev.Kind == event.Task {
		e.hashes.request(programOf(ev))
	}
}

func programOf(ev *event.Event) program {
	x := &ev.Exec
	return program{file: x.Exe, flags: x.Flags, path: x.ExePath, pid: ev.Actor.PID, parent: x.Parent.PID}
}

// EndBatch gives the next batch its full time to wait for hashes.
func (e *Enricher) EndBatch() {
	e.left = e.wait
	e.hashes.endBatch()
	e.metrics.processes.Set(float64(e.table.len()))
}

// Apply brings the process table up to date with ev and sets what ev is about:
// Time, Subject, Parent, Creator, Ancestors, and what /proc adds to Exec. Events
// made by the sensor itself are left alone.
func (e *Enricher) Apply(ev *event.Event) {
	if ev.Kind == event.None || ev.Kind >= event.Lifecycle {
		return
	}
	ev.Time = e.clock.wall(ev.KTime)
	e.table.expire(ev.KTime)
	e.ofOwn = ev.OfSensor()
	var subject, creator *entry // who acted, where that is another one
	switch ev.Kind {
	case event.Exec, event.Task:
		subject = e.exec(ev)
	case event.Fork:
		subject, creator = e.fork(ev)
	case event.Exit:
		subject = e.exit(ev)
	case event.TCPConnect, event.TCPConnectFailed, event.TCPAccept, event.TCPListen, event.TCPClose:
		subject = e.actor(ev.Actor, ev.KTime)
		if c := ev.TCP.Closer; c != ev.Actor {
			creator = e.actor(c, ev.KTime)
			ev.Creator = process(creator)
		}
	case event.Signal, event.Ptrace:
		subject, creator = e.actor(ev.Tamper.Target, ev.KTime), e.actor(ev.Actor, ev.KTime)
		if creator != nil && creator.Comm == "" {
			creator.Comm = e.strings.string(ev.Tamper.Comm)
		}
		ev.Creator = process(creator)
	default: // changes of the file system
		subject = e.actor(ev.Actor, ev.KTime)
		e.nameOwners(&ev.File, ev.KTime)
	}
	if len(e.cases.order) > 0 {
		e.tag(ev, subject, creator)
	}
	if subject == nil {
		return
	}
	if subject.job != nil && subject.job.ended() {
		subject.SHA256, subject.HashNote, subject.job = subject.job.sum, subject.job.note, nil
	}
	ev.Subject = &subject.Process
	ev.Ancestors = e.ancestors(subject, ev.KTime)
	if len(ev.Ancestors) > 0 {
		ev.Parent = ev.Ancestors[0]
	}
}

func process(e *entry) *event.Process {
	if e == nil {
		return nil
	}
	return &e.Process
}

// actor returns the process that an event names, as it was at its time: an exec that came
// after it may have been applied, since they come through different rings. One that was not
// seen to start is entered with what /proc knows of it.
func (e *Enricher) actor(key event.ProcessKey, ktime uint64) *entry {
	if key.PID == 0 {
		return nil
	}
	if p := e.table.use(key); p != nil {
		return p.at(ktime)
	}
	e.metrics.partial.Inc()
	p, gone := e.lookUp(key)
	if p == nil {
		p = e.table.add(event.Process{Key: key, LoginUID: event.Unset, SessionID: event.Unset, Partial: true})
	}
	if gone {
		e.table.exit(p, ktime) // its exit was told long ago, or is about to be
	}
	return p
}

// lookUp enters a process with what /proc knows of it, unless it is gone or not to be looked up.
func (e *Enricher) lookUp(key event.ProcessKey) (_ *entry, gone bool) {
	if e.sparse.Load() && !e.ofOwn {
		e.metrics.shed.Inc()
		e.unfound.Add(1)
		return nil, false
	}
	p := event.Process{Key: key}
	if !e.proc.fill(&p, !e.scoped, func(pid uint32, ticks uint64) event.ProcessKey {
		if parent := e.table.find(pid, ticks); parent != nil {
			return parent.Key
		}
		return event.ProcessKey{}
	}) {
		return nil, e.proc.gone(key)
	}
	e.identify(&p)
	e.nameUsers(&p, e.table.now)
	c := e.cgroups.path(p.CgroupPath)
	p.CgroupPath, p.Container = c.path, c.container
	var job *hashJob
	p.SHA256, p.HashNote, job = e.hashes.request(program{
		file: p.File, flags: p.Flags, path: []byte(p.Path), pid: key.PID, parent: p.Parent.PID,
	})
	if job != nil {
		p.HashNote = notePending
	}
	added := e.table.add(p)
	added.job = job
	return added, false
}

func (e *Enricher) nameUsers(p *event.Process, ktime uint64) {
	p.User, p.Group = e.users.name(p.Cred.UID, ktime), e.groups.name(p.Cred.GID, ktime)
	p.Owner = e.users.name(p.File.UID, ktime)
}

func (e *Enricher) nameOwners(f *event.FileInfo, ktime uint64) {
	if f.File.Ino != 0 {
		f.Owner = e.users.name(f.File.UID, ktime)
	}
	if f.Flags&event.FileNewUID != 0 {
		f.NewOwner = e.users.name(f.NewUID, ktime)
	}
}

// Unlearn takes back what a snapshot has told of the program that a process runs, if it
// runs it since a kernel time that is before the snapshot: events of before are still to
// come, and must not be told of the program that came after them.
func (e *Enricher) Unlearn(key event.ProcessKey, since uint64) {
	p := e.table.byKey[key]
	if p == nil || p.asOf <= since {
		return
	}
	p.asOf, p.unlearned, p.Partial = 0, true, true
	p.setImage(&entry{})
}

// setImage has the process run what another one does.
func (p *entry) setImage(of *entry) {
	p.Comm, p.Path, p.CmdLine, p.CWD = of.Comm, of.Path, of.CmdLine, of.CWD
	p.File, p.Flags, p.Owner = of.File, of.Flags, of.Owner
	p.SHA256, p.HashNote, p.job = of.SHA256, of.HashNote, of.job
	p.caseAsOf = 0
}

func (e *Enricher) exec(ev *event.Event) *entry {
	x := &ev.Exec
	p := e.table.use(ev.Actor)
	if p == nil {
		p = e.table.add(event.Process{Key: ev.Actor, LoginUID: event.Unset, SessionID: event.Unset, Partial: true})
	}
	e.parent(p, x.Parent)
	if p.NSPID != x.NSPID || p.NS.PID != x.NS.PID || p.CPID == "" {
		p.NSPID, p.NS.PID = x.NSPID, x.NS.PID
		e.identify(&p.Process)
	}
	// A snapshot may know more than an exec that was in the ring before it: then
	// what is here is not what this exec replaced.
	if ev.Kind == event.Exec && p.asOf <= ev.KTime {
		x.OldPath = p.Path
		p.keep()
	}
	p.asOf = max(p.asOf, ev.KTime)
	p.Partial, p.unlearned = false, false
	p.caseAsOf = 0 // another image, perhaps another user
	p.Comm, p.TTY = e.strings.string(x.Comm), e.strings.string(x.TTY)
	p.Path, p.CWD = e.strings.string(x.ExePath), e.strings.string(x.CWD)
	p.File, p.Flags, p.Cred, p.NS = x.Exe, x.Flags, x.Cred, x.NS
	p.LoginUID, p.SessionID = x.LoginUID, x.SessionID
	p.CgroupID = x.CgroupID
	c := e.cgroups.seen(x.CgroupID, x.CgroupPath, x.Flags&event.FlagCgroupV1 != 0)
	p.CgroupPath, p.Container = c.path, c.container
	e.nameUsers(&p.Process, ev.KTime)
	if ev.Kind == event.Task && len(x.Argv) == 0 {
		e.readArgv(ev)
	}
	p.CmdLine = e.cmdLine(x.Argv)
	e.hash(p, programOf(ev))
	return p
}

// readArgv sets the arguments of a process that ran before the sensor.
func (e *Enricher) readArgv(ev *event.Event) {
	if ev.Exec.Flags&event.FlagKThread != 0 {
		return
	}
	e.argv = e.proc.cmdline(ev.Actor, e.argv[:0])
	ev.Exec.Argv = e.argv
	ev.Exec.ArgvSize = uint32(len(e.argv))
	if len(e.argv) >= argvMax {
		ev.Exec.Flags |= event.FlagArgvTruncated
	}
}

func (e *Enricher) cmdLine(argv []byte) string {
	e.quoted = appendCmdLine(e.quoted[:0], argv)
	return e.strings.string(e.quoted)
}

func cmdLine(dst, argv []byte) string { return string(appendCmdLine(dst, argv)) }

// appendCmdLine quotes no more of argv than MaxCmdLine bytes can show.
func appendCmdLine(dst, argv []byte) []byte {
	dst = event.AppendCmdLine(dst, argv[:min(len(argv), event.MaxCmdLine+1)])
	if len(dst) <= event.MaxCmdLine {
		return dst
	}
	end := event.MaxCmdLine
	for end > 0 && !utf8.RuneStart(dst[end]) {
		end--
	}
	return dst[:end]
}

// parent sets the parent that the kernel names, unless it only took over: when
// the parent has exited, its children are handed to init or a subreaper, and
// the lineage stays the true one.
func (e *Enricher) parent(p *entry, key event.ProcessKey) {
	if p.Parent == key {
		if p.parentID == 0 {
			e.table.adopt(p, key) // the parent's entry may be newer than this one
		}
		return
	}
	if old := e.table.byKey[p.Parent]; old != nil && old.Exited {
		return
	}
	if key.PID != 0 && e.table.use(key) == nil {
		if p, _ := e.lookUp(key); p != nil {
			e.metrics.partial.Inc()
		}
	}
	e.table.adopt(p, key)
}

func (e *Enricher) fork(ev *event.Event) (child, parent *entry) {
	parent = e.actor(ev.Actor, ev.KTime)
	ev.Creator = process(parent)
	f := &ev.Fork
	if child := e.table.use(f.Child); child != nil {
		if child.Parent == (event.ProcessKey{}) || child.Parent == ev.Actor && child.parentID == 0 {
			e.table.adopt(child, ev.Actor)
		}
		if child.unlearned && parent != nil {
			child.setImage(parent)
			child.unlearned, child.Partial = false, parent.Partial
		}
		return child, parent // a snapshot or a later event knows it better
	}
	var p event.Process
	if parent != nil {
		p = parent.Process
		p.Exited, p.ExitTime = false, 0
	} else {
		p.LoginUID, p.SessionID, p.Partial = event.Unset, event.Unset, true
	}
	p.Key, p.Parent, p.NSPID, p.Comm = f.Child, ev.Actor, f.NSPID, e.strings.string(f.Comm)
	if p.CgroupID != f.CgroupID { // clone3 put it into another group
		p.CgroupID = f.CgroupID
		p.CgroupPath, p.Container = "", nil
		if c := e.cgroups.ids[f.CgroupID]; c != nil {
			p.CgroupPath, p.Container = c.path, c.container
		}
	}
	p.NS.PID = f.PIDNS
	e.identify(&p)
	child = e.table.add(p)
	if parent != nil {
		child.job = parent.job
	}
	return child, parent
}

func (e *Enricher) exit(ev *event.Event) *entry {
	p := e.table.use(ev.Actor)
	if p == nil {
		if ev.Actor.PID == 0 {
			return nil
		}
		// Too late for /proc.
		e.metrics.partial.Inc()
		p = e.table.add(event.Process{
			Key: ev.Actor, Parent: ev.Exit.Parent, Comm: e.strings.string(ev.Exit.Comm),
			LoginUID: event.Unset, SessionID: event.Unset, Partial: true,
		})
	}
	if p.Parent == (event.ProcessKey{}) {
		e.table.adopt(p, ev.Exit.Parent)
	}
	e.table.exit(p, ev.KTime)
	delete(e.cases.known, p.Key)
	if p.deep != DeepOff {
		e.deepen(p)
	}
	return p
}

// ancestors returns the known ancestors as they were at a kernel time, parent first.
func (e *Enricher) ancestors(p *entry, ktime uint64) []*event.Process {
	n := 0
	for key := p.Parent; n < maxAncestors && key.PID != 0; n++ {
		a := e.table.use(key)
		if a == nil || key == p.Key {
			break
		}
		a = a.at(ktime)
		e.chain[n], key = &a.Process, a.Parent
	}
	return e.chain[:n:n]
}

// hash sets the hash of p's executable, waiting for it while there is time.
func (e *Enricher) hash(p *entry, wanted program) {
	if len(e.cases.order) > 0 {
		wanted.deep = e.covers(p)&e.cases.deep != 0
	}
	p.SHA256, p.HashNote, p.job = e.hashes.request(wanted)
	switch {
	case p.job == nil:
	case e.await(p.job):
		p.SHA256, p.HashNote, p.job = p.job.sum, p.job.note, nil
	default:
		p.HashNote = notePending
	}
	if p.SHA256 != "" || p.HashNote != "" {
		e.metrics.hashes[p.HashNote].Inc()
		if p.HashNote == noteShed {
			e.unhashed.Add(1)
		}
	}
}

// await waits for a job, as long as this batch may still wait.
func (e *Enricher) await(job *hashJob) bool {
	if job.ended() {
		return true
	}
	if e.left <= 0 {
		return false
	}
	start := time.Now()
	e.timer.Reset(e.left)
	select {
	case <-job.done:
		e.left -= time.Since(start)
		return true
	case <-e.timer.C:
		e.left = 0
		return false
	}
}
