// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

// RiskKind says what is wrong with a server that still takes records.
type RiskKind string

// The risks. Each would end in lost events, or in a server that takes no more.
const (
	RiskEviction RiskKind = "eviction" // a full server deletes whole streams
	RiskMemory   RiskKind = "memory"   // it is nearly full
	RiskUnread   RiskKind = "unread"   // a stream that is trimmed nears its limit unread
	RiskPassword RiskKind = "password" // the next connect will be refused
	RiskReplica  RiskKind = "replica"  // no replica confirms what was delivered
)

// Risks returns all kinds, for tables and metrics.
func Risks() []RiskKind {
	return []RiskKind{RiskEviction, RiskMemory, RiskUnread, RiskPassword, RiskReplica}
}

// Risk is one of them, with what a person can do about it.
type Risk struct {
	Kind RiskKind
	Text string
}

// nearlyFull is the part of its memory, or of a stream's limit, from which on a
// server is at risk: less headroom does not outlast a weekend.
const nearlyFull = 0.8

// tend does what is due now and then on a connection that works, whether records
// come or not.
func (s *Sender) tend(ctx context.Context) error {
	s.tended = time.Now().Add(jitter(s.o.ProbeInterval))
	var risks []Risk
	if r, err := s.reauthenticate(ctx); err != nil {
		return fmt.Errorf("authenticate again: %w", err)
	} else if r != "" {
		risks = append(risks, Risk{RiskPassword, r})
	}
	if s.o.Topology == Cluster {
		// So that we know whom to ask when this node is gone.
		if _, err := s.finder.askCluster(ctx, s.conn, s.node, s.slot); err != nil && !replied(err) {
			return fmt.Errorf("ask for the cluster's nodes: %w", err)
		}
	}
	if s.ready { // else connect has just done it
		if err := s.checkMeta(ctx); err != nil {
			return fmt.Errorf("check the fleet's keys: %w", err)
		}
	}
	found, err := s.inspect(ctx)
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	risks = append(risks, found...)
	if !s.short1st.IsZero() && time.Since(s.short1st) > unconfirmedTooLong {
		risks = append(risks, Risk{RiskReplica, "no replica has confirmed since " + s.short1st.UTC().Format(time.RFC3339) + ", so that nothing counts as delivered: repair replication, or set ack: reply"})
	}
	s.report(ctx, risks)
	return nil
}

// report makes the risks known.
func (s *Sender) report(ctx context.Context, risks []Risk) {
	for _, k := range Risks() {
		s.m.risks[k].Set(0)
	}
	for _, r := range risks {
		s.m.risks[r.Kind].Set(1)
		s.limiter.Log(ctx, zapcore.WarnLevel, "risk "+string(r.Kind), "redis may lose or refuse events", zap.String(logging.KeyReason, r.Text))
	}
	st := *s.state.Load()
	st.Risks = risks
	if st.Phase == Connected { // else recover or fail is about to tell
		s.set(&st)
	} else {
		s.state.Store(&st)
	}
}

// reauthenticate takes up a password that has changed, while the connection that was
// opened with the one before still works: a refusal is known now, and not when the
// connection breaks. It returns what is wrong.
func (s *Sender) reauthenticate(ctx context.Context) (risk string, err error) {
	if s.o.PasswordFile == "" {
		return "", nil
	}
	password, err := readPassword(s.o.PasswordFile)
	if err != nil {
		return err.Error() + "; the connection lasts, the next one fails", nil
	}
	secret := sha256.Sum256([]byte(password))
	switch secret {
	case s.conn.secret:
		return "", nil
	case s.refusedSecret: // each attempt is a line in the server's ACL log
		return passwordRefused, nil
	}
	auth := s.conn.redis.Auth(ctx, password)
	if s.o.Username != "" {
		auth = s.conn.redis.AuthACL(ctx, s.o.Username, password)
	}
	if err := auth.Err(); err != nil {
		if classify(err) == ClassAuth {
			s.refusedSecret = secret
			return passwordRefused, nil
		}
		return "", err
	}
	s.conn.secret = secret
	s.rotate()
	return "", nil
}

const passwordRefused = "the server refuses the password that is now in transport.password_file; the connection lasts with the one before, the next one fails"

// rotate takes note of the password that the server has just accepted.
func (s *Sender) rotate() {
	secret := s.conn.secret
	if s.secret != nil && *s.secret != secret {
		st := *s.state.Load()
		st.Rotations++
		s.set(&st)
	}
	s.secret = &secret
}

// inspect looks for what makes the server lose events silently, or soon refuse them.
func (s *Sender) inspect(ctx context.Context) (risks []Risk, err error) {
	var info string
	err = s.ask("info", func() (err error) { info, err = s.conn.redis.Info(ctx, "memory").Result(); return err })
	if err != nil {
		return nil, err
	}
	facts := parseInfo(info)
	if p := facts["maxmemory_policy"]; strings.HasPrefix(p, "allkeys-") {
		risks = append(risks, Risk{RiskEviction, "maxmemory-policy is " + p + ": a full server deletes whole streams without an error; set noeviction"})
	}
	worst, unread, err := s.unread(ctx)
	if err != nil {
		return nil, err
	}
	if unread != "" {
		risks = append(risks, Risk{RiskUnread, unread})
	}
	used, limit, of := facts.number("used_memory"), facts.number("maxmemory"), "maxmemory"
	if limit == 0 {
		limit, of = facts.number("total_system_memory"), "the host's memory, with no maxmemory set"
	}
	ratio := 0.0
	if limit > 0 {
		ratio = used / limit
	}
	s.m.memory.Set(ratio)
	if ratio > nearlyFull {
		risks = append(risks, Risk{RiskMemory, fmt.Sprintf("Redis uses %.0f %% of %s%s: let consumers read and trim, or raise it; a full server takes no events", 100*ratio, of, worst)})
	}
	return risks, nil
}

// unread looks how far behind the slowest consumer group of each stream is. worst
// names the one with most entries unread; risk is about a stream that will be
// trimmed before it is read.
func (s *Sender) unread(ctx context.Context) (worst, risk string, err error) {
	most := int64(0)
	for stream, key := range s.batch.keys {
		if slices.Index(s.batch.keys[:], key) < stream {
			continue // another stream has the same key
		}
		var groups []redis.XInfoGroup
		err := s.ask("xinfo", func() (err error) { groups, err = s.conn.redis.XInfoGroups(ctx, key).Result(); return err })
		if err != nil {
			return "", "", err
		}
		behind, name := int64(0), ""
		for _, g := range groups {
			if n := max(g.Lag, 0) + g.Pending; n > behind {
				behind, name = n, g.Name
			}
		}
		s.m.unread[stream].Set(float64(behind))
		if behind > most {
			most, worst = behind, fmt.Sprintf("; group %.64q has %d entries of %s unread", name, behind, key)
		}
		limit, _ := strconv.ParseFloat(s.batch.limit[stream], 64)
		if limit > 0 && float64(behind) > nearlyFull*limit {
			risk = fmt.Sprintf("group %.64q has %d entries of %s unread, which keeps about %.0f: the oldest will be deleted unread; let it read, or raise the limit", name, behind, key, limit)
		}
	}
	return worst, risk, nil
}

// ask asks something that the user need not be allowed to ask, and not again once
// that was refused: each refusal is a line in the server's ACL log. Other replies
// that are errors ("no such key") are no answer. What remains is a broken connection.
func (s *Sender) ask(what string, f func() error) error {
	if s.refused[what] {
		return nil
	}
	err := f()
	if err == nil || !replied(err) {
		return err
	}
	if classify(err) == ClassPermission {
		s.refused[what] = true
	}
	return nil
}

// replied tells an answer of the server from a failure to get one.
func replied(err error) bool {
	_, said := errors.AsType[redis.Error](err)
	return said
}

// infoFacts are the lines of INFO.
type infoFacts map[string]string

func parseInfo(text string) infoFacts {
	facts := infoFacts{}
	for line := range strings.Lines(text) {
		if k, v, found := strings.Cut(strings.TrimSpace(line), ":"); found {
			facts[k] = v
		}
	}
	return facts
}

// number is 0 for what is not there or no number.
func (f infoFacts) number(key string) float64 {
	n, _ := strconv.ParseFloat(f[key], 64)
	return n
}
