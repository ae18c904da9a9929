// SPDX-License-Identifier: Apache-2.0

package enrich

import (
	"bytes"
	"os"
	"strconv"
	"time"
)

// nameFile looks up the names of numeric ids in a file like /etc/passwd or
// /etc/group, which it reads again when the file has changed. It never asks
// NSS: that would block on the network, or load code into the sensor.
type nameFile struct {
	path    string
	checked uint64 // kernel time of the last look at the file
	known   bool   // whether it was ever looked at
	mtime   time.Time
	size    int64
	names   map[uint32]string
}

// nameFileMax bounds what is read of a file; 16 MiB are some 200,000 users.
const nameFileMax = 16 << 20

// name returns the name of id, or "". The file is looked at no more than once a
// second of kernel time.
func (f *nameFile) name(id uint32, ktime uint64) string {
	if !f.known || ktime > f.checked+uint64(time.Second) {
		f.known, f.checked = true, ktime
		f.refresh()
	}
	return f.names[id]
}

// refresh keeps the names it has when the file cannot be read, as while an
// editor replaces it.
func (f *nameFile) refresh() {
	info, err := os.Stat(f.path)
	if err != nil || info.Size() > nameFileMax || info.ModTime().Equal(f.mtime) && info.Size() == f.size {
		return
	}
	data, err := os.ReadFile(f.path)
	if err != nil {
		return
	}
	f.mtime, f.size, f.names = info.ModTime(), info.Size(), parseNames(data)
}

// parseNames reads lines "name:password:id:…". As getpwuid(3) does, it takes the
// first name of an id and passes over what is no such line.
func parseNames(data []byte) map[uint32]string {
	names := map[uint32]string{}
	for line := range bytes.Lines(data) {
		if line[0] == '+' || line[0] == '-' || line[0] == '#' {
			continue // NIS directives and comments
		}
		name, rest, ok := bytes.Cut(line, []byte{':'})
		_, rest, ok2 := bytes.Cut(rest, []byte{':'})
		number, _, ok3 := bytes.Cut(rest, []byte{':'})
		if !ok || !ok2 || !ok3 || len(name) == 0 {
			continue
		}
		id, err := strconv.ParseUint(string(number), 10, 32)
		if err != nil {
			continue
		}
		if _, taken := names[uint32(id)]; !taken {
			names[uint32(id)] = string(name)
		}
	}
	return names
}
