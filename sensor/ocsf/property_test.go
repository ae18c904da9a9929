// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/sensor/ocsf/ocsftest"
)

// random makes events of any content: only CPID keeps its form, which the
// process table guarantees.
type random struct{ *rand.Rand }

func (r random) maybe() bool { return r.IntN(2) == 0 }

func (r random) string() string {
	alphabet := []string{"a", "/", "usr", "\x00", "\xff", "\xc3", "é", "\u202e", "\"", "\\", "\n", "\x1b", "\x7f", "💥", "\xed\xa0\x80", "<script>", "0123456789abcdef", ",", "}"}
	var b strings.Builder
	for range r.IntN(12) {
		b.WriteString(alphabet[r.IntN(len(alphabet))])
	}
	return b.String()
}

func (r random) bytes() []byte { return []byte(r.string()) }

func (r random) uint32() uint32 {
	return []uint32{0, 1, 33, 1000, 65534, event.Unset, r.Uint32()}[r.IntN(7)]
}

func (r random) uint64() uint64 {
	return []uint64{0, 1, 1 << 53, 1<<64 - 1, r.Uint64()}[r.IntN(5)]
}

func (r random) key() event.ProcessKey {
	return event.ProcessKey{PID: r.uint32(), StartTime: r.uint64()}
}

func (r random) cred() event.Cred {
	return event.Cred{
		UID: r.uint32(), GID: r.uint32(), EUID: r.uint32(), EGID: r.uint32(), SUID: r.uint32(), SGID: r.uint32(), FSUID: r.uint32(), FSGID: r.uint32(),
		CapPermitted: r.uint64(), CapEffective: r.uint64(), CapInheritable: r.uint64(), CapBounding: r.uint64(), CapAmbient: r.uint64(),
		Securebits: r.uint32(), SeccompMode: r.uint32(),
	}
}

func (r random) process() *event.Process {
	if r.IntN(5) == 0 {
		return nil
	}
	p := &event.Process{Key: r.key()}
	if r.maybe() {
		p.CPID = fmt.Sprintf("%08x-0000-8000-8000-%012x", r.Uint32(), r.Uint32())
	}
	if r.maybe() {
		p.NSPID, p.Comm, p.Path, p.CmdLine, p.CWD, p.TTY = r.uint32(), r.string(), r.string(), r.string(), r.string(), r.string()
		p.User, p.Group, p.Owner, p.SHA256, p.HashNote = r.string(), r.string(), r.string(), r.string(), r.string()
		p.CgroupPath, p.CgroupID, p.LoginUID, p.SessionID = r.string(), r.uint64(), r.uint32(), r.uint32()
		p.File = event.File{Ino: r.uint64(), Size: r.uint64(), MTime: int64(r.uint64()), CTime: int64(r.uint64()), DevMajor: r.uint32(), Mode: r.uint32(), FSMagic: r.uint32()}
		p.Cred, p.Flags, p.Partial = r.cred(), event.ProcessFlags(r.Uint32()), r.maybe()
		p.NS = event.Namespaces{Mnt: r.uint32(), PID: r.uint32()}
	}
	if r.maybe() {
		p.Container = &event.Container{ID: r.string(), Runtime: r.string(), Orchestrator: r.string(), PodUUID: []string{"", r.string(), "0b6d2f2e-6d65-4f2b-9f0e-3a9f5f3c1c11"}[r.IntN(3)]}
	}
	if r.IntN(10) == 0 {
		p.CmdLine = strings.Repeat("é", event.MaxCmdLine/2)
	}
	return p
}

func (r random) address() netip.AddrPort {
	var b [16]byte
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return []netip.AddrPort{
		{},
		netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), uint16(r.Uint32())),
		netip.AddrPortFrom(netip.AddrFrom16(b), uint16(r.Uint32())),
		netip.AddrPortFrom(netip.AddrFrom16(netip.AddrFrom4([4]byte(b[:4])).As16()), 0),
		netip.AddrPortFrom(netip.IPv6Unspecified(), 1),
		netip.AddrPortFrom(netip.MustParseAddr("fe80::1%eth0"), 65535),
	}[r.IntN(6)]
}

func (r random) event() event.Event {
	ev := event.Event{
		Kind: event.Kind(r.IntN(event.Kinds + 1)), KTime: r.uint64(), Time: int64(r.uint64()), Actor: r.key(), TID: r.uint32(), Hook: r.string(),
		Subject: r.process(), Parent: r.process(), Creator: r.process(),
	}
	for range r.IntN(20) {
		if p := r.process(); p != nil {
			ev.Ancestors = append(ev.Ancestors, p)
		}
	}
	if r.maybe() {
		ev.Cases = []*event.Case{{ID: r.string(), InvestigationID: r.string()}, {ID: r.string(), UserID: r.string()}}
	}
	ev.Exec = event.ExecInfo{
		Parent: r.key(), Flags: event.ProcessFlags(r.Uint32()), ArgvSize: r.uint32(),
		Filename: r.bytes(), Interp: r.bytes(), Argv: r.bytes(), OldPath: r.string(),
	}
	if r.IntN(20) == 0 {
		ev.Exec.Argv = bytes.Repeat([]byte(r.string()+"\x00"), r.IntN(20000))
	}
	ev.Fork = event.ForkInfo{Child: r.key(), NSPID: r.uint32()}
	ev.Exit = event.ExitInfo{Parent: r.key(), UTime: r.uint64(), STime: r.uint64(), Code: int32(r.Uint32()), Signal: uint32(r.IntN(70)), CoreDumped: r.maybe()}
	ev.TCP = event.TCPInfo{
		ConnID: r.uint64(), Opened: r.uint64(), BytesSent: r.uint64(), BytesReceived: r.uint64(), SegsOut: r.uint32(), SegsIn: r.uint32(),
		Flags: event.TCPFlags(r.IntN(16)), Errno: []int32{0, 104, 110, 111, 113, -1, int32(r.Uint32())}[r.IntN(7)], Local: r.address(), Remote: r.address(), Closer: r.key(),
	}
	ev.File = event.FileInfo{
		File: event.File{Ino: r.uint64(), Size: r.uint64(), MTime: int64(r.uint64()), CTime: int64(r.uint64()), Mode: r.Uint32() & 0o177777, Nlink: r.uint32(), UID: r.uint32(), FSMagic: r.uint32()},
		Path: r.bytes(), Path2: r.bytes(), Name: r.bytes(), Flags: event.FileFlags(r.Uint32()), OpenFlags: r.uint32(), MntNS: r.uint32(), CgroupID: r.uint64(),
		TargetIno: r.uint64(), NewMode: r.uint32(), NewUID: r.uint32(), NewGID: r.uint32(), NewSize: r.uint64(), NewATime: int64(r.uint64()), NewMTime: int64(r.uint64()),
		Written: r.uint64(), Suppressed: r.uint32(), Owner: r.string(), NewOwner: r.string(),
	}
	ev.Severity = uint8(r.IntN(256))
	ev.Tamper = event.TamperInfo{
		Target: r.key(), TID: r.uint32(), Signal: int32(r.Uint32()), Code: int32(r.Uint32()), Result: uint32(r.IntN(5)), Mode: r.uint32(), Request: r.uint32(),
		Call: event.TamperCall(r.IntN(5)), Flags: event.TamperFlags(r.IntN(4)),
	}
	if r.IntN(4) > 0 {
		ev.Self = &event.SelfInfo{
			Activity: event.Activity(r.IntN(9)), Name: r.string(), Severity: uint8(r.IntN(256)), Failed: r.maybe(), Code: r.string(), Message: r.string(),
			Count: r.uint64(), ByKind: map[string]uint64{r.string(): r.uint64()}, Losses: []event.Loss{{Cause: r.string(), First: r.uint64()}},
			Before: r.string(), After: r.string(),
			Attrs: map[string]any{r.string(): r.string(), "f": func() {}, "before": 1, "n": []int{1}, "s": struct{ A string }{r.string()}},
		}
		if r.maybe() {
			ev.Self.From, ev.Self.To = time.Unix(int64(r.Uint32()), 0), time.Unix(int64(r.Uint32()), 0)
		}
	}
	return ev
}

func (r random) encoder() *Encoder {
	h, a := event.Host{}, event.Agent{}
	if r.maybe() {
		h = event.Host{
			Hostname: r.string(), MachineID: []string{"", r.string(), strings.Repeat("0", 32), strings.Repeat("Z", 32)}[r.IntN(4)], BootID: r.string(), OSName: r.string(), OSVersion: r.string(),
			KernelRelease: r.string(), IP: []string{"", "10.0.0.1", "fe80::1%eth0", "::ffff:1.2.3.4", "no"}[r.IntN(5)], CPUBits: r.IntN(65),
		}
		a = event.Agent{ID: r.string(), Version: r.string(), Tenant: r.string(), CaseID: r.string(), InvestigationID: r.string(), UserID: r.string()}
	}
	return New(h, a)
}

// checkEvent is what must hold for every event.
func checkEvent(t *testing.T, validate func([]byte) error, r random) {
	t.Helper()
	e, ev := r.encoder(), r.event()
	got := e.Append(nil, r.Uint64N(1<<53), int64(r.uint64()), &ev)
	if !utf8.Valid(got) {
		t.Fatalf("not UTF-8: %q", got)
	}
	if i := bytes.IndexFunc(got, func(c rune) bool { return c < ' ' }); i >= 0 {
		t.Fatalf("control character at %d: %q", i, got)
	}
	if err := validate(got); err != nil {
		t.Fatalf("%v\n%s", err, got)
	}
}

func TestRandomEventsAreValid(t *testing.T) {
	validate := ocsftest.Validator(t)
	n := 2000
	if testing.Short() {
		n = 300
	}
	for seed := range uint64(n) {
		checkEvent(t, validate, random{rand.New(rand.NewPCG(seed, 1))})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func FuzzEncode(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed, seed)
	}
	validate := ocsftest.Validator(f)
	f.Fuzz(func(t *testing.T, a, b uint64) {
		checkEvent(t, validate, random{rand.New(rand.NewPCG(a, b))})
	})
}

func FuzzQuoted(f *testing.F) {
	for _, s := range []string{"", "plain", "12345678", "1234567\"", "\\", "a\x00b", "\xff\xfe", "é\xc3", "\xed\xa0\x80", "\u2028", "0123456789abcdef\x1f", "\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := appendQuoted(nil, s)
		var back string
		if err := json.Unmarshal(got, &back); err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		if want := string([]rune(s)); back != want {
			t.Fatalf("%q reads back as %q, want %q", s, back, want)
		}
		if diff := cmp.Diff(string(got), string(appendQuoted(nil, []byte(s)))); diff != "" {
			t.Fatalf("string and bytes differ: %s", diff)
		}
		var w writer
		base64IfInvalid(&w, `"k":`, s)
		if utf8.ValidString(s) {
			if len(w.b) > 0 {
				t.Fatalf("valid %q kept twice", s)
			}
			return
		}
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(strings.TrimPrefix(string(w.b), `"k":"`), `",`))
		if err != nil || string(raw) != s {
			t.Fatalf("%q kept as %q: %v", s, w.b, err)
		}
	})
}

// TestMutationsAreRejected is the proof that the validator sees: each change
// makes a valid event wrong.
func TestMutationsAreRejected(t *testing.T) {
	validate := ocsftest.Validator(t)
	e := newTestEncoder()
	encoded := map[string][]byte{}
	for _, g := range goldens() {
		encoded[g.name] = e.Append(nil, testSeq, testNow, &g.ev)
	}
	for _, m := range []struct{ in, name, old, new string }{
		{"process.exec", "profile missing", `,"container"`, ``},
		{"process.exec", "extension profile missing", `,"linux/linux_users"`, ``},
		{"net.connect", "host profile missing", `"host",`, ``},
		{"process.exec", "datetime profile missing", `"datetime",`, ``},
		{"process.exec", "type_uid of another activity", `"type_uid":100701`, `"type_uid":100702`},
		{"process.exec", "class of another event", `"class_uid":1007`, `"class_uid":4001`},
		{"process.exec", "unknown attribute", `"pid":2310`, `"pid":2310,"tgid":2310`},
		{"process.exec", "null", `"pid":2310`, `"pid":null`},
		{"process.exec", "number as string", `"pid":2310`, `"pid":"2310"`},
		{"process.exec", "identifier as number", `"user":{"uid":"33"`, `"user":{"uid":33`},
		{"process.exec", "file without name", `"file":{"name":"dash",`, `"file":{`},
		{"process.exec", "no actor", `"actor":{`, `"unmapped":{`},
		{"process.exec", "caption of another id", `"severity":"Informational"`, `"severity":"High"`},
		{"process.exec", "caption of another launch type", `"launch_type":"Exec"`, `"launch_type":"Spawn"`},
		{"process.exec", "activity's name", `"activity_name":"Launch"`, `"activity_name":"Open"`},
		{"process.exec", "version", `"version":"1.8.0"`, `"version":"1.7.0"`},
		{"process.exec", "time_dt of another time", `00.123456789Z`, `00.124456789Z`},
		{"process.exec", "time_dt without form", `"time_dt":"2026-11-23T15`, `"time_dt":"2026-11-23 15`},
		{"process.exec", "cpid is no UUID", `"cpid":"4787daf7-`, `"cpid":"4787daf7`},
		{"process.exec", "name twice", `"pid":2310,`, `"pid":2310,"pid":2310,`},
		{"process.exec", "cut off", `}}}`, ``},
		{"net.connect", "port", `"port":80`, `"port":65536`},
		{"net.connect", "address", `"ip":"198.51.100.23"`, `"ip":"198.51.100.x"`},
		{"net.connect", "no endpoint", `_endpoint":`, `_end":`},
		{"net.close", "direction's caption", `"direction":"Outbound"`, `"direction":"Inbound"`},
		{"file.rename", "no actor", `"actor":{`, `"unmapped":{`},
		{"file.rename", "no file", `"file":{"name":".x",`, `"unmapped":{"name":".x",`},
		{"file.rename", "result without a name", `"file_result":{"name":"php-sess",`, `"file_result":{`},
		{"file.rename", "type of the result", `"type_id":1,"type":"Regular File"`, `"type_id":2,"type":"Regular File"`},
		{"file.rename", "owner as number", `"owner":{"uid":"33"`, `"owner":{"uid":33`},
		{"file.write", "activity's name", `"activity_name":"Update"`, `"activity_name":"Write"`},
		{"file.write", "mask as text", `"access_mask":1025`, `"access_mask":"O_WRONLY"`},
		{"file.mount", "volume as number", `"volume":"/dev/loop0"`, `"volume":7`},
		{"sensor.start", "no app", `"app":{`, `"actor":{`},
		{"process.snapshot", "no result", `"query_result_id":1,`, ``},
	} {
		event := encoded[m.in]
		if err := validate(event); err != nil {
			t.Fatalf("%s: %v", m.in, err)
		}
		changed := bytes.ReplaceAll(event, []byte(m.old), []byte(m.new))
		if bytes.Equal(changed, event) {
			t.Errorf("%s, %s: nothing to change", m.in, m.name)
		} else if validate(changed) == nil {
			t.Errorf("%s, %s: accepted", m.in, m.name)
		}
	}
}

// TestProfilesExact fails when an event lists a profile that it does not use;
// the schemas see only the opposite.
func TestProfilesExact(t *testing.T) {
	e := newTestEncoder()
	uses := map[string][]string{
		"host": {`"device":`, `"actor":`}, "datetime": {`"time_dt":`},
		"container": {`"container":{`, `"namespace_pid":`}, "linux/linux_users": {`"euid":`, `"egid":`, `"auid":`, `"group":`},
	}
	for _, g := range goldens() {
		got := string(e.Append(nil, testSeq, testNow, &g.ev))
		var doc struct{ Metadata struct{ Profiles []string } }
		if err := json.Unmarshal([]byte(got), &doc); err != nil {
			t.Fatal(err)
		}
		for _, p := range slices.Sorted(maps.Keys(uses)) {
			used := slices.ContainsFunc(uses[p], func(s string) bool { return strings.Contains(got, s) })
			if p == "container" && g.name == "process.exec-unusual" {
				used = false // namespace_pid stands in xattributes there
			}
			if listed := slices.Contains(doc.Metadata.Profiles, p); listed != used {
				t.Errorf("%s: profile %s listed %v, used %v", g.name, p, listed, used)
			}
		}
	}
}
