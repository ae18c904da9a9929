// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/aurorasoc/edr-sensor/bpf"
)

// setupOf sums up everything by which one kernel differs from another but for what is
// changed while it runs.
func setupOf(spec *ebpf.CollectionSpec, o kernelOptions) string {
	h := sha256.New()
	fmt.Fprintln(h, bpf.ObjectHash(), o.Scope, o.Copies, o.Files.On, hooks(o.Files.On, o.Copies))
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		fmt.Fprintln(h, name, spec.Maps[name].MaxEntries)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// wireOf sums up the layout of the records that the rings carry, by the number of their
// kind: its name, and the struct that it comes in. The error is about what all of them have
// in common.
func wireOf(types *btf.Spec) (map[uint32]string, error) {
	var numbers *btf.Enum
	if err := types.TypeByName("event_kind", &numbers); err != nil {
		return nil, fmt.Errorf("layout of records: %w", err)
	}
	header, err := layoutOf(types, "event_header")
	if err != nil {
		return nil, err
	}
	wire := map[uint32]string{}
	for _, v := range numbers.Values {
		name := strings.TrimPrefix(v.Name, "EVENT_KIND_")
		layout := header
		if s := structOf(name); s != "" {
			if layout, err = layoutOf(types, s); err != nil {
				return nil, err
			}
		}
		wire[uint32(v.Value)] = name + " " + layout
	}
	wire[^uint32(0)] = header
	return wire, nil
}

// structOf is the struct in which records of a kind come.
func structOf(kind string) string {
	switch {
	case kind == "EXEC", kind == "TASK":
		return "exec_event"
	case kind == "FORK":
		return "fork_event"
	case kind == "EXIT":
		return "exit_event"
	case strings.HasPrefix(kind, "TCP_"):
		return "tcp_event"
	case strings.HasPrefix(kind, "FILE_"), strings.Contains(kind, "MOUNT"):
		return "file_event"
	case kind == "SIGNAL", kind == "PTRACE":
		return "tamper_event"
	case kind == "HEARTBEAT":
		return "heartbeat"
	}
	return ""
}

func layoutOf(types *btf.Spec, name string) (string, error) {
	var s *btf.Struct
	if err := types.TypeByName(name, &s); err != nil {
		return "", fmt.Errorf("layout of %s: %w", name, err)
	}
	h := sha256.New()
	writeLayout(h, s)
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// stateOf sums up the layouts of the maps by which programs know what began before.
func stateOf(spec *ebpf.CollectionSpec) map[string]string {
	layouts := map[string]string{}
	for _, name := range [...]string{"sockets", "written_files", "scope_pids"} {
		h := sha256.New()
		m := spec.Maps[name]
		fmt.Fprintln(h, m.Type, m.KeySize, m.ValueSize)
		if s, ok := btf.UnderlyingType(m.Value).(*btf.Struct); ok {
			writeLayout(h, s)
		}
		layouts[name] = hex.EncodeToString(h.Sum(nil))
	}
	return layouts
}

func writeLayout(w io.Writer, s *btf.Struct) {
	fmt.Fprintln(w, s.Name, s.Size)
	for _, m := range s.Members {
		fmt.Fprintln(w, m.Name, m.Offset, btf.UnderlyingType(m.Type).TypeName())
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			writeLayout(w, inner)
		}
	}
}
