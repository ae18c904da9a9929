// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// What preflight has found sound may be damaged when bbolt reads it later, and the first page
// of a chunk of a file that was closed is not looked at before. bbolt reads these pages when
// it deletes a chunk, and all pages, in a goroutine in which a panic ends the process, when it
// has to find out which are free because a transaction has failed. So here each page is
// read before. All that bbolt reads of a chunk is known from the tree: where that is not what
// is there, it is written. The records come by their own checksum, whatever is in front of them.

// transact runs fn in a transaction of bbolt. A panic leaves the handle as it is, and of no
// use: to roll back would be to read a tree that is damaged.
func (w *writer) transact(fn func(tx *bolt.Tx) error) error {
	tx, err := w.db.Begin(true)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		return errors.Join(err, tx.Rollback()) // forgets what fn did, and reads nothing
	}
	if l, ok := w.db.Logger().(*failure); ok {
		l.first = w.readable
		defer func() { l.first = nil }()
	}
	return tx.Commit()
}

// failure is a logger: what bbolt has to say of a commit that fails, it says before
// it rolls back, and nothing else tells in time.
type failure struct {
	first func() // called once
}

func (l *failure) Errorf(string, ...any) {
	if f := l.first; f != nil {
		l.first = nil
		f()
	}
}

func (l *failure) Error(...any)            { l.Errorf("") }
func (l *failure) Debug(...any)            {}
func (l *failure) Debugf(string, ...any)   {}
func (l *failure) Info(...any)             {}
func (l *failure) Infof(string, ...any)    {}
func (l *failure) Warning(...any)          {}
func (l *failure) Warningf(string, ...any) {}
func (l *failure) Fatal(...any)            {}
func (l *failure) Fatalf(string, ...any)   {}
func (l *failure) Panic(...any)            {}
func (l *failure) Panicf(string, ...any)   {}

// readable has bbolt survive to read the whole file, or panics.
func (w *writer) readable() {
	m, err := w.seal.meta()
	if err == nil {
		err = m.walk(w.q.o.reads(w.seal.f), func(e *entry) error { return w.mend(e, false) })
	}
	if err != nil {
		panic(err)
	}
}

// mend has bbolt find what it expects in the first page of chunk e. Of one that leaves with
// the transaction the disk need not yield what it held.
func (w *writer) mend(e *entry, leaves bool) error {
	q := w.q
	p, at := make([]byte, leafHeader), int64(e.root)*pageSize
	if _, err := q.o.reads(w.seal.f).ReadAt(p, at); err == nil {
		if _, err := leafSize(p, e); err == nil {
			return nil
		}
	} else if !leaves {
		return err
	} else {
		p = make([]byte, pageSize) // to write a part of a page is to read it
	}
	q.mu.Lock()
	if !slices.ContainsFunc(q.damaged, func(d damage) bool { return d.first == e.first }) {
		q.metrics.corruptChunks.Inc()
		q.keep(e)
	}
	q.mu.Unlock()
	putLeaf(p, e)
	_, err := w.seal.f.WriteAt(p, at)
	return err
}
