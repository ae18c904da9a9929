/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * maps.bpf.h - what the programs share with user space and with each other, and
 * how emitting is counted. Sizes marked "loader" are set when loading.
 */
#ifndef EDR_MAPS_H
#define EDR_MAPS_H

#include "kernel.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "events.h"

/* What the rings carry. The unions exist for the type information, out of which the
 * Go types are generated; the enums of the flags would not be in it otherwise. */
union priority_record {
	struct exec_event exec;
	struct fork_event fork;
	struct exit_event exit;
	struct heartbeat heartbeat;
	struct tamper_event tamper;
	enum tamper_flags tamper_flags;
	enum tamper_call tamper_call;
	enum process_flags flags;
};

union bulk_record {
	struct tcp_event tcp;
	enum tcp_flags flags;
	struct file_event file;
	enum file_flags file_flags;
};

/*
 * Two rings, so that a flood of connections cannot evict an exec. Records are
 * written with flags 0: the kernel wakes the reader only for the record at the
 * consumer position, so a reader that lags it is not woken for each record.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20); /* loader */
	__type(value, union priority_record);
} priority_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20); /* loader */
	__type(value, union bulk_record);
} bulk_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EVENT_KIND_COUNT);
	__type(key, __u32);
	__type(value, struct kind_counter);
} kind_counters SEC(".maps");

/*
 * The counters are added to atomically, though they are per CPU: a softirq may
 * interrupt a program that runs for a task, and since 7.0 a task another task's.
 */
static __always_inline void count_attempt(__u32 kind)
{
	struct kind_counter *c = bpf_map_lookup_elem(&kind_counters, &kind);

	if (c)
		__sync_fetch_and_add(&c->attempts, 1);
}

static __always_inline void count_lost(__u32 kind)
{
	struct kind_counter *c = bpf_map_lookup_elem(&kind_counters, &kind);

	if (c)
		__sync_fetch_and_add(&c->lost, 1);
}

static __always_inline void count_suppressed(__u32 kind)
{
	struct kind_counter *c = bpf_map_lookup_elem(&kind_counters, &kind);

	if (c)
		__sync_fetch_and_add(&c->suppressed, 1);
}

#endif
