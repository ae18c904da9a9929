// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"crypto/sha256"
	"encoding/hex"
)

// ObjectHash is the SHA-256 of the programs for this machine, in hex: it tells
// which programs ran, whoever built the binary around them.
func ObjectHash() string {
	sum := sha256.Sum256(_SensorBytes)
	return hex.EncodeToString(sum[:])
}
