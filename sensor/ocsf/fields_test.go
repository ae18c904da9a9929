// SPDX-License-Identifier: Apache-2.0

package ocsf

// section is what docs/events.md says about one event code besides its fields.
type section struct{ code, hook, text string }

func sections() []section {
	const self = "the sensor itself"
	return []section{
		{"process.exec", "`tp_btf/sched_process_exec`, else `raw_tp/sched_process_exec`", "A process has a new image: execve, execveat or fexecve succeeded. Every field describes the new image; the one before it is `unmapped.exec.old_path`. The pid and the `uid` of the process stay what they were."},
		{"process.fork", "`tp_btf/sched_process_fork`, else `raw_tp/sched_process_fork`; off by default, for its volume", "A process was created; threads are not reported. The child still has its parent's image, so it is described shortly."},
		{"process.exit", "`tp_btf/sched_process_exit`, else `raw_tp/sched_process_exit`", "The last thread of a process has ended. The actor is the process itself, as OCSF asks when nobody else is known; who sent a signal is not."},
		{"process.snapshot", "`iter/task`", "A process that ran already when the sensor started. There is no actor: this is an observation, not an action."},
		{"net.connect", "`tp_btf/inet_sock_set_state`, else `raw_tp/inet_sock_set_state`", "This host opened a TCP connection and the other side has answered. The source is this host."},
		{"net.connect_failed", "as net.connect", "This host tried to open a TCP connection in vain: Refuse (ECONNREFUSED), Reset (ECONNRESET), or Fail (everything else: timeouts, no route, an attempt given up)."},
		{"net.accept", "as net.connect", "This host answered a TCP connection. The source is the remote side, which initiated it; the destination is this host."},
		{"net.listen", "as net.connect", "A process listens on a TCP port. The destination is the listening address, so that later connections join on it; port 0 stands for one that the kernel chose afterwards."},
		{"net.close", "as net.connect", "A TCP connection has ended. Traffic is counted from the point of view of the source, the initiator: of an accepted connection `bytes_out` is what this host received."},
		{"sensor.start", self, "The sensor has started: what it runs with, and which events it sees by which hook."},
		{"sensor.stop", self, "The sensor ends in order; it is the last record of the run. A run without one was killed: the next start says so."},
		{"sensor.degraded", self, "The sensor works, but sees or keeps less than it should."},
		{"sensor.lost_events", self, "Something will not be delivered. `unmapped.lost.ranges` names records by their sequence numbers, `unmapped.lost.by_type` counts events that the kernel had no room for, and an event with neither names a time in which no sensor watched. See [Losses](#losses)."},
		{"sensor.mode_change", self, "The mode of the sensor has changed: starting, online, buffering, truncating, degraded, stopping."},
		{"sensor.rewind", self, "An example of what else the sensor decides: `event_code` is `sensor.` and the activity's name, lower-case with underscores."},
	}
}

// meanings says what each field means, by object and path. "-" stands for what
// needs no line of its own: the captions, and containers of other fields.
func meanings() map[string]map[string]string {
	caption := "-"
	return map[string]map[string]string{
		"event": {
			"metadata": caption, "device": caption, "time": caption, "time_dt": caption, "timezone_offset": caption,
			"category_uid": caption, "category_name": caption, "class_uid": caption, "class_name": caption,
			"activity_id": caption, "activity_name": caption, "type_uid": caption, "type_name": caption,
			"severity_id": caption, "severity": caption, "status_id": caption, "status": caption,

			"launch_type_id": "2 Fork, 3 Exec", "launch_type": caption,
			"query_result_id": "1 Exists", "query_result": caption,
			"exit_code": "as passed to exit(2), 0 to 255; absent when a signal ended the process",
			"duration":  "ms: of the process's life, of the connection, of the attempt to connect",
			"actor":     caption, "actor.process": "who acted: the parent of a launch, the process itself at its exit, the owner of a connection",
			"actor.user": "the user of `actor.process`", "process": "what the event is about",

			"status_code":   "name of the errno, e.g. `ECONNREFUSED`; of a record about the sensor, its machine-readable cause",
			"status_detail": "text of the errno", "message": "one sentence for people", "count": "events or records lost",
			"start_time": "ms; connection opened, attempt begun, loss window begun", "end_time": "ms; end of the same",
			"src_endpoint": "the initiator", "dst_endpoint": "the responder, or where a process listens",
			"connection_info":     caption,
			"connection_info.uid": "the same in all events of one connection, unique until the next boot", "connection_info.community_uid": "[Community ID](https://github.com/corelight/community-id-spec) version 1, seed 0: Zeek and Suricata give the flow the same",
			"connection_info.direction_id": "1 Inbound, 2 Outbound, 0 Unknown for one opened before the sensor", "connection_info.direction": caption,
			"connection_info.protocol_num": "6", "connection_info.protocol_name": "tcp", "connection_info.protocol_ver_id": "4 or 6, as on the wire", "connection_info.protocol_ver": caption,
			"connection_info.boundary_id": "of the remote address: 1 Localhost, 2 Internal (private, link-local, 100.64.0.0/10), 3 External", "connection_info.boundary": caption,
			"is_src_dst_assignment_known": "false when who initiated is unknown; the source is then this host",
			"observation_point_id":        "where this host stands: 1 Source, 2 Destination, 0 Unknown", "observation_point": caption,
			"cumulative_traffic":       caption,
			"cumulative_traffic.bytes": "both ways, payload without retransmissions", "cumulative_traffic.bytes_out": "source to destination", "cumulative_traffic.bytes_in": "destination to source",
			"cumulative_traffic.packets": "segments both ways, those without payload included", "cumulative_traffic.packets_out": "source to destination", "cumulative_traffic.packets_in": "destination to source",
			"app": caption, "app.name": "edr-sensor", "app.uid": "agent id", "app.vendor_name": caption, "app.version": "version of the sensor",

			"unmapped": caption, "unmapped.exec": caption, "unmapped.exit": caption, "unmapped.lost": caption, "unmapped.sensor": caption, "unmapped.tcp_info": caption,
			"unmapped.exec.filename": "what was asked for, as given to execve", "unmapped.exec.filename_base64": "its bytes, when they are not UTF-8",
			"unmapped.exec.interp": "what runs it, when that is another file", "unmapped.exec.interp_base64": "its bytes, when they are not UTF-8",
			"unmapped.exec.old_path": "executable of the image that was replaced", "unmapped.exec.old_path_base64": "its bytes, when they are not UTF-8",
			"unmapped.exec.script": "true: `filename` is a script, `process.path` its interpreter", "unmapped.exec.memfd": "true: the executable is a memfd",
			"unmapped.exec.fd_exec": "true: executed through a descriptor (fexecve)", "unmapped.exec.secureexec": "true: the exec raised privileges (setuid, setgid or file capabilities)",
			"unmapped.exit.signal": "number of the signal that ended the process", "unmapped.exit.signal_name": "its name", "unmapped.exit.core_dumped": "whether a core was written; beside `signal` only",
			"unmapped.exit.utime_ms": "CPU time in user mode, all threads", "unmapped.exit.stime_ms": "CPU time in the kernel, all threads",
			"unmapped.initiated": "whether this host initiated; absent when unknown", "unmapped.netns": "inode of the socket's network namespace", "unmapped.cgroup_id": "of the socket's cgroup (string)",
			"unmapped.owner_is_listener": "true: the process named is the one that called listen(2), which need not be the one that accepts", "unmapped.backlog": "of listen(2)",
			"unmapped.opened_before_sensor": "true: there was no open event, and there is no start time", "unmapped.closed_by": "the process that closed it, when that is not the owner",
			"unmapped.tcp_info.retransmits": "segments sent again", "unmapped.tcp_info.rtt_us": "smoothed round-trip time, microseconds",
			"unmapped.lost.events": "how many", "unmapped.lost.by_type": caption, "unmapped.lost.by_type.*": "how many of this event code", "unmapped.lost.ranges": caption,
			"unmapped.lost.ranges.cause": "`truncated`: the buffer was full; `corrupt`: the disk lied; `server`: the server lost records that are gone here; `rejected`: too large",
			"unmapped.lost.ranges.first": "first sequence number", "unmapped.lost.ranges.last": "last sequence number, included", "unmapped.lost.ranges.count": "records; `last`-`first`+1 unless ranges had to be merged",
			"unmapped.sensor.before": "state before", "unmapped.sensor.after": "state after", "unmapped.sensor.*": "further evidence, by what happened",
		},
		"metadata": {
			"version": "of OCSF, 1.8.0", "uid": "UUIDv8, see [Identity](#identity-order-and-duplicates)", "sequence": "seq: contiguous in the agent's epoch, over both streams",
			"event_code": "the names above", "log_name": "`events` or `decisions`", "log_provider": "`ebpf` or `agent`", "log_source": "the hook that saw it on this host",
			"logged_time": "ms, when the sensor encoded the event", "product": caption, "product.name": "edr-sensor", "product.vendor_name": caption, "product.version": "version of the sensor",
			"tenant_uid": "from the configuration", "correlation_uid": "investigation_id, when the event was produced under one",
			"tags": "`case_id`, `investigation_id`, `user_id`, as far as they apply", "tags.name": caption, "tags.value": caption,
			"profiles":     "the OCSF profiles whose attributes the event has: `host`, `datetime`, `container`, `linux/linux_users`",
			"is_truncated": "true: something of the process that the event is about was cut; `debug` says what", "untruncated_size": "KB, what the event would have without the cut of argv", "debug": "what was cut or unreadable, one sentence each",
		},
		"device": {
			"uid": "/etc/machine-id", "os_machine_uuid": "the same as a UUID", "hostname": "as the kernel has it", "name": "its first label", "type_id": "0 Unknown", "type": caption,
			"ip": "address of the interface with the default route, if any", "boot_uid": "boot id", "boot_time": "ms",
			"os": caption, "os.name": "of /etc/os-release", "os.version": "of /etc/os-release", "os.type_id": "200 Linux", "os.type": caption, "os.kernel_release": "uname -r", "os.cpu_bits": "32 or 64",
			"agent_list": caption, "agent_list.uid": "**agent id**", "agent_list.name": "edr-sensor", "agent_list.type_id": "1 Endpoint Detection and Response", "agent_list.type": caption,
			"agent_list.version": "version of the sensor", "agent_list.vendor_name": caption,
		},
		"process": {
			"uid":  "OCSF Common Process ID: boot, pid namespace, start time, pid; the same for the whole life of the process, whatever it executes",
			"cpid": "the same", "pid": "in the initial pid namespace (tgid)", "ptid": "thread, when it is not the first",
			"name": "last part of `path`, else the kernel's name of the task", "path": "executable, as the process's mount namespace names it",
			"cmd_line":     "see [Command lines](#command-lines); complete in process.exec, 4096 bytes elsewhere, 512 in `ancestry`",
			"created_time": "ms", "terminated_time": "ms", "working_directory": "at the time of the exec", "file": "the executable",
			"user": "real user", "group": caption, "group.uid": "real group id", "group.name": "its name on this host", "euid": "effective user id", "egid": "effective group id",
			"auid": "login uid: who logged in, whatever su and sudo did since; absent when nobody did", "session": caption, "session.uid": "audit session", "session.terminal": "e.g. `pts/3`",
			"namespace_pid": "pid in the container", "container": "the container it runs in", "parent_process": "its parent; of a reparented orphan the true one", "ancestry": "parent first, 16 at most",
			"xattributes": caption, "xattributes.comm": "the kernel's name of the task, 15 bytes", "xattributes.comm_base64": "its bytes, when they are not UTF-8",
			"xattributes.start_boottime_ns": "start in nanoseconds since boot (string)", "xattributes.partial": "true: the sensor never saw it start; what is not there is unknown", "xattributes.kernel_thread": "true: a kernel thread",
			"xattributes.path_base64": "bytes of `path`, when they are not UTF-8", "xattributes.working_directory_base64": "bytes of `working_directory`, when they are not UTF-8",
			"xattributes.argv": "the arguments, when they have 4096 bytes at most", "xattributes.argv_base64": "their bytes with NUL after each, when they are not UTF-8",
			"xattributes.argv_in_cmd_line": "true: argv is longer; split `cmd_line`", "xattributes.argv_truncated": "true: argv was longer than the 256 KiB that are kept",
			"xattributes.suid": "saved user id, when it is not `euid`", "xattributes.fsuid": "file system user id, when it is not `euid`", "xattributes.sgid": "saved group id, when it is not `egid`", "xattributes.fsgid": "file system group id, when it is not `egid`",
			"xattributes.cap_permitted": "capability set, 16 hex digits as in /proc/PID/status", "xattributes.cap_effective": "capability set", "xattributes.cap_bounding": "capability set",
			"xattributes.cap_inheritable": "capability set, when not empty", "xattributes.cap_ambient": "capability set, when not empty",
			"xattributes.securebits": "see capabilities(7), when not 0", "xattributes.seccomp": "1 strict, 2 filter; absent without",
			"xattributes.ns": caption, "xattributes.ns.mnt": "inode, as in /proc/PID/ns", "xattributes.ns.pid": "inode", "xattributes.ns.net": "inode", "xattributes.ns.user": "inode",
			"xattributes.ns.uts": "inode", "xattributes.ns.ipc": "inode", "xattributes.ns.cgroup": "inode", "xattributes.ns.time": "inode",
			"xattributes.namespace_pid": "pid in its own pid namespace, when that is nested but no container is known",
			"xattributes.cgroup":        caption, "xattributes.cgroup.id": "cgroup id (string)", "xattributes.cgroup.path": "in its hierarchy", "xattributes.cgroup.path_base64": "its bytes, when they are not UTF-8", "xattributes.cgroup.version": "hierarchy: 1 or 2",
		},
		"file": {
			"name": "last part of `path`", "path": "as the process's mount namespace names it", "parent_folder": "the path without the name", "type_id": "8 Executable File", "type": caption,
			"uid": "device and inode: `major:minor:inode`", "size": "bytes", "modified_time": "ms (mtime)", "is_deleted": "true: no name is left in the file system",
			"hashes": caption, "hashes.algorithm_id": "3", "hashes.algorithm": caption, "hashes.value": "SHA-256 of the content, hex",
			"owner":       "owner of the file",
			"owner.uid":   "user id",
			"owner.name":  "its name on this host",
			"xattributes": caption, "xattributes.mode": "permissions, octal, e.g. `4755`", "xattributes.nlink": "hard links", "xattributes.gid": "group of the file (string)",
			"xattributes.changed_time": "ms (ctime): when the file came into being as it is; cannot be set back by touch(1)", "xattributes.fs_magic": "type of the file system, as in statfs(2)",
			"xattributes.memfd": "true: the file is in memory only", "xattributes.hash_note": "why there is no hash: `pending`, `rate`, `size`, `gone`, `changed`, `error`",
		},
		"user": {
			"uid": "user id (string)", "name": "its name on this host, also for a process in a container", "type_id": "2 Admin (0), 3 System (1 to 999, 65534), 1 User", "type": caption,
		},
		"container": {
			"uid": "full id", "runtime": "docker, containerd, cri-o, podman, systemd-nspawn", "orchestrator": "kubernetes, when a pod is known", "pod_uuid": "uid of the pod",
			"tags": caption, "tags.name": "`pod_uid`: a static pod's, which is no UUID", "tags.value": caption,
		},
		"endpoint": {
			"ip": "an IPv4 address in an IPv6 socket is written as IPv4", "port": "TCP port",
		},
	}
}
