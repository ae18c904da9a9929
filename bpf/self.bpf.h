/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * self.bpf.h - how the sensor finds out that the kernel still runs its programs: it
 * announces one of its threads and has it do something that they must see. Nobody
 * else's doings are any different for that, and without a thread that is announced it
 * costs the programs one look into an array.
 */
#ifndef EDR_SELF_H
#define EDR_SELF_H

#include "scope.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ANNOUNCED_COUNT);
	__type(key, __u32); /* enum announced_for */
	__type(value, struct announced);
} announced_threads SEC(".maps");

/* How often a program met the thread that exercises it, by kind of event. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EVENT_KIND_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} exercised SEC(".maps");

/* The sensor's process, by its number in its own pid namespace; and as others name it, once
 * it has sent a heartbeat. */
struct sensor_process {
	__u32 pid_ns;
	__u32 tgid; /* 0: none */
	__u64 start_time;
	__u64 pid;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sensor_process);
} sensor_self SEC(".maps");

static __always_inline struct sensor_process *sensor_now(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&sensor_self, &only);
}

/* announced_as returns what was announced of a thread, NULL for any other. */
static __always_inline struct announced *announced_as(struct task_struct *task, __u32 what)
{
	struct announced *announced = bpf_map_lookup_elem(&announced_threads, &what);
	__u32 inum, tid;

	if (!announced || !announced->tid)
		return NULL;
	tid = pid_in_ns(BPF_CORE_READ(task, thread_pid), &inum);
	return tid == announced->tid && inum == announced->pid_ns ? announced : NULL;
}

/* exercises tells whether the task is the sensor's, trying its hooks. */
static __always_inline bool exercises(struct task_struct *task)
{
	return announced_as(task, ANNOUNCED_EXERCISE) != NULL;
}

static __always_inline void count_exercised(__u32 kind)
{
	__u64 *n = bpf_map_lookup_elem(&exercised, &kind);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline void emit_heartbeat(void *ring, __u64 serial)
{
	struct heartbeat *heartbeat;

	count_attempt(EVENT_KIND_HEARTBEAT);
	heartbeat = bpf_ringbuf_reserve(ring, sizeof(*heartbeat), 0);
	if (!heartbeat) {
		count_lost(EVENT_KIND_HEARTBEAT);
		return;
	}
	__builtin_memset(heartbeat, 0, sizeof(*heartbeat));
	heartbeat->header.size = sizeof(*heartbeat);
	heartbeat->header.kind = EVENT_KIND_HEARTBEAT;
	heartbeat->header.ktime = bpf_ktime_get_boot_ns();
	heartbeat->serial = serial;
	bpf_ringbuf_submit(heartbeat, 0);
}

/* handle_heartbeat is told of every thread that ends, in whatever scope. */
static __always_inline void handle_heartbeat(struct task_struct *task)
{
	struct announced *announced = announced_as(task, ANNOUNCED_HEARTBEAT);
	struct sensor_process *sensor = sensor_now();

	if (!announced)
		return;
	announced->tid = 0; /* the number may soon be somebody else's */
	if (sensor) {
		sensor->start_time = BPF_CORE_READ(task, group_leader, start_boottime);
		sensor->pid = BPF_CORE_READ(task, tgid);
	}
	emit_heartbeat(&priority_ring, announced->serial);
	emit_heartbeat(&bulk_ring, announced->serial);
}

#endif
