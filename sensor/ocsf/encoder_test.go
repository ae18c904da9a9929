// SPDX-License-Identifier: Apache-2.0

package ocsf

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestAppendDoesNotAllocate(t *testing.T) {
	e := newTestEncoder()
	dst := make([]byte, 0, 1<<20)
	for _, g := range goldens() {
		if g.ev.Kind == event.Lifecycle {
			continue
		}
		if n := testing.AllocsPerRun(100, func() { dst = e.Append(dst[:0], testSeq, testNow, &g.ev) }); n != 0 {
			t.Errorf("%s: %v allocations, want 0", g.name, n)
		}
	}
}

func TestUIDNamesThePlaceInTheStream(t *testing.T) {
	form := regexp.MustCompile(`"uid":"([0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})"`)
	ev := execEvent()
	uid := func(e *Encoder, seq uint64) string {
		m := form.FindSubmatch(e.Append(nil, seq, testNow, &ev))
		if m == nil {
			t.Fatalf("metadata.uid is no UUID version 8")
		}
		return string(m[1])
	}
	e := newTestEncoder()
	seen := map[string]bool{}
	for _, seq := range []uint64{0, 1, 2, 1 << 32, 1<<62 - 1} {
		u := uid(e, seq)
		if u != uid(newTestEncoder(), seq) {
			t.Errorf("seq %d has another uid when encoded again", seq)
		}
		if seen[u] {
			t.Errorf("seq %d has the uid of another", seq)
		}
		seen[u] = true
	}
	e.Bind("another epoch")
	if seen[uid(e, 1)] {
		t.Error("another epoch has the same uid")
	}
	sum := sha256.Sum256([]byte(testAgent().ID + "\x00" + testEpoch))
	h := hex.EncodeToString(sum[:8])
	if got, want := uid(newTestEncoder(), 0x1234), h[:8]+"-"+h[8:12]+"-8"+h[12:15]+"-8000-000000001234"; got != want {
		t.Errorf("uid is %s, documented is %s", got, want)
	}
}

func TestRFC3339(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	times := []int64{0, -1, 1, 951782399_999999999, 951782400_000000000, 4107542400_000000000, 1<<63 - 1, -1 << 63}
	for range 10000 {
		times = append(times, int64(r.Uint64()))
	}
	for _, ns := range times {
		want := time.Unix(0, ns).UTC().Format("2006-01-02T15:04:05.000000000Z")
		if got := string(appendRFC3339(nil, ns)); got != want {
			t.Errorf("%d is %s, want %s", ns, got, want)
		}
	}
}

// TestCommunityID has the examples of the specification's reference
// implementation.
func TestCommunityID(t *testing.T) {
	for _, c := range []struct{ a, b, want string }{
		{"128.232.110.120:34855", "66.35.250.204:80", "1:LQU9qZlK+B5F3KDmev6m5PMibrg="},
		{"1.2.3.4:4584", "43.3.132.3:3483", "1:koNcqhFRD5kb254ZrLsdv630jCM="},
		{"[2001:470:e5bf:dead:4957:2174:e82c:4887]:63943", "[2607:f8b0:400c:c03::1a]:25", "1:/qFaeAR+gFe1KYjMzVDsMv+wgU4="},
	} {
		a, b := netip.MustParseAddrPort(c.a), netip.MustParseAddrPort(c.b)
		for _, got := range [][]byte{appendCommunityID(nil, a, b), appendCommunityID(nil, b, a)} {
			if string(got) != c.want {
				t.Errorf("%s %s is %s, want %s", c.a, c.b, got, c.want)
			}
		}
	}
}

func TestBoundary(t *testing.T) {
	for _, c := range []struct{ local, remote, want string }{
		{"127.0.0.1", "127.0.0.1", "Localhost"},
		{"10.0.0.1", "10.0.0.1", "Localhost"},
		{"::1", "::1", "Localhost"},
		{"10.0.0.1", "192.168.7.1", "Internal"},
		{"10.0.0.1", "100.127.255.255", "Internal"},
		{"fd00::1", "fd00::2", "Internal"},
		{"fe80::1", "fe80::2", "Internal"},
		{"10.0.0.1", "100.128.0.0", "External"},
		{"10.0.0.1", "8.8.8.8", "External"},
		{"2001:db8::1", "2606:4700::1", "External"},
	} {
		if got := boundary(netip.MustParseAddr(c.local), netip.MustParseAddr(c.remote)); !strings.Contains(got, `"`+c.want+`"`) {
			t.Errorf("%s to %s is %s, want %s", c.local, c.remote, got, c.want)
		}
	}
}

// TestContext has the ids of a run, and those of the open cases that cover one
// event, the oldest first.
func TestContext(t *testing.T) {
	type tag struct{ Name, Value string }
	type metadata struct {
		CorrelationUID string `json:"correlation_uid"`
		Tags           []tag
	}
	run := event.Agent{ID: "a", CaseID: "run-case", InvestigationID: "run-inv", UserID: "analyst"}
	for _, c := range []struct {
		name  string
		agent event.Agent
		cases []*event.Case
		want  metadata
	}{
		{"none", event.Agent{}, nil, metadata{}},
		{"run", run, nil, metadata{"run-inv", []tag{{"case_id", "run-case"}, {"investigation_id", "run-inv"}, {"user_id", "analyst"}}}},
		{"case only", event.Agent{}, []*event.Case{{ID: "c"}}, metadata{"", []tag{{"case_id", "c"}}}},
		{"case in run", run, []*event.Case{{ID: "c", InvestigationID: "i", UserID: "u"}}, metadata{"run-inv", []tag{
			{"case_id", "run-case"},
			{"investigation_id", "run-inv"},
			{"user_id", "analyst"},
			{"case_id", "c"},
			{"investigation_id", "i"},
			{"user_id", "u"},
		}}},
		{"two cases, the oldest without an investigation", event.Agent{}, []*event.Case{{ID: "a", UserID: "u"}, {ID: "b", InvestigationID: "i", UserID: "u"}}, metadata{"i", []tag{
			{"case_id", "a"}, {"user_id", "u"}, {"case_id", "b"}, {"investigation_id", "i"}, {"user_id", "u"},
		}}},
	} {
		ev := execEvent()
		ev.Cases = c.cases
		var got struct{ Metadata metadata }
		if err := json.Unmarshal(New(event.Host{}, c.agent).Append(nil, 1, 1, &ev), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, got.Metadata); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

// TestArgvIsComplete reads the arguments of an exec back, however long.
func TestArgvIsComplete(t *testing.T) {
	for _, n := range []int{10, maxArgvArray, 200 << 10, 256 << 10} {
		ev := longArgv(n)
		var got struct {
			Metadata struct {
				IsTruncated bool `json:"is_truncated"`
			}
			Process struct {
				CmdLine     string `json:"cmd_line"`
				XAttributes struct {
					Argv []string
					In   bool `json:"argv_in_cmd_line"`
				}
			}
		}
		if err := json.Unmarshal(newTestEncoder().Append(nil, 1, 1, &ev), &got); err != nil {
			t.Fatal(err)
		}
		if want := string(event.AppendCmdLine(nil, ev.Exec.Argv)); got.Process.CmdLine != want {
			t.Errorf("%d bytes: cmd_line has %d bytes, want %d", n, len(got.Process.CmdLine), len(want))
		}
		x := got.Process.XAttributes
		if array := len(ev.Exec.Argv) <= maxArgvArray; array != (len(x.Argv) > 0) || array == x.In || got.Metadata.IsTruncated {
			t.Errorf("%d bytes: %d arguments, argv_in_cmd_line %v, truncated %v", n, len(x.Argv), x.In, got.Metadata.IsTruncated)
		}
		if len(x.Argv) > 0 && strings.Join(x.Argv, "\x00")+"\x00" != string(ev.Exec.Argv) {
			t.Errorf("%d bytes: other arguments in the array", n)
		}
	}
}

func TestUntruncatedSize(t *testing.T) {
	ev := cutArgv()
	doc := newTestEncoder().Append(nil, 1, 1, &ev)
	var got struct {
		Metadata struct {
			Size int `json:"untruncated_size"`
		}
	}
	if err := json.Unmarshal(doc, &got); err != nil {
		t.Fatal(err)
	}
	if want := (len(doc) + int(ev.Exec.ArgvSize) - len(ev.Exec.Argv)) / 1024; got.Metadata.Size != want && got.Metadata.Size != want+1 {
		t.Errorf("untruncated_size is %d KB, want about %d", got.Metadata.Size, want)
	}
}

func BenchmarkEncode(b *testing.B) {
	large := longArgv(200 << 10)
	small := execEvent()
	small.Subject.Container, small.Parent.Container = nil, nil
	for _, g := range []golden{
		{"exec", execEvent()},
		{"exec-no-container", small},
		{"exec-200KiB", large},
		{"fork", forkEvent()},
		{"exit", exitEvent()},
		{"snapshot", taskEvent()},
		{"connect", tcpEvent(event.TCPConnect)},
		{"close", closeEvent()},
		{"file", fileGoldens()[0].ev},
		{"rename", changed(event.FileRename, "/tmp/.x", func(f *event.FileInfo) { f.Path2 = []byte("/etc/cron.d/php-sess") })},
	} {
		b.Run(g.name, func(b *testing.B) {
			e := newTestEncoder()
			dst := e.Append(nil, testSeq, testNow, &g.ev)
			b.ReportAllocs()
			for b.Loop() {
				dst = e.Append(dst[:0], testSeq, testNow, &g.ev)
			}
			b.ReportMetric(float64(len(dst)), "JSON-B")
		})
	}
}
