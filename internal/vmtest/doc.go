// SPDX-License-Identifier: Apache-2.0

// Package vmtest holds the tests that boot other kernels: it fetches Debian's,
// starts each in a virtual machine with the test binaries of the packages that talk
// to the kernel, and reports what they say as tests of its own, for example
// TestVM/6.1/sensor/TestRootExec. What they say is seen is in docs/coverage.md. It also boots
// Debian's releases with systemd, where the tests of package installed lead the packages
// through their lives. It has no code of its own.
package vmtest
