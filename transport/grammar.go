// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// grammar follows what a server sends, before go-redis makes anything of it. go-redis
// takes a length at its word: one reply that announces an exabyte ends the process, one
// of a gigabyte takes the host's memory.
type grammar struct {
	most limits

	skip   int    // bytes of a string that are still to come
	line   []byte // the line that was begun
	bytes  int    // of the replies to one request
	values int    // announced in arrays, likewise
	echo   int    // how much of echoes the line has shown, in a line that is an error
}

// limits are how much may come in answer to one request.
type limits struct{ bytes, text, values int }

// senderLimits are those of a Sender, who asks for little: the slots of 1,000 nodes are a
// tenth of them.
func senderLimits() limits { return limits{4 << 20, 1 << 20, 1 << 16} }

// readerLimits are those of who reads streams: what Redis itself allows in an entry.
func readerLimits() limits { return limits{math.MaxInt, 512 << 20, 1 << 24} }

// maxReplyLine bounds what goes to logs and to /status.
const maxReplyLine = 1 << 10

// echoes is what a server that does not know AUTH or HELLO says before it repeats what it
// was told: the password, which must not get into an error.
const echoes = "with args beginning with: "

// request begins to count anew.
func (g *grammar) request() { g.bytes, g.values = 0, 0 }

// check takes the next bytes of a reply. It overwrites secrets in them.
func (g *grammar) check(p []byte) error {
	if len(p) > g.most.bytes-g.bytes {
		return badReply(fmt.Sprintf("a reply of more than %d bytes", g.most.bytes))
	}
	g.bytes += len(p)
	for i := 0; i < len(p); i++ {
		if g.skip > 0 {
			n := min(g.skip, len(p)-i)
			g.skip -= n
			i += n - 1
			continue
		}
		if p[i] == '\n' {
			if err := g.end(); err != nil {
				return err
			}
			continue
		}
		if len(g.line) == maxReplyLine {
			return badReply(string(g.line))
		}
		g.line = append(g.line, p[i])
		if g.line[0] == '-' && p[i] != '\r' {
			p[i] = g.hide(p[i])
		}
	}
	return nil
}

// hide returns what may be seen of the next byte of an error.
func (g *grammar) hide(b byte) byte {
	switch {
	case g.echo == len(echoes):
		g.line[len(g.line)-1] = '*'
		return '*'
	case b == echoes[g.echo]:
		g.echo++
	case b == echoes[0]:
		g.echo = 1
	default:
		g.echo = 0
	}
	return b
}

// end takes a whole line.
func (g *grammar) end() error {
	line := strings.TrimSuffix(string(g.line), "\r")
	g.line, g.echo = g.line[:0], 0
	if line == "" {
		return badReply(line)
	}
	switch line[0] {
	case '+', '-', ':':
		return nil
	case '$', '*':
	default: // RESP3, or no Redis at all
		return badReply(line)
	}
	n, err := strconv.Atoi(line[1:])
	if err != nil || n < -1 {
		return badReply(line)
	}
	if line[0] == '$' && n >= 0 {
		if n > g.most.text {
			return badReply(fmt.Sprintf("a string of %d bytes", n))
		}
		g.skip = n + len("\r\n")
	}
	if line[0] == '*' {
		if n > g.most.values-g.values {
			return badReply(fmt.Sprintf("a list of %d values", n))
		}
		g.values += max(n, 0)
	}
	return nil
}
