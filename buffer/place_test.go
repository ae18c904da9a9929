// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnsafePlaceIsRefused on real file systems: the error names path, type and remedy, and
// the override is seen in Stats.
func TestUnsafePlaceIsRefused(t *testing.T) {
	tmpfs := mount(t, "-t", "tmpfs", "-o", "size=8m", "tmpfs")
	layers := mountExt4(t, 32*mib)
	overlay := func(options string) string {
		root := t.TempDir()
		for _, d := range []string{"lower", "upper", "work"} {
			if err := os.MkdirAll(filepath.Join(layers, filepath.Base(filepath.Dir(root)), filepath.Base(root)+d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		at := filepath.Join(layers, filepath.Base(filepath.Dir(root)), filepath.Base(root))
		return mount(t, "-t", "overlay", "-o", "lowerdir="+at+"lower,upperdir="+at+"upper,workdir="+at+"work"+options, "overlay")
	}
	for name, c := range map[string]struct {
		dir    string
		fs     string
		unsafe bool
	}{
		"disk":             {layers, "", false},
		"memory":           {filepath.Join(tmpfs, "not", "yet", "made"), "tmpfs", true},
		"layer":            {overlay(""), "overlay", false},
		"layer not synced": {overlay(",volatile"), "overlay", true},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := Hazards(c.dir)
			if err != nil {
				t.Fatal(err)
			}
			if c.fs == "" {
				if len(h) != 0 {
					t.Errorf("%v", h)
				}
				return
			}
			if len(h) != 1 || h[0].FS != c.fs || h[0].Unsafe != c.unsafe {
				t.Fatalf("%+v", h)
			}
			o := small(filepath.Join(c.dir, "buffer"))
			o.AllowUnsafe = false
			q, err := Open(t.Context(), o)
			if err == nil {
				defer closeQueue(t, q)
			}
			if errors.Is(err, ErrUnsafe) != c.unsafe || (err == nil) == c.unsafe {
				t.Fatalf("opened: %v", err)
			}
			if !c.unsafe {
				if len(q.Stats().Hazards) != 1 {
					t.Errorf("%+v", q.Stats().Hazards)
				}
				return
			}
			for _, want := range []string{o.Dir, c.fs, "buffer.dir", "buffer.allow_unsafe"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if _, err := os.Stat(o.Dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("it was made: %v", err)
			}
			o.AllowUnsafe = true
			if q = open(t, o); len(q.Stats().Hazards) != 1 {
				t.Errorf("%+v", q.Stats().Hazards)
			}
		})
	}
}

// TestNoSpaceForNewFile: the error of a start on a disk that is too small says how much is
// missing, and leaves nothing behind.
func TestNoSpaceForNewFile(t *testing.T) {
	o := small(filepath.Join(mount(t, "-t", "tmpfs", "-o", "size=1m", "tmpfs"), "buffer"))
	_, err := Open(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "2097152 are needed: make room, or set a smaller buffer.cap") {
		t.Errorf("opened: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(o.Dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFastCommitOfOldKernels(t *testing.T) {
	const used, unused = "fc stats:\n12 commits\n0 ineligible\n", "fc stats:\n0 commits\n0 ineligible\n"
	for _, c := range []struct {
		release, info string
		want          bool
	}{
		{"5.10.0-21-amd64", used, true},
		{"5.16.9", used, true},
		{"5.17.0", used, false},
		{"6.1.0-18-amd64", used, false},
		{"5.10.0-21-amd64", unused, false},
		{"5.10.0", "", false},
		{"", used, false},
	} {
		if h := ext4Hazards("/x", c.release, []byte(c.info)); (len(h) > 0) != c.want || len(h) > 0 && h[0].Unsafe {
			t.Errorf("%q %q: %v", c.release, c.info, h)
		}
	}
}
