// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/debian"
)

// machine is a Debian 12 with systemd as its first process and a redis-server, in
// namespaces and control groups of its own, on the kernel of this host. To the sensor in it
// the machine is all that there is: its scope is the machine's control group.
type machine struct {
	t     *testing.T
	init  int               // its systemd, as this host numbers it
	group map[string]string // directories of its control groups on this host, by controllers; "" is version 2
}

// Controllers that systemd uses, where they have hierarchies of version 1.
var machineControllers = []string{"memory", "cpu", "cpuacct", "cpu,cpuacct", "pids", "devices", "name=systemd", ""}

// inMachine is what becomes the machine's systemd. It writes how this host numbers it, as
// long as it sees this host's /proc. Its arguments are a directory and a root file system.
// What would change settings of the kernel has nothing to write to, and the state of the
// sensor is on a file system as a disk has one.
const inMachine = `
read -r init _ </proc/self/stat
cd "$1"
mkdir upper work root state
mount -t overlay -o "lowerdir=$2,upperdir=upper,workdir=work" overlay root
cd root
mkdir -p var/lib/edr-sensor
mount --bind ../state var/lib/edr-sensor
mount -t proc -o nosuid,nodev,noexec proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
if [ "$3" = unified ]; then
	mount -t cgroup2 cgroup2 sys/fs/cgroup
else
	mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
	for c in $4; do
		mkdir "sys/fs/cgroup/${c#name=}"
		case $c in name=*) o=none,$c ;; *) o=$c ;; esac
		mount -t cgroup -o "$o" cgroup "sys/fs/cgroup/${c#name=}"
		case $c in *,*) for l in $(echo "$c" | tr , ' '); do ln -s "$c" "sys/fs/cgroup/$l"; done ;; esac
	done
	mkdir sys/fs/cgroup/unified
	mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
fi
mount -t tmpfs -o mode=755 tmpfs dev
for d in null zero full random urandom tty; do
	touch "dev/$d"
	mount --bind "/dev/$d" "dev/$d"
done
touch dev/console
mount --bind /dev/null dev/console
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
ip link set lo up
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
for u in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	getty@tty1.service console-getty.service systemd-pstore.service systemd-logind.service systemd-modules-load.service \
	dev-hugepages.mount sys-fs-fuse-connections.mount sys-kernel-debug.mount; do
	ln -sf /dev/null "etc/systemd/system/$u"
done
printf 'unixsocket %s\nunixsocketperm 777\nappendonly yes\n' "$5" >>etc/redis/redis.conf
echo "$init"
mkdir -p mnt
pivot_root . mnt
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=edr-e2e sh -ec 'umount -l /mnt; exec /lib/systemd/systemd --show-status=0 >/dev/null 2>&1'
`

// startMachine boots one and waits until it is up. It ends with the test.
func startMachine(t *testing.T) *machine {
	t.Helper()
	requireHost(t)
	for _, tool := range []string{"unshare", "nsenter", "mmdebstrap"} {
		_, err := exec.LookPath(tool)
		require(t, err == nil, "no "+tool+" (run: make deps)")
	}
	cache, err := debian.UserCache(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	root, release, err := cache.Root(t.Context(), "bookworm")
	require(t, err == nil, fmt.Sprint(err))
	t.Cleanup(release)

	m := &machine{t: t, group: makeGroups(t)}
	dir, err := os.MkdirTemp("", "edr-machine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.remove(dir) })
	var controllers, procs []string
	for c, d := range m.group {
		procs = append(procs, filepath.Join(d, "cgroup.procs"))
		if c != "" {
			controllers = append(controllers, c)
		}
	}
	layout := "unified"
	if len(controllers) > 0 {
		layout = "mixed"
	}
	// It ends when its standard input does, which is at the latest with this process.
	holder := exec.Command("sh", append([]string{"-ec", `
		script=$1 dir=$2 root=$3 layout=$4 controllers=$5 socket=$6
		shift 6
		(
			for p; do echo 0 >"$p"; done
			exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --net --cgroup \
				sh -euc "$script" sh "$dir" "$root" "$layout" "$controllers" "$socket"
		) &
		cat
		kill -9 $!
		wait`, "sh", inMachine, dir, root, layout, strings.Join(controllers, " "), redisSocket}, procs...)...)
	says := &lines{}
	holder.Stderr = says
	stdin, err1 := holder.StdinPipe()
	stdout, err2 := holder.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = holder.Wait()
	})
	answer, _ := bufio.NewReader(stdout).ReadString('\n')
	m.init, err = strconv.Atoi(strings.TrimSpace(answer))
	if err != nil {
		_ = stdin.Close()
		_ = holder.Wait() // has written all that it says
		require(t, false, "this host makes no machine with systemd: "+says.tail(20))
	}
	state := ""
	eventually(t, 3*time.Minute, "systemd is up", func() bool {
		state, _ = m.try("systemctl", "is-system-running") // fails until it is
		return state == "running" || state == "degraded"
	})
	if state != "running" {
		t.Fatalf("the machine is %s:\n%s", state, m.run("systemctl", "--failed", "--no-pager"))
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := m.try("journalctl", "--no-pager", "-n", "60")
			t.Logf("the machine's journal:\n%s", log)
		}
	})
	return m
}

// makeGroups makes a control group in each hierarchy that systemd uses. The controllers that
// the unit's limits need must be among them.
func makeGroups(t *testing.T) map[string]string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("edr-e2e-%d-%d", os.Getpid(), time.Now().UnixNano())
	groups := map[string]string{}
	has := map[string]bool{}
	for line := range strings.Lines(string(own)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		if !slices.Contains(machineControllers, controllers) {
			continue
		}
		at := groupMount(string(mounts), controllers)
		if at == "" {
			continue
		}
		// Below the own group: its limits hold for the machine, too. A group of version 2 that
		// has processes cannot have groups with controllers, so that goes beside it.
		parent := filepath.Join(at, path)
		if _, err := os.Stat(parent); err != nil || controllers == "" {
			parent = at
		}
		if controllers == "" { // what there is already, is refused elsewhere, or shows below
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+memory +cpu +pids"), 0)
		}
		dir := filepath.Join(parent, name)
		err := os.Mkdir(dir, 0o755)
		require(t, err == nil, fmt.Sprintf("root may make no control group here: %v", err))
		groups[controllers] = dir
		t.Cleanup(func() { removeGroup(t, dir) })
		for c := range strings.SplitSeq(controllers, ",") {
			has[c] = true
		}
		if controllers == "" {
			list, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers")) // none without it
			for c := range strings.FieldsSeq(string(list)) {
				has[c] = true
			}
		}
	}
	require(t, groups[""] != "", "no hierarchy of control groups of version 2 is mounted, in which the sensor's scope is looked up")
	for _, c := range []string{"memory", "cpu"} {
		require(t, has[c], fmt.Sprintf("a machine of its own can have no %s controller: %s is what there is", c, strings.TrimSpace(string(own))))
	}
	return groups
}

// groupMount finds where a hierarchy is mounted.
func groupMount(mounts, controllers string) string {
	for line := range strings.Lines(mounts) {
		about, kind, _ := strings.Cut(line, " - ")
		at, k := strings.Fields(about), strings.Fields(kind)
		if len(at) < 5 || len(k) < 3 {
			continue
		}
		if controllers == "" {
			if k[0] == "cgroup2" {
				return at[4]
			}
			continue
		}
		options := strings.Split(k[2], ",")
		if k[0] == "cgroup" && !slices.ContainsFunc(strings.Split(controllers, ","), func(c string) bool { return !slices.Contains(options, c) }) {
			return at[4]
		}
	}
	return ""
}

// removeGroup removes a group and those below it, once all processes in them have gone.
func removeGroup(t *testing.T, dir string) {
	t.Helper()
	eventually(t, time.Minute, dir+" is empty", func() bool {
		var all []string
		_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for _, d := range slices.Backward(all) {
			_ = os.Remove(d)
		}
		_, err := os.Stat(dir)
		return os.IsNotExist(err)
	})
}

// remove deletes what the machine had, once its last process, and its mounts with it, have gone.
func (m *machine) remove(dir string) {
	eventually(m.t, time.Minute, "the machine has gone", func() bool { return os.RemoveAll(dir) == nil })
}

// path is where a file of the machine can be reached.
func (m *machine) path(name string) string { return fmt.Sprintf("/proc/%d/root%s", m.init, name) }

// command runs something in the machine's namespaces. Its sensor does not see it: it is in
// none of its control groups.
func (m *machine) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{
		"--target", strconv.Itoa(m.init), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive",
	}, args...)...)
}

func (m *machine) try(args ...string) (string, error) {
	out, err := m.command(args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// inside has systemd run something, so that it belongs to the machine in every way.
func (m *machine) inside(args ...string) string {
	m.t.Helper()
	return m.run(append([]string{"systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--"}, args...)...)
}

// startWorkload starts one as a service of the machine.
func (m *machine) startWorkload(name, slice string) *workload {
	m.t.Helper()
	cmd := m.command("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--unit="+name, "--slice="+slice, "--setenv="+workloadEnv+"=1", "--property=LimitNOFILE=65536", "/usr/local/bin/workload")
	return runWorkloadAs(m.t, cmd)
}

func (m *machine) write(name, text string) {
	m.t.Helper()
	path := m.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// unit asks systemd for a property of the sensor's service.
func (m *machine) unit(property string) string {
	m.t.Helper()
	return m.run("systemctl", "show", "edr-sensor", "--value", "--property="+property)
}

func (m *machine) status() (s agent.Status, err error) {
	c := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", m.path("/run/edr-sensor/control.sock"))
	}}}
	r, err := c.Get("http://sensor/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

// goesOn waits until Redis has all that had been seen when the sensor answered first. Unlike
// delivered it ends while there is more to see.
func (m *machine) goesOn(within time.Duration) {
	m.t.Helper()
	var want uint64
	eventually(m.t, within, "what was seen is delivered", func() bool {
		s, err := m.status()
		if err == nil && want == 0 {
			want = s.Buffer.Last
		}
		return want > 0 && s.Transport.Acked >= want && s.Buffer.Losses == 0
	})
}

// delivered waits until Redis has everything, and the names of what is lost.
func (m *machine) delivered(within time.Duration) agent.Status {
	m.t.Helper()
	return allDelivered(m.t, within, func() (agent.Status, error) {
		s, err := m.status()
		if err == nil && s.Buffer.Losses > 0 {
			err = fmt.Errorf("%d losses are unnamed", s.Buffer.Losses)
		}
		return s, err
	})
}

const redisSocket = "/run/redis/redis-server.sock"

// redis is a client of the machine's server.
func (m *machine) redis() *redis.Client {
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: m.path(redisSocket), MaxRetries: -1, DisableIdentity: true})
	m.t.Cleanup(func() { _ = c.Close() })
	return c
}
