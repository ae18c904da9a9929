// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/aurorasoc/edr-sensor/internal/cases"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// desk is a caseKeeper whose worker answers that each case covers two processes.
type desk struct {
	*caseKeeper
	decisions
	dir     string
	applied []*event.Case
}

func newDesk(t *testing.T, dir, bootID string) *desk {
	t.Helper()
	d := &desk{dir: dir}
	set, ended, damage := cases.Load(dir, bootID, time.Now())
	proc := filepath.Join(dir, "proc", "7")
	if err := errors.Join(os.MkdirAll(proc, 0o700), os.WriteFile(filepath.Join(proc, "stat"), []byte("7 (x) S 1"+strings.Repeat(" 0", 17)+" 42"), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.caseKeeper = newCaseKeeper(prometheus.NewPedanticRegistry(), set, cases.Resolver{Proc: filepath.Dir(proc), Cgroup: dir, BootID: bootID}, d.answer, d.add)
	d.resumed(t.Context(), ended, damage)
	return d
}

func (d *desk) answer(list []*event.Case) <-chan []int {
	d.applied = list
	c := make(chan []int, 1)
	n := make([]int, len(list))
	for i := range n {
		n[i] = 2
	}
	c <- n
	return c
}

func (d *desk) codes() (codes []string) {
	for _, i := range d.all() {
		codes = append(codes, i.Code+" "+i.CaseID)
	}
	return codes
}

// pass lets time go by in a bubble of synctest.
func pass(d time.Duration) { <-time.After(d) }

func subtree(id string) CaseRequest {
	return CaseRequest{ID: id, InvestigationID: "I-4", UserID: "mara", Scope: CaseScope{"subtree", "7"}, TTL: "1h", Collect: cases.Deep}
}

func TestCasesAreDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, t.TempDir(), "boot")
		alice := peer{PID: 5, UID: 1000, GID: 100, User: "alice"}
		opened, err := d.open(t.Context(), alice, subtree("C-17"))
		if err != nil || *opened.Covered != 2 || len(d.applied) != 1 || !d.applied[0].Deep {
			t.Fatalf("%+v, %v", opened, err)
		}
		i := d.all()[0]
		want := event.SelfInfo{
			Stream: event.DecisionsApprovals, Name: "Case Opened", Severity: 1, Code: "CASE_OPENED", After: "open",
			CaseID: "C-17", InvestigationID: "I-4", UserID: "mara",
			Message: "case C-17 on subtree 7 was opened until 2000-01-01T01:00:00Z: running processes covered: 2",
			Attrs: map[string]any{
				"scope": "subtree 7", "collect": cases.Deep, "opened": "2000-01-01T00:00:00Z", "until": "2000-01-01T01:00:00Z", "ttl": "1h0m0s", "covered": 2,
				"peer_pid": int32(5), "peer_uid": uint32(1000), "peer_gid": uint32(100), "peer_user": "alice",
			},
		}
		if diff := cmp.Diff(want, i); diff != "" {
			t.Errorf("open (-want +got):\n%s", diff)
		}
		if n := testutil.ToFloat64(d.gauge); n != 1 {
			t.Errorf("cases_open %v", n)
		}

		pass(30 * time.Minute)
		if _, err := d.open(t.Context(), alice, CaseRequest{ID: "C-18", Scope: CaseScope{"path", "/opt"}}); err != nil {
			t.Fatal(err)
		}
		d.applied[0].Tagged.Store(12)
		pass(30*time.Minute - 1)
		d.expire(t.Context())
		pass(1)
		d.expire(t.Context())
		if _, err := d.close(t.Context(), peer{UID: 77}, CaseClose{ID: "C-18"}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"CASE_OPENED C-17", "CASE_OPENED C-18", "CASE_EXPIRED C-17", "CASE_CLOSED C-18"}, d.codes()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		all := d.all()
		if by := all[1].UserID; by != "alice" {
			t.Errorf("without a user id it is ascribed to %q", by)
		}
		if expired := all[2]; expired.UserID != "mara" || expired.Attrs["tagged"] != uint64(12) || expired.After != "closed" {
			t.Errorf("expired: %+v", expired)
		}
		if closed := all[3]; closed.UserID != "uid:77" || closed.Attrs["opened_by"] != "alice" || closed.Attrs["peer_uid"] != uint32(77) {
			t.Errorf("closed: %+v", closed)
		}
		if len(d.applied) != 0 || testutil.ToFloat64(d.gauge) != 0 {
			t.Errorf("%d cases are left with the worker", len(d.applied))
		}
	})
}

func TestCasesAreResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := newDesk(t, dir, "boot")
		for _, r := range []CaseRequest{subtree("tree"), {ID: "path", Scope: CaseScope{"path", "/opt"}, TTL: "2h"}, {ID: "short", Scope: CaseScope{"path", "/opt"}, TTL: "10m"}} {
			if _, err := d.open(t.Context(), peer{}, r); err != nil {
				t.Fatal(err)
			}
		}
		pass(15 * time.Minute)
		d = newDesk(t, dir, "boot")
		if diff := cmp.Diff([]string{"CASE_EXPIRED short", "CASE_RESUMED tree", "CASE_RESUMED path"}, d.codes()); diff != "" {
			t.Errorf("same boot (-want +got):\n%s", diff)
		}
		if len(d.applied) != 2 {
			t.Errorf("%d cases applied", len(d.applied))
		}
		d = newDesk(t, dir, "next boot")
		if diff := cmp.Diff([]string{"CASE_CLOSED tree", "CASE_RESUMED path"}, d.codes()); diff != "" {
			t.Errorf("next boot (-want +got):\n%s", diff)
		}
		if i := d.all()[0]; i.Attrs["cause"] != "reboot" || !strings.Contains(i.Message, "rebooted") {
			t.Errorf("%+v", i)
		}
		if err := os.WriteFile(filepath.Join(dir, "cases.json"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		d = newDesk(t, dir, "next boot")
		if diff := cmp.Diff([]string{"CASES_DAMAGED "}, d.codes()); diff != "" {
			t.Errorf("damaged (-want +got):\n%s", diff)
		}
	})
}

func TestCasesAreRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, t.TempDir(), "boot")
		bob := peer{UID: 1001, User: "bob"}
		change := func(f func(*CaseRequest)) CaseRequest {
			r := subtree("C")
			f(&r)
			return r
		}
		for _, tt := range []struct {
			r    CaseRequest
			id   string // in the decision
			want string
		}{
			{change(func(r *CaseRequest) { r.ID = "" }), "", "case_id is missing"},
			{change(func(r *CaseRequest) { r.ID = "a\x1b[2J" }), "", "case_id contains"},
			{change(func(r *CaseRequest) { r.TTL = "soon" }), "C", `ttl "soon": write a duration`},
			{change(func(r *CaseRequest) { r.TTL = "-1h" }), "C", "ttl -1h0m0s"},
			{change(func(r *CaseRequest) { r.Scope.Value = "8" }), "C", "no such process"},
			{change(func(r *CaseRequest) { r.UserID = "a b" }), "C", "user_id contains"},
		} {
			pass(2 * time.Second)
			before := len(d.all())
			if _, err := d.open(t.Context(), bob, tt.r); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%+v: %v, want %q", tt.r, err, tt.want)
			}
			i := d.all()[before]
			if i.Code != "CASE_REJECTED" || i.CaseID != tt.id || !i.Failed || i.Attrs["peer_uid"] != uint32(1001) || !strings.Contains(i.Message, tt.want) {
				t.Errorf("%+v: %+v", tt.r, i)
			}
		}
		// A flood of them is told of once a second.
		pass(2 * time.Second)
		before := len(d.all())
		for range 100 {
			if _, err := d.close(t.Context(), bob, CaseClose{ID: "none"}); !errors.Is(err, cases.ErrNotOpen) {
				t.Fatal(err)
			}
		}
		pass(time.Second)
		if _, err := d.close(t.Context(), bob, CaseClose{ID: "none", UserID: "\n"}); err == nil {
			t.Error("a user id with a line break was accepted")
		}
		if n := len(d.all()) - before; n != 2 {
			t.Errorf("%d decisions about 101 rejections, want 2", n)
		}
		if last := d.all()[before+1]; last.Count != 100 {
			t.Errorf("the second tells of %d, want 100", last.Count)
		}
		if d.set.Len() != 0 {
			t.Errorf("%d cases are open", d.set.Len())
		}
	})
}

// TestCaseIsOpenWhenTheWorkerIsBusy: the answer comes all the same.
func TestCaseIsOpenWhenTheWorkerIsBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, t.TempDir(), "boot")
		d.apply = func([]*event.Case) <-chan []int { return nil }
		opened, err := d.open(t.Context(), peer{}, subtree("C"))
		if err != nil || opened.Covered != nil || !strings.Contains(opened.Note, "busy") || d.set.Len() != 1 {
			t.Errorf("%+v, %v", opened, err)
		}
	})
}

// TestEndOfACaseCountsWhatIsStillTagged has the worker tag for a case until it knows that
// it has ended. What it tags until it answers is in the number, and where it does not
// answer the number is none that is exact.
func TestEndOfACaseCountsWhatIsStillTagged(t *testing.T) {
	const before, meanwhile, late = 12, 30, 7 // at once, after a second, after ten
	closes := func(ctx context.Context, d *desk) error {
		c, err := d.close(ctx, peer{}, CaseClose{ID: "C"})
		if i := d.all()[1]; err == nil && (c.Tagged != i.Attrs["tagged"] || c.AtLeast != (i.Attrs["tagged_at_least"] == true)) {
			return fmt.Errorf("%d tagged, at least %t, in the answer, in the decision %v", c.Tagged, c.AtLeast, i.Attrs)
		}
		return err
	}
	expires := func(ctx context.Context, d *desk) error {
		at := time.Now()
		d.now = func() time.Time { return at.Add(time.Hour) }
		if d.expire(ctx); time.Since(at) > 0 {
			return errors.New("it waits for the worker")
		}
		for range 3 { // the last after the worker's time is over
			pass(applyWithin / 2)
			d.expire(ctx)
		}
		return nil
	}
	for _, tt := range []struct {
		name            string
		end             func(context.Context, *desk) error
		answers, leaves bool
		code            string
		tagged          uint64
		atLeast         any
	}{
		{"closed", closes, true, false, "CASE_CLOSED", before + meanwhile, nil},
		{"closed, who asked hangs up", closes, true, true, "CASE_CLOSED", before + meanwhile, nil},
		{"closed, the worker is busy", closes, false, false, "CASE_CLOSED", before + meanwhile, true},
		{"expired", expires, true, false, "CASE_EXPIRED", before + meanwhile, nil},
		{"expired, the worker is busy", expires, false, false, "CASE_EXPIRED", before + meanwhile, true},
		{"expired at a stop", expires, true, true, "CASE_EXPIRED", before, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk(t, t.TempDir(), "boot")
				if _, err := d.open(t.Context(), peer{}, subtree("C")); err != nil {
					t.Fatal(err)
				}
				live := d.applied[0]
				live.Tagged.Add(before)
				time.AfterFunc(2*applyWithin, func() { live.Tagged.Add(late) })
				d.apply = func([]*event.Case) <-chan []int {
					answer := make(chan []int, 1)
					time.AfterFunc(time.Second, func() {
						live.Tagged.Add(meanwhile)
						if tt.answers {
							answer <- nil
						}
					})
					return answer
				}
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				if tt.leaves {
					leave()
				}
				if err := tt.end(ctx, d); err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff([]string{"CASE_OPENED C", tt.code + " C"}, d.codes()); diff != "" {
					t.Fatalf("(-want +got):\n%s", diff)
				}
				if a := d.all()[1].Attrs; a["tagged"] != tt.tagged || a["tagged_at_least"] != tt.atLeast {
					t.Errorf("%v, want %d tagged, at least %v", a, tt.tagged, tt.atLeast)
				}
				pass(3 * applyWithin) // until nothing is under way
			})
		})
	}
}

// TestStalledDiskHoldsUpNobody: while the file of the cases cannot be written, what is due
// is ended in time, and the open cases can be asked for.
func TestStalledDiskHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, t.TempDir(), "boot")
		for id, ttl := range map[string]string{"short": "1m", "long": "1h"} {
			if _, err := d.open(t.Context(), peer{}, CaseRequest{ID: id, Scope: CaseScope{"path", "/opt"}, TTL: ttl}); err != nil {
				t.Fatal(err)
			}
		}
		stalled, write := make(chan struct{}), d.keep
		d.keep = func() error { <-stalled; return write() }
		pass(time.Minute)
		for range 3 {
			d.expire(t.Context())
			synctest.Wait()
			if list := d.caseKeeper.list(); len(list) != 1 || list[0].ID != "long" || d.codes()[2] != "CASE_EXPIRED short" {
				t.Errorf("%+v, %v", list, d.codes())
			}
		}
		live := d.applied[0]
		live.Tagged.Add(5)
		if list := d.caseKeeper.list(); list[0].Tagged != 5 {
			t.Errorf("%+v", list)
		}
		close(stalled)
		synctest.Wait()
		if again, ended, _ := cases.Load(d.dir, "boot", d.now()); again.Len() != 1 || len(ended) > 0 {
			t.Errorf("%d are kept, %v ended", again.Len(), ended)
		}
	})
}

// FuzzCaseRequest has a request be anything: what is opened can be listed, kept and
// closed, and its ids are ids.
func FuzzCaseRequest(f *testing.F) {
	f.Add([]byte(`{"case_id":"C","investigation_id":"I","user_id":"U","scope":{"kind":"path","value":"/opt"},"ttl":"1h","collect":"deep"}`))
	f.Add([]byte(`{"case_id":"C","scope":{"kind":"uid","value":"0"}}`))
	f.Add([]byte(`{"scope":{"kind":"subtree","value":"1"},"ttl":"-9223372036854775808ns"}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, body []byte) {
		var d decisions
		set, _, _ := cases.Load(dir, "boot", time.Now())
		covered := func(list []*event.Case) <-chan []int {
			c := make(chan []int, 1)
			c <- make([]int, len(list))
			return c
		}
		k := newCaseKeeper(prometheus.NewPedanticRegistry(), set, cases.Resolver{Proc: "/proc", Cgroup: dir, BootID: "boot"}, covered, d.add)
		a := &Agent{cases: k, cfg: config.Default()}
		w := httptest.NewRecorder()
		a.serveCaseOpen(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/cases/open", bytes.NewReader(body)))
		for _, c := range k.list() {
			if w.Code != http.StatusOK || c.ID == "" || config.Identifier(c.ID+c.InvestigationID) != nil || !c.Until.After(c.Opened) {
				t.Errorf("%s: %d, opened %+v", body, w.Code, c)
			}
			again, ended, damage := cases.Load(dir, "boot", time.Now())
			if again.Len() != 1 || len(ended) > 0 || damage != nil {
				t.Errorf("%s: %d kept, %v ended, %v", body, again.Len(), ended, damage)
			}
			if _, err := k.close(t.Context(), peer{}, CaseClose{ID: c.ID}); err != nil {
				t.Error(err)
			}
		}
		if len(d.all()) == 0 && w.Code != http.StatusBadRequest {
			t.Errorf("%s: %d and no decision", body, w.Code)
		}
	})
}
