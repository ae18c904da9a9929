// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// head is what a record says about itself that is worth selecting by.
type head struct {
	seq  uint64 // metadata.sequence
	code string // metadata.event_code
	tags []byte // metadata.tags as it stands, nil without
	at   []byte // time_dt as it stands
}

// readHead finds the members of head in a record without reading all of it: the
// sensor writes them first, so the walk ends early. It takes any JSON object, members
// in any order, and is false for what is none.
func readHead(rec []byte) (h head, ok bool) {
	c := scanner{b: rec}
	var metadata bool
	ok = c.object(func(key []byte) bool {
		switch string(key) {
		case `metadata`:
			metadata = true
			return c.object(func(key []byte) bool {
				switch string(key) {
				case `sequence`:
					h.seq = c.uint()
				case `event_code`:
					h.code = unquoted(c.text())
				case `tags`:
					h.tags = c.value()
				default:
					c.value()
				}
				return true
			})
		case `time_dt`:
			h.at = c.text()
		default:
			c.value()
		}
		return !metadata || h.at == nil
	})
	return h, ok && metadata && h.code != ""
}

// time is when the event was.
func (h *head) time() (time.Time, bool) {
	t, err := time.Parse(time.RFC3339Nano, string(h.at))
	return t, err == nil
}

// tagged tells whether a tag of that name has one of the values.
func (h *head) tagged(name string, values []string) (found bool) {
	if h.tags == nil {
		return false
	}
	c := scanner{b: h.tags}
	c.array(func() bool {
		var n, v string
		c.object(func(key []byte) bool {
			switch string(key) {
			case `name`:
				n = unquoted(c.text())
			case `value`:
				v = unquoted(c.text())
			default:
				c.value()
			}
			return true
		})
		if n == name {
			for _, want := range values {
				found = found || v == want
			}
		}
		return !found
	})
	return found
}

// unquoted is the text of a JSON string, given without its quotes.
func unquoted(raw []byte) string {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw)
	}
	var s string
	_ = json.Unmarshal(append(append([]byte{'"'}, raw...), '"'), &s) // empty then, as nothing is
	return s
}

// scanner walks over JSON. Once something is not what it has to be it is bad, and
// yields nothing any more.
type scanner struct {
	b   []byte
	bad bool
}

func (c *scanner) space() {
	for len(c.b) > 0 && (c.b[0] == ' ' || c.b[0] == '\t' || c.b[0] == '\n' || c.b[0] == '\r') {
		c.b = c.b[1:]
	}
}

// take takes one character, if it is next.
func (c *scanner) take(want byte) bool {
	c.space()
	if c.bad || len(c.b) == 0 || c.b[0] != want {
		return false
	}
	c.b = c.b[1:]
	return true
}

func (c *scanner) need(want byte) {
	if !c.take(want) {
		c.bad = true
	}
}

// object calls member with each key, to take the value that follows, until it returns
// false.
func (c *scanner) object(member func(key []byte) bool) bool {
	c.need('{')
	if c.take('}') {
		return !c.bad
	}
	for !c.bad {
		key := c.text()
		c.need(':')
		if c.bad || !member(key) || c.bad {
			break
		}
		if c.take('}') {
			break
		}
		c.need(',')
	}
	return !c.bad
}

// array calls item to take each item, until it returns false.
func (c *scanner) array(item func() bool) {
	c.need('[')
	if c.take(']') {
		return
	}
	for !c.bad && item() && !c.bad {
		if c.take(']') {
			return
		}
		c.need(',')
	}
}

// text takes a string and returns it as it stands, without its quotes.
func (c *scanner) text() []byte {
	c.need('"')
	for i := 0; !c.bad; i++ {
		n := bytes.IndexByte(c.b[i:], '"')
		if n < 0 {
			break
		}
		i += n
		slashes := 0
		for j := i; j > 0 && c.b[j-1] == '\\'; j-- {
			slashes++
		}
		if slashes%2 == 0 {
			s := c.b[:i:i]
			c.b = c.b[i+1:]
			return s
		}
	}
	c.bad = true
	return nil
}

func (c *scanner) uint() uint64 {
	n, err := strconv.ParseUint(string(c.value()), 10, 64)
	c.bad = c.bad || err != nil
	return n
}

// value takes any value and returns it as it stands.
func (c *scanner) value() []byte {
	c.space()
	start := c.b
	for depth := 0; !c.bad; {
		c.space()
		if len(c.b) == 0 {
			break
		}
		switch c.b[0] {
		case '"':
			c.text()
		case '{', '[':
			depth++
			c.b = c.b[1:]
		case '}', ']':
			depth--
			c.b = c.b[1:]
		case ',', ':':
			c.b = c.b[1:]
			if depth == 0 {
				c.bad = true
			}
		default: // a number or a word
			n := bytes.IndexAny(c.b, " \t\r\n,:\"{}[]")
			if n < 0 {
				n = len(c.b)
			}
			c.b = c.b[n:]
		}
		if depth == 0 && !c.bad {
			return start[:len(start)-len(c.b)]
		}
		if depth < 0 {
			break
		}
	}
	c.bad = true
	return nil
}
