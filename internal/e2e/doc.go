// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the end-to-end tests: the built binary, a real redis-server
// and the real kernel. It has no code of its own. Every test watches only the
// process tree of a workload that it starts itself.
package e2e
