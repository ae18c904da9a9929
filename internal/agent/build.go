// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/fdstore"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor"
	"github.com/aurorasoc/edr-sensor/transport"
)

// kept is what systemd keeps of the sensor while that is restarted, and has kept of the
// process before. Without systemd there is nobody who would.
func (a *Agent) kept(ctx context.Context) (sensor.Keeper, []sensor.Kept) {
	files, err := fdstore.Inherited()
	if err != nil {
		logging.From(ctx).Warn("nothing is taken over from the process before", zap.Error(err))
	}
	kept := make([]sensor.Kept, len(files))
	for i, f := range files {
		kept[i] = sensor.Kept{Name: f.Name, File: f.File}
	}
	if store := fdstore.Open(os.Getenv("NOTIFY_SOCKET")); store != nil {
		return store, kept
	}
	return nil, kept
}

// scopeOf turns the configured scope into what the kernel compares. What cannot be one is a
// problem of the configuration; a cgroup that is not there may be made by a service that
// starts later.
func scopeOf(c config.Scope) (sensor.Scope, error) {
	switch c.Kind {
	case config.ScopeTree:
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", c.PID)); err != nil {
			return sensor.Scope{}, &config.Problem{Key: "sensor.scope", Value: c.String(), What: "is no process here", Remedy: "name one that runs"}
		}
		return sensor.Scope{Mode: sensor.ScopeTree, PID: c.PID}, nil
	case config.ScopeCgroup:
		id, err := cgroupID(c.Cgroup)
		if errors.Is(err, errNoCgroup) {
			return sensor.Scope{}, &config.Problem{Key: "sensor.scope", Value: c.String(), What: "cannot be watched: " + err.Error(), Remedy: "name a directory of the cgroup v2 hierarchy"}
		}
		if err != nil {
			return sensor.Scope{}, fmt.Errorf("sensor.scope %s: %w: name a directory of the cgroup v2 hierarchy", c, err)
		}
		return sensor.Scope{Mode: sensor.ScopeCgroup, CgroupID: id}, nil
	default:
		return sensor.Scope{Mode: sensor.ScopeAll}, nil
	}
}

// filesOf gives a process that was quiet twice its rate at once: what a package
// manager or a compiler does in a moment is rarely a flood.
func filesOf(c config.File) sensor.FileOptions {
	return sensor.FileOptions{
		On: c.Enabled, Rate: c.PerProcess, Burst: 2 * c.PerProcess,
		ExcludeDirectories: c.ExcludePaths, ExcludeExecutables: c.ExcludeExecutables,
	}
}

var errNoCgroup = errors.New("is no cgroup of version 2")

// cgroupID is the inode number of the cgroup's directory (cgroup_id in the
// kernel). The path is below the v2 mount, wherever that is, or absolute. A directory
// elsewhere has such a number, too, which is nobody's: nothing would be watched.
func cgroupID(path string) (uint64, error) {
	candidates := []string{path}
	if !strings.HasPrefix(path, "/sys/fs/cgroup") {
		candidates = []string{filepath.Join("/sys/fs/cgroup", path), filepath.Join("/sys/fs/cgroup/unified", path)}
	}
	var errs []error
	for _, p := range candidates {
		var st unix.Stat_t
		var fs unix.Statfs_t
		err := errors.Join(unix.Stat(p, &st), unix.Statfs(p, &fs))
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", p, err))
		case fs.Type != unix.CGROUP2_SUPER_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFDIR:
			errs = append(errs, fmt.Errorf("%s %w", p, errNoCgroup))
		default:
			return st.Ino, nil
		}
	}
	return 0, errors.Join(errs...)
}

func (a *Agent) newSender(ctx context.Context) (*transport.Sender, error) {
	t := a.cfg.Transport
	o := Destination(t, a.identity.ID)
	length, age, err := config.ParseTrim(t.Trim)
	if err != nil {
		return nil, fmt.Errorf("transport.trim: %w", err)
	}
	o.DecisionsLimit, o.TrimLength, o.TrimAge = t.DecisionsMaxLen, length, age
	o.Encoding, o.Ack = transport.Encoding(t.Encoding), transport.Ack(t.Ack)
	o.BatchRecords, o.BatchBytes, o.Linger = t.BatchRecords, t.BatchBytes, t.Linger
	o.BackoffBase, o.BackoffCap, o.FirstReconnect = t.BackoffBase, t.BackoffLimit, t.ReconnectSpread
	o.Registerer = a.registry
	o.OnChange = a.deliveryDecisions(ctx)
	o.Renew, o.Processes, o.Remember = a.renew, a.lineage.Processes, a.remember
	s, err := transport.New(o, a.queue)
	if err != nil {
		return nil, fmt.Errorf("transport: %w", err)
	}
	return s, nil
}

// Destination is where the records of an agent go, and how to get there. The files of
// transport.tls are read when there is a connection to make, and no sooner: where they
// cannot be, events wait in the buffer.
func Destination(t config.Transport, agentID string) transport.Options {
	o := transport.Options{
		Topology: transport.Topology(t.Topology), Addr: t.Address,
		Master: t.Sentinel.Master, SentinelUsername: t.Sentinel.Username, SentinelPasswordFile: t.Sentinel.PasswordFile,
		Username: t.Username, PasswordFile: t.PasswordFile, DB: t.DB, Timeout: t.Timeout,
		AgentID: agentID, Prefix: t.Prefix, Shard: t.Shard, Shards: t.Shards,
		SystemKey: t.DecisionsKey, AgentsKey: t.AgentsKey, ApprovalsKey: t.ApprovalsKey,
	}
	if t.TLS.Enabled {
		o.TLS = func() (*tls.Config, error) { return ClientTLS(t.TLS) }
	}
	return o
}

// Placed returns t with the shard and the keys that the agent of c uses: more than one
// shard makes them follow from its id.
func Placed(c config.Config) config.Transport {
	t := c.Transport
	id := c.Agent.ID
	if b, err := os.ReadFile(filepath.Join(c.Agent.StateDir, "agent_id")); id == "" && err == nil {
		id = strings.TrimSpace(string(b))
	}
	shard, keys := Destination(t, id).Place()
	t.Shard, t.Shards = shard, 1
	t.DecisionsKey, t.AgentsKey, t.ApprovalsKey = keys[0], keys[1], keys[2]
	return t
}

// ClientTLS reads the files that c names. The result is nil without TLS; an
// empty ServerName is left to who dials. Called for each connection it takes up
// renewed files without a restart.
func ClientTLS(c config.TLS) (*tls.Config, error) {
	if !c.Enabled {
		return nil, nil //nolint:nilnil // no TLS is a valid answer
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file %s: no certificate in PEM form in it", c.CAFile)
		}
	}
	if c.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("cert_file and key_file: %w", err)
		}
		t.Certificates = []tls.Certificate{cert}
	}
	return t, nil
}

// logNotStarted says why the sensor does not run, in one line.
func logNotStarted(ctx context.Context, err error) {
	fields := []zap.Field{zap.String(logging.KeyCode, "NOT_STARTED"), zap.Error(err)}
	if r := (*sensor.Refusal)(nil); errors.As(err, &r) {
		fields[0] = zap.String(logging.KeyCode, "REFUSED")
		fields = append(fields, zap.String("check", r.Check)) // of edr-sensor doctor
	}
	logging.From(ctx).Error("not started", fields...)
}

// exerciseDir is where the sensor tries its hooks: in memory beside the control socket,
// if nobody else can write there, otherwise with its state.
func (a *Agent) exerciseDir() string {
	if a.cfg.Control.Socket != "" {
		dir := filepath.Dir(a.cfg.Control.Socket)
		err := os.MkdirAll(dir, 0o755) // as for the socket, which is made later
		fi, errStat := os.Stat(dir)
		if err != nil || errStat != nil || fi.Mode().Perm()&0o022 != 0 {
			return a.cfg.Agent.StateDir
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) == os.Geteuid() {
			return dir
		}
	}
	return a.cfg.Agent.StateDir
}

// logEnd says what the run amounted to, in the one line that people look for.
func (a *Agent) logEnd(ctx context.Context, sum summary, err error) {
	fields := []zap.Field{zap.String(logging.KeyCode, "STOPPED"), zap.Uint64("seen", sum.seen), zap.Uint64("sent", sum.sent), zap.Uint64("lost", sum.lost), zap.Uint64("kept", sum.kept)}
	if err != nil {
		logging.From(ctx).Error("stopped", append(fields, zap.Error(err))...)
		return
	}
	logging.From(ctx).Info("stopped", fields...)
}

// summary is what a run amounted to, in records.
type summary struct{ seen, sent, lost, kept uint64 }

// summarise is called when nothing moves any more and nothing is closed yet.
func (a *Agent) summarise(before summary) summary {
	b, s := a.queue.Stats(), summary{}
	s.seen = b.Before + b.Last - before.seen
	s.lost = b.Truncated - before.lost + a.sensor.Lost()
	s.kept = b.Last - b.Acked
	s.sent = b.Before + b.Acked - before.sent
	return s
}
