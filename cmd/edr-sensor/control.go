// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

// control asks a running sensor over its unix socket.
type control struct {
	socket string
	client http.Client
}

// control finds the socket: the one named, else the configured one. Who may use
// the socket need not be allowed to read the configuration, so then the default
// is tried.
func (a *app) control(socket string) (*control, error) {
	if socket == "" {
		socket = config.Default().Control.Socket
		c, err := config.Load(a.configFile(), a.environ)
		switch {
		case err == nil:
			socket = c.Control.Socket
		case a.configPath != "" || !unreadable(a.configFile()):
			return nil, &exit{exitConfig, fmt.Errorf("configuration:\n%w", err), "edr-sensor check" + a.configFlag()}
		}
	}
	var d net.Dialer
	return &control{socket, http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}}, nil
}

func unreadable(path string) bool { return errors.Is(unix.Access(path, unix.R_OK), fs.ErrPermission) }

// get opens an answer; the caller closes it. It ends with ctx.
func (c *control) get(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://sensor"+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, errors.Join(&exit{exitFailure, fmt.Errorf("ask the sensor for %s: %s: %s", path, resp.Status, strings.TrimSpace(string(text))), ""}, resp.Body.Close())
	}
	return resp.Body, nil
}

// explain turns the three ways in which a socket refuses into what to do.
func (c *control) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return &exit{exitFailure, fmt.Errorf("no sensor answers on %s", c.socket), "systemctl status edr-sensor, or name its socket with --socket"}
	case errors.Is(err, fs.ErrPermission):
		return &exit{exitPrivilege, fmt.Errorf("this user may not use %s", c.socket), "sudo edr-sensor, or join the group named by control.group"}
	}
	return fmt.Errorf("ask the sensor on %s: %w", c.socket, err)
}
