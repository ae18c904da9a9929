// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// redacted stands where a secret was.
const redacted = "[redacted]"

// redactor takes secrets out of what leaves the host: those that it was told, in every
// form in which they may be written, and whatever looks like one.
type redactor struct {
	known    []string // longest first
	short    []string // of few characters: only where they stand alone
	patterns []*regexp.Regexp
}

// shortSecret is the length below which the characters of a secret may occur anywhere
// by chance.
const shortSecret = 6

func newRedactor() *redactor {
	const (
		name  = `[\w-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|authorization|credentials?|requirepass|masterauth)`
		quote = `(?:\\*["'])?`
		value = `[^\s"'\\,;&}\]]+`
	)
	r := &redactor{}
	for _, p := range []string{
		`()(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----`,
		`([a-zA-Z][a-zA-Z0-9+.-]*://[^\s/@:"']*:)[^\s/"']+@`, // of a URL; what follows the secret is put back below
		`(?i)(` + name + quote + `\s*[:=]\s*` + quote + `(?:(?:basic|bearer)\s+)?)` + value,
		`(?i)(--?` + name + quote + `[\s,]+` + quote + `)` + value, // the next argument
		`(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9+/_.=~-]{8,}`,
		`(?i)(\bauth\s+)` + value,                                  // the command of Redis
		`()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`, // JSON Web Token
		`()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b`,
		`()\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,})`,
	} {
		r.patterns = append(r.patterns, regexp.MustCompile(p))
	}
	return r
}

// know adds a secret.
func (r *redactor) know(secret string) {
	secret = strings.TrimSpace(secret)
	if secret == "" || secret == redacted {
		return
	}
	forms := []string{secret, url.QueryEscape(secret), url.PathEscape(secret)}
	for _, html := range []bool{true, false} {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(html)
		if enc.Encode(secret) == nil {
			forms = append(forms, strings.Trim(strings.TrimSpace(b.String()), `"`))
		}
	}
	for _, e := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
		forms = append(forms, e.EncodeToString([]byte(secret)))
	}
	for _, f := range forms {
		list := &r.known
		if utf8.RuneCountInString(f) < shortSecret {
			list = &r.short
		}
		if !slices.Contains(*list, f) {
			*list = append(*list, f)
		}
	}
	for _, list := range [][]string{r.known, r.short} {
		slices.SortFunc(list, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b)) })
	}
}

// environment finds secrets in variables: by their names, and in URLs.
func (r *redactor) environment(environ []string) {
	secretName := regexp.MustCompile(`(?i)passw|pwd$|passphrase|secret|token|credential|api_?key|access_?key|private_?key|auth$`)
	inURL := regexp.MustCompile(`://[^:@/\s]*:(.+)@`)
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		password := inURL.FindStringSubmatch(value)
		switch {
		case password != nil:
			r.know(password[1])
			if plain, err := url.PathUnescape(password[1]); err == nil {
				r.know(plain)
			}
		case strings.HasPrefix(value, "/"): // names a file
		case secretName.MatchString(name) && len(value) >= 4 && value != "true" && value != "false":
			r.know(value)
		}
	}
}

// apply returns text without secrets, and how many places were changed.
func (r *redactor) apply(text []byte) (clean []byte, places int) {
	replaced := []byte(redacted)
	for _, secret := range r.known {
		if n := bytes.Count(text, []byte(secret)); n > 0 {
			places += n
			text = bytes.ReplaceAll(text, []byte(secret), replaced)
		}
	}
	for _, secret := range r.short {
		var n int
		text, n = replaceAlone(text, []byte(secret))
		places += n
	}
	for _, p := range r.patterns {
		text = p.ReplaceAllFunc(text, func(found []byte) []byte {
			m := p.FindSubmatch(found)
			secret := found[len(m[1]):]
			if bytes.HasPrefix(secret, replaced[:len(replaced)-1]) { // up to the bracket, which ends a value
				return found
			}
			places++
			out := append(bytes.Clone(m[1]), replaced...)
			if bytes.HasSuffix(found, []byte("@")) && bytes.Contains(m[1], []byte("://")) {
				out = append(out, '@')
			}
			return out
		})
	}
	return text, places
}

// replaceAlone redacts a secret where it is no part of a longer word.
func replaceAlone(text, secret []byte) (clean []byte, places int) {
	word := func(b byte) bool {
		return b == '_' || b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= utf8.RuneSelf
	}
	for from := 0; ; {
		i := bytes.Index(text[from:], secret)
		if i < 0 {
			return append(clean, text[from:]...), places
		}
		i += from
		end := i + len(secret)
		if i > 0 && word(text[i-1]) || end < len(text) && word(text[end]) {
			clean, from = append(clean, text[from:i+1]...), i+1
			continue
		}
		clean, from = append(append(clean, text[from:i]...), redacted...), end
		places++
	}
}
