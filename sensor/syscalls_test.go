// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestSyscallNumbers compares the tables with those that golang.org/x/sys generates out
// of the kernel's headers: a call that an architecture has must be in its table.
func TestSyscallNumbers(t *testing.T) {
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Skipf("needs the sources of golang.org/x/sys: %v", err)
	}
	number := regexp.MustCompile(`(?m)^\tSYS_(\w+) += (\d+)$`)
	for arch, got := range map[string]map[string]uint32{
		runtime.GOARCH: nativeNumbers(), map[string]string{"amd64": "386", "arm64": "arm"}[runtime.GOARCH]: compatNumbers(),
	} {
		source, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "zsysnum_linux_"+arch+".go"))
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]uint32{}
		for _, m := range number.FindAllStringSubmatch(string(source), -1) {
			name := strings.ToLower(m[1])
			if _, ok := fileCalls()[name]; !ok {
				continue
			}
			n, err := strconv.ParseUint(m[2], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			want[name] = uint32(n)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-golang.org/x/sys +table):\n%s", arch, diff)
		}
	}
}

func TestSyscallTable(t *testing.T) {
	table, calls := syscallTable(), fileCalls()
	sum := 0
	for number, pair := range table {
		for _, call := range []fileCall{pair.Own, pair.Compat} {
			if call == (fileCall{}) {
				continue
			}
			sum++
			if number >= 512 || call.Kind == 0 || call.Path == 0 && call.FD == 0 && call.Target == 0 {
				t.Errorf("call %d: %+v", number, call)
			}
		}
	}
	if want := len(nativeNumbers()) + len(compatNumbers()); sum != want {
		t.Errorf("%d calls, want %d", sum, want)
	}
	for name, number := range nativeNumbers() {
		if got := table[number].Own; got != calls[name] {
			t.Errorf("%s: %+v, want %+v", name, got, calls[name])
		}
	}
	differs := map[string]uint8{
		"utime": times32, "utimes": times32, "futimesat": times32, "utimensat": times32, "chown": ids16, "lchown": ids16, "fchown": ids16,
	}
	for name, number := range compatNumbers() {
		want := calls[name]
		want.Forms |= differs[name]
		if got := table[number].Compat; got != want {
			t.Errorf("32-bit %s: %+v, want %+v", name, got, want)
		}
	}
}
