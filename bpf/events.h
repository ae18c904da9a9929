/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * events.h - the one contract between the kernel programs and user space.
 *
 * The Go side of these types is generated from this file (bpf2go) and committed;
 * sensor/decode.go reads records through them. Layout rules:
 *
 *  - fields stand in 8-byte groups, every struct is a multiple of 8 bytes, no
 *    holes (the build uses -Wpadded -Werror), never packed;
 *  - every ring record starts with struct event_header;
 *  - strings of variable length follow the fixed part, in the order in which
 *    their *_len fields are declared, without alignment or gaps;
 *  - a "path" is a sequence of NUL-terminated names, leaf first, as the dentry
 *    walk meets them: "passwd\0etc\0" is /etc/passwd; length 0 is "/" when the
 *    PATH_* flag of its owner is clear;
 *  - times are nanoseconds of CLOCK_BOOTTIME unless the name says otherwise;
 *  - pids are those of the initial pid namespace; "pid" is the tgid, "tid" the
 *    thread.
 */
#ifndef EDR_EVENTS_H
#define EDR_EVENTS_H

#define ARGV_MAX (256 * 1024) /* bytes of argv carried; longer is cut and flagged */
#define PATH_MAX_BYTES 4096   /* bytes of one walked path */
#define NAME_BYTES 256        /* one name of a path, NUL included */
#define CGROUP_MAX_BYTES 1024
#define FILENAME_MAX_BYTES 4096 /* bprm->filename and bprm->interp, each, NUL excluded */
#define COMM_LEN 16
#define TTY_LEN 16

enum event_kind {
	EVENT_KIND_NONE = 0,
	EVENT_KIND_EXEC = 1,
	EVENT_KIND_FORK = 2,
	EVENT_KIND_EXIT = 3,
	EVENT_KIND_TASK = 4, /* a process that ran before the sensor (task iterator) */
	EVENT_KIND_TCP_CONNECT = 5,
	EVENT_KIND_TCP_CONNECT_FAILED = 6,
	EVENT_KIND_TCP_ACCEPT = 7,
	EVENT_KIND_TCP_LISTEN = 8,
	EVENT_KIND_TCP_CLOSE = 9,
	EVENT_KIND_FILE_CREATE = 10, /* a new regular file, fifo, socket or device node */
	EVENT_KIND_FILE_MODIFY = 11, /* a file that was open for writing is closed after a write */
	EVENT_KIND_FILE_DELETE = 12, /* unlink, rmdir */
	EVENT_KIND_FILE_RENAME = 13,
	EVENT_KIND_FILE_LINK = 14, /* hard link, also what makes an O_TMPFILE visible */
	EVENT_KIND_FILE_SYMLINK = 15,
	EVENT_KIND_FILE_MKDIR = 16,
	EVENT_KIND_FILE_CHMOD = 17,
	EVENT_KIND_FILE_CHOWN = 18,
	EVENT_KIND_FILE_TRUNCATE = 19,
	EVENT_KIND_FILE_XATTR = 20, /* set or removed, file capabilities and ACLs among them */
	EVENT_KIND_FILE_TIMES = 21, /* modification time set backwards, or access time with it */
	EVENT_KIND_MOUNT = 22,
	EVENT_KIND_UMOUNT = 23,
	EVENT_KIND_MOUNT_MOVE = 24,
	EVENT_KIND_FILE_OPEN_WRITE = 25, /* degraded only: no hook tells whether a write followed */
	EVENT_KIND_FILE_CHATTR = 26,     /* file flags, such as immutable and append-only */
	EVENT_KIND_SIGNAL = 27,          /* sent to the sensor, one that ends or stops a process */
	EVENT_KIND_PTRACE = 28,    /* somebody wants to control the sensor, or read its memory */
	EVENT_KIND_HEARTBEAT = 29, /* the sensor's own, through each ring; no event */
	EVENT_KIND_COUNT = 30,
};

/* event_header: how long the record is, what it is, when, and which process acted. */
struct event_header {
	__u32 size; /* whole record, this header included */
	enum event_kind kind;
	__u64 ktime;
	__u64 start_time; /* of the acting process: group_leader->start_boottime */
	__u32 pid;        /* 0 when no process can be named */
	__u32 tid;
};

struct cred_info {
	__u32 uid, gid;
	__u32 euid, egid;
	__u32 suid, sgid;
	__u32 fsuid, fsgid;
	__u64 cap_permitted;
	__u64 cap_effective;
	__u64 cap_inheritable;
	__u64 cap_bounding;
	__u64 cap_ambient;
	__u32 securebits;
	__u32 seccomp_mode;
};

/* ns_info: inode numbers of the task's namespaces, as in /proc/PID/ns. */
struct ns_info {
	__u32 mnt, pid;
	__u32 net, user;
	__u32 uts, ipc;
	__u32 cgroup, time;
};

struct file_info {
	__u64 ino;
	__u64 size;
	__s64 mtime_ns; /* since the Unix epoch */
	__s64 ctime_ns;
	__u32 dev_major, dev_minor;
	__u32 mode;
	__u32 nlink;
	__u32 uid, gid;
	__u32 fs_magic;
	__u32 reserved;
};

enum process_flags {
	PROCESS_MEMFD = 1 << 0,          /* executable is a memfd */
	PROCESS_DELETED = 1 << 1,        /* executable has no link left */
	PROCESS_SCRIPT = 1 << 2,         /* filename is a script, exe its interpreter */
	PROCESS_SECUREEXEC = 1 << 3,     /* exec raised privileges (bprm->secureexec) */
	PROCESS_ARGV_TRUNCATED = 1 << 4, /* argv_size says how long it was */
	PROCESS_EXE_TRUNCATED = 1 << 5,  /* path walk stopped at a bound */
	PROCESS_CWD_TRUNCATED = 1 << 6,
	PROCESS_CGROUP_V1 = 1 << 7, /* cgroup path comes from a v1 hierarchy */
	PROCESS_CGROUP_TRUNCATED = 1 << 8,
	PROCESS_KTHREAD = 1 << 9,
	PROCESS_ARGV_FAULT = 1 << 10, /* part of argv could not be read; zeroes stand there */
};

/*
 * exec_event: EVENT_KIND_EXEC, written after the point of no return, so every
 * field describes the new image. EVENT_KIND_TASK has the same shape with
 * filename_len, interp_len and argv_len 0 (user space reads argv from /proc).
 */
struct exec_event {
	struct event_header header;
	__u64 parent_start_time;
	__u32 parent_pid; /* real_parent's tgid */
	__u32 ns_pid;     /* tgid in the process's own pid namespace */
	struct cred_info cred;
	struct ns_info ns;
	struct file_info exe;
	__u64 cgroup_id;
	__u32 loginuid; /* 4294967295: unset */
	__u32 sessionid;
	__u32 flags;     /* enum process_flags */
	__u32 argv_size; /* bytes of argv in the process, before any cut */
	char comm[COMM_LEN];
	char tty[TTY_LEN];  /* "pts/3", empty without one */
	__u32 filename_len; /* bprm->filename: what was asked for */
	__u32 interp_len;   /* bprm->interp: what runs it */
	__u32 exe_len;      /* path of mm->exe_file */
	__u32 cwd_len;      /* path */
	__u32 cgroup_len;   /* path */
	__u32 argv_len;     /* NUL-terminated arguments */
};

/* fork_event: EVENT_KIND_FORK; the header names the parent. Threads are not reported. */
struct fork_event {
	struct event_header header;
	__u64 child_start_time;
	__u64 child_cgroup_id;
	__u32 child_pid;
	__u32 child_ns_pid; /* in the pid namespace of the child */
	__u32 child_pid_ns; /* which one that is */
	__u32 reserved;
	char child_comm[COMM_LEN];
};

/* exit_event: EVENT_KIND_EXIT, once per process, when its last thread ends. */
struct exit_event {
	struct event_header header;
	__u64 parent_start_time;
	__u64 utime_ns; /* of the whole process */
	__u64 stime_ns;
	__u32 parent_pid;
	__s32 exit_code;   /* as passed to exit(2), 0..255; 0 when a signal ended it */
	__u32 signal;      /* 0 when it exited by itself */
	__u32 core_dumped; /* 0 or 1 */
	char comm[COMM_LEN];
};

enum tcp_flags {
	TCP_FLAG_INITIATED = 1 << 0,      /* this host connected; otherwise it accepted */
	TCP_FLAG_OWNER_LISTENER = 1 << 1, /* header names the process that called listen */
	TCP_FLAG_OWNER_UNKNOWN = 1 << 2,
	/* Opened before the sensor's start: opened is 0, who connected is not known. */
	TCP_FLAG_EARLY = 1 << 3,
};

/* tcp_event: every EVENT_KIND_TCP_*. Addresses are 16 bytes, IPv4 in the first 4. */
struct tcp_event {
	struct event_header header;
	__u64 conn_id; /* the same in all events of one connection; unique per boot */
	__u64 opened;  /* ktime of connect, accept or listen */
	__u64 cgroup_id;
	__u64 bytes_sent; /* payload, without retransmissions */
	__u64 bytes_received;
	__u32 netns;
	__u32 flags; /* enum tcp_flags */
	__u32 segs_out, segs_in;
	__u32 retransmits;
	__u32 srtt_us;
	/* Positive errno of a failed connect or of what broke a connection. 0 in a failed
	 * connect: the process gave up before there was an answer. */
	__s32 error;
	__u32 backlog; /* of a listener */
	__u16 family;  /* AF_INET, AF_INET6 */
	__u16 old_state;
	__u16 local_port, remote_port; /* host byte order */
	__u8 local_addr[16];
	__u8 remote_addr[16];
	__u64 closer_start_time; /* CLOSE: process that shut it down, 0 when unknown */
	__u32 closer_pid;
	__u32 reserved;
};

enum file_flags {
	FILE_DEGRADED = 1 << 0, /* from a syscall's arguments: racy, io_uring not seen */
	FILE_PATH_TRUNCATED = 1 << 1,
	FILE_PATH2_TRUNCATED = 1 << 2,
	FILE_REPLACED = 1 << 3,  /* RENAME: something stood at the new path; see target */
	FILE_EXCHANGED = 1 << 4, /* RENAME_EXCHANGE */
	FILE_WHITEOUT = 1 << 5,
	FILE_DIRECTORY = 1 << 6,
	FILE_XATTR_REMOVED = 1 << 7,
	FILE_CREATED_HERE = 1 << 8, /* MODIFY: created by the same open */
	FILE_RELATIVE = 1 << 9,     /* DEGRADED: the path is as the caller wrote it */
	FILE_NEW_MODE = 1 << 10,    /* which of the new_* fields are set */
	FILE_NEW_UID = 1 << 11,
	FILE_NEW_GID = 1 << 12,
	FILE_NEW_SIZE = 1 << 13,
	FILE_NEW_ATIME = 1 << 14,
	FILE_NEW_MTIME = 1 << 15,
	FILE_WALKED = 1 << 16, /* DEGRADED: the path is a path after all, of an open file */
	FILE_ARGUMENT =
		1 << 17,      /* CHATTR: new_attributes was read where the caller can change it */
	FILE_EARLY = 1 << 18, /* MODIFY: open since before the sensor's start */
	/* What of the sensor itself the change is about: reported whoever made it and however
	 * many of them there are. */
	FILE_OF_BINARY = 1 << 19,
	FILE_OF_UNIT = 1 << 20,
	FILE_OF_CONFIG = 1 << 21,
	FILE_OF_STATE = 1 << 22, /* its buffer, and what else it keeps */
};

#define FILE_OF_SENSOR (FILE_OF_BINARY | FILE_OF_UNIT | FILE_OF_CONFIG | FILE_OF_STATE)

/*
 * file_event: EVENT_KIND_FILE_* and mounts. file is the object before the change
 * (MODIFY: at close; CREATE, MKDIR, SYMLINK: ino 0, it has none yet). The hooks run
 * before the kernel acts, so an operation that fails later is reported too.
 */
struct file_event {
	struct event_header header;
	struct file_info file;
	__u64 cgroup_id;
	__u64 target_ino; /* RENAME with FILE_REPLACED: what is replaced */
	__u64 new_size;
	__s64 new_atime_ns; /* since the Unix epoch */
	__s64 new_mtime_ns;
	__u64 bytes_written; /* MODIFY: bytes by which the file's size or position tells; 0 unknown */
	__u32 flags;         /* enum file_flags */
	__u32 open_flags;    /* MODIFY, FILE_OPEN_WRITE: O_*; MOUNT: MS_* */
	__u32 new_mode;
	__u32 new_uid, new_gid;
	__u32 attributes; /* CHATTR: FS_*_FL before, of those that an inode has: iasA of lsattr(1) */
	__u32 new_attributes;
	__u32 suppressed; /* events of this process dropped by the token bucket since the last one */
	__u32 path_len;   /* path; DEGRADED: text as the caller wrote it */
	__u32 path2_len; /* path: RENAME, LINK, MOUNT_MOVE new path; text: SYMLINK target, MOUNT source */
	__u32 name_len; /* text: xattr name, file system type */
	__u32 mnt_ns;
};

enum tamper_flags {
	TAMPER_BY_KERNEL = 1 << 0, /* SIGNAL: nobody sent it; the process named just ran then */
	TAMPER_DEGRADED = 1 << 1,  /* PTRACE: from a system call */
};

enum tamper_call { /* TAMPER_DEGRADED: which */
		   TAMPER_CALL_PTRACE = 1,
		   TAMPER_CALL_VM_READ = 2,
		   TAMPER_CALL_VM_WRITE = 3,
};

/* tamper_event: EVENT_KIND_SIGNAL and EVENT_KIND_PTRACE; the header names who did it. */
struct tamper_event {
	struct event_header header;
	__u64 target_start_time;
	__u32 target_pid;
	__u32 target_tid;
	__s32 signal;
	__s32 code;   /* SIGNAL: si_code */
	__u32 result; /* SIGNAL: TRACE_SIGNAL_*: 0 delivered, 1 ignored, 2 one is pending already */
	__u32 mode;   /* PTRACE: PTRACE_MODE_* */
	__u32 request; /* PTRACE, degraded: of ptrace(2) */
	__u32 call;    /* enum tamper_call */
	__u32 flags;   /* enum tamper_flags */
	__u32 reserved;
	char comm[COMM_LEN]; /* of who did it, who may be gone and was never in scope */
};

/* heartbeat: EVENT_KIND_HEARTBEAT, when a thread ended that the sensor had announced. */
struct heartbeat {
	struct event_header header; /* names no process */
	__u64 serial;               /* as announced */
};

enum announced_for {
	ANNOUNCED_HEARTBEAT = 0, /* at its end both rings get a struct heartbeat */
	ANNOUNCED_EXERCISE = 1,  /* what it does to files is counted, and not reported */
	ANNOUNCED_COUNT = 2,
};

/* announced: a thread of the sensor, by its number in its own pid namespace, since a
 * process in a container does not know any other. */
struct announced {
	__u64 serial;
	__u32 pid_ns; /* inode number of the namespace */
	__u32 tid;    /* 0: none */
};

/* kind_counter: per CPU and kind; attempts = emitted + lost at any quiet moment. */
struct kind_counter {
	__u64 attempts;
	__u64 lost;
	__u64 suppressed; /* by the token bucket or an exclusion; not among the attempts */
};

#endif
