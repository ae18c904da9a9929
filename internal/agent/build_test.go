// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/metricstest"
)

// TestScopeOfCgroup takes a scope only where the kernel compares with its number: on a mixed
// host /sys/fs/cgroup itself is a directory of another file system, and the whole hierarchy
// is cgroup:/.
func TestScopeOfCgroup(t *testing.T) {
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			root = dir
		}
	}
	if root == "" {
		t.Skip("no hierarchy of control groups of version 2 is mounted")
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/", root} {
		scope, err := scopeOf(config.Scope{Kind: config.ScopeCgroup, Cgroup: path})
		if err != nil || scope.CgroupID != st.Ino {
			t.Errorf("cgroup:%s is group %d: %v; want %d", path, scope.CgroupID, err, st.Ino)
		}
	}
	file := filepath.Join(root, "cgroup.procs")
	if _, err := os.Stat(file); err != nil {
		t.Fatal(err)
	}
	for path, wrong := range map[string]bool{root + "/..": true, file: true, "/no/such/group": false} {
		scope, err := scopeOf(config.Scope{Kind: config.ScopeCgroup, Cgroup: path})
		if problem := (*config.Problem)(nil); err == nil || errors.As(err, &problem) != wrong {
			t.Errorf("cgroup:%s is group %d: %v; want an error, of the configuration: %t", path, scope.CgroupID, err, wrong)
		}
	}
}

// TestUnusableTLSFiles starts a sensor with files of transport.tls that cannot be used: it
// watches and buffers, tells it as it tells all that is wrong with delivery, and goes on by
// itself once they can be.
func TestUnusableTLSFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b pem.Block) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&b), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	server := httptest.NewTLSServer(nil)
	server.Close()
	certificate := pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	noCert := pem.Block{Type: "PRIVATE KEY", Bytes: der}
	cert, other := write("cert.pem", certificate), write("other.key", noCert)
	for _, tt := range []struct {
		name string
		tls  config.TLS
		says string
	}{
		{"no CA file", config.TLS{CAFile: filepath.Join(dir, "late.pem")}, "ca_file: open " + dir + "/late.pem: no such file"},
		{"no CA in it", config.TLS{CAFile: write("no-ca.pem", noCert)}, "no certificate in PEM form"},
		{"no key", config.TLS{CertFile: cert, KeyFile: filepath.Join(dir, "no.key")}, "no.key: no such file"},
		{"another's key", config.TLS{CertFile: cert, KeyFile: other}, "cert_file and key_file: tls: private key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := onlyThis(t, os.Getpid())
			cfg.Transport.Address, cfg.Transport.TLS = "127.0.0.1:1", tt.tls
			cfg.Transport.TLS.Enabled = true
			cfg.Transport.BackoffBase, cfg.Transport.BackoffLimit, cfg.Transport.ReconnectSpread = time.Millisecond, 20*time.Millisecond, time.Millisecond
			a, err := New(t.Context(), Options{Loaded: Loaded{Config: cfg}, Version: "test"})
			if err != nil {
				t.Fatal(err)
			}
			view, before := a.tap.open(false), metricstest.Gather(t, a.registry)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- a.Run(ctx) }()
			if said := decided(t, view, "DELIVERY_HELD"); !strings.Contains(said, tt.says) {
				t.Errorf("the decision does not say %q: %s", tt.says, said)
			}
			if s := a.status().Transport; s.State != "held" || s.ErrorClass != "tls" || !strings.Contains(s.Error, tt.says) {
				t.Errorf("/status: %+v", s)
			}
			metricstest.Moved(t, before, metricstest.Gather(t, a.registry), "transport_errors_total")
			if err := exec.Command("true").Run(); err != nil {
				t.Fatal(err)
			}
			decided(t, view, "process.exec") // and is in the buffer
			if tt.tls.CAFile != "" {
				if err := os.WriteFile(tt.tls.CAFile, pem.EncodeToMemory(&certificate), 0o600); err != nil {
					t.Fatal(err)
				}
				for limit := time.Now().Add(time.Minute); a.status().Transport.ErrorClass != "dial"; pass(10 * time.Millisecond) {
					if time.Now().After(limit) {
						t.Fatalf("the file is not read again: %+v", a.status().Transport)
					}
				}
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}
