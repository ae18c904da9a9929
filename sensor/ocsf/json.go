// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"encoding/base64"
	"strconv"
	"unicode/utf8"
)

const hexDigits = "0123456789abcdef"

// writer appends JSON members. A key is a literal with its quotes and colon
// (`"pid":`), every member ends with a comma, and close turns the last comma
// into the bracket: nobody has to know who came first.
type writer struct {
	b    []byte
	wall int64 // add to CLOCK_BOOTTIME nanoseconds to get Unix nanoseconds
}

// raw appends what is JSON already, trailing comma included.
func (w *writer) raw(s string) { w.b = append(w.b, s...) }

// open starts an object or array: `"file":{`.
func (w *writer) open(s string) { w.b = append(w.b, s...) }

func (w *writer) close(bracket byte) {
	if i := len(w.b) - 1; w.b[i] == ',' {
		w.b[i] = bracket
	} else {
		w.b = append(w.b, bracket)
	}
	w.b = append(w.b, ',')
}

// begin starts an object or array that end takes back when nothing is in it.
func (w *writer) begin(s string) (at int) {
	at = len(w.b)
	w.open(s)
	return at
}

func (w *writer) end(at int, bracket byte) {
	if last := w.b[len(w.b)-1]; last == '{' || last == '[' {
		w.b = w.b[:at]
		return
	}
	w.close(bracket)
}

func (w *writer) str(key, s string) {
	b := appendQuoted(append(w.b, key...), s)
	w.b = append(b, ',')
}

func (w *writer) bytes(key string, s []byte) {
	b := appendQuoted(append(w.b, key...), s)
	w.b = append(b, ',')
}

// opt is str, omitted when empty.
func (w *writer) opt(key, s string) {
	if s != "" {
		w.str(key, s)
	}
}

// uid writes a number as a string, as OCSF wants its identifiers.
func (w *writer) uid(key string, n uint64) {
	b := append(append(w.b, key...), '"')
	w.b = append(strconv.AppendUint(b, n, 10), '"', ',')
}

func (w *writer) uint(key string, n uint64) {
	b := append(w.b, key...)
	w.b = append(strconv.AppendUint(b, n, 10), ',')
}

func (w *writer) int(key string, n int64) {
	b := append(w.b, key...)
	w.b = append(strconv.AppendInt(b, n, 10), ',')
}

// hex writes n as a string of exactly 16 hex digits, as /proc shows sets of
// capabilities: JSON numbers are exact only up to 2^53 in most readers.
func (w *writer) hex(key string, n uint64) {
	b := append(append(w.b, key...), '"')
	w.b = append(appendHex(b, n, 16), '"', ',')
}

// ms writes nanoseconds since the epoch as an OCSF timestamp.
func (w *writer) ms(key string, ns int64) { w.int(key, floorDiv(ns, 1e6)) }

// base64IfInvalid keeps the bytes of a string that is not UTF-8: the string
// itself was written with U+FFFD in their place.
func base64IfInvalid[T string | []byte](w *writer, key string, s T) {
	if validUTF8(s) {
		return
	}
	w.b = append(append(w.b, key...), '"')
	w.b = append(base64.StdEncoding.AppendEncode(w.b, []byte(s)), '"', ',')
}

func validUTF8[T string | []byte](s T) bool {
	switch s := any(s).(type) {
	case string:
		return utf8.ValidString(s)
	case []byte:
		return utf8.Valid(s)
	}
	return false
}

// appendQuoted appends s as a JSON string. Invalid UTF-8 becomes U+FFFD, one
// for each byte.
func appendQuoted[T string | []byte](dst []byte, s T) []byte {
	dst = append(dst, '"')
	for {
		n := plainPrefix(s)
		dst = append(dst, s[:n]...)
		if n == len(s) {
			return append(dst, '"')
		}
		c := s[n]
		s = s[n:]
		n = 1
		switch {
		case c == '"', c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, '\\', 'n')
		case c == '\r':
			dst = append(dst, '\\', 'r')
		case c == '\t':
			dst = append(dst, '\\', 't')
		case c < ' ':
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		default:
			var r rune
			r, n = utf8.DecodeRuneInString(string(s[:min(utf8.UTFMax, len(s))]))
			dst = utf8.AppendRune(dst, r) // utf8.RuneError is U+FFFD
		}
		s = s[n:]
	}
}

// plainPrefix is how many bytes at the start of s stand for themselves in a
// JSON string: ASCII but for controls, quotes and backslashes. It looks at eight
// bytes at a time, with the highest bit of each as the mark.
func plainPrefix[T string | []byte](s T) int {
	const ones, marks = 0x0101010101010101, 0x8080808080808080
	i := 0
	for ; i+8 <= len(s); i += 8 {
		x := uint64(s[i]) | uint64(s[i+1])<<8 | uint64(s[i+2])<<16 | uint64(s[i+3])<<24 |
			uint64(s[i+4])<<32 | uint64(s[i+5])<<40 | uint64(s[i+6])<<48 | uint64(s[i+7])<<56
		quote, slash := x^ones*'"', x^ones*'\\'
		// y-ones turns the mark of a zero byte on. It may also turn on others, of
		// bytes that are no ASCII or stand above a zero: the loop below decides.
		if (x|(x-ones*' ')|(quote-ones)|(slash-ones))&marks != 0 {
			break
		}
	}
	for ; i < len(s); i++ {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			break
		}
	}
	return i
}

func appendHex(dst []byte, n uint64, digits int) []byte {
	for shift := 4 * (digits - 1); shift >= 0; shift -= 4 {
		dst = append(dst, hexDigits[n>>shift&15])
	}
	return dst
}

// appendRFC3339 appends UTC with nanoseconds. [time.Time.AppendFormat] would
// cost as much as a quarter of a whole event.
func appendRFC3339(dst []byte, ns int64) []byte {
	sec := floorDiv(ns, 1e9)
	frac := ns - sec*1e9
	day := floorDiv(sec, 86400)
	rem := sec - day*86400

	// Civil date from days since the epoch, in eras of 400 years that start on
	// a first of March, so that the leap day comes last.
	z := day + 719468
	era := floorDiv(z, 146097)
	doe := z - era*146097
	yoe := (doe - doe/1460 + doe/36524 - doe/146096) / 365
	doy := doe - (365*yoe + yoe/4 - yoe/100)
	mp := (5*doy + 2) / 153
	d := doy - (153*mp+2)/5 + 1
	m := mp + 3
	y := yoe + era*400
	if m > 12 {
		m -= 12
		y++
	}

	dst = append(appendDigits(dst, y, 4), '-')
	dst = append(appendDigits(dst, m, 2), '-')
	dst = append(appendDigits(dst, d, 2), 'T')
	dst = append(appendDigits(dst, rem/3600, 2), ':')
	dst = append(appendDigits(dst, rem/60%60, 2), ':')
	dst = append(appendDigits(dst, rem%60, 2), '.')
	return append(appendDigits(dst, frac, 9), 'Z')
}

func appendDigits(dst []byte, n int64, width int) []byte {
	for range width {
		dst = append(dst, '0')
	}
	for i := len(dst) - 1; n > 0; i-- {
		dst[i] = byte('0' + n%10)
		n /= 10
	}
	return dst
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}
