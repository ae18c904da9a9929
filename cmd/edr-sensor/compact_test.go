// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// shell is a process as the encoder writes one.
const shell = `{"pid":2310,"name":"dash","path":"/usr/bin/dash","cmd_line":"sh -c id","user":{"uid":"33","name":"www-data"},` +
	`"container":{"uid":"ac2ea168264a08f9aaca0dfc82ff3551418dfd22d02b713142a6843caa2f61bf"},` +
	`"parent_process":{"pid":2001,"name":"php-fpm8.2"}}`

func eventJSON(code, rest string) string {
	return fmt.Sprintf(`{"metadata":{"event_code":%q},"time":1795446000123,"time_dt":"2026-11-23T15:00:00.123456789Z",%s}`, code, rest)
}

func TestCompactLines(t *testing.T) {
	const (
		bash    = `{"pid":7,"name":"bash","path":"/bin/bash","cmd_line":"bash","user":{"uid":"0"}}`
		connect = `"actor":{"process":` + bash + `},"src_endpoint":{"ip":"10.0.0.1","port":4000},"dst_endpoint":{"ip":"2001:db8::1","port":443}`
	)
	for _, c := range []struct{ name, event, want string }{
		{
			"exec in a container", eventJSON("process.exec", `"process":`+shell),
			`15:00:00.123 exec        2310 www-data dash            sh -c id  ← php-fpm8.2[2001], container ac2ea168264a`,
		},
		{
			"unusual exec", eventJSON("process.exec", `"process":{"pid":9,"name":"memfd:x","cmd_line":"x","user":{"uid":"1000"},"file":{"is_deleted":true}},"unmapped":{"exec":{"memfd":true,"fd_exec":true,"secureexec":true}}`),
			`15:00:00.123 exec           9 1000     memfd:x         [memfd deleted by descriptor raised privileges] x`,
		},
		{
			"script", eventJSON("process.exec", `"process":`+bash+`,"unmapped":{"exec":{"script":true,"filename":"./x.sh"}}`),
			`15:00:00.123 exec           7 0        bash            bash  script ./x.sh`,
		},
		{
			"fork", eventJSON("process.fork", `"process":`+bash+`,"actor":{"process":`+shell+`}`),
			`15:00:00.123 fork           7 0        bash            bash  ← dash[2310]`,
		},
		{
			"exit", eventJSON("process.exit", `"process":`+bash+`,"exit_code":3,"duration":1500`),
			`15:00:00.123 exit           7 0        bash            exit 3 after 1.5s`,
		},
		{
			"killed", eventJSON("process.exit", `"process":`+bash+`,"duration":0,"unmapped":{"exit":{"signal":11,"signal_name":"SIGSEGV","core_dumped":true}}`),
			`15:00:00.123 exit           7 0        bash            killed by SIGSEGV (core dumped) after 0s`,
		},
		{
			"snapshot without arguments", eventJSON("process.snapshot", `"process":{"pid":2,"name":"kthreadd","path":"","user":{"uid":"0","name":"root"}}`),
			`15:00:00.123 snapshot       2 root     kthreadd`,
		},
		{
			"connect", eventJSON("net.connect", connect),
			`15:00:00.123 connect        7 0        bash            10.0.0.1:4000 → [2001:db8::1]:443`,
		},
		{
			"refused", eventJSON("net.connect_failed", connect+`,"status_code":"ECONNREFUSED"`),
			`15:00:00.123 failed         7 0        bash            10.0.0.1:4000 → [2001:db8::1]:443 ECONNREFUSED`,
		},
		{
			"close", eventJSON("net.close", connect+`,"cumulative_traffic":{"bytes_out":412,"bytes_in":17828},"duration":760`),
			`15:00:00.123 close          7 0        bash            10.0.0.1:4000 → [2001:db8::1]:443  412 B out, 17.4 KiB in after 760ms`,
		},
		{
			"owner unknown", eventJSON("net.accept", `"src_endpoint":{"name":"unknown"},"dst_endpoint":{"ip":"10.0.0.1","port":22}`),
			`15:00:00.123 accept         - -        -               ? → 10.0.0.1:22`,
		},
		{
			"listen", eventJSON("net.listen", `"actor":{"process":`+bash+`},"dst_endpoint":{"ip":"0.0.0.0","port":4444},"unmapped":{"backlog":128}`),
			`15:00:00.123 listen         7 0        bash            listens on 0.0.0.0:4444 (backlog 128)`,
		},
		{
			"mode", eventJSON("sensor.mode_change", `"app":{"name":"edr-sensor"},"message":"Redis is away","unmapped":{"sensor":{"before":"online","after":"buffering"}}`),
			`15:00:00.123 mode           - -        edr-sensor      online → buffering: Redis is away`,
		},
		{
			"lost", eventJSON("sensor.lost_events", `"app":{"name":"edr-sensor"},"message":"lost 30","unmapped":{"lost":{"by_type":{"net.close":10,"process.exec":1},"ranges":[{"cause":"truncated","first":5,"last":23}]}}`),
			`15:00:00.123 lost           - -        edr-sensor      lost 30 (net.close 10, process.exec 1, seq 5 to 23 truncated)`,
		},
		{
			"suppressed", eventJSON("sensor.suppressed", `"app":{"name":"edr-sensor"},"message":"3 events were left out","unmapped":{"suppressed":{"by_type":{"file.write":2,"file.create":1}}}`),
			`15:00:00.123 left out       - -        edr-sensor      3 events were left out (file.create 1, file.write 2)`,
		},
		{
			"create", eventJSON("file.create", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"}`),
			`15:00:00.123 create         7 0        bash            /tmp/x`,
		},
		{
			"create after others", eventJSON("file.create", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"},"unmapped":{"suppressed_before":812}`),
			`15:00:00.123 create         7 0        bash            /tmp/x  812 before it left out`,
		},
		{
			"write", eventJSON("file.write", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"},"unmapped":{"write":{"bytes":4096,"created":true}}`),
			`15:00:00.123 write          7 0        bash            /tmp/x 4.0 KiB (new)`,
		},
		{
			"open for writing", eventJSON("file.open_write", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"},"unmapped":{"degraded":{"reason":"syscall_descriptor"}}`),
			`15:00:00.123 open           7 0        bash            [degraded] /tmp/x`,
		},
		{
			"delete", eventJSON("file.delete", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"},"unmapped":{"delete":{"nlink_left":0}}`),
			`15:00:00.123 delete         7 0        bash            /tmp/x`,
		},
		{
			"delete one of more names", eventJSON("file.delete", `"actor":{"process":`+bash+`},"file":{"name":"x","path":"/tmp/x"},"unmapped":{"delete":{"nlink_left":2}}`),
			`15:00:00.123 delete         7 0        bash            /tmp/x (2 of its names left)`,
		},
		{
			"rename", eventJSON("file.rename", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"file_result":{"path":"/etc/cron.d/x"},"unmapped":{"rename":{"replaced":true}}`),
			`15:00:00.123 rename         7 0        bash            /tmp/x → /etc/cron.d/x (replaced)`,
		},
		{
			"exchange", eventJSON("file.rename", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"file_result":{"path":"/tmp/y"},"unmapped":{"rename":{"exchanged":true}}`),
			`15:00:00.123 rename         7 0        bash            /tmp/x ↔ /tmp/y`,
		},
		{
			"link", eventJSON("file.link", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/s","xattributes":{"link_target":"/usr/bin/sudo"}}`),
			`15:00:00.123 link           7 0        bash            /tmp/s → /usr/bin/sudo`,
		},
		{
			"symlink", eventJSON("file.symlink", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/l","xattributes":{"link_target":"../etc/shadow"}}`),
			`15:00:00.123 symlink        7 0        bash            /tmp/l → ../etc/shadow`,
		},
		{
			"mkdir", eventJSON("file.mkdir", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/d"}`),
			`15:00:00.123 mkdir          7 0        bash            /tmp/d`,
		},
		{
			"chmod", eventJSON("file.chmod", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x","type_id":1,"xattributes":{"mode":"0644"}},"file_result":{"type_id":1,"xattributes":{"mode":"4755"}}`),
			`15:00:00.123 chmod          7 0        bash            [setuid or setgid] /tmp/x 0644 → 4755`,
		},
		{
			"chmod of a folder", eventJSON("file.chmod", `"actor":{"process":`+bash+`},"file":{"path":"/srv","type_id":2,"xattributes":{"mode":"0755"}},"file_result":{"type_id":2,"xattributes":{"mode":"2775"}}`),
			`15:00:00.123 chmod          7 0        bash            /srv 0755 → 2775`,
		},
		{
			"chmod by a system call", eventJSON("file.chmod", `"actor":{"process":`+bash+`},"file":{"path":"x"},"file_result":{"xattributes":{"mode":"0600"}},"unmapped":{"degraded":{"reason":"syscall_argument"}}`),
			`15:00:00.123 chmod          7 0        bash            [degraded] x → 0600`,
		},
		{
			"chown", eventJSON("file.chown", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x","owner":{"uid":"33","name":"www-data"},"xattributes":{"gid":"33"}},"file_result":{"owner":{"uid":"0"},"xattributes":{"gid":"33"}}`),
			`15:00:00.123 chown          7 0        bash            /tmp/x www-data:33 → 0:33`,
		},
		{
			"truncate", eventJSON("file.truncate", `"actor":{"process":`+bash+`},"file":{"path":"/var/log/auth.log","size":4096},"file_result":{"size":0}`),
			`15:00:00.123 truncate       7 0        bash            /var/log/auth.log 4.0 KiB → 0 B`,
		},
		{
			"timestomp", eventJSON("file.timestomp", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x","modified_time":1795445000123},"file_result":{"modified_time":1672940000000}`),
			`15:00:00.123 times          7 0        bash            /tmp/x 2026-11-23T14:43:20Z → 2023-01-05T17:33:20Z`,
		},
		{
			"chattr", eventJSON("file.chattr", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"unmapped":{"chattr":{"old_flags":["append_only","no_atime"],"new_flags":["immutable","no_atime"]}}`),
			`15:00:00.123 chattr         7 0        bash            /tmp/x -append_only +immutable`,
		},
		{
			"chattr by a system call", eventJSON("file.chattr", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"unmapped":{"chattr":{"new_flags":[]},"degraded":{"reason":"syscall_descriptor"}}`),
			`15:00:00.123 chattr         7 0        bash            [degraded] /tmp/x no flags`,
		},
		{
			"xattr", eventJSON("file.xattr", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"unmapped":{"xattr":{"name":"security.capability"}}`),
			`15:00:00.123 xattr          7 0        bash            /tmp/x +security.capability`,
		},
		{
			"xattr removed", eventJSON("file.xattr", `"actor":{"process":`+bash+`},"file":{"path":"/tmp/x"},"unmapped":{"xattr":{"name":"user.a","removed":true}}`),
			`15:00:00.123 xattr          7 0        bash            /tmp/x -user.a`,
		},
		{
			"mount", eventJSON("file.mount", `"actor":{"process":`+bash+`},"file":{"path":"/mnt/t","volume":"/dev/loop0"},"unmapped":{"mount":{"fstype":"ext4","flags":["MS_NOSUID","MS_NODEV"]}}`),
			`15:00:00.123 mount          7 0        bash            /dev/loop0 on /mnt/t type ext4 MS_NOSUID,MS_NODEV`,
		},
		{
			"umount", eventJSON("file.umount", `"actor":{"process":`+bash+`},"file":{"path":"/mnt/t"},"unmapped":{"mount":{"fstype":"ext4"}}`),
			`15:00:00.123 umount         7 0        bash            /mnt/t`,
		},
		{
			"mount moved", eventJSON("file.move_mount", `"actor":{"process":`+bash+`},"file":{"path":"/usr/lib"},"unmapped":{"mount":{"from":"/mnt/t"}}`),
			`15:00:00.123 move           7 0        bash            /mnt/t → /usr/lib`,
		},
		{
			"case", `{"metadata":{"event_code":"process.exec","tags":[{"name":"case_id","value":"c-1"}]},"time":1795446000123,"process":` + bash + `}`,
			`15:00:00.123 exec           7 0        bash            bash  case c-1`,
		},
		{
			"unknown kind", eventJSON("file.rename", `"activity_name":"Rename","message":"a to b","actor":{"process":`+bash+`}`),
			`15:00:00.123 rename         7 0        bash            Rename a to b`,
		},
		{
			"hostile", eventJSON("process.exec", `"process":{"pid":1,"name":"\u001b]0;x\u0007averylongprocessname","cmd_line":"a\u001b[2J\nb\u202ec\u009b1m","user":{"name":"r\u0000t"}}`),
			`15:00:00.123 exec           1 r\x00t   \x1b]0;x\x07av… a\x1b[2J\nb\u202ec\x9b1m`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := parseRecord([]byte(c.event))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, (&compact{zone: time.UTC}).line(r)); d != "" {
				t.Errorf("line (-want +got):\n%s", d)
			}
		})
	}
}

func TestCompactFitsTheTerminal(t *testing.T) {
	r, err := parseRecord([]byte(eventJSON("process.exec", `"process":{"pid":1,"name":"x","cmd_line":"`+strings.Repeat("ä", 5000)+`","parent_process":{"pid":5,"name":"p"}}`)))
	if err != nil {
		t.Fatal(err)
	}
	for _, width := range []int{0, 80, 200, 20} {
		line := (&compact{width: width, zone: time.UTC}).line(r)
		want := width
		switch width {
		case 0:
			want = 55 + cutText
		case 20: // too narrow: something of what happened is shown all the same
			want = 55 + 20
		}
		if n := utf8.RuneCountInString(line); n != want || !strings.HasSuffix(line, "ä…") {
			t.Errorf("width %d: %d runes, want %d: %s", width, n, want, line)
		}
	}
}

func TestCompactPaints(t *testing.T) {
	r, err := parseRecord([]byte(eventJSON("process.exec", `"process":`+shell)))
	if err != nil {
		t.Fatal(err)
	}
	painted := (&compact{colour: true, zone: time.UTC}).line(r)
	if !strings.Contains(painted, "\x1b[32mexec") {
		t.Errorf("no green exec in %q", painted)
	}
	for _, code := range []string{"0", "1", "2", "31", "32"} {
		painted = strings.ReplaceAll(painted, "\x1b["+code+"m", "")
	}
	if d := cmp.Diff((&compact{zone: time.UTC}).line(r), painted); d != "" {
		t.Errorf("colour changes the text (-plain +painted):\n%s", d)
	}
}

// TestCompactShowsEveryEvent reads what the encoder's own tests expect of it.
func TestCompactShowsEveryEvent(t *testing.T) {
	files, err := filepath.Glob("../../sensor/ocsf/testdata/*.json")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d golden events, %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r, err := parseRecord(data)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		line := (&compact{zone: time.UTC}).line(r)
		if what, _, _ := r.what(); what == "" && r.subject().CmdLine != "" {
			t.Errorf("%s says nothing of what happened: %s", filepath.Base(file), line)
		}
		if r.kind() == "" || strings.Contains(line, "? →") && !strings.Contains(file, "unknown") {
			t.Errorf("%s: %s", filepath.Base(file), line)
		}
		checkLine(t, line)
	}
}

func checkLine(t *testing.T, line string) {
	t.Helper()
	if !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("a line that a terminal would obey: %q", line)
	}
}

func FuzzCompact(f *testing.F) {
	f.Add([]byte(eventJSON("process.exec", `"process":`+shell)), 80)
	f.Add([]byte(`{"metadata":{"event_code":"net."},"src_endpoint":{},"duration":-1}`), 0)
	f.Add([]byte(`{"metadata":{"event_code":"file.chown"},"file":{"owner":{"uid":"\u001b"}},"file_result":{"xattributes":{"mode":"","gid":"\u0007"}}}`), 80)
	f.Add([]byte(`{"metadata":{"event_code":"file.chmod"},"file":{"xattributes":{"mode":"é\u001b"}},"file_result":{"xattributes":{"mode":"\u001bx\n9"}}}`), 80)
	f.Add([]byte(`{"unmapped":{"lost":{"by_type":{"\u001b":1}}},"metadata":{"event_code":"sensor.x"}}`), 1)
	f.Fuzz(func(t *testing.T, data []byte, width int) {
		r, err := parseRecord(data)
		if err != nil {
			return
		}
		checkLine(t, (&compact{width: width, zone: time.UTC}).line(r))
		all := filter{kinds: []string{"*"}, exes: []string{"*"}}
		all.match(r)
	})
}

func TestFilter(t *testing.T) {
	exec, err := parseRecord([]byte(eventJSON("process.exec", `"process":`+shell+`,"actor":{"process":{"pid":2001,"path":"/usr/sbin/php-fpm8.2"}}`)))
	if err != nil {
		t.Fatal(err)
	}
	failed, err := parseRecord([]byte(eventJSON("net.connect_failed", `"actor":{"process":`+shell+`}`)))
	if err != nil {
		t.Fatal(err)
	}
	backdated, err := parseRecord([]byte(eventJSON("file.timestomp", `"actor":{"process":`+shell+`},"file":{"path":"/tmp/x"}`)))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		filter filter
		event  *record
		want   bool
	}{
		{"empty", filter{}, exec, true},
		{"code", filter{kinds: []string{"process.exec"}}, exec, true},
		{"last part", filter{kinds: []string{"exec"}}, exec, true},
		{"family", filter{kinds: []string{"process"}}, exec, true},
		{"shown name", filter{kinds: []string{"failed"}}, failed, true},
		{"pattern", filter{kinds: []string{"conn*"}}, failed, true},
		{"one of", filter{kinds: []string{"exit", "exec"}}, exec, true},
		{"files", filter{kinds: []string{"file"}}, backdated, true},
		{"as in the event code", filter{kinds: []string{"timestomp"}}, backdated, true},
		{"as shown", filter{kinds: []string{"times"}}, backdated, true},
		{"by whom", filter{pids: []int{2310}, exes: []string{"dash"}}, backdated, true},
		{"other kind", filter{kinds: []string{"exit"}}, exec, false},
		{"pid", filter{pids: []int{2310}}, exec, true},
		{"pid of the actor", filter{pids: []int{2001}}, exec, true},
		{"other pid", filter{pids: []int{1}}, exec, false},
		{"base name", filter{exes: []string{"dash"}}, exec, true},
		{"end of the path", filter{exes: []string{"bin/dash"}}, exec, true},
		{"path", filter{exes: []string{"/usr/bin/dash"}}, exec, true},
		{"part of a name", filter{exes: []string{"ash"}}, exec, false},
		{"path below another", filter{exes: []string{"/bin/dash"}}, exec, false},
		{"pattern of a name", filter{exes: []string{"d?sh"}}, exec, true},
		{"pattern of a path", filter{exes: []string{"/usr/bin/*"}}, exec, true},
		{"pattern of another path", filter{exes: []string{"/tmp/*"}}, exec, false},
		{"all fields", filter{[]string{"exec"}, []int{2310}, []string{"dash"}}, exec, true},
		{"one field not", filter{[]string{"exec"}, []int{1}, []string{"dash"}}, exec, false},
	} {
		if got := c.filter.match(c.event); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}
