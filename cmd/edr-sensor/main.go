// SPDX-License-Identifier: Apache-2.0

// Command edr-sensor watches a Linux host with eBPF and delivers what it sees
// as OCSF events to Redis Streams. One file per subcommand; each turns flags
// and configuration into one call and its outcome into an exit code.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker (-X main.version=…).
var version = ""

func main() {
	os.Exit(execute())
}

// execute ends at the first signal in order, and at the second at once: by then
// the signal has its default action again. The buffer is safe at any instant.
func execute() int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // before anybody can see that the end began, and send the second
		cancel()
	}()
	a := app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, environ: os.Environ()}
	return a.run(ctx, os.Args[1:])
}
