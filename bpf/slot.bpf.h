/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * slot.bpf.h - where a record of variable length is put together before it goes
 * to its ring in one piece: kernels before 5.19 can reserve constant sizes only.
 */
#ifndef EDR_SLOT_H
#define EDR_SLOT_H

#include "maps.bpf.h"

/* filename, interp, exe, cwd and cgroup at their bounds, with slack for the last name */
#define STRINGS_MAX (20 * 1024)
#define PAGE_BYTES 4096

/*
 * walk is the state of a path walk and of the data that it appends to. It is kept in
 * the slot and not in registers, which keeps the number of states small that the
 * verifier has to follow.
 */
struct walk {
	__u64 dentry; /* or struct kernfs_node */
	__u64 mount;  /* struct vfsmount */
	__u32 used;   /* bytes of data */
	__u32 start;  /* where the path begins in it */
	__u32 truncated;
	__u32 reserved;
	__u64 excluded; /* the walk came by a directory that is not to be reported from */
};

struct exec_slot {
	__u64 users; /* 1: taken */
	__u64 task;  /* group leader that the record describes */
	struct walk walk;
	struct exec_event event;                        /* the record begins here */
	char data[STRINGS_MAX + ARGV_MAX + PAGE_BYTES]; /* a page for the verifier, see read_argv */
};

/*
 * How many times each program on a tracepoint is attached. Since 7.0 a task can be
 * preempted inside of one, and until it goes on the kernel leaves that program out for
 * whoever else comes by on the same CPU. It does so for each attached program by itself:
 * so there are several of the same code, and the first that runs reports.
 */
const volatile __u32 copies = 1;
const volatile __u32 copy = 0; /* of them this one, in the order in which they run */

/*
 * A plain array: per-CPU values end at 32 KiB. As many slots for each CPU that is
 * online as there are copies, any of which may be preempted while it holds one, and a
 * last one for the iterator; values of 280 KiB for each possible CPU would cost a small
 * virtual machine tens of megabytes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2); /* loader: slot_count + 1 */
	__type(key, __u32);
	__type(value, struct exec_slot);
} exec_slots SEC(".maps");

const volatile __u32 slot_count = 1;

static __always_inline struct exec_slot *slot_at(__u32 index)
{
	return bpf_map_lookup_elem(&exec_slots, &index);
}

/*
 * slot_take claims a slot: true when nobody else uses it. An add and a read
 * instead of compare-and-exchange, which 5.10 lacks: of two that meet here at most one
 * sees 1, as both reads follow their own add.
 */
static __always_inline bool slot_take(__u64 *users)
{
	__sync_fetch_and_add(users, 1);
	if (*(volatile __u64 *)users == 1)
		return true;
	__sync_fetch_and_add(users, -1);
	return false;
}

static __always_inline void slot_release(__u64 *users)
{
	__sync_fetch_and_add(users, -1);
}

/*
 * slot_claim returns the index of a slot for this CPU, or -1. CPUs share slots only
 * when their numbers have gaps or when they are very many: then the neighbour's is tried.
 */
static __always_inline int slot_claim(void)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct exec_slot *slot;
	__u32 index, i;

	for (i = 0; i < 4; i++) {
		index = (cpu * copies + i) % slot_count;
		slot = slot_at(index);
		if (slot && slot_take(&slot->users))
			return index;
	}
	return -1;
}

/* append_text adds the string at src to data, of which max bytes may be used, and
 * returns its length. */
static __always_inline int append_text(struct walk *walk, char *data, __u32 max, const void *src,
				       bool user)
{
	__u32 used = walk->used;
	long n;

	if (used > max - FILENAME_MAX_BYTES - 1)
		return 0;
	if (user)
		n = bpf_probe_read_user_str(data + used, FILENAME_MAX_BYTES + 1, src);
	else
		n = bpf_probe_read_kernel_str(data + used, FILENAME_MAX_BYTES + 1, src);
	if (n <= 1)
		return 0;
	walk->used = used + n - 1;
	return n - 1;
}

/* append_name adds one name of a path, NUL included; false ends the walk. */
static __always_inline bool append_name(struct walk *walk, char *data, __u32 max, const void *name)
{
	__u32 used = walk->used;
	long n;

	if (used > max - NAME_BYTES)
		return false;
	n = bpf_probe_read_kernel_str(data + used, NAME_BYTES, name);
	if (n <= 1)
		return false;
	walk->used = used + n;
	return true;
}

/* slot_append adds the kernel string at src to the data and returns its length. */
__noinline int slot_append(__u32 index, __u64 src)
{
	struct exec_slot *slot = slot_at(index);

	if (!slot)
		return 0;
	return append_text(&slot->walk, slot->data, STRINGS_MAX, (void *)src, false);
}

#endif
