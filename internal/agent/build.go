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

// scopeOf turns the configured scope into what the kernel compares.
func scopeOf(c config.Scope) (sensor.Scope, error) {
	switch c.Kind {
	case config.ScopeTree:
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", c.PID)); err != nil {
			return sensor.Scope{}, fmt.Errorf("sensor.scope %s: no such process: name one that runs", c)
		}
		return sensor.Scope{Mode: sensor.ScopeTree, PID: c.PID}, nil
	case config.ScopeCgroup:
		id, err := cgroupID(c.Cgroup)
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

// cgroupID is the inode number of the cgroup's directory (cgroup_id in the
// kernel). The path is below the v2 mount, wherever that is, or absolute.
func cgroupID(path string) (uint64, error) {
	candidates := []string{path}
	if !strings.HasPrefix(path, "/sys/fs/cgroup") {
		candidates = []string{filepath.Join("/sys/fs/cgroup", path), filepath.Join("/sys/fs/cgroup/unified", path)}
	}
	var errs []error
	for _, p := range candidates {
		fi, err := os.Stat(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && fi.IsDir() {
			return st.Ino, nil
		}
		errs = append(errs, fmt.Errorf("%s is no directory", p))
	}
	return 0, errors.Join(errs...)
}

func (a *Agent) newSender(ctx context.Context) (*transport.Sender, error) {
	t := a.cfg.Transport
	tlsConfig, err := ClientTLS(t.TLS)
	if err != nil {
		return nil, fmt.Errorf("transport.tls: %w", err)
	}
	s, err := transport.New(transport.Options{
		Addr: t.Address, TLS: tlsConfig, Username: t.Username, PasswordFile: t.PasswordFile, DB: t.DB,
		AgentID: a.identity.ID, Prefix: t.Prefix, Shard: t.Shard,
		SystemKey: t.DecisionsKey, AgentsKey: t.AgentsKey, ApprovalsKey: t.ApprovalsKey, DecisionsLimit: t.DecisionsMaxLen,
		BatchRecords: t.BatchRecords, BatchBytes: t.BatchBytes, Linger: t.Linger, Timeout: t.Timeout,
		BackoffBase: t.BackoffBase, BackoffCap: t.BackoffLimit,
		Registerer: a.registry,
		OnChange:   a.deliveryDecisions(ctx),
	}, a.queue)
	if err != nil {
		return nil, fmt.Errorf("transport: %w", err)
	}
	return s, nil
}

// ClientTLS reads the files that c names. The result is nil without TLS; an
// empty ServerName is left to who dials. Certificates are read again at each
// handshake.
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
		// Read at each handshake, so that a renewed certificate needs no restart.
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			return &cert, err
		}
		if _, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile); err != nil {
			return nil, fmt.Errorf("cert_file and key_file: %w", err)
		}
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
	s.seen = b.Last - before.seen
	s.lost = b.Truncated - before.lost + a.sensor.Lost()
	s.kept = b.Last - b.Acked
	s.sent = b.Acked - before.sent
	return s
}
