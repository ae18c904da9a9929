// SPDX-License-Identifier: Apache-2.0

package redistest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
)

// given are the ports that this process was given: one that is not listened on yet, or whose
// server is down, is as free as any. What keeps them apart cannot belong to one test.
var given sync.Map

// FreePort returns a TCP port on loopback that was free a moment ago, and none twice. It is
// none that the kernel gives to outgoing connections: of those other tests make so many that
// one would take a port between this and the server's start, or while the server is down.
func FreePort(tb testing.TB) int {
	tb.Helper()
	const least = 10_000
	var low, high int
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(b), &low, &high)
	}
	for range 100 {
		port := 0 // any, where nothing is known or left
		if low > 2*least {
			port = least + rand.N(low-least)
		}
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		port = ln.Addr().(*net.TCPAddr).Port
		_, again := given.LoadOrStore(port, nil)
		ln.Close()
		if !again {
			return port
		}
	}
	tb.Fatal("no free TCP port on 127.0.0.1 found in 100 tries")
	return 0
}
