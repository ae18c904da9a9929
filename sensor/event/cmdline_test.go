// SPDX-License-Identifier: Apache-2.0

package event

import (
	"bytes"
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestAppendCmdLine(t *testing.T) {
	for _, tt := range []struct {
		name, argv, want string
	}{
		{"nothing", "", ""},
		{"one", "ls\x00", "ls"},
		{"plain", "/usr/bin/env\x00-i\x00A=b\x00a,b:c@d%e+f_g\x00", "/usr/bin/env -i A=b a,b:c@d%e+f_g"},
		{"empty argument", "a\x00\x00b\x00", "a '' b"},
		{"only an empty argument", "\x00", "''"},
		{"last one empty", "a\x00\x00", "a ''"},
		{"cut", "sh\x00-c\x00echo hel", "sh -c 'echo hel'"},
		{"cut after a NUL", "a\x00", "a"},
		{"space", "echo\x00a b\x00", "echo 'a b'"},
		{"shell characters", "sh\x00-c\x00$(id) | `w` > ~/#x\x00", "sh -c '$(id) | `w` > ~/#x'"},
		{"single quote", "it's\x00", `'it'\''s'`},
		{"quotes only", "''\x00", `''\'''\'''`},
		{"backslash", "a\\b\x00", `'a\b'`},
		{"tilde", "~\x00", "'~'"},
		{"printable Unicode", "grüße\x00", "'grüße'"},
		{"newline and tab", "a\nb\tc\rd\x00", `$'a\nb\tc\rd'`},
		{"control", "a\x1b[31mb\x7f\x00", `$'a\x1b[31mb\x7f'`},
		{"quote among control", "\x01'\\\x00", `$'\x01\'\\'`},
		{"not UTF-8", "\xff\xfe a\x00", `$'\xff\xfe a'`},
		{"right-to-left override", "a\u202eb\x00", `$'a\xe2\x80\xaeb'`},
		{"replacement character itself", "\ufffd\x00", "'\ufffd'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff("> "+tt.want, string(AppendCmdLine([]byte("> "), []byte(tt.argv)))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestAppendCmdLineBash asks the shell whether it splits the line as promised.
func TestAppendCmdLineBash(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash:", err)
	}
	var all []byte
	for c := 1; c < 256; c++ {
		all = append(all, byte(c), 'a', 0)
	}
	for _, argv := range []string{
		"printf\x00%s\x00a b\x00", string(all), "it's\x00\x00--\x00", "\xf0\x9f\x92\xa9 \u202e\x00\xf0\x9f\x92\x00", "$'x'\x00!!\x00{a,b}\x00*\x00a=~\x00",
	} {
		line := AppendCmdLine(nil, []byte(argv))
		out, err := exec.CommandContext(t.Context(), bash, "-c", `printf '%s\0' `+string(line)).Output()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(argv, string(out)); diff != "" {
			t.Errorf("line %s (-want +got):\n%s", line, diff)
		}
	}
}

// FuzzAppendCmdLine takes lines apart again, as bash does.
func FuzzAppendCmdLine(f *testing.F) {
	f.Add([]byte("a\x00b c\x00'\x00\n\x00\xff\x00\x00"))
	f.Add([]byte("\\x41\x00$'\x00\x7f9\x00"))
	f.Fuzz(func(t *testing.T, argv []byte) {
		line := AppendCmdLine(nil, argv)
		if !utf8.Valid(line) || strings.IndexFunc(string(line), func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			t.Fatalf("line %q is not printable", line)
		}
		if len(argv) > 0 && argv[len(argv)-1] != 0 {
			argv = append(bytes.Clone(argv), 0)
		}
		got, err := split(string(line))
		if err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		if !bytes.Equal(argv, got) {
			t.Fatalf("line %q\n got %q\nwant %q", line, got, argv)
		}
	})
}

// split is the part of bash's word splitting that AppendCmdLine relies on.
func split(s string) (argv []byte, err error) {
	inWord := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == ' ':
			argv, inWord = append(argv, 0), false
			continue
		case s[i] == '\'':
			end := strings.IndexByte(s[i+1:], '\'')
			if end < 0 {
				return nil, errors.New("no end of quote")
			}
			argv = append(argv, s[i+1:i+1+end]...)
			i += end + 1
		case s[i] == '\\':
			i++
			argv = append(argv, s[i])
		case strings.HasPrefix(s[i:], "$'"):
			for i += 2; s[i] != '\''; i++ {
				if s[i] != '\\' {
					argv = append(argv, s[i])
					continue
				}
				i++
				switch c := s[i]; c {
				case 'x':
					n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
					if err != nil {
						return nil, err
					}
					argv = append(argv, byte(n))
					i += 2
				default:
					argv = append(argv, map[byte]byte{'n': '\n', 't': '\t', 'r': '\r', '\\': '\\', '\'': '\''}[c])
				}
			}
		default:
			if strings.IndexByte("|&;<>()$`\\\"*?[#~!{} \t\n", s[i]) >= 0 {
				return nil, errors.New("bare " + s[i:i+1])
			}
			argv = append(argv, s[i])
		}
		inWord = true
	}
	if inWord {
		argv = append(argv, 0)
	}
	return argv, nil
}

func BenchmarkAppendCmdLine(b *testing.B) {
	argv := []byte("python3\x00-m\x00http.server\x00--bind\x00127.0.0.1\x008080\x00--title\x00my server\x00")
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst = AppendCmdLine(dst[:0], argv)
	}
}
