// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is a redis-server, ours or one that was given.
type server struct {
	plain, tls string // addresses; tls is empty without it
	roots      *x509.CertPool

	args []string // how it is started; nil: it was given
	dir  string
	proc *os.Process
	gone chan struct{}

	asked float64 // connections of ours since it was started
}

// keyKind is that of a server's certificate.
type keyKind string

const (
	ecdsaKey keyKind = "ECDSA P-256"
	rsaKey   keyKind = "RSA 2048"
)

// startServer runs a redis-server as operations.md advises, for that many connections.
func startServer(ctx context.Context, dir string, connections int, kind keyKind) (*server, error) {
	s := &server{dir: dir, roots: x509.NewCertPool()}
	var ports [2]int
	for i := range ports {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		ports[i] = ln.Addr().(*net.TCPAddr).Port
		ln.Close()
	}
	s.plain, s.tls = fmt.Sprintf("127.0.0.1:%d", ports[0]), fmt.Sprintf("127.0.0.1:%d", ports[1])
	if err := s.certify(kind); err != nil {
		return nil, err
	}
	s.args = []string{
		"--bind", "127.0.0.1", "--port", strconv.Itoa(ports[0]), "--dir", dir, "--logfile", filepath.Join(dir, "redis.log"),
		"--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0",
		"--maxclients", strconv.Itoa(connections + 100), "--tcp-backlog", "4096",
		"--tls-port", strconv.Itoa(ports[1]), "--tls-auth-clients", "no", "--tls-cert-file", filepath.Join(dir, "cert.pem"),
		"--tls-key-file", filepath.Join(dir, "key.pem"), "--tls-ca-cert-file", filepath.Join(dir, "cert.pem"),
	}
	return s, s.start(ctx)
}

// certify makes a certificate for the loopback.
func (s *server) certify(kind keyKind) error {
	var key crypto.Signer
	var err error
	if kind == rsaKey {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	s.roots.AppendCertsFromPEM(public)
	return errors.Join(
		os.WriteFile(filepath.Join(s.dir, "cert.pem"), public, 0o600),
		os.WriteFile(filepath.Join(s.dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
}

// start runs the server and waits until it serves.
func (s *server) start(ctx context.Context) error {
	started, gone := make(chan error, 1), make(chan struct{})
	go func() { // it dies with the thread that started it, if this process does
		defer close(gone)
		runtime.LockOSThread()
		cmd := exec.Command("redis-server", s.args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		s.proc = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed: the status says nothing
		}
	}()
	s.gone, s.asked = gone, 0
	if err := <-started; err != nil {
		return err
	}
	for {
		if _, err := s.command(ctx, "DBSIZE"); err == nil {
			return nil
		}
		select {
		case <-gone:
			text, _ := os.ReadFile(filepath.Join(s.dir, "redis.log"))
			return fmt.Errorf("redis-server ended: %s", text)
		case <-ctx.Done():
			return fmt.Errorf("redis-server does not serve: %w", ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// kill ends it as a crash would.
func (s *server) kill() {
	if s.proc == nil {
		return
	}
	_ = s.proc.Kill() // gone already is as good
	<-s.gone
	s.proc = nil
}

func (s *server) config() (*tls.Config, error) {
	return &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS12}, nil
}

// command sends one command, without spaces in its words, on a connection of its own.
func (s *server) command(ctx context.Context, words ...string) (string, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp", s.plain)
	if err != nil {
		return "", err
	}
	s.asked++
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, strings.Join(words, " ")+"\r\n"); err != nil {
		return "", err
	}
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimRight(line, "\r\n")
	switch {
	case strings.HasPrefix(line, "-"):
		return "", errors.New(line[1:])
	case strings.HasPrefix(line, "$"):
		n, err := strconv.ParseUint(line[1:], 10, 20)
		if err != nil {
			return "", err
		}
		b := make([]byte, n)
		_, err = io.ReadFull(r, b)
		return string(b), err
	}
	return strings.TrimLeft(line, "+:"), nil
}

// facts are what INFO says, as numbers.
type facts map[string]float64

func (s *server) facts(ctx context.Context) (facts, error) {
	text, err := s.command(ctx, "INFO", "everything")
	if err != nil {
		return nil, err
	}
	f := facts{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if calls, is := strings.CutPrefix(value, "calls="); is {
			value, _, _ = strings.Cut(calls, ",")
		}
		if n, err := strconv.ParseFloat(value, 64); err == nil {
			f[key] = n
		}
	}
	f["asked"] = s.asked
	f["cpu"] = f["used_cpu_sys"] + f["used_cpu_user"]
	return f, nil
}

// sum adds up what the servers say.
func sum(ctx context.Context, servers []*server) (facts, error) {
	all := facts{}
	for _, s := range servers {
		f, err := s.facts(ctx)
		if err != nil {
			return nil, err
		}
		for k, v := range f {
			all[k] += v
		}
	}
	return all, nil
}

// number asks for one.
func (s *server) number(ctx context.Context, words ...string) (float64, error) {
	text, err := s.command(ctx, words...)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(text, 64)
}
