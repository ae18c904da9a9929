// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the kernel programs, compiled for amd64 and arm64, and the
// Go form of the types they share with user space. It is generated from
// sensor.bpf.c and events.h and holds no logic; package sensor loads it.
package bpf

//go:generate clang-format-19 -i events.h kernel.h maps.bpf.h scope.bpf.h self.bpf.h tamper.bpf.h slot.bpf.h walk.bpf.h process.bpf.h net.bpf.h file.bpf.h syscall.bpf.h sensor.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -go-package bpf -no-global-types -type event_kind -type process_flags -type tcp_flags -type file_flags -type event_header -type cred_info -type ns_info -type file_info -type exec_event -type fork_event -type exit_event -type tcp_event -type file_event -type tamper_event -type tamper_flags -type tamper_call -type sensor_process -type protection -type reach -type name_key -type heartbeat -type announced -type kind_counter Sensor sensor.bpf.c -- -O2 -g -Wall -Werror -Wpadded -mcpu=v3
