// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// fakeProc writes files of one process in a scratch /proc.
func fakeProc(t testing.TB, pid string, files map[string]string) procfs {
	t.Helper()
	root := t.TempDir()
	addProc(t, root, pid, files)
	return procfs(root)
}

func addProc(t testing.TB, root, pid string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(root, pid, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if link, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(link, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func statLine(comm, ppid, start string) string {
	return "4711 (" + comm + ") S " + ppid + " 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 " + start + " 1000 100 0\n"
}

func TestProcStat(t *testing.T) {
	for _, tt := range []struct {
		name, line string
		want       stat
		ok         bool
	}{
		{"plain", statLine("bash", "42", "55558"), stat{"bash", 42, 55558}, true},
		{"odd name", statLine("a) R 1 (b ", "42", "7"), stat{"a) R 1 (b ", 42, 7}, true},
		{"empty", "", stat{}, false},
		{"cut", "4711 (bash) S 42 1", stat{}, false},
		{"no name", strings.Repeat("1 ", 40), stat{}, false},
		{"no number", statLine("bash", "x", "7"), stat{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := fakeProc(t, "4711", map[string]string{"stat": tt.line}).stat(4711)
			if ok != tt.ok || got != tt.want {
				t.Errorf("stat = %+v, %v", got, ok)
			}
		})
	}
	if _, ok := procfs(t.TempDir()).stat(4711); ok {
		t.Error("a process that is not there has a stat")
	}
}

func TestProcCmdline(t *testing.T) {
	long := strings.Repeat("0123456789abcde\x00", argvMax/16+10)
	for _, tt := range []struct{ name, file, want string }{
		{"plain", "a\x00b c\x00", "a\x00b c\x00"},
		{"empty argument inside", "a\x00\x00b\x00", "a\x00\x00b\x00"},
		{"title", "sshd: alice [priv]\x00\x00\x00\x00", "sshd: alice [priv]\x00"},
		{"title without an end", "nginx: worker", "nginx: worker\x00"},
		{"kernel thread", "", ""},
		{"only zeroes", "\x00\x00", ""},
		{"longer than a read", long[:20000], long[:20000]},
		{"longer than what is kept", long, long[:argvMax]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := fakeProc(t, "4711", map[string]string{"stat": statLine("x", "1", "50"), "cmdline": tt.file})
			if got := string(f.cmdline(key(4711, 50*tick+3), []byte("> "))); got != "> "+tt.want {
				t.Errorf("cmdline = %d bytes %.40q, want %d bytes %.40q", len(got)-2, got, len(tt.want), tt.want)
			}
			if got := f.cmdline(key(4711, 51*tick), nil); len(got) > 0 {
				t.Errorf("the pid was reused, and yet cmdline = %.40q", got)
			}
		})
	}
}

func TestProcFill(t *testing.T) {
	exe := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(exe, []byte("#!"), 0o755); err != nil {
		t.Fatal(err)
	}
	f := fakeProc(t, "4711", map[string]string{
		"stat": statLine("prog", "42", "5000"), "cmdline": "prog\x00-x y\x00", "exe": "-> " + exe, "cwd": "-> /srv",
		"cgroup":   "4:pids:/v1\n0::/system.slice/prog.service\n",
		"loginuid": "1000", "sessionid": "4294967295",
		"ns/pid": "-> pid:[4026531836]", "ns/mnt": "-> mnt:[4026531840]", "ns/net": "-> net:[x]",
		"status": "Name:\tprog\nNSpid:\t4711\t9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n" +
			"CapInh:\t0000000000000001\nCapPrm:\t0000000000000002\nCapEff:\t0000000000000003\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000005\nSeccomp:\t2\n",
	})
	addProc(t, string(f), "42", map[string]string{"stat": statLine("sh", "1", "4000")})
	parent := func(pid uint32, ticks uint64) event.ProcessKey {
		if pid != 42 || ticks != 4000 {
			t.Errorf("asked for the parent %d of %d", pid, ticks)
		}
		return key(42, 4000*tick+1)
	}
	got := event.Process{Key: key(4711, 5000*tick+77)}
	if !f.fill(&got, true, parent) {
		t.Fatal("not filled")
	}
	if got.File.Ino == 0 || got.File.Size != 2 || got.File.Mode&0o777 != 0o755 || got.File.FSMagic == 0 {
		t.Errorf("File = %+v", got.File)
	}
	got.File = event.File{}
	want := event.Process{
		Key: key(4711, 5000*tick+77), Parent: key(42, 4000*tick+1), NSPID: 9, Comm: "prog", Path: exe, CmdLine: "prog '-x y'", CWD: "/srv",
		Cred: event.Cred{
			UID: 1, EUID: 2, SUID: 3, FSUID: 4, GID: 5, EGID: 6, SGID: 7, FSGID: 8,
			CapInheritable: 1, CapPermitted: 2, CapEffective: 3, CapBounding: 0x1ffffffffff, CapAmbient: 5, SeccompMode: 2,
		},
		NS: event.Namespaces{PID: 4026531836, Mnt: 4026531840}, CgroupPath: "/system.slice/prog.service",
		LoginUID: 1000, SessionID: event.Unset, Partial: true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	other := event.Process{Key: key(4711, 5001*tick), Comm: "before"}
	if f.fill(&other, true, parent) || other.Comm != "before" {
		t.Errorf("filled from a process of another start time: %+v", other)
	}
	addProc(t, string(f), "43", map[string]string{"stat": "not to be read"})
	for _, tt := range []struct {
		key  event.ProcessKey
		gone bool
	}{{got.Key, false}, {other.Key, true}, {key(43, 5000*tick), false}, {key(44, 5000*tick), true}} {
		if is := f.gone(tt.key); is != tt.gone {
			t.Errorf("%+v is gone: %t, want %t", tt.key, is, tt.gone)
		}
	}
}

func TestProcCgroup(t *testing.T) {
	for _, tt := range []struct{ name, file, want string }{
		{"unified", "0::/a\n", "/a"},
		{"hybrid", "5:pids:/docker/x\n1:name=systemd:/docker/x\n0::/system.slice/docker.service\n", "/system.slice/docker.service"},
		{"unified at the root", "5:pids:/docker/x\n0::/\n", "/docker/x"},
		{"version 1", "5:pids:/\n4:memory:/docker/x\n", "/docker/x"},
		{"all at the root", "5:pids:/\n0::/\n", "/"},
		{"colons", "0::/a:b:c\n", "/a:b:c"},
		{"garbage", "x\n:\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := fakeProc(t, "1", map[string]string{"cgroup": tt.file}).cgroup(1); got != tt.want {
				t.Errorf("cgroup = %q, want %q", got, tt.want)
			}
		})
	}
}

// TestProcSelf reads this very process.
func TestProcSelf(t *testing.T) {
	f := procfs("/proc")
	pid := uint32(os.Getpid())
	s, ok := f.stat(pid)
	if !ok {
		t.Skip("no /proc")
	}
	p := event.Process{Key: key(pid, s.ticks*tick)}
	if !f.fill(&p, true, func(uint32, uint64) event.ProcessKey { return key(1, 2) }) {
		t.Fatal("not filled")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if p.Path != exe || p.NSPID == 0 || p.NS.PID == 0 || p.CmdLine == "" || p.Parent != key(1, 2) || int(p.Cred.UID) != os.Getuid() {
		t.Errorf("fill = %+v", p)
	}
}
