// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

// control asks a running sensor over its unix socket.
type control struct {
	socket string
	client http.Client
	wrong  error // the configuration's problems, in which the socket's name may be
}

// control finds the socket: the one named, else the configured one. Who may use the socket
// need not be allowed to read the configuration, so then the default is tried. Problems of
// the configuration are the running sensor's to judge: it is told of a reload that it has to
// refuse, and answers while somebody edits.
func (a *app) control(socket string) (*control, error) {
	if socket != "" {
		return newControl(socket), nil
	}
	path := a.configFile()
	conf, settings, err := config.Explain(path, a.environ)
	c := newControl(conf.Control.Socket)
	switch {
	case err == nil, a.configPath == "" && unreadable(path):
	case path == config.DefaultPath, slices.ContainsFunc(settings, func(s config.Setting) bool { return s.Key == "control.socket" && s.Source != "default" }):
		c.wrong = a.configError(err)
	default: // the socket may be that of another sensor
		return nil, a.configError(err)
	}
	return c, nil
}

func newControl(socket string) *control {
	var d net.Dialer
	return &control{socket: socket, client: http.Client{Transport: &http.Transport{
		ReadBufferSize: 64 << 10, // a trailer has to fit
		DialContext:    func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}}
}

func unreadable(path string) bool { return errors.Is(unix.Access(path, unix.R_OK), fs.ErrPermission) }

// get opens an answer; the caller closes it. It ends with ctx.
func (c *control) get(ctx context.Context, path string) (io.ReadCloser, error) {
	return c.do(ctx, http.MethodGet, path, http.NoBody)
}

// ask sends a value as JSON and reads the answer into another.
func (c *control) ask(ctx context.Context, method, path string, request, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	body, err := c.do(ctx, method, path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, 1<<20)).Decode(answer); err != nil {
		return fmt.Errorf("read the sensor's answer: %w", err)
	}
	return nil
}

// read reads an answer as JSON within a time; 0: as long as it takes.
func (c *control) read(ctx context.Context, path string, within time.Duration, answer any) error {
	if within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, within)
		defer cancel()
	}
	body, err := c.get(ctx, path)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, 1<<20)).Decode(answer); err != nil {
		return fmt.Errorf("read the sensor's answer: %w", err)
	}
	return nil
}

func (c *control) do(ctx context.Context, method, path string, send io.Reader) (io.ReadCloser, error) {
	resp, err := c.open(ctx, method, path, send)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// open asks; the caller closes the body of the answer.
func (c *control) open(ctx context.Context, method, path string, send io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://sensor"+path, send)
	if err != nil {
		return nil, err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, errors.Join(refusal(path, resp, strings.TrimSpace(string(text))), resp.Body.Close())
	}
	return resp, nil
}

// refusal says what the sensor said, as far as that is meant for people.
func refusal(path string, resp *http.Response, text string) error {
	switch {
	case resp.StatusCode == http.StatusNotFound && text == "404 page not found":
		return &exit{exitFailure, fmt.Errorf("the sensor that runs does not know %s: it is of another version", path), "systemctl restart edr-sensor, after an upgrade"}
	case resp.StatusCode == http.StatusForbidden:
		return &exit{exitPrivilege, errors.New(text), ""}
	case resp.StatusCode >= 400 && resp.StatusCode < 500:
		return &exit{exitFailure, errors.New(text), ""}
	}
	return &exit{exitFailure, fmt.Errorf("ask the sensor for %s: %s: %s", path, resp.Status, text), ""}
}

// errNoSensor is what the error matches when nobody listens on the socket.
var errNoSensor = errors.New("no sensor answers")

func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }

// explain turns the three ways in which a socket refuses into what to do.
func (c *control) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		if c.wrong != nil {
			return c.wrong
		}
		return &exit{exitFailure, fmt.Errorf("%w on %s", errNoSensor, c.socket), "systemctl status edr-sensor, or name its socket with --socket"}
	case errors.Is(err, fs.ErrPermission):
		return &exit{exitPrivilege, fmt.Errorf("this user may not use %s", c.socket), "sudo edr-sensor, or join the group named by control.group"}
	}
	return fmt.Errorf("ask the sensor on %s: %w", c.socket, err)
}
