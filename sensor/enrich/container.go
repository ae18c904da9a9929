// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"strconv"
	"strings"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// parseContainer tells from a control group's path which container it belongs
// to: nil when to none. With containers inside containers it is the innermost.
// The runtime is empty where the path names an id but not who made it.
func parseContainer(path string) *event.Container {
	for rest := path; rest != ""; {
		i := strings.LastIndexByte(rest, '/')
		above, name := rest[:max(i, 0)], rest[i+1:]
		if monitor(name, above) {
			return nil
		}
		if c, ok := containerUnit(name); ok || containerDir(name, above, &c) {
			c.PodUUID = podOf(above, name)
			if c.PodUUID != "" {
				c.Orchestrator = "kubernetes"
				if c.Runtime == "" {
					// A bare id below a pod: since Kubernetes 1.24 only containerd
					// with the cgroupfs driver names them so.
					c.Runtime = "containerd"
				}
			}
			return &c
		}
		rest = above
	}
	return nil
}

// monitor tells the groups of processes that stand outside of the container that
// they look after.
func monitor(name, above string) bool {
	if name == "supervisor" {
		_, unit, _ := cutLast(above, "/")
		return strings.HasPrefix(unit, "machine-") || strings.HasPrefix(unit, "systemd-nspawn@")
	}
	return strings.HasPrefix(name, "crio-conmon-") || strings.HasPrefix(name, "libpod-conmon-") || strings.HasPrefix(name, "lxc.monitor.")
}

// units are the prefixes that runtimes give to "<prefix><id>.scope" (systemd
// driver) or "<prefix><id>" (cgroupfs driver).
var units = [...]struct{ prefix, runtime string }{
	{"docker-", "docker"},
	{"cri-containerd-", "containerd"},
	{"containerd-", "containerd"},
	{"nerdctl-", "containerd"},
	{"crio-", "cri-o"},
	{"libpod-payload-", "podman"},
	{"libpod-", "podman"},
}

// containerUnit recognises a group that names runtime and id, or a machine.
func containerUnit(name string) (event.Container, bool) {
	unit := strings.TrimSuffix(name, ".scope")
	for _, u := range units {
		if id, ok := strings.CutPrefix(unit, u.prefix); ok && isID(id) {
			return event.Container{ID: id, Runtime: u.runtime}, true
		}
	}
	// "kubepods-pod<uid>.slice:cri-containerd:<id>": a systemd cgroup path handed
	// to a runtime that takes it literally.
	if head, id, ok := cutLast(name, ":"); ok && isID(id) {
		_, runtime, _ := cutLast(head, ":")
		for _, u := range units {
			if runtime+"-" == u.prefix {
				return event.Container{ID: id, Runtime: u.runtime}, true
			}
		}
		return event.Container{ID: id}, true
	}
	if machine, ok := strings.CutPrefix(unit, "machine-"); ok && unit != name {
		// libvirt registers its virtual machines in the same way.
		if machine = unescapeUnit(machine); !strings.HasPrefix(machine, "qemu-") {
			return event.Container{ID: machine, Runtime: "systemd-nspawn"}, true
		}
		return event.Container{}, false
	}
	if machine, ok := strings.CutPrefix(name, "systemd-nspawn@"); ok {
		if machine, ok = strings.CutSuffix(machine, ".service"); ok {
			return event.Container{ID: unescapeUnit(machine), Runtime: "systemd-nspawn"}, true
		}
	}
	if guest, ok := strings.CutPrefix(name, "lxc.payload."); ok {
		return event.Container{ID: guest, Runtime: "lxc"}, true
	}
	return event.Container{}, false
}

// containerDir recognises a group named by a bare id; the groups above it tell
// more.
func containerDir(name, above string, c *event.Container) bool {
	_, parent, _ := cutLast(above, "/")
	if !isID(name) {
		if parent == "lxc" && name != "" {
			*c = event.Container{ID: name, Runtime: "lxc"}
			return true
		}
		return isECS(name, above) && set(c, name, "containerd")
	}
	runtime := ""
	switch {
	case parent == "docker" || parent == "actions_job" || strings.HasPrefix(above, "/ecs/"):
		runtime = "docker"
	case parent == "default" || parent == "k8s.io" || parent == "moby":
		runtime = "containerd" // its namespaces
	case parent == "libpod_parent":
		runtime = "podman"
	}
	return set(c, name, runtime)
}

func set(c *event.Container, id, runtime string) bool {
	*c = event.Container{ID: id, Runtime: runtime}
	return true
}

// isECS recognises "/ecs/<task>/<32 hex>-<digits>", as Fargate names containers.
func isECS(name, above string) bool {
	id, number, ok := strings.Cut(name, "-")
	if !ok || len(id) != 32 || !isHex(id) || !strings.HasPrefix(above, "/ecs/") {
		return false
	}
	_, err := strconv.ParseUint(number, 10, 64)
	return err == nil
}

// podOf returns the uid of the pod that the container's group belongs to.
func podOf(above, name string) string {
	// The literal form carries the pod in the same name.
	if head, _, ok := strings.Cut(name, ".slice:"); ok {
		if uid := podUID(head); uid != "" {
			return uid
		}
	}
	for above != "" {
		var last string
		above, last, _ = cutLast(above, "/")
		if uid := podUID(strings.TrimSuffix(last, ".slice")); uid != "" {
			return uid
		}
	}
	return ""
}

// podUID reads "pod<uid>" and "kubepods-burstable-pod<uid with underscores>". The
// uid of a static pod is 32 hex digits, a hash of its manifest.
func podUID(name string) string {
	i := strings.LastIndex(name, "pod")
	if i < 0 || i > 0 && name[i-1] != '-' {
		return ""
	}
	uid := strings.ReplaceAll(name[i+len("pod"):], "_", "-")
	if len(uid) == 32 && isHex(uid) {
		return uid
	}
	if len(uid) != 36 {
		return ""
	}
	for i, c := range []byte(uid) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && !isHexDigit(c) {
			return ""
		}
	}
	return uid
}

// unescapeUnit undoes systemd-escape(1).
func unescapeUnit(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && s[i+1] == 'x' {
			if n, err := strconv.ParseUint(s[i+2:i+4], 16, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// isID tells the ids that runtimes make: 64 hex digits.
func isID(s string) bool { return len(s) == 64 && isHex(s) }

func isHex(s string) bool {
	for i := range len(s) {
		if !isHexDigit(s[i]) {
			return false
		}
	}
	return true
}

func isHexDigit(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return "", s, false
}
