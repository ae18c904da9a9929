// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
)

// serverError is an error reply as go-redis returns it.
type serverError string

func (e serverError) Error() string { return string(e) }
func (serverError) RedisError()     {}

var _ redis.Error = serverError("")

func TestClassify(t *testing.T) {
	for _, tt := range []struct {
		err   error
		class Class
		phase Phase
	}{
		{io.EOF, ClassNetwork, Retrying},
		{io.ErrUnexpectedEOF, ClassNetwork, Retrying},
		{errSpent, ClassNetwork, Retrying},
		{redis.ErrClosed, ClassNetwork, Retrying},
		{&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, ClassNetwork, Retrying},
		{&net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)}, ClassNetwork, Retrying},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, ClassTimeout, Retrying},
		{context.DeadlineExceeded, ClassTimeout, Retrying},
		{&net.OpError{Op: "remote error", Err: errors.New("tls: certificate required")}, ClassTLS, Held},
		{&tls.CertificateVerificationError{Err: errors.New("expired")}, ClassTLS, Held},
		{serverError("LOADING Redis is loading the dataset in memory"), ClassLoading, Retrying},
		{serverError("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."), ClassReplicas, Retrying},
		{serverError("NOREPLICAS Not enough good replicas to write."), ClassReplicas, Retrying},
		{serverError("TRYAGAIN Multiple keys request during rehashing of slot"), ClassCluster, Retrying},
		{serverError("CLUSTERDOWN The cluster is down"), ClassCluster, Retrying},
		{serverError("MOVED 3999 127.0.0.1:6381"), ClassCluster, Retrying},
		{serverError("ASK 3999 127.0.0.1:6381"), ClassCluster, Retrying},
		{serverError("CROSSSLOT Keys in request don't hash to the same slot"), ClassCluster, Retrying},
		{serverError("BUSY Redis is busy running a script."), ClassBusy, Retrying},
		{serverError("UNBLOCKED force unblock from blocking operation"), ClassBusy, Retrying},
		{serverError("READONLY You can't write against a read only replica."), ClassReadOnly, Retrying},
		{serverError("NOSCRIPT No matching script."), ClassNoScript, Retrying},
		{serverError("ERR max number of clients reached"), ClassMaxClients, Retrying},
		{serverError("OOM command not allowed when used memory > 'maxmemory'."), ClassOOM, Held},
		{serverError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."), ClassMisconf, Held},
		{serverError("NOAUTH Authentication required."), ClassAuth, Held},
		{serverError("WRONGPASS invalid username-password pair or user is disabled."), ClassAuth, Held},
		{serverError("ERR AUTH <password> called without any password configured for the default user."), ClassAuth, Held},
		{serverError("ERR invalid password"), ClassAuth, Held},
		{serverError("ERR Protocol error: unauthenticated multibulk length"), ClassAuth, Held},
		{serverError("NOPERM User x has no permissions to run the 'evalsha' command"), ClassPermission, Held},
		{serverError("ERR The user executing the script can't run this command or subcommand script: 1, on @user_script:9."), ClassPermission, Held},
		{serverError("ERR ACL failure in script: User x has no permissions to run the 'hget' command script: 49, on @user_script:55."), ClassPermission, Held},
		{serverError("WRONGTYPE Operation against a key holding the wrong kind of value"), ClassWrongType, Held},
		{serverError("ERR unknown command 'evalsha', with args beginning with: "), ClassScripting, Held},
		{serverError("ERR Error running script (call to f_572d): @user_script:81: @user_script: 81: -OOM command not allowed when used memory > 'maxmemory'."), ClassOOM, Held},
		{serverError("ERR Error running script (call to f_572d): @user_script:61: WRONGTYPE Operation against a key"), ClassWrongType, Held},
		{serverError("@user_script: 96: -READONLY You can't write against a read only replica."), ClassReadOnly, Retrying},
		{serverError("ERR Error running script (call to f_572d): @user_script:"), ClassServer, Held},
		{serverError("ERR Error compiling script (new function): user_script:1: unexpected symbol near '#'"), ClassScripting, Held},
		{serverError("ERR Protocol error: invalid bulk length"), ClassOversize, Held},
		{serverError("ERR Protocol error: invalid multibulk length"), ClassOversize, Held},
		{serverError("ERR Protocol error: too big mbulk count string"), ClassOversize, Held},
		{serverError("ERR string exceeds maximum allowed size (proto-max-bulk-len)"), ClassOversize, Held},
		{serverError("EDRCURSOR the cursor of this agent is not one of edr/1"), ClassCursor, Held},
		{badReply("HTTP/1.1 400 Bad Request"), ClassReply, Held},
		{serverError("ERR something nobody has seen yet"), ClassServer, Held},
		{errors.New("something else"), ClassNetwork, Retrying},
	} {
		for _, err := range []error{tt.err, fmt.Errorf("deliver 1-5: %w", tt.err)} {
			if got := classify(err); got != tt.class {
				t.Errorf("classify(%v) = %q, want %q", err, got, tt.class)
			}
		}
		if got := tt.class.policy().phase; got != tt.phase {
			t.Errorf("%s leads to %q, want %q", tt.class, got, tt.phase)
		}
	}
	if classify(nil) != ClassNone {
		t.Error("no error has a class")
	}
}

func TestClassesAreComplete(t *testing.T) {
	seen := make(map[Class]bool)
	hints := make(map[string]Class)
	for _, c := range Classes() {
		p := c.policy()
		if seen[c] {
			t.Errorf("%s is there twice", c)
		}
		seen[c] = true
		if other, same := hints[p.hint]; same || p.hint == "" {
			t.Errorf("%s: hint %q, as %s", c, p.hint, other)
		}
		hints[p.hint] = c
		if p.phase != Retrying && p.phase != Held && p.phase != Fenced {
			t.Errorf("%s leads to %q", c, p.phase)
		}
	}
}
