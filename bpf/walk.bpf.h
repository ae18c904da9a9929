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
 * walk_path appends the path of slot->dentry on slot->mount and returns its
 * length; slot->truncated says whether a bound cut it. It ends at the root of the
 * mount namespace and does not heed a chroot: that is the path the host sees.
 */
__noinline int walk_path(__u32 index)
{
	struct exec_slot *slot = slot_at(index);
	struct dentry *dentry, *parent;
	struct vfsmount *mnt;
	struct mount *mount, *upper;
	__u32 start;
	int i;

	if (!slot)
		return 0;
	start = slot->used;
	slot->truncated = 0;
	for (i = 0; i < PATH_DEPTH; i++) {
		dentry = (void *)slot->dentry;
		mnt = (void *)slot->mount;
		if (dentry == BPF_CORE_READ(mnt, mnt_root)) {
			mount = real_mount(mnt);
			upper = BPF_CORE_READ(mount, mnt_parent);
			if (upper == mount)
				return slot->used - start;
			slot->dentry = (__u64)BPF_CORE_READ(mount, mnt_mountpoint);
			slot->mount = (__u64)upper + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		parent = BPF_CORE_READ(dentry, d_parent);
		/* A root that is not its mount's hangs nowhere: a memfd or another
		 * pseudo file. Its name is all there is. */
		if (parent == dentry && slot->used != start)
			return slot->used - start;
		if (slot->used - start > PATH_MAX_BYTES - NAME_BYTES ||
		    !slot_append_name(slot, BPF_CORE_READ(dentry, d_name.name)))
			break;
		if (parent == dentry)
			return slot->used - start;
		slot->dentry = (__u64)parent;
	}
	slot->truncated = 1;
	return slot->used - start;
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
	start = slot->used;
	slot->truncated = 0;
	for (i = 0; i < CGROUP_DEPTH; i++) {
		parent = kernfs_parent(node);
		if (!parent)
			return slot->used - start;
		if (slot->used - start > CGROUP_MAX_BYTES - NAME_BYTES ||
		    !slot_append_name(slot, BPF_CORE_READ(node, name)))
			break;
		node = parent;
	}
	slot->truncated = 1;
	return slot->used - start;
}

#endif
