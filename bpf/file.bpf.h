/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * file.bpf.h - records about changes of the file system. The handlers take the
 * arguments of the kernel's security hooks as an array, in which form LSM, fentry and
 * kprobe programs have them alike.
 */
#ifndef EDR_FILE_H
#define EDR_FILE_H

#include "tamper.bpf.h"

/* two paths at their bounds, a name, and slack for the last name of a path */
#define FILE_STRINGS_MAX (12 * 1024)
#define FILE_SLOTS 4 /* of each CPU: these programs may be preempted by each other */

struct file_slot {
	__u64 users; /* 1: taken */
	struct walk walk;
	__u64 mount;             /* find_mount: that was looked at last */
	__u64 points;            /* and what the best one so far got */
	struct file_event event; /* the record begins here */
	char data[FILE_STRINGS_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FILE_SLOTS); /* loader: file_slot_cpus times that */
	__type(key, __u32);
	__type(value, struct file_slot);
} file_slots SEC(".maps");

/* The loader finds in the kernel's types where the arguments begin that a handler
 * asks for: newer kernels put a mount's id mapping before them. */
const volatile __u32 argument_shift = 0;

/* The token bucket of each process; struct file_filter says what an event costs. */
struct bucket {
	__u64 spent; /* the time up to which tokens are used */
	__u64 suppressed;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u32); /* tgid */
	__type(value, struct bucket);
} file_buckets SEC(".maps");

const volatile __u32 file_slot_cpus = 1;

static __always_inline struct file_slot *file_slot_at(__u32 index)
{
	return bpf_map_lookup_elem(&file_slots, &index);
}

static __always_inline int file_slot_claim(void)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct file_slot *slot;
	__u32 index, i;

	for (i = 0; i < FILE_SLOTS; i++) {
		index = cpu % file_slot_cpus * FILE_SLOTS + i;
		slot = file_slot_at(index);
		if (slot && slot_take(&slot->users))
			return index;
	}
	return -1;
}

/* admit takes a token of the process: false when it has none left. Two threads at the
 * same time may share a token, which does no harm. */
static __always_inline bool admit(__u32 pid, __u32 *suppressed)
{
	__u64 now, n;
	struct file_filter *filter = file_filter_now();
	struct bucket *bucket, fresh = {};

	*suppressed = 0;
	if (!filter || !filter->interval)
		return true;
	now = bpf_ktime_get_boot_ns();
	bucket = bpf_map_lookup_elem(&file_buckets, &pid);
	if (!bucket) {
		fresh.spent = now + filter->interval;
		bpf_map_update_elem(&file_buckets, &pid, &fresh, BPF_NOEXIST);
		return true;
	}
	if (bucket->spent > now + filter->burst) {
		if (is_deep(pid))
			return true;
		__sync_fetch_and_add(&bucket->suppressed, 1);
		return false;
	}
	bucket->spent = (bucket->spent > now ? bucket->spent : now) + filter->interval;
	n = bucket->suppressed;
	if (n) {
		__sync_fetch_and_add(&bucket->suppressed, -n);
		*suppressed = n;
	}
	return true;
}

/*
 * file_begin returns the index of a slot with a record about what the current process
 * does, or -1 when there is nothing to report. A pid stands for a process that was
 * found to be in scope before; of says what of the sensor it is about, FILE_OF_*.
 */
__noinline int file_begin(__u32 kind, __u32 pid, __u32 of)
{
	struct task_struct *task = current_task();
	struct file_event *event;
	struct file_slot *slot;
	__u32 suppressed = 0;
	int index;

	if (exercises(task)) {
		count_exercised(kind);
		return -1;
	}
	if (of && is_sensor(task))
		of = 0; /* it may do so */
	if (!pid && !of) {
		if (!task_in_scope(task))
			return -1;
		if (excluded_task(task)) {
			count_suppressed(kind);
			return -1;
		}
		pid = BPF_CORE_READ(task, tgid);
	}
	if (!of && !admit(pid, &suppressed)) {
		count_suppressed(kind);
		return -1;
	}
	index = file_slot_claim();
	slot = index < 0 ? NULL : file_slot_at(index);
	if (!slot) {
		count_attempt(kind);
		count_lost(kind);
		return -1;
	}
	event = &slot->event;
	__builtin_memset(event, 0, sizeof(*event));
	slot->walk.used = 0;
	slot->walk.excluded = 0;
	fill_header(&event->header, kind, 0, task);
	event->cgroup_id = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	event->mnt_ns = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
	event->suppressed = suppressed;
	event->flags = of;
	return index;
}

/* file_finish sends the slot's record and gives the slot back. */
__noinline int file_finish(__u32 index)
{
	struct file_slot *slot = file_slot_at(index);
	__u32 used, kind;
	long err = -1;

	if (!slot)
		return 0;
	used = slot->walk.used;
	kind = slot->event.header.kind;
	if (slot->walk.excluded) {
		count_suppressed(kind);
	} else {
		count_attempt(kind);
		slot->event.header.size = sizeof(slot->event) + used;
		/* The bound has to be said of the very register that the helper gets. */
		barrier_var(used);
		if (used <= FILE_STRINGS_MAX && slot->event.flags & FILE_OF_SENSOR && goes_ahead())
			err = bpf_ringbuf_output(&priority_ring, &slot->event,
						 sizeof(slot->event) + used, 0);
		barrier_var(used);
		if (err && used <= FILE_STRINGS_MAX)
			err = bpf_ringbuf_output(&bulk_ring, &slot->event,
						 sizeof(slot->event) + used, 0);
		if (err)
			count_lost(kind);
	}
	slot_release(&slot->users);
	return 0;
}

/* file_describe fills in what is known of the object at slot->walk.dentry. */
__noinline int file_describe(__u32 index)
{
	struct file_slot *slot = file_slot_at(index);
	struct dentry *dentry;
	struct inode *inode;

	if (!slot)
		return 0;
	dentry = (void *)slot->walk.dentry;
	inode = BPF_CORE_READ(dentry, d_inode);
	if (!inode)
		return 0;
	fill_file(&slot->event.file, inode);
	if ((slot->event.file.mode & S_IFMT) == S_IFDIR)
		slot->event.flags |= FILE_DIRECTORY;
	return 0;
}

/* next_mount is the file system's next mount, its first one after NULL. A function of its
 * own, out of whose branches the compiler does not move what a kernel lacks. */
static __noinline struct mount *next_mount(struct super_block *sb, struct mount *mount)
{
	struct super_block___v6_18 *sb_v6_18 = (void *)sb;
	struct mount___v6_18 *v6_18 = (void *)mount;
	struct list_head *node;

	if (bpf_core_field_exists(v6_18->mnt_next_for_sb))
		return mount ? BPF_CORE_READ(v6_18, mnt_next_for_sb)
			     : BPF_CORE_READ(sb_v6_18, s_mounts);
	node = mount ? BPF_CORE_READ(mount, mnt_instance.next) : BPF_CORE_READ(sb, s_mounts.next);
	if (node == (void *)sb + bpf_core_field_offset(struct super_block, s_mounts))
		return NULL;
	return (void *)node - bpf_core_field_offset(struct mount, mnt_instance);
}

#define MOUNTS_MAX 64       /* of one file system that are looked at */
#define MOUNTS_STEP 4       /* at a time, see PATH_STEPS */
#define ERRORS_BEGIN -4095L /* in place of a pointer: a mount of the kernel's own */

/* find_mount_some looks at the next mounts: 0 when there are no more, or no better ones. */
__noinline int find_mount_some(__u32 index)
{
	struct file_slot *slot = file_slot_at(index);
	struct dentry *dentry, *root;
	struct super_block *sb;
	struct mount *mount;
	__u64 ns, own, points;
	int i;

	if (!slot)
		return 0;
	dentry = (void *)slot->walk.dentry;
	sb = BPF_CORE_READ(dentry, d_sb);
	root = BPF_CORE_READ(sb, s_root);
	own = (__u64)BPF_CORE_READ(current_task(), nsproxy, mnt_ns);
	mount = (void *)slot->mount;
	for (i = 0; i < MOUNTS_STEP; i++) {
		mount = next_mount(sb, mount);
		if (!mount)
			return 0;
		slot->mount = (__u64)mount;
		ns = (__u64)BPF_CORE_READ(mount, mnt_ns);
		if (!ns || ns >= (__u64)ERRORS_BEGIN)
			continue;
		points = (ns == own ? 2 : 0) + (BPF_CORE_READ(mount, mnt.mnt_root) == root);
		if (points > slot->points) {
			slot->points = points;
			slot->walk.mount = (__u64)mount + bpf_core_field_offset(struct mount, mnt);
		}
		if (points == 3)
			return 0;
	}
	return 1;
}

/*
 * find_mount looks for a mount through which slot->walk.dentry can be reached, for
 * hooks that are not told: that of the task's root or working directory, else one in
 * the task's mount namespace, else any. Mounts of the whole file system go first.
 */
__noinline int find_mount(__u32 index)
{
	struct file_slot *slot = file_slot_at(index);
	struct task_struct *task = current_task();
	struct vfsmount *mnt;
	struct dentry *dentry, *root;
	int i;

	if (!slot)
		return 0;
	dentry = (void *)slot->walk.dentry;
	root = BPF_CORE_READ(dentry, d_sb, s_root);
	mnt = BPF_CORE_READ(task, fs, root.mnt);
	if (mnt && BPF_CORE_READ(mnt, mnt_root) == root) {
		slot->walk.mount = (__u64)mnt;
		return 0;
	}
	mnt = BPF_CORE_READ(task, fs, pwd.mnt);
	if (mnt && BPF_CORE_READ(mnt, mnt_root) == root) {
		slot->walk.mount = (__u64)mnt;
		return 0;
	}
	slot->mount = 0;
	slot->points = 0;
	for (i = 0; i < MOUNTS_MAX / MOUNTS_STEP && find_mount_some(index); i++)
		;
	return 0;
}

__noinline int file_path_some(__u32 index)
{
	struct file_slot *slot = file_slot_at(index);
	struct file_filter *filter = file_filter_now();

	if (!slot)
		return WALK_CUT;
	return walk_some(&slot->walk, slot->data, FILE_STRINGS_MAX,
			 filter && filter->directories && !(slot->event.flags & FILE_OF_SENSOR) &&
				 !is_deep(slot->event.header.pid));
}

/* file_path appends the path of slot->walk.dentry on slot->walk.mount, the first or
 * the second of the record. */
__noinline int file_path(__u32 index, __u32 second)
{
	struct file_slot *slot = file_slot_at(index);
	struct vfsmount *mnt;
	int n;

	if (!slot)
		return 0;
	if (!slot->walk.mount)
		find_mount(index);
	walk_all(&slot->walk, file_path_some(index), n);
	/* A walk that does not end at the root of a mount ended too early. */
	mnt = (void *)slot->walk.mount;
	if (slot->walk.dentry != (__u64)BPF_CORE_READ(mnt, mnt_root))
		slot->walk.truncated = 1;
	if (second) {
		slot->event.path2_len = n;
		if (slot->walk.truncated)
			slot->event.flags |= FILE_PATH2_TRUNCATED;
	} else {
		slot->event.path_len = n;
		if (slot->walk.truncated)
			slot->event.flags |= FILE_PATH_TRUNCATED;
	}
	return 0;
}

/* file_text appends a string of the kernel and returns its length. */
__noinline int file_text(__u32 index, __u64 src)
{
	struct file_slot *slot = file_slot_at(index);

	if (!slot)
		return 0;
	return append_text(&slot->walk, slot->data, FILE_STRINGS_MAX, (void *)src, false);
}

/* begin_of begins a record about a dentry, which is what of says of the sensor. The pointers
 * go by the slot, since the verifier does not let a pointer it knows the type of pass for a
 * scalar. */
static __always_inline struct file_slot *begin_of(enum event_kind kind, __u64 dentry, __u64 mnt,
						  __u32 of, int *index)
{
	struct file_slot *slot;

	*index = file_begin(kind, 0, of);
	slot = file_slot_at(*index);
	if (!slot)
		return NULL;
	slot->walk.dentry = dentry;
	slot->walk.mount = mnt;
	file_describe(*index);
	return slot;
}

static __always_inline struct file_slot *begin_at(enum event_kind kind, __u64 dentry, __u64 mnt,
						  int *index)
{
	return begin_of(kind, dentry, mnt, protected_at((void *)dentry, kind), index);
}

static __always_inline __u64 mount_of(__u64 arg)
{
	struct path *path = (void *)arg;

	return (__u64)BPF_CORE_READ(path, mnt);
}

/* shifted returns an argument that stands one further on newer kernels. The two
 * comments keep the compiler from making one load with a variable offset of them, which
 * the verifier does not allow. */
static __always_inline __u64 shifted(const __u64 *args, const int n)
{
	__u64 value;

	if (argument_shift) {
		value = *(volatile const __u64 *)&args[n + 1];
		asm volatile("# shifted" : "+r"(value));
	} else {
		value = *(volatile const __u64 *)&args[n];
		asm volatile("# in place" : "+r"(value));
	}
	return value;
}

/*
 * made_with is the mode that a file gets which is made with that one. Where a folder may have
 * a default ACL the kernel takes the umask off behind the hooks, elsewhere before them.
 */
static __always_inline __u16 made_with(__u64 mode)
{
	return (__u16)mode & ~BPF_CORE_READ(current_task(), fs, umask);
}

/* dir, dentry, mode */
static __always_inline int handle_made(const __u64 *args, enum event_kind kind)
{
	int index;
	struct file_slot *slot = begin_at(kind, args[1], mount_of(args[0]), &index);

	if (!slot)
		return 0;
	slot->event.flags |= FILE_NEW_MODE | (kind == EVENT_KIND_FILE_MKDIR ? FILE_DIRECTORY : 0);
	slot->event.new_mode = made_with(args[2]);
	file_path(index, 0);
	return file_finish(index);
}

static __always_inline int handle_path_mknod(const __u64 *args)
{
	return handle_made(args, EVENT_KIND_FILE_CREATE);
}

static __always_inline int handle_path_mkdir(const __u64 *args)
{
	return handle_made(args, EVENT_KIND_FILE_MKDIR);
}

/* dir, dentry, target */
static __always_inline int handle_path_symlink(const __u64 *args)
{
	int index;
	struct file_slot *slot =
		begin_at(EVENT_KIND_FILE_SYMLINK, args[1], mount_of(args[0]), &index);

	if (!slot)
		return 0;
	file_path(index, 0);
	slot->event.path2_len = file_text(index, args[2]);
	return file_finish(index);
}

/* old dentry, new dir, new dentry: on one mount, the kernel sees to that */
static __always_inline int handle_path_link(const __u64 *args)
{
	int index;
	__u64 mnt = mount_of(args[1]);
	__u32 of = protected_at((void *)args[0], EVENT_KIND_FILE_LINK) |
		   protected_at((void *)args[2], EVENT_KIND_FILE_LINK);
	struct file_slot *slot = begin_of(EVENT_KIND_FILE_LINK, args[0], mnt, of, &index);

	if (!slot)
		return 0;
	file_path(index, 0);
	slot->walk.dentry = args[2];
	slot->walk.mount = mnt;
	file_path(index, 1);
	return file_finish(index);
}

/* dir, dentry */
static __always_inline int handle_removed(const __u64 *args)
{
	int index;
	struct file_slot *slot =
		begin_at(EVENT_KIND_FILE_DELETE, args[1], mount_of(args[0]), &index);

	if (!slot)
		return 0;
	file_path(index, 0);
	return file_finish(index);
}

#define handle_path_unlink handle_removed
#define handle_path_rmdir handle_removed

/* old dir, old dentry, new dir, new dentry, flags */
static __always_inline int handle_path_rename(const __u64 *args)
{
	struct dentry *onto = (void *)args[3];
	struct inode *target = BPF_CORE_READ(onto, d_inode);
	int index;
	__u32 of = protected_at((void *)args[1], EVENT_KIND_FILE_RENAME) |
		   protected_at((void *)args[3], EVENT_KIND_FILE_RENAME);
	struct file_slot *slot =
		begin_of(EVENT_KIND_FILE_RENAME, args[1], mount_of(args[0]), of, &index);

	if (!slot)
		return 0;
	if ((__u32)args[4] & RENAME_WHITEOUT)
		slot->event.flags |= FILE_WHITEOUT;
	if (target) {
		slot->event.target_ino = BPF_CORE_READ(target, i_ino);
		slot->event.flags |=
			(__u32)args[4] & RENAME_EXCHANGE ? FILE_EXCHANGED : FILE_REPLACED;
	}
	file_path(index, 0);
	slot->walk.dentry = args[3];
	slot->walk.mount = mount_of(args[2]);
	file_path(index, 1);
	return file_finish(index);
}

/* setattr_kind names a change of attributes by its gravest part, or none when it is not
 * worth a record: a change of times to now or forward, and what belongs to an open for
 * writing, which the record at its close covers. One for reading may empty a file, too. */
static __always_inline enum event_kind setattr_kind(struct inode *inode, struct iattr *attr,
						    __u32 valid)
{
	struct file_info info;
	struct timespec64 mtime;

	if (valid & (ATTR_UID | ATTR_GID))
		return EVENT_KIND_FILE_CHOWN;
	if (valid & ATTR_MODE)
		return EVENT_KIND_FILE_CHMOD;
	if (valid & ATTR_SIZE) {
		if (valid & ATTR_OPEN &&
		    (!(valid & ATTR_FILE) || BPF_CORE_READ(attr, ia_file, f_mode) & FMODE_WRITE))
			return EVENT_KIND_NONE;
		return EVENT_KIND_FILE_TRUNCATE;
	}
	if (!(valid & ATTR_MTIME_SET))
		return EVENT_KIND_NONE;
	fill_times(&info, inode);
	mtime = BPF_CORE_READ(attr, ia_mtime);
	return in_ns(&mtime) < info.mtime_ns ? EVENT_KIND_FILE_TIMES : EVENT_KIND_NONE;
}

/* dentry, attributes; shifted */
static __always_inline int handle_inode_setattr(const __u64 *args)
{
	struct dentry *dentry = (void *)shifted(args, 0);
	struct iattr *attr = (void *)shifted(args, 1);
	__u32 valid = BPF_CORE_READ(attr, ia_valid);
	enum event_kind kind = setattr_kind(BPF_CORE_READ(dentry, d_inode), attr, valid);
	struct file_event *event;
	struct file_slot *slot;
	struct timespec64 t;
	__u64 mnt = 0;
	int index;

	if (kind == EVENT_KIND_NONE)
		return 0;
	if (valid & ATTR_FILE)
		mnt = (__u64)BPF_CORE_READ(attr, ia_file, f_path.mnt);
	slot = begin_at(kind, (__u64)dentry, mnt, &index);
	if (!slot)
		return 0;
	event = &slot->event;
	if (valid & ATTR_MODE) {
		event->new_mode = BPF_CORE_READ(attr, ia_mode);
		event->flags |= FILE_NEW_MODE;
	}
	if (valid & ATTR_UID) {
		event->new_uid = BPF_CORE_READ(attr, ia_uid.val);
		event->flags |= FILE_NEW_UID;
	}
	if (valid & ATTR_GID) {
		event->new_gid = BPF_CORE_READ(attr, ia_gid.val);
		event->flags |= FILE_NEW_GID;
	}
	if (valid & ATTR_SIZE) {
		event->new_size = BPF_CORE_READ(attr, ia_size);
		event->flags |= FILE_NEW_SIZE;
	}
	if (valid & ATTR_ATIME_SET) {
		t = BPF_CORE_READ(attr, ia_atime);
		event->new_atime_ns = in_ns(&t);
		event->flags |= FILE_NEW_ATIME;
	}
	if (valid & ATTR_MTIME_SET) {
		t = BPF_CORE_READ(attr, ia_mtime);
		event->new_mtime_ns = in_ns(&t);
		event->flags |= FILE_NEW_MTIME;
	}
	file_path(index, 0);
	return file_finish(index);
}

/* dentry, name; shifted */
static __always_inline int handle_xattr(const __u64 *args, __u32 flags)
{
	__u64 name = shifted(args, 1);
	int index;
	struct file_slot *slot = begin_at(EVENT_KIND_FILE_XATTR, shifted(args, 0), 0, &index);

	if (!slot)
		return 0;
	slot->event.flags |= flags;
	file_path(index, 0);
	slot->event.name_len = file_text(index, name);
	return file_finish(index);
}

static __always_inline int handle_inode_setxattr(const __u64 *args)
{
	return handle_xattr(args, 0);
}

static __always_inline int handle_inode_removexattr(const __u64 *args)
{
	return handle_xattr(args, FILE_XATTR_REMOVED);
}

#define handle_inode_set_acl handle_inode_setxattr
#define handle_inode_remove_acl handle_inode_removexattr

/* attributes_before are those that the inode itself tells. */
static __always_inline __u32 attributes_before(struct inode *inode)
{
	__u32 has = BPF_CORE_READ(inode, i_flags);

	return (has & S_IMMUTABLE ? FS_IMMUTABLE_FL : 0) | (has & S_APPEND ? FS_APPEND_FL : 0) |
	       (has & S_SYNC ? FS_SYNC_FL : 0) | (has & S_NOATIME ? FS_NOATIME_FL : 0);
}

/* attributes_wanted reads what a process hands to ioctl(2): false when its command is
 * about something else. */
static __always_inline bool attributes_wanted(__u32 command, __u64 arg, __u32 *flags)
{
	__u32 x = 0;

	if (command == FS_IOC_SETFLAGS || command == FS_IOC32_SETFLAGS)
		return bpf_probe_read_user(flags, sizeof(*flags), (void *)arg) == 0;
	if (command != FS_IOC_FSSETXATTR || bpf_probe_read_user(&x, sizeof(x), (void *)arg))
		return false;
	*flags = (x & FS_XFLAG_IMMUTABLE ? FS_IMMUTABLE_FL : 0) |
		 (x & FS_XFLAG_APPEND ? FS_APPEND_FL : 0) | (x & FS_XFLAG_SYNC ? FS_SYNC_FL : 0) |
		 (x & FS_XFLAG_NOATIME ? FS_NOATIME_FL : 0) |
		 (x & FS_XFLAG_NODUMP ? FS_NODUMP_FL : 0);
	return true;
}

static __always_inline int chattr(__u64 at, __u64 mnt, __u32 attributes, __u32 flags)
{
	struct dentry *dentry = (void *)at;
	int index;
	struct file_slot *slot = begin_at(EVENT_KIND_FILE_CHATTR, at, mnt, &index);

	if (!slot)
		return 0;
	slot->event.attributes = attributes_before(BPF_CORE_READ(dentry, d_inode));
	slot->event.new_attributes = attributes;
	slot->event.flags |= flags;
	file_path(index, 0);
	return file_finish(index);
}

static __always_inline __u32 attributes_of(__u64 arg)
{
	struct file_kattr *v6_17 = (void *)arg;
	struct fileattr *attributes = (void *)arg;

	if (bpf_core_type_exists(struct file_kattr))
		return BPF_CORE_READ(v6_17, flags);
	return BPF_CORE_READ(attributes, flags);
}

/* dentry, attributes */
static __always_inline int handle_inode_file_setattr(const __u64 *args)
{
	return chattr(args[0], 0, attributes_of(args[1]), 0);
}

/* id mapping, dentry, attributes */
static __always_inline int handle_vfs_fileattr_set(const __u64 *args)
{
	return chattr(args[1], 0, attributes_of(args[2]), 0);
}

/* file, command, argument */
static __always_inline int handle_file_ioctl(const __u64 *args)
{
	struct file *file = (void *)args[0];
	__u32 attributes;

	if (!attributes_wanted(args[1], args[2], &attributes))
		return 0;
	return chattr((__u64)BPF_CORE_READ(file, f_path.dentry),
		      (__u64)BPF_CORE_READ(file, f_path.mnt), attributes, FILE_ARGUMENT);
}

#define handle_file_ioctl_compat handle_file_ioctl

/*
 * Files that are open for writing, by struct file: how each was when it was opened and
 * by whom, since it is often closed when its process is gone. Not the least recently
 * used goes when it is full: whoever fills it would hide what others write. What has no
 * room is counted as lost.
 */
struct written {
	__u64 start_time;
	__u64 cgroup_id;
	__u64 size;
	__u64 pos; /* of a file that was open before the sensor's start */
	__s64 mtime_ns;
	__u32 pid, tid;
	__u32 mnt_ns;
	__u16 excluded, early;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384); /* loader: 1 without file events */
	__type(key, __u64);
	__type(value, struct written);
} written_files SEC(".maps");

/* fill_written describes how a file is that a task has open. */
static __always_inline void fill_written(struct written *written, struct inode *inode,
					 struct task_struct *task)
{
	struct file_info info;

	fill_times(&info, inode);
	written->start_time = BPF_CORE_READ(task, group_leader, start_boottime);
	written->cgroup_id = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	written->size = BPF_CORE_READ(inode, i_size);
	written->mtime_ns = info.mtime_ns;
	written->pid = BPF_CORE_READ(task, tgid);
	written->tid = BPF_CORE_READ(task, pid);
	written->mnt_ns = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
	written->excluded = excluded_task(task) && !exercises(task);
}

/* is_written tells whether a file is one whose close is to be reported. */
static __always_inline bool is_written(struct file *file)
{
	return BPF_CORE_READ(file, f_mode) & FMODE_WRITE &&
	       (BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) == S_IFREG;
}

static __always_inline void lost_modify(void)
{
	count_attempt(EVENT_KIND_FILE_MODIFY);
	count_lost(EVENT_KIND_FILE_MODIFY);
}

/* file */
static __always_inline int handle_file_open(const __u64 *args)
{
	struct file *file = (void *)args[0];
	struct task_struct *task;
	struct written written = {};
	__u64 key = (__u64)file;

	forget_replaced(file);
	if (!is_written(file))
		return 0;
	task = current_task();
	if (!task_in_scope(task) && !exercises(task) &&
	    !protected_at(BPF_CORE_READ(file, f_path.dentry), EVENT_KIND_FILE_MODIFY)) {
		/* An open that failed later may have left its own behind. */
		bpf_map_delete_elem(&written_files, &key);
		return 0;
	}
	fill_written(&written, BPF_CORE_READ(file, f_inode), task);
	if (bpf_map_update_elem(&written_files, &key, &written, BPF_ANY))
		lost_modify();
	return 0;
}

/* handle_early_file takes in a file that is open while the programs are attached
 * already. Of several processes that hold it, the first that the iterator comes to is
 * named. */
static __always_inline int handle_early_file(struct task_struct *task, struct file *file)
{
	struct written written = {};
	__u64 key = (__u64)file;

	if (!is_written(file) || !task_in_scope(task))
		return 0;
	fill_written(&written, BPF_CORE_READ(file, f_inode), task);
	written.pos = BPF_CORE_READ(file, f_pos);
	written.early = 1;
	if (bpf_map_update_elem(&written_files, &key, &written, BPF_NOEXIST) == -E2BIG)
		lost_modify();
	return 0;
}

/* written_bytes is by how much a file grew, or how far its position went when it could
 * only be written. */
static __always_inline __u64 written_bytes(struct file *file, __u32 mode,
					   const struct written *before, __u64 size)
{
	__u64 pos = BPF_CORE_READ(file, f_pos);

	if (!(mode & FMODE_READ) && !(BPF_CORE_READ(file, f_flags) & O_APPEND) && pos > before->pos)
		return pos - before->pos;
	return size > before->size ? size - before->size : 0;
}

/* file, of which the last reference is gone */
static __always_inline int handle_file_release(const __u64 *args)
{
	struct file *file = (void *)args[0];
	__u32 mode = BPF_CORE_READ(file, f_mode);
	struct written *found, written;
	struct file_event *event;
	struct file_slot *slot;
	struct file_info info;
	struct inode *inode;
	__u64 key = (__u64)file, size;
	__u32 of;
	int index;

	if (!(mode & FMODE_WRITE))
		return 0;
	found = bpf_map_lookup_elem(&written_files, &key);
	if (!found)
		return 0;
	written = *found;
	bpf_map_delete_elem(&written_files, &key);
	inode = BPF_CORE_READ(file, f_inode);
	if (!inode) /* it could not be opened after all */
		return 0;
	size = BPF_CORE_READ(inode, i_size);
	fill_times(&info, inode);
	/* The clock of the times is coarse, so a position that moved tells as well; of a
	 * file that could be read it says nothing. */
	if (size == written.size && info.mtime_ns == written.mtime_ns &&
	    (mode & FMODE_READ || BPF_CORE_READ(file, f_pos) == written.pos))
		return 0;
	of = protected_at(BPF_CORE_READ(file, f_path.dentry), EVENT_KIND_FILE_MODIFY);
	if (written.excluded && !of && !is_deep(written.pid)) {
		count_suppressed(EVENT_KIND_FILE_MODIFY);
		return 0;
	}
	index = file_begin(EVENT_KIND_FILE_MODIFY, written.pid, of);
	slot = file_slot_at(index);
	if (!slot)
		return 0;
	event = &slot->event;
	event->header.start_time = written.start_time;
	event->header.pid = written.pid;
	event->header.tid = written.tid;
	event->cgroup_id = written.cgroup_id;
	event->mnt_ns = written.mnt_ns;
	event->open_flags = BPF_CORE_READ(file, f_flags);
	event->bytes_written = written_bytes(file, mode, &written, size);
	slot->walk.dentry = (__u64)BPF_CORE_READ(file, f_path.dentry);
	slot->walk.mount = (__u64)BPF_CORE_READ(file, f_path.mnt);
	file_describe(index);
	if (written.early)
		event->flags |= FILE_EARLY;
	else if (mode & FMODE_CREATED)
		event->flags |= FILE_CREATED_HERE;
	file_path(index, 0);
	return file_finish(index);
}

#define handle___fput handle_file_release

static __always_inline __u64 type_name(__u64 arg)
{
	struct vfsmount *mnt = (void *)arg;

	return (__u64)BPF_CORE_READ(mnt, mnt_sb, s_type, name);
}

/* source, mount point, type, flags */
static __always_inline int handle_sb_mount(const __u64 *args)
{
	struct path *path = (void *)args[1];
	int index;
	struct file_slot *slot = begin_at(EVENT_KIND_MOUNT, (__u64)BPF_CORE_READ(path, dentry),
					  mount_of(args[1]), &index);

	if (!slot)
		return 0;
	slot->event.open_flags = args[3];
	file_path(index, 0);
	slot->event.path2_len = file_text(index, args[0]);
	slot->event.name_len = file_text(index, args[2]);
	return file_finish(index);
}

/* mount, flags */
static __always_inline int handle_sb_umount(const __u64 *args)
{
	struct vfsmount *mnt = (void *)args[0];
	int index;
	struct file_slot *slot =
		begin_at(EVENT_KIND_UMOUNT, (__u64)BPF_CORE_READ(mnt, mnt_root), args[0], &index);

	if (!slot)
		return 0;
	slot->event.open_flags = args[1];
	file_path(index, 0);
	slot->event.name_len = file_text(index, type_name(args[0]));
	return file_finish(index);
}

/* from, to */
static __always_inline int handle_move_mount(const __u64 *args)
{
	struct path *from = (void *)args[0], *to = (void *)args[1];
	__u64 mnt = mount_of(args[0]);
	int index;
	struct file_slot *slot =
		begin_at(EVENT_KIND_MOUNT_MOVE, (__u64)BPF_CORE_READ(from, dentry), mnt, &index);

	if (!slot)
		return 0;
	file_path(index, 0);
	slot->walk.dentry = (__u64)BPF_CORE_READ(to, dentry);
	slot->walk.mount = mount_of(args[1]);
	file_path(index, 1);
	slot->event.name_len = file_text(index, type_name(mnt));
	return file_finish(index);
}

#if defined(__TARGET_ARCH_x86)
#define ARGUMENTS(r) {r->di, r->si, r->dx, r->cx, r->r8, r->r9}
#elif defined(__TARGET_ARCH_arm64)
#define ARGUMENTS(r) {r->regs[0], r->regs[1], r->regs[2], r->regs[3], r->regs[4], r->regs[5]}
#endif

/* The three forms of a program: the same code where the kernel lets it run. */
#define KERNEL_FUNCTION(hook, function)                                                            \
	SEC("fentry/" #function)                                                                   \
	int fentry_##hook(__u64 *ctx)                                                              \
	{                                                                                          \
		return handle_##hook(ctx);                                                         \
	}                                                                                          \
	SEC("kprobe/" #function)                                                                   \
	int kprobe_##hook(struct pt_regs *ctx)                                                     \
	{                                                                                          \
		__u64 args[] = ARGUMENTS(ctx);                                                     \
		return handle_##hook(args);                                                        \
	}

#define LSM_HOOK(hook)                                                                             \
	SEC("lsm/" #hook)                                                                          \
	int lsm_##hook(__u64 *ctx)                                                                 \
	{                                                                                          \
		return handle_##hook(ctx);                                                         \
	}

#define SECURITY_HOOK(hook)                                                                        \
	LSM_HOOK(hook)                                                                             \
	KERNEL_FUNCTION(hook, security_##hook)

#endif
