// SPDX-License-Identifier: Apache-2.0

package sensor

import "os"

// Probe loads and attaches every hook for a moment, reporting nothing but the
// calling process, and says what this host allows. It works beside a running
// sensor. The error is about the maps; a hook that is refused is in the coverage.
func Probe() ([]Coverage, error) {
	page := os.Getpagesize()
	k, _, err := loadKernel(kernelOptions{
		Scope: Scope{Mode: ScopeTree, PID: uint32(os.Getpid())}, PriorityBytes: page, BulkBytes: page, Files: FileOptions{On: true},
	}, nil)
	if err != nil {
		return nil, err
	}
	// What attach has to say against a hook is in the coverage, with the reason.
	_ = k.attach()
	return k.coverage(), k.close()
}
