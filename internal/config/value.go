// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// setting binds a key to the place in a Config that holds its value.
type setting struct {
	key   string
	parse func(node) *fault // stores the value, or says what is wrong with it
	show  func() string     // the value as one would type it
	plain bool              // needs no quotes in YAML
	live  bool              // a reload applies it
}

// live marks a setting that a running sensor takes over when it reloads its
// configuration; all others need a restart.
func live(s setting) setting {
	s.live = true
	return s
}

func (s setting) yaml() string {
	if s.plain {
		return s.show()
	}
	return strconv.Quote(s.show())
}

// fault is a Problem without its place.
type fault struct{ what, remedy string }

func faultf(remedy, format string, args ...any) *fault {
	return &fault{fmt.Sprintf(format, args...), remedy}
}

// text is a string that check accepts.
func text(key string, dst *string, check func(string) *fault) setting {
	return setting{key: key, show: func() string { return *dst }, parse: func(n node) *fault {
		switch n.shape {
		case shapeString, shapeText:
		case shapeNumber, shapeBool:
			return faultf("write it in quotes", "%s, not a string", n.shape)
		default:
			return faultf(`write a string; "" is the empty one`, "%s, not a string", n.shape)
		}
		if f := check(n.text); f != nil {
			return f
		}
		*dst = n.text
		return nil
	}}
}

// list holds strings, each of which check accepts. In the environment they are
// separated by colons, as in PATH.
func list(key string, dst *[]string, check func(string) *fault) setting {
	const remedy = "write a list such as [/srv/build, /var/cache]; [] is the empty one"
	show := func() string {
		var quoted []string
		for _, s := range *dst {
			quoted = append(quoted, strconv.Quote(s))
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	}
	return setting{key: key, plain: true, show: show, parse: func(n node) *fault {
		var items []string
		switch n.shape {
		case shapeList:
			for _, i := range n.items {
				if i.shape != shapeString {
					return faultf(remedy, "has an element that %s, not a string", i.shape)
				}
				items = append(items, i.text)
			}
		case shapeText:
			if n.text != "" {
				items = strings.Split(n.text, ":")
			}
		default:
			return faultf(remedy, "%s, not a list", describe(n))
		}
		for _, s := range items {
			if f := check(s); f != nil {
				return faultf(f.remedy, "has the element %s, which %s", quote(s), f.what)
			}
		}
		*dst = items
		return nil
	}}
}

func boolean(key string, dst *bool) setting {
	return setting{key: key, plain: true, show: func() string { return strconv.FormatBool(*dst) }, parse: func(n node) *fault {
		if n.shape == shapeBool || n.shape == shapeText {
			if v, err := strconv.ParseBool(n.text); err == nil && (n.text == "true" || n.text == "false") {
				*dst = v
				return nil
			}
		}
		return faultf("write true or false", "%s, not a boolean", describe(n))
	}}
}

func integer(key string, dst *int, least, most int) setting {
	return setting{key: key, plain: true, show: func() string { return strconv.Itoa(*dst) }, parse: func(n node) *fault {
		if n.shape != shapeNumber && n.shape != shapeText {
			return faultf(fmt.Sprintf("write a number from %d to %d", least, most), "%s, not a whole number", describe(n))
		}
		v, err := strconv.Atoi(n.text)
		if err != nil {
			return faultf(fmt.Sprintf("write a number from %d to %d", least, most), "is not a whole number")
		}
		if f := inRange(v, least, most, strconv.Itoa); f != nil {
			return f
		}
		*dst = v
		return nil
	}}
}

// size is a number of bytes; further, if not nil, restricts it more.
func size[T int | int64](key string, dst *T, least, most T, further func(int64) *fault) setting {
	return setting{key: key, plain: true, show: func() string { return FormatSize(int64(*dst)) }, parse: func(n node) *fault {
		if n.shape != shapeString && n.shape != shapeNumber && n.shape != shapeText {
			return faultf("write a size such as 64MiB", "%s, not a size", n.shape)
		}
		v, f := parseSize(n.text)
		if f == nil {
			f = inRange(v, int64(least), int64(most), FormatSize)
		}
		if f == nil && further != nil {
			f = further(v)
		}
		if f != nil {
			return f
		}
		*dst = T(v)
		return nil
	}}
}

func duration(key string, dst *time.Duration, least, most time.Duration) setting {
	return setting{key: key, plain: true, show: func() string { return formatDuration(*dst) }, parse: func(n node) *fault {
		if n.shape != shapeString && n.shape != shapeNumber && n.shape != shapeText {
			return faultf("write a duration such as 50ms or 5m", "%s, not a duration", n.shape)
		}
		v, err := time.ParseDuration(n.text)
		if _, num := strconv.ParseFloat(n.text, 64); num == nil && n.text != "0" {
			return faultf(fmt.Sprintf("write %ss, %sms or %sm", n.text, n.text, n.text), "has no unit")
		}
		if err != nil {
			return faultf("write a duration such as 50ms, 5m or 1h30m", "is not a duration")
		}
		if f := inRange(v, least, most, formatDuration); f != nil {
			return f
		}
		*dst = v
		return nil
	}}
}

func scope(key string, dst *Scope) setting {
	return setting{key: key, show: func() string { return dst.String() }, parse: func(n node) *fault {
		if n.shape != shapeString && n.shape != shapeText {
			return faultf(scopeRemedy, "%s, not a scope", describe(n))
		}
		s, f := parseScope(n.text)
		if f == nil {
			*dst = s
		}
		return f
	}}
}

// ParseScope reads a scope as [Scope.String] writes it.
func ParseScope(s string) (Scope, error) {
	sc, f := parseScope(s)
	if f != nil {
		return Scope{}, &Problem{Value: s, What: f.what, Remedy: f.remedy}
	}
	return sc, nil
}

const scopeRemedy = "write all, tree:PID or cgroup:/PATH"

func parseScope(s string) (Scope, *fault) {
	kind, arg, _ := strings.Cut(s, ":")
	switch {
	case s == "all":
		return Scope{}, nil
	case kind == "tree":
		// 4,194,304 is PID_MAX_LIMIT of a 64-bit kernel.
		pid, err := strconv.ParseUint(arg, 10, 32)
		if err != nil || pid == 0 || pid > 4194304 {
			return Scope{}, faultf(scopeRemedy, "names no process id from 1 to 4194304")
		}
		return Scope{Kind: ScopeTree, PID: uint32(pid)}, nil
	case kind == "cgroup":
		if !strings.HasPrefix(arg, "/") || path.Clean(arg) != arg || printable(arg) != nil {
			return Scope{}, faultf(scopeRemedy, "names no clean absolute path")
		}
		return Scope{Kind: ScopeCgroup, Cgroup: arg}, nil
	}
	return Scope{}, faultf(scopeRemedy, "is not a scope")
}

func describe(n node) string {
	if n.shape == shapeText {
		return "is text"
	}
	return n.shape.String()
}

func inRange[T int | int64 | time.Duration](v, least, most T, show func(T) string) *fault {
	switch {
	case v < least:
		return faultf("set "+show(least)+" or more", "is below the minimum of %s", show(least))
	case v > most:
		return faultf("set "+show(most)+" or less", "is above the maximum of %s", show(most))
	}
	return nil
}

type unit struct {
	name  string
	bytes int64
}

func binaryUnits() []unit { return []unit{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}} }

func sizeUnits() []unit {
	return append(binaryUnits(), unit{"TB", 1e12}, unit{"GB", 1e9}, unit{"MB", 1e6}, unit{"kB", 1e3}, unit{"B", 1})
}

func parseSize(s string) (int64, *fault) {
	digits := s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
	name := strings.TrimSpace(s[len(digits):])
	mult := int64(0)
	if name == "" {
		mult = 1
	}
	for _, u := range sizeUnits() {
		if u.name == name {
			mult = u.bytes
		}
	}
	if mult == 0 {
		b := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(name), "B"), "I")
		if len(b) == 1 && strings.Contains("KMGT", b) && digits != "" {
			return 0, faultf(fmt.Sprintf("write %s%siB", digits, b), "has the unknown unit %s", name)
		}
		return 0, faultf("write a size such as 64MiB", "is not a size")
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if errors.Is(err, strconv.ErrSyntax) {
		return 0, faultf("write a whole number and a unit, such as 64MiB", "is not a size")
	}
	if err != nil || n > (1<<63-1)/mult {
		return 0, faultf("write a smaller one", "is too large")
	}
	return n * mult, nil
}

// FormatSize writes a number of bytes as the configuration does: in the largest
// binary unit that is exact.
func FormatSize(n int64) string {
	for _, u := range binaryUnits() {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// formatDuration is Duration.String without the zero units at its end: "5m", not
// "5m0s".
func formatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func anyText(s string) *fault { return printable(s) }

// printable refuses what would break a log line or a terminal.
func printable(s string) *fault {
	if !utf8.ValidString(s) {
		return faultf("save the file as UTF-8", "is not UTF-8")
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return faultf("remove it", "contains a character that cannot be printed")
	}
	return nil
}

// Identifier checks an id that comes from elsewhere by the rule for the ids in the
// configuration. The empty one passes.
func Identifier(s string) error {
	if f := identifier(s); f != nil {
		return fmt.Errorf("%s: %s", f.what, f.remedy)
	}
	return nil
}

// identifier accepts what is safe in a Redis key, a field and a file name.
func identifier(s string) *fault {
	const most = 128
	if len(s) > most {
		return faultf("shorten it", "has more than %d characters", most)
	}
	for _, r := range s {
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', strings.ContainsRune("._:@-", r):
		default:
			return faultf("use letters, digits and . _ : @ -", "contains %q", r)
		}
	}
	return nil
}

func required(check func(string) *fault) func(string) *fault {
	return func(s string) *fault {
		if s == "" {
			return faultf("write a value, or remove the key for the default", "must not be empty")
		}
		return check(s)
	}
}

func optional(check func(string) *fault) func(string) *fault {
	return func(s string) *fault {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

func oneOf(words ...string) func(string) *fault {
	return func(s string) *fault {
		if slices.Contains(words, s) {
			return nil
		}
		remedy := "write one of " + strings.Join(words, ", ")
		if near := nearest(s, words); near != "" {
			remedy = "did you mean " + near + "? (" + strings.Join(words, ", ") + ")"
		}
		return faultf(remedy, "is not known here")
	}
}

func absolute(s string) *fault {
	if s == "" {
		return nil
	}
	if !strings.HasPrefix(s, "/") {
		return faultf("start it with /", "is not an absolute path")
	}
	if len(s) > 4096 {
		return faultf("use a shorter path", "is longer than 4096 bytes")
	}
	return printable(s)
}

// excludable is a directory that can be left out.
func excludable(s string) *fault {
	if s != "" && strings.Trim(s, "/") == "" {
		return faultf("set sensor.file.enabled to false instead", "is everything")
	}
	return required(absolute)(s)
}

// socketPath also keeps to what the kernel's sockaddr_un holds.
func socketPath(s string) *fault {
	if f := absolute(s); f != nil {
		return f
	}
	if len(s) > 107 {
		return faultf("use a shorter path", "is longer than the 107 bytes of a socket address")
	}
	return nil
}

// hostPort accepts host:port with a numeric port; an empty host is every
// interface.
func hostPort(s string) *fault {
	if s == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return faultf("write host:port, such as 127.0.0.1:9477", "is not host:port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n > 65535 {
		return faultf("write a port from 0 to 65535", "has no valid port")
	}
	return printable(s)
}

// redisAddress accepts host:port and unix:///path. It refuses the URL form,
// which would carry a password; load never prints the value of this key when it
// contains "@".
func redisAddress(s string) *fault {
	switch {
	case s == "":
		return nil
	case strings.Contains(s, "@"):
		return faultf("set transport.username, and put the password in a file named by transport.password_file", "contains credentials")
	case strings.HasPrefix(s, "unix://"):
		if f := socketPath(strings.TrimPrefix(s, "unix://")); f != nil || s == "unix://" {
			return faultf("write unix:///run/redis/redis.sock", "is not the absolute path of a socket")
		}
		return nil
	case strings.HasPrefix(s, "/"):
		return faultf("write unix://"+s, "is a path")
	case strings.Contains(s, "://"):
		return faultf("write host:port or unix:///path, and set transport.tls.enabled for TLS", "is a URL")
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return faultf("write host:port, such as redis.example.com:6379", "is not host:port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return faultf("write a port from 1 to 65535", "has no valid port")
	}
	if host == "" {
		return faultf("write host:port, such as 127.0.0.1"+s, "names no host")
	}
	return printable(s)
}

// redisAddresses accepts what redisAddress does, and several host:port.
func redisAddresses(s string) *fault {
	for a := range strings.SplitSeq(s, ",") {
		a = strings.TrimSpace(a)
		if f := redisAddress(a); f != nil {
			return f
		}
		if a == "" && s != "" {
			return faultf("write host:port,host:port", "has an empty element")
		}
	}
	return nil
}

// topology explains why the one that other programs have besides is missing.
func topology(s string) *fault {
	if s == "ring" {
		return faultf("use cluster or sentinel", "is not offered: keys that move when a server fails lose track of what was delivered")
	}
	return oneOf("standalone", "sentinel", "cluster")(s)
}

// ParseTrim reads the policy of transport.trim: "none", "maxlen N" or "minid AGE". Both
// results are 0 with none.
func ParseTrim(s string) (length int, age time.Duration, err error) {
	kind, arg, _ := strings.Cut(s, " ")
	switch kind {
	case "none":
		if arg == "" {
			return 0, 0, nil
		}
	case "maxlen":
		if length, err = strconv.Atoi(arg); err == nil && length > 0 {
			return length, 0, nil
		}
	case "minid":
		if age, err = time.ParseDuration(arg); err == nil && age >= time.Second {
			return 0, age.Truncate(time.Millisecond), nil
		}
	}
	return 0, 0, fmt.Errorf("%q is no policy", s)
}

func trimPolicy(s string) *fault {
	if _, _, err := ParseTrim(s); err != nil {
		return faultf("write none, maxlen 1000000 or minid 1h", "is no policy for trimming")
	}
	return nil
}

func quoteOr(s, empty string) string {
	if s == "" {
		return empty
	}
	return strconv.Quote(s)
}

// ringSize is what the kernel accepts for a ring buffer.
func ringSize(n int64) *fault {
	page := int64(os.Getpagesize())
	if n&(n-1) != 0 || n%page != 0 {
		next := page
		for next < n {
			next *= 2
		}
		return faultf("set "+FormatSize(next), "is not a power of two of at least a page (%s)", FormatSize(page))
	}
	return nil
}

// keyPart is a part of a Redis key; braces would move the hash tag.
func keyPart(s string) *fault {
	if strings.ContainsAny(s, "{}") {
		return faultf("remove the braces; the sensor adds them", "contains a brace")
	}
	return identifier(s)
}

// streamKey is a whole Redis key: one hash tag is allowed.
func streamKey(s string) *fault {
	return identifier(strings.NewReplacer("{", "", "}", "").Replace(s))
}
