// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSourcesList(t *testing.T) {
	const main, security = "Debian http://one.example/debian/\n", "Debian-Security http://two.example/s/\n"
	for _, tt := range []struct{ name, targets, suite, want string }{
		{"stable", main + main + security, "trixie", "deb [signed-by=" + Keyring + "] http://one.example/debian/ trixie main\n" +
			"deb [signed-by=" + Keyring + "] http://two.example/s/ trixie-security main\n"},
		{"unstable has no security", main + security, "sid", "deb [signed-by=" + Keyring + "] http://one.example/debian/ sid main\n"},
		{"no security mirror", main, "trixie", "deb [signed-by=" + Keyring + "] http://one.example/debian/ trixie main\n"},
		{"no lists", "", "trixie", ""},
	} {
		got, err := sourcesList(tt.targets, tt.suite)
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
	}
}

func TestKernelDependencies(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"meta package", "Package: linux-image-cloud-amd64\nDepends: linux-image-5.10.0-46-cloud-amd64 (= 5.10.262-1)\n", []string{"linux-image-5.10.0-46-cloud-amd64"}},
		{"several", "Depends: dracut | initramfs-tools (>= 0.120+deb8u2), linux-base-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), linux-modules-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)\nPre-Depends: linux-base (>= 4.17~)\n", []string{"linux-binary-7.2.13+deb14-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"}},
		{"others", "Depends: kmod, linux-base (>= 4.3~)\nBreaks: linux-image-6.1.0-1-cloud-amd64\nDescription: see linux-image-6.1.0-1-cloud-amd64\n", nil},
	} {
		if diff := cmp.Diff(tt.want, kernelDependencies(tt.text)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// olds counts how often something old has to do.
func olds(n *int) func(string, ...any) {
	return func(format string, _ ...any) {
		if strings.Contains(format, "has to do") {
			*n++
		}
	}
}

func TestFetch(t *testing.T) {
	for _, tt := range []struct {
		old         bool
		fails, want int // attempts
	}{{false, 0, 1}, {false, 2, 3}, {false, 9, 3}, {true, 9, 1}} {
		n := 0
		err := Cache{Logf: t.Logf}.fetch(t.Context(), tt.old, func() error {
			if n++; n <= tt.fails {
				return errors.New("404")
			}
			return nil
		})
		if n != tt.want || (err != nil) != (tt.fails >= tt.want) {
			t.Errorf("%+v: %d attempts, %v", tt, n, err)
		}
	}
}

// A kernel in the cache is used until it is old, and then still, if there is no other.
func TestKernelFromCache(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // nothing to fetch with
	cache := t.TempDir()
	kernel := Kernel{filepath.Join(cache, "6.1", "6.1.0-56-cloud-amd64")}
	if err := os.MkdirAll(kernel.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var said int
	c := Cache{Dir: cache, Logf: olds(&said)}
	if _, err := c.Kernel(t.Context(), "6.1", "bookworm", "amd64"); err == nil || !strings.Contains(err.Error(), "bookworm") {
		t.Errorf("without a kernel: %v", err)
	}
	files := []string{kernel.Image(), kernel.Busybox()}
	for _, name := range Modules() {
		files = append(files, kernel.Module(name))
	}
	for i, path := range files {
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := c.Kernel(t.Context(), "6.1", "bookworm", "amd64")
		if complete := i == len(files)-1; complete && (got != kernel || err != nil) || !complete && err == nil {
			t.Errorf("after %s: %v, %v", path, got, err)
		}
	}
	if said != 0 {
		t.Error("complained about a young kernel")
	}
	old := time.Now().Add(-2 * keep)
	if err := os.Chtimes(kernel.Dir, old, old); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Kernel(t.Context(), "6.1", "bookworm", "amd64"); got != kernel || err != nil || said != 1 {
		t.Errorf("with an old kernel: %v, %v, %d complaints", got, err, said)
	}
}

// A root file system in the cache is used until it is old or lacks a package, then made
// anew, and an old one has to do where that is not possible.
func TestRootFromCache(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // nothing to make one with
	var said int
	c := Cache{Dir: t.TempDir(), Logf: olds(&said)}
	want := func(when string, good bool, complaints int) {
		t.Helper()
		dir, release, err := c.Root(t.Context(), "bookworm")
		if err == nil {
			release()
		}
		if got := filepath.Join(c.Dir, "root-bookworm", "root"); good && (err != nil || dir != got) || !good && err == nil || said != complaints {
			t.Errorf("%s: %q, %v, %d complaints", when, dir, err, said)
		}
	}
	want("nothing", false, 0)
	made := filepath.Join(c.Dir, "root-bookworm", "packages")
	write := func(packages []string) {
		if err := os.WriteFile(made, []byte(strings.Join(packages, "\n")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(rootPackages())
	want("young", true, 0)
	old := time.Now().Add(-2 * keep)
	if err := os.Chtimes(made, old, old); err != nil {
		t.Fatal(err)
	}
	want("old", true, 1)
	write(rootPackages()[1:])
	want("a package less", false, 1)
}
