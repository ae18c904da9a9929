// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestTLSRotation replaces certificates of both sides while the Sender runs: each that
// is not good holds delivery, with everything kept, and the good one that follows ends
// that without a restart. The server has no other port.
func TestTLSRotation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	caFile := filepath.Join(dir, "ca.pem")
	write := func(pem []byte) {
		t.Helper()
		if err := os.WriteFile(caFile+".new", pem, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(caFile+".new", caFile); err != nil {
			t.Fatal(err)
		}
	}
	first, second, stranger := newCA(t), newCA(t), newCA(t)
	expired := &authority{cert: first.cert, key: first.key, pem: first.pem, age: 90 * time.Minute}
	serverCert, serverKey := first.issue(t, dir, "server", "127.0.0.1")
	clientCert, clientKey := first.issue(t, dir, "client", "client")
	trusted := filepath.Join(dir, "trusted.pem") // by the server
	if err := os.WriteFile(trusted, append(bytes.Clone(first.pem), second.pem...), 0o600); err != nil {
		t.Fatal(err)
	}
	write(first.pem)
	port := redistest.FreePort(t)
	srv := redistest.Start(t, redistest.Options{Config: map[string]string{
		"tls-port": fmt.Sprint(port), "tls-cert-file": serverCert, "tls-key-file": serverKey, "tls-ca-cert-file": trusted, "tls-auth-clients": "yes",
	}})
	c := srv.Client()
	defer c.Close()
	present := func(a *authority, name string) { // by the server, from now on
		t.Helper()
		cert, key := a.issue(t, dir, "server-next", name)
		// Both are loaded together, at the second of them.
		if err := c.Do(t.Context(), "CONFIG", "SET", "tls-cert-file", cert, "tls-key-file", key).Err(); err != nil {
			t.Fatal(err)
		}
	}
	o := fast(fmt.Sprintf("127.0.0.1:%d", port))
	o.TLS = func() (*tls.Config, error) {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		cert, err := tls.LoadX509KeyPair(clientCert, clientKey)
		return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, err
	}
	q := newMemQueue()
	s := start(t, o, q)
	s.delivered(t, q.add(10, buffer.Events, false))
	for _, tt := range []struct {
		name          string
		spoil, repair func()
		says          string
	}{
		{"expired", func() { present(expired, "127.0.0.1") }, func() { present(first, "127.0.0.1") }, "expired"},
		{"wrong name", func() { present(first, "redis.example") }, func() { present(first, "127.0.0.1") }, "IP SANs"},
		{"unknown ca", func() { present(second, "127.0.0.1") }, func() { write(append(bytes.Clone(first.pem), second.pem...)) }, "unknown authority"},
		{"client expired", func() { expired.issue(t, dir, "client", "client") }, func() { first.issue(t, dir, "client", "client") }, "tls"},
		{"client of an unknown ca", func() { stranger.issue(t, dir, "client", "client") }, func() { second.issue(t, dir, "client", "client") }, "tls"},
		{"no ca file", func() { os.Remove(caFile) }, func() { write(second.pem) }, "no such file"},
	} {
		before := s.State().Acked
		tt.spoil()
		if err := c.Do(t.Context(), "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes").Err(); err != nil {
			t.Fatal(err)
		}
		last := q.add(10, buffer.Events, false)
		if st := s.reaches(t, Held, ClassTLS); st.Acked != before || !strings.Contains(st.Error, tt.says) {
			t.Errorf("%s: %+v", tt.name, st)
		}
		tt.repair()
		s.delivered(t, last)
		s.reaches(t, Connected, ClassNone) // the next one's state must not be this one's
	}
	exactlyOnce(t, c, q.last)
}

// TestSecretsStayInside: whatever goes wrong, the password is in no line of the log, no
// state, no metric and nowhere in what a panic would print of an error.
func TestSecretsStayInside(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-in-file"
	srv := redistest.Start(t, redistest.Options{TCP: true, Password: "good", Config: map[string]string{"requirepass": "good"}})
	proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{DropReply: .2, Reset: .2, Seed: 3})
	var mu sync.Mutex
	var log bytes.Buffer
	core := zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.Lock(zapcore.AddSync(&locked{&mu, &log})), zapcore.DebugLevel)
	ctx := logging.Into(t.Context(), zap.New(core))
	for _, addr := range []string{srv.Addr(), proxy.Addr(), "127.0.0.1:1"} {
		o := fast(addr)
		o.Username = "edr-sensor"
		o.PasswordFile = writePassword(t, "", secret)
		s, err := New(o, newMemQueue())
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			err := s.serve(ctx, 1)
			if err == nil {
				t.Fatal("it was let in")
			}
			s.fail(ctx, err)
			for _, text := range []string{err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err), fmt.Sprintf("%+v", s.State())} {
				if strings.Contains(text, secret) {
					t.Errorf("%s: the password shows in %s", addr, text)
				}
			}
		}
		s.Close()
	}
	mu.Lock()
	defer mu.Unlock()
	if log.Len() == 0 || strings.Contains(log.String(), secret) {
		t.Errorf("%d bytes of log, or the password in it", log.Len())
	}
}

// locked is a writer for several goroutines.
type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func TestSenderOverTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newCA(t)
	serverCert, serverKey := ca.issue(t, dir, "server", "127.0.0.1")
	caFile := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(caFile, ca.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	port := redistest.FreePort(t)
	srv := redistest.Start(t, redistest.Options{TCP: true, Config: map[string]string{
		"tls-port": fmt.Sprint(port), "tls-cert-file": serverCert, "tls-key-file": serverKey, "tls-ca-cert-file": caFile, "tls-auth-clients": "yes",
	}})
	c := srv.Client()
	defer c.Close()
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.pem)
	certFile, keyFile := ca.issue(t, dir, "client", "client")
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	with := func(edit func(*Options, *tls.Config)) Options {
		o := fast(addr)
		o.DialTimeout = 300 * time.Millisecond
		cfg := &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
		o.TLS = func() (*tls.Config, error) { return cfg, nil }
		edit(&o, cfg)
		return o
	}

	q := newMemQueue()
	last := q.add(20, buffer.Events, false)
	s := start(t, with(func(*Options, *tls.Config) {}), q)
	s.delivered(t, last)
	exactlyOnce(t, c, last)
	s.stop(t)

	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, tt := range []struct {
		name  string
		phase Phase
		class Class
		edit  func(*Options, *tls.Config)
	}{
		{"unknown ca", Held, ClassTLS, func(_ *Options, c *tls.Config) { c.RootCAs = x509.NewCertPool() }},
		{"wrong name", Held, ClassTLS, func(_ *Options, c *tls.Config) { c.ServerName = "redis.example" }},
		{"no client certificate", Held, ClassTLS, func(_ *Options, c *tls.Config) { c.Certificates = nil }},
		{"plain port", Retrying, ClassHandshake, func(o *Options, _ *tls.Config) { o.Addr = srv.Addr() }},
		{"silent port", Retrying, ClassHandshake, func(o *Options, _ *tls.Config) { o.Addr = silent.Addr().String() }},
		{"plain client", Retrying, ClassNetwork, func(o *Options, _ *tls.Config) { o.TLS = nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t, with(tt.edit), newMemQueue())
			s.reaches(t, tt.phase, tt.class)
		})
	}
}

// authority is a CA made for one test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	age  time.Duration // how long ago the certificates it issues were made
}

func newCA(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue writes a certificate and its key for a name or an IP address.
func (a *authority) issue(t *testing.T, dir, file, name string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour - a.age), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(name); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, file+".pem"), filepath.Join(dir, file+".key")
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}
