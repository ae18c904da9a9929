/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * net.bpf.h - TCP, from one tracepoint: every change of a socket's state.
 *
 * The task that is current tells something in few of the states: a connect, a listen
 * and a close begin in the task that asks for them, the rest happens in whatever was
 * interrupted by a packet. So what is known of a socket is kept under its
 * address from its first state to its last.
 */
#ifndef EDR_NET_H
#define EDR_NET_H

#include "process.bpf.h"

enum socket_role {
	ROLE_CONNECTING, /* or connected: it sent the SYN */
	ROLE_LISTENING,
	ROLE_ACCEPTED,
	ROLE_EARLY, /* was open before the sensor came */
};

struct socket_state {
	__u64 conn_id;
	__u64 opened;
	__u64 cgroup_id;
	__u64 owner_start_time;
	__u64 closer_start_time;
	__u32 owner_pid;
	__u32 owner_tid;
	__u32 closer_pid;
	__u32 role;  /* enum socket_role */
	__u32 flags; /* enum tcp_flags */
	__u16 established;
	__u16 waiting; /* for accept(2): not reported yet */
};

/* Whether accept(2) is seen: then a connection is reported by who accepts it, before only
 * when it ends without. */
const volatile __u32 accepts_seen = 0;

/* Keyed by struct sock *. CLOSE removes a socket; should that have been missed, the
 * next one at its address takes its place or removes it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct socket_state);
} sockets SEC(".maps");

/* new_conn_id is unique per boot, over all starts of the sensor: no CPU opens two
 * connections within 16 ns. */
static __always_inline __u64 new_conn_id(__u64 now)
{
	return (now >> 4) << 10 | (bpf_get_smp_processor_id() & 1023);
}

struct address6 {
	__u64 head;
	__u32 middle;
	__u32 tail;
};

static __always_inline bool is_v4_mapped(const struct address6 *addr)
{
	return addr->head == 0 && addr->middle == bpf_htonl(0xffff);
}

/* fill_endpoints reads the addresses. IPv4 inside an IPv6 socket is reported as what
 * is on the wire. skc_num is 0 at CLOSE, inet_sport still holds the port. */
static __always_inline void fill_endpoints(struct tcp_event *event, struct sock *sk)
{
	struct address6 local, remote;
	__be32 local4, remote4;

	event->local_port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	event->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	event->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (event->family == AF_INET6) {
		bpf_core_read(&local, sizeof(local), &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(&remote, sizeof(remote), &sk->__sk_common.skc_v6_daddr);
		if (!is_v4_mapped(&remote) && !is_v4_mapped(&local)) {
			__builtin_memcpy(event->local_addr, &local, sizeof(local));
			__builtin_memcpy(event->remote_addr, &remote, sizeof(remote));
			return;
		}
		event->family = AF_INET;
	}
	local4 = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
	remote4 = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	__builtin_memcpy(event->local_addr, &local4, sizeof(local4));
	__builtin_memcpy(event->remote_addr, &remote4, sizeof(remote4));
}

static __always_inline void fill_traffic(struct tcp_event *event, struct sock *sk)
{
	struct tcp_sock *tp = (void *)sk;
	__u64 sent = BPF_CORE_READ(tp, bytes_sent), again = BPF_CORE_READ(tp, bytes_retrans);
	__u64 received = BPF_CORE_READ(tp, bytes_received);

	/* bytes_received counts sequence numbers, and the peer's FIN has one. */
	if (received && BPF_CORE_READ(sk, __sk_common.skc_flags) & SOCK_DONE_BIT)
		received--;
	event->bytes_sent = sent - again;
	event->bytes_received = received;
	event->segs_out = BPF_CORE_READ(tp, segs_out);
	event->segs_in = BPF_CORE_READ(tp, segs_in);
	event->retransmits = BPF_CORE_READ(tp, total_retrans);
	event->srtt_us = BPF_CORE_READ(tp, srtt_us) >> 3; /* kept in eighths */
}

static __always_inline void emit_tcp(enum event_kind kind, struct sock *sk,
				     const struct socket_state *state, __u16 old_state)
{
	struct tcp_event *event;

	count_attempt(kind);
	event = bpf_ringbuf_reserve(&bulk_ring, sizeof(*event), 0);
	if (!event) {
		count_lost(kind);
		return;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->header.size = sizeof(*event);
	event->header.kind = kind;
	event->header.ktime = bpf_ktime_get_boot_ns();
	event->header.start_time = state->owner_start_time;
	event->header.pid = state->owner_pid;
	event->header.tid = state->owner_tid;
	event->conn_id = state->conn_id;
	event->opened = state->opened;
	event->cgroup_id = state->cgroup_id;
	event->flags = state->flags;
	event->closer_start_time = state->closer_start_time;
	event->closer_pid = state->closer_pid;
	event->old_state = old_state;
	event->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	fill_endpoints(event, sk);
	if (kind == EVENT_KIND_TCP_LISTEN) {
		event->backlog = BPF_CORE_READ(sk, sk_max_ack_backlog);
	} else {
		event->error = BPF_CORE_READ(sk, sk_err);
		fill_traffic(event, sk);
	}
	bpf_ringbuf_submit(event, 0);
}

static __always_inline void set_opened(struct socket_state *state)
{
	state->opened = bpf_ktime_get_boot_ns();
	state->conn_id = new_conn_id(state->opened);
}

static __always_inline void set_owner(struct socket_state *state, struct task_struct *task)
{
	state->owner_start_time = BPF_CORE_READ(task, group_leader, start_boottime);
	state->owner_pid = BPF_CORE_READ(task, tgid);
	state->owner_tid = BPF_CORE_READ(task, pid);
	state->cgroup_id = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
}

/* set_closer is for the state changes that a close or shutdown makes by itself. A
 * kernel worker may do it for a process that passed the socket on. */
static __always_inline void set_closer(struct socket_state *state, struct task_struct *task)
{
	if (BPF_CORE_READ(task, flags) & PF_KTHREAD)
		return;
	state->closer_start_time = BPF_CORE_READ(task, group_leader, start_boottime);
	state->closer_pid = BPF_CORE_READ(task, tgid);
}

/* remember stores a socket's state. A socket that has no room is reported without
 * an owner from then on, or not at all in a narrower scope, which is a loss. */
static __always_inline void remember(struct sock *sk, struct socket_state *state,
				     enum event_kind kind)
{
	__u64 key = (__u64)sk;

	if (bpf_map_update_elem(&sockets, &key, state, BPF_ANY) == 0)
		return;
	count_attempt(kind);
	count_lost(kind);
}

/* not_mine ends what is known of an earlier socket at this address. */
static __always_inline int not_mine(struct sock *sk)
{
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&sockets, &key);
	return 0;
}

/* connect(2) and sendto(2) with MSG_FASTOPEN, in the task that called them. */
static __always_inline int connect_began(struct sock *sk)
{
	struct task_struct *task = current_task();
	struct socket_state state = {};

	if (!task_in_scope(task))
		return not_mine(sk);
	set_opened(&state);
	set_owner(&state, task);
	state.role = ROLE_CONNECTING;
	state.flags = TCP_FLAG_INITIATED;
	remember(sk, &state, EVENT_KIND_TCP_CONNECT);
	return 0;
}

/* listen(2), in the task that called it. A port that is not bound yet is chosen
 * after this and reported as 0. */
static __always_inline int listen_began(struct sock *sk)
{
	struct task_struct *task = current_task();
	struct socket_state state = {};

	if (!task_in_scope(task))
		return not_mine(sk);
	set_opened(&state);
	set_owner(&state, task);
	state.role = ROLE_LISTENING;
	remember(sk, &state, EVENT_KIND_TCP_LISTEN);
	emit_tcp(EVENT_KIND_TCP_LISTEN, sk, &state, TCP_CLOSE);
	return 0;
}

/*
 * listener_of returns the listening socket that child is a fresh copy of. The copy
 * still has the parent's empty list head, which points to itself in the parent; it
 * is initialised after this state change. That is exact where the port is not:
 * several processes may listen on one port. The caller looks the address up, so a
 * value that is no listener does no harm.
 */
static __always_inline __u64 listener_of(struct sock *child)
{
	struct tcp_sock *tp = (void *)child;

	return (__u64)BPF_CORE_READ(tp, tsq_node.next) -
	       bpf_core_field_offset(struct tcp_sock, tsq_node);
}

/* The last packet of a handshake made a socket out of a listener's. */
static __always_inline int accept_began(struct sock *sk)
{
	__u64 key = listener_of(sk);
	struct socket_state *listener = bpf_map_lookup_elem(&sockets, &key);
	struct socket_state state = {};

	set_opened(&state);
	state.role = ROLE_ACCEPTED;
	if (listener && listener->role == ROLE_LISTENING) {
		state.cgroup_id = listener->cgroup_id;
		state.owner_start_time = listener->owner_start_time;
		state.owner_pid = listener->owner_pid;
		state.owner_tid = listener->owner_tid;
		state.flags = TCP_FLAG_OWNER_LISTENER;
	} else if (scope_mode == SCOPE_ALL) {
		state.flags = TCP_FLAG_OWNER_UNKNOWN;
	} else {
		return not_mine(sk);
	}
	remember(sk, &state, EVENT_KIND_TCP_ACCEPT);
	return 0;
}

/* The handshake is complete. */
static __always_inline int established(struct sock *sk, __u16 old)
{
	__u64 key = (__u64)sk;
	struct socket_state *state = bpf_map_lookup_elem(&sockets, &key);

	if (!state)
		return 0;
	state->established = 1;
	if (accepts_seen && state->flags & (TCP_FLAG_OWNER_LISTENER | TCP_FLAG_OWNER_UNKNOWN)) {
		state->waiting = 1;
		return 0;
	}
	emit_tcp(state->role == ROLE_CONNECTING ? EVENT_KIND_TCP_CONNECT : EVENT_KIND_TCP_ACCEPT,
		 sk, state, old);
	return 0;
}

/* early_state makes up the state of a socket that was opened before the sensor and that
 * handle_open_file did not find: a process outside of the scope held it, or none. */
static __always_inline void early_state(struct socket_state *state)
{
	state->conn_id = new_conn_id(bpf_ktime_get_boot_ns());
	state->role = ROLE_EARLY;
	state->flags = TCP_FLAG_EARLY | TCP_FLAG_OWNER_UNKNOWN;
	state->established = 1;
}

/* close(2) or shutdown(2), in the task that called it: the FIN goes out. */
static __always_inline int close_began(struct sock *sk, __u16 old)
{
	__u64 key = (__u64)sk;
	struct socket_state *state = bpf_map_lookup_elem(&sockets, &key);
	struct task_struct *task = current_task();
	struct socket_state early = {};

	if (!state) {
		if (!task_in_scope(task))
			return 0;
		early_state(&early);
		set_closer(&early, task);
		remember(sk, &early, EVENT_KIND_TCP_CLOSE);
		return 0;
	}
	if (!state->established) /* Fast Open: accepted and closed before the last ACK */
		established(sk, old);
	set_closer(state, task);
	return 0;
}

static __always_inline int closed(struct sock *sk, __u16 old)
{
	__u64 key = (__u64)sk;
	struct socket_state *known = bpf_map_lookup_elem(&sockets, &key);
	struct socket_state state = {};

	if (known) {
		state = *known;
		bpf_map_delete_elem(&sockets, &key);
	} else if (scope_mode == SCOPE_ALL && old != TCP_SYN_SENT && old != TCP_SYN_RECV &&
		   old != TCP_LISTEN && old != TCP_CLOSE) {
		early_state(&state);
	} else {
		return 0;
	}
	if (state.role == ROLE_LISTENING)
		return 0;
	if (!state.established) {
		/* Nobody has accepted an aborted handshake, but somebody asked for
		 * this connection. */
		if (state.role == ROLE_CONNECTING)
			emit_tcp(EVENT_KIND_TCP_CONNECT_FAILED, sk, &state, old);
		return 0;
	}
	/* A close with unread data sends a reset at once: the only way here
	 * with both directions shut and no FIN sent. */
	if ((old == TCP_ESTABLISHED || old == TCP_CLOSE_WAIT) &&
	    BPF_CORE_READ(sk, sk_shutdown) == SHUTDOWN_MASK)
		set_closer(&state, current_task());
	if (state.waiting)
		emit_tcp(EVENT_KIND_TCP_ACCEPT, sk, &state, old);
	emit_tcp(EVENT_KIND_TCP_CLOSE, sk, &state, old);
	return 0;
}

/* flow_of is the socket that changes state: of a multipath socket the first subflow. Go's
 * listeners are such sockets wherever the kernel has them. */
static __always_inline struct sock *flow_of(struct sock *sk)
{
	struct mptcp_sock *multipath = (void *)sk;

	if (bpf_core_field_exists(multipath->first) &&
	    BPF_CORE_READ(sk, sk_protocol) == IPPROTO_MPTCP)
		return BPF_CORE_READ(multipath, first);
	return sk;
}

/*
 * accept(2), in the task that called it: socket, struct socket that it gets. One that
 * was passed its listener from outside of the scope is seen from here on. Kernel threads
 * accept for nobody else: the listener stays the owner.
 */
static __always_inline int handle_sock_graft(const __u64 *args)
{
	struct sock *sk = (void *)args[0];
	struct task_struct *task = current_task();
	struct socket_state *state, fresh = {};
	__u64 key;
	__u8 status;
	bool mine;

	sk = flow_of(sk);
	key = (__u64)sk;
	if (BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	status = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (status == TCP_CLOSE) /* new, or ended before it was accepted */
		return 0;
	mine = !(BPF_CORE_READ(task, flags) & PF_KTHREAD) && task_in_scope(task);
	state = bpf_map_lookup_elem(&sockets, &key);
	if (!state) {
		if (!mine)
			return 0;
		set_opened(&fresh);
		set_owner(&fresh, task);
		fresh.role = ROLE_ACCEPTED;
		fresh.established = 1;
		remember(sk, &fresh, EVENT_KIND_TCP_ACCEPT);
		emit_tcp(EVENT_KIND_TCP_ACCEPT, sk, &fresh, status);
		return 0;
	}
	if (state->role != ROLE_ACCEPTED)
		return 0;
	if (mine) {
		set_owner(state, task);
		state->flags &= ~(TCP_FLAG_OWNER_LISTENER | TCP_FLAG_OWNER_UNKNOWN);
	}
	if (state->waiting) {
		state->waiting = 0;
		emit_tcp(EVENT_KIND_TCP_ACCEPT, sk, state, status);
	}
	return 0;
}

static __always_inline int handle_state(struct sock *sk, __u32 old, __u32 new)
{
	/* MPTCP sockets come by here as well and are no struct tcp_sock. */
	if (BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	/* A state is never left twice in a row, so the last change tells copies apart. */
	if (copies > 1 &&
	    !first_to_report(EVENT_KIND_TCP_CLOSE, (__u64)sk, 0, (__u64)old << 32 | new))
		return 0;
	switch (new) {
	case TCP_SYN_SENT:
		return connect_began(sk);
	case TCP_LISTEN:
		return listen_began(sk);
	case TCP_SYN_RECV:
		return old == TCP_LISTEN ? accept_began(sk) : 0;
	case TCP_ESTABLISHED:
		return established(sk, old);
	case TCP_FIN_WAIT1:
	case TCP_LAST_ACK:
		return close_began(sk, old);
	case TCP_CLOSE:
		return closed(sk, old);
	}
	return 0;
}

/*
 * handle_open_file takes in a socket that is open while the programs are attached
 * already, so that listeners of old have an owner for what they accept. Of several
 * processes that hold one, the first that the iterator comes to is the owner; who
 * connected an established one cannot be told any more.
 */
static __always_inline int handle_open_file(struct task_struct *task, struct file *file)
{
	struct socket_state state = {};
	struct socket *socket;
	struct sock *sk;
	__u16 family;
	__u8 status;
	__u64 key;

	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK || !task_in_scope(task))
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	sk = flow_of(sk);
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if ((family != AF_INET && family != AF_INET6) ||
	    BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	status = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (status == TCP_CLOSE)
		return 0;
	state.conn_id = new_conn_id(bpf_ktime_get_boot_ns());
	state.flags = TCP_FLAG_EARLY;
	state.role = ROLE_EARLY;
	state.established = 1;
	set_owner(&state, task);
	if (status == TCP_LISTEN) {
		state.role = ROLE_LISTENING;
	} else if (status == TCP_SYN_SENT) {
		state.role = ROLE_CONNECTING;
		state.flags |= TCP_FLAG_INITIATED;
		state.established = 0;
	}
	key = (__u64)sk;
	bpf_map_update_elem(&sockets, &key, &state, BPF_NOEXIST);
	return 0;
}

#endif
