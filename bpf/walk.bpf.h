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

static __always_inline struct mount *real_mount(struct vfsmount *mnt)
{
	return (void *)mnt - bpf_core_field_offset(struct mount, mnt);
}

/*
 * walk_names appends the path of walk->dentry on walk->mount to data, of which max
 * bytes may be used, and returns its length; walk->truncated says whether a bound
 * cut it. It ends at the root of the mount namespace and does not heed a chroot: that
 * is the path the host sees. Excluding, it stops at an excluded directory.
 */
static __always_inline int walk_names(struct walk *walk, char *data, __u32 max, bool excluding)
{
	struct dentry *dentry, *parent;
	struct vfsmount *mnt;
	struct mount *mount, *upper;
	__u32 start = walk->used;
	int i;

	walk->truncated = 0;
	for (i = 0; i < PATH_DEPTH; i++) {
		dentry = (void *)walk->dentry;
		mnt = (void *)walk->mount;
		if (excluding && is_excluded(BPF_CORE_READ(dentry, d_inode), EXCLUDE_DIRECTORY)) {
			walk->excluded = 1;
			return 0;
		}
		if (dentry == BPF_CORE_READ(mnt, mnt_root)) {
			mount = real_mount(mnt);
			upper = BPF_CORE_READ(mount, mnt_parent);
			if (upper == mount)
				return walk->used - start;
			walk->dentry = (__u64)BPF_CORE_READ(mount, mnt_mountpoint);
			walk->mount = (__u64)upper + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		parent = BPF_CORE_READ(dentry, d_parent);
		/* A root that is not its mount's hangs nowhere: a memfd or another
		 * pseudo file. Its name is all there is. */
		if (parent == dentry && walk->used != start)
			return walk->used - start;
		if (walk->used - start > PATH_MAX_BYTES - NAME_BYTES ||
		    !append_name(walk, data, max, BPF_CORE_READ(dentry, d_name.name)))
			break;
		if (parent == dentry)
			return walk->used - start;
		walk->dentry = (__u64)parent;
	}
	walk->truncated = 1;
	return walk->used - start;
}

/* walk_path is walk_names in an exec slot, verified once. */
__noinline int walk_path(__u32 index)
{
	struct exec_slot *slot = slot_at(index);

	if (!slot)
		return 0;
	return walk_names(&slot->walk, slot->data, STRINGS_MAX, false);
}

/* walk_cgroup does the same for the control group whose directory is kn. */
__noinline int walk_cgroup(__u32 index, __u64 kn)
{
	struct exec_slot *slot = slot_at(index);
	struct kernfs_node *node = (void *)kn, *parent;
	__u32 start;
	int i;

	if (!slot)
		return 0;
	start = slot->walk.used;
	slot->walk.truncated = 0;
	for (i = 0; i < CGROUP_DEPTH; i++) {
		parent = kernfs_parent(node);
		if (!parent)
			return slot->walk.used - start;
		if (slot->walk.used - start > CGROUP_MAX_BYTES - NAME_BYTES ||
		    !append_name(&slot->walk, slot->data, STRINGS_MAX, BPF_CORE_READ(node, name)))
			break;
		node = parent;
	}
	slot->walk.truncated = 1;
	return slot->walk.used - start;
}

#endif
