// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

// sensorStatus is the part of /status that a screen shows. It is kept apart from
// the server's type, because the two may be of different versions.
type sensorStatus struct {
	Version  string            `json:"version"`
	AgentID  string            `json:"agent_id"`
	Mode     string            `json:"mode"`
	Since    time.Time         `json:"since"`
	Reason   string            `json:"reason"`
	Problems []problem         `json:"problems"`
	Scope    string            `json:"scope"`
	Context  map[string]string `json:"context"`
	Errors   []string          `json:"errors"`
	Warnings []logLine         `json:"warnings"`
	Cases    []sensorCase      `json:"cases"`
	Coverage []covered         `json:"coverage"`
	Sensor   struct {
		Events map[string]uint64 `json:"events"`
		Lost   map[string]uint64 `json:"lost"`

		Suppressed map[string]uint64 `json:"suppressed"`
		Rings      map[string]struct {
			Used uint64 `json:"used"`
			Size uint64 `json:"size"`
		} `json:"rings"`
	} `json:"sensor"`
	Rates *struct {
		Events    map[string]float64 `json:"events"`
		Delivered float64            `json:"delivered"`
		Fill      float64            `json:"fill_bytes"`
	} `json:"rates"`
	Buffer struct {
		Records     uint64             `json:"records"`
		Unsent      uint64             `json:"unsent"`
		Last        uint64             `json:"last"`
		Bytes       int64              `json:"bytes"`
		UnsentBytes int64              `json:"unsent_bytes"`
		Cap         int64              `json:"cap"`
		FullIn      *float64           `json:"full_in_seconds"`
		Truncated   uint64             `json:"truncated"`
		Corrupt     uint64             `json:"corrupt"`
		Oldest      time.Time          `json:"oldest_unsent"`
		Hazards     []string           `json:"hazards"`
		ResizeError string             `json:"resize_error"`
		Error       string             `json:"error"`
		Recovery    *evidence.Recovery `json:"recovery"`
		Quarantined int64              `json:"quarantined_bytes"`
	} `json:"buffer"`
	Transport struct {
		State      string    `json:"state"`
		Address    string    `json:"address"`
		Since      time.Time `json:"since"`
		ErrorClass string    `json:"error_class"`
		Error      string    `json:"error"`
		Hint       string    `json:"hint"`
		Warning    string    `json:"warning"`
		Acked      uint64    `json:"acked"`
		Refused    uint64    `json:"refused"`
	} `json:"transport"`
}

type problem struct {
	Reason string `json:"reason"`
	Metric string `json:"metric"`
}

type covered struct {
	Event  string   `json:"event"`
	Hook   string   `json:"hook"`
	Blind  string   `json:"blind"`
	Errors []string `json:"errors"`
}

// logLine is a line of the sensor's log.
type logLine struct {
	Time      time.Time `json:"time"`
	Level     string    `json:"level"`
	Msg       string    `json:"msg"`
	Component string    `json:"component"`
	Code      string    `json:"code"`
	Reason    string    `json:"reason"`
	Error     string    `json:"error"`
}

func (a *app) statusCommand() *cobra.Command {
	var socket, when string
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the running sensor sees, keeps, sends and misses",
		Long: `Show on one screen how the running sensor does: its mode and why, what it sees of
this host and what it does not, how many events there are of each kind and how many
were lost, how full the buffer is and how long it will last, how far delivery is
behind, the open cases, and the newest warnings of its log.

Rates are over the last ten seconds; the time until the buffer is full is reckoned
from the last minute.`,
		Example: `  edr-sensor status
  edr-sensor status --watch
  edr-sensor status --json | jq .buffer`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch && asJSON {
				return usage(cmd, "--watch and --json exclude each other")
			}
			c, err := a.control(socket)
			if err != nil {
				return err
			}
			if watch {
				return a.watchStatus(cmd.Context(), c, a.style(when))
			}
			answer, s, err := readStatus(cmd.Context(), c)
			if err != nil {
				return err
			}
			if asJSON {
				_, err := a.stdout.Write(append(bytes.TrimSpace(answer), '\n'))
				return err
			}
			_, err = io.WriteString(a.stdout, s.screen(time.Now(), time.Local, a.style(when)).String())
			return err
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control socket of the sensor (default: control.socket)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on showing it; q or Ctrl-C ends")
	addColourFlag(cmd, &when)
	return cmd
}

// readStatus asks a sensor for its status.
func readStatus(ctx context.Context, c *control) (answer []byte, s *sensorStatus, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	body, err := c.get(ctx, "/status")
	if err != nil {
		return nil, nil, err
	}
	defer body.Close()
	if answer, err = io.ReadAll(io.LimitReader(body, 1<<20)); err == nil {
		err = json.Unmarshal(answer, &s)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read status: %w", err)
	}
	if s == nil {
		return nil, nil, errors.New("read status: the answer is empty")
	}
	return answer, s, nil
}

// watchStatus shows the status until it is ended.
func (a *app) watchStatus(ctx context.Context, c *control, st style) error {
	var s *sensorStatus
	return a.live(ctx, liveView{
		every: time.Second,
		look: func() error {
			_, now, err := readStatus(ctx, c)
			if err == nil {
				s = now
			}
			return err
		},
		draw: func(st style) []string { return s.screen(time.Now(), time.Local, st).lines },
	}, st)
}
