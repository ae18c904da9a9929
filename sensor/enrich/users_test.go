// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseNames(t *testing.T) {
	got := parseNames([]byte(`root:x:0:0:root:/root:/bin/bash
toor:x:0:0:second name of root:/root:/bin/sh
# comment:x:5:5:
+nis:x:6:6::
-:x:7:
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin

short:x
big:x:4294967296:0::
negative:x:-1:0::
max:x:4294967295:0::
:x:9:9::
grüße:x:10:10::
group:x:11:alice,bob
last:x:12:`))
	want := map[uint32]string{0: "root", 65534: "nobody", 4294967295: "max", 10: "grüße", 11: "group", 12: "last"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzParseNames(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/bash\n\n:::\n+\n"))
	f.Fuzz(func(_ *testing.T, data []byte) { parseNames(data) })
}

func TestNameFileIsReadAgainWhenChanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwd")
	write := func(content string, mtime time.Time) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, mtime, mtime); err != nil {
			t.Fatal(err)
		}
	}
	f := nameFile{path: path}
	start := time.Unix(1e9, 0)
	sec := uint64(time.Second)
	want := func(ktime uint64, name string) {
		t.Helper()
		if got := f.name(1000, ktime); got != name {
			t.Errorf("at %d: name = %q, want %q", ktime, got, name)
		}
	}
	want(0, "") // no file yet
	write("alice:x:1000:1000::\n", start)
	want(sec, "") // looked a second ago
	want(sec+1, "alice")
	write("carol:x:1000:1000::\n", start.Add(time.Second))
	want(2*sec, "alice")
	want(2*sec+2, "carol")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	want(10*sec, "carol") // what is known stays
	if n := testing.AllocsPerRun(100, func() { f.name(1000, 10*sec) }); n > 0 {
		t.Errorf("a lookup costs %v allocations", n)
	}
}
