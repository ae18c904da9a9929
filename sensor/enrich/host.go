// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// initialPIDNamespace is the inode number of the initial pid namespace, fixed by
// the kernel (PROC_PID_INIT_INO), so that it is known also inside another one.
const initialPIDNamespace = 0xEFFFFFFC

// LoadHost describes this machine. It fails only when the boot id or the kernel
// release cannot be read; what else is missing stays empty.
func LoadHost() (event.Host, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return event.Host{}, fmt.Errorf("load host: %w", err)
	}
	if id := strings.TrimSpace(string(boot)); parseUUID(id) == [16]byte{} {
		return event.Host{}, fmt.Errorf("load host: boot id %q is not a UUID", id)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return event.Host{}, fmt.Errorf("load host: uname: %w", err)
	}
	h := event.Host{
		BootID:        strings.TrimSpace(string(boot)),
		KernelRelease: unix.ByteSliceToString(u.Release[:]),
		CPUBits:       strconv.IntSize,
		PIDNS:         initialPIDNamespace,
		Hostname:      unix.ByteSliceToString(u.Nodename[:]),
		MachineID:     machineID(readHostFile("/etc/machine-id")),
	}
	if h.MachineID == "" {
		h.MachineID = machineID(readHostFile("/var/lib/dbus/machine-id"))
	}
	ktime, wall := readClocks()
	h.BootTime = time.Unix(0, wall-ktime).UTC()
	release := readHostFile("/etc/os-release")
	if release == nil {
		release = readHostFile("/usr/lib/os-release")
	}
	h.OSName, h.OSVersion = parseOSRelease(release)
	h.IP = defaultAddress(readHostFile("/proc/net/route"), readHostFile("/proc/net/ipv6_route"), interfaceAddrs)
	return h, nil
}

func readHostFile(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil // optional, as LoadHost says
	}
	return data
}

// machineID checks the content of /etc/machine-id, which may be empty or
// "uninitialized".
func machineID(data []byte) string {
	s := strings.ToLower(string(bytes.TrimSpace(data)))
	if b, err := hex.DecodeString(s); err != nil || len(b) != 16 {
		return ""
	}
	return s
}

// parseOSRelease returns NAME and VERSION_ID (os-release(5)); rolling
// distributions have no VERSION_ID, then BUILD_ID.
func parseOSRelease(data []byte) (name, version string) {
	values := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(key, "#") {
			values[key] = unquote(value)
		}
	}
	name, version = values["NAME"], values["VERSION_ID"]
	if name == "" {
		name = "Linux" // the default that os-release(5) names
	}
	if version == "" {
		version = values["BUILD_ID"]
	}
	return name, version
}

// unquote undoes the shell quoting that os-release(5) allows.
func unquote(s string) string {
	if len(s) < 2 || s[0] != s[len(s)-1] || s[0] != '"' && s[0] != '\'' {
		return s
	}
	inner := s[1 : len(s)-1]
	if s[0] == '\'' || !strings.Contains(inner, `\`) {
		return inner
	}
	var b strings.Builder
	for i := 0; i < len(inner); i++ {
		if inner[i] == '\\' && i+1 < len(inner) {
			i++
		}
		b.WriteByte(inner[i])
	}
	return b.String()
}

// defaultAddress is an address of the interface that the default route leaves
// by: IPv4 with the lowest metric, or else IPv6.
func defaultAddress(route4, route6 []byte, addrs func(iface string) []net.IP) string {
	for _, ip := range addrs(defaultInterface4(route4)) {
		if v4 := ip.To4(); v4 != nil {
			return v4.String()
		}
	}
	for _, ip := range addrs(defaultInterface6(route6)) {
		if ip.To4() == nil && ip.IsGlobalUnicast() {
			return ip.String()
		}
	}
	return ""
}

// defaultInterface4 reads /proc/net/route: Iface Destination Gateway Flags RefCnt
// Use Metric Mask …, addresses in hex.
func defaultInterface4(data []byte) (iface string) {
	best := uint64(1) << 63
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 8 || f[1] != "00000000" || f[7] != "00000000" {
			continue
		}
		flags, err := strconv.ParseUint(f[3], 16, 32)
		metric, err2 := strconv.ParseUint(f[6], 10, 63)
		if err != nil || err2 != nil || flags&unix.RTF_UP == 0 || flags&unix.RTF_REJECT != 0 || metric >= best {
			continue
		}
		best, iface = metric, f[0]
	}
	return iface
}

// defaultInterface6 reads /proc/net/ipv6_route: destination, its prefix length,
// source, its prefix length, next hop, metric, references, uses, flags, Iface.
func defaultInterface6(data []byte) (iface string) {
	best := uint32(1<<32 - 1)
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 10 || f[1] != "00" || f[3] != "00" || strings.Trim(f[0], "0") != "" {
			continue
		}
		metric, err := hex.DecodeString(f[5])
		flags, err2 := strconv.ParseUint(f[8], 16, 32)
		if err != nil || err2 != nil || len(metric) != 4 || flags&unix.RTF_UP == 0 || flags&unix.RTF_REJECT != 0 {
			continue
		}
		if m := binary.BigEndian.Uint32(metric); m < best {
			best, iface = m, f[9]
		}
	}
	return iface
}

func interfaceAddrs(name string) (ips []net.IP) {
	if name == "" {
		return nil
	}
	iface, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	addrs, err := iface.Addrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			ips = append(ips, n.IP)
		}
	}
	return ips
}
