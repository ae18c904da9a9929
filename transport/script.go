// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

//go:embed deliver.lua
var deliverSource string

// deliverSHA names the script in EVALSHA: SHA-1 is what Redis uses, not a
// security measure.
func deliverSHA() string {
	sum := sha1.Sum([]byte(deliverSource))
	return hex.EncodeToString(sum[:])
}

// The flags of a call, see deliver.lua.
const (
	flagHello    = "H"
	flagContinue = "C"
	flagProbe    = "P"
	flagWrite    = "W"
)

// verdict is the first word of the script's reply.
type verdict string

const (
	ok      verdict = "OK"
	dup     verdict = "DUP"
	gap     verdict = "GAP"
	overlap verdict = "OVERLAP"
	fenced  verdict = "FENCED"
)

// label is the verdict as a metric label.
func (v verdict) label() string { return strings.ToLower(string(v)) }

// reply is the script's answer.
type reply struct {
	verdict verdict
	last    uint64 // all but fenced: highest seq the server has of our epoch
	epoch   string // fenced: whose
	session string // fenced: whose; ok to a hello: the one replaced, "" when none
}

const (
	epochLen   = 20      // hex digits
	processLen = 20      // the process's part of a session
	sessionLen = 24      // with the connection's part
	maxSeq     = 1 << 53 // Lua numbers are doubles
)

var errReply = errors.New("answer outside protocol edr/1")

// parseReply accepts exactly what deliver.lua can say and nothing else.
func parseReply(flag, text string) (reply, error) {
	word, rest, _ := strings.Cut(text, " ")
	r := reply{verdict: verdict(word)}
	arg, more, two := strings.Cut(rest, " ")
	switch {
	case r.verdict == fenced:
		if !two || !isHex(arg, epochLen) || !isHex(more, sessionLen) {
			return reply{}, badReply(text)
		}
		r.epoch, r.session = arg, more
		return r, nil
	case r.verdict == ok && flag == flagHello:
		if more != "-" && !isHex(more, sessionLen) {
			return reply{}, badReply(text)
		}
		if more != "-" {
			r.session = more
		}
	case r.verdict == ok:
		if two {
			return reply{}, badReply(text)
		}
	case r.verdict == dup, r.verdict == gap, r.verdict == overlap:
		if two || flag != flagWrite {
			return reply{}, badReply(text)
		}
	default:
		return reply{}, badReply(text)
	}
	if arg == "" || arg[0] < '0' || arg[0] > '9' || (arg[0] == '0' && len(arg) > 1) {
		return reply{}, badReply(text)
	}
	last, err := strconv.ParseUint(arg, 10, 64)
	if err != nil || last > maxSeq {
		return reply{}, badReply(text)
	}
	r.last = last
	return r, nil
}

// badReply quotes what was received, cut: it goes to logs and to /status.
func badReply(text string) error {
	const show = 64
	if len(text) > show {
		text = text[:show] + "…"
	}
	return &classError{ClassReply, fmt.Errorf("%w: %q", errReply, text)}
}

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
