// SPDX-License-Identifier: Apache-2.0

package consumer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Options say what a [Group] reads. Zero values mean the defaults given at each
// field.
type Options struct {
	// Group is the consumer group, Name this member of it. A name that is the
	// same after a restart goes on at once; another one first waits ClaimAfter.
	Group, Name string
	// Streams are the keys. On a cluster they must share a slot: one Group for
	// each shard.
	Streams []string
	// Count (256) is how many entries of each stream are read at a time: what is
	// in memory is these, and the records of one of them. Block (1 s) is how
	// long a read waits for one.
	Count int64
	Block time.Duration
	// ClaimAfter (1 min) is how long an entry may be with another member without
	// being acknowledged until that one counts as dead. It must be longer than a
	// [Sink] takes for Count entries.
	ClaimAfter time.Duration
	// Agents (65536) is for how many agents, streams counted singly, positions
	// are kept in memory, at least twice as many as one read may bring. Those of others are read from the server when needed. Kept
	// besides are those that a full server has not taken.
	Agents int
	Limits Limits
}

// Sink takes the records. When a method returns an error, nothing that was read
// with it is acknowledged, [Group.Read] returns the error, and the next Read has all
// of it again: a sink that keeps what it got before the error gets that twice.
type Sink interface {
	// Records are those of one entry, in order, without those seen before. They
	// are valid until it returns.
	Records(ctx context.Context, recs []Record) error
	// Malformed is an entry that is not a sensor's. It is acknowledged too:
	// reading it again will not make it better.
	Malformed(ctx context.Context, e *EntryError) error
	// Flush is called before what was handed over is acknowledged: then it must
	// be safe.
	Flush(ctx context.Context) error
}

// ErrShared is returned when another member of the group reads the same streams:
// then neither sees a stream in order. Use one member for each set of streams, and
// more shards to spread the load.
var ErrShared = errors.New("another member of the group reads these streams")

// Group reads streams as one member of a consumer group, each record once: from
// the last acknowledgement on, without what the rule drops. Positions are stored
// in one transaction with the acknowledgement, in the hash [PositionsKey] beside
// each stream. It is not safe for concurrent use.
//
// A server that is full takes acknowledgements but no positions: those are stored
// once it can. If the member ends before, the next one hands over again what a server
// shows again, and only that.
//
// A sink that fails between its own Flush and the acknowledgement sees the
// records again after a restart; one that must not keeps (agent, epoch, seq) with
// them.
type Group struct {
	o         Options
	c         redis.UniversalClient
	d         *Decoder
	positions *Positions

	joined  bool
	unsaved map[string]map[string]Position // stream -> agent -> position handed over and not known to be stored
	pending map[string]string              // stream -> id after which our unacknowledged entries go on; absent: none are left
	undo    map[source]Position            // of this Read: where positions were before
	gone    []EntryError                   // deleted before they were acknowledged, still to be told
	recs    []Record
	dropped uint64
}

// New returns a Group that reads through c, which remains the caller's.
func New(c redis.UniversalClient, o Options) (*Group, error) {
	if o.Group == "" || o.Name == "" || len(o.Streams) == 0 {
		return nil, errors.New("group, name and streams must be given")
	}
	if o.Count == 0 {
		o.Count = 256
	}
	if o.Block == 0 {
		o.Block = time.Second
	}
	if o.ClaimAfter == 0 {
		o.ClaimAfter = time.Minute
	}
	if o.Agents == 0 {
		o.Agents = 1 << 16
	}
	d, err := NewDecoder(o.Limits)
	if err != nil {
		return nil, err
	}
	g := &Group{o: o, c: c, d: d, positions: NewPositions(max(o.Agents, 2*int(o.Count)*len(o.Streams))), unsaved: make(map[string]map[string]Position)}
	for _, s := range o.Streams {
		g.unsaved[s] = make(map[string]Position)
	}
	return g, nil
}

// Dropped is how many records the rule has dropped.
func (g *Group) Dropped() uint64 { return g.dropped }

// PositionsKey is the hash agent -> position of a group beside a stream, in the
// same slot of a cluster.
func PositionsKey(stream, group string) string {
	if i := strings.IndexByte(stream, '{'); i >= 0 && strings.IndexByte(stream[i+1:], '}') > 0 {
		return stream + ":positions:" + group
	}
	return "{" + stream + "}:positions:" + group
}

// Read reads once, hands what comes to sink and acknowledges it. It returns
// without having called sink when nothing came within Block. After an error, of
// whatever kind, it can be called again.
func (g *Group) Read(ctx context.Context, sink Sink) error {
	if !g.joined {
		if err := g.join(ctx); err != nil {
			return err
		}
		g.joined = true
	}
	for ; len(g.gone) > 0; g.gone = g.gone[1:] {
		if err := sink.Malformed(ctx, &g.gone[0]); err != nil {
			return err
		}
	}
	got, err := g.fetch(ctx)
	if err != nil {
		if redis.HasErrorPrefix(err, "NOGROUP") {
			g.joined = false // the server was emptied
		}
		return err
	}
	if len(got) == 0 {
		return g.save(ctx)
	}
	if err := g.load(ctx, got); err != nil {
		return err
	}
	at, err := g.hand(ctx, got, sink)
	if err != nil {
		for s, p := range g.undo {
			g.positions.set(s, p)
		}
		g.joined = false
		return err
	}
	if err := g.commit(ctx, got, at); err != nil {
		g.joined = false
		return err
	}
	return nil
}

// hand gives what was read to the sink and returns the positions that it has then, by
// stream and agent.
func (g *Group) hand(ctx context.Context, got []redis.XStream, sink Sink) (map[string]map[string]Position, error) {
	g.undo = make(map[source]Position)
	at := make(map[string]map[string]Position, len(got))
	for _, s := range got {
		at[s.Stream] = make(map[string]Position)
		for _, m := range s.Messages {
			if err := g.entry(ctx, s.Stream, m, sink, at[s.Stream]); err != nil {
				return nil, err
			}
		}
	}
	return at, sink.Flush(ctx)
}

// entry hands over what is new of one entry.
func (g *Group) entry(ctx context.Context, stream string, m redis.XMessage, sink Sink, at map[string]Position) error {
	if m.Values == nil {
		return sink.Malformed(ctx, &EntryError{stream, m.ID, ErrGone})
	}
	recs, err := g.d.Decode(stream, m, g.recs[:0])
	if bad, is := errors.AsType[*EntryError](err); is {
		return sink.Malformed(ctx, bad)
	}
	g.recs = recs
	fresh := recs[:0]
	from, foreign := source{stream, recs[0].Agent}, recs[0].Foreign()
	if _, saved := g.undo[from]; !saved && !foreign {
		g.undo[from], _ = g.positions.get(from)
	}
	for i := range recs {
		if !g.positions.Fresh(&recs[i]) {
			g.dropped++
			continue
		}
		fresh = append(fresh, recs[i])
	}
	if !foreign {
		// Also when all was dropped: an entry comes again when a commit has failed or
		// the server went back, and then the position is not stored either.
		at[from.agent], _ = g.positions.get(from)
	}
	if len(fresh) == 0 {
		return nil
	}
	return sink.Records(ctx, fresh)
}

// join makes the group where there is none and takes over what members left that
// are dead. Only when nobody else holds an entry is new reading in order.
func (g *Group) join(ctx context.Context) error {
	for _, s := range g.o.Streams {
		_, _, err := g.held(ctx, s) // a server that is full refuses to create what is there, too
		if redis.HasErrorPrefix(err, "NOGROUP") {
			err = g.c.XGroupCreateMkStream(ctx, s, g.o.Group, "0").Err()
		}
		if err != nil && !redis.HasErrorPrefix(err, "BUSYGROUP") {
			return fmt.Errorf("join group %s of %s: %w", g.o.Group, s, err)
		}
	}
	for _, s := range g.o.Streams {
		for {
			if err := g.claim(ctx, s); err != nil {
				return err
			}
			_, theirs, err := g.held(ctx, s)
			if err != nil {
				return err
			}
			if theirs == 0 {
				break
			}
			wait := time.NewTimer(min(g.o.ClaimAfter/4, time.Second))
			select {
			case <-wait.C:
			case <-ctx.Done():
				wait.Stop()
				return ctx.Err()
			}
		}
	}
	g.pending = make(map[string]string)
	for _, s := range g.o.Streams {
		g.pending[s] = "0-0"
	}
	return nil
}

// claim takes over what has been with another member for too long. What was
// deleted meanwhile the server forgets here.
func (g *Group) claim(ctx context.Context, stream string) error {
	for start := "0-0"; ; {
		_, next, deleted, err := g.c.XAutoClaimWithDeleted(ctx, &redis.XAutoClaimArgs{
			Stream: stream, Group: g.o.Group, Consumer: g.o.Name, MinIdle: g.o.ClaimAfter, Start: start, Count: g.o.Count,
		}).Result()
		if err != nil {
			return fmt.Errorf("claim entries of %s: %w", stream, err)
		}
		for _, id := range deleted {
			g.gone = append(g.gone, EntryError{stream, id, ErrGone})
		}
		if start = next; next == "0-0" {
			return nil
		}
	}
}

// held returns how many entries of a stream are with us and with other members,
// not acknowledged.
func (g *Group) held(ctx context.Context, stream string) (ours, theirs int, err error) {
	p, err := g.c.XPending(ctx, stream, g.o.Group).Result()
	if errors.Is(err, redis.Nil) || err == nil && p == nil {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("pending entries of %s: %w", stream, err)
	}
	for name, n := range p.Consumers {
		if name == g.o.Name {
			ours += int(n)
		} else {
			theirs += int(n)
		}
	}
	return ours, theirs, nil
}

// fetch returns what comes next: first our own entries that were not
// acknowledged, oldest first, then new ones.
func (g *Group) fetch(ctx context.Context) ([]redis.XStream, error) {
	for len(g.pending) > 0 {
		var keys, ids []string
		for _, s := range g.o.Streams {
			if id, some := g.pending[s]; some {
				keys, ids = append(keys, s), append(ids, id)
			}
		}
		got, err := g.readGroup(ctx, append(keys, ids...), -1)
		if err != nil {
			return nil, err
		}
		var some []redis.XStream
		for _, s := range got {
			if n := len(s.Messages); n > 0 {
				g.pending[s.Stream] = s.Messages[n-1].ID
				some = append(some, s)
			} else {
				delete(g.pending, s.Stream)
			}
		}
		if len(got) == 0 {
			clear(g.pending)
		}
		if len(some) > 0 {
			return some, nil
		}
	}
	args := append([]string{}, g.o.Streams...)
	for range g.o.Streams {
		args = append(args, ">")
	}
	got, err := g.readGroup(ctx, args, g.o.Block)
	if err != nil {
		return nil, err
	}
	read := make(map[string]int)
	for _, s := range got {
		read[s.Stream] = len(s.Messages)
	}
	for _, s := range g.o.Streams {
		ours, theirs, err := g.held(ctx, s)
		if err == nil && theirs > 0 {
			err = fmt.Errorf("read %s as %s of group %s: %w", s, g.o.Name, g.o.Group, ErrShared)
		}
		if err != nil {
			g.joined = false // what was read is ours and comes again
			return nil, err
		}
		if ours != read[s] {
			// A reply was lost and the client has asked again by itself: what was
			// in it is older than what we have now and must come first.
			g.joined = false
			return nil, nil
		}
	}
	return got, nil
}

func (g *Group) readGroup(ctx context.Context, streams []string, block time.Duration) ([]redis.XStream, error) {
	got, err := g.c.XReadGroup(ctx, &redis.XReadGroupArgs{
		Group: g.o.Group, Consumer: g.o.Name, Streams: streams, Count: g.o.Count, Block: block,
	}).Result()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	if err != nil {
		// A reply that was lost has left entries with us: ask for them.
		g.joined = false
		return nil, fmt.Errorf("read as %s of group %s: %w", g.o.Name, g.o.Group, err)
	}
	return got, nil
}

// load fetches the positions of agents that are not in memory.
func (g *Group) load(ctx context.Context, got []redis.XStream) error {
	for _, s := range got {
		var agents []string
		asked := make(map[string]bool)
		for _, m := range s.Messages {
			agent, _ := m.Values["agent"].(string)
			from := source{s.Stream, agent}
			if at, known := g.positions.get(from); known {
				g.positions.set(from, at) // what is loaded beside it must not push it out
				continue
			}
			if agent == "" || len(agent) > maxAgent || asked[agent] {
				continue
			}
			if at, later := g.unsaved[s.Stream][agent]; later {
				g.positions.set(from, at)
				continue
			}
			agents, asked[agent] = append(agents, agent), true
		}
		if len(agents) == 0 {
			continue
		}
		key := PositionsKey(s.Stream, g.o.Group)
		stored, err := g.c.HMGet(ctx, key, agents...).Result()
		if err != nil {
			g.joined = false
			return fmt.Errorf("read positions: %w", err)
		}
		for i, v := range stored {
			text, found := v.(string)
			if !found || i >= len(agents) {
				continue
			}
			at, err := ParsePosition(text)
			if err != nil {
				g.joined = false
				return fmt.Errorf("field %q of %s: %w", agents[i], key, err)
			}
			g.positions.set(source{s.Stream, agents[i]}, at)
		}
	}
	return nil
}

// commit acknowledges the entries and stores the positions, all of a stream or
// nothing. When the reply is lost, the entries come again and the rule drops them.
// A server that is full gets the acknowledgement alone: what is not acknowledged
// nobody may delete, and it would stay full.
func (g *Group) commit(ctx context.Context, got []redis.XStream, at map[string]map[string]Position) error {
	stored := false
	for _, s := range got {
		ids := make([]string, len(s.Messages))
		for i := range s.Messages {
			ids[i] = s.Messages[i].ID
		}
		unsaved := g.unsaved[s.Stream]
		maps.Copy(unsaved, at[s.Stream]) // first: if the reply is lost, no older ones may be stored over these
		cmds, err := g.c.TxPipelined(ctx, func(p redis.Pipeliner) error {
			p.XAck(ctx, s.Stream, g.o.Group, ids...)
			return g.store(ctx, p, s.Stream, at[s.Stream])
		})
		switch {
		case err == nil:
			for agent := range at[s.Stream] {
				delete(unsaved, agent)
			}
			stored = true
		case full(err, cmds):
			err = g.c.XAck(ctx, s.Stream, g.o.Group, ids...).Err()
		}
		if err != nil {
			return fmt.Errorf("acknowledge entries of %s: %w", s.Stream, err)
		}
	}
	if !stored {
		return nil
	}
	return g.save(ctx)
}

// save stores the positions that no commit has stored, unless the server is full.
func (g *Group) save(ctx context.Context) error {
	for stream, at := range g.unsaved {
		if len(at) == 0 {
			continue
		}
		err := g.store(ctx, g.c, stream, at)
		if redis.IsOOMError(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("store positions of %s: %w", stream, err)
		}
		clear(at)
	}
	return nil
}

func (g *Group) store(ctx context.Context, c redis.Cmdable, stream string, at map[string]Position) error {
	if len(at) == 0 {
		return nil
	}
	fields := make([]any, 0, 2*len(at))
	for agent, to := range at {
		fields = append(fields, agent, to.String())
	}
	return c.HSet(ctx, PositionsKey(stream, g.o.Group), fields...).Err()
}

// full reports whether a transaction was refused for lack of memory. The reply to EXEC
// says so only when memory ran out after the commands were queued.
func full(err error, cmds []redis.Cmder) bool {
	return redis.IsOOMError(err) || redis.IsExecAbortError(err) && strings.Contains(err.Error(), "OOM ") ||
		slices.ContainsFunc(cmds, func(c redis.Cmder) bool { return redis.IsOOMError(c.Err()) })
}
