// SPDX-License-Identifier: Apache-2.0

package event

import (
	"bytes"
	"unicode"
	"unicode/utf8"
)

// plain marks the bytes that mean themselves anywhere in a shell word.
var plain = func() (t [256]bool) {
	for c := '0'; c <= 'z'; c++ {
		t[c] = c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c
	}
	for _, c := range "@%+=:,./-_" {
		t[c] = true
	}
	return t
}()

// AppendCmdLine appends NUL-terminated arguments to dst as one shell command
// line and returns it. The result is printable text that bash splits into
// exactly the same bytes: an argument is quoted only when it needs to be, with
// '…' when all of it is printable UTF-8 and with $'…' otherwise. A last
// argument without its NUL, as in a truncated argv, is taken as it is.
func AppendCmdLine(dst, argv []byte) []byte {
	for first := true; len(argv) > 0; first = false {
		if !first {
			dst = append(dst, ' ')
		}
		arg := argv
		if i := bytes.IndexByte(argv, 0); i >= 0 {
			arg, argv = argv[:i], argv[i+1:]
		} else {
			argv = nil
		}
		dst = appendWord(dst, arg)
	}
	return dst
}

func appendWord(dst, arg []byte) []byte {
	quote := len(arg) == 0
	for i, c := range arg {
		if plain[c] {
			continue
		}
		if !printable(arg[i:]) {
			return appendEscaped(dst, arg)
		}
		quote = true
		break
	}
	if !quote {
		return append(dst, arg...)
	}
	dst = append(dst, '\'')
	for {
		i := bytes.IndexByte(arg, '\'')
		if i < 0 {
			break
		}
		dst = append(append(dst, arg[:i]...), `'\''`...)
		arg = arg[i+1:]
	}
	return append(append(dst, arg...), '\'')
}

func printable(b []byte) bool {
	for len(b) > 0 {
		r, n := rune(b[0]), 1
		if r >= utf8.RuneSelf {
			if r, n = utf8.DecodeRune(b); r == utf8.RuneError && n == 1 {
				return false
			}
		}
		if !unicode.IsPrint(r) {
			return false
		}
		b = b[n:]
	}
	return true
}

// appendEscaped writes $'…'. Bytes are escaped one by one as \xHH, so that the
// result does not depend on a locale; bash takes at most two digits.
func appendEscaped(dst, arg []byte) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '$', '\'')
	for len(arg) > 0 {
		r, n := utf8.DecodeRune(arg)
		c := arg[0]
		switch {
		case c == '\'' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, '\\', 'n')
		case c == '\t':
			dst = append(dst, '\\', 't')
		case c == '\r':
			dst = append(dst, '\\', 'r')
		case unicode.IsPrint(r) && (r != utf8.RuneError || n > 1):
			dst = append(dst, arg[:n]...)
		default:
			for _, c := range arg[:n] {
				dst = append(dst, '\\', 'x', hex[c>>4], hex[c&15])
			}
		}
		arg = arg[n:]
	}
	return append(dst, '\'')
}
