/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * scope.bpf.h - whose events are wanted: everybody's, those of one process tree,
 * or those of one control group (v2) and the groups below it; and what file events
 * leave out.
 */
#ifndef EDR_SCOPE_H
#define EDR_SCOPE_H

#include "maps.bpf.h"

enum scope_mode {
	SCOPE_ALL = 0,
	SCOPE_TREE = 1,
	SCOPE_CGROUP = 2,
};

#define CGROUP_DEPTH 64

const volatile __u32 scope_mode = SCOPE_ALL;
const volatile __u64 scope_cgroup_id = 0;

/*
 * The processes of the tree, by tgid. User space puts in the root and those that
 * descend from it at the start; fork adds, exit removes. Allocated in advance: a
 * program must not allocate inside a tracepoint.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536); /* loader: 1 unless SCOPE_TREE */
	__type(key, __u32);
	__type(value, __u8);
} scope_pids SEC(".maps");

static __always_inline struct task_struct *current_task(void)
{
	return (void *)bpf_get_current_task();
}

/* pid_in_ns returns the number of a task in its own pid namespace and that namespace's. */
static __always_inline __u32 pid_in_ns(struct pid *pid, __u32 *inum)
{
	__u32 level = BPF_CORE_READ(pid, level);
	struct pid_namespace *ns;
	struct upid *upid;

	upid = (void *)pid + bpf_core_field_offset(struct pid, numbers) +
	       level * bpf_core_type_size(struct upid);
	ns = BPF_CORE_READ(upid, ns);
	*inum = BPF_CORE_READ(ns, ns.inum);
	return BPF_CORE_READ(upid, nr);
}

static __always_inline struct kernfs_node *task_kernfs(struct task_struct *task)
{
	return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn);
}

static __always_inline struct kernfs_node *kernfs_parent(struct kernfs_node *kn)
{
	struct kernfs_node___v6_15 *new = (void *)kn;

	if (bpf_core_field_exists(new->__parent))
		return BPF_CORE_READ(new, __parent);
	return BPF_CORE_READ(kn, parent);
}

/* in_scope_cgroup walks up from kernfs node kn. A function of its own, so that it
 * is verified once; such a function takes only scalars before 5.12. */
__noinline int in_scope_cgroup(__u64 kn)
{
	struct kernfs_node *node = (void *)kn;
	int i;

	for (i = 0; i < CGROUP_DEPTH && node; i++) {
		if (BPF_CORE_READ(node, id) == scope_cgroup_id)
			return 1;
		node = kernfs_parent(node);
	}
	return 0;
}

static __always_inline bool task_in_scope(struct task_struct *task)
{
	__u32 tgid;

	if (scope_mode == SCOPE_ALL)
		return true;
	if (scope_mode == SCOPE_TREE) {
		tgid = BPF_CORE_READ(task, tgid);
		return bpf_map_lookup_elem(&scope_pids, &tgid) != NULL;
	}
	return in_scope_cgroup((__u64)task_kernfs(task));
}

/*
 * The processes, by tgid, of which a case wants everything: neither limits nor
 * exclusions hold for them. User space puts them in; fork adds the children of those
 * marked DEEP_SUBTREE, exit removes. Asked only where something would be left out.
 */
enum deep {
	DEEP_PROCESS = 1,
	DEEP_SUBTREE = 2,
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u32);
	__type(value, __u8);
} deep_pids SEC(".maps");

static __always_inline bool is_deep(__u32 tgid)
{
	return bpf_map_lookup_elem(&deep_pids, &tgid) != NULL;
}

static __always_inline void fork_deep(struct task_struct *parent, __u32 child)
{
	__u32 tgid = BPF_CORE_READ(parent, tgid);
	__u8 *found = bpf_map_lookup_elem(&deep_pids, &tgid), deep;

	if (!found || *found != DEEP_SUBTREE)
		return;
	deep = DEEP_SUBTREE;
	bpf_map_update_elem(&deep_pids, &child, &deep, BPF_ANY);
}

/* Whose events, and events below which directories, are not reported. By inode, so
 * that neither bind mounts nor chroots show them under another name. */
enum exclusion {
	EXCLUDE_EXECUTABLE = 1,
	EXCLUDE_DIRECTORY = 2,
};

struct exclusion_key {
	__u64 ino;
	__u32 dev; /* as the kernel has it: major << 20 | minor */
	enum exclusion what;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, struct exclusion_key);
	__type(value, __u8);
} file_exclusions SEC(".maps");

/* How many file events a process may have, and how many exclusions there are: none
 * saves looking for them. User space changes it while the programs run. */
struct file_filter {
	__u64 interval; /* what an event costs of the process's bucket, ns; 0: no limit */
	__u64 burst;    /* what can be saved up, ns */
	__u32 executables;
	__u32 directories;
	__u32 protected_files; /* of the sensor itself: see tamper.bpf.h */
	__u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct file_filter);
} file_filter SEC(".maps");

static __always_inline struct file_filter *file_filter_now(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&file_filter, &only);
}

static __always_inline bool is_excluded(struct inode *inode, enum exclusion what)
{
	struct exclusion_key key = {
		.ino = BPF_CORE_READ(inode, i_ino),
		.dev = BPF_CORE_READ(inode, i_sb, s_dev),
		.what = what,
	};

	return bpf_map_lookup_elem(&file_exclusions, &key) != NULL;
}

static __always_inline bool excluded_task(struct task_struct *task)
{
	struct file_filter *filter = file_filter_now();

	return filter && filter->executables &&
	       is_excluded(BPF_CORE_READ(task, mm, exe_file, f_inode), EXCLUDE_EXECUTABLE) &&
	       !is_deep(BPF_CORE_READ(task, tgid));
}

#endif
