// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// FileOptions say which changes of the file system are reported.
type FileOptions struct {
	On bool // without, there are no file events
	// Rate is how many events of one process are reported in a second, Burst how many
	// at once after a quiet time. Those above are counted as suppressed. Rate 0 is no
	// limit.
	Rate, Burst int
	// ExcludeExecutables are programs whose file events are not reported,
	// ExcludeDirectories what they are not reported from, with all below. Both are
	// looked up once, at the start, and known by their inodes from then on.
	ExcludeExecutables, ExcludeDirectories []string
	// Shed says by what the rate is lower than configured, if it is.
	Shed string
}

// fileSlots is FILE_SLOTS in bpf/file.bpf.h.
const fileSlots = 4

// configureFiles puts the options into the maps' sizes.
func configureFiles(spec *ebpf.CollectionSpec, o FileOptions, cpus uint32) {
	spec.Maps["file_slots"].MaxEntries = cpus * fileSlots
	if !o.On {
		for _, name := range []string{"file_slots", "written_files", "file_buckets"} {
			spec.Maps[name].MaxEntries = 1
		}
	}
	spec.Maps["file_exclusions"].MaxEntries = uint32(max(fileExclusions, len(o.ExcludeExecutables)+len(o.ExcludeDirectories)))
}

// fileExclusions is how many exclusions there may be at least without a restart.
const fileExclusions = 512

// Values of enum exclusion in bpf/scope.bpf.h.
const (
	excludeExecutable = 1
	excludeDirectory  = 2
)

// exclusionKey is struct exclusion_key of bpf/scope.bpf.h.
type exclusionKey struct {
	Ino  uint64
	Dev  uint32
	What uint32
}

// fileFilter is struct file_filter of bpf/scope.bpf.h.
type fileFilter struct {
	Interval, Burst          uint64
	Executables, Directories uint32
	ProtectedFiles, _        uint32
}

// filter has the programs leave out what o says, from now on. What is not there
// cannot be excluded: it is returned, and the others are excluded. With an error
// everything is as it was.
func (k *kernel) filter(o FileOptions) (missing []error, err error) {
	wanted, missing := exclusions(o)
	k.filtering.Lock()
	defer k.filtering.Unlock()
	m := k.maps["file_exclusions"]
	var old []exclusionKey
	var key exclusionKey
	var value uint8
	for it := m.Iterate(); it.Next(&key, &value); {
		old = append(old, key)
	}
	f := fileFilter{ProtectedFiles: k.protected.Load()}
	for _, key := range wanted {
		if !slices.Contains(old, key) {
			err = errors.Join(err, m.Put(key, uint8(1)))
		}
		if key.What == excludeExecutable {
			f.Executables++
		} else {
			f.Directories++
		}
	}
	if o.Rate > 0 {
		f.Interval = uint64(time.Second) / uint64(o.Rate)
		f.Burst = f.Interval * uint64(max(o.Burst, 1)-1)
	}
	if err == nil {
		err = k.maps["file_filter"].Put(uint32(0), f)
	}
	gone := old
	if err != nil {
		gone, wanted = wanted, old
	}
	for _, key := range gone {
		if !slices.Contains(wanted, key) {
			if derr := m.Delete(key); derr != nil && !errors.Is(derr, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, derr)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("set file filter of %d exclusions: %w", len(wanted), err)
	}
	return missing, nil
}

// exclusions looks up what is to be left out.
func exclusions(o FileOptions) (keys []exclusionKey, missing []error) {
	for what, paths := range [][]string{excludeExecutable: o.ExcludeExecutables, excludeDirectory: o.ExcludeDirectories} {
		for _, path := range paths {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				missing = append(missing, fmt.Errorf("exclude %s: %w", path, err))
				continue
			}
			keys = append(keys, exclusionKey{Ino: st.Ino, Dev: unix.Major(st.Dev)<<20 | unix.Minor(st.Dev), What: uint32(what)})
		}
	}
	return keys, missing
}

// Filter changes what file events leave out, while the sensor runs: the rate, the
// burst and the exclusions of o. What is not there cannot be excluded; missing says
// so of each. With an error nothing has changed.
func (s *Sensor) Filter(o FileOptions) (missing []error, err error) {
	if missing, err = s.kernel.filter(o); err == nil {
		s.shed.Store(&o.Shed)
	}
	return missing, err
}

// kernelFunction is the function whose parameters a program gets, if any.
func kernelFunction(spec *ebpf.ProgramSpec) string {
	switch {
	case spec.Type == ebpf.LSM:
		return "bpf_lsm_" + spec.AttachTo
	case spec.Type == ebpf.Kprobe || spec.AttachType == ebpf.AttachTraceFEntry:
		return spec.AttachTo
	}
	return ""
}

// argumentShift finds where names stand in a row among a function's parameters, and that
// there is the function.
func argumentShift(types *btf.Spec, function string, names []string) (uint32, error) {
	if function == "" {
		return 0, nil
	}
	var fn *btf.Func
	if err := types.TypeByName(function, &fn); err != nil {
		return 0, fmt.Errorf("parameters of %s: %w", function, err)
	}
	if len(names) == 0 {
		return 0, nil
	}
	proto, ok := fn.Type.(*btf.FuncProto)
	if !ok {
		return 0, fmt.Errorf("parameters of %s: it has none", function)
	}
	var have []string
	for _, p := range proto.Params {
		have = append(have, p.Name)
	}
	at := slices.Index(have, names[0])
	if at < 0 || at > 1 || len(have) < at+len(names) || !slices.Equal(have[at:at+len(names)], names) {
		return 0, fmt.Errorf("%s has the parameters %s, not %s", function, strings.Join(have, ", "), strings.Join(names, ", "))
	}
	return uint32(at), nil
}

// probeLSM finds out whether the kernel runs LSM programs. It loads and attaches
// them even when it never will.
func (k *kernel) probeLSM(load loader) error {
	active, err := os.ReadFile("/sys/kernel/security/lsm")
	if err == nil && !slices.Contains(strings.Split(string(bytes.TrimSpace(active)), ","), "bpf") {
		return fmt.Errorf("bpf is not among the active security modules %s: add it to lsm= of the kernel's command line", bytes.TrimSpace(active))
	}
	var probe attachment
	if err := probe.try(candidate{"lsm_probe"}, load); err != nil {
		return errors.Join(err, probe.detach())
	}
	f, err := os.Open("/proc/self/stat")
	if err == nil {
		err = f.Close()
	}
	var runs uint64
	err = errors.Join(err, k.maps["lsm_probe_runs"].Lookup(uint32(0), &runs), probe.detach())
	if err == nil && runs == 0 {
		err = errors.New("a program on lsm/file_open was attached and did not run")
	}
	return err
}

const (
	sysExit        = "raw_tp/sys_exit"
	sysExitProgram = "raw_sys_exit"
)

// attachSyscalls has system calls tell the events that no program sees otherwise. One
// program tells them all, so one of before goes.
func (k *kernel) attachSyscalls(load loader) {
	var bits uint64
	var missing []*attachment
	k.attached = slices.DeleteFunc(k.attached, func(a attachment) bool {
		return a.section == sysExit && len(a.syscalls) == 0 && a.detach() == nil
	})
	for i := range k.attached {
		a := &k.attached[i]
		if len(a.links) == 0 && len(a.syscalls) > 0 {
			a.section = ""
			missing = append(missing, a)
			for _, kind := range a.syscalls {
				bits |= 1 << kind
			}
		}
	}
	if bits == 0 {
		return
	}
	a := attachment{hook: hook{chain: []candidate{{sysExitProgram}}, copies: k.find(event.Fork).copies}}
	err := k.spec.Variables["syscall_kinds"].Set(bits)
	for number, pair := range syscallTable() {
		err = errors.Join(err, k.maps["file_syscalls"].Put(number, pair))
	}
	if err == nil {
		err = a.take(0, load)
	}
	if err != nil {
		err = errors.Join(err, a.detach())
	}
	for _, m := range missing {
		switch {
		case err != nil:
			m.errs = append(m.errs, err)
		case slices.Equal(m.kinds, m.syscalls):
			m.section = a.section
		default: // other events in their place
			a.kinds = append(a.kinds, m.syscalls...)
			a.errs = append(a.errs, m.errs...)
		}
	}
	k.attached = append(k.attached, a)
}
