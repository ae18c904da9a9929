// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/nsqio/go-diskqueue"
	"github.com/open-telemetry/opentelemetry-collector-contrib/extension/storage/filestorage"
	"github.com/prometheus/prometheus/tsdb/wlog"
	"github.com/prometheus/prometheus/util/compression"
	"github.com/tidwall/wal"
	bolt "go.etcd.io/bbolt"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/extension/xextension/storage"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/buffer"
)

// store keeps batches of events on disk, oldest first.
type store interface {
	// append returns when the whole batch is durable. It makes room by dropping the
	// oldest events, where the store can do that.
	append(events [][]byte) error
	// drain passes every event to visit, oldest first, and gives up what was visited;
	// that is durable when it returns. What visit gets is valid until it returns.
	drain(visit func(event []byte) error) error
	close() error
}

// peer is a way to keep events, as its own users would set it up for this, with the
// choice left to us always made in its favour.
type peer struct {
	name  string
	label string
	open  func(dir string, limit int64) (store, error)
	// The file that has to be on disk when append returns; by default all of them.
	durable string
}

const (
	ours     = "buffer"
	raw      = "raw"
	lastFile = "last"

	drainBatch = 16 // messages given up at once, where a store leaves that to us
)

var peers = []peer{
	{name: ours, label: "edr-sensor buffer", open: openBuffer, durable: "q.db"},
	{name: "adaptive", label: "the same, commits as in the sensor", open: openAdaptive, durable: "q.db"},
	{name: "otel", label: "OTel file_storage", open: openOTel},
	{name: "diskqueue", label: "go-diskqueue", open: openDiskqueue},
	{name: "tidwall", label: "tidwall/wal", open: openTidwall},
	{name: "wlog", label: "Prometheus wlog", open: openWlog, durable: lastFile},
	{name: "bbolt", label: "bbolt, a Put per event", open: openBolt},
	{name: raw, label: "append + fdatasync", open: openRaw},
	{name: "ring", label: "the same into a written ring", open: openRing},
}

func peerNamed(name string) (peer, error) {
	for _, p := range peers {
		if p.name == name {
			return p, nil
		}
	}
	return peer{}, fmt.Errorf("no store %q", name)
}

// pack frames a batch as one message for the stores that are fastest with that.
func pack(dst []byte, events [][]byte) []byte {
	for _, e := range events {
		dst = binary.LittleEndian.AppendUint32(dst, uint32(len(e)))
		dst = append(dst, e...)
	}
	return dst
}

func unpack(b []byte, visit func([]byte) error) error {
	for len(b) > 0 {
		if len(b) < 4 || len(b)-4 < int(binary.LittleEndian.Uint32(b)) {
			return errors.New("message ends within an event")
		}
		n := 4 + int(binary.LittleEndian.Uint32(b))
		if err := visit(b[4:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// sizes says how many of the oldest messages have to go to stay within a limit.
type sizes struct {
	limit, sum int64
	list       []int64
}

func (s *sizes) add(n int) (drop int) {
	s.list = append(s.list, int64(n))
	s.sum += int64(n)
	for s.sum > s.limit && len(s.list) > 1 {
		s.sum -= s.list[0]
		s.list = s.list[1:]
		drop++
	}
	return drop
}

// edr is the product's buffer; with flush each batch is a commit of its own.
type edr struct {
	q     *buffer.Queue
	flush bool
}

func openBuffer(dir string, limit int64) (store, error) {
	q, err := buffer.Open(context.Background(), buffer.Options{Dir: dir, Cap: limit})
	return edr{q, true}, err
}

func openAdaptive(dir string, limit int64) (store, error) {
	q, err := buffer.Open(context.Background(), buffer.Options{Dir: dir, Cap: limit})
	return edr{q, false}, err
}

func (s edr) append(events [][]byte) error {
	b := s.q.NewBatch()
	for _, e := range events {
		if err := b.End(append(b.Begin(buffer.Events), e...), false); err != nil {
			return err
		}
	}
	if err := s.q.Append(context.Background(), b); err != nil || !s.flush {
		return err
	}
	return s.q.Flush(context.Background())
}

func (s edr) settle() error { return s.q.Flush(context.Background()) }

func (s edr) drain(visit func([]byte) error) error {
	bounds := s.q.Bounds()
	recs := make([]buffer.Record, 0, 1024)
	for after := max(bounds.Acked, bounds.First-1); after < bounds.Last; {
		var err error
		if recs, err = s.q.Read(context.Background(), after, recs[:0], 1024, 1<<20); err != nil {
			return err
		}
		for i := range recs {
			if err := visit(recs[i].Data); err != nil {
				return err
			}
		}
		after = recs[len(recs)-1].Seq
		s.q.Ack(after)
	}
	return s.q.Flush(context.Background())
}

func (s edr) close() error {
	return s.q.Close(context.Background())
}

// otel does what the collector's persistent queue does with this storage: an item per
// request and the queue's metadata in one batch, each item taken and then deleted in
// a batch of its own.
type otel struct {
	c           storage.Client
	head, tail  uint64
	size        sizes
	buf         []byte
	batchOfMeta [24]byte
}

func openOTel(dir string, limit int64) (store, error) {
	f := filestorage.NewFactory()
	cfg := f.CreateDefaultConfig().(*filestorage.Config)
	cfg.Directory, cfg.FSync = dir, true
	set := extension.Settings{ID: component.NewID(f.Type())}
	set.Logger = zap.NewNop()
	ext, err := f.Create(context.Background(), set, cfg)
	if err != nil {
		return nil, err
	}
	c, err := ext.(storage.Extension).GetClient(context.Background(), component.KindExporter, component.NewID(f.Type()), "queue")
	if err != nil {
		return nil, err
	}
	s := &otel{c: c, size: sizes{limit: limit * 9 / 10}}
	meta, err := c.Get(context.Background(), "qmv0")
	if len(meta) == 24 {
		s.head, s.tail = binary.LittleEndian.Uint64(meta), binary.LittleEndian.Uint64(meta[8:])
	}
	return s, err
}

func (s *otel) key(i uint64) string { return fmt.Sprint(i) }

func (s *otel) meta() *storage.Operation {
	binary.LittleEndian.PutUint64(s.batchOfMeta[:], s.head)
	binary.LittleEndian.PutUint64(s.batchOfMeta[8:], s.tail)
	return storage.SetOperation("qmv0", s.batchOfMeta[:])
}

func (s *otel) append(events [][]byte) error {
	s.buf = pack(s.buf[:0], events)
	ops := []*storage.Operation{nil, storage.SetOperation(s.key(s.tail), s.buf)}
	for range s.size.add(len(s.buf)) {
		ops = append(ops, storage.DeleteOperation(s.key(s.head)))
		s.head++
	}
	s.tail++
	ops[0] = s.meta()
	return s.c.Batch(context.Background(), ops...)
}

func (s *otel) drain(visit func([]byte) error) error {
	for ; s.head < s.tail; s.head++ {
		get := storage.GetOperation(s.key(s.head))
		if err := s.c.Batch(context.Background(), s.meta(), get); err != nil {
			return err
		}
		if err := unpack(get.Value, visit); err != nil {
			return err
		}
		if err := s.c.Batch(context.Background(), s.meta(), storage.DeleteOperation(s.key(s.head))); err != nil {
			return err
		}
	}
	return s.c.Batch(context.Background(), s.meta())
}

func (s *otel) close() error { return s.c.Close(context.Background()) }

// dq is go-diskqueue, a message per batch. It has no limit, and no way to drop the
// oldest but to read them, which is left out.
type dq struct {
	q   diskqueue.Interface
	buf []byte
}

func openDiskqueue(dir string, _ int64) (store, error) {
	return &dq{q: diskqueue.New("q", dir, 16<<20, 1, 16<<20, 1, time.Hour, func(diskqueue.LogLevel, string, ...any) {})}, nil
}

func (s *dq) append(events [][]byte) error {
	s.buf = pack(s.buf[:0], events)
	if err := s.q.Put(s.buf); err != nil {
		return err
	}
	s.q.Depth() // answered only after the sync that Put left to the next round of its loop
	return nil
}

func (s *dq) drain(visit func([]byte) error) error {
	for n := s.q.Depth(); n > 0; n-- {
		if err := unpack(<-s.q.ReadChan(), visit); err != nil {
			return err
		}
	}
	return nil
}

func (s *dq) close() error { return s.q.Close() }

// tidwall is tidwall/wal, an entry per batch.
type tidwall struct {
	l    *wal.Log
	next uint64
	size sizes
	drop int
	buf  []byte
}

func openTidwall(dir string, limit int64) (store, error) {
	o := *wal.DefaultOptions
	o.NoCopy = true
	l, err := wal.Open(dir, &o)
	if err != nil {
		return nil, err
	}
	last, err := l.LastIndex()
	return &tidwall{l: l, next: last + 1, size: sizes{limit: limit * 6 / 10}}, err
}

// append drops a segment's worth at a time: TruncateFront rewrites a segment.
func (s *tidwall) append(events [][]byte) error {
	s.buf = pack(s.buf[:0], events)
	if err := s.l.Write(s.next, s.buf); err != nil {
		return err
	}
	s.next++
	if s.drop += s.size.add(len(s.buf)); s.drop*len(s.buf) < wal.DefaultOptions.SegmentSize {
		return nil
	}
	first, err := s.l.FirstIndex()
	if err == nil {
		err = s.l.TruncateFront(first + uint64(s.drop))
	}
	s.drop = 0
	return err
}

func (s *tidwall) drain(visit func([]byte) error) error {
	first, err := s.l.FirstIndex()
	if err != nil {
		return err
	}
	for i := first; i < s.next; i++ {
		b, err := s.l.Read(i)
		if err != nil {
			return err
		}
		if err := unpack(b, visit); err != nil {
			return err
		}
		if (i-first)%64 == 63 {
			if err := s.l.TruncateFront(i); err != nil {
				return err
			}
		}
	}
	return s.l.TruncateFront(s.next - 1)
}

func (s *tidwall) close() error { return s.l.Close() }

// prom is the log of Prometheus, a record per batch. It has no acknowledgement but
// the removal of whole segments.
type prom struct {
	w    *wlog.WL
	size sizes
	buf  []byte
}

const segment = 16 << 20

func openWlog(dir string, limit int64) (store, error) {
	w, err := wlog.NewSize(nil, nil, dir, segment, compression.None)
	return &prom{w: w, size: sizes{limit: limit*9/10 - segment}}, err
}

func (s *prom) append(events [][]byte) error {
	s.buf = pack(s.buf[:0], events)
	if err := s.w.Log(s.buf); err != nil {
		return err
	}
	if err := s.w.Sync(); err != nil {
		return err
	}
	if s.size.add(len(s.buf)) == 0 {
		return nil
	}
	first, last, err := wlog.Segments(s.w.Dir())
	if keep := int(s.size.sum/segment) + 1; err == nil && last-first > keep {
		err = s.w.Truncate(last - keep)
	}
	return err
}

func (s *prom) drain(visit func([]byte) error) error {
	_, last, err := wlog.Segments(s.w.Dir())
	if err != nil {
		return err
	}
	f, err := wlog.NewSegmentsReader(s.w.Dir())
	if err != nil {
		return err
	}
	defer f.Close()
	r := wlog.NewReader(f)
	for r.Next() {
		if err := unpack(r.Record(), visit); err != nil {
			return err
		}
	}
	return errors.Join(r.Err(), s.w.Truncate(last))
}

func (s *prom) close() error { return s.w.Close() }

// perEvent is bbolt with a Put per event and a transaction per batch.
type perEvent struct {
	db   *bolt.DB
	next uint64
	size sizes
	per  []int // events of the batches that size knows
}

var eventsBucket = []byte("events")

func openBolt(dir string, limit int64) (store, error) {
	db, err := bolt.Open(filepath.Join(dir, "events.db"), 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	s := &perEvent{db: db, size: sizes{limit: limit * 6 / 10}}
	return s, db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(eventsBucket)
		if err == nil {
			s.next = b.Sequence()
		}
		return err
	})
}

func (s *perEvent) append(events [][]byte) error {
	n := 0
	for _, e := range events {
		n += len(e)
	}
	s.per = append(s.per, len(events))
	gone := 0
	for range s.size.add(n) {
		gone += s.per[0]
		s.per = s.per[1:]
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(eventsBucket)
		b.FillPercent = 1
		if err := deleteFirst(b, gone); err != nil {
			return err
		}
		for _, e := range events {
			s.next++
			if err := b.Put(binary.BigEndian.AppendUint64(nil, s.next), e); err != nil {
				return err
			}
		}
		return b.SetSequence(s.next)
	})
}

func deleteFirst(b *bolt.Bucket, n int) error {
	var keys [][]byte
	c := b.Cursor()
	for k, _ := c.First(); k != nil && len(keys) < n; k, _ = c.Next() {
		keys = append(keys, k)
	}
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

func (s *perEvent) drain(visit func([]byte) error) error {
	for n := -1; n != 0; {
		err := s.db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket(eventsBucket)
			c := b.Cursor()
			n = 0
			for k, v := c.First(); k != nil && n < drainBatch*256; k, v = c.Next() {
				if err := visit(v); err != nil {
					return err
				}
				n++
			}
			return deleteFirst(b, n)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *perEvent) close() error { return s.db.Close() }

// file is the floor: no recovery, no bound but the ring's own, no format.
type file struct {
	f     *os.File
	limit int64 // of the ring, 0 for a file that grows
	at    int64
	buf   []byte
}

func openRaw(dir string, _ int64) (store, error) {
	f, err := os.OpenFile(filepath.Join(dir, "raw"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	at, err := f.Seek(0, io.SeekEnd)
	return &file{f: f, at: at}, err
}

// openRing fills the ring first, so that no block is new when it is measured.
func openRing(dir string, limit int64) (store, error) {
	f, err := os.OpenFile(filepath.Join(dir, "ring"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	s := &file{f: f, limit: limit}
	if st, err := f.Stat(); err != nil || st.Size() == limit {
		return s, err
	}
	for at := int64(0); at < limit; at += 1 << 20 {
		if _, err := f.WriteAt(make([]byte, min(1<<20, limit-at)), at); err != nil {
			return nil, err
		}
	}
	return s, f.Sync()
}

func (s *file) append(events [][]byte) error {
	s.buf = binary.LittleEndian.AppendUint32(s.buf[:0], 0)
	s.buf = pack(s.buf, events)
	binary.LittleEndian.PutUint32(s.buf, uint32(len(s.buf)-4))
	if s.limit > 0 && s.at+int64(len(s.buf)) > s.limit {
		s.at = 0
	}
	if _, err := s.f.WriteAt(s.buf, s.at); err != nil {
		return err
	}
	s.at += int64(len(s.buf))
	return unix.Fdatasync(int(s.f.Fd()))
}

// drain of a ring begins at its start: it has no memory of where it ended, so only one
// that has not wrapped can be read.
func (s *file) drain(visit func([]byte) error) error {
	r := io.NewSectionReader(s.f, 0, 1<<62)
	for {
		var head [4]byte
		_, err := io.ReadFull(r, head[:])
		n := binary.LittleEndian.Uint32(head[:])
		if errors.Is(err, io.EOF) || n == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		if cap(s.buf) < int(n) {
			s.buf = make([]byte, n)
		}
		if _, err := io.ReadFull(r, s.buf[:n]); err != nil {
			return err
		}
		if err := unpack(s.buf[:n], visit); err != nil {
			return err
		}
	}
}

func (s *file) close() error { return s.f.Close() }
