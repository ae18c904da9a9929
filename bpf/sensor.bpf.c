//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * sensor.bpf.c - the kernel programs, one object: licence, includes, and every
 * entry point in the order in which the kernel calls them. None changes what the
 * host does.
 *
 * The same object loads on every kernel since 5.10, so it does without bpf_loop,
 * dynptrs, task storage and atomics that return a value. Of each program on a
 * tracepoint there is a tp_btf form, preferred since the kernel checks its arguments'
 * types, and a raw_tp form of the same code for kernels that refuse the first. Of each
 * program on a security hook there is an LSM, a fentry and a kprobe form.
 */
#include "kernel.h"
#include "process.bpf.h"
#include "net.bpf.h"
#include "syscall.bpf.h"

/* The source is dual licensed; the kernel offers the helpers used here to programs
 * that are under the GPL, and knows no name for "GPL-2.0-only OR Apache-2.0". */
char LICENSE[] SEC("license") = "GPL";

/*
 * Sees: a process that fork, vfork or clone made, before it runs.
 * Why: fires after the child is complete, once, in the parent's context; the
 * syscalls would be five and tell neither start time nor kernel threads.
 * Ignores: threads (also those of io_uring), which belong to a process known already.
 */
SEC("tp_btf/sched_process_fork")
int on_sched_process_fork(__u64 *ctx)
{
	return handle_fork((void *)ctx[0], (void *)ctx[1]);
}

SEC("raw_tp/sched_process_fork")
int raw_sched_process_fork(__u64 *ctx)
{
	return handle_fork((void *)ctx[0], (void *)ctx[1]);
}

/*
 * Sees: every execve and execveat that succeeded, after the point of no return.
 * Why: the new image, its credentials and its argv are in place and belong to the
 * kernel's view, so nothing can be swapped between check and use; io_uring and
 * kernel-made processes come by here too.
 * Ignores: attempts that failed.
 */
SEC("tp_btf/sched_process_exec")
int on_sched_process_exec(__u64 *ctx)
{
	return handle_exec((void *)ctx[0], (void *)ctx[2]);
}

SEC("raw_tp/sched_process_exec")
int raw_sched_process_exec(__u64 *ctx)
{
	return handle_exec((void *)ctx[0], (void *)ctx[2]);
}

/*
 * Sees: the end of a process, in its last thread.
 * Why: fires for every cause of death, and after signal->live was decremented, so
 * zero means the last one. It is called while the address space or what is left of it
 * is torn down: before 6.16 after it, since then before; nothing here reads memory.
 * Ignores: threads that end while others live on, but for the sensor's own heartbeat;
 * the wait for the zombie.
 */
SEC("tp_btf/sched_process_exit")
int on_sched_process_exit(__u64 *ctx)
{
	return handle_exit((void *)ctx[0]);
}

SEC("raw_tp/sched_process_exit")
int raw_sched_process_exit(__u64 *ctx)
{
	return handle_exit((void *)ctx[0]);
}

/*
 * Sees: TCP sockets that connect, fail to, listen, are accepted and end, with what
 * they carried; Fast Open and io_uring included.
 * Why: one tracepoint for all of it, on every kernel, and the only one that is there
 * at the end of a connection, when the counters are final.
 * Ignores: other protocols (also MPTCP, whose subflows are TCP and seen), the states in
 * between, and the end of a listener.
 */
SEC("tp_btf/inet_sock_set_state")
int on_inet_sock_set_state(__u64 *ctx)
{
	return handle_state((void *)ctx[0], ctx[1], ctx[2]);
}

SEC("raw_tp/inet_sock_set_state")
int raw_inet_sock_set_state(__u64 *ctx)
{
	return handle_state((void *)ctx[0], ctx[1], ctx[2]);
}

/*
 * Sees: a connection that a process takes out of its listener's queue.
 * Why: the state changed before that, in whatever was interrupted by a packet; several
 * processes may wait at one listener, or have been given it. The hook is there on every
 * kernel and called by the accepting process, through io_uring, too.
 * Ignores: sockets that are not TCP.
 */
SECURITY_HOOK(sock_graft)

/*
 * Sees: what changes the file system's names: files, directories and links made,
 * removed and renamed; through io_uring and 32-bit calls, too.
 * Why: the path_ hooks are told the mount, which the inode_ hooks below them are not, and
 * see an operation on an overlay once, as the process named it.
 * Ignores: what the kernel does by itself (an NFS server), and whether it succeeded.
 */
SECURITY_HOOK(path_mknod)
SECURITY_HOOK(path_mkdir)
SECURITY_HOOK(path_symlink)
SECURITY_HOOK(path_link)
SECURITY_HOOK(path_unlink)
SECURITY_HOOK(path_rmdir)
SECURITY_HOOK(path_rename)

/*
 * Sees: changes of mode, owner, size and times, and of extended attributes.
 * Why: the one place for every way to do it, on every kernel; the path_ hooks of
 * chmod, chown and truncate differ between versions, and there is none for the rest.
 * Ignores: times that are set to now or forward; a size that an open for writing sets to
 * zero, which the record at its close tells.
 */
SECURITY_HOOK(inode_setattr)
SECURITY_HOOK(inode_setxattr)
SECURITY_HOOK(inode_removexattr)
SECURITY_HOOK(inode_set_acl) /* since 6.2; before, an extended attribute like others */
SECURITY_HOOK(inode_remove_acl)

/*
 * Sees: a regular file that is opened for writing, and its last close.
 * Why: every write would cost more than all the rest of the sensor; what a file was at
 * the open and is at the close tells the same.
 * Ignores: files that were not written after all; memory mapped from tmpfs, which keeps no
 * time of such writes.
 */
SECURITY_HOOK(file_open)
SECURITY_HOOK(file_release) /* since 6.9 */
KERNEL_FUNCTION(__fput, __fput)

/*
 * Sees: changes of file flags, as chattr(1) makes them.
 * Why: the security hook is told the flags in the kernel's own memory and knows no other
 * cause, but is there since 6.17 only; the function that calls it, since 5.13. Before, each
 * file system did it by itself, and the call is all that can be seen.
 * Ignores: what was before of flags that only the file system keeps.
 */
LSM_HOOK(inode_file_setattr)
KERNEL_FUNCTION(vfs_fileattr_set, vfs_fileattr_set)
SECURITY_HOOK(file_ioctl)
SECURITY_HOOK(file_ioctl_compat) /* of 32-bit processes; not before 5.10.209 and the like */

/*
 * Sees: file systems attached, bound, moved and detached, by the old system calls and
 * the new ones.
 * Ignores: what a mount namespace takes with it when it ends.
 */
SECURITY_HOOK(sb_mount)
SECURITY_HOOK(sb_umount)
SECURITY_HOOK(move_mount)

/*
 * Sees: signals to the sensor that end or stop a process, with who sent them.
 * Why: fires for every way to send one, when it has been allowed, and before the sensor
 * is gone; the record waits in the ring for the one after it. The security hook does not
 * see what the kernel sends by itself.
 * Ignores: signals to everybody else; those that do nothing to the sensor; attempts that were
 * refused.
 */
SEC("tp_btf/signal_generate")
int on_signal_generate(__u64 *ctx)
{
	return handle_signal(ctx[0], ctx[1], (void *)ctx[2], ctx[4]);
}

SEC("raw_tp/signal_generate")
int raw_signal_generate(__u64 *ctx)
{
	return handle_signal(ctx[0], ctx[1], (void *)ctx[2], ctx[4]);
}

/*
 * Sees: who is to control the sensor or to read or write its memory, by ptrace(2),
 * process_vm_writev(2), pidfd_getfd(2) or /proc/PID/mem.
 * Why: the one place that all of them pass. Whether it is then allowed is not known.
 * Ignores: looks that any monitoring takes (PTRACE_MODE_READ); all but the sensor.
 */
SECURITY_HOOK(ptrace_access_check)

/*
 * Sees: system calls that succeeded, of those that user space names.
 * Why: the way out and not in, as the call's outcome is known there, an opened file can be
 * looked at, and the process's strings are in memory.
 * Ignores: io_uring, which makes no calls.
 */
SEC("raw_tp/sys_exit")
int raw_sys_exit(__u64 *ctx)
{
	return handle_syscall((void *)ctx[0], ctx[1]);
}

/* Tells whether the kernel runs LSM programs: it loads and attaches them in any case. */
const volatile __u32 lsm_probe_pid = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lsm_probe_runs SEC(".maps");

SEC("lsm/file_open")
int lsm_probe(__u64 *ctx)
{
	__u32 zero = 0;
	__u64 *runs = bpf_map_lookup_elem(&lsm_probe_runs, &zero);

	if (runs && bpf_get_current_pid_tgid() >> 32 == lsm_probe_pid)
		__sync_fetch_and_add(runs, 1);
	return 0;
}

/*
 * Sees: every process that exists while the file is read.
 * Why: consistent with the events (same fields, same walk), 50 µs where /proc takes
 * milliseconds. Ignores: argv, which belongs to another address space; threads;
 * zombies.
 */
SEC("iter/task")
int on_task(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;

	if (!task)
		return 0;
	return handle_task(ctx->meta->seq, task);
}

/* Whether closes are seen of the files that were written. */
const volatile __u32 early_files = 0;

/*
 * Sees: every open file, once, when the sensor starts.
 * Why: tells sockets with their owners, in every network namespace; /proc/net/tcp would
 * need a search through all descriptors for each of them. Tells files that are open for
 * writing, whose close is to be reported. Ignores: all else.
 */
SEC("iter/task_file")
int on_task_file(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (!task || !file)
		return 0;
	if (early_files)
		handle_early_file(task, file);
	return handle_open_file(task, file);
}
