// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"strconv"
	"strings"
	"time"
)

// identify finds what an entry shows outside its data: metadata.uid as the id
// and the event's time in ISO 8601 as the timestamp, from time_dt or else from time.
// millis is time itself, if it stands before what ended the walk.
// The slices point into data, except a timestamp made from time. What is missing
// or not plain (an escape sequence) comes back nil.
//
// It walks the record once, skipping values, and stops when both are found: no
// reflection, and no allocation when time_dt is there. It does not validate JSON; on a malformed record
// it returns what it found before the defect.
func identify(data []byte) (id, timestamp []byte, millis int64) {
	c := cursor{data: data}
	if !c.next('{') {
		return nil, nil, 0
	}
	for (id == nil || timestamp == nil) && !c.next('}') {
		key, isKey := c.text()
		if !isKey || !c.next(':') {
			break
		}
		switch string(key) {
		case "metadata":
			id = c.uid()
		case "time_dt":
			timestamp = c.plain()
		case "time":
			millis = c.integer()
		default:
			c.skip()
		}
		c.next(',')
	}
	if timestamp == nil && millis > 0 {
		timestamp = appendTime(nil, time.UnixMilli(millis))
	}
	return id, timestamp, millis
}

func appendTime(dst []byte, t time.Time) []byte {
	return t.UTC().AppendFormat(dst, "2006-01-02T15:04:05.000Z")
}

// cursor walks JSON. All methods skip white space before what they look for.
type cursor struct {
	data []byte
	i    int
}

// next consumes c if it comes next.
func (c *cursor) next(want byte) bool {
	c.space()
	if c.i < len(c.data) && c.data[c.i] == want {
		c.i++
		return true
	}
	return false
}

func (c *cursor) space() {
	for c.i < len(c.data) && c.data[c.i] <= ' ' {
		c.i++
	}
}

// text consumes a string and returns it as it stands between the quotes.
func (c *cursor) text() (s []byte, found bool) {
	if !c.next('"') {
		return nil, false
	}
	start := c.i
	for {
		n := bytes.IndexByte(c.data[c.i:], '"')
		if n < 0 {
			c.i = len(c.data)
			return nil, false
		}
		c.i += n + 1
		// A quote is escaped when an odd number of backslashes precede it.
		k := c.i - 2
		for k >= start && c.data[k] == '\\' {
			k--
		}
		if (c.i-2-k)%2 == 0 {
			return c.data[start : c.i-1], true
		}
	}
}

// plain consumes a value and returns it if it is a non-empty string without
// escape sequences.
func (c *cursor) plain() []byte {
	start := c.i
	s, found := c.text()
	if !found {
		c.i = start
		c.skip()
		return nil
	}
	if len(s) == 0 || bytes.IndexByte(s, '\\') >= 0 {
		return nil
	}
	return s
}

// integer consumes a value and returns it if it is an integer, else 0.
func (c *cursor) integer() int64 {
	c.space()
	start := c.i
	c.skip()
	n, err := strconv.ParseInt(string(c.data[start:c.i]), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// uid consumes an object and returns its own member uid.
func (c *cursor) uid() (id []byte) {
	start := c.i
	if !c.next('{') {
		c.i = start
		c.skip()
		return nil
	}
	for !c.next('}') {
		key, isKey := c.text()
		if !isKey || !c.next(':') {
			return id
		}
		if string(key) == "uid" {
			id = c.plain()
		} else {
			c.skip()
		}
		c.next(',')
	}
	return id
}

// skip consumes one value of any kind. It makes progress unless at the end or
// at a closing bracket.
func (c *cursor) skip() {
	for depth := 0; c.i < len(c.data); {
		switch c.data[c.i] {
		case '"':
			c.text()
		case '{', '[':
			depth++
			c.i++
			continue
		case '}', ']':
			if depth == 0 {
				return
			}
			depth--
			c.i++
		case ',', ':', ' ', '\t', '\n', '\r':
			c.i++
			continue
		default: // number, true, false, null
			for c.i < len(c.data) && strings.IndexByte(",:]} \t\n\r\"{[", c.data[c.i]) < 0 {
				c.i++
			}
		}
		if depth == 0 {
			return
		}
	}
}
