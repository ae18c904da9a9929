// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// shape is what one durable append consists of.
type shape struct {
	name   string
	size   int // bytes of an event; 0 for the encoder's own golden events, as they are
	events int
}

// shapes are the batches that are measured. The product's is the last: one commit of
// events as the encoder makes them.
var shapes = []shape{
	{"1 KiB x 256", 1024, 256},
	{"1 KiB x 1024", 1024, 1024},
	{"300 B x 512", 300, 512},
	{"4 KiB x 64", 4096, 64},
	{"OCSF x 84", 0, 84},
}

// goldenDir holds events as the encoder writes them, one of each kind and variant.
const goldenDir = "../sensor/ocsf/testdata"

// Every event begins with its number, so that a reader can tell a missing, doubled,
// reordered or stale one.
const (
	stampBlank = `{"n":"0123456789abcdef",`
	stampLen   = len(stampBlank)
	stampAt    = len(`{"n":"`)
)

// batch makes the events of consecutive appends. Number n, from 1, is always the same
// bytes, which are those of the golden files: their entropy is that of real events.
type batch struct {
	events [][]byte
	bytes  int
}

func newBatch(s shape) (*batch, error) {
	files, err := filepath.Glob(filepath.Join(goldenDir, "*.json"))
	if err != nil || len(files) == 0 {
		return nil, errors.Join(err, fmt.Errorf("no events in %s: run in the folder bench", goldenDir))
	}
	var golden [][]byte
	var all []byte
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := json.Compact(&b, data); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		golden = append(golden, b.Bytes()[1:])
		all = append(all, b.Bytes()[1:]...)
	}
	b := &batch{}
	for i := range s.events {
		e := []byte(stampBlank)
		if s.size == 0 {
			e = append(e, golden[i%len(golden)]...)
		} else {
			at := i * 997 % (len(all) - s.size)
			e = append(e, all[at:at+s.size-stampLen]...)
		}
		b.events = append(b.events, e)
		b.bytes += len(e)
	}
	return b, nil
}

// number makes these the events from n on.
func (b *batch) number(n uint64) [][]byte {
	for _, e := range b.events {
		var be [8]byte
		binary.BigEndian.PutUint64(be[:], n)
		hex.Encode(e[stampAt:], be[:])
		n++
	}
	return b.events
}

// check says whether e is event n, byte for byte.
func (b *batch) check(e []byte, n uint64) error {
	want := b.events[int((n-1)%uint64(len(b.events)))]
	got, err := stamp(e)
	if err != nil {
		return err
	}
	if got != n {
		return fmt.Errorf("event %d in the place of %d", got, n)
	}
	if !bytes.Equal(e[stampLen:], want[stampLen:]) {
		return fmt.Errorf("event %d has other bytes than were appended", n)
	}
	return nil
}

func stamp(e []byte) (uint64, error) {
	if len(e) < stampLen {
		return 0, fmt.Errorf("event of %d bytes", len(e))
	}
	var be [8]byte
	if _, err := hex.Decode(be[:], e[stampAt:stampAt+16]); err != nil {
		return 0, fmt.Errorf("event without a number: %w", err)
	}
	return binary.BigEndian.Uint64(be[:]), nil
}
