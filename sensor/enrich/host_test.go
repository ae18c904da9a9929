// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLoadHost(t *testing.T) {
	h, err := LoadHost()
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if h.Hostname != name || h.KernelRelease == "" || parseUUID(h.BootID) == [16]byte{} || h.OSName == "" || h.CPUBits != 64 {
		t.Errorf("LoadHost = %+v", h)
	}
	if since := time.Since(h.BootTime); since <= 0 {
		t.Errorf("booted %v ago", since)
	}
	if h.IP != "" && net.ParseIP(h.IP) == nil {
		t.Errorf("IP = %q", h.IP)
	}
}

func TestMachineID(t *testing.T) {
	for in, want := range map[string]string{
		"0123456789abcdef0123456789abcdef\n": "0123456789abcdef0123456789abcdef",
		"0123456789ABCDEF0123456789abcdef":   "0123456789abcdef0123456789abcdef",
		"uninitialized\n":                    "", "": "", "0123": "",
	} {
		if got := machineID([]byte(in)); got != want {
			t.Errorf("machineID(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestParseOSRelease(t *testing.T) {
	for _, tt := range []struct{ name, in, wantName, wantVersion string }{
		{"debian", "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n", "Debian GNU/Linux", "12"},
		{"arch", "NAME='Arch Linux'\nBUILD_ID=rolling\n", "Arch Linux", "rolling"},
		{"escapes", `NAME="a \"b\" \\ \$c"` + "\n#NAME=x\nnonsense\n", `a "b" \ $c`, ""},
		{"bare", "NAME=Alpine\nVERSION_ID=3.20.1", "Alpine", "3.20.1"},
		{"odd quotes", "NAME=\"\nVERSION_ID='1\"\n", `"`, `'1"`},
		{"none", "", "Linux", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name, version := parseOSRelease([]byte(tt.in))
			if diff := cmp.Diff([]string{tt.wantName, tt.wantVersion}, []string{name, version}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDefaultAddress(t *testing.T) {
	const (
		head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
		eth0 = "eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
		wlan = "wlan0\t00000000\t010200C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
		down = "eth9\t00000000\t010200C0\t0002\t0\t0\t1\t00000000\t0\t0\t0\n"
		net4 = "eth8\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
		zero = "00000000000000000000000000000000"
		six  = zero + " 00 " + zero + " 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n"
		none = zero + " 00 " + zero + " 00 " + zero + " ffffffff 00000001 00000000 00200200       lo\n"
	)
	addrs := map[string][]net.IP{
		"eth0":  {net.ParseIP("fe80::1"), net.ParseIP("2001:db8::5"), net.ParseIP("192.0.2.5"), net.ParseIP("192.0.2.6")},
		"wlan0": {net.ParseIP("192.0.2.9")},
		"lo":    {net.ParseIP("::1")},
	}
	for _, tt := range []struct{ name, four, six, want string }{
		{"lowest metric", head + wlan + eth0, "", "192.0.2.5"},
		{"one", head + wlan, six, "192.0.2.9"},
		{"no default", head + net4 + down, "", ""},
		{"IPv6 only", head, none + six, "2001:db8::5"},
		{"unreachable", head, none, ""},
		{"garbage", "a b c\n\n\x00", "x\n" + strings.Repeat("0 ", 12), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := defaultAddress([]byte(tt.four), []byte(tt.six), func(iface string) []net.IP { return addrs[iface] })
			if got != tt.want {
				t.Errorf("defaultAddress = %q, want %q", got, tt.want)
			}
		})
	}
}
