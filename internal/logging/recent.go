// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bytes"
	"sync"

	"go.uber.org/zap/zapcore"
)

// How much is remembered. Warnings have a room of their own, so that nothing less
// drives them out.
const (
	recentLines    = 256
	recentWarnings = 32
	recentBytes    = 2048 // of a line; a longer one is remembered without its own fields
)

// memory keeps the newest lines as JSON, for who asks a sensor whose log nobody kept.
type memory struct {
	enc  zapcore.Encoder // with what is bound
	kept *kept
}

type kept struct {
	mu            sync.Mutex
	all, warnings []string // oldest first
}

func newMemory() *memory { return &memory{jsonEncoder(false), &kept{}} }

func (m *memory) with(fields []zapcore.Field) *memory {
	enc := m.enc.Clone()
	for i := range fields {
		fields[i].AddTo(enc)
	}
	return &memory{enc, m.kept}
}

func (m *memory) write(e zapcore.Entry, fields []zapcore.Field) {
	line, err := m.enc.EncodeEntry(e, fields)
	if err == nil && line.Len() > recentBytes {
		line.Free()
		e.Message = e.Message[:min(len(e.Message), recentBytes/4)]
		line, err = m.enc.EncodeEntry(e, nil)
	}
	if err != nil {
		return // it was written, or counted, where lines go
	}
	defer line.Free()
	m.kept.add(string(bytes.TrimSuffix(line.Bytes(), []byte{'\n'})), e.Level >= zapcore.WarnLevel)
}

func (k *kept) add(line string, warning bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	push := func(list []string, limit int) []string {
		if len(list) == limit {
			copy(list, list[1:])
			list = list[:limit-1]
		}
		return append(list, line)
	}
	k.all = push(k.all, recentLines)
	if warning {
		k.warnings = push(k.warnings, recentWarnings)
	}
}

// Recent returns the newest lines as they are written as JSON, oldest first: all that
// are remembered, or the warnings and errors among them, of which older ones are.
func (l *Log) Recent(warnings bool) []string {
	if l.memory == nil {
		return nil
	}
	k := l.memory.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	from := k.all
	if warnings {
		from = k.warnings
	}
	return append([]string(nil), from...)
}
