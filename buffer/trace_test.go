// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// traced is one system call that changes a file or makes it durable, or one line that
// the traced program wrote to its standard output.
type traced struct {
	Call     string
	Path, To string
	Off      int64 // or the size that a file is given
	Data     []byte
	Line     string
}

// The calls that are replayed. Others that could change a file are in the list to be
// noticed.
const traceCalls = "openat,write,pwrite64,fsync,fdatasync,ftruncate,truncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,unlinkat," +
	"creat,openat2,writev,pwritev,pwritev2,sync,syncfs,sync_file_range,copy_file_range,sendfile,splice,msync"

// trace runs cmd and returns what it did to files in dir, in order.
func trace(t *testing.T, cmd *exec.Cmd, dir string) []traced {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		require(t, err)
	}
	out := filepath.Join(t.TempDir(), "trace")
	cmd.Args = append([]string{
		strace, "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", strconv.Itoa(4 * mib), "-e", "signal=none",
		"-e", "trace=" + traceCalls, "-o", out, cmd.Path,
	}, cmd.Args[1:]...)
	cmd.Path = strace
	if err := cmd.Run(); err != nil {
		t.Logf("strace: %v", err) // a life that kills itself ends so
	}
	f, err := os.Open(out)
	if err != nil {
		require(t, fmt.Errorf("strace has written nothing: %w", err))
	}
	defer f.Close()
	calls, err := parseTrace(f, dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(out); err != nil {
		t.Fatal(err)
	}
	return calls
}

// require skips the test without what it needs; with EDR_REQUIRE_ALL=1 it fails.
func require(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("EDR_REQUIRE_ALL") == "1" {
		t.Fatalf("EDR_REQUIRE_ALL: %v", err)
	}
	t.Skip(err)
}

// parseTrace reads what strace wrote, and keeps what concerns dir.
func parseTrace(r io.Reader, dir string) (out []traced, err error) {
	in := bufio.NewReaderSize(r, mib)
	begun := map[string][]byte{} // by thread, the call that another one has interrupted
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		pid, rest, _ := bytes.Cut(line, []byte(" "))
		rest = bytes.TrimSpace(rest)
		if i := bytes.LastIndex(rest, []byte("<unfinished ...>")); i >= 0 {
			begun[string(pid)] = bytes.Clone(rest[:i])
			continue
		}
		if bytes.HasPrefix(rest, []byte("<... ")) {
			_, end, _ := bytes.Cut(rest, []byte("resumed>"))
			rest = append(begun[string(pid)], end...)
			delete(begun, string(pid))
		}
		c, err := parseCall(rest, dir)
		if err != nil {
			return nil, fmt.Errorf("%w: %.300s", err, rest)
		}
		if c.Call != "" {
			out = append(out, c)
		}
	}
}

// parseCall reads one line; the zero value is a call of no interest here.
func parseCall(line []byte, dir string) (c traced, err error) {
	end := bytes.LastIndex(line, []byte(" = "))
	name, args, ok := bytes.Cut(line, []byte("("))
	if !ok || end < 0 || bytes.HasPrefix(line[end+3:], []byte("-1")) || bytes.HasPrefix(line[end+3:], []byte("?")) {
		return c, nil // failed, or the end of a thread
	}
	args = bytes.TrimRight(args[:end-len(name)-1], " )")
	c.Call = string(name)
	var a [][]byte
	var paths []string
	for p := range bytes.SplitSeq(args, []byte(", ")) { // nothing printed has a comma: all is in hex
		p = bytes.TrimSpace(p)
		a = append(a, p)
		switch i := bytes.IndexByte(p, '<'); {
		case bytes.HasPrefix(p, []byte("AT_FDCWD")):
		case len(p) > 0 && p[0] == '"' && c.Call != "write" && c.Call != "pwrite64":
			paths = append(paths, string(unhex(p)))
		case i > 0:
			paths = append(paths, string(unhex(p[i:])))
		}
	}
	num := func(i int) (n int64) {
		if err == nil && i < len(a) {
			n, err = strconv.ParseInt(string(a[i]), 0, 64)
		}
		return n
	}
	if c.Call == "write" && bytes.HasPrefix(a[0], []byte("1<")) {
		c.Line = string(unhex(a[1]))
		if !strings.HasSuffix(c.Line, "\n") {
			return c, errors.New("part of a line")
		}
		return c, nil
	}
	if !slices.ContainsFunc(paths, func(p string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }) {
		return traced{}, nil
	}
	c.Path, c.To = paths[0], paths[len(paths)-1]
	switch c.Call {
	case "openat":
		flags := string(a[2])
		if !strings.Contains(flags, "O_CREAT") && !strings.Contains(flags, "O_TRUNC") {
			return traced{}, nil
		}
		if strings.Contains(flags, "O_TRUNC") {
			c.Call = "create and truncate"
		}
	case "pwrite64":
		c.Data, c.Off = unhex(a[1]), num(3)
		if int64(len(c.Data)) != num(2) {
			return c, errors.New("part of a write")
		}
	case "write":
		c.Data, c.Off = unhex(a[1]), -1
	case "ftruncate", "truncate":
		c.Off = num(1)
	case "fallocate":
		if num(1) != 0 || num(2) != 0 {
			return c, errors.New("not a preallocation")
		}
		c.Off = num(3)
	case "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat":
	default:
		return c, errors.New("a call that cannot be replayed")
	}
	return c, err
}

// unhex decodes what strace -xx prints: \x41\x42, in quotes or not.
func unhex(b []byte) []byte {
	b = bytes.Trim(b, `"<>`)
	out := make([]byte, len(b)/4)
	for i := range out {
		if _, err := hex.Decode(out[i:i+1], b[4*i+2:4*i+4]); err != nil {
			return nil
		}
	}
	return out
}

// disk is a disk with a volatile cache, on which a trace is replayed: what a power cut
// leaves is what was synced, and of the rest any sectors and any names.
type disk struct {
	dir     string
	now     map[string]*diskFile // the names as programs see them
	durable map[string]*diskFile // as they are on disk for certain
	pending []entryOp            // changes of names since
}

type diskFile struct {
	data    []byte // on disk for certain
	pending []change
	end     int64 // where the next write without an offset goes
}

// change is one write, or one new size when there is no data.
type change struct {
	off  int64
	data []byte
	grow bool // never makes the file smaller
}

// entryOp is one atomic change of names; nil removes one.
type entryOp map[string]*diskFile

const sector = 512

func newDisk(dir string) *disk {
	return &disk{dir: dir, now: map[string]*diskFile{}, durable: map[string]*diskFile{}}
}

func (d *disk) rename(op entryOp) {
	d.pending = append(d.pending, op)
	op.apply(d.now)
}

func (op entryOp) apply(names map[string]*diskFile) {
	for name, i := range op {
		if i == nil {
			delete(names, name)
		} else {
			names[name] = i
		}
	}
}

// do replays one call; a sync that is ignored has no effect.
func (d *disk) do(c traced, ignore bool) error {
	i := d.now[c.Path]
	switch c.Call {
	case "openat", "create and truncate":
		if i == nil {
			d.rename(entryOp{c.Path: new(diskFile)})
		} else if c.Call != "openat" {
			i.pending, i.end = append(i.pending, change{}), 0
		}
		return nil
	case "rename", "renameat", "renameat2":
		d.rename(entryOp{c.To: i, c.Path: nil})
	case "link", "linkat":
		d.rename(entryOp{c.To: i})
	case "unlink", "unlinkat":
		d.rename(entryOp{c.Path: nil})
	case "fsync", "fdatasync":
		if ignore {
			return nil
		}
		if c.Path == d.dir {
			d.durable, d.pending = maps.Clone(d.now), nil
			return nil
		}
		if i != nil { // else it is of a file without a name, which nobody will see
			for _, w := range i.pending {
				i.data = w.apply(i.data, func() bool { return true })
			}
			i.pending = nil
		}
		return nil
	case "write":
		if i != nil {
			c.Off = i.end
			i.end += int64(len(c.Data))
		}
		fallthrough
	case "pwrite64", "ftruncate", "truncate", "fallocate":
		if i == nil && !strings.HasSuffix(c.Path, " (deleted)") {
			return fmt.Errorf("%s of %s, which is not there", c.Call, c.Path)
		}
		if i != nil {
			i.pending = append(i.pending, change{c.Off, c.Data, c.Call == "fallocate"})
		}
		return nil
	default:
		return fmt.Errorf("unknown call %s", c.Call)
	}
	if i == nil {
		return fmt.Errorf("%s of %s, which is not there", c.Call, c.Path)
	}
	return nil
}

// apply does the change to data, of a write those sectors that are kept.
func (w change) apply(data []byte, keep func() bool) []byte {
	size := func(n int64) {
		if n > int64(len(data)) {
			data = append(data, make([]byte, n-int64(len(data)))...)
		}
	}
	if w.data == nil {
		if !keep() {
			return data
		}
		if size(w.off); !w.grow {
			data = data[:w.off]
		}
		return data
	}
	for at := w.off; at < w.off+int64(len(w.data)); {
		end := min((at/sector+1)*sector, w.off+int64(len(w.data)))
		if keep() {
			size(end)
			copy(data[at:end], w.data[at-w.off:end-w.off])
		}
		at = end
	}
	return data
}

// cut returns the files that a power cut now leaves. Of the sectors that were not synced
// it keeps a random subset, in one of several ways; of the changes of names the first
// few, as a journal does, or any.
func (d *disk) cut(rng *rand.Rand) map[string][]byte {
	names := maps.Clone(d.durable)
	ordered, few := rng.IntN(2) == 0, rng.IntN(len(d.pending)+1)
	for i, op := range d.pending {
		if ordered && i < few || !ordered && rng.IntN(2) == 0 {
			op.apply(names)
		}
	}
	out := map[string][]byte{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		i := names[name]
		data := slices.Clone(i.data)
		kind, odds := rng.IntN(5), rng.IntN(100)
		last := rng.IntN(len(i.pending) + 1)
		for n, w := range i.pending {
			whole := rng.IntN(2) == 0
			data = w.apply(data, func() bool {
				switch kind {
				case 0: // nothing reached the disk
					return false
				case 1: // in order, up to one that is torn
					return n < last || n == last && rng.IntN(2) == 0
				case 2: // whole writes, in any order
					return whole
				case 3: // the newest first
					return n >= last || rng.IntN(100) < odds
				default: // any sectors
					return rng.IntN(100) < odds
				}
			})
		}
		out[name] = data
	}
	return out
}
