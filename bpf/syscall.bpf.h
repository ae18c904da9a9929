/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * syscall.bpf.h - file events out of system calls, for kernels that refuse everything
 * better: names as the caller wrote them, which another thread may have changed since
 * the kernel read them, and nothing of what io_uring does.
 */
#ifndef EDR_SYSCALL_H
#define EDR_SYSCALL_H

#include "file.bpf.h"

#define SYSCALLS_MAX 512
#define SYSCALL_RESULT 7 /* in place of an argument: what the call returned */

/*
 * syscall says what a system call is about: which of its arguments, from 1, holds
 * what; 0 for none. User space knows the numbers, which differ between architectures.
 */
struct syscall {
	__u8 kind; /* enum event_kind */
	__u8 fd;   /* the open file that it is about */
	__u8 path, path2, name;
	__u8 mode, uid, gid, size;
	__u8 flags;      /* MS_* of mount, AT_* of unlinkat, RENAME_* */
	__u8 times;      /* struct timespec[2]; NULL is now, which is not reported */
	__u8 removed;    /* 1: takes an extended attribute away */
	__u8 directory;  /* 1: is about directories only */
	__u8 attributes; /* file flags, in the form that a command says */
	__u8 command;    /* of ioctl(2), of which few are about files; 0: the form of XFS */
	__u8 forms;      /* enum syscall_forms; of EVENT_KIND_PTRACE: enum tamper_call */
	__u8 target;     /* the process that it is about */
};

/* Whether a call came from a 32-bit process, most calls need not be asked. */
struct syscalls {
	struct syscall own;
	struct syscall compat; /* of the same number */
};

/* In which form a call takes what others take otherwise. */
enum syscall_forms {
	FORM_TIMES_32 = 1 << 0,           /* numbers of 32 bits */
	FORM_TIMES_MICROSECONDS = 1 << 1, /* utimes(2) */
	FORM_TIMES_SECONDS = 1 << 2,      /* utime(2): no second number */
	FORM_IDS_16 = 1 << 3,             /* users and groups of 16 bits */
	FORM_SIZE_HALVES = 1 << 4,        /* the next argument has the size's upper half */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SYSCALLS_MAX);
	__type(key, __u32);
	__type(value, struct syscalls);
} file_syscalls SEC(".maps");

/* Which kinds no better program reports, a bit each. */
const volatile __u64 syscall_kinds = 0;

#define AT_REMOVEDIR 0x200
#define UTIME_OMIT ((1L << 30) - 2L) /* UTIME_NOW is one more */

#if defined(__TARGET_ARCH_x86)
static __always_inline __u32 syscall_number(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, orig_ax) &
	       ~0x40000000U; /* a mark of x32, whose calls are the same */
}

static __always_inline bool is_compat(struct task_struct *task)
{
	return BPF_CORE_READ(task, thread_info.status) & 2; /* TS_COMPAT */
}

static __always_inline __u64 argument_32(struct pt_regs *regs, __u32 n)
{
	switch (n) {
	case 1:
		return (__u32)BPF_CORE_READ(regs, bx);
	case 2:
		return (__u32)BPF_CORE_READ(regs, cx);
	case 3:
		return (__u32)BPF_CORE_READ(regs, dx);
	case 4:
		return (__u32)BPF_CORE_READ(regs, si);
	case 5:
		return (__u32)BPF_CORE_READ(regs, di);
	}
	return 0;
}

static __always_inline __u64 argument(struct pt_regs *regs, __u32 n)
{
	switch (n) {
	case 1:
		return BPF_CORE_READ(regs, di);
	case 2:
		return BPF_CORE_READ(regs, si);
	case 3:
		return BPF_CORE_READ(regs, dx);
	case 4:
		return BPF_CORE_READ(regs, r10);
	case 5:
		return BPF_CORE_READ(regs, r8);
	}
	return 0;
}
#elif defined(__TARGET_ARCH_arm64)
static __always_inline __u32 syscall_number(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, syscallno);
}

static __always_inline bool is_compat(struct task_struct *task)
{
	return BPF_CORE_READ(task, thread_info.flags) & (1 << 22); /* TIF_32BIT */
}

static __always_inline __u64 argument(struct pt_regs *regs, __u32 n)
{
	switch (n) {
	case 1:
		return BPF_CORE_READ(regs, orig_x0);
	case 2:
		return BPF_CORE_READ(regs, regs[1]);
	case 3:
		return BPF_CORE_READ(regs, regs[2]);
	case 4:
		return BPF_CORE_READ(regs, regs[3]);
	case 5:
		return BPF_CORE_READ(regs, regs[4]);
	}
	return 0;
}

static __always_inline __u64 argument_32(struct pt_regs *regs, __u32 n)
{
	return (__u32)argument(regs, n); /* the same registers, under other names */
}
#endif

__noinline __u64 syscall_argument(__u64 regs, __u32 n)
{
	if (is_compat(current_task()))
		return argument_32((void *)regs, n);
	return argument((void *)regs, n);
}

static __always_inline struct file *file_of(struct task_struct *task, __u32 fd)
{
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file *file = NULL;

	if (fd < BPF_CORE_READ(table, max_fds))
		bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(table, fd) + fd);
	return file;
}

/* syscall_text appends a string of the process and returns its length. */
__noinline int syscall_text(__u32 index, __u64 src)
{
	struct file_slot *slot = file_slot_at(index);

	if (!slot || !src)
		return 0;
	return append_text(&slot->walk, slot->data, FILE_STRINGS_MAX, (void *)src, true);
}

static __always_inline void path_of_file(int index, struct file_slot *slot, struct file *file)
{
	if (!file) { /* another thread has closed it meanwhile: no path is better than "/" */
		slot->event.flags |= FILE_PATH_TRUNCATED;
		return;
	}
	slot->walk.dentry = (__u64)BPF_CORE_READ(file, f_path.dentry);
	slot->walk.mount = (__u64)BPF_CORE_READ(file, f_path.mnt);
	file_describe(index);
	file_path(index, 0);
	slot->event.flags |= FILE_DEGRADED | FILE_WALKED;
}

/* A file was opened: reports that it was made, and that it can be written. */
static __always_inline int opened(struct file *file, __u32 of)
{
	__u32 mode = BPF_CORE_READ(file, f_mode);
	struct file_slot *slot;
	__u32 kind;
	int index, i;

	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFREG)
		return 0;
	for (i = 0; i < 2; i++) {
		kind = i ? EVENT_KIND_FILE_OPEN_WRITE : EVENT_KIND_FILE_CREATE;
		if (!(mode & (i ? FMODE_WRITE : FMODE_CREATED)) || !(syscall_kinds >> kind & 1))
			continue;
		index = file_begin(kind, 0, of);
		slot = file_slot_at(index);
		if (!slot)
			continue;
		path_of_file(index, slot, file);
		slot->event.open_flags = BPF_CORE_READ(file, f_flags);
		file_finish(index);
	}
	return 0;
}

/* syscall_times reads the times that utimensat(2) and its elders were given: false for
 * now or never. */
static __always_inline bool syscall_times(struct file_event *event, __u64 times, __u32 forms)
{
	__s32 narrow[4] = {};
	__s64 t[4] = {}, whole[2] = {}; /* before 6.3 nothing else may be read */
	long err;

	if (!times)
		return false;
	if (forms & FORM_TIMES_SECONDS) {
		err = forms & FORM_TIMES_32 ? bpf_probe_read_user(&narrow, 8, (void *)times)
					    : bpf_probe_read_user(&whole, 16, (void *)times);
		t[0] = forms & FORM_TIMES_32 ? narrow[0] : whole[0];
		t[2] = forms & FORM_TIMES_32 ? narrow[1] : whole[1];
	} else if (forms & FORM_TIMES_32) {
		err = bpf_probe_read_user(&narrow, sizeof(narrow), (void *)times);
		t[0] = narrow[0];
		t[1] = narrow[1];
		t[2] = narrow[2];
		t[3] = narrow[3];
	} else {
		err = bpf_probe_read_user(&t, sizeof(t), (void *)times);
	}
	if (forms & FORM_TIMES_MICROSECONDS) {
		t[1] *= 1000;
		t[3] *= 1000;
	}
	if (err || t[3] >= UTIME_OMIT)
		return false;
	event->new_mtime_ns = t[2] * 1000000000 + t[3];
	event->flags |= FILE_NEW_MTIME;
	if (t[1] < UTIME_OMIT) {
		event->new_atime_ns = t[0] * 1000000000 + t[1];
		event->flags |= FILE_NEW_ATIME;
	}
	return true;
}

/* wide_id is a user or group of a call that takes 16 bits: all of them set are none. */
static __always_inline __u32 wide_id(__u32 id, __u32 forms)
{
	if (!(forms & FORM_IDS_16))
		return id;
	return (id & 0xffff) == 0xffff ? ~0U : id & 0xffff;
}

/* The process that a call took control of last: the head of those that the caller traces. */
static __always_inline struct task_struct *traced(struct task_struct *task)
{
	struct list_head *node = BPF_CORE_READ(task, ptraced.next);

	return (void *)node - bpf_core_field_offset(struct task_struct, ptrace_entry);
}

#define PTRACE_ATTACH 16
#define PTRACE_SEIZE 0x4206

/* handle_control looks for the sensor among what ptrace(2) and the like are about. A number
 * is that of a process in the caller's pid namespace; threads are found out by ptrace(2)
 * only, which leaves a trace. */
static __always_inline int handle_control(struct task_struct *task, struct syscall *call,
					  __u64 regs)
{
	struct sensor_process *sensor = sensor_now();
	struct tamper_event record = {};
	__u32 inum, pid;

	if (!sensor || !sensor->tgid)
		return 0;
	record.flags = TAMPER_DEGRADED;
	record.call = call->forms;
	if (call->command) {
		record.request = syscall_argument(regs, call->command);
		if ((record.request != PTRACE_ATTACH && record.request != PTRACE_SEIZE) ||
		    !is_sensor(traced(task)))
			return 0;
		tamper_target(&record, traced(task));
	} else {
		pid = syscall_argument(regs, call->target);
		pid_in_ns(BPF_CORE_READ(task, thread_pid), &inum);
		if (pid != sensor->tgid || inum != sensor->pid_ns)
			return 0;
		record.target_start_time = sensor->start_time;
		record.target_pid = record.target_tid = sensor->pid;
	}
	if (is_sensor(task) || (copies > 1 && told(task, EVENT_KIND_NONE)))
		return 0;
	emit_tamper(&record, EVENT_KIND_PTRACE);
	return 0;
}

static __always_inline __u32 protected_file(struct file *file, __u32 kind)
{
	if (!file ||
	    (kind == EVENT_KIND_FILE_OPEN_WRITE && !(BPF_CORE_READ(file, f_mode) & FMODE_WRITE)))
		return 0;
	return protected_at(BPF_CORE_READ(file, f_path.dentry), kind);
}

/* protected_call says what of the sensor a call about files is about. */
static __always_inline __u32 protected_call(struct task_struct *task, struct syscall *call,
					    __u64 regs, long result)
{
	struct file_filter *filter = file_filter_now();
	struct file *file;
	__u32 of = 0;

	if (!filter || !filter->protected_files)
		return 0;
	if (call->fd == SYSCALL_RESULT) {
		file = file_of(task, result);
		if (file)
			forget_replaced(file);
		return protected_file(file, call->kind);
	}
	if (call->path)
		of = protected_text(syscall_argument(regs, call->path));
	if (call->path2)
		of |= protected_text(syscall_argument(regs, call->path2));
	if (call->fd && !of)
		of = protected_file(file_of(task, syscall_argument(regs, call->fd)), call->kind);
	return of;
}

static __always_inline int handle_syscall(struct pt_regs *regs, long result)
{
	struct task_struct *task;
	struct file_event *event;
	struct file_slot *slot;
	struct syscalls *calls;
	struct syscall *call;
	struct file *file;
	__u64 at = (__u64)regs, flags, path, wanted;
	__u32 nr, kind, command, attributes = 0, of = 0;
	char first = 0;
	int index;

	if (result < 0)
		return 0;
	nr = syscall_number(regs);
	calls = bpf_map_lookup_elem(&file_syscalls, &nr);
	if (!calls || !(calls->own.kind | calls->compat.kind))
		return 0;
	task = current_task();
	call = &calls->own;
	if (is_compat(task)) {
		call = &calls->compat;
		if ((__s32)result < 0)
			return 0;
	}
	kind = call->kind;
	wanted = 1ULL << (kind & 63);
	if (call->fd == SYSCALL_RESULT)
		wanted |= 1ULL << EVENT_KIND_FILE_CREATE;
	if (!kind || !(syscall_kinds & wanted))
		return 0;
	if (kind == EVENT_KIND_PTRACE)
		return handle_control(task, call, at);
	of = protected_call(task, call, at, result);
	if (!of && !task_in_scope(task) && !exercises(task))
		return 0;
	if (copies > 1 && told(task, EVENT_KIND_NONE))
		return 0;
	if (call->fd == SYSCALL_RESULT)
		return opened(file_of(task, result), of);
	if (call->times && !syscall_argument(at, call->times))
		return 0;
	if (call->attributes) {
		command = call->command ? syscall_argument(at, call->command) : FS_IOC_FSSETXATTR;
		if (!attributes_wanted(command, syscall_argument(at, call->attributes),
				       &attributes))
			return 0;
	}
	index = file_begin(kind, 0, of);
	slot = file_slot_at(index);
	if (!slot)
		return 0;
	event = &slot->event;
	event->flags |= FILE_DEGRADED;
	event->new_attributes = attributes;
	if (call->directory)
		event->flags |= FILE_DIRECTORY;
	if (call->removed)
		event->flags |= FILE_XATTR_REMOVED;
	if (call->mode) {
		event->new_mode = syscall_argument(at, call->mode) & 07777;
		if (kind == EVENT_KIND_FILE_CREATE || kind == EVENT_KIND_FILE_MKDIR)
			event->new_mode = made_with(event->new_mode);
		event->flags |= FILE_NEW_MODE;
	}
	if (call->uid) {
		event->new_uid = wide_id(syscall_argument(at, call->uid), call->forms);
		if (event->new_uid != ~0U)
			event->flags |= FILE_NEW_UID;
		event->new_gid = wide_id(syscall_argument(at, call->gid), call->forms);
		if (event->new_gid != ~0U)
			event->flags |= FILE_NEW_GID;
	}
	if (call->size) {
		event->new_size = syscall_argument(at, call->size);
		if (call->forms & FORM_SIZE_HALVES)
			event->new_size |= syscall_argument(at, call->size + 1) << 32;
		event->flags |= FILE_NEW_SIZE;
	}
	if (call->flags) {
		flags = syscall_argument(at, call->flags);
		if (kind == EVENT_KIND_FILE_DELETE && flags & AT_REMOVEDIR)
			event->flags |= FILE_DIRECTORY;
		else if (kind == EVENT_KIND_FILE_RENAME && flags & RENAME_EXCHANGE)
			event->flags |= FILE_EXCHANGED;
		else if (kind == EVENT_KIND_FILE_RENAME && flags & RENAME_WHITEOUT)
			event->flags |= FILE_WHITEOUT;
		else if (kind == EVENT_KIND_MOUNT || kind == EVENT_KIND_UMOUNT)
			event->open_flags = flags;
	}
	if (call->times && !syscall_times(event, syscall_argument(at, call->times), call->forms)) {
		slot_release(&slot->users);
		return 0;
	}
	path = call->path ? syscall_argument(at, call->path) : 0;
	if (path) {
		bpf_probe_read_user(&first, sizeof(first), (void *)path);
		if (first != '/')
			event->flags |= FILE_RELATIVE;
		event->path_len = syscall_text(index, path);
	} else if (call->fd) {
		file = file_of(task, syscall_argument(at, call->fd));
		path_of_file(index, slot, file);
	}
	if (call->path2)
		event->path2_len = syscall_text(index, syscall_argument(at, call->path2));
	if (call->name)
		event->name_len = syscall_text(index, syscall_argument(at, call->name));
	return file_finish(index);
}

#endif
