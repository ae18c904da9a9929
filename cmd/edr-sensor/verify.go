// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
)

// auditReport is what an audit of the streams has found.
type auditReport struct {
	Clean   bool               `json:"clean"`
	Agents  []consumer.Finding `json:"agents"`
	Foreign uint64             `json:"foreign"`           // entries of other producers
	Broken  uint64             `json:"malformed"`         // entries that are nobody's
	First   string             `json:"first,omitempty"`   // of those, the first
	Trimmed []string           `json:"trimmed,omitempty"` // streams of which entries were deleted
	// Ends is whether the server could be asked how far each agent has come: if
	// not, what is missing at the end is not known.
	Ends bool `json:"ends_known"`
}

// verify audits the streams of the configuration.
func (a *app) verify(ctx context.Context, cmd *cobra.Command, asJSON bool) error {
	c, err := a.load()
	if err != nil {
		return err
	}
	t := agent.Placed(c)
	if t.Address == "" {
		return usage(cmd, "--verify needs Redis, and transport.address is not set")
	}
	client, err := newRedis(t)
	if err != nil {
		return &exit{exitConfig, err, "edr-sensor check" + a.configFlag()}
	}
	defer client.Close()
	v, err := auditStreams(ctx, client, t)
	if err != nil {
		return explainRedis(t, err)
	}
	if asJSON {
		e := json.NewEncoder(a.stdout)
		e.SetIndent("", "  ")
		err = e.Encode(v)
	} else {
		_, err = fmt.Fprint(a.stdout, v.text(t))
	}
	if err == nil && !v.Clean {
		err = &exit{code: exitFailure}
	}
	return err
}

func auditStreams(ctx context.Context, client redis.UniversalClient, t config.Transport) (*auditReport, error) {
	v := &auditReport{Clean: true, Agents: []consumer.Finding{}}
	audit := consumer.NewAudit()
	// Before the streams are read: then all of it must be there.
	var err error
	if v.Ends, err = addEnds(ctx, client, t, audit); err != nil {
		return nil, err
	}
	decoder, err := consumer.NewDecoder(consumer.Limits{})
	if err != nil {
		return nil, err
	}
	s, err := openStreams(ctx, client, t.Streams(), &time.Time{})
	if err != nil {
		return nil, err
	}
	var recs []consumer.Record
	for {
		read := maps.Clone(s.last)
		entries, err := s.next(ctx, 0)
		if err != nil {
			return nil, err
		}
		for _, key := range t.Streams() {
			cut, err := cutBehind(ctx, client, key, read[key])
			if err != nil {
				return nil, err
			}
			if cut {
				audit.Cut(key)
			}
		}
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			if recs, err = decoder.Decode(e.key, e.msg, recs[:0]); err != nil {
				audit.Malformed()
				if v.First == "" {
					v.First = err.Error()
				}
				continue
			}
			for i := range recs {
				audit.Add(&recs[i])
			}
		}
	}
	// Afterwards: what was deleted before it was read is not missing.
	for _, key := range t.Streams() {
		info, err := client.XInfoStream(ctx, key).Result()
		switch {
		case err != nil && strings.Contains(err.Error(), "no such key"):
		case err != nil:
			return nil, err
		case info.EntriesAdded != info.Length || (info.MaxDeletedEntryID != "" && info.MaxDeletedEntryID != "0-0"):
			audit.Trimmed(key)
			v.Trimmed = append(v.Trimmed, key)
		}
	}
	if audit.Incomplete() {
		return nil, errors.New("the streams hold more agents and holes than can be audited at once")
	}
	v.Agents, v.Foreign, v.Broken = audit.Findings(), audit.Foreign(), audit.Broken()
	v.Clean = v.Broken == 0
	for i := range v.Agents {
		v.Clean = v.Clean && v.Agents[i].Clean()
	}
	return v, nil
}

// cutBehind reports whether a stream, read up to an entry, may have been trimmed behind that.
func cutBehind(ctx context.Context, client redis.UniversalClient, key, read string) (bool, error) {
	last := parseID(read)
	if last == (streamID{}) {
		return false, nil // there is nothing to be behind of
	}
	info, err := client.XInfoStream(ctx, key).Result()
	switch {
	case err != nil && strings.Contains(err.Error(), "no such key"):
		return false, nil
	case err != nil:
		return false, err
	case info.Length == 0:
		return parseID(info.LastGeneratedID).compare(last) > 0, nil
	}
	return parseID(info.FirstEntry.ID).compare(last) > 0, nil
}

// addEnds tells the audit how far each agent has come. A user who may only read
// streams may not see that.
func addEnds(ctx context.Context, client redis.UniversalClient, t config.Transport, audit *consumer.Audit) (known bool, err error) {
	key := t.Prefix + ":{" + t.Shard + "}:cursors"
	it := client.HScan(ctx, key, 0, "", 1000).Iterator()
	for it.Next(ctx) {
		agent := it.Val()
		if !it.Next(ctx) {
			break
		}
		epochAndSeq := it.Val()
		if i := strings.LastIndexByte(epochAndSeq, ':'); i >= 0 { // the session follows
			epochAndSeq = epochAndSeq[:i]
		}
		if at, err := consumer.ParsePosition(epochAndSeq); err == nil {
			audit.End(agent, at)
		}
	}
	err = it.Err()
	if redis.IsPermissionError(err) {
		return false, nil
	}
	return err == nil, err
}

// text is the report for people.
func (v *auditReport) text(t config.Transport) string {
	var b strings.Builder
	for i := range v.Agents {
		f := &v.Agents[i]
		state := "clean"
		if !f.Clean() {
			state = "NOT CLEAN"
		}
		fmt.Fprintf(&b, "agent %s epoch %s: %s; %d records up to seq %d", safe(f.Agent), f.Epoch, state, f.Records, f.Last)
		for _, n := range []struct {
			n    uint64
			what string
		}{{f.Missing, "missing"}, {f.Duplicates, "duplicate"}, {f.OutOfOrder, "out of order"}, {f.NamedLost, "lost and named"}, {f.Trimmed, "not known, because a stream was trimmed"}} {
			if n.n > 0 {
				fmt.Fprintf(&b, ", %d %s", n.n, n.what)
			}
		}
		if f.UnknownLost {
			b.WriteString(", an unknown number of an earlier epoch lost")
		}
		b.WriteByte('\n')
		for _, r := range f.MissingRanges {
			fmt.Fprintf(&b, "  missing %d-%d\n", r.First, r.Last)
		}
	}
	if len(v.Agents) == 0 {
		fmt.Fprintf(&b, "no records of a sensor in %s\n", joinAnd(t.Streams()))
	}
	if v.Broken > 0 {
		fmt.Fprintf(&b, "malformed entries: %d, the first is %s\n", v.Broken, safe(v.First))
	}
	if v.Foreign > 0 {
		fmt.Fprintf(&b, "entries of other producers: %d\n", v.Foreign)
	}
	if !v.Ends {
		fmt.Fprintf(&b, "what is missing at the end is not known: this user may not HSCAN %s\n", t.Prefix+":{"+t.Shard+"}:cursors")
	}
	return b.String()
}
