// SPDX-License-Identifier: Apache-2.0

package fdstore

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		pid, count, names string
		want              []string
		err               string
	}{
		{},
		{pid: "7", count: "0"},
		{pid: "7", count: "2", names: "a:b", want: []string{"a", "b"}},
		{pid: "7", count: "3", names: "a", want: []string{"a", "", ""}},
		{pid: "7", count: "1", names: "a:b:c", want: []string{"a"}},
		{pid: "7", count: "2", names: ":b", want: []string{"", "b"}},
		{pid: "8", count: "2", names: "a:b"}, // another process's
		{pid: "x", count: "2", err: `LISTEN_PID="x"`},
		{pid: "", count: "2", err: `LISTEN_PID=""`},
		{pid: "7", count: "", err: `LISTEN_FDS=""`},
		{pid: "7", count: "-1", err: `LISTEN_FDS="-1"`},
		{pid: "7", count: "1000000000", err: "no number of descriptors"},
	} {
		got, err := parse(tt.pid, tt.count, tt.names, 7)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("parse(%q, %q, %q): %v, want an error with %q", tt.pid, tt.count, tt.names, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("parse(%q, %q, %q): %v", tt.pid, tt.count, tt.names, err)
		}
		if diff := cmp.Diff(tt.want, got); len(tt.want)+len(got) > 0 && diff != "" {
			t.Errorf("parse(%q, %q, %q) (-want +got):\n%s", tt.pid, tt.count, tt.names, diff)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("7", "2", "a:b")
	f.Add("7", "4096", "::")
	f.Fuzz(func(t *testing.T, pid, count, names string) {
		list, err := parse(pid, count, names, 7)
		if len(list) > maxFDs || err != nil && list != nil {
			t.Errorf("%d names, %v", len(list), err)
		}
	})
}

// TestStore has a manager of our own receive what the store sends.
func TestStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	if err != nil {
		t.Fatal(err)
	}
	var log []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		b, rights := make([]byte, 4096), make([]byte, 4096)
		for {
			n, rn, _, _, err := unix.Recvmsg(fd, b, rights, unix.MSG_CMSG_CLOEXEC)
			if err != nil {
				return
			}
			fds := 0
			if ms, err := unix.ParseSocketControlMessage(rights[:rn]); err == nil {
				for _, m := range ms {
					list, _ := unix.ParseUnixRights(&m)
					for _, f := range list {
						fds++
						_ = unix.Close(f)
					}
				}
			}
			log = append(log, fmt.Sprintf("%q %d", b[:n], fds))
			if string(b[:n]) == "END" {
				return
			}
		}
	}()
	s := Open(path)
	f, err := os.CreateTemp(t.TempDir(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, err := range []error{s.Keep("a", int(f.Fd())), s.Drop("a", "b"), s.Settle(), s.send("END")} {
		if err != nil {
			t.Error(err)
		}
	}
	<-done
	_ = unix.Close(fd)
	want := []string{`"FDSTORE=1\nFDPOLL=0\nFDNAME=a" 1`, `"FDSTOREREMOVE=1\nFDNAME=a" 0`, `"FDSTOREREMOVE=1\nFDNAME=b" 0`, `"BARRIER=1" 1`, `"END" 0`}
	if diff := cmp.Diff(want, log); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
	if err := s.Keep("a", int(f.Fd())); err == nil || !strings.Contains(err.Error(), "keep descriptor a") {
		t.Errorf("a manager that is gone: %v", err)
	}
	if Open("") != nil {
		t.Error("a store without a manager")
	}
}
