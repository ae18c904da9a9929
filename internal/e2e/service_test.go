// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// packages are debs of this tree, by version.
type packages map[string]string

const (
	firstVersion  = "1.0.0"
	secondVersion = "1.0.1" // another binary, the same kernel programs
	thirdVersion  = "1.1.0" // other kernel programs
)

var builtPackages struct {
	once sync.Once
	debs packages
	err  error
}

// debPackages builds the first version as it is published, and makes the others of it.
func debPackages(t *testing.T) packages {
	t.Helper()
	require(t, runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64", "there are packages for amd64 and arm64")
	for _, tool := range []string{"dpkg-deb", "git"} {
		_, err := exec.LookPath(tool)
		require(t, err == nil, "no "+tool+" (run: make deps)")
	}
	builtPackages.once.Do(func() {
		builtPackages.debs, builtPackages.err = buildPackages(t)
	})
	if builtPackages.err != nil {
		t.Fatal(builtPackages.err)
	}
	return builtPackages.debs
}

func buildPackages(t *testing.T) (packages, error) {
	dir, err := scratchDir()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("packaging/scripts/packages.sh", runtime.GOARCH)
	cmd.Dir = moduleRoot
	cmd.Env = append(os.Environ(), "VERSION="+firstVersion, "DIST="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("packages.sh: %w\n%s", err, out)
	}
	debs := packages{firstVersion: filepath.Join(dir, fmt.Sprintf("edr-sensor_%s-1_%s.deb", firstVersion, runtime.GOARCH))}
	second := filepath.Join(dir, "second")
	cmd = exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+secondVersion, "-o", second, "github.com/aurorasoc/edr-sensor/cmd/edr-sensor")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build: %w\n%s", err, out)
	}
	for version, binary := range map[string]string{secondVersion: second, thirdVersion: otherBinary(t, thirdVersion)} {
		debs[version] = filepath.Join(dir, version+".deb")
		out, err := exec.Command("sh", "-ec", `
			rm -rf "$1/tree"
			dpkg-deb -R "$2" "$1/tree"
			cp "$3" "$1/tree/usr/bin/edr-sensor"
			chmod 755 "$1/tree/usr/bin/edr-sensor"
			sed -i "s/^Version: .*/Version: $4-1/" "$1/tree/DEBIAN/control"
			sum=$(md5sum <"$3" | cut -d " " -f 1)
			sed -i "s|^[0-9a-f]*\(  usr/bin/edr-sensor\)$|$sum\1|" "$1/tree/DEBIAN/md5sums"
			dpkg-deb --root-owner-group -Zgzip -z1 -b "$1/tree" "$5" >/dev/null`,
			"sh", dir, debs[firstVersion], binary, version, debs[version]).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("package %s: %w\n%s", version, err, out)
		}
	}
	return debs, nil
}

var builtWorkload struct {
	once sync.Once
	path string
	err  error
}

// staticWorkload is this test binary for a machine whose libraries may be others.
func staticWorkload(t *testing.T) string {
	t.Helper()
	builtWorkload.once.Do(func() {
		dir, err := scratchDir()
		if err != nil {
			builtWorkload.err = err
			return
		}
		builtWorkload.path = filepath.Join(dir, "workload")
		cmd := exec.Command("go", "test", "-c", "-o", builtWorkload.path, "github.com/aurorasoc/edr-sensor/internal/e2e")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			builtWorkload.err = fmt.Errorf("go test -c: %w\n%s", err, out)
		}
	})
	if builtWorkload.err != nil {
		t.Fatal(builtWorkload.err)
	}
	return builtWorkload.path
}

// startService boots a machine and installs the sensor's package in it. The unit is the one
// that it ships; config is all that differs from what an administrator finds, and says which
// processes are watched.
func startService(t *testing.T, config string) (*machine, packages) {
	t.Helper()
	debs, program := debPackages(t), staticWorkload(t)
	m := startMachine(t)
	for _, deb := range debs {
		m.copy(deb, "/root/"+filepath.Base(deb))
	}
	m.copy(program, "/usr/local/bin/workload")
	m.write("/etc/edr-sensor/conf.d/test.yaml", config)
	return m, debs
}

func (m *machine) copy(from, to string) {
	m.t.Helper()
	if out, err := exec.Command("cp", from, m.path(to)).CombinedOutput(); err != nil {
		m.t.Fatalf("copy %s: %v\n%s", from, err, out)
	}
}

// install has dpkg install a package, as an administrator does.
func (m *machine) install(deb string) {
	m.t.Helper()
	m.inside("dpkg", "-i", "/root/"+filepath.Base(deb))
}

// started waits until the service has another process than before, and online until that
// is ready.
func (m *machine) started(before string) (pid string) {
	m.t.Helper()
	eventually(m.t, time.Minute, "the service has a process", func() bool {
		pid = m.unit("MainPID")
		return pid != "0" && pid != before
	})
	return pid
}

func (m *machine) online(before string) (pid string) {
	m.t.Helper()
	pid = m.started(before)
	eventually(m.t, time.Minute, "the service is ready", func() bool { return m.unit("ActiveState") == "active" })
	return pid
}

func (m *machine) kill9(pid string) { m.run("sh", "-c", "kill -9 $0", pid) }

// numberedExecs makes numbered execs, one every 20 ms, until it is ended.
func numberedExecs(w *workload) (end func() (made int)) {
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		const batch = 10
		made := 0
		for {
			select {
			case <-stop:
				done <- made
				return
			default:
				w.do(order{Op: "exec", From: 1 + made, N: batch, PerSec: 50})
				made += batch
			}
		}
	}()
	return func() int {
		close(stop)
		return <-done
	}
}

// TestServiceRestarts has systemd restart the installed service again and again while numbered
// programs are executed: 20 times it is killed, and 5 times dpkg installs another version.
// Each number arrives exactly once.
func TestServiceRestarts(t *testing.T) {
	m, debs := startService(t, machineConfig)
	m.install(debs[firstVersion])
	w := m.startWorkload("workload", "system.slice")
	pid := m.online("")
	m.delivered(30 * time.Second)
	end := numberedExecs(w)
	upgrades := []string{secondVersion, thirdVersion, firstVersion, secondVersion, thirdVersion}
	started := time.Now()
	for i := range 25 {
		if i%5 == 4 {
			version := upgrades[i/5]
			m.install(debs[version])
			pid = m.online(pid)
			if s, err := m.status(); err != nil || s.Version != version {
				t.Errorf("version %s runs, want %s: %v", s.Version, version, err)
			}
			continue
		}
		// Anywhere in a commit, a delivery or, one time in five, a start.
		pause := time.NewTimer(time.Duration(i*137%600) * time.Millisecond)
		<-pause.C
		m.kill9(pid)
		switch i % 5 {
		case 0: // the next one is killed while it starts
			pid = m.started(pid)
		case 3: // dpkg finds none
		default:
			pid = m.online(pid)
		}
	}
	made, took := end(), time.Since(started)
	m.delivered(30 * time.Second)
	recs := readStreams(t, m.redis())
	if lost := verify(t, recs); lost != 0 {
		t.Errorf("%d seqs named lost", lost)
	}
	missing, twice := numbersOf(recs, 1, made)
	if len(missing)+len(twice) > 0 {
		t.Errorf("of %d execs %d are missing: %v; %d are there again: %v", made, len(missing), missing, len(twice), twice)
	}
	explain(t, recs, missing)
	for _, r := range recs {
		// What is no restart: the kills, and dpkg. Of a process that ended while no sensor ran
		// nothing is known where its start was read by the one before, so it is told.
		if r.event.StatusCode == "TAMPERING" && !strings.Contains(r.event.Message, "sent SIGKILL") &&
			!strings.Contains(r.event.Message, "/usr/bin/dpkg ") && !strings.HasPrefix(r.event.Message, "unknown (process ") {
			t.Errorf("a restart is told as tampering: %s", r.event.Message)
		}
		// A file that got the number of a binary which was replaced is not the sensor's.
		_, what, _ := strings.Cut(r.event.Message, " changed the sensor's ")
		if _, path, changed := strings.Cut(what, " of "); r.event.StatusCode == "TAMPERING" && changed && !strings.Contains(path, "edr-sensor") {
			t.Errorf("another file is taken for the sensor's: %s", r.event.Message)
		}
	}
	codes := decisionCodes(recs)
	if n := codes["TAKEN_OVER"]; n != codes["START"]-1 || n < len(upgrades) || len(blind(recs))+codes["KEEP_FAILED"] != 0 {
		t.Errorf("decisions by code %v, want TAKEN_OVER in each run but the first and none that is blind", codes)
	}
	t.Logf("%d numbers through 20 kills and %d upgrades in %s; %d runs took over; %s descriptors kept; %s restarts by systemd",
		made, len(upgrades), took.Round(time.Second), codes["TAKEN_OVER"], m.unit("NFileDescriptorStore"), m.unit("NRestarts"))
}

// machineConfig has all of the machine watched.
const machineConfig = `
sensor: {scope: "cgroup:/"}
transport: {address: "127.0.0.1:6379"}
`

// blind are the losses that name a time in which nothing was seen.
func blind(recs []record) (list []record) {
	for _, r := range recs {
		if strings.HasPrefix(r.event.StatusCode, "BLIND_") {
			list = append(list, r)
		}
	}
	return list
}

// TestServiceRestartsControl does the same with nothing kept: numbers are missing, and each of
// them falls into a time that a loss record names.
func TestServiceRestartsControl(t *testing.T) {
	m, debs := startService(t, machineConfig)
	m.write("/etc/systemd/system/edr-sensor.service.d/forget.conf", "[Service]\nFileDescriptorStoreMax=0\n")
	m.install(debs[firstVersion])
	w := m.startWorkload("workload", "system.slice")
	pid := m.online("")
	m.delivered(30 * time.Second)
	end := numberedExecs(w)
	for i := range 4 {
		if i == 3 {
			m.install(debs[secondVersion])
		} else {
			m.kill9(pid)
		}
		pid = m.online(pid)
		eventually(t, time.Minute, "the gap is named", func() bool { return len(blind(readStreams(t, m.redis()))) == i+1 })
		m.goesOn(time.Minute)
	}
	made := end()
	m.delivered(30 * time.Second)
	recs := readStreams(t, m.redis())
	verify(t, recs)
	missing, twice := numbersOf(recs, 1, made)
	if len(missing) == 0 || len(twice) != 0 {
		t.Errorf("%d are missing, %d are there again, want some and none", len(missing), len(twice))
	}
	gaps := blind(recs)
	if codes := decisionCodes(recs); codes["BLIND_KILLED"] != 3 || codes["BLIND_STOPPED"] != 1 || codes["TAKEN_OVER"] != 0 {
		t.Errorf("decisions by code %v, want 3 BLIND_KILLED, 1 BLIND_STOPPED and no TAKEN_OVER", codes)
	}
	// When the missing ones happened is known by the numbers before and after them.
	at := timesOf(recs)
	for _, run := range runsOf(missing) {
		first, last := at[run[0]-1], at[run[1]+1]
		if !slices.ContainsFunc(gaps, func(r record) bool { return r.event.From <= last && r.event.To >= first }) {
			t.Errorf("%d to %d are missing between %d and %d, and no loss record names that time", run[0], run[1], first, last)
		}
	}
	if n := len(runsOf(missing)); n > len(gaps) {
		t.Errorf("%d gaps, but %d loss records", n, len(gaps))
	}
	t.Logf("%d of %d numbers are missing in %d gaps", len(missing), made, len(runsOf(missing)))
}

// explain logs what the sensor decided about itself around numbers that are missing.
func explain(t *testing.T, recs []record, missing []int) {
	t.Helper()
	const near = 3000 // ms
	at := timesOf(recs)
	for _, run := range runsOf(missing) {
		first, last := at[run[0]-1], at[run[1]+1]
		t.Logf("%d to %d are missing, between %d and %d", run[0], run[1], first, last)
		for _, r := range recs {
			if r.stream == decisionsKey && r.event.StatusCode != "TAMPERING" && r.event.Time > first-near && r.event.Time < last+near {
				t.Logf("seq %d at %d: %s", r.seq, r.event.Time, r.data)
			}
		}
	}
}

// timesOf says when the numbered execs happened, in ms.
func timesOf(recs []record) map[int]int64 {
	at := map[int]int64{}
	for _, r := range recs {
		if r.event.Metadata.EventCode != "process.exec" {
			continue
		}
		for word := range strings.FieldsSeq(r.event.Process.CmdLine) {
			n := 0
			if _, err := fmt.Sscanf(word, "edr-e2e-%d", &n); err == nil {
				at[n] = r.event.Time
			}
		}
	}
	return at
}

// runsOf puts consecutive numbers together: the first and the last of each.
func runsOf(list []int) (runs [][2]int) {
	for _, n := range list {
		if len(runs) > 0 && runs[len(runs)-1][1] == n-1 {
			runs[len(runs)-1][1] = n
		} else {
			runs = append(runs, [2]int{n, n})
		}
	}
	return runs
}

// TestServiceFootprint measures what the installed service costs under its unit: from when
// systemd starts it until it is ready, and at rest. It asserts nothing and runs in make bench
// only.
func TestServiceFootprint(t *testing.T) {
	if os.Getenv("EDR_FOOTPRINT") == "" {
		t.Skip("EDR_FOOTPRINT is not set: this is a measurement, see make bench")
	}
	m, debs := startService(t, machineConfig)
	ready := func(what string) {
		t.Helper()
		began, err1 := strconv.ParseInt(m.unit("ExecMainStartTimestampMonotonic"), 10, 64)
		end, err2 := strconv.ParseInt(m.unit("ActiveEnterTimestampMonotonic"), 10, 64)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		t.Logf("ready after %d ms: %s", (end-began)/1000, what)
	}
	size, err := os.Stat(debs[firstVersion])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %.1f MB", filepath.Base(debs[firstVersion]), float64(size.Size())/1e6)
	m.install(debs[firstVersion])
	pid := m.online("")
	ready("the first start")
	m.kill9(pid)
	pid = m.online(pid)
	ready("after kill -9, with the same programs")
	m.install(debs[thirdVersion])
	pid = m.online(pid)
	ready("after an upgrade, with other programs")
	m.run("systemctl", "restart", "edr-sensor")
	m.online(pid)
	ready("after a restart")
	m.delivered(30 * time.Second)
	u := newUsage(m)
	for range 30 {
		<-time.After(time.Second)
		u.look()
	}
	t.Logf("at rest for 30 s: %s", u)
}
