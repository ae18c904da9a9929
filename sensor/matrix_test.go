// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// way is how the same is done.
type way string

const (
	plainly  way = "system calls"
	byRing   way = "io_uring"
	byPolled way = "io_uring, polled"
	by32     way = "32-bit"
)

func ways() []way { return []way{plainly, byRing, byPolled, by32} }

func (w way) ring() bool { return w == byRing || w == byPolled }

// ring returns the actor's ring for a way.
func (c *company) ring(how way) (*uring, error) {
	if u := c.rings[how]; u != nil {
		return u, nil
	}
	u, err := newUring(how == byPolled)
	if err != nil {
		return nil, err
	}
	if c.rings == nil {
		c.rings = map[way]*uring{}
	}
	c.rings[how] = u
	return u, nil
}

// change is change of files_test.go in the way asked for.
func (c *company) change(r request) (reply, error) {
	switch r.How {
	case "", plainly:
		return reply{}, change(r.Args)
	case by32:
		return run32(r.Path, r.Args...)
	}
	u, err := c.ring(r.How)
	if err != nil {
		return reply{}, err
	}
	switch err := u.change(r.Args); {
	case errors.Is(err, errMissing):
		return reply{Missing: r.Args[:1]}, nil
	case err != nil:
		return reply{}, err
	}
	// The thread that polls lets a file go after it has said so, and before it does more.
	_, err = u.do(sqe{Opcode: opNop})
	return reply{}, err
}

// talk connects to a listener of its own and to nobody.
func (c *company) talk(r request) (reply, error) {
	switch r.How {
	case plainly:
		if _, err := net.Dial("tcp4", "127.0.0.1:1"); !errors.Is(err, unix.ECONNREFUSED) {
			return reply{}, err
		}
		return converse(request{Network: "tcp4"})
	case by32:
		if answer, err := run32(r.Path, "refused", "1"); err != nil {
			return answer, err
		}
		return run32(r.Path, "converse", "1")
	}
	u, err := c.ring(r.How)
	if err != nil {
		return reply{}, err
	}
	if err := u.refused(); err != nil {
		return reply{}, err
	}
	answer, listened, err := u.converse()
	if !listened {
		answer.Missing = []string{event.TCPListen.String()}
	}
	return answer, err
}

// run32 has the 32-bit program do something.
func run32(path string, args ...string) (reply, error) {
	answer, err := run(request{Path: path, Args: args})
	switch said := strings.TrimSpace(answer.Output); {
	case err != nil:
	case said == errMissing.Error():
		answer.Missing = args[:1]
	case said != "":
		err = errors.New(said)
	}
	return answer, err
}

// program32 is testdata/actor32, built for the 32-bit processor that is in this one.
func program32(t testing.TB) string {
	t.Helper()
	path, err := filepath.Abs("testdata/actor32/actor32") // who boots a kernel puts it there
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		return real(t, path)
	}
	path = filepath.Join(real(t, t.TempDir()), "actor32")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "./testdata/actor32")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+map[string]string{"amd64": "386", "arm64": "arm"}[runtime.GOARCH])
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the 32-bit program: %v\n%s", err, out)
	}
	return path
}

// matrix is which events were seen, done in which ways, under one form of the programs.
type matrix struct {
	form     string
	degraded bool
	path32   string
	victim   *actor                      // in place of the sensor
	tried    map[event.Kind]map[way]bool // and whether seen
	refused  map[way]bool

	impossible map[event.Kind]bool // on this file system
}

func (m *matrix) request(op string, how way, args ...string) request {
	return request{Op: op, How: how, Args: args, Path: m.path32}
}

// sees says in which ways file events of a form are seen by design: system calls tell nothing
// of what io_uring does.
func (m *matrix) sees(how way) bool { return !m.degraded || !how.ring() }

func (m *matrix) done(kind event.Kind, how way) {
	if m.tried[kind] == nil {
		m.tried[kind] = map[way]bool{}
	}
	if !m.tried[kind][how] {
		m.tried[kind][how] = false // and no longer missing
	}
}

func (m *matrix) saw(kind event.Kind, how way) {
	m.done(kind, how)
	m.tried[kind][how] = true
}

// cell is what is to be said of an event done in one way.
func (m *matrix) cell(kind event.Kind, how way) string {
	seen, tried := m.tried[kind][how]
	switch {
	case m.refused[how]:
		return "refused"
	case !tried:
		return "-" // there is no such operation
	case seen:
		return "yes"
	default:
		return "no"
	}
}

// systemCallsOnly tells that no program on a better hook sees files.
func (k *kernel) systemCallsOnly() bool {
	return strings.HasPrefix(k.find(event.FileCreate).section, "raw_tp")
}

// TestRootEveryWay does everything that makes an event, in every way there is, under each
// form of the programs that this kernel takes: none may be found to be broken on the one
// host that needs it. What is done in one way and not seen has to be so by design, and an
// event that a form does not see at all has to be missing in the coverage.
func TestRootEveryWay(t *testing.T) {
	path32 := program32(t)
	for _, form := range []string{"lsm", "fentry", "kprobe", "raw"} {
		t.Run(form, func(t *testing.T) {
			a := startActor(t)
			k := watchFiles(t, a, FileOptions{}, form)
			available := false
			for _, c := range k.coverage() {
				if blind := strings.HasPrefix(c.Hook, "raw_tp/sys"); blind != (c.Blind == "io_uring") {
					t.Errorf("%s by %s is said to be blind to %q", c.Event, c.Hook, c.Blind)
				}
				if c.Kind >= event.FileCreate {
					available = available || strings.HasPrefix(c.Hook, form)
					if len(c.Errs) > 0 {
						t.Logf("%s by %q after %q", c.Event, c.Hook, c.Errs)
					}
				}
			}
			switch {
			case available:
			case form == "raw":
				t.Fatal("no kernel refuses these")
			default:
				t.Skipf("this kernel refuses %s for files", form)
			}
			priority, bulk := newTap(t, k.priority), newTap(t, k.bulk)
			victim := startVictim(t) // outside of the scope
			if err := k.beSensor(victim.pid); err != nil {
				t.Fatal(err)
			}
			m := &matrix{form: form, victim: victim, degraded: k.systemCallsOnly(), path32: path32, tried: map[event.Kind]map[way]bool{}, refused: map[way]bool{}, impossible: map[event.Kind]bool{}}
			for _, how := range ways() {
				t.Run(string(how), func(t *testing.T) {
					if how == by32 {
						if answer, err := run32(path32, "open", os.DevNull); err != nil {
							m.refused[how] = true
							t.Skipf("this kernel refuses 32-bit programs: %v %s", err, answer.Output)
						}
					} else if how.ring() {
						if answer := a.do(m.request("ring", how)); answer.Err != "" {
							m.refused[how] = true
							t.Skipf("this kernel refuses io_uring: %s", answer.Err)
						}
					}
					t.Run("process", func(t *testing.T) { m.process(t, a, priority, how) })
					t.Run("tamper", func(t *testing.T) { m.tamper(t, a, priority, how) })
					t.Run("tcp", func(t *testing.T) { m.tcp(t, a, bulk, how) })
					changes(t, a, bulk, k, m, how)
				})
			}
			m.report(t, k)
			t.Run("exercise", func(t *testing.T) { tryHooks(t, k, bulk, false) })
			if form == "kprobe" {
				t.Run("kprobes off", func(t *testing.T) { kprobesOff(t, k) })
			}
		})
	}
}

// process runs a program in a way, which is what the program is.
func (m *matrix) process(t *testing.T, a *actor, priority *tap, how way) {
	priority.rest() // programs that other tests ran
	path := "/bin/true"
	if how == by32 {
		path = m.path32
	} else if how.ring() {
		return // has no such operation
	}
	pid := a.must(request{Op: "run", Path: path, Args: []string{"open", os.DevNull}}).PID
	records := priority.until("exit", exited(pid))
	e := one(t, records, event.Exec, pid).exec
	if want := argv(path, "open", os.DevNull); e.filename != path || string(e.argv) != string(want) {
		t.Errorf("exec of %q with %q, want %q", e.filename, e.argv, want)
	}
	if f := one(t, records, event.Fork, a.pid).fork; int(f.ChildPid) != pid {
		t.Errorf("fork of %d, want %d", f.ChildPid, pid)
	}
	for _, kind := range kinds(event.Exec, event.Fork, event.Exit) {
		m.saw(kind, how)
	}
}

// tcp connects, to a listener and to nobody.
func (m *matrix) tcp(t *testing.T, a *actor, bulk *tap, how way) {
	bulk.rest()
	talk := a.must(m.request("talk", how))
	missing := slices.Contains(talk.Missing, event.TCPListen.String())
	records := bulk.until("both closes", closes(2))
	var pids []int
	seen := map[event.Kind]int{}
	for _, r := range records {
		if r.tcp == nil {
			continue // opened by the program that connects
		}
		kind := kindOf(r.SensorEventHeader)
		seen[kind]++
		pids = append(pids, int(r.Pid))
		if kind != event.TCPListen || !missing {
			m.saw(kind, how)
		}
	}
	for kind, want := range map[event.Kind]int{event.TCPListen: 1, event.TCPConnect: 1, event.TCPConnectFailed: 1, event.TCPAccept: 1, event.TCPClose: 2} {
		m.done(kind, how)
		if seen[kind] != want {
			t.Errorf("%d records of %s, want %d", seen[kind], kind, want)
		}
	}
	if missing {
		delete(m.tried[event.TCPListen], how)
	}
	for i, pid := range pids {
		if want := talk.PID; want == 0 && pid != a.pid || want != 0 && pid != want && i > 0 {
			t.Errorf("record %d is of process %d, want %d or %d", i, pid, a.pid, want)
		}
	}
}

// report says what was seen, and holds it against what the coverage says.
func (m *matrix) report(t *testing.T, k *kernel) {
	for _, c := range k.coverage() {
		plain := m.cell(c.Kind, plainly)
		switch {
		case c.Kind == event.Task: // the snapshot is its own test
		case c.Hook == "" && plain == "yes":
			t.Errorf("%s is seen, and the coverage says that it is missing", c.Event)
		case plain == "-" && m.impossible[c.Kind]:
		case c.Hook != "" && plain != "yes":
			t.Errorf("%s by %s: seen %s", c.Event, c.Hook, plain)
		}
		line, err := json.Marshal(map[string]string{
			"form": m.form, "event": c.Event, "hook": c.Hook,
			"plain": plain, "ring": m.cell(c.Kind, byRing), "polled": m.cell(c.Kind, byPolled), "compat": m.cell(c.Kind, by32),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("coverage: %s", line)
	}
}
