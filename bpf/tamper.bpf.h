/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * tamper.bpf.h - what others do to the sensor itself: signals, ptrace, and changes of its
 * files. It is reported whoever does it, whatever the scope, the exclusions and the limits
 * are, and through the priority ring. Nothing is prevented.
 */
#ifndef EDR_TAMPER_H
#define EDR_TAMPER_H

#include "process.bpf.h"

/* is_sensor tells whether a task is one of the sensor's threads. */
static __always_inline bool is_sensor(struct task_struct *task)
{
	struct sensor_process *sensor = sensor_now();
	__u32 inum, tgid;

	if (!sensor || !sensor->tgid)
		return false;
	tgid = ns_pid(task, &inum);
	return tgid == sensor->tgid && inum == sensor->pid_ns;
}

/* Of what is done to the sensor so much goes ahead of all that waits in the bulk ring: who
 * does it a million times would hide what else happens. The rest takes the other ring. */
#define AHEAD_INTERVAL 10000000ULL /* ns: 100 a second */
#define AHEAD_BURST 1000000000ULL

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64); /* the time up to which the share is used */
} ahead_until SEC(".maps");

static __always_inline bool goes_ahead(void)
{
	__u64 *until, now = bpf_ktime_get_boot_ns();
	__u32 only = 0;

	until = bpf_map_lookup_elem(&ahead_until, &only);
	if (!until || *until > now + AHEAD_BURST)
		return false;
	*until = (*until > now ? *until : now) + AHEAD_INTERVAL;
	return true;
}

/* tamper_target says whom it is done to. */
static __always_inline void tamper_target(struct tamper_event *record, struct task_struct *target)
{
	record->target_start_time = BPF_CORE_READ(target, group_leader, start_boottime);
	record->target_pid = BPF_CORE_READ(target, tgid);
	record->target_tid = BPF_CORE_READ(target, pid);
}

/* emit_tamper sends a record that names the current task. */
static __always_inline void emit_tamper(struct tamper_event *record, enum event_kind kind)
{
	struct task_struct *task = current_task();
	long err = -1;

	count_attempt(kind);
	fill_header(&record->header, kind, sizeof(*record), task);
	bpf_core_read_str(record->comm, sizeof(record->comm), &task->comm);
	if (goes_ahead())
		err = bpf_ringbuf_output(&priority_ring, record, sizeof(*record), 0);
	if (err)
		err = bpf_ringbuf_output(&bulk_ring, record, sizeof(*record), 0);
	if (err)
		count_lost(kind);
}

/*
 * told tells whether a copy before this one has run for the task. Nothing tells a call
 * from the same call done again, but the copies run in order: the first knows that it is a
 * new one, and the last, or the next first, ends it.
 */
static __always_inline bool told(struct task_struct *task, enum event_kind kind)
{
	struct report_key key = {
		.object = BPF_CORE_READ(task, start_boottime),
		.pid = BPF_CORE_READ(task, pid),
		.kind = kind,
	};
	__u64 *last = bpf_map_lookup_elem(&reported, &key), going_on = copy + 1 < copies;
	bool before = copy && last && *last;

	bpf_map_update_elem(&reported, &key, &going_on, BPF_ANY);
	return before;
}

/* Signals that mean no harm: HUP has the sensor read its configuration, CHLD, CONT, URG and
 * WINCH do nothing to it. */
#define HARMLESS (1U << 1 | 1U << 17 | 1U << 18 | 1U << 23 | 1U << 28)
#define SEND_SIG_PRIV 1 /* in place of a pointer: from the kernel */

static __always_inline int handle_signal(__u32 signal, __u64 info, struct task_struct *target,
					 __u32 result)
{
	struct kernel_siginfo *siginfo = (void *)info;
	struct tamper_event record = {};
	struct task_struct *task;

	if (signal == 0 || signal >= 32 || 1U << signal & HARMLESS || !is_sensor(target))
		return 0;
	task = current_task();
	/* What its own faults and its runtime raise is its own business; that the kernel kills
	 * it for want of memory is not. */
	if (info != SEND_SIG_PRIV && BPF_CORE_READ(task, signal) == BPF_CORE_READ(target, signal))
		return 0;
	if (copies > 1 && told(task, EVENT_KIND_SIGNAL))
		return 0;
	record.signal = signal;
	record.result = result;
	if (info == SEND_SIG_PRIV)
		record.flags = TAMPER_BY_KERNEL;
	else if (info)
		record.code = BPF_CORE_READ(siginfo, si_code);
	tamper_target(&record, target);
	emit_tamper(&record, EVENT_KIND_SIGNAL);
	return 0;
}

#define PTRACE_MODE_ATTACH 2

/* target, mode */
static __always_inline int handle_ptrace_access_check(const __u64 *args)
{
	struct task_struct *target = (void *)args[0];
	struct tamper_event record = {};

	if (!(args[1] & PTRACE_MODE_ATTACH) || !is_sensor(target) || is_sensor(current_task()))
		return 0;
	record.mode = args[1];
	tamper_target(&record, target);
	emit_tamper(&record, EVENT_KIND_PTRACE);
	return 0;
}

/* What of the sensor a file is, and what is near it. */
enum reach {
	REACH_ITSELF = 1 << 0,
	REACH_CHILDREN = 1 << 1, /* all that lies in this directory */
	REACH_NAMES = 1 << 2,    /* those names in this directory that protected_names has */
	REACH_ABOVE = 1 << 3, /* it lies somewhere below: matters when this is moved or covered */
};

struct protection {
	__u32 of; /* FILE_OF_* */
	enum reach reach;
	__u32 generation; /* of the inode, */
	__u32 generation_known;
};

struct file_key {
	__u64 ino;
	__u64 dev; /* as the kernel has it: major << 20 | minor */
};

#define PROTECTED_NAME_BYTES 112

/* A name in a directory; or, with ino 0, a path as a process writes it. */
struct name_key {
	struct file_key directory;
	char name[PROTECTED_NAME_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, struct file_key);
	__type(value, struct protection);
} protected_files SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, struct name_key);
	__type(value, __u32); /* FILE_OF_* */
} protected_names SEC(".maps");

static __always_inline bool moves_or_covers(__u32 kind)
{
	return kind == EVENT_KIND_FILE_RENAME || kind == EVENT_KIND_MOUNT ||
	       kind == EVENT_KIND_UMOUNT || kind == EVENT_KIND_MOUNT_MOVE;
}

static __always_inline __u32 protected_name(struct file_key *directory, struct dentry *dentry)
{
	struct name_key key = {.directory = *directory};
	__u32 *of;

	if (bpf_probe_read_kernel_str(key.name, sizeof(key.name),
				      BPF_CORE_READ(dentry, d_name.name)) < 0)
		return 0;
	of = bpf_map_lookup_elem(&protected_names, &key);
	return of ? *of : 0;
}

/* is_protected tells whether an inode is the one that was found by its number, or one that got
 * the number after it: a file system gives it away again at once. */
static __always_inline bool is_protected(struct protection *found, struct inode *inode)
{
	return !found->generation_known || found->generation == BPF_CORE_READ(inode, i_generation);
}

/* protected_at says what of the sensor a change of kind at a dentry is about, 0 mostly. */
static __noinline __u32 protected_at(struct dentry *dentry, __u32 kind)
{
	struct file_filter *filter = file_filter_now();
	struct protection *found;
	struct inode *inode;
	struct file_key key;
	__u32 of;

	if (!filter || !filter->protected_files)
		return 0;
	inode = BPF_CORE_READ(dentry, d_inode);
	key.dev = BPF_CORE_READ(dentry, d_sb, s_dev);
	if (inode) {
		key.ino = BPF_CORE_READ(inode, i_ino);
		found = bpf_map_lookup_elem(&protected_files, &key);
		if (found &&
		    (found->reach & REACH_ITSELF ||
		     (found->reach & REACH_ABOVE && moves_or_covers(kind))) &&
		    is_protected(found, inode))
			return found->of;
	}
	inode = BPF_CORE_READ(dentry, d_parent, d_inode);
	key.ino = BPF_CORE_READ(inode, i_ino);
	found = bpf_map_lookup_elem(&protected_files, &key);
	if (!found)
		return 0;
	if (found->reach & REACH_CHILDREN && is_protected(found, inode))
		return found->of;
	of = 0;
	/* Whatever the generation is, which root can change: a name is seldom there by chance. */
	if (found->reach & REACH_NAMES)
		of = protected_name(&key, dentry);
	return of;
}

/*
 * forget_replaced is to be called for a file that is being opened. Inodes of an overlay have
 * no generation, but their numbers are those of the inodes below it. Who makes a file that has
 * the number of a protected one is proof that the latter is no more; not on btrfs, whose
 * subvolumes have the same numbers. With layers on several file systems numbers can meet by
 * chance: what is forgotten then is still protected by its name.
 */
static __always_inline void forget_replaced(struct file *file)
{
	struct file_filter *filter = file_filter_now();
	struct protection *found;
	struct super_block *sb;
	struct inode *inode;
	struct file_key key;

	if (!(BPF_CORE_READ(file, f_mode) & FMODE_CREATED) &&
	    !(BPF_CORE_READ(file, f_flags) & __O_TMPFILE))
		return;
	if (!filter || !filter->protected_files)
		return;
	inode = BPF_CORE_READ(file, f_inode);
	sb = BPF_CORE_READ(inode, i_sb);
	if (BPF_CORE_READ(sb, s_magic) != OVERLAYFS_SUPER_MAGIC)
		return;
	key.ino = BPF_CORE_READ(inode, i_ino);
	key.dev = BPF_CORE_READ(sb, s_dev);
	found = bpf_map_lookup_elem(&protected_files, &key);
	if (found && found->reach == REACH_ITSELF) /* no directory */
		bpf_map_delete_elem(&protected_files, &key);
}

/*
 * at_our_root tells whether the current task's root is a directory that the sensor lies below,
 * as its own root is. In a container or after chroot(2) the same path is another file.
 */
static __always_inline bool at_our_root(void)
{
	struct dentry *root = BPF_CORE_READ(current_task(), fs, root.dentry);
	struct file_key key = {
		.ino = BPF_CORE_READ(root, d_inode, i_ino),
		.dev = BPF_CORE_READ(root, d_sb, s_dev),
	};
	struct protection *found = bpf_map_lookup_elem(&protected_files, &key);

	return found && found->reach & REACH_ABOVE;
}

/* protected_text is the same for a path that a process wrote. */
__noinline int protected_text(__u64 src)
{
	struct file_filter *filter = file_filter_now();
	struct name_key key = {};
	__u32 *of;

	if (!filter || !filter->protected_files || !src || !at_our_root() ||
	    bpf_probe_read_user_str(key.name, sizeof(key.name), (void *)src) < 0)
		return 0;
	of = bpf_map_lookup_elem(&protected_names, &key);
	return of ? *of : 0;
}

#endif
