// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

func TestParseContainer(t *testing.T) {
	const (
		id    = "3f4ea82c5b1d7e60a9c8b7f6e5d4c3b2a1908f7e6d5c4b3a29180706f5e4d3c2"
		other = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"
		uid   = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
		uid_  = "0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9"
	)
	docker := &event.Container{ID: id, Runtime: "docker"}
	containerd := &event.Container{ID: id, Runtime: "containerd"}
	podman := &event.Container{ID: id, Runtime: "podman"}
	pod := func(runtime string) *event.Container {
		return &event.Container{ID: id, Runtime: runtime, Orchestrator: "kubernetes", PodUUID: uid}
	}
	nspawn := &event.Container{ID: "build-01", Runtime: "systemd-nspawn"}
	for _, tt := range []struct {
		name, path string
		want       *event.Container
	}{
		{"root", "/", nil},
		{"nothing", "", nil},
		{"init", "/init.scope", nil},
		{"service", "/system.slice/nginx.service", nil},
		{"session", "/user.slice/user-1000.slice/session-4.scope", nil},
		{"user service", "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-firefox-4711.scope", nil},
		{"docker daemon", "/system.slice/docker.service", nil},
		{"containerd shim", "/system.slice/containerd.service", nil},
		{"kubelet", "/system.slice/kubelet.service", nil},
		{"short hex", "/docker/3f4ea82c5b1d", nil},
		{"upper case is no id", "/docker/" + strings.ToUpper(id), nil},
		{"64 letters that are not hex", "/docker/" + strings.Repeat("z", 64), nil},

		{"docker, cgroupfs", "/docker/" + id, docker},
		{"docker, systemd", "/system.slice/docker-" + id + ".scope", docker},
		{"docker, inner group", "/system.slice/docker-" + id + ".scope/init.scope", docker},
		{"docker, rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-" + id + ".scope", docker},
		{"docker, service inside", "/docker/" + id + "/system.slice/cron.service", docker},
		{"docker in docker", "/docker/" + other + "/docker/" + id, docker},
		{"docker, own parent", "/batch/" + id, &event.Container{ID: id}},
		{"ECS on EC2", "/ecs/0123456789abcdef0123456789abcdef/" + id, docker},
		{
			"ECS Fargate", "/ecs/0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef-1234567890",
			&event.Container{ID: "0123456789abcdef0123456789abcdef-1234567890", Runtime: "containerd"},
		},
		{"GitHub action", "/actions_job/" + id, docker},

		{"nerdctl, systemd", "/system.slice/nerdctl-" + id + ".scope", containerd},
		{"nerdctl, cgroupfs", "/default/" + id, containerd},
		{"nerdctl, rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/nerdctl-" + id + ".scope", containerd},
		{"containerd namespace", "/k8s.io/" + id, containerd},

		{"kubernetes, containerd, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice/cri-containerd-" + id + ".scope", pod("containerd")},
		{"kubernetes, guaranteed", "/kubepods.slice/kubepods-pod" + uid_ + ".slice/cri-containerd-" + id + ".scope", pod("containerd")},
		{"kubernetes, besteffort", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uid_ + ".slice/cri-containerd-" + id + ".scope", pod("containerd")},
		{"kubernetes, containerd, cgroupfs", "/kubepods/burstable/pod" + uid + "/" + id, pod("containerd")},
		{"kubernetes, guaranteed, cgroupfs", "/kubepods/pod" + uid + "/" + id, pod("containerd")},
		{"kubernetes, cri-o, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice/crio-" + id + ".scope", pod("cri-o")},
		{"kubernetes, cri-o, crun", "/kubepods.slice/kubepods-pod" + uid_ + ".slice/crio-" + id + ".scope/container", pod("cri-o")},
		{"kubernetes, cri-o, cgroupfs", "/kubepods/besteffort/pod" + uid + "/crio-" + id, pod("cri-o")},
		{"kubernetes, docker, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice/docker-" + id + ".scope", pod("docker")},
		{
			"kubernetes, systemd path taken literally", "/system.slice/containerd.service/kubepods-burstable-pod" + uid_ + ".slice:cri-containerd:" + id, pod("containerd"),
		},
		{"kind", "/docker/" + other + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + uid_ + ".slice/cri-containerd-" + id + ".scope", pod("containerd")},
		{
			"static pod", "/kubepods/burstable/podd41d8cd98f00b204e9800998ecf8427e/" + id,
			&event.Container{ID: id, Runtime: "containerd", Orchestrator: "kubernetes", PodUUID: "d41d8cd98f00b204e9800998ecf8427e"},
		},
		{"pod without a container", "/kubepods/burstable/pod" + uid, nil},
		{"kubepods itself", "/kubepods.slice/kubepods-burstable.slice", nil},
		{"cri-o monitor", "/kubepods.slice/kubepods-pod" + uid_ + ".slice/crio-conmon-" + id + ".scope", nil},

		{"podman, systemd", "/machine.slice/libpod-" + id + ".scope", podman},
		{"podman, crun", "/machine.slice/libpod-" + id + ".scope/container", podman},
		{"podman, rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope/container", podman},
		{"podman, pod", "/machine.slice/machine-libpod_pod_" + other + ".slice/libpod-" + id + ".scope", podman},
		{"podman, cgroupfs", "/libpod_parent/libpod-" + id, podman},
		{"podman, split", "/system.slice/web.service/libpod-payload-" + id, podman},
		{"podman monitor", "/machine.slice/libpod-conmon-" + id + ".scope", nil},
		{"podman monitor, split", "/system.slice/web.service/runtime", nil},

		{"nspawn, unit", `/machine.slice/systemd-nspawn@build\x2d01.service/payload/system.slice/ssh.service`, nspawn},
		{"nspawn, scope", `/machine.slice/machine-build\x2d01.scope/payload`, nspawn},
		{"nspawn, scope of old", `/machine.slice/machine-build\x2d01.scope`, nspawn},
		{"nspawn supervisor", `/machine.slice/systemd-nspawn@build\x2d01.service/supervisor`, nil},
		{"supervisor of something else", "/docker/" + id + "/supervisor", docker},
		{"docker inside nspawn", `/machine.slice/machine-build\x2d01.scope/payload/system.slice/docker-` + id + ".scope", docker},
		{"libvirt", `/machine.slice/machine-qemu\x2d1\x2ddebian12.scope/libvirt/emulator`, nil},
		{"broken escape", `/machine.slice/machine-a\xzz\x2.scope`, &event.Container{ID: `a\xzz\x2`, Runtime: "systemd-nspawn"}},

		{"lxc", "/lxc.payload.web/system.slice/cron.service", &event.Container{ID: "web", Runtime: "lxc"}},
		{"lxc monitor", "/lxc.monitor.web", nil},
		{"lxc, v1", "/lxc/web/ns", &event.Container{ID: "web", Runtime: "lxc"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, parseContainer(tt.path)); diff != "" {
				t.Errorf("parseContainer(%q) (-want +got):\n%s", tt.path, diff)
			}
		})
	}
}

// FuzzParseContainer: control group names are chosen by whoever may create one.
func FuzzParseContainer(f *testing.F) {
	f.Add("/kubepods/pod0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9/3f4ea82c5b1d7e60a9c8b7f6e5d4c3b2a1908f7e6d5c4b3a29180706f5e4d3c2")
	f.Add(`/machine.slice/machine-a\x2d.scope/payload`)
	f.Add("//:::/pod/.scope")
	f.Fuzz(func(t *testing.T, path string) {
		if c := parseContainer(path); c != nil && (c.ID == "" && c.Runtime != "systemd-nspawn" && c.Runtime != "lxc" || (c.PodUUID == "") != (c.Orchestrator == "")) {
			t.Errorf("parseContainer(%q) = %+v", path, *c)
		}
	})
}

func TestCgroups(t *testing.T) {
	c := newCgroups()
	path := "/docker/" + strings.Repeat("ab", 32)
	first := c.seen(7, []byte(path), false)
	if first.container == nil || first.path != path {
		t.Fatalf("seen = %+v", first)
	}
	if again := c.seen(7, []byte(path), false); again != first {
		t.Error("a group seen twice is taken apart twice")
	}
	if moved := c.seen(7, []byte("/other"), false); moved.path != "/other" || c.ids[7] != moved {
		t.Errorf("renamed group is still %q", moved.path)
	}
	c.seen(1, []byte("/v1"), true)
	if c.ids[1] != nil {
		t.Error("a version 1 path was kept under the id of another group")
	}
	for i := range 3 * cgroupMax {
		c.seen(uint64(i), []byte{'/', byte(i), byte(i >> 8)}, false)
	}
	if len(c.ids) > cgroupMax || len(c.paths) > cgroupMax {
		t.Errorf("%d ids and %d paths are kept, bound %d", len(c.ids), len(c.paths), cgroupMax)
	}
	if n := testing.AllocsPerRun(100, func() { c.seen(3, []byte("/x"), false) }); n > 0 {
		t.Errorf("a known group costs %v allocations", n)
	}
}
