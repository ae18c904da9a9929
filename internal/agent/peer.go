// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"os/user"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is the process at the other end of a unix socket, as the kernel vouches
// for it: what it was when it connected.
type peer struct {
	PID    int32    `json:"pid"`
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	User   string   `json:"user,omitempty"` // name of UID, empty when it has none
	groups []uint32 // supplementary ones
}

func (p peer) member(gid uint32) bool { return p.GID == gid || slices.Contains(p.groups, gid) }

// attrs are the peer as evidence of a decision.
func (p peer) attrs() map[string]any {
	return map[string]any{"peer_pid": p.PID, "peer_uid": p.UID, "peer_gid": p.GID, "peer_user": p.User}
}

func (p peer) String() string {
	return fmt.Sprintf("uid %d, gid %d, pid %d", p.UID, p.GID, p.PID)
}

// peerOf asks the kernel who connected.
func peerOf(c *net.UnixConn) (p peer, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return p, fmt.Errorf("peer of the control socket: %w", err)
	}
	control := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p.PID, p.UID, p.GID = cred.Pid, cred.Uid, cred.Gid
			p.groups, err = peerGroups(fd)
		}
	})
	if control != nil {
		err = control
	}
	if err != nil {
		return peer{}, fmt.Errorf("peer of the control socket: %w", err)
	}
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.UID), 10)); err == nil {
		p.User = u.Username
	}
	return p, nil
}

// peerGroups returns the peer's supplementary groups. They come from the socket,
// not from /proc: by now the pid may belong to somebody else.
func peerGroups(fd uintptr) ([]uint32, error) {
	const most = 65536 // NGROUPS_MAX
	for n := 32; ; {
		groups := make([]uint32, n)
		size := uint32(n) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno == unix.ERANGE && int(size/4) > n && size/4 <= most:
			n = int(size / 4)
		default:
			return nil, errno
		}
	}
}

type peerKey struct{}

func withPeer(ctx context.Context, p peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

// peerFrom is who asks; ok is false when nobody was identified.
func peerFrom(ctx context.Context) (p peer, ok bool) {
	p, ok = ctx.Value(peerKey{}).(peer)
	return p, ok
}
