// SPDX-License-Identifier: Apache-2.0

// Package ocsf turns events into OCSF 1.8.0 JSON by appending: no reflection,
// no intermediate values, and no allocation but for growing the destination.
// docs/events.md describes every field; it is generated from the golden files
// of this package, which are validated against the schemas of OCSF.
package ocsf

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	productName = "edr-sensor"
	vendorName  = "AuroraSOC"

	informational = `"severity_id":1,"severity":"Informational",`
	success       = `"status_id":1,"status":"Success",`
	failure       = `"status_id":2,"status":"Failure",`
)

// Encoder holds what is the same in all events of a run, serialised once. It
// is not safe for concurrent use: it keeps a scratch buffer.
type Encoder struct {
	product string // `"product":{…},` and `"tenant_uid":"…",`
	host    event.Host
	device  string // `"device":{…},`
	app     string // `"app":{…},`
	agent   event.Agent
	run     *event.Case // that the whole run belongs to; empty without one
	context string      // correlation_uid and tags of the run alone
	uid     [18]byte
	scratch []byte
	unknown event.SelfInfo
}

// New prepares an Encoder. Empty fields of the host and the agent are omitted
// from the events.
func New(h event.Host, a event.Agent) *Encoder {
	e := &Encoder{host: h, agent: a, unknown: event.SelfInfo{Name: "Unknown Record", Failed: true}}

	var w writer
	w.open(`"product":{`)
	w.raw(`"name":"` + productName + `","vendor_name":"` + vendorName + `",`)
	w.opt(`"version":`, a.Version)
	w.close('}')
	w.opt(`"tenant_uid":`, a.Tenant)
	e.product = string(w.b)

	w.b = w.b[:0]
	e.run = &event.Case{ID: a.CaseID, InvestigationID: a.InvestigationID, UserID: a.UserID}
	w.context(e.run, nil)
	e.context = string(w.b)

	e.Move(a.ID, "")
	return e
}

// Move goes on as another agent, in another epoch: for an agent that has to leave its
// identity to a copy of itself.
func (e *Encoder) Move(agentID, epoch string) {
	e.agent.ID = agentID
	var w writer
	w.device(&e.host, &e.agent)
	e.device = string(w.b)

	w.b = nil
	w.open(`"app":{`)
	w.raw(`"name":"` + productName + `","vendor_name":"` + vendorName + `",`)
	w.opt(`"uid":`, e.agent.ID)
	w.opt(`"version":`, e.agent.Version)
	w.close('}')
	e.app = string(w.b)
	e.Bind(epoch)
}

// Bind sets the epoch of the buffer, which metadata.uid depends on. Call it
// before the first Append.
//
// metadata.uid is a UUID version 8 of RFC 9562. Its first 60 bits without the
// version are those of SHA-256(agent id ‖ 0 ‖ epoch), its last 62 bits are the
// sequence number: whoever knows an event's place in the stream knows its uid,
// and a record encoded again after a crash has the same one.
func (e *Encoder) Bind(epoch string) {
	sum := sha256.Sum256([]byte(e.agent.ID + "\x00" + epoch))
	n := binary.BigEndian.Uint64(sum[:])
	b := appendHex(e.uid[:0], n>>32, 8)
	b = append(b, '-')
	b = appendHex(b, n>>16&0xffff, 4)
	b = append(b, '-', '8')
	b = appendHex(b, n>>4&0xfff, 3)
	_ = b
}

// Append appends ev as one JSON object without a newline and returns the
// extended slice. Seq is the record's sequence number in the epoch, now the
// time of encoding in nanoseconds since the Unix epoch. It keeps nothing of ev.
func (e *Encoder) Append(dst []byte, seq uint64, now int64, ev *event.Event) []byte {
	w := writer{b: dst, wall: ev.Time - int64(ev.KTime)}
	start := len(dst)
	sizeAt := e.metadata(&w, seq, now, ev)
	w.ms(`"time":`, ev.Time)
	w.raw(`"time_dt":"`)
	w.b = append(appendRFC3339(w.b, ev.Time), '"', ',')
	w.raw(`"timezone_offset":0,`)
	switch ev.Kind {
	case event.Exec:
		e.exec(&w, ev)
	case event.Fork:
		e.fork(&w, ev)
	case event.Exit:
		e.exit(&w, ev)
	case event.Task:
		e.task(&w, ev)
	case event.TCPConnect, event.TCPConnectFailed, event.TCPAccept, event.TCPListen, event.TCPClose:
		e.tcp(&w, ev)
	case event.Signal:
		e.signal(&w, ev)
	case event.Ptrace:
		e.ptrace(&w, ev)
	default:
		if isFile(ev.Kind) {
			e.file(&w, ev)
		} else {
			e.lifecycle(&w, ev, e.self(ev))
		}
	}
	w.close('}')
	w.b = w.b[:len(w.b)-1]
	if sizeAt > 0 {
		lost := max(0, int(ev.Exec.ArgvSize)-len(ev.Exec.Argv))
		var buf [20]byte
		size := strconv.AppendInt(buf[:0], int64(len(w.b)-start+lost+1023)/1024, 10)
		w.b = slices.Insert(w.b, sizeAt, size...)
	}
	return w.b
}

// metadata writes the object of that name. It returns where untruncated_size
// wants its number, which is known at the end only, or 0.
func (e *Encoder) metadata(w *writer, seq uint64, now int64, ev *event.Event) (sizeAt int) {
	w.open(`{"metadata":{"version":"1.8.0","uid":"`)
	w.b = append(append(w.b, e.uid[:]...), '-')
	variant := 1<<63 | seq&(1<<62-1)
	w.b = append(appendHex(w.b, variant>>48, 4), '-')
	w.b = append(appendHex(w.b, variant, 12), '"', ',')
	w.uint(`"sequence":`, seq)
	if isKernel(ev.Kind) {
		w.raw(`"event_code":"`)
		w.raw(ev.Kind.String())
		w.raw(`","log_name":"events","log_provider":"ebpf",`)
	} else {
		w.raw(`"event_code":"sensor.`)
		w.b = appendCode(w.b, activityName(e.self(ev)))
		w.raw(`","log_name":"decisions:` + e.self(ev).Stream.String() + `","log_provider":"agent",`)
	}
	w.opt(`"log_source":`, ev.Hook)
	w.ms(`"logged_time":`, now)
	w.raw(e.product)
	switch s := e.self(ev); {
	case len(ev.Cases) > 0:
		w.context(e.run, ev.Cases)
	case s.CaseID != "" || s.InvestigationID != "" || s.UserID != "":
		w.context(&event.Case{ID: or(s.CaseID, e.run.ID), InvestigationID: or(s.InvestigationID, e.run.InvestigationID), UserID: or(s.UserID, e.run.UserID)}, nil)
	default:
		w.raw(e.context)
	}
	w.profiles(ev)
	sizeAt = w.truncation(ev)
	w.close('}')
	return sizeAt
}

func isKernel(k event.Kind) bool  { return k > event.None && k < event.Lifecycle }
func isProcess(k event.Kind) bool { return k >= event.Exec && k <= event.Task || isTamper(k) }
func isTamper(k event.Kind) bool  { return k == event.Signal || k == event.Ptrace }

// context writes for which investigations and cases the event was produced: those
// of the run, then those of the open cases. correlation_uid can name only one: the
// first.
func (w *writer) context(run *event.Case, open []*event.Case) {
	first := run.InvestigationID
	for _, c := range open {
		first = or(first, c.InvestigationID)
	}
	w.opt(`"correlation_uid":`, first)
	at := w.begin(`"tags":[`)
	w.caseTags(run)
	for _, c := range open {
		w.caseTags(c)
	}
	w.end(at, ']')
}

func (w *writer) caseTags(c *event.Case) {
	w.tag("case_id", c.ID)
	w.tag("investigation_id", c.InvestigationID)
	w.tag("user_id", c.UserID)
}

func (w *writer) tag(name, value string) {
	if value != "" {
		w.open(`{`)
		w.str(`"name":`, name)
		w.str(`"value":`, value)
		w.close('}')
	}
}

// profiles lists the profiles whose attributes the event uses, which is what
// lets a schema accept them.
func (w *writer) profiles(ev *event.Event) {
	w.raw(`"profiles":["host","datetime"`)
	if contained(ev.Subject) || (isProcess(ev.Kind) && !isTamper(ev.Kind) && contained(ev.Parent)) {
		w.raw(`,"container"`)
	}
	if described(ev.Subject) && isKernel(ev.Kind) && ev.Kind != event.Fork {
		w.raw(`,"linux/linux_users"`)
	}
	w.raw(`],`)
}

func contained(p *event.Process) bool { return p != nil && p.Container != nil && p.Container.ID != "" }

// truncation says what was cut of the process, or of the paths, that the event is about.
func (w *writer) truncation(ev *event.Event) (sizeAt int) {
	const cuts = event.FlagArgvTruncated | event.FlagExeTruncated | event.FlagCWDTruncated | event.FlagCgroupTruncated
	var flags event.ProcessFlags
	path := `"process.`
	switch ev.Kind {
	case event.Exec, event.Task:
		flags = ev.Exec.Flags
	case event.Fork, event.Lifecycle, event.None:
		return 0
	default:
		if ev.Subject != nil {
			flags = ev.Subject.Flags &^ (event.FlagArgvTruncated | event.FlagArgvFault)
		}
		if !isProcess(ev.Kind) {
			path = `"actor.process.`
		}
	}
	part := cmdLineCut(ev)
	upper := cutPaths(ev)
	if flags&(cuts|event.FlagArgvFault) == 0 && !part && upper == [2]string{} {
		return 0
	}
	if flags&cuts != 0 || part || upper != [2]string{} {
		w.raw(`"is_truncated":true,`)
	}
	if flags&event.FlagArgvTruncated != 0 {
		w.raw(`"untruncated_size":`)
		sizeAt = len(w.b)
		w.raw(`,`)
	}
	w.open(`"debug":[`)
	if flags&event.FlagArgvTruncated != 0 {
		w.raw(path)
		w.raw(`cmd_line: argv cut `)
		w.b = strconv.AppendUint(w.b, uint64(ev.Exec.ArgvSize), 10)
		w.raw(`->`)
		w.b = strconv.AppendInt(w.b, int64(len(ev.Exec.Argv)), 10)
		w.raw(` bytes",`)
	}
	for _, c := range [...]struct {
		flag event.ProcessFlags
		text string
	}{
		{event.FlagArgvFault, `cmd_line: part of argv was not readable, empty arguments stand there",`},
		{event.FlagExeTruncated, `path: cut, its upper folders are missing",`},
		{event.FlagCWDTruncated, `working_directory: cut, its upper folders are missing",`},
		{event.FlagCgroupTruncated, `xattributes.cgroup.path: cut, its upper folders are missing",`},
	} {
		if flags&c.flag != 0 {
			w.raw(path)
			w.raw(c.text)
		}
	}
	if part {
		w.raw(path)
		w.raw(`cmd_line: cut at 4096 bytes, complete in process.exec",`)
	}
	for _, attribute := range upper {
		if attribute != "" {
			w.raw(attribute)
			w.raw(`: cut, its upper folders are missing",`)
		}
	}
	w.close(']')
	return sizeAt
}

// cmdLineCut tells whether the event carries only the part of the command line
// that the process table keeps.
func cmdLineCut(ev *event.Event) bool {
	p := ev.Subject
	return p != nil && len(argv(ev)) == 0 && len(p.CmdLine) > event.MaxCmdLine-utf8.UTFMax
}

func (w *writer) device(h *event.Host, a *event.Agent) {
	w.open(`"device":{`)
	w.opt(`"uid":`, h.MachineID)
	w.opt(`"hostname":`, h.Hostname)
	w.str(`"name":`, or(before(h.Hostname, "."), "unknown"))
	w.raw(`"type_id":0,"type":"Unknown",`)
	if ip, err := netip.ParseAddr(h.IP); err == nil {
		w.str(`"ip":`, ip.Unmap().WithZone("").String())
	}
	if id := h.MachineID; len(id) == 32 && strings.Trim(id, hexDigits) == "" {
		w.str(`"os_machine_uuid":`, strings.Join([]string{id[:8], id[8:12], id[12:16], id[16:20], id[20:]}, "-"))
	}
	w.opt(`"boot_uid":`, h.BootID)
	if !h.BootTime.IsZero() {
		w.int(`"boot_time":`, h.BootTime.UnixMilli())
	}
	w.open(`"os":{`)
	w.str(`"name":`, or(h.OSName, "Linux"))
	w.opt(`"version":`, h.OSVersion)
	w.raw(`"type_id":200,"type":"Linux",`)
	w.opt(`"kernel_release":`, h.KernelRelease)
	if h.CPUBits > 0 {
		w.int(`"cpu_bits":`, int64(h.CPUBits))
	}
	w.close('}')
	w.open(`"agent_list":[{`)
	w.opt(`"uid":`, a.ID)
	w.raw(`"name":"` + productName + `","type_id":1,"type":"Endpoint Detection and Response","vendor_name":"` + vendorName + `",`)
	w.opt(`"version":`, a.Version)
	w.close('}')
	w.close(']')
	w.close('}')
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func before(s, sep string) string {
	s, _, _ = strings.Cut(s, sep)
	return s
}
