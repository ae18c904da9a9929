// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	redislog "github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/transport"
	"github.com/aurorasoc/edr-sensor/transport/consumer"
)

// newRedis makes a client for reading: no connection yet.
func newRedis(t config.Transport) (*redis.Client, error) {
	redislog.Disable() // errors are returned; the library would print them too
	o := &redis.Options{
		Addr: t.Address, Username: t.Username, DB: t.DB,
		Protocol: 2, MaxRetries: -1, ContextTimeoutEnabled: true, DialTimeout: 5 * time.Second, DialerRetries: 1,
		ReadTimeout: t.Timeout, WriteTimeout: t.Timeout, PoolSize: 1, PipelinePoolSize: -1, DisableIdentity: true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	var err error
	if t.PasswordFile != "" {
		if o.Password, err = readSecret(t.PasswordFile); err != nil {
			return nil, fmt.Errorf("transport.password_file: %w", err)
		}
	}
	if _, err := agent.ClientTLS(t.TLS); err != nil {
		return nil, fmt.Errorf("transport.tls: %w", err)
	}
	to := agent.Destination(t, "reader")
	o.Dialer = func(ctx context.Context, _, _ string) (net.Conn, error) { return transport.Dial(ctx, to) }
	return redis.NewClient(o), nil
}

// explainRedis says what to do about an error of the server or on the way to it.
func explainRedis(t config.Transport, err error) error {
	text := fmt.Errorf("redis at %s: %w", t.Address, err)
	switch {
	case redis.IsAuthError(err), strings.Contains(err.Error(), "invalid password"), strings.Contains(err.Error(), "without any password"),
		strings.Contains(err.Error(), "unauthenticated"): // said of a command of many words
		return &exit{exitFailure, text, "check transport.username and transport.password_file"}
	case redis.IsPermissionError(err):
		return &exit{exitFailure, text, "use --tap, or a Redis user that may XREAD and XREVRANGE the streams"}
	case isReply(err):
		return &exit{exitFailure, text, "edr-sensor doctor"}
	}
	return &exit{exitUnavailable, text, "edr-sensor doctor, or read from the sensor itself with --tap"}
}

// isReply tells an answer of the server from a failure to get one.
func isReply(err error) bool {
	var re redis.Error
	return errors.As(err, &re)
}

// streams reads the events and the decisions of a Redis server in the order in
// which they arrived there.
type streams struct {
	client  redis.UniversalClient
	keys    []string
	last    map[string]string // id of the last entry seen, by key
	decoder *consumer.Decoder
	seen    *consumer.Positions
	recs    []consumer.Record
}

// rememberAgents is of how many agents a view knows what it has shown.
const rememberAgents = 1 << 16

// openStreams starts after the entries that are there when since is nil, else
// at that time.
func openStreams(ctx context.Context, client redis.UniversalClient, keys []string, since *time.Time) (*streams, error) {
	decoder, err := consumer.NewDecoder(consumer.Limits{})
	if err != nil {
		return nil, err
	}
	s := &streams{client: client, keys: keys, last: map[string]string{}, decoder: decoder, seen: consumer.NewPositions(rememberAgents)}
	for _, key := range s.keys {
		switch {
		case since == nil:
			// Asked for once: "$" would skip what arrives between two reads.
			newest, err := client.XRevRangeN(ctx, key, "+", "-", 1).Result()
			if err != nil {
				return nil, err
			}
			s.last[key] = "0-0"
			if len(newest) > 0 {
				s.last[key] = newest[0].ID
			}
		case since.UnixMilli() <= 0:
			s.last[key] = "0-0"
		default:
			// XREAD is exclusive: the last id of the millisecond before.
			s.last[key] = fmt.Sprintf("%d-%d", since.UnixMilli()-1, uint64(math.MaxUint64))
		}
	}
	return s, nil
}

const readCount = 512 // entries of each stream at a time

// next returns the entries that come next, waiting for one if wait is positive;
// none means that there are none.
func (s *streams) next(ctx context.Context, wait time.Duration) ([]streamEntry, error) {
	if wait <= 0 {
		wait = -1 // go-redis: do not block
	}
	args := slices.Clone(s.keys)
	for _, key := range s.keys {
		args = append(args, s.last[key])
	}
	reply, err := s.client.XRead(ctx, &redis.XReadArgs{Streams: args, Count: readCount, Block: wait}).Result()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return s.merge(reply), nil
}

// merge orders the entries of the streams by their ids. When one stream
// returned as much as was asked for, entries of the others that are newer than
// its last one wait for the next read: more older ones may follow.
func (s *streams) merge(reply []redis.XStream) []streamEntry {
	var all []streamEntry
	limit := streamID{math.MaxUint64, math.MaxUint64}
	for _, st := range reply {
		for _, m := range st.Messages {
			all = append(all, streamEntry{st.Stream, parseID(m.ID), m})
		}
		if n := len(st.Messages); n >= readCount {
			if last := parseID(st.Messages[n-1].ID); last.compare(limit) < 0 {
				limit = last
			}
		}
	}
	slices.SortStableFunc(all, func(a, b streamEntry) int { return a.id.compare(b.id) })
	for i, it := range all {
		if it.id.compare(limit) > 0 {
			return all[:i]
		}
		s.last[it.key] = it.msg.ID
	}
	return all
}

// streamEntry is one entry, of either encoding.
type streamEntry struct {
	key string
	id  streamID
	msg redis.XMessage
}

// records returns what an entry holds, without what was seen before. It is valid
// until the next call.
func (s *streams) records(e streamEntry) ([]consumer.Record, error) {
	recs, err := s.decoder.Decode(e.key, e.msg, s.recs[:0])
	if err != nil {
		return nil, err
	}
	s.recs = recs
	fresh := recs[:0]
	for i := range recs {
		if s.seen.Fresh(&recs[i]) {
			fresh = append(fresh, recs[i])
		}
	}
	return fresh, nil
}

// streamID is the id of an entry: milliseconds and a counter.
type streamID struct{ ms, n uint64 }

func parseID(s string) streamID {
	ms, n, _ := strings.Cut(s, "-")
	var id streamID
	id.ms, _ = strconv.ParseUint(ms, 10, 64)
	id.n, _ = strconv.ParseUint(n, 10, 64)
	return id
}

func (a streamID) compare(b streamID) int {
	if a.ms != b.ms {
		if a.ms < b.ms {
			return -1
		}
		return 1
	}
	switch {
	case a.n < b.n:
		return -1
	case a.n > b.n:
		return 1
	}
	return 0
}
