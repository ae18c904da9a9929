/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * process.bpf.h - records about processes: exec, fork, exit, and those that were
 * running before the sensor.
 */
#ifndef EDR_PROCESS_H
#define EDR_PROCESS_H

#include "self.bpf.h"
#include "walk.bpf.h"

#define TMPFS_MAGIC 0x01021994
#define HUGETLBFS_MAGIC 0x958458f6

static __always_inline void fill_header(struct event_header *header, enum event_kind kind,
					__u32 size, struct task_struct *task)
{
	header->size = size;
	header->kind = kind;
	header->ktime = bpf_ktime_get_boot_ns();
	header->start_time = BPF_CORE_READ(task, group_leader, start_boottime);
	header->pid = BPF_CORE_READ(task, tgid);
	header->tid = BPF_CORE_READ(task, pid);
}

/* ns_pid returns the task's tgid in its own pid namespace and that namespace's number. */
static __always_inline __u32 ns_pid(struct task_struct *task, __u32 *inum)
{
	return pid_in_ns(BPF_CORE_READ(task, group_leader, thread_pid), inum);
}

static __always_inline void fill_cred(struct cred_info *info, struct task_struct *task)
{
	const struct cred *cred = BPF_CORE_READ(task, real_cred);

	info->uid = BPF_CORE_READ(cred, uid.val);
	info->gid = BPF_CORE_READ(cred, gid.val);
	info->euid = BPF_CORE_READ(cred, euid.val);
	info->egid = BPF_CORE_READ(cred, egid.val);
	info->suid = BPF_CORE_READ(cred, suid.val);
	info->sgid = BPF_CORE_READ(cred, sgid.val);
	info->fsuid = BPF_CORE_READ(cred, fsuid.val);
	info->fsgid = BPF_CORE_READ(cred, fsgid.val);
	/* Whole structs: their one field was renamed and retyped in 6.3. */
	bpf_core_read(&info->cap_permitted, sizeof(info->cap_permitted), &cred->cap_permitted);
	bpf_core_read(&info->cap_effective, sizeof(info->cap_effective), &cred->cap_effective);
	bpf_core_read(&info->cap_inheritable, sizeof(info->cap_inheritable),
		      &cred->cap_inheritable);
	bpf_core_read(&info->cap_bounding, sizeof(info->cap_bounding), &cred->cap_bset);
	bpf_core_read(&info->cap_ambient, sizeof(info->cap_ambient), &cred->cap_ambient);
	info->securebits = BPF_CORE_READ(cred, securebits);
	info->seccomp_mode = 0;
	if (bpf_core_field_exists(task->seccomp.mode))
		info->seccomp_mode = BPF_CORE_READ(task, seccomp.mode);
}

static __always_inline void fill_ns(struct ns_info *info, struct task_struct *task)
{
	struct nsproxy *proxy = BPF_CORE_READ(task, nsproxy);

	info->mnt = BPF_CORE_READ(proxy, mnt_ns, ns.inum);
	info->net = BPF_CORE_READ(proxy, net_ns, ns.inum);
	info->uts = BPF_CORE_READ(proxy, uts_ns, ns.inum);
	info->ipc = BPF_CORE_READ(proxy, ipc_ns, ns.inum);
	info->cgroup = BPF_CORE_READ(proxy, cgroup_ns, ns.inum);
	info->user = BPF_CORE_READ(task, real_cred, user_ns, ns.inum);
	info->time = BPF_CORE_READ(proxy, time_ns, ns.inum);
}

static __always_inline __s64 in_ns(struct timespec64 *t)
{
	return t->tv_sec * 1000000000 + t->tv_nsec;
}

static __always_inline void fill_times(struct file_info *info, struct inode *inode)
{
	struct inode___v6_6 *v6_6 = (void *)inode;
	struct inode___v6_7 *v6_7 = (void *)inode;
	struct inode___v6_11 *v6_11 = (void *)inode;
	struct timespec64 t;

	if (bpf_core_field_exists(v6_11->i_mtime_sec)) {
		t.tv_sec = BPF_CORE_READ(v6_11, i_mtime_sec);
		t.tv_nsec = BPF_CORE_READ(v6_11, i_mtime_nsec);
	} else if (bpf_core_field_exists(v6_7->__i_mtime)) {
		t = BPF_CORE_READ(v6_7, __i_mtime);
	} else {
		t = BPF_CORE_READ(inode, i_mtime);
	}
	info->mtime_ns = in_ns(&t);

	if (bpf_core_field_exists(v6_11->i_ctime_sec)) {
		t.tv_sec = BPF_CORE_READ(v6_11, i_ctime_sec);
		t.tv_nsec = BPF_CORE_READ(v6_11, i_ctime_nsec) & 0x7fffffff;
	} else if (bpf_core_field_exists(v6_6->__i_ctime)) {
		t = BPF_CORE_READ(v6_6, __i_ctime);
	} else {
		t = BPF_CORE_READ(inode, i_ctime);
	}
	info->ctime_ns = in_ns(&t);
}

static __always_inline void fill_file(struct file_info *info, struct inode *inode)
{
	struct super_block *sb = BPF_CORE_READ(inode, i_sb);
	__u32 dev = BPF_CORE_READ(sb, s_dev);

	info->ino = BPF_CORE_READ(inode, i_ino);
	info->size = BPF_CORE_READ(inode, i_size);
	fill_times(info, inode);
	info->dev_major = dev >> 20;
	info->dev_minor = dev & 0xfffff;
	info->mode = BPF_CORE_READ(inode, i_mode);
	info->nlink = BPF_CORE_READ(inode, i_nlink);
	info->uid = BPF_CORE_READ(inode, i_uid.val);
	info->gid = BPF_CORE_READ(inode, i_gid.val);
	info->fs_magic = BPF_CORE_READ(sb, s_magic);
}

/* is_memfd tells the anonymous files of memfd_create (and of System V shared
 * memory, which cannot be executed) from files that were unlinked: they never had a
 * directory, so their dentry is its own parent. */
static __always_inline bool is_memfd(struct file_info *info, struct dentry *dentry)
{
	return info->nlink == 0 &&
	       (info->fs_magic == TMPFS_MAGIC || info->fs_magic == HUGETLBFS_MAGIC) &&
	       BPF_CORE_READ(dentry, d_parent) == dentry;
}

/*
 * v1_kernfs returns the task's control group in the first version 1 hierarchy that
 * has it below the root, for hosts that keep their containers there.
 */
#define V1_KERNFS(task, id)                                                                        \
	({                                                                                         \
		struct kernfs_node *_kn = NULL;                                                    \
		struct cgroup_subsys_state *_css = NULL;                                           \
		struct css_set *_set = BPF_CORE_READ(task, cgroups);                               \
		if (bpf_core_enum_value_exists(enum cgroup_subsys_id, id)) {                       \
			bpf_probe_read_kernel(                                                     \
				&_css, sizeof(_css),                                               \
				(void *)_set + bpf_core_field_offset(struct css_set, subsys) +     \
					8 * bpf_core_enum_value(enum cgroup_subsys_id, id));       \
			_kn = BPF_CORE_READ(_css, cgroup, kn);                                     \
			if (_kn && !kernfs_parent(_kn))                                            \
				_kn = NULL;                                                        \
		}                                                                                  \
		_kn;                                                                               \
	})

static __always_inline struct kernfs_node *v1_kernfs(struct task_struct *task)
{
	struct kernfs_node *kn = V1_KERNFS(task, pids_cgrp_id);

	if (!kn)
		kn = V1_KERNFS(task, memory_cgrp_id);
	if (!kn)
		kn = V1_KERNFS(task, devices_cgrp_id);
	if (!kn)
		kn = V1_KERNFS(task, cpu_cgrp_id);
	return kn;
}

static __always_inline __u32 fill_cgroup(struct exec_event *event, struct task_struct *task,
					 __u32 index)
{
	struct kernfs_node *kn = task_kernfs(task), *v1;

	event->cgroup_id = BPF_CORE_READ(kn, id);
	if (!kernfs_parent(kn)) {
		v1 = v1_kernfs(task);
		if (v1) {
			kn = v1;
			event->flags |= PROCESS_CGROUP_V1;
		}
	}
	return walk_cgroup(index, (__u64)kn);
}

/* The kernel calls a terminal pts3 whose device is /dev/pts/3. */
static __always_inline void fill_tty(struct exec_event *event, struct tty_struct *tty)
{
	char *name = event->tty;

	if (!tty)
		return;
	bpf_core_read_str(name, TTY_LEN, &tty->name);
	if (name[0] == 'p' && name[1] == 't' && name[2] == 's') {
		name[3] = '/';
		bpf_core_read_str(name + 4, TTY_LEN - 4, &tty->name[3]);
	}
}

/*
 * fill_process describes slot->task, all but what only an exec knows. Verified
 * once for its callers. The task comes by the slot because the verifier does not let
 * a pointer it knows the type of pass for a scalar.
 */
__noinline int fill_process(__u32 index)
{
	struct exec_slot *slot = slot_at(index);
	struct task_struct *task, *parent;
	struct exec_event *event;
	struct file *exe;
	struct path path;

	if (!slot)
		return 0;
	event = &slot->event;
	task = (void *)slot->task;

	parent = BPF_CORE_READ(task, real_parent, group_leader);
	event->parent_start_time = BPF_CORE_READ(parent, start_boottime);
	event->parent_pid = BPF_CORE_READ(parent, tgid);
	fill_ns(&event->ns, task);
	event->ns_pid = ns_pid(task, &event->ns.pid);
	fill_cred(&event->cred, task);
	event->loginuid = event->sessionid = ~0U;
	if (bpf_core_field_exists(task->loginuid)) {
		event->loginuid = BPF_CORE_READ(task, loginuid.val);
		event->sessionid = BPF_CORE_READ(task, sessionid);
	}
	bpf_core_read_str(event->comm, sizeof(event->comm), &task->comm);
	fill_tty(event, BPF_CORE_READ(task, signal, tty));
	if (BPF_CORE_READ(task, flags) & PF_KTHREAD)
		event->flags |= PROCESS_KTHREAD;

	exe = BPF_CORE_READ(task, mm, exe_file);
	if (exe) {
		fill_file(&event->exe, BPF_CORE_READ(exe, f_inode));
		path = BPF_CORE_READ(exe, f_path);
		if (event->exe.nlink == 0)
			event->flags |= PROCESS_DELETED;
		if (is_memfd(&event->exe, path.dentry))
			event->flags |= PROCESS_MEMFD;
		slot->walk.dentry = (__u64)path.dentry;
		slot->walk.mount = (__u64)path.mnt;
		event->exe_len = walk_path(index);
		if (slot->walk.truncated)
			event->flags |= PROCESS_EXE_TRUNCATED;
	}
	path = BPF_CORE_READ(task, fs, pwd);
	if (path.dentry) {
		slot->walk.dentry = (__u64)path.dentry;
		slot->walk.mount = (__u64)path.mnt;
		event->cwd_len = walk_path(index);
		if (slot->walk.truncated)
			event->flags |= PROCESS_CWD_TRUNCATED;
	}
	event->cgroup_len = fill_cgroup(event, task, index);
	if (slot->walk.truncated)
		event->flags |= PROCESS_CGROUP_TRUNCATED;
	return 0;
}

#define ARGV_PAGES (ARGV_MAX / PAGE_BYTES)

/*
 * read_argv copies argv behind the strings, in one call: its pages were written by
 * this very exec. Should one have been swapped out since, the rest is saved page
 * by page and zeroes stand where it was.
 */
__noinline int read_argv(__u32 index, __u64 start, __u32 len)
{
	struct exec_slot *slot = slot_at(index);
	__u32 used, done, n;
	int i;

	if (!slot || len > ARGV_MAX)
		return 0;
	used = slot->walk.used;
	if (used > STRINGS_MAX)
		return 0;
	if (bpf_probe_read_user(slot->data + used, len, (void *)start) == 0)
		return 0;
	slot->event.flags |= PROCESS_ARGV_FAULT;
	done = 0;
	/* One more than its pages: argv need not begin at a page's start. */
	for (i = 0; i < ARGV_PAGES + 1 && done < len; i++) {
		n = PAGE_BYTES - ((start + done) & (PAGE_BYTES - 1));
		if (n > len - done)
			n = len - done;
		/* Holds by now, but 5.10 wants it said of the register it sees. */
		barrier_var(n);
		if (n > PAGE_BYTES || done > ARGV_MAX)
			break;
		bpf_probe_read_user(slot->data + used + done, n, (void *)(start + done));
		done += n;
	}
	return 0;
}

static __always_inline void fill_argv(struct exec_slot *slot, struct task_struct *task, __u32 index)
{
	struct exec_event *event = &slot->event;
	__u64 start = BPF_CORE_READ(task, mm, arg_start);
	__u64 len = BPF_CORE_READ(task, mm, arg_end) - start;

	event->argv_size = len;
	if (len > ARGV_MAX) {
		len = ARGV_MAX;
		event->flags |= PROCESS_ARGV_TRUNCATED;
	}
	event->argv_len = len;
	read_argv(index, start, len);
}

/* emit_exec writes the slot's record to the priority ring: 0, or negative when
 * the ring has no room for it. */
static __always_inline long emit_exec(struct exec_slot *slot)
{
	__u32 argv = slot->event.argv_len;
	__u32 used = slot->walk.used;
	__u32 size;

	if (used > STRINGS_MAX || argv > ARGV_MAX)
		return -1;
	size = sizeof(slot->event) + used + argv;
	slot->event.header.size = size;
	return bpf_ringbuf_output(&priority_ring, &slot->event, size, 0);
}

struct report_key {
	__u64 object; /* what does not occur twice at the same time */
	__u32 pid;
	enum event_kind kind;
};

/*
 * What was reported last of an object: which of its execs, which change of a socket's
 * state. Least recently used goes first, so that nothing is ever removed by hand.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096); /* loader: more for more copies */
	__type(key, struct report_key);
	__type(value, __u64);
} reported SEC(".maps");

static __always_inline bool was_reported(enum event_kind kind, __u64 object, __u32 pid, __u64 which)
{
	struct report_key key = {.object = object, .pid = pid, .kind = kind};
	__u64 *last = bpf_map_lookup_elem(&reported, &key);

	return last && *last == which;
}

static __always_inline bool first_to_report(enum event_kind kind, __u64 object, __u32 pid,
					    __u64 which)
{
	struct report_key key = {.object = object, .pid = pid, .kind = kind};
	__u64 *last = bpf_map_lookup_elem(&reported, &key);

	if (last && *last == which)
		return false;
	return bpf_map_update_elem(&reported, &key, &which, last ? BPF_ANY : BPF_NOEXIST) !=
	       -EEXIST;
}

static __always_inline int handle_exec(struct task_struct *task, struct linux_binprm *bprm)
{
	struct exec_slot *slot;
	struct exec_event *event;
	__u64 filename, interp;
	int index;

	if (!task_in_scope(task))
		return 0;
	if (copies > 1 &&
	    !first_to_report(EVENT_KIND_EXEC, BPF_CORE_READ(task, group_leader, start_boottime),
			     BPF_CORE_READ(task, tgid), BPF_CORE_READ(task, self_exec_id)))
		return 0;
	count_attempt(EVENT_KIND_EXEC);
	index = slot_claim();
	slot = index < 0 ? NULL : slot_at(index);
	if (!slot) {
		count_lost(EVENT_KIND_EXEC);
		return 0;
	}
	event = &slot->event;
	__builtin_memset(event, 0, sizeof(*event));
	slot->task = (__u64)task;
	slot->walk.used = 0;
	fill_header(&event->header, EVENT_KIND_EXEC, 0, task);

	filename = (__u64)BPF_CORE_READ(bprm, filename);
	interp = (__u64)BPF_CORE_READ(bprm, interp);
	event->filename_len = slot_append(index, filename);
	event->interp_len = slot_append(index, interp);
	if (interp != filename)
		event->flags |= PROCESS_SCRIPT;
	if (BPF_CORE_READ_BITFIELD_PROBED(bprm, secureexec))
		event->flags |= PROCESS_SECUREEXEC;
	fill_process(index);
	fill_argv(slot, task, index);

	if (emit_exec(slot) < 0) {
		/* Rather the start of a long command line than no exec at all. */
		if (event->argv_len > PAGE_BYTES) {
			event->argv_len = PAGE_BYTES;
			event->flags |= PROCESS_ARGV_TRUNCATED;
			if (emit_exec(slot) == 0)
				goto out;
		}
		count_lost(EVENT_KIND_EXEC);
	}
out:
	slot_release(&slot->users);
	return 0;
}

static __always_inline int handle_fork(struct task_struct *parent, struct task_struct *child)
{
	__u32 pid = BPF_CORE_READ(child, pid);
	struct fork_event *event;
	__u8 in_scope = 1;

	if (pid != BPF_CORE_READ(child, tgid) || !task_in_scope(parent))
		return 0;
	if (copies > 1 &&
	    !first_to_report(EVENT_KIND_FORK, BPF_CORE_READ(child, start_boottime), pid, 1))
		return 0;
	count_attempt(EVENT_KIND_FORK);
	/* A child that cannot be remembered falls out of scope with all it does. */
	if (scope_mode == SCOPE_TREE && bpf_map_update_elem(&scope_pids, &pid, &in_scope, BPF_ANY))
		goto lost;
	fork_deep(parent, pid);
	event = bpf_ringbuf_reserve(&priority_ring, sizeof(*event), 0);
	if (!event)
		goto lost;
	fill_header(&event->header, EVENT_KIND_FORK, sizeof(*event), parent);
	event->child_start_time = BPF_CORE_READ(child, start_boottime);
	event->child_cgroup_id = BPF_CORE_READ(child, cgroups, dfl_cgrp, kn, id);
	event->child_pid = pid;
	event->child_ns_pid = ns_pid(child, &event->child_pid_ns);
	event->reserved = 0;
	bpf_core_read_str(event->child_comm, sizeof(event->child_comm), &child->comm);
	bpf_ringbuf_submit(event, 0);
	return 0;
lost:
	count_lost(EVENT_KIND_FORK);
	return 0;
}

static __always_inline int handle_exit(struct task_struct *task)
{
	struct signal_struct *signal = BPF_CORE_READ(task, signal);
	struct task_struct *leader, *parent;
	struct exit_event *event;
	__u32 code, tgid;
	__u64 start;

	if (BPF_CORE_READ(signal, live.counter) != 0) {
		handle_heartbeat(task); /* the sensor itself goes on */
		return 0;
	}
	if (!task_in_scope(task))
		return 0;
	leader = BPF_CORE_READ(task, group_leader);
	tgid = BPF_CORE_READ(task, tgid);
	/* When the last threads end at the same time, each sees that none is alive; the
	 * leader may come when the one that has told is no more. */
	start = BPF_CORE_READ(leader, start_boottime);
	if (copies > 1 || BPF_CORE_READ(signal, nr_threads) != 1) {
		if (!first_to_report(EVENT_KIND_EXIT, start, tgid, 1))
			return 0;
	} else if (was_reported(EVENT_KIND_EXIT, start, tgid, 1)) {
		return 0;
	}
	count_attempt(EVENT_KIND_EXIT);
	if (scope_mode == SCOPE_TREE)
		bpf_map_delete_elem(&scope_pids, &tgid);
	if (is_deep(tgid))
		bpf_map_delete_elem(&deep_pids, &tgid);
	event = bpf_ringbuf_reserve(&priority_ring, sizeof(*event), 0);
	if (!event) {
		count_lost(EVENT_KIND_EXIT);
		return 0;
	}
	fill_header(&event->header, EVENT_KIND_EXIT, sizeof(*event), task);
	parent = BPF_CORE_READ(leader, real_parent, group_leader);
	event->parent_start_time = BPF_CORE_READ(parent, start_boottime);
	event->parent_pid = BPF_CORE_READ(parent, tgid);

	/* Threads that are gone, this one, and the leader, which stays until it
	 * is reaped. What other threads that end right now used is not in yet. */
	event->utime_ns = BPF_CORE_READ(signal, utime) + BPF_CORE_READ(task, utime);
	event->stime_ns = BPF_CORE_READ(signal, stime) + BPF_CORE_READ(task, stime);
	if (task != leader) {
		event->utime_ns += BPF_CORE_READ(leader, utime);
		event->stime_ns += BPF_CORE_READ(leader, stime);
	}

	/* What wait(2) will tell: the group's code if something ended the whole
	 * group, else that of the leader, whichever thread was the last. */
	if (BPF_CORE_READ(signal, flags) & SIGNAL_GROUP_EXIT)
		code = BPF_CORE_READ(signal, group_exit_code);
	else
		code = BPF_CORE_READ(leader, exit_code);
	event->exit_code = (code >> 8) & 0xff;
	event->signal = code & 0x7f;
	event->core_dumped = (code >> 7) & 1;
	bpf_core_read_str(event->comm, sizeof(event->comm), &leader->comm);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* handle_task writes one process that is already there to the iterator's file. */
static __always_inline int handle_task(struct seq_file *seq, struct task_struct *task)
{
	struct exec_slot *slot = slot_at(slot_count);
	struct exec_event *event;
	__u32 size, used;

	if (!slot || BPF_CORE_READ(task, pid) != BPF_CORE_READ(task, tgid) ||
	    BPF_CORE_READ(task, signal, live.counter) == 0 || !task_in_scope(task))
		return 0;
	if (!slot_take(&slot->users)) { /* somebody else iterates */
		count_attempt(EVENT_KIND_TASK);
		count_lost(EVENT_KIND_TASK);
		return 0;
	}
	event = &slot->event;
	__builtin_memset(event, 0, sizeof(*event));
	slot->task = (__u64)task;
	slot->walk.used = 0;
	fill_process(slot_count);
	used = slot->walk.used;
	if (used <= STRINGS_MAX) {
		size = sizeof(*event) + used;
		fill_header(&event->header, EVENT_KIND_TASK, size, task);
		/* What does not fit into one read is shown again in the next. */
		if (bpf_seq_write(seq, event, size) == 0)
			count_attempt(EVENT_KIND_TASK);
	}
	slot_release(&slot->users);
	return 0;
}

#endif
