// SPDX-License-Identifier: Apache-2.0

// Package installed holds the tests that internal/vmtest runs inside of virtual machines
// with systemd, where they install the packages, lead them through their lives and remove
// them. Anywhere else they skip. It has no code of its own.
package installed
