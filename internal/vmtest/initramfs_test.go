// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bufio"
	"cmp"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/aurorasoc/edr-sensor/internal/debian"
)

// suite is a package whose tests run in the virtual machine.
type suite struct {
	dir  string // in the module
	run  string // which tests, as in go test -run
	skip string // and which of them not
	name string // where it is not called by its package
	// before is what the shell does to the machine first; it stays so for the suites
	// after it.
	before string
	env    string // of the test binary: NAME='value' ...
}

func (s suite) called() string { return cmp.Or(s.name, s.dir) }

// suites lists what depends on the kernel. Tests that do not are run by every
// go test already.
func suites(r release) []suite {
	skip := costTests // see TestVMCosts
	if !r.whole {
		skip += "|" + besideHooks
	}
	return []suite{
		{dir: "sensor", run: "Root", skip: skip},
		{dir: "sensor/enrich", run: "Proc|Hash|Host|Clock|Cgroups"},
	}
}

// besideHooks is tests of what the sensor does with its own programs, maps and rings, and of
// what it makes of events, which take long: where the oldest and the newest kernel agree, the
// others are taken to. That one process takes over from another, the lives of the packages show.
const besideHooks = "StuckStage|Adopt|CarryOn|TakeOver|Copies|Deep|LostLink|LostForGood|ExerciseInScope|" +
	"FilterChangesLive|FilesSuppressed|FilesExcluded|Heartbeat|Counters|Waiter"

// testTimeout is when a test binary gives up and shows its goroutines. Emulated, the
// sensor's suite takes three minutes, most of it in the verifier, and twice that and more
// beside two other machines.
const testTimeout = "17m"

// build compiles the test binaries of the suites into dir, with edr-sensor itself for
// those that run it.
func build(ctx context.Context, dir, arch, arch32 string, suites []suite) error {
	compile := func(arch string, args ...string) error {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	for _, s := range suites {
		err := compile(arch, "test", "-c", "-ldflags=-s -w", "-o", testBinary(dir, s), "./"+s.dir)
		if s.dir == command {
			err = errors.Join(err, compile(arch, "build", "-ldflags=-s -w", "-o", filepath.Join(dir, path.Base(command)), "./"+command))
		}
		if strings.HasPrefix(actor32, s.dir+"/") {
			err = errors.Join(err, compile(arch32, "build", "-ldflags=-s -w", "-o", filepath.Join(dir, path.Base(actor32)), "./"+actor32))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// command is the program's own package.
const command = "cmd/edr-sensor"

// actor32 is a program that tests of the sensor want for the 32-bit processor that is in
// the machine's.
const actor32 = "sensor/testdata/actor32"

func testBinary(dir string, s suite) string {
	return filepath.Join(dir, strings.ReplaceAll(s.dir, "/", "-")+".test")
}

// initramfs writes the file system that a virtual machine starts with: a shell, the
// kernel's modules, what was built in built with its testdata, and the init script, which
// runs it.
func initramfs(name string, m machine, kernel debian.Kernel, built string, suites []suite) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.file("init", "testdata/init.sh", 0o755)
	a.file("bin/busybox", kernel.Busybox(), 0o755)
	a.link("bin/sh", "busybox")
	a.bytes("bin/true", nothing(m), 0o755)
	for _, name := range []string{"overlay", "loop"} {
		a.file("modules/"+name+".ko", kernel.Module(name), 0o644)
	}
	var plan strings.Builder
	for _, s := range suites {
		if to := path.Join("tests", s.dir); !a.made[path.Join(to, "run.test")] {
			a.file(path.Join(to, "run.test"), testBinary(built, s), 0o755)
			a.tree(path.Join(to, "testdata"), filepath.Join(module, s.dir, "testdata"))
			if strings.HasPrefix(actor32, s.dir+"/") {
				a.file(path.Join("tests", actor32, path.Base(actor32)), filepath.Join(built, path.Base(actor32)), 0o755)
			}
			if s.dir == command {
				a.file(path.Join("bin", path.Base(command)), filepath.Join(built, path.Base(command)), 0o755)
			}
		}
		fmt.Fprintf(&plan, "%s %s %s; exec env %s ./run.test -test.v=test2json -test.timeout=%s -test.run='%s' -test.skip='%s'\n",
			s.called(), s.dir, cmp.Or(s.before, ":"), s.env, testTimeout, s.run, s.skip)
	}
	a.bytes("tests/plan", []byte(plan.String()), 0o644)
	return a.close()
}

// nothing is a program that does nothing, successfully: the /bin/true of busybox asks
// what it is called, and tests give it other names.
func nothing(m machine) []byte {
	const base, head = 0x400000, 64 + 56
	size := uint64(head + len(m.exit))
	return slices.Concat(
		encode(elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(m.elf), Version: uint32(elf.EV_CURRENT),
			Entry: base + head, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		}),
		encode(elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X),
			Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 4096,
		}),
		m.exit)
}

func encode(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic(err) // of a type without a size
	}
	return b
}

// archive writes a file system in cpio's "newc" format, the kernel's own. The first
// error stays.
type archive struct {
	w    *bufio.Writer
	made map[string]bool
	n    int // bytes written; for padding
	ino  int
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriter(w), made: map[string]bool{".": true}}
}

// entry appends a file of any type, after the directories that it is in.
func (a *archive) entry(name string, mode uint32, data []byte) {
	if dir := path.Dir(name); !a.made[dir] {
		a.entry(dir, 0o040755, nil)
	}
	a.made[name] = true
	a.ino++
	a.put(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name))
	a.put(data)
}

// put writes and pads to a multiple of four.
func (a *archive) put(data []byte) {
	a.n += len(data)
	pad := -a.n & 3
	a.n += pad
	_, err := a.w.Write(data)
	_, errPad := a.w.Write(make([]byte, pad))
	a.err = errors.Join(a.err, err, errPad)
}

func (a *archive) bytes(name string, data []byte, perm uint32) { a.entry(name, 0o100000|perm, data) }

func (a *archive) link(name, target string) { a.entry(name, 0o120777, []byte(target)) }

func (a *archive) file(name, from string, perm uint32) {
	data, err := os.ReadFile(from)
	a.err = errors.Join(a.err, err)
	a.bytes(name, data, perm)
}

// tree appends a directory, if there is one.
func (a *archive) tree(name, from string) {
	err := fs.WalkDir(os.DirFS(from), ".", func(p string, d fs.DirEntry, err error) error {
		if p == "." && errors.Is(err, fs.ErrNotExist) {
			return fs.SkipAll
		}
		if err == nil && d.Type().IsRegular() {
			a.file(path.Join(name, p), filepath.Join(from, p), 0o644)
		}
		return err
	})
	a.err = errors.Join(a.err, err)
}

func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, nil)
	return errors.Join(a.err, a.w.Flush())
}
