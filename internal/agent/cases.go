// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/cases"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// applyWithin is how long an answer waits for the worker to take in a case; it goes
// on to do so all the same.
const applyWithin = 5 * time.Second

// caseKeeper opens and closes cases: tells the worker, and makes each decision known.
type caseKeeper struct {
	resolver cases.Resolver
	apply    func([]*event.Case) <-chan []int
	decide   func(context.Context, event.SelfInfo)
	now      func() time.Time
	gauge    prometheus.Gauge
	rejects  *logging.Limiter
	lines    *logging.Limiter

	roots atomic.Pointer[map[*event.Case][]event.ProcessKey] // from the worker, the newest
	shown atomic.Pointer[[]cases.Case]                       // what is open, for those who must not wait for mu

	mu   sync.Mutex // held for as long as the disk takes
	set  *cases.Set
	keep func() error // writes the set's file
}

func newCaseKeeper(reg prometheus.Registerer, set *cases.Set, r cases.Resolver, apply func([]*event.Case) <-chan []int, decide func(context.Context, event.SelfInfo)) *caseKeeper {
	k := &caseKeeper{
		resolver: r, apply: apply, decide: decide, now: time.Now, set: set, keep: set.Save, rejects: logging.NewLimiter(time.Second), lines: logging.NewLimiter(time.Minute),
		gauge: promauto.With(reg).NewGauge(prometheus.GaugeOpts{
			Name: "cases_open",
			Help: "Cases that are open. If it stays high, somebody forgot to close what was investigated: edr-sensor case list says who and until when.",
		}),
	}
	k.update()
	return k
}

// update hands the open cases to the worker. The answer is how many running processes
// each of them covers.
func (k *caseKeeper) update() <-chan []int {
	k.gauge.Set(float64(k.set.Len()))
	list := k.set.List()
	k.shown.Store(&list)
	return k.apply(k.set.Events())
}

// CaseRequest opens a case.
type CaseRequest struct {
	ID              string        `json:"case_id"`
	InvestigationID string        `json:"investigation_id"`
	UserID          string        `json:"user_id"` // empty: the name of who asks
	Scope           CaseScope     `json:"scope"`
	TTL             string        `json:"ttl"`     // "4h"; empty: cases.DefaultTTL
	Collect         cases.Collect `json:"collect"` // empty: cases.Normal
}

func (r *CaseRequest) ttl() (time.Duration, error) {
	if r.TTL == "" {
		return cases.DefaultTTL, nil
	}
	ttl, err := time.ParseDuration(r.TTL)
	if err != nil {
		return 0, fmt.Errorf("ttl %.20q: write a duration such as 4h", r.TTL)
	}
	return ttl, nil
}

// CaseScope is what a case is to cover, as people write it.
type CaseScope struct {
	Kind  string `json:"kind"`
	Value string `json:"value"`
}

// CaseClose closes a case.
type CaseClose struct {
	ID     string `json:"case_id"`
	UserID string `json:"user_id"` // empty: the name of who asks
}

// CaseOpened answers a CaseRequest.
type CaseOpened struct {
	cases.Case
	Covered *int   `json:"covered,omitempty"` // running processes; absent when the worker did not answer in time
	Note    string `json:"note,omitempty"`
}

// open opens a case for a peer.
func (k *caseKeeper) open(ctx context.Context, p peer, r CaseRequest) (CaseOpened, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.now().UTC().Round(0)
	c := cases.Case{
		ID: r.ID, InvestigationID: r.InvestigationID, UserID: userID(p, r.UserID), Opened: now,
		Collect: cmp.Or(r.Collect, cases.Normal),
	}
	ttl, err := r.ttl()
	c.Until = now.Add(ttl)
	if err == nil {
		c.Scope, err = k.resolver.Resolve(r.Scope.Kind, r.Scope.Value)
	}
	if err == nil {
		err = k.set.Open(c)
	}
	if err != nil {
		k.reject(ctx, p, r.ID, r.UserID, err)
		return CaseOpened{}, err
	}
	answer := CaseOpened{Case: c}
	attrs := caseAttrs(c)
	maps.Copy(attrs, p.attrs())
	attrs["ttl"] = ttl.String()
	text := "what runs of it is not known yet"
	select {
	case covered := <-k.update():
		n := covered[len(covered)-1]
		answer.Covered, attrs["covered"] = &n, n
		text = fmt.Sprintf("running processes covered: %d", n)
	case <-time.After(applyWithin):
		answer.Note = "the worker is busy: it takes the case in when it goes on"
	}
	k.decide(ctx, event.SelfInfo{
		Stream: event.DecisionsApprovals, Name: "Case Opened", Severity: 1, Code: "CASE_OPENED", After: "open",
		CaseID: c.ID, InvestigationID: c.InvestigationID, UserID: c.UserID, Attrs: attrs,
		Message: fmt.Sprintf("%s was opened until %s: %s", &c, c.Until.Format(time.RFC3339), text),
	})
	return answer, nil
}

// close closes a case for a peer.
func (k *caseKeeper) close(ctx context.Context, p peer, r CaseClose) (cases.Case, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	by := userID(p, r.UserID)
	if err := config.Identifier(by); err != nil {
		err = fmt.Errorf("user_id %w", err)
		k.reject(ctx, p, r.ID, "", err)
		return cases.Case{}, err
	}
	c, err := k.set.Close(r.ID)
	if errors.Is(err, cases.ErrNotOpen) {
		k.reject(ctx, p, r.ID, r.UserID, err)
		return cases.Case{}, err
	}
	c.Recount(k.settled(context.WithoutCancel(ctx))) // who hangs up makes no number worse
	attrs := p.attrs()
	attrs["opened_by"] = c.UserID
	k.ended(ctx, c, by, "CASE_CLOSED", "Case Closed", "was closed", attrs)
	k.unwritten(logging.With(ctx, zap.String(logging.KeyCaseID, c.ID)), err)
	return c, nil
}

// expire ends the cases whose time is over, and writes the file if that is stale. It never
// waits, neither for the worker nor for the disk: what another call keeps from being ended
// now is ended at the next, and the end is made known when the worker has answered, or ctx
// ends. Until all is done no other call gets in between.
func (k *caseKeeper) expire(ctx context.Context) {
	if !k.mu.TryLock() {
		return
	}
	k.takeRoots()
	over := k.set.Expire(k.now())
	if !k.set.Stale() {
		k.mu.Unlock()
		return
	}
	go func() {
		defer k.mu.Unlock()
		if len(over) > 0 {
			last := k.settled(ctx)
			for _, c := range over {
				c.Recount(last)
				k.ended(ctx, c, c.UserID, "CASE_EXPIRED", "Case Expired", "expired", nil)
			}
		}
		k.unwritten(ctx, k.keep())
	}()
}

// settled hands the open cases to the worker and reports whether it answered: the numbers
// of those that have ended grow until then.
func (k *caseKeeper) settled(ctx context.Context) bool {
	select {
	case <-k.update():
		return true
	case <-time.After(applyWithin):
	case <-ctx.Done(): // a decision of later might be in no record any more
	}
	return false
}

// resumed makes known what became of the cases of the run before.
func (k *caseKeeper) resumed(ctx context.Context, ended []cases.Ended, damage error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if damage != nil {
		k.decide(ctx, event.SelfInfo{
			Name: "Cases Set Aside", Severity: 3, Failed: true, Code: "CASES_DAMAGED",
			Message: "the file of the open cases cannot be used, so none that was in it is open: " + damage.Error(),
		})
	}
	for _, c := range ended {
		if c.Expired {
			k.ended(ctx, c.Case, c.UserID, "CASE_EXPIRED", "Case Expired", "expired while no sensor ran", nil)
		} else {
			k.ended(ctx, c.Case, c.UserID, "CASE_CLOSED", "Case Closed", "was closed: the host was rebooted, which ended the process of its scope", map[string]any{"cause": "reboot"})
		}
	}
	for _, c := range k.set.List() {
		attrs := caseAttrs(c)
		k.decide(ctx, event.SelfInfo{
			Stream: event.DecisionsApprovals, Name: "Case Resumed", Severity: 1, Code: "CASE_RESUMED", Before: "open", After: "open",
			CaseID: c.ID, InvestigationID: c.InvestigationID, UserID: c.UserID, Attrs: attrs,
			Message: fmt.Sprintf("%s goes on until %s", &c, c.Until.Format(time.RFC3339)),
		})
	}
}

// ended makes the end of a case known.
func (k *caseKeeper) ended(ctx context.Context, c cases.Case, by, code, name, how string, more map[string]any) {
	attrs := caseAttrs(c)
	attrs["tagged"] = c.Tagged
	atLeast := ""
	if c.AtLeast {
		attrs["tagged_at_least"], atLeast = true, "at least "
	}
	maps.Copy(attrs, more)
	k.decide(ctx, event.SelfInfo{
		Stream: event.DecisionsApprovals, Name: name, Severity: 1, Code: code, Before: "open", After: "closed",
		CaseID: c.ID, InvestigationID: c.InvestigationID, UserID: by, Attrs: attrs,
		Message: fmt.Sprintf("%s %s: %s%d events carry its ids", &c, how, atLeast, c.Tagged),
	})
}

// reject makes a refused request known; a flood of them once a second.
func (k *caseKeeper) reject(ctx context.Context, p peer, id, by string, err error) {
	i := event.SelfInfo{
		Stream: event.DecisionsApprovals, Name: "Case Rejected", Severity: 2, Failed: true, Code: "CASE_REJECTED",
		Message: "a request was rejected: " + err.Error(), Attrs: p.attrs(),
	}
	if config.Identifier(id) == nil { // an id that is none must not look like one
		i.CaseID = id
	}
	if by = userID(p, by); config.Identifier(by) == nil {
		i.UserID = by
	}
	ctx = context.WithoutCancel(ctx)
	k.rejects.Say(fmt.Sprint(p.UID), func(more uint64) {
		i.Count = more + 1
		k.decide(ctx, i)
	})
}

// unwritten tells that a restart might find other cases open than are.
func (k *caseKeeper) unwritten(ctx context.Context, err error) {
	if err != nil {
		k.lines.Log(ctx, zap.ErrorLevel, "keep", "keep the set of open cases", zap.Error(err)) // tried again each second
	}
}

// setRoots takes what the worker tells of subtrees, without waiting.
func (k *caseKeeper) setRoots(all map[*event.Case][]event.ProcessKey) { k.roots.Store(&all) }

func (k *caseKeeper) takeRoots() {
	if all := k.roots.Swap(nil); all != nil {
		k.set.SetRoots(*all)
	}
}

// save keeps how many events were tagged, and what belongs to subtrees. Nothing is
// tagged any more.
func (k *caseKeeper) save(context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.takeRoots()
	if k.set.Len() == 0 && !k.set.Stale() {
		return nil
	}
	return k.set.End()
}

// list returns the open cases without waiting.
func (k *caseKeeper) list() []cases.Case {
	list := slices.Clone(*k.shown.Load())
	for i := range list {
		list[i].Recount(true)
	}
	return list
}

// caseAttrs is the evidence about a case.
func caseAttrs(c cases.Case) map[string]any {
	return map[string]any{
		"scope": c.Scope.String(), "collect": c.Collect, "opened": c.Opened.Format(time.RFC3339), "until": c.Until.Format(time.RFC3339),
	}
}

// userID is who a decision is ascribed to: who the peer says, else the peer.
func userID(p peer, said string) string {
	switch {
	case said != "":
		return said
	case p.User != "" && config.Identifier(p.User) == nil:
		return p.User
	}
	return fmt.Sprintf("uid:%d", p.UID)
}

func (a *Agent) serveCases(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, map[string]any{"cases": a.cases.list()})
}

func (a *Agent) serveCaseOpen(w http.ResponseWriter, r *http.Request) {
	var req CaseRequest
	if !readJSON(w, r, &req) {
		return
	}
	p, _ := peerFrom(r.Context())
	answer, err := a.cases.open(r.Context(), p, req)
	if err != nil {
		http.Error(w, err.Error(), caseStatus(err))
		return
	}
	if req.Collect == cases.Deep && !a.cfg.Sensor.File.Enabled {
		answer.Note = "file events are off (sensor.file.enabled): a case cannot switch them on"
	}
	writeJSON(w, answer)
}

func (a *Agent) serveCaseClose(w http.ResponseWriter, r *http.Request) {
	var req CaseClose
	if !readJSON(w, r, &req) {
		return
	}
	p, _ := peerFrom(r.Context())
	c, err := a.cases.close(r.Context(), p, req)
	if err != nil {
		http.Error(w, err.Error(), caseStatus(err))
		return
	}
	writeJSON(w, c)
}

func caseStatus(err error) int {
	switch {
	case errors.Is(err, cases.ErrNotOpen):
		return http.StatusNotFound
	case errors.Is(err, cases.ErrOpen), errors.Is(err, cases.ErrFull):
		return http.StatusConflict
	case errors.Is(err, cases.ErrFile):
		return http.StatusInsufficientStorage
	}
	return http.StatusBadRequest
}
