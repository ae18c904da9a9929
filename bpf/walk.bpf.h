/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * walk.bpf.h - paths, leaf first, by walking dentries and mounts. bpf_d_path is
 * not allowed in tracepoints on any kernel.
 */
#ifndef EDR_WALK_H
#define EDR_WALK_H

#include "scope.bpf.h"
#include "slot.bpf.h"

#define PATH_DEPTH 128 /* names and mount points */

/*
 * Walks are made of short ones in functions of their own. Such a function is verified
 * once, however often it is called; the same loop in one piece is verified step by step,
 * and was nine tenths of the time that loading takes.
 */
#define PATH_STEPS 8

enum walked {
	WALK_ON,  /* not at the end yet */
	WALK_END, /* at the root, or at a directory that is excluded */
	WALK_CUT, /* at a bound */
};

static __always_inline struct mount *real_mount(struct vfsmount *mnt)
{
	return (void *)mnt - bpf_core_field_offset(struct mount, mnt);
}

/*
 * walk_some appends the next names of the path of walk->dentry on walk->mount to data,
 * of which max bytes may be used. The walk ends at the root of the mount namespace and
 * does not heed a chroot: that is the path the host sees. Excluding, it stops at an
 * excluded directory.
 */
static __always_inline enum walked walk_some(struct walk *walk, char *data, __u32 max,
					     bool excluding)
{
	struct dentry *dentry, *parent;
	struct vfsmount *mnt;
	struct mount *mount, *upper;
	__u32 start = walk->start;
	int i;

	for (i = 0; i < PATH_STEPS; i++) {
		dentry = (void *)walk->dentry;
		mnt = (void *)walk->mount;
		if (excluding && is_excluded(BPF_CORE_READ(dentry, d_inode), EXCLUDE_DIRECTORY)) {
			walk->excluded = 1;
			return WALK_END;
		}
		if (dentry == BPF_CORE_READ(mnt, mnt_root)) {
			mount = real_mount(mnt);
			upper = BPF_CORE_READ(mount, mnt_parent);
			if (upper == mount)
				return WALK_END;
			walk->dentry = (__u64)BPF_CORE_READ(mount, mnt_mountpoint);
			walk->mount = (__u64)upper + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		parent = BPF_CORE_READ(dentry, d_parent);
		/* A root that is not its mount's hangs nowhere: a memfd or another
		 * pseudo file. Its name is all there is. */
		if (parent == dentry && walk->used != start)
			return WALK_END;
		if (walk->used - start > PATH_MAX_BYTES - NAME_BYTES ||
		    !append_name(walk, data, max, BPF_CORE_READ(dentry, d_name.name)))
			return WALK_CUT;
		if (parent == dentry)
			return WALK_END;
		walk->dentry = (__u64)parent;
	}
	return WALK_ON;
}

/* walk_all repeats some, a function that is verified by itself, and leaves in length the
 * bytes of the whole path; walk->truncated says whether a bound cut it. */
#define walk_all(walk, some, length)                                                               \
	({                                                                                         \
		enum walked walked = WALK_ON;                                                      \
		int i;                                                                             \
                                                                                                   \
		(walk)->start = (walk)->used;                                                      \
		for (i = 0; i < PATH_DEPTH / PATH_STEPS && walked == WALK_ON; i++)                 \
			walked = (some);                                                           \
		(walk)->truncated = walked != WALK_END;                                            \
		(length) = (walk)->used - (walk)->start;                                           \
	})

__noinline int walk_path_some(__u32 index)
{
	struct exec_slot *slot = slot_at(index);

	if (!slot)
		return WALK_CUT;
	return walk_some(&slot->walk, slot->data, STRINGS_MAX, false);
}

/* walk_path walks in an exec slot and returns the bytes of the path. */
__noinline int walk_path(__u32 index)
{
	struct exec_slot *slot = slot_at(index);
	int length;

	if (!slot)
		return 0;
	walk_all(&slot->walk, walk_path_some(index), length);
	return length;
}

__noinline int walk_cgroup_some(__u32 index)
{
	struct exec_slot *slot = slot_at(index);
	struct kernfs_node *node, *parent;
	int i;

	if (!slot)
		return WALK_CUT;
	node = (void *)slot->walk.dentry;
	for (i = 0; i < PATH_STEPS; i++) {
		parent = kernfs_parent(node);
		if (!parent)
			return WALK_END;
		if (slot->walk.used - slot->walk.start > CGROUP_MAX_BYTES - NAME_BYTES ||
		    !append_name(&slot->walk, slot->data, STRINGS_MAX, BPF_CORE_READ(node, name)))
			return WALK_CUT;
		node = parent;
	}
	slot->walk.dentry = (__u64)node;
	return WALK_ON;
}

/* walk_cgroup does the same for the control group whose directory is kn. */
__noinline int walk_cgroup(__u32 index, __u64 kn)
{
	struct exec_slot *slot = slot_at(index);
	int length;

	if (!slot)
		return 0;
	slot->walk.dentry = kn;
	walk_all(&slot->walk, walk_cgroup_some(index), length);
	return length;
}

#endif
