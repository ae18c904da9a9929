// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/durable"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
)

// lineage tells an installation from a copy of it. It is a file in the state
// directory, and what stands in it is no secret.
type lineage struct {
	Machine   string   `json:"machine"`   // hash of what identifies the machine
	Directory uint64   `json:"directory"` // inode of the buffer's directory: a copy has another
	Processes []string `json:"processes"` // that have delivered from the buffer, see transport.Options
}

func lineageFile(stateDir string) string { return filepath.Join(stateDir, "lineage.json") }

// loadLineage returns the zero lineage when there is none, or none that is readable:
// then nothing can be concluded.
func loadLineage(stateDir string) (l lineage) {
	b, err := os.ReadFile(lineageFile(stateDir))
	if err != nil || json.Unmarshal(b, &l) != nil {
		return lineage{}
	}
	return l
}

func (l lineage) save(stateDir string) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return durable.WriteFile(lineageFile(stateDir), append(b, '\n'))
}

// machine identifies the machine by the installation's id and the hardware's, as far
// as they are there; a cloned virtual machine often has the first in common.
func machine(root string) string {
	h := sha256.New()
	for _, path := range []string{"etc/machine-id", "sys/class/dmi/id/product_uuid"} {
		b, err := os.ReadFile(filepath.Join(root, path))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "" // not allowed: it must not look like another machine
		}
		fmt.Fprintf(h, "%s\x00", strings.TrimSpace(string(b)))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func inode(dir string) uint64 {
	fi, err := os.Stat(dir)
	if err != nil {
		return 0
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}

// place is under which name and in which epoch the agent delivers.
type place struct{ agent, epoch string }

// settle looks whether state and buffer were made by this installation on this
// machine, before anything is delivered. What was copied goes on under an epoch of
// its own, and on another machine under another id.
func (a *Agent) settle(ctx context.Context, root string) error {
	stateDir := a.cfg.Agent.StateDir
	l, now := loadLineage(stateDir), lineage{Machine: machine(root), Directory: inode(a.bufferDir())}
	cause, cloned := "", false
	switch {
	case l.Machine != "" && now.Machine != "" && l.Machine != now.Machine:
		cause, cloned = "state and buffer come from another machine", true
	case l.Directory != 0 && l.Directory != now.Directory && a.queue.Bounds().Last > 0:
		cause = "the buffer was copied or restored"
	}
	a.place.Store(&place{a.identity.ID, a.queue.Epoch()})
	if cause != "" {
		var err error
		if a.moved, err = a.move(ctx, "", cloned, cause); err != nil {
			return err
		}
		a.identity.ID = a.place.Load().agent
	}
	if now.Machine == "" {
		now.Machine = l.Machine
	}
	now.Processes = l.Processes
	a.lineage = now
	if now.Machine == l.Machine && now.Directory == l.Directory {
		return nil
	}
	err := now.save(stateDir)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// A full disk keeps nobody from starting: with the old file the next start moves once more.
		logging.From(ctx).Error("what tells this installation from a copy is not kept", zap.Error(err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("agent.state_dir: %w", err)
	}
	return nil
}

// move takes the buffer to an epoch above the one given, and the agent to a new id
// when somebody else may use the old one. An id that was configured stays. In this
// order a crash between the two makes the other one move.
func (a *Agent) move(ctx context.Context, above string, cloned bool, cause string) (*event.SelfInfo, error) {
	before := *a.place.Load()
	epoch, err := a.queue.Renew(ctx, above)
	if err != nil {
		return nil, err
	}
	waiting := a.queue.Stats().Unsent
	after := place{before.agent, epoch}
	if cloned && a.cfg.Agent.ID == "" {
		id := newUUID()
		if err := durable.WriteFile(filepath.Join(a.cfg.Agent.StateDir, "agent_id"), []byte(id+"\n")); err != nil {
			// Without the new id on disk the next start would have the old one again.
			logging.From(ctx).Error("the agent keeps its id", zap.Error(err))
		} else {
			after.agent = id
		}
	}
	a.place.Store(&after)
	return &event.SelfInfo{
		Name: "Identity New", Severity: 4, Failed: true, Code: "IDENTITY_NEW", Before: before.agent, After: after.agent, Count: waiting,
		Message: fmt.Sprintf("%s: %d records that were not delivered go on in epoch %s, as agent %s", cause, waiting, after.epoch, after.agent),
		Attrs:   map[string]any{"cause": cause, "cloned": cloned, "epoch_before": before.epoch, "epoch_after": after.epoch},
	}, nil
}

// renew is move for the sender, which the server has refused.
func (a *Agent) renew(ctx context.Context, f transport.Fencing) (string, error) {
	i, err := a.move(ctx, f.Epoch, f.Cloned, f.Cause)
	if err != nil {
		return "", err
	}
	a.decide(ctx, *i)
	return a.place.Load().agent, nil
}

// remember keeps the processes that have delivered; only the sender calls it.
func (a *Agent) remember(processes []string) error {
	a.lineage.Processes = processes
	return a.lineage.save(a.cfg.Agent.StateDir)
}
