// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestRedactWhatLooksLikeASecret(t *testing.T) {
	r := newRedactor()
	for _, tt := range []struct{ text, want string }{
		{"nothing to hide", ""},
		{`password=hunter2 user=x`, `password=[redacted] user=x`},
		{`{"password":"hunter2","user":"x"}`, `{"password":"[redacted]","user":"x"}`},
		{`"cmd_line":"sh -c \"curl -d '{\\\"api_key\\\": \\\"hunter2\\\"}'\""`, `"cmd_line":"sh -c \"curl -d '{\\\"api_key\\\": \\\"[redacted]\\\"}'\""`},
		{`mysql --password hunter2 db`, `mysql --password [redacted] db`},
		{`["--db-passwd","hunter2"]`, `["--db-passwd","[redacted]"]`},
		{`AWS_SECRET_ACCESS_KEY=hunter2/x+y`, `AWS_SECRET_ACCESS_KEY=[redacted]`},
		{`Authorization: Bearer abcdef.hunter2`, `Authorization: Bearer [redacted]`},
		{`-H 'X: bearer hunter2hunter2'`, `-H 'X: bearer [redacted]'`},
		{`redis://u:hunter2@h:6379/0`, `redis://u:[redacted]@h:6379/0`},
		{`https://:hunt@er2@h/x and http://127.0.0.1:9477/metrics`, `https://:[redacted]@h/x and http://127.0.0.1:9477/metrics`},
		{`redis-cli auth hunter2`, `redis-cli auth [redacted]`},
		{"-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----", redacted},
		{`"-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n"`, `"[redacted]\n"`},
		{`eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.hunter2`, redacted},
		{`id AKIAIOSFODNN7EXAMPLE here`, `id [redacted] here`},
		{`ghp_0123456789abcdefghijABCDEFGHIJ`, redacted},
		// These are no secrets.
		{`{"key":"transport.password_file","value":"/etc/edr-sensor/redis-password"}`, ""},
		{`{"id":"redis.auth","verdict":"PASS","found":"accepted"}`, ""},
		{`check transport.username and transport.password_file`, ""},
		{`the token bucket of a process`, ""},
		{`password=[redacted]`, ""},
	} {
		want, places := tt.want, 1
		if want == "" {
			want, places = tt.text, 0
		}
		got, n := r.apply([]byte(tt.text))
		if string(got) != want || n != places {
			t.Errorf("%s\n is %s (%d places)\nwant %s (%d)", tt.text, got, n, want, places)
		}
		if again, n := r.apply(got); n != 0 || !bytes.Equal(again, got) {
			t.Errorf("%s: the second time %d places change: %s", tt.text, n, again)
		}
	}
}

func TestRedactEnvironment(t *testing.T) {
	r := newRedactor()
	r.environment([]string{"PATH=/usr/bin", "DB_PASSWORD=opensesame", "REDIS_URL=redis://u:p%2Fq-secret@h", "BROKEN_URL=redis://u:a/b-secret@h", "TOKEN_FILE=/run/token", "USE_TOKEN=true", "PGPASSWORD=abc", "HOME=/root"})
	got, _ := r.apply([]byte("opensesame p%2Fq-secret p/q-secret a/b-secret /run/token true /usr/bin /root"))
	if want := "[redacted] [redacted] [redacted] [redacted] /run/token true /usr/bin /root"; string(got) != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// FuzzRedact hides a secret in many forms, and searches it.
func FuzzRedact(f *testing.F) {
	f.Add("correct horse", "before ", " after")
	f.Add(`q"uo\te<&>`, `{"x":"`, `"}`)
	f.Add("abc", " ", " ")
	f.Add("ünï", "", "")
	f.Fuzz(func(t *testing.T, secret, before, after string) {
		r := newRedactor()
		r.know(secret)
		secret = strings.TrimSpace(secret)
		if secret == "" || strings.Contains(redacted, secret) || utf8.RuneCountInString(secret) < shortSecret && (before != "" || after != "") {
			return
		}
		quoted, err := json.Marshal(secret)
		if err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{secret, string(quoted[1 : len(quoted)-1]), url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(secret))} {
			got, n := r.apply([]byte(before + form + after))
			// What stands around it may be the secret itself, put together anew.
			if n == 0 || !strings.Contains(before+redacted+after, form) && bytes.Contains(got, []byte(form)) {
				t.Errorf("%q in %q: %q after %d places", form, before+form+after, got, n)
			}
		}
	})
}
