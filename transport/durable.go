// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// Ack says when a record counts as delivered, so that the buffer need not keep it.
type Ack string

// The levels. What the server has, and has not confirmed in this way, is neither
// sent again nor forgotten.
const (
	// AckReply: the server has replied. What it loses of that, in a crash or a
	// failover, is sent again as long as the buffer retains it.
	AckReply Ack = "reply"
	// AckReplica: a replica has it, too.
	AckReplica Ack = "replica"
	// AckFsync: it is in the server's append-only file and that is on disk. Needs
	// Redis 7.2.
	AckFsync Ack = "fsync"
)

const (
	replicaWait        = 200 * time.Millisecond // for a replica that keeps up
	replicaRetry       = 5 * time.Millisecond   // for one that did not: a batch must not wait for it each time
	confirmInterval    = time.Second
	fsyncWait          = 2 * time.Second
	unconfirmedTooLong = 10 * time.Second
)

// settle finds out how much of what the server has is safe, and acknowledges it.
func (s *Sender) settle(ctx context.Context) error {
	switch {
	case s.o.Ack == AckReply:
		s.confirm(s.pos)
	case s.o.Ack == AckFsync:
		if err := s.syncer.err(); err != nil {
			return fmt.Errorf("confirm: %w", err)
		}
		s.confirm(s.syncer.reach(s.pos))
	case s.pos > s.acked:
		wait := replicaWait
		if !s.short1st.IsZero() {
			wait = replicaRetry
		}
		// It covers what earlier connections wrote: the hello of this one was a write.
		n, err := s.conn.redis.Wait(ctx, 1, wait).Result()
		switch {
		case err != nil:
			return fmt.Errorf("confirm: %w", unconfirmable(err))
		case n >= 1:
			s.short1st = time.Time{}
			s.confirm(s.pos)
		case s.short1st.IsZero():
			s.short1st = time.Now()
		}
	}
	return nil
}

// confirm acknowledges up to seq.
func (s *Sender) confirm(seq uint64) {
	if seq > s.acked {
		s.acked = seq
		s.lastAcked.Store(seq)
		s.q.Ack(seq)
	}
}

// unconfirmable names the class of a server that cannot confirm.
func unconfirmable(err error) error {
	if re, said := errors.AsType[redis.Error](err); said {
		m := strings.ToLower(re.Error())
		switch {
		case strings.Contains(m, "replica instances"):
			return &classError{ClassReadOnly, err}
		case strings.Contains(m, "unknown command"), strings.Contains(m, "appendonly is disabled"):
			return &classError{ClassDurability, err}
		}
	}
	return err
}

// syncer waits for the disk of the server, on a connection of its own because that
// takes up to a second. Replication offsets are the server's: what was replied
// before the heartbeat was written is on disk when that is.
type syncer struct {
	failed atomic.Pointer[error]
	conn   *conn

	mu               sync.Mutex
	replied, durable uint64
	rewinds          int

	cancel context.CancelFunc
	done   chan struct{}
}

// startSyncer begins to confirm what the server at s.node has.
func (s *Sender) startSyncer(ctx context.Context) error {
	c, err := dial(ctx, &s.o, s.node, login{s.o.Username, s.o.PasswordFile}, s.o.DB)
	if err != nil {
		return err
	}
	// Drain needs what it confirms, after the context of Run has ended: stop ends it.
	lasting, cancel := context.WithCancel(context.WithoutCancel(ctx))
	y := &syncer{conn: c, cancel: cancel, done: make(chan struct{})}
	s.syncer = y
	beats := s.o.Prefix + ":{" + s.o.Shard + "}:beats"
	// At once, so that a server that cannot do it is found before records rely on it.
	if err := y.sync(ctx, beats, s.o.AgentID); err != nil {
		close(y.done)
		return err
	}
	go y.run(lasting, beats, s.o.AgentID)
	return nil
}

func (y *syncer) run(ctx context.Context, beats, agent string) {
	defer close(y.done)
	for ctx.Err() == nil {
		if y.behind() {
			if err := y.sync(ctx, beats, agent); err != nil {
				y.failed.Store(&err)
				return
			}
		}
		sleep(ctx, jitter(confirmInterval))
	}
}

// reach says up to where the server has replied, and returns up to where that is on disk.
func (y *syncer) reach(seq uint64) uint64 {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.replied = seq
	return min(y.durable, seq)
}

// rewind is for a server that has less than it had replied: what is sent again is not on
// disk because what it replaces was, nor by a heartbeat that was written before.
func (y *syncer) rewind(last uint64) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.replied, y.durable = min(y.replied, last), min(y.durable, last)
	y.rewinds++
}

func (y *syncer) behind() bool {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.replied > y.durable
}

// sync writes a heartbeat and waits until that is on disk.
func (y *syncer) sync(ctx context.Context, beats, agent string) error {
	y.mu.Lock()
	seq, rewinds := y.replied, y.rewinds
	y.mu.Unlock()
	if err := y.conn.redis.HSet(ctx, beats, agent, seq).Err(); err != nil {
		return err
	}
	got, err := y.conn.redis.WaitAOF(ctx, 1, 0, fsyncWait).Result()
	if err != nil {
		return unconfirmable(err)
	}
	if len(got) == 2 && got[0] >= 1 { // fewer is no error
		y.mu.Lock()
		defer y.mu.Unlock()
		if y.rewinds == rewinds {
			y.durable = max(seq, y.durable)
		}
	}
	return nil
}

func (y *syncer) err() error {
	if err := y.failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (y *syncer) stop() {
	y.cancel()
	y.conn.net.Close() // what waits for the disk returns
	<-y.done
	y.conn.close()
}
